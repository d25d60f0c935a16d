"""A checkpoint as a model folder: a run can be asked while it trains.

A checkpoint holds config.json and the tokenizer's files beside its tensors, so that it is read as
a model folder is; its weights are those that the model folder of the stage would have now.
"""
import sys
from pathlib import Path

from model_config import config_json
from training.checkpoint import checkpoints_in, read_best, verify_checkpoint
from training.metadata import LORA_SCALE, is_checkpoint
from training.progress import read_progress


def stage_config(cfg, source):
    """config.json of what a stage with the run's settings makes of `source`, a ModelFolder."""
    extra = source.config | {"min_dynamic_patch": cfg.min_tiles,
                             "max_dynamic_patch": cfg.max_tiles,
                             "use_thumbnail": cfg.thumbnail}
    return config_json(source.vision, source.llm, template=cfg.template, extra=extra)


def checkpoint_config(cfg, source):
    """config.json of a checkpoint: that of its stage, and how its adapters are to be merged."""
    config = stage_config(cfg, source)
    if cfg.lora_rank:
        config[LORA_SCALE] = cfg.lora_alpha / cfg.lora_rank
    return config


def model_folder(path):
    """Where the model of `path` is read from, for the scripts that ask or export one.

    A checkpoint is verified by its manifest, and of a run folder the newest intact checkpoint is
    taken, of its file checkpoints/best the one that it names; they are named on stderr. Any other
    path comes back as it is.
    """
    folder = Path(path)
    if folder.name == "best" and folder.is_file():
        # The file that names the checkpoint of the lowest validation loss.
        found = read_best(folder.parent)
        if not found:
            raise ValueError(f"{path} names no checkpoint that is there; give the run folder, for "
                             "its newest one")
        folder = folder.parent / found["checkpoint"]
    if path and is_checkpoint(folder):
        reason = verify_checkpoint(folder.resolve())
        if reason:
            raise ValueError(f"damaged checkpoint {folder}: {reason}; take another one of the run")
    elif path and (folder / "checkpoints").is_dir() and not any(folder.glob("*.safetensors")):
        folder = newest_intact(folder)
    else:
        return path
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is from before checkpoints held config.json; let the run go on "
                         "to its next checkpoint, or take the model folder of a stage")
    progress = read_progress(folder)
    print(f"{folder}: {progress.step} steps into stage {progress.stage}", file=sys.stderr)
    return str(folder)


def newest_intact(run):
    """The newest checkpoint of a run folder that verifies. ValueError if there is none."""
    for path in checkpoints_in(run)[::-1]:
        reason = verify_checkpoint(path)
        if not reason:
            return path
        print(f"WARNING: damaged checkpoint {path}: {reason}; trying the one before",
              file=sys.stderr)
    stages = sorted(str(path.parent) for path in run.glob("*/config.json"))
    instead = f"; its model folders: {', '.join(stages)}" if stages else ""
    raise ValueError(f"{run} is a run folder without an intact checkpoint{instead}")
