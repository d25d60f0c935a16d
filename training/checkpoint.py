"""Checkpoints: save, verify, find, load, prune."""
import concurrent.futures
import json
import os
import re
import shutil
import sys
import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
import warnings
from pathlib import Path
from torch.distributed.tensor import DTensor

from inputs.files import file_hash, write_atomic
from training.distributed import Dist, gather, say

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP on one process, which is what is meant

def tensors_of(model, optimizer):
    """{name: live tensor} of weights and AdamW moments; the names are the same for a plain, DDP or FSDP model. Rates,
    betas and decay are not among them: on resume the configuration's count."""
    state = {}
    for name, p in getattr(model, "module", model).named_parameters():  # out of DDP
        state[f"model.{name}"] = p.detach()
        if p.requires_grad:
            if not optimizer.state[p]:  # before the first step, to be filled by load_checkpoint
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return state

def deal(tensors, dist):
    """This rank's part of {name: tensor} to write: its shards and, of what all ranks hold alike, a share of its own."""
    total, before, mine = sum(t.nbytes for t in tensors.values() if not isinstance(t, DTensor)) + 1, 0, {}
    for name, t in tensors.items():
        if isinstance(t, DTensor) or before * dist.world // total == dist.rank: mine[name] = t
        before += 0 if isinstance(t, DTensor) else t.nbytes
    return mine

def check_room(folder, need, what):
    """OSError, with what to do, unless `need` bytes are free where `folder` is."""
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder}: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room or choose "
                      "another --out_dir, then start the same command again")

def memory_for(tensors):
    """Whether this machine, and the control group that a job scheduler may have put the run into, has memory for a copy
    of `tensors` on each of its ranks, with as much again to spare; where the system does not say, no."""
    need = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())
    try:
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        found = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = Path("/sys/fs/cgroup", found[1] if found else "")
        for folder in (group, *group.parents)[:-3]:  # down to /sys/fs/cgroup
            if (folder / "memory.max").exists() and (most := (folder / "memory.max").read_text().strip()) != "max":
                free = min(free, int(most) - int((folder / "memory.current").read_text()))
    except (OSError, LookupError, ValueError):
        free = 0
    return 2 * need * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < free

def save_checkpoint(out_dir, step, model, optimizer, state, dist, keep, before=None, wait=True, copy=True):
    """Write checkpoints/step_{step:08d}/, delete what is older than the newest max(2, keep) good ones. All ranks call
    it, each with its state, a JSON value. A crash at any point leaves the earlier ones usable. wait=False copies what
    is to be saved, lets a thread write it and returns its Future, to be given as `before` to the next call, which waits
    for it; without copy, or memory for it, it writes at once. Raises OSError, but with wait=False only says so: no room
    ends no run that goes on, and the next save tries again."""
    saved(before)
    tensors = deal(everything := tensors_of(model, optimizer), dist)
    final, problem = Path(out_dir) / "checkpoints" / f"step_{step:08d}", None
    tmp = final.with_name(f".tmp_{final.name}")
    if dist.is_main:
        try:
            for left in final.parent.glob(".tmp_*"): shutil.rmtree(left)  # of a save that failed
            tmp.mkdir(parents=True)
            check_room(tmp.parent, sum(t.nbytes for t in everything.values()), "a checkpoint")
        except OSError as e:
            problem = str(e)
    states, problems = zip(*gather((state, problem), dist))
    copied = copy and not wait and not problems[0] and memory_for(tensors)
    tensors = {name: t.to("cpu", copy=True) for name, t in tensors.items()} if copied else tensors
    thread = concurrent.futures.ThreadPoolExecutor(1)  # the last rank had the last pack of the step: its state
    future = thread.submit(write_checkpoint, final, tmp, step, tensors, states[-1], dist, keep, problems[0])
    thread.shutdown(wait=not copied)
    if wait: future.result()
    return future

def saved(future):
    """Wait for what save_checkpoint returned, None at first. A save that failed is told, loudly, on each rank."""
    try:
        if future: future.result()
    except OSError as e:
        print(f"WARNING: NO CHECKPOINT: {e}. The earlier ones are whole; the next save tries again", file=sys.stderr,
              flush=True)

def write_checkpoint(final, tmp, step, tensors, state, dist, keep, problem):
    """The slow part of save_checkpoint, on all ranks: files, hashes, manifest, new name, `latest`, in this order."""
    if problem: raise OSError(problem)  # no room on rank 0: all ranks give up alike
    try:
        dcp.save(tensors, checkpoint_id=tmp, process_group=dist.background, no_dist=not td.is_initialized())
        files = list(tmp.glob(f"__{dist.rank}_*.distcp"))  # fsynced; each rank reads back what it wrote
        if dist.is_main:
            write_atomic(tmp / "state.json", json.dumps(state))
            files += [tmp / ".metadata", tmp / "state.json"]
        written = {f.name: [f.stat().st_size, file_hash(f)] for f in files}
    except (dcp.CheckpointException, OSError) as e:
        written = str(next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e)
    parts = gather(written, dist, dist.background)
    if failed := [part for part in parts if isinstance(part, str)]:
        shutil.rmtree(tmp, ignore_errors=True)  # what is there of it takes the room that another may need
        raise OSError(f"{tmp}: the checkpoint could not be written ({failed[0]}); is the disk full?")
    if not dist.is_main: return
    manifest = {"step": step, "files": {name: entry for part in parts for name, entry in sorted(part.items())}}
    write_atomic(tmp / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, or the run would have gone on behind it
    os.rename(tmp, final)
    write_atomic(final.parent / "latest", final.name + "\n")
    paths = sorted(final.parent.glob("step_*"))
    good = [path for path in paths if not damage(path, hashes=False)][-max(2, keep):]
    for path in paths[:paths.index(good[0])]:
        shutil.rmtree(path.rename(tmp))  # under another name: an interrupted deletion must not look like damage

def damage(path, hashes=True, dist=Dist()):
    """What is wrong with a checkpoint folder, in words; None: all files have the size and sha256 of the manifest. Of
    the hashes, the slow part, each rank makes a share."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if f"step_{manifest['step']:08d}" != path.name: return "manifest.json belongs to another step"
        if lacks := {"state.json", ".metadata"} - manifest["files"].keys(): return f"no {lacks.pop()} in the manifest"
        for i, (name, (size, digest)) in enumerate(sorted(manifest["files"].items())):
            if (path / name).stat().st_size != size or (
                    hashes and i % dist.world == dist.rank and file_hash(path / name) != digest):
                return f"{name} has changed since it was written"
    except Exception as e:
        return f"{type(e).__name__}: {e}"

def find_checkpoint(out_dir, dist=Dist(), strict=False):
    """Path of the newest checkpoint that verifies, or None if there is none at all; all ranks call it and get the same.
    A loud line per damaged one; ValueError where none is whole, with strict already where the newest is damaged."""
    reason, paths = None, gather(sorted(Path(out_dir).glob("checkpoints/step_*"), reverse=True), dist)[0]
    for path in paths:
        reason = next(filter(None, gather(damage(path, dist=dist), dist)), None)
        if not reason: return path
        if strict: raise ValueError(f"damaged checkpoint {path}: {reason}; --resume=auto goes on from the one before")
        say(dist, f"WARNING: DAMAGED CHECKPOINT {path}: {reason}; trying the one before")
    if reason:
        raise ValueError(f"{paths[0].parent}: no checkpoint is whole; restore one, or remove the folder to start anew")

def set_aside(out_dir, step):
    """Give checkpoints of a later step than `step`, at which a run goes on, another name: damaged ones, and those of
    stages that are done again. Pruning would keep them, and a later start take them, for newer than what now comes."""
    for path in sorted(Path(out_dir).glob("checkpoints/step_*")):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(aside := path.with_name(f"aside_{path.name}"), ignore_errors=True)
            path.rename(aside)
            print(f"WARNING: {path} is of a later step than {step}, where this run goes on; it is now {aside}",
                  file=sys.stderr, flush=True)

def read_state(path):
    """The state that was saved with the checkpoint `path` (stage, position, ...), without its tensors."""
    return json.loads((Path(path) / "state.json").read_text())

def load_checkpoint(path, model, optimizer, dist):
    """Fill model and optimizer in place, at any number of ranks; returns the saved state. ValueError: does not fit."""
    tensors, saved = tensors_of(model, optimizer), dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    here, there = {k: tuple(t.shape) for k, t in tensors.items()}, {k: tuple(t.size) for k, t in saved.items()}
    wrong = [f"{name} is {there.get(name, 'not there')}, here {here.get(name, 'not known')}"
             for name in here | there if here.get(name) != there.get(name)]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {'; '.join(wrong[:3])}{' and more' * (len(wrong) > 3)}. Go "
                         "on with the configuration it was written with, or start anew in another --out_dir")
    dcp.load(tensors, checkpoint_id=path, no_dist=not td.is_initialized())
    return read_state(path)
