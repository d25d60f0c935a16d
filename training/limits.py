"""Settings that must fit one another; configurator.py has checked each alone."""
from training.lora import ranks


def check_together(cfg, origins, stages):
    """ValueError if two settings of a run contradict each other.

    A stage whose steps were cut on the command line may keep the longer warm-up of its recipe: that
    is how a recipe is tried.
    """
    if cfg.min_tiles > cfg.max_tiles:
        raise ValueError(f"min_tiles={cfg.min_tiles} is more than max_tiles={cfg.max_tiles}; "
                         "change one of them")
    if cfg.keep_best and not cfg.val_data:
        raise ValueError("keep_best=True keeps the checkpoint of the lowest validation loss, and "
                         "there is no val_data; give --val_data=PATH")
    for name, stage in stages:
        if cfg.keep_best and 1 < stage.steps <= cfg.val_every:
            raise ValueError(f"keep_best=True has one validation to choose from in stage {name}: "
                             f"val_every={cfg.val_every}, {name}.steps={stage.steps}; set "
                             f"--val_every={max(1, stage.steps // 10)}")
    if origins["lora_rank"] == "default":
        for key in ("lora_alpha", "lora_vision"):
            if origins[key] != "default":
                raise ValueError(f"{origins[key]} sets {key}, but there are no adapters: set "
                                 "--lora_rank=16 or another rank too")
    if cfg.lora_rank and cfg.dtype == "fp8":
        raise ValueError("--dtype=fp8 has no adapters; set --dtype=bfloat16, or --lora_rank=0")
    for name, stage in stages:
        if cfg.lora_rank and not any(ranks(cfg, stage)):
            raise ValueError(f"--lora_rank={cfg.lora_rank} has nothing to adapt in stage {name}: "
                             f"set {name}.lr_llm, or {name}.lr_vision and --lora_vision=True")
        flags = [key for key in ("steps", "warmup_steps")
                 if origins[f"{name}.{key}"] == "command line"]
        if stage.warmup_steps > stage.steps and flags != ["steps"]:
            raise ValueError(
                f"{name}.warmup_steps={stage.warmup_steps} is more than {name}.steps={stage.steps}:"
                " the rates would never reach their peak; change one of them")


def named_stages(cfg, known):
    """[(name, Stage), ...] of cfg.stages, in order. ValueError for one that `known` has not."""
    names = cfg.stages.replace(" ", "").split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"--stages: unknown stage {name!r}, choose from {', '.join(known)}")
    return [(name, known[name]) for name in names]
