"""SAIL-VL-2B supervised fine-tuning: a curriculum of three stages; everything trains.

21M + 12M + 3.5M samples.

    torchrun --nproc_per_node=8 sft.py config/sft_2b.py \\
        --init_from=out/pretrain_2b/advance \\
        --knowledge.data=k.json --instruction.data=i.json --preference.data=p.json

Marks as in config/pretrain_2b.py: [P] SAIL-VL, [S2] SAIL-VL2, [IVL] InternVL2.5,
[A] arithmetic, [I] our choice.
"""
# The model folder of the advance stage; "": random weights, for tests.
init_from = ""
out_dir = "out/sft_2b"
vision = "internvit-300m"               # [P] InternViT-300M-448px
llm = "qwen2.5-1.5b"                    # [P] Qwen2.5-1.5B-Instruct
template = "sailvl-chat"                # [P]
stages = "knowledge,instruction,preference"  # [P] rising complexity
max_tiles = 12                          # [P] max_dynamic_patch of the released config
min_tiles = 1                           # [P] min_dynamic_patch
thumbnail = True                        # [P] use_thumbnail
tokens_per_pack = 8192                  # [S2] packed length 8192
max_tiles_per_pack = 48                 # [IVL] at most 48 tiles in a packed row
# [A] 8 GPUs x 16 packs x 4 samples of 2048 tokens = [IVL] batch 512
grad_accum_steps = 16
# [IVL] "square": a sample of n supervised tokens has the weight 1/sqrt(n).
loss_weight = "sqrt"
beta1 = 0.9                             # [IVL]
beta2 = 0.999                           # [IVL]
eps = 1e-8                              # [IVL]
grad_clip = 1.0                         # [IVL]
dtype = "bfloat16"                      # [P]
parallel = "ddp"                        # 2B fits: see --dry_run=True
# [I] A pack full of tiles then fits into 80 GB: see --dry_run=True.
activation_checkpointing = "selective"
save_every = 500                        # [I]

# World knowledge, basic instructions; the public part is Infinity-MM stage 2 [P].
knowledge.data = ""
knowledge.steps = 41015                 # [A] 21M samples [P] / 512
knowledge.lr_vision = 4e-5              # [IVL] stage 2
knowledge.lr_projector = 4e-5           # [IVL] stage 2
knowledge.lr_llm = 4e-5                 # [IVL] stage 2
knowledge.warmup_steps = 1230           # [IVL] 3 % of the steps
knowledge.weight_decay = 0.01           # [IVL] 2B
knowledge.drop_path = 0.1               # [IVL]

# Visual instruction following.
instruction.data = ""
instruction.steps = 23437               # [A] 12M samples [P] / 512
instruction.lr_vision = 4e-5            # [IVL]
instruction.lr_projector = 4e-5         # [IVL]
instruction.lr_llm = 4e-5               # [IVL]
instruction.warmup_steps = 703          # [IVL] 3 % of the steps
instruction.weight_decay = 0.01         # [IVL] 2B
instruction.drop_path = 0.1             # [IVL]

# Small and complex: reasoning; the public part is Infinity-MM stage 4 [P].
preference.data = ""
preference.steps = 6835                 # [A] 3.5M samples [P] / 512
preference.lr_vision = 2e-5             # [I] half, at the end
preference.lr_projector = 2e-5          # [I] half, at the end
preference.lr_llm = 2e-5                # [I] half, at the end
preference.warmup_steps = 205           # [IVL] 3 % of the steps
preference.weight_decay = 0.01          # [IVL] 2B
preference.drop_path = 0.1              # [IVL]
