"""The toy ViT, second part: noise on what it hands on, so that a fresh projector reads it easily.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py config/toy_vit.py config/toy_vit_noise.py

The throw-away decoder is now the frozen toy language model behind a fresh projector, as InternViT was trained before an
InternLM. Before it:
    python convert.py assemble --vision=out/toy_vit/base --llm=toy/llm --out=out/toy_vit_noise/start
    python toy.py --out=shards/toy_vit_noise --n=24000 --seed=101 --parts=drill
"""
init_from = "out/toy_vit_noise/start"
out_dir = "out/toy_vit_noise"
data = "shards/toy_vit_noise/drill-*.tar"
max_tiles = 8                         # of two pictures
llm = "toy"
cell_labels = "also"                  # and captions and questions, which say where things are
embed_noise = 0.8
base.steps = 2000
base.lr_vision, base.lr_projector, base.lr_llm = 5e-4, 3e-3, 0.0
