"""LoRA on your own data on one GPU of 24 GB, after the configuration of a size.

    python sft.py config/sft_2b.py config/sft_lora.py --init_from=SAIL-VL-2B --data=my.jsonl

Adapters train in the language model, all else is frozen. Marks: [IVL] InternVL2.5's
shell/internvl2.5/2nd_finetune/internvl2_5_2b_dynamic_res_2nd_finetune_lora.sh, [A] arithmetic,
[I] our choice. InternVL also drops 5 % of what goes into an adapter; there is no dropout here.
"""
out_dir = "out/sft_lora"
stages = "instruction"
lora_rank = 16                          # [IVL] use_llm_lora 16
lora_alpha = 32                         # [IVL] twice the rank
max_tiles = 6                           # [IVL] max_dynamic_patch 6
# [I] Each block is computed again in the backward pass: less memory, a third more time.
activation_checkpointing = "full"
grad_accum_steps = 4                    # [A] about [IVL] 16 samples a step, of 2048 tokens
save_every = 100                        # [I]
# [I] Ten times in 500 steps, so that keep_best has something to choose from.
val_every = 50
instruction.steps = 500                 # [I] [IVL] goes over its rows once: rows / 16
instruction.lr_vision = 0.0             # [IVL] freeze_backbone
instruction.lr_projector = 0.0          # [IVL] freeze_mlp
instruction.lr_llm = 4e-5               # [IVL]
instruction.warmup_steps = 15           # [IVL] 3 % of the steps
instruction.weight_decay = 0.01         # [IVL] 2B
instruction.drop_path = 0.0             # [IVL]
