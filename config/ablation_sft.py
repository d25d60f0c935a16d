"""Ablations of fine-tuning on one GPU of 24 GB, on top of the 2B recipe, after config/ablation.py.

    python sft.py config/sft_2b.py config/ablation_sft.py --knowledge.data=K.json \\
        --instruction.data=I.json --preference.data=P.json
"""
out_dir = "out/ablation/sft"
init_from = "out/ablation/pretrain/advance"
llm = "qwen2.5-0.5b"
max_tiles = 6
max_tiles_per_pack = 24
tokens_per_pack = 4096
grad_accum_steps = 16
activation_checkpointing = "full"       # 17 GB; "selective" 27
save_every = 250
val_every = 250

knowledge.steps = 2000
knowledge.warmup_steps = 50
instruction.steps = 1500
instruction.warmup_steps = 50
preference.steps = 500
preference.warmup_steps = 50
