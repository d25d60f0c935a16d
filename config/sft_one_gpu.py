"""Fine-tuning on your own data on one GPU of 80 GB, after the configuration of a size.

    python sft.py config/sft_2b.py config/sft_one_gpu.py --init_from=SAIL-VL-2B --data=my.jsonl

Everything here is our choice.
"""
out_dir = "out/sft_one_gpu"
stages = "instruction"
# Each block is computed again in the backward pass: a third more time, far less memory.
activation_checkpointing = "full"
# 16 packs of 8192 tokens: some 64 to 400 samples a step
grad_accum_steps = 16
save_every = 100
# Ten times, so that --keep_best=True has something to choose from.
val_every = 50
instruction.steps = 500
instruction.warmup_steps = 15           # 3 %
