"""The SFT curriculum on the toy world, after config/toy.py. About a minute on a CPU.

    python sft.py config/toy_sft.py
"""
out_dir = "out/toy/sft"
init_from = "out/toy/pretrain/advance"
min_tiles = 1
max_tiles = 4
tokens_per_pack = 600
max_tiles_per_pack = 40
num_workers = 0
dtype = "float32"
beta2 = 0.98
save_every = 100
print_every = 20

# One fact a question.
knowledge.data = "shards/toy/knowledge-*.tar"
knowledge.steps = 250
knowledge.lr_vision = 6e-4
knowledge.lr_projector = 2.5e-3
knowledge.lr_llm = 2.5e-4
knowledge.warmup_steps = 10
knowledge.weight_decay = 0.02

# Formats: multiple choice, short answers, two pictures.
instruction.data = "shards/toy/instruction-*.tar"
instruction.steps = 170
instruction.lr_vision = 3e-4
instruction.lr_projector = 1e-3
instruction.lr_llm = 2e-4
instruction.warmup_steps = 10
instruction.weight_decay = 0.02

# Several steps of reasoning.
preference.data = "shards/toy/preference-*.tar"
preference.steps = 60
preference.lr_vision = 1e-4
preference.lr_projector = 4e-4
preference.lr_llm = 8e-5
preference.warmup_steps = 10
preference.weight_decay = 0.02
