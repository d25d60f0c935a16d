"""Checkpoints of a run: save, verify, find, load.

checkpoints/step_00001234/ holds
    __0_0.distcp, .metadata   weights and AdamW moments, as torch.distributed.checkpoint (DCP)
                              writes them; any number of ranks can load them
    state.json                Progress: how far the stage has come
    config.json, vocab.json, ...  those of a model folder: the run can be asked (checkpoint_folder)
    manifest.json             size and sha256 of each of these files, written last
A folder has a temporary name until all of it is on the disk.
"""
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch.distributed as td
import torch.distributed.checkpoint as dcp

from inputs.files import file_hash, read_json, write_atomic
from model_files import write_small_files
from training.distributed import ALONE, gather, say, unwrap
from training.metadata import MetadataReader
from training.progress import read_progress
from training.snapshot import snapshot
from training.state_check import find_fault, layout_of, refuse_fault

OWN_NAME = re.compile("step_[0-9]{8}")
LEFTOVER = ".tmp_"  # before a name: a folder that is being written or deleted

# ---- save ----------------------------------------------------------------------------------------


class Saver:
    """Writes the checkpoints of a run, one at a time, in the background if there is memory for it.

    A crash at any point leaves the checkpoints before it usable.
    """

    def __init__(self, out_dir, dist, keep=2, background=True, keep_best=False):
        self.folder = Path(out_dir) / "checkpoints"
        self.dist = dist
        self.keep = keep
        self.background = background
        self.keep_best = keep_best
        self.best = None  # {"stage", "val_loss"} of the lowest loss; None: look on the disk
        self.pending = None  # the Future of the last save
        self.layout = {}  # stage -> names, shapes and dtypes of its last save
        self.small_files = None  # arguments of write_small_files: a checkpoint is a model folder

    def lowest(self, stage, val_loss):
        """{"best": val_loss} if it is the lowest of the stage so far, else {}. All ranks call it.

        Whoever gets it passes it on to `save`, so that this checkpoint is kept.
        """
        if not self.keep_best or not math.isfinite(val_loss):
            return {}
        if self.best is None:
            self.best = gather(read_best(self.folder), self.dist)[0]
        if self.best.get("stage") == stage and self.best["val_loss"] <= val_loss:
            return {}
        self.best = {"stage": stage, "val_loss": val_loss}
        return {"best": val_loss}

    def save(self, step, model, optimizer, progress, wait=False, best=None):
        """Write checkpoints/step_{step:08d}/ and delete old ones. All ranks call it.

        With wait=True the checkpoint is on the disk when this returns, and a failure is an
        OSError. Without, training may go on: a copy of the tensors is written in the background,
        and a failure is a warning at the next save or wait(). A full disk must not end a run that
        can go on, and the next save tries again. ValueError if the tensors cannot be right.
        best: the validation loss of the step if it is the lowest, see `lowest`.
        """
        self.wait()
        final = self.folder / f"step_{step:08d}"
        tensors = tensors_of(model, optimizer)
        self.check(final, tensors, progress)
        problem = None
        if self.dist.is_main:
            problem = make_temporary(final, tensors)
        gathered = gather((dataclasses.asdict(progress), problem), self.dist)
        problem = gathered[0][1]
        # The last rank had the last pack of the step, so its data position is the newest.
        state = gathered[-1][0]

        background = self.background and not wait and not problem
        tensors, copied = snapshot(tensors, self.dist, background)
        thread = concurrent.futures.ThreadPoolExecutor(1)
        self.pending = thread.submit(self._write, final, tensors, state, problem, best)
        thread.shutdown(wait=not copied)
        if wait:
            self.pending.result()

    def check(self, what, tensors, progress):
        """ValueError on all ranks unless the tensors are those of the last save, updated since."""
        layout = layout_of(tensors)
        fault = find_fault(tensors, progress.updates)
        last = self.layout.setdefault(progress.stage, layout)
        changed = sorted(name for name in last | layout if last.get(name) != layout.get(name))
        if changed and not fault:
            fault = f"{changed[0]} was {last.get(changed[0])} at the last save"
            fault += f", now it is {layout.get(changed[0])}"
        refuse_fault(fault, what, self.dist)

    def wait(self):
        """Wait for the last save. If it failed, every rank says so, and training goes on."""
        if self.pending is None:
            return
        try:
            self.pending.result()
        except OSError as e:
            print(f"WARNING: NO CHECKPOINT: {e}. The earlier ones are intact; "
                  "the next save tries again", file=sys.stderr, flush=True)
            self.best = None
        self.pending = None

    def _write(self, final, tensors, state, problem, best):
        if problem:
            raise OSError(problem)
        write_checkpoint(final, tensors, state, self.dist, self.small_files)
        if self.dist.is_main:
            if best is not None:
                record = {"checkpoint": final.name, "stage": state["stage"], "val_loss": best}
                write_atomic(self.folder / "best", json.dumps(record) + "\n")
            prune(self.folder.parent, self.keep)


def read_best(folder):
    """What the file `best` of a checkpoints folder says, {} if its checkpoint is not there."""
    record = {}
    with contextlib.suppress(OSError, ValueError):
        record = read_json(folder / "best", dict)
    whole = {"checkpoint", "stage", "val_loss"} <= record.keys()
    return record if whole and (folder / str(record["checkpoint"])).is_dir() else {}


def checkpoints_in(out_dir):
    """The checkpoints of a run folder by their names, oldest first.

    A folder of any other name is not ours, such as a copy `step_00000020.keep_this`.
    """
    paths = Path(out_dir).glob("checkpoints/step_*")
    return sorted(path for path in paths if OWN_NAME.fullmatch(path.name) and path.is_dir())


def leftovers_in(out_dir):
    """What saves and deletions that were interrupted have left in a run folder."""
    paths = Path(out_dir).glob(f"checkpoints/{LEFTOVER}*")
    own = [path for path in paths if OWN_NAME.fullmatch(path.name.removeprefix(LEFTOVER))]
    return [path for path in own if path.is_dir() and not path.is_symlink()]


def temporary(final):
    """The name of a checkpoint folder while it is written, or deleted."""
    return final.with_name(f"{LEFTOVER}{final.name}")


def make_temporary(final, tensors):
    """Make the folder to write into. Returns what stands in the way, as text, or None."""
    try:
        for leftover in leftovers_in(final.parent.parent):
            shutil.rmtree(leftover)  # of a save that failed
        temporary(final).mkdir(parents=True)
        check_room(final.parent, sum(t.nbytes for t in tensors.values()), "a checkpoint")
    except OSError as e:
        return str(e)
    return None


def check_room(folder, need, what):
    """OSError, with what to do, unless `need` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise OSError(f"{folder}: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                      "make room or choose another --out_dir, then start the same command again")


def tensors_of(model, optimizer):
    """{name: live tensor} of the weights and of the AdamW moments of what trains.

    Names are the same for a plain, a DDP and an FSDP model. Rates, betas and weight decay are not
    among them: a resumed run takes these from its configuration. Needs optim.make_moments.
    """
    tensors = {}
    for name, p in unwrap(model).named_parameters():
        tensors[f"model.{name}"] = p.detach()
        if not p.requires_grad:
            continue
        if p not in optimizer.state:
            raise ValueError(f"{name} has no moments: call make_moments first, and reshard after "
                             "a forward pass without a backward pass")
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def write_checkpoint(final, tensors, state, dist, small_files=None):
    """The slow part of a save, on all ranks: tensors, hashes, manifest, final name, `latest`.

    small_files: config.json as a dict, and the folder of the tokenizer's files.

    It may run in a thread, so ranks talk over the background group. OSError on all ranks if any of
    them could not write.
    """
    tmp = temporary(final)
    try:
        dcp.save(tensors, checkpoint_id=tmp, process_group=dist.background,
                 no_dist=not td.is_initialized())
        # DCP has flushed the files to the disk. Each rank reads back what it wrote.
        files = list(tmp.glob(f"__{dist.rank}_*.distcp"))
        if dist.is_main:
            write_atomic(tmp / "state.json", json.dumps(state))
            if small_files:
                write_small_files(tmp, *small_files, {})
            files = [path for path in tmp.iterdir() if not path.name.endswith(".distcp")] + files
        written = {f.name: [f.stat().st_size, file_hash(f)] for f in files}
    except dcp.CheckpointException as e:
        first_failure, _ = next(iter(e.failures.values()))
        written = str(first_failure)
    except OSError as e:
        written = str(e)

    written_by = gather(written, dist, dist.background)
    failed = [text for text in written_by if isinstance(text, str)]
    if failed:
        # Make room: what is there of this checkpoint is of no use.
        shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"{tmp}: the checkpoint could not be written ({failed[0]}); "
                      "is the disk full?")
    if dist.is_main:
        step = int(final.name.removeprefix("step_"))
        entries = {name: e for files in written_by for name, e in sorted(files.items())}
        manifest = {"step": step, "files": entries}
        write_atomic(tmp / "manifest.json", json.dumps(manifest, indent=1))
        # A checkpoint of this name is a damaged one: the run would have gone on from a good one.
        if final.is_symlink() or final.is_file():
            final.unlink()
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        write_atomic(final.parent / "latest", final.name + "\n")


def prune(out_dir, keep):
    """Delete the checkpoints that are older than the newest max(2, keep) good ones.

    A link is left alone: what it leads to may be somebody else's. So is the one that `best` names.
    """
    best = read_best(Path(out_dir) / "checkpoints").get("checkpoint")
    paths = [path for path in checkpoints_in(out_dir) if not path.is_symlink()]
    good = [path for path in paths if not verify_checkpoint(path, hashes=False)]
    oldest = good[-max(2, keep):][0]
    for path in paths[:paths.index(oldest)]:
        if path.name == best:
            continue
        # Renamed first: an interrupted deletion must not look like a damaged checkpoint.
        aside = temporary(path)
        path.rename(aside)
        shutil.rmtree(aside)


# ---- verify, find, load --------------------------------------------------------------------------


def verify_checkpoint(path, hashes=True, dist=ALONE):
    """What is wrong with a checkpoint folder, as text; None if it is good.

    All files must have the size and sha256 of the manifest. The hashes are slow, so each rank
    checks a share of them.
    """
    try:
        manifest = read_json(path / "manifest.json", dict)
        files = manifest["files"]
        if path.name != f"step_{manifest['step']:08d}":
            return "manifest.json belongs to another step"
        for name in ("state.json", ".metadata"):
            if name not in files:
                return f"no {name} in the manifest"
        for i, (name, (size, digest)) in enumerate(sorted(files.items())):
            changed = (path / name).stat().st_size != size
            if not changed and hashes and i % dist.world == dist.rank:
                changed = file_hash(path / name) != digest
            if changed:
                return f"{name} has changed since it was written"
        if hashes and dist.is_main:
            MetadataReader(path).read_metadata()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def find_checkpoint(out_dir, dist=ALONE, strict=False):
    """Path of the newest good checkpoint, None if there is none at all. All ranks call it.

    A damaged one is a warning. ValueError if all are damaged; with strict, if the newest is.
    """
    paths = gather(checkpoints_in(out_dir)[::-1], dist)[0]
    for path in paths:
        reasons = gather(verify_checkpoint(path, dist=dist), dist)
        reasons = [reason for reason in reasons if reason]
        if not reasons:
            return path
        if strict:
            raise ValueError(f"damaged checkpoint {path}: {reasons[0]}; "
                             "--resume=auto goes on from the one before")
        say(dist, f"WARNING: DAMAGED CHECKPOINT {path}: {reasons[0]}; trying the one before")
    if paths:
        raise ValueError(f"{paths[0].parent}: no checkpoint is intact; "
                         "restore one, or remove the folder to start anew")
    return None


def set_aside(out_dir, step):
    """Rename the checkpoints of later steps than `step`, where a run goes on.

    They are damaged, or of stages that are trained again. Pruning would keep them as the newest,
    and the next start would resume from them.
    """
    for path in checkpoints_in(out_dir):
        if int(path.name.removeprefix("step_")) <= step:
            continue
        aside = path.with_name(f"aside_{path.name}")
        if aside.is_symlink():
            aside.unlink()
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print(f"WARNING: {path} is of a later step than {step}, where this run goes on; "
              f"it is now {aside}", file=sys.stderr, flush=True)


def load_checkpoint(path, model, optimizer):
    """Fill model and optimizer in place, on any number of ranks. ValueError: it does not fit."""
    tensors = tensors_of(model, optimizer)
    reader = MetadataReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    here = {name: tuple(t.shape) for name, t in tensors.items()}
    there = {name: tuple(t.size) for name, t in metadata.items()}
    wrong = []
    for name in here | there:
        if here.get(name) != there.get(name):
            wrong.append(f"{name} is {there.get(name, 'not there')}, "
                         f"here {here.get(name, 'not known')}")
    if wrong:
        more = " and more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} does not fit this model: {'; '.join(wrong[:3])}{more}. "
                         "Go on with the configuration it was written with, "
                         "or start anew in another --out_dir")
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not td.is_initialized())
    except dcp.CheckpointException as e:
        first_failure, _ = next(iter(e.failures.values()))
        raise ValueError(f"{path} cannot be read: {first_failure}") from None
    fault = find_fault(tensors, read_progress(path).updates)
    if fault:
        raise ValueError(f"{path} is not fit to go on from: {fault}. Remove it to go on from the "
                         "one before")
