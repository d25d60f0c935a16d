"""Pretraining on the toy world: alignment, then advance. About a minute on a CPU.

It starts from the toy world's own ViT and language model with a fresh projector:

    python -m toy --out=shards/toy
    python convert.py assemble --vision=toy/vit --llm=toy/llm --out=out/toy/start
    python train.py config/toy.py
"""
out_dir = "out/toy/pretrain"
init_from = "out/toy/start"
data = "shards/toy/pretrain-*.tar"
min_tiles = 1
max_tiles = 4  # of 84 pixels; a wide or tall picture gets 2 to 4 and a thumbnail
tokens_per_pack = 480  # about 7 samples: here steps count, samples hardly
max_tiles_per_pack = 40
num_workers = 0  # pictures this small decode faster than they travel between processes
dtype = "float32"
beta2 = 0.98
save_every = 100
print_every = 20

alignment.steps = 160
alignment.lr_projector = 6e-3  # a fresh, tiny projector; the real ones are in config/pretrain_2b.py
alignment.warmup_steps = 10
alignment.weight_decay = 0.02

advance.steps = 90
advance.lr_vision = 3e-4
advance.lr_projector = 1.5e-3
advance.warmup_steps = 10
advance.weight_decay = 0.02
