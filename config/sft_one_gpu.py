"""Fine-tuning on your own data on one GPU of 80 GB, on top of the configuration of a size.

    python sft.py config/sft_2b.py config/sft_one_gpu.py --init_from=SAIL-VL-2B --data=my.jsonl
"""
out_dir = "out/sft_one_gpu"  # everything here is our choice
stages = "instruction"
activation_checkpointing = "full"  # each block again in the backward pass: a third more time
grad_accum_steps = 16  # 16 packs of 8192 tokens: some 64 to 400 samples a step
save_every = 100
instruction.steps = 500
instruction.warmup_steps = 15  # 3 %
