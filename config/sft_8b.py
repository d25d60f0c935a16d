"""SAIL-VL-8B supervised fine-tuning: a curriculum of three stages, 21M + 12M + 3.5M samples; everything trains.

    torchrun --nproc_per_node=8 sft.py config/sft_8b.py --init_from=out/pretrain_8b/advance

The recipe of the 2B model, whose file says what [IVL] and [I] mean, with these changes.
"""
import builtins                       # `compile` by itself is a setting here
_2b = __file__.replace("_8b.py", "_2b.py")
exec(builtins.compile(open(_2b, encoding="utf-8").read(), _2b, "exec"))

out_dir = "out/sft_8b"
llm = "qwen2.5-7b"                    # [P]
parallel = "fsdp"                     # the state of 8B is sharded: see --dry_run=True
knowledge.lr_vision = knowledge.lr_projector = knowledge.lr_llm = 2e-5          # [IVL] as for larger models
instruction.lr_vision = instruction.lr_projector = instruction.lr_llm = 2e-5    # [IVL]
preference.lr_vision = preference.lr_projector = preference.lr_llm = 1e-5       # [I] half, at the end
knowledge.weight_decay = instruction.weight_decay = preference.weight_decay = 0.05      # [IVL] 8B
