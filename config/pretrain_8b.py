"""SAIL-VL-8B pretraining: InternViT-300M, a fresh MLP, Qwen2.5-7B-Instruct.

25.6M samples, 52B tokens in both stages.

    torchrun --nproc_per_node=8 train.py config/pretrain_8b.py --init_from=start_8b \\
        --data=META.json

Where a value comes from: [P] published for SAIL-VL; [S2] its successor SAIL-VL2 of the same team;
[IVL] InternVL2.5, whose architecture it shares; [A] arithmetic from published values; [I] our
choice. SAIL-VL published no table of them.
"""
# A model folder from `convert.py assemble`; "": random weights, for tests.
init_from = ""
out_dir = "out/pretrain_8b"
vision = "internvit-300m"               # [P] InternViT-300M-448px
llm = "qwen2.5-7b"                      # [P] Qwen2.5-7B-Instruct
template = "sailvl-chat"                # [P]
# [P] First the projector alone, then ViT and projector; the LLM is frozen in both.
stages = "alignment,advance"
max_tiles = 12                          # [P] max_dynamic_patch of the released config
min_tiles = 1                           # [P] min_dynamic_patch
thumbnail = True                        # [P] use_thumbnail
tokens_per_pack = 8192                  # [S2] packed length 8192
max_tiles_per_pack = 48                 # [IVL] at most 48 tiles in a packed row
# [A] 8 GPUs x 64 packs x 4 samples of 2048 tokens = [S2] batch 2048
grad_accum_steps = 64
loss_weight = "token"                   # [I] one mean over tokens; InternVL2.5 has "sqrt"
beta1 = 0.9                             # [IVL]
beta2 = 0.999                           # [IVL]
eps = 1e-8                              # [IVL]
grad_clip = 1.0                         # [IVL]
dtype = "bfloat16"                      # [P]
# [I] The frozen LLM fits on each GPU, in bf16. So a step moves 0.2 or 2.4 GB a GPU and not some 30
# GB in each of its 64 packs, as with fsdp: docs/training.md.
parallel = "ddp"
# [I] A pack full of tiles then fits into 80 GB: see --dry_run=True.
activation_checkpointing = "selective"
save_every = 500                        # [I]

alignment.steps = 2500                  # [I] a fifth of 52B tokens [P], as in the 2B recipe
alignment.lr_projector = 2e-4           # [S2] basic pretraining, [IVL] stage 1
alignment.warmup_steps = 100            # [IVL] stage 1
alignment.weight_decay = 0.05           # [IVL] 8B models and larger

advance.steps = 10000                   # [I] the other four fifths
advance.lr_vision = 2e-5                # [S2] SAIL-ViT stage II
advance.lr_projector = 2e-5             # [S2]
advance.drop_path = 0.1                 # [IVL] whenever the ViT trains
advance.warmup_steps = 100              # [IVL] stage 1.5
advance.weight_decay = 0.05             # [IVL] 8B models and larger
