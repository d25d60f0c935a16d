"""SAIL-VL-8B pretraining: InternViT-300M + fresh MLP + Qwen2.5-7B-Instruct; 25.6M samples, 52B tokens in both stages.

    torchrun --nproc_per_node=8 train.py config/pretrain_8b.py --data=META.json

The recipe of the 2B model, whose file says what [P], [IVL] and [I] mean, with these changes.
"""
import builtins                       # `compile` by itself is a setting here
_2b = __file__.replace("_8b.py", "_2b.py")
exec(builtins.compile(open(_2b, encoding="utf-8").read(), _2b, "exec"))

out_dir = "out/pretrain_8b"
llm = "qwen2.5-7b"                    # [P] Qwen2.5-7B-Instruct
parallel = "fsdp"                     # the state of 8B is sharded: see --dry_run=True
alignment.steps = 2500                # [I] a fifth of 52B tokens [P], as in the 2B recipe
advance.steps = 10000                 # [I] the other four fifths
alignment.weight_decay = advance.weight_decay = 0.05    # [IVL] 8B models and larger
