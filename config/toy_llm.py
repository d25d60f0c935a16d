"""The toy world's own language model: what Qwen2.5 is to the real recipe.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py config/toy_llm.py

Text only: every picture is given as the words of its cells, in the places where visual tokens will stand. The weights
in toy/llm were made in seventeen parts, for the world grew meanwhile; train.log there tells all but one. From
scratch, 13,000 steps of this file answer 87.8 % of the toy questions from words, those weights 99.1 % (LOG.md).
Data first: python toy.py --out=shards/toy_llm --n=230000 --seed=102 --parts=text
"""
out_dir = "out/toy_llm"
data = "shards/toy_llm/text.jsonl"
tokenizer = "toy/tokenizer"
image_as = "words"
llm = "toy"
stages = "base"
tokens_per_pack = 800
shuffle = False                       # the first fifth is easier
init_std = 0.05                       # 0.02 is for wider models
num_workers = 0
dtype = "bfloat16"                    # on a CPU without AVX512-BF16 or AMX take float32: it is much faster there
compile = "on"                        # with packs of one shape: 1.6 times faster here
pad_packs = True
beta2 = 0.98
loss_weight = "sample"                # else long captions drown short answers
base.steps = 13500
base.lr_llm = 1e-3
base.warmup_steps = 100
base.weight_decay = 0.02
base.min_lr_ratio = 0.03
print_every = 100
save_every = 500
