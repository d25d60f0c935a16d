"""The toy language model, second part: noise on what it reads, so that it understands an unready projector.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py config/toy_llm.py config/toy_llm_noise.py

Without it a frozen language model teaches a fresh projector letters last of all (LOG.md); with it from the first step
multiple choice and counting are not learned. Data first:
    python toy.py --out=shards/toy_llm_noise --n=150000 --seed=103 --parts=text
"""
init_from = "out/toy_llm/base"
out_dir = "out/toy_llm_noise"
data = "shards/toy_llm_noise/text.jsonl"
shuffle = True
cell_labels = "also"                  # each visual token says itself: alignment can then ask the frozen model for it
embed_noise = 1.0
base.steps = 6000
