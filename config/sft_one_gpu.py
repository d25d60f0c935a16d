"""Fine-tuning on your own data on one GPU, after the configuration of a size; flags win over both:

    python sft.py config/sft_2b.py config/sft_one_gpu.py --init_from=SAIL-VL-2B --data=my.jsonl

Memory of the 2B by calculation: 33.4 GB of weights, gradients and moments, 4.2 GB of bf16 copies, at most 15 GB of
activations: a GPU of 80 GB. With --instruction.lr_vision=0 --instruction.lr_llm=0 the projector alone is trained and
it is 4.3 GB and at most 10 GB: a GPU of 24 GB. All numbers here are our choice; out_dir holds the result.
"""
out_dir = "out/sft_one_gpu"
stages = "instruction"
activation_checkpointing = True       # each block again in the backward pass: a third more time
grad_accum_steps = 16                 # 16 packs of 8192 tokens: some 64 to 400 samples a step
save_every = 100
instruction.steps = 500
instruction.warmup_steps = 15         # 3 %
