"""One row of log.jsonl per step; trackers; the loss plot."""
import collections
import contextlib
import datetime
import itertools
import json
import math
import numpy as np
import os
import re
import resource
import sys
import time
import torch
from pathlib import Path

from training.distributed import all_reduce_sum

def open_log(out_dir):
    """Open log.jsonl for appending; a last line torn by a crash is cut off first."""
    f = open(Path(out_dir) / "log.jsonl", "ab+", buffering=0)
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f

def log_line(f, row, track=None):
    """Append one row as one write. Numbers that are not finite become null, so that every reader takes the line."""
    if track: track(row)
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    line, end, written = (json.dumps(row, ensure_ascii=False) + "\n").encode(), f.seek(0, os.SEEK_END), 0
    with contextlib.suppress(OSError): written = f.write(line)
    if written < len(line):  # a full disk
        f.truncate(end)
        print(f"WARNING: no room for a line of {f.name}, it is left out", file=sys.stderr, flush=True)

def open_tracker(cfg, values):
    """A function that hands a row of log.jsonl to the program that --track names, if it is installed; None without."""
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            add = SummaryWriter(cfg.out_dir).add_scalar
            return lambda row: [add(f"{row['stage']}/{name}", value, row["step"]) for name, value in row.items()
                                if isinstance(value, (int, float))]
        if cfg.track == "wandb":
            import wandb
            return wandb.init(project="sail-vl", name=Path(cfg.out_dir).name, dir=cfg.out_dir, config=values).log
    except ImportError:
        raise ValueError(f"--track={cfg.track} is not installed: pip install {cfg.track}") from None

def log_bad(out_dir, records):
    """Append unreadable records to bad_samples.jsonl, one write per line, each once."""
    if not records: return
    with open(Path(out_dir) / "bad_samples.jsonl", "ab+", buffering=0) as f:
        f.seek(0)
        known = {*f.read().decode().splitlines()}  # of the steps that a run which went on does again
        for record in records:
            if json.dumps(record, ensure_ascii=False) not in known: log_line(f, record)

SPIKE = 6  # standard deviations

def spike(losses, loss):
    """(standard deviations that `loss` lies above the straight line through the last 64 to 128; the losses to keep). A
    spike is kept as 3 only: it must not hide the next one, but a loss that stays up ends the alarm."""
    if not math.isfinite(loss) or (n := len(losses)) < 64: return 0.0, losses + [loss] * math.isfinite(loss)
    x, y = np.arange(n) - (n - 1) / 2, np.array(losses)
    slope = x @ y / (x @ x)
    line, sigma = y.mean() + slope * (n + 1) / 2, max((y - y.mean() - slope * x).std(ddof=2), 1e-12)
    sigmas = (loss - line) / sigma
    return float(sigmas), [*losses, float(line + 3 * sigma) if sigmas > SPIKE else loss][-128:]

def next_state(state, step, batch, totals, loss, finite):
    """What a checkpoint after this step must know: where the data go on, and the counts so far."""
    sigmas, losses = spike(state.get("losses", []), loss)
    return state | {"step": step, "position": batch["position"], "counts": batch["counts"], "spike": sigmas,
                    "bad_steps": 0 if finite else state["bad_steps"] + 1, "losses": losses,
                    "quarantined": state["quarantined"] + int(totals["bad"]),
                    "tokens_seen": state["tokens_seen"] + int(totals["tokens"]),
                    "samples_seen": state["samples_seen"] + int(totals["samples"])}

class Clock:
    """Where the time of a step goes: clock("forward") ends a part that began when the one before it ended. On CUDA the
    borders are events in its queue, for which nobody waits before `split`."""
    def __init__(self, device):
        self.cuda, self.start, self.marks = device.type == "cuda", time.perf_counter(), []
        self("start")

    def __call__(self, part):
        at = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda: at.record()
        self.marks.append((part, at))

    def split(self):
        """(seconds since the start, {part: seconds}); the last mark is waited for."""
        if self.cuda: self.marks[-1][1].synchronize()
        parts = collections.Counter()
        for (_, a), (part, b) in itertools.pairwise(self.marks):
            parts[part] += a.elapsed_time(b) / 1000 if self.cuda else b - a
        return time.perf_counter() - self.start, parts

def account(before, state, packs, ends):
    """{"epoch": sums} for the line of a step in which an epoch ended (`before`: the counts before it) or the stage
    ends: where each record of the index went, so far, and how many are to come in this epoch. All ranks stand at the
    same counts; AssertionError if what they made of their packs is not what was planned: a sample lost or doubled."""
    counts, bad = state["counts"], state["quarantined"]
    seen, unreadable = sum(counts.values()), counts.get("unreadable", 0)
    assert counts["used"] == state["samples_seen"] + bad, (
        f"{counts['used']} samples were planned, {state['samples_seen']} used and {bad} quarantined; report this")
    if seen // packs.n == sum(before.values()) // packs.n and not ends: return {}
    return {"epoch": {"epochs": seen // packs.n, "records": seen, "to_come": -seen % packs.n,
                      "used": state["samples_seen"], "dropped": dropped(counts),
                      "quarantined": {"in the index": unreadable, "in training": bad}}}

def dropped(counts):
    """{reason: samples dropped whole} of the counts of a Packs."""
    return {reason: n for reason, n in counts.items() if reason not in ("used", "unreadable")}

def step_row(steps, loss, norm, norms, optimizer, totals, state, micro, clock, peak, dist):
    """The line of log.jsonl of one step. steps: of the stage, behind the stage; for the ETA of the run all are as long
    as this one. mfu is strict: FLOPs the gradients need, over the peak of all GPUs; None on a CPU. fill, tile_fill: of
    the packs; straggler: planned FLOPs of the busiest rank over the mean of all."""
    (steps, later), step, (seconds, parts) = steps, state["step"], clock.split()
    costs = np.sum([batch["costs"] for batch in micro], axis=0)
    return {"stage": state["stage"], "step": step, "steps": steps, "loss": loss, "grad_norm": norm.item(),
            **{f"grad_norm_{k}": v.item() for k, v in norms.items()},
            "lr": {g["name"].split("/")[0]: g["lr"] for g in optimizer.param_groups},
            **{k: int(totals[k]) for k in ("tokens", "tiles", "supervised", "samples")}, "seconds": seconds,
            **{f"{part}_s": s for part, s in parts.items()}, "tflop": totals["flops"] / 1e12,
            "tokens_per_s": totals["tokens"] / seconds, "tiles_per_s": totals["tiles"] / seconds,
            "mfu": totals["flops"] / seconds / (peak * dist.world) if peak else None,
            "data_wait": parts["data"] / seconds, "fill": totals["tokens"] / totals["token_room"],
            "tile_fill": totals["tiles"] / totals["tile_room"], "straggler": float(costs.max() / costs.mean()),
            "memory_gb": peak_memory_gb(),
            **{k: state[k] for k in ("tokens_seen", "samples_seen", "spike")},
            "dropped": sum(dropped(state["counts"]).values()),
            "quarantined": state["quarantined"] + state["counts"].get("unreadable", 0),
            "eta_s": seconds * (steps - step), "run_eta_s": seconds * (steps - step + later)}

@torch.no_grad()
def validation_loss(model, batches, dist):
    """Mean loss of held-out `batches` of (arguments of the model, weight of what is supervised), as many on each rank:
    the sums are added up over the ranks and divided once."""
    model = getattr(model, "module", model).eval()  # out of DDP
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs, weight in batches: sums += torch.tensor([model(**inputs).item(), weight], dtype=torch.float64)
    model.train()
    loss, weight = all_reduce_sum(sums.to(dist.device), dist).tolist()
    return loss / max(weight, 1e-9)

# ---- numbers to look at ---------------------------------------------------------------------------------------------
# Dense bf16 tensor-core TFLOP/s from the vendor's data sheets
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "GH200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989,
               "H200 NVL": 835, "H800": 989, "H800 PCIe": 756, "H20": 148, "A100": 312, "A800": 312, "L40S": 362,
               "L40": 181, "L4": 121, "A40": 150, "RTX A6000": 155, "A10G": 70, "A10": 125, "RTX 5090": 209,
               "RTX 4090": 165, "RTX 3090": 71}
FORM = r"nvidia|geforce|tesla|pcie|sxm\d*|hbm\S*|\d+gb"  # what may stand around a name: maker, socket, memory

def peak_flops(device):
    """Peak bf16 FLOP/s of one device; None where it is not known (any CPU, a slice of a GPU, a laptop's): no MFU rather
    than a wrong one."""
    words = {*re.split(r"[\s-]+", torch.cuda.get_device_name(device).lower())} if device.type == "cuda" else set()
    for name, tflops in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0].split())):  # "H100 PCIe" first
        if words >= (own := {*name.lower().split()}) and all(re.fullmatch(FORM, word) for word in words - own):
            return tflops * 1e12

def peak_memory_gb():
    """Most memory this process has held so far, in GB (1e9 bytes): allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

def format_step(row):
    """The printed line of one step from its row of log.jsonl (`step_row`)."""
    rates = " ".join(f"{name} {value:.1e}" for name, value in row["lr"].items() if value)
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    return (f"{row['stage']} {row['step']}/{row['steps']} | loss {row['loss']:.4f} | lr {rates} | "
            f"{row['tokens_per_s']:,.0f} tok/s {row['tiles_per_s']:,.1f} tiles/s | mfu {mfu} | "
            f"data wait {100 * row['data_wait']:.0f}% | mem {row['memory_gb']:.1f} GB | dropped {row['dropped']} "
            f"quarantined {row['quarantined']} | eta {datetime.timedelta(seconds=int(row['eta_s']))} "
            f"of {datetime.timedelta(seconds=int(row['run_eta_s']))}" + f" | SPIKE {row['spike']:.0f} sigma" * (
                row["spike"] > SPIKE) + (f" | val loss {row['val_loss']:.4f}" if "val_loss" in row else "") + (
                f" | {json.dumps(row['epoch'])}" if "epoch" in row else ""))

def read_log(path):
    """Yield the rows of a log.jsonl, without what a full disk tore."""
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(ValueError): yield json.loads(line)

def plot_loss(log_path, png_path):
    """Draw the loss of each stage of a log.jsonl: raw thin, mean over 1/40 of the stage thick. After a resume the later
    line of a step counts. Where matplotlib is missing, a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{png_path} not drawn: pip install matplotlib")
    ax = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    curves, start = {}, 0  # stage -> {step: loss}
    for row in read_log(log_path):
        if row.get("loss") is not None: curves.setdefault(row["stage"], {})[row["step"]] = row["loss"]
    for stage, points in curves.items():
        steps, losses = zip(*sorted(points.items()))
        x, window = start + np.array(steps), np.ones(max(1, len(steps) // 40))  # step counts from 1 in each stage
        mean = np.convolve(losses, window, "same") / np.convolve(np.ones(len(steps)), window, "same")
        line, = ax.plot(x, mean, lw=1.8, label=stage)
        ax.plot(x, losses, lw=0.6, alpha=0.3, color=line.get_color())
        start = x[-1]
    ax.set(xlabel="step", ylabel="loss (nats per supervised token)")
    if curves: ax.legend(frameon=False)
    ax.figure.savefig(png_path, dpi=120)
