"""The run folder: its lock, config.json, where to start or resume."""
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from inputs.files import read_json, write_atomic
from inputs.locks import take_folder
from model_files import IF_CHANGED, check_target, find_change
from training.checkpoint import (
    check_room,
    checkpoints_in,
    find_checkpoint,
    leftovers_in,
    load_checkpoint,
)
from training.distributed import gather, say
from training.progress import read_progress

# ---- the folder ----------------------------------------------------------------------------------


# The lock files that this process holds.
RUN_LOCKS = []


def lock_run_folder(out_dir):
    """Take the run folder (rank 0), then remove what an interrupted save has left in it.

    ValueError, naming the holder, if another process has it. Forked data workers do not inherit
    the lock.
    """
    # The lock is held until the process ends.
    RUN_LOCKS.append(take_folder(out_dir, "lock", inherited=False))
    for leftover in leftovers_in(out_dir):
        shutil.rmtree(leftover)


RUN_FORMAT = 1  # of config.json and finished.json of a run folder


def read_run_file(out_dir, name, keys):
    """A JSON file of a run folder, {} if there is none.

    keys: {entry: its type}. ValueError, with the path, if it is torn, is of another version, or
    lacks an entry.
    """
    path = Path(out_dir) / name
    if not path.exists():
        return {}
    record = read_json(path, dict)
    found = record.get("format")
    if found != RUN_FORMAT:
        raise ValueError(f"{path} is of another program or version (format {found}, this one reads "
                         f"{RUN_FORMAT}); choose another --out_dir")
    for key, kind in keys.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{path} has no {key!r}; restore it, or remove it to go on without "
                             "knowing how the run was started")
    return record


def read_run_config(out_dir):
    """What write_run_config has written, {} if nothing."""
    return read_run_file(out_dir, "config.json",
                         {"config": dict, "origins": dict, "versions": dict, "world": int})


def current_commit():
    """COMMIT of this program, or COMMIT-dirty if files were changed since; "" without git."""
    describe = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(describe, cwd=Path(__file__).resolve().parent,
                              capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def write_run_config(out_dir, values, origins, world):
    """Write config.json: what ran, with which settings, on what.

    values: all settings, as configurator.resolved gives them; origins: where each came from;
    world: ranks on which the run began.
    """
    packages = {d.name: d.version for d in importlib.metadata.distributions()}
    record = {
        "format": RUN_FORMAT,
        "config": values,
        "origins": origins,
        "argv": sys.argv,
        "commit": current_commit() or None,
        "versions": {"python": platform.python_version(), **packages, "torch": torch.__version__},
        "host": platform.node(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world": world,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomic(Path(out_dir) / "config.json", text)


def stage_finished(out_dir, stage_name):
    """Whether the run folder has the model folder of a stage; it is written at the stage's end."""
    return (Path(out_dir) / stage_name / "config.json").exists()


def is_there_already(run, name):
    """Whether the model folder of a stage of this run is there; says so.

    The run may have ended between the folder and its mark in finished.json, which is then made.
    Without the mark the folder's removal would not mean that the stage is trained again.
    """
    if not stage_finished(run.out, name):
        return False
    if run.dist.is_main and name not in read_finished(run.out):
        write_finished(run.out, name, True)
    say(run.dist, f"{name}: finished before, in {run.out / name}; "
                  "remove that folder to train it again")
    return True


def read_finished(out_dir):
    """The stages that have ended, by finished.json: their model folders were there once."""
    record = read_run_file(out_dir, "finished.json", {"stages": list})
    return record.get("stages", [])


def write_finished(out_dir, stage_name, finished):
    """Note in finished.json that a stage has ended, or that it is trained again."""
    stages = [name for name in read_finished(out_dir) if name != stage_name]
    if finished:
        stages.append(stage_name)
    record = {"format": RUN_FORMAT, "stages": stages}
    write_atomic(Path(out_dir) / "finished.json", json.dumps(record) + "\n")


# ---- start or resume -----------------------------------------------------------------------------


def check_start(cfg, origins, stages):
    """ValueError if the run has no model to start from or a stage has no data of its own."""
    start = cfg.init_from or cfg.tokenizer
    if not os.path.isdir(start) or (Path(start) / "log.jsonl").exists():
        raise ValueError(f"{start or '--init_from='} is not a model folder: give "
                         "--init_from=FOLDER (the model folders of a run are RUN/STAGE), "
                         "or --tokenizer=FOLDER for random weights")
    given = {"data": cfg.data} | {f"{name}.data": stage.data for name, stage in stages}
    for name, value in given.items():
        if origins[name] == "command line" and not value.strip():
            raise ValueError(f"--{name}= is empty, so there is no data; is a variable unset?")
    for name, stage in stages:
        if not (cfg.data or stage.data):
            raise ValueError(f"stage {name} has no data: "
                             f"give --data=PATH or {name}.data in the config")
        origin = origins[f"{name}.data"]
        if stage.data and origins["data"] == "command line" and origin != "command line":
            raise ValueError(f"{origin} gives stage {name} data of its own, so --data would be "
                             f"ignored: write --{name}.data=PATH instead")
        if not stage_finished(cfg.out_dir, name):
            check_target(Path(cfg.out_dir) / name)  # now, and not after weeks of training


def open_run(cfg, stages, values, dist):
    """Take the run folder and find where to go on. All ranks call it.

    Returns (the newest good checkpoint or None, the number of ranks on which the run began), and
    says which of `values`, torch's version or the commit was another at the last start.
    """
    problem = None
    if dist.is_main:
        try:
            lock_run_folder(cfg.out_dir)
        except (ValueError, OSError) as e:
            problem = e
    problem = gather(problem, dist)[0]
    if problem:
        raise problem  # on every rank, or the others would see a lost connection only

    recorded = read_run_config(cfg.out_dir)
    old = recorded.get("config", values)
    changed = [f"{name}: {old.get(name)!r} -> {value!r}"
               for name, value in values.items() if old.get(name) != value]
    if changed:
        say(dist, f"settings that changed since this run was started: {'; '.join(changed)}")

    say_what_changed(recorded, dist)

    path = find_checkpoint(cfg.out_dir, dist, strict=cfg.resume == "strict")
    finished = any(stage_finished(cfg.out_dir, name) for name, _ in stages)
    if cfg.resume == "never" and (path or finished):
        raise ValueError(f"{cfg.out_dir} holds an earlier run and --resume=never; "
                         "choose another --out_dir or remove it")
    world = dist.world
    if path:
        progress = read_progress(path)
        world = progress.world
        stage = progress.stage
        if stage in read_finished(cfg.out_dir) and not stage_finished(cfg.out_dir, stage):
            say(dist, f"{stage}: its model folder was removed, so it is trained again")
            path = None
    elif finished:
        world = recorded.get("world", world)
    return path, world


def say_what_changed(recorded, dist):
    """Tell, in a line, if another torch or commit goes on: the bits may then differ."""
    if not recorded or not dist.is_main:
        return
    versions = {"torch": torch.__version__, "commit": current_commit() or None}
    old = {"torch": recorded["versions"].get("torch"), "commit": recorded.get("commit")}
    changed = [f"{name} {old[name]} -> {version}" for name, version in versions.items()
               if old[name] != version]
    if changed:
        say(dist, f"changed since this run was started: {', '.join(changed)}; "
                  "it goes on, but not bit for bit as it would have")


def check_model_folder(folder, dist):
    """ValueError on all ranks if a file of a model folder is not as it was written."""
    changes = gather(find_change(folder, dist.rank, dist.world), dist)
    changes = [change for change in changes if change]
    if changes:
        raise ValueError(f"{changes[0]}; {IF_CHANGED}")


def where_to_start(run, name):
    """(model folder that stage `name` starts from, number of steps of the stages before it).

    The folder is that of the newest finished stage before it in this run folder; --init_from on
    the command line is stronger, for the first stage that runs. Steps of a stage count whether it
    runs or not, so checkpoints have the same numbers in any case.
    """
    cfg = run.cfg
    all_names = type(cfg)().stages.split(",")
    earlier = all_names[:all_names.index(name)] if name in all_names else []
    first_step = sum(getattr(cfg, n).steps for n in earlier)
    finished = [n for n in earlier if stage_finished(run.out, n)]
    is_first = name == run.stages[0][0]
    if finished and not (is_first and run.origins["init_from"] == "command line"):
        return str(run.out / finished[-1]), first_step
    return cfg.init_from, first_step


def micro_batches(run, name):
    """(micro-batches in a step of this rank, ranks that grad_accum_steps is meant for).

    A step keeps its packs on another number of ranks, so a resized run needs no new settings. If
    grad_accum_steps was changed by hand to what keeps them, that is right as well. ValueError,
    naming the numbers of ranks that fit, if these ranks cannot share a step's packs.
    """
    accum = run.cfg.grad_accum_steps
    world = run.dist.world
    if run.checkpoint:
        progress = read_progress(run.checkpoint)
        if progress.stage == name and progress.packs_per_step == accum * world:
            return accum, world
    packs = accum * run.planned_world
    if packs % world:
        fitting = ", ".join(str(n) for n in range(1, packs + 1) if packs % n == 0)
        raise ValueError(f"a step of this run is {packs} packs, which {world} ranks cannot share "
                         f"alike; start it on {fitting} ranks")
    return packs // world, run.planned_world


def resume(path, fresh, steps, model, optimizer):
    """The Progress to go on from.

    It is that of the checkpoint `path`, whose weights and moments are loaded, if this is of the
    stage of `fresh`; else `fresh`. steps: of the stage. ValueError if data or length of the stage
    have changed so that it cannot go on.
    """
    if path is None:
        return fresh
    progress = read_progress(path)
    name = fresh.stage
    if progress.stage != name:
        return fresh
    if progress.fingerprint != fresh.fingerprint:
        raise ValueError(f"the data of stage {name}, their order or the size of packs and steps "
                         f"changed since {path} was written; go on with the same or start anew "
                         "in another --out_dir")
    if progress.step > steps:
        raise ValueError(f"stage {name} is to have {steps} steps, but {path} is {progress.step} "
                         f"steps into it; raise --max_steps or {name}.steps, or start anew in "
                         "another --out_dir")
    load_checkpoint(path, model, optimizer)
    progress.world = fresh.world
    return progress


def check_disk(cfg, name, steps_left, model):
    """OSError unless there is room for the checkpoints and the model folder still to come."""
    # Old ones are deleted when a new one is complete; the best one is kept beside them.
    most = max(2, cfg.keep) + 1 + cfg.keep_best
    existing = len(checkpoints_in(cfg.out_dir))
    saves = max(1, steps_left // cfg.save_every)
    if cfg.keep_best:
        saves = max(saves, steps_left // cfg.val_every)
    saves = max(0, min(saves, most - existing))
    need = 0
    for p in model.parameters():
        with_moments = 3 if p.requires_grad else 1
        need += saves * with_moments * p.nbytes
        need += 2 * p.numel()  # the model folder is bfloat16
    check_room(cfg.out_dir, need, f"stage {name} with {saves} more checkpoints and a model folder")


def check_trained(name, progress, out_dir):
    """ValueError if no step of a stage has updated anything: its model folder would be a lie."""
    if progress.updates == 0:
        raise ValueError(f"stage {name}: none of its {progress.step} steps has updated the "
                         f"weights; see {out_dir}/log.jsonl and bad_samples.jsonl")
