"""Ablations of pretraining on one GPU of 24 GB, on top of the 2B recipe.

A smaller language model, smaller packs and fewer steps:

    python convert.py assemble --vision=InternViT-300M-448px --llm=Qwen2.5-0.5B-Instruct \\
        --out=start_ablation
    python train.py config/pretrain_2b.py config/ablation.py --init_from=start_ablation \\
        --data=META.json --dry_run=True
"""
out_dir = "out/ablation/pretrain"
llm = "qwen2.5-0.5b"                    # with InternViT-300M the parts of InternVL2.5-1B
max_tiles = 6
max_tiles_per_pack = 24
tokens_per_pack = 4096
grad_accum_steps = 16                   # 32 samples of 2048 tokens
activation_checkpointing = "selective"
save_every = 250
val_every = 250

alignment.steps = 1000
alignment.warmup_steps = 50
advance.steps = 2000
advance.warmup_steps = 50
