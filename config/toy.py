"""Pretraining on the toy world: alignment, then advance. About a minute on a CPU.

    python -m toy --out=shards/toy
    python convert.py assemble --vision=toy/vit --llm=toy/llm --out=out/toy/start
    python train.py config/toy.py

It starts from the toy world's own ViT and language model, with a fresh projector between them.
"""
out_dir = "out/toy/pretrain"
init_from = "out/toy/start"
data = "shards/toy/pretrain-*.tar"
# A tile has 84 pixels. A wide or tall picture gets 2 to 4 of them and a thumbnail.
min_tiles = 1
max_tiles = 4
# About 7 samples. At this size the number of steps counts, and that of the samples hardly does.
tokens_per_pack = 480
max_tiles_per_pack = 40
# Pictures this small are decoded faster than they travel between processes.
num_workers = 0
dtype = "float32"
beta2 = 0.98
save_every = 100
print_every = 20

alignment.steps = 160
# For a fresh, tiny projector. The rates of real ones are in config/pretrain_2b.py.
alignment.lr_projector = 6e-3
alignment.warmup_steps = 10
alignment.weight_decay = 0.02

advance.steps = 90
advance.lr_vision = 3e-4
advance.lr_projector = 1.5e-3
advance.warmup_steps = 10
advance.weight_decay = 0.02
