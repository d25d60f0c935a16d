"""The run folder: lock, config.json, resume, signals, watchdog."""
import faulthandler
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import torch
import torch.distributed as td
from pathlib import Path

from inputs.files import write_atomic
from training.checkpoint import check_room, find_checkpoint, load_checkpoint, read_state, set_aside
from training.distributed import all_reduce_sum, gather, say
from training.metrics import log_bad
from training.optim import print_stage_table
from training.settings import named_stages, stage_steps

# ---- the run folder -------------------------------------------------------------------------------------------------
def lock_run_folder(out_dir):
    """Take the run folder (rank 0), then remove what an interrupted save left. Raises ValueError naming the holder. The
    lock is fcntl's: the system releases it however the process ends, and forked data workers do not inherit it."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    lock = os.open(Path(out_dir) / "lock", os.O_RDWR | os.O_CREAT)  # never closed: held as long as the process lives
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out_dir} is in use by {os.read(lock, 200).decode() or 'another process'}; wait for it, "
                         "stop it, or choose another --out_dir") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    for leftover in Path(out_dir).glob("checkpoints/.tmp_*"): shutil.rmtree(leftover)

class Preemption:
    """SIGTERM and SIGUSR1 ask for a checkpoint at the next step boundary. Create it before the first slow thing."""
    def __init__(self):
        self.signals, self.parent = [], os.getppid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def stop_requested(self, dist):
        """True on all ranks, which all call it once per step, when any was asked to stop. Raises ValueError in a worker
        whose torchrun has died: an orphan must not write into the folder of the job that takes its place."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            raise ValueError("torchrun has ended, so this worker ends too; the same command goes on")
        return all_reduce_sum(torch.tensor(len(self.signals), device=dist.device), dist).item() > 0

def watch(cfg, dist, note):
    """Watch over what comes next, the note says what, until the next call; an empty note ends the watch. The note goes
    to last_step/rank_K.txt; after cfg.timeout_s the stacks of all threads follow. Under torchrun an alarm of the
    system, which needs no Python, ends the process 5 s later: a rank that waits in a driver cannot do it itself, and by
    then all ranks, which call this at about the same moment, have written their stacks. One process ends at once."""
    path = Path(cfg.out_dir) / "last_step" / f"rank_{dist.rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.cancel_dump_traceback_later()
    if td.is_initialized(): signal.alarm(cfg.timeout_s + 5 if note else 0)
    if note:
        (file := open(path, "wb", buffering=0)).write(f"{note}\n".encode())
        faulthandler.dump_traceback_later(cfg.timeout_s, file=file, exit=not td.is_initialized())  # keeps it open

def read_run_config(out_dir):
    """What write_run_config wrote, {} if nothing."""
    path = Path(out_dir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}

def write_run_config(out_dir, values, origins, world):
    """config.json: `values` (configurator.resolved), their `origins`, argv, versions, machine, commit of this code;
    world: ranks that the run began on."""
    commit = subprocess.run("git describe --always --abbrev=40 --exclude='*' --dirty", shell=True,  # COMMIT[-dirty]
                            cwd=Path(__file__).resolve().parent, capture_output=True, text=True).stdout.strip()
    versions = {d.name: d.version for d in importlib.metadata.distributions()}  # of all that is installed
    record = {"config": values, "origins": origins, "argv": sys.argv, "commit": commit or None,
              "versions": {"python": platform.python_version(), **versions}, "host": platform.node(),
              "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
              "world": world, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomic(Path(out_dir) / "config.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

def where_to_start(cfg, origins, name):
    """(model folder, first step) of stage `name`. The folder is that of the stage before it, if this run folder has one
    and --init_from does not name another for the first stage to run. Steps count on from stage to stage, run or not."""
    order, selected, out = type(cfg)().stages.split(","), named_stages(cfg), Path(cfg.out_dir)
    before = order[:order.index(name)] if name in order else []
    done = [n for n in before if (out / n / "config.json").exists()]
    told = name == selected[0][0] and origins["init_from"] == "command line"
    first_step = sum(stage_steps(cfg, getattr(cfg, n)) for n in before)
    return str(out / done[-1]) if done and not told else cfg.init_from, first_step

def open_run(cfg, origins, stages, dist, values):
    """Take the run folder and tell which of `values` an earlier start had otherwise; returns the newest good checkpoint
    in it (None: start anew) and the number of ranks that the run began on. All ranks call it."""
    out, start = Path(cfg.out_dir), cfg.init_from or cfg.tokenizer
    if not os.path.isdir(start) or (Path(start) / "log.jsonl").exists():
        raise ValueError(f"{start or '--init_from='} is not a model folder: give --init_from=FOLDER, the one of a run "
                         "being RUN/STAGE, or --tokenizer=FOLDER for random weights")
    for name, stage in stages:
        if not (cfg.data or stage.data):
            raise ValueError(f"stage {name} has no data: give --data=PATH or {name}.data in the config")
        if stage.data and origins["data"] == "command line" != origins[f"{name}.data"]:
            raise ValueError(f"{origins[f'{name}.data']} gives stage {name} data of its own: instead of --data, write "
                             f"--{name}.data=PATH")
    problem = None
    try:
        if dist.is_main: lock_run_folder(out)
    except (ValueError, OSError) as e:
        problem = e
    if problem := gather(problem, dist)[0]: raise problem  # on every rank: one line each, no lost connection
    old = read_run_config(out).get("config", values)
    if changed := [f"{k}: {old.get(k)!r} -> {v!r}" for k, v in values.items() if old.get(k) != v]:
        say(dist, f"settings that changed since this run was started: {'; '.join(changed)}")
    checkpoint = find_checkpoint(out, dist, cfg.resume == "strict")
    finished = any((out / name / "config.json").exists() for name, _ in stages)
    if cfg.resume == "never" and (checkpoint or finished):
        raise ValueError(f"{out} holds an earlier run and --resume=never; choose another --out_dir or remove it")
    state = read_state(checkpoint) if checkpoint else read_run_config(out) if finished else {}
    return checkpoint, state.get("world", dist.world)

def micro_batches(accum, began, name, checkpoint, dist):
    """(micro-batches of a step here, ranks the run began on). On other ranks a step keeps its packs, so that a run that
    was resized goes on by itself, as does one whose grad_accum_steps was set by hand to what keeps them. ValueError
    names the sizes that fit."""
    state = read_state(checkpoint) if checkpoint else {}
    if state.get("stage") == name and state.get("packs_per_step") == accum * dist.world: return accum, dist.world
    packs = accum * began
    if packs % dist.world:
        raise ValueError(f"a step of this run is {packs} packs, which {dist.world} ranks cannot share alike; start it "
                         f"on {', '.join(str(n) for n in range(1, packs + 1) if packs % n == 0)} ranks")
    return packs // dist.world, began

def resume(checkpoint, name, steps, packs, began, model, optimizer, dist):
    """State of stage `name`: the checkpoint's, with weights and moments loaded, if it is of this stage; else new."""
    state = read_state(checkpoint) if checkpoint else {}
    if state.get("stage") != name:
        return {"stage": name, "fingerprint": packs.fingerprint, "packs_per_step": packs.settings.packs_per_step, "world": began,
                "position": [0, 0, 0], "counts": {}, "step": 0, "bad_steps": 0, "quarantined": 0, "tokens_seen": 0,
                "samples_seen": 0}
    if state["fingerprint"] != packs.fingerprint:
        raise ValueError(f"the data of stage {name}, their order or the size of packs and steps changed since "
                         f"{checkpoint} was written; go on with the same or start anew in another --out_dir")
    if state["step"] > steps:
        raise ValueError(f"stage {name} is to have {steps} steps, but {checkpoint} is {state['step']} steps into it; "
                         f"raise --max_steps or {name}.steps, or start anew in another --out_dir")
    return load_checkpoint(checkpoint, model, optimizer, dist) | {"world": began}

def announce(cfg, values, origins, name, model, stage, packs, state, first_step, dist):
    """Write config.json, now that the stage really runs, print what it trains on what, set aside checkpoints that are
    not its past, note the records that its index could not read. OSError: no room for what the stage will save."""
    out_dir, sizes = cfg.out_dir, [(p.nbytes, p.numel(), p.requires_grad) for p in model.parameters()]
    saves = max(1, (stage_steps(cfg, stage) - state["step"]) // cfg.save_every)
    saves = min(saves, max(2, cfg.keep) + 1 - len(list(Path(out_dir).glob("checkpoints/step_*"))))
    need = sum(max(0, saves) * n * (3 if trains else 1) + 2 * elements for n, elements, trains in sizes)
    check_room(out_dir, need, f"stage {name} with {max(0, saves)} more checkpoints and a model folder")
    if dist.is_main:
        set_aside(out_dir, first_step + state["step"])
        write_run_config(out_dir, values, origins, state["world"])
        if state["step"] == 0:
            log_bad(out_dir, packs.unreadable())
        print_stage_table(name, model, stage)
        print(f"{packs.n:,} samples in {(n := len(packs.sources))} source{'s' * (n > 1)}, {packs.n_bad} unreadable; "
              f"{'goes on at' if state['step'] else 'starts at'} step {state['step']}", flush=True)

def check_quarantine(state, packs, out_dir):
    """Stop a run whose data are rotten: max(100, 1 %) of the rows in the index, or of the samples seen, are unreadable.
    Raises ValueError."""
    for bad, n in ((packs.n_bad, packs.n), (state["quarantined"], state["samples_seen"])):
        if bad > max(100, 0.01 * n):
            raise ValueError(f"{bad} unreadable samples of {n}: see {out_dir}/bad_samples.jsonl, mend or remove them")
