"""The toy world's own ViT: what InternViT-300M is to the real recipe.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py config/toy_vit.py

A throw-away head names what each visual token sees or, of every second one, its place (dense supervision); only the ViT
is kept. The weights in toy/vit were made in five parts, for the world grew meanwhile: toy/vit/train.log.
Data first: python toy.py --out=shards/toy_vit --n=40000 --seed=101 --parts=pretrain
"""
out_dir = "out/toy_vit"
data = "shards/toy_vit/pretrain-*.tar"
tokenizer = "toy/tokenizer"
cell_labels = "only"                  # labels sit on the visual tokens, nowhere else
vision = "toy"
llm = "toy"
llm.n_layers = 0                      # the throw-away decoder: projector, norm, head
export = "vision"
stages = "base"
max_tiles = 4
min_tiles = 1
tokens_per_pack = 1600
max_tiles_per_pack = 40
num_workers = 0
dtype = "bfloat16"
compile = "on"
beta2 = 0.98
base.steps = 4000
base.lr_vision = 1.5e-3
base.lr_projector = 1.5e-3
base.lr_llm = 1.5e-3
base.warmup_steps = 50
base.weight_decay = 0.02
init_std = 0.04
print_every = 100
save_every = 500
