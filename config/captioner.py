"""The captioner: a model folder, fine-tuned on reference captions with and without alt-text.

    torchrun --nproc_per_node=8 sft.py config/captioner.py --init_from=MODEL_FOLDER \\
        --data='shards/reference/*.tar'

`curate.py annotate` writes the data, a dialogue a row. The paper starts from InternVL2-8B and gives
no numbers: [I] is our choice, [IVL] InternVL2.5's recipe for 8B.
"""
out_dir = "out/captioner"
stages = "instruction"
loss_weight = "sqrt"                    # [IVL]
tokens_per_pack = 8192                  # [I] some 4 to 6 pictures of up to 7 tiles with a caption
max_tiles_per_pack = 48                 # [IVL]
max_tiles = 6                           # [I] a caption needs less than reading a document
grad_accum_steps = 4                    # [I] 8 GPUs x 4 packs: about 160 captions a step
beta1 = 0.9                             # [IVL]
beta2 = 0.999                           # [IVL]
parallel = "fsdp"                       # without effect on one process
activation_checkpointing = "selective"  # [I] 8 ranks of an 8B then fit into 80 GB
save_every = 500                        # [I]

instruction.steps = 2000                # [I] one to two times through 200,000 references
instruction.warmup_steps = 60           # [IVL] 3 %
instruction.lr_vision = 2e-5            # [I]
instruction.lr_projector = 2e-5         # [I]
instruction.lr_llm = 2e-5               # [I]
instruction.weight_decay = 0.05         # [IVL]
