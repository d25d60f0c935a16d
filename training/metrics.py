"""What a run measures: one row of log.jsonl per step, trackers, the plot of the loss."""
import collections
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

from inputs.files import check_file
from inputs.sources import source_notes
from training.distributed import all_reduce_sum, reshard, unwrap

# ---- log.jsonl and bad_samples.jsonl -------------------------------------------------------------


def open_log(out_dir):
    """Open log.jsonl for appending. A last line that a crash has torn is cut off first."""
    path = Path(out_dir) / "log.jsonl"
    check_file(path)
    f = open(path, "ab+", buffering=0)
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f


def log_line(f, row, track=None):
    """Append one row as one write. Numbers that are not finite become null, as JSON has none."""
    if track:
        track(row)
    finite = {}
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        finite[name] = value
    # A lone surrogate has no UTF-8; as \udc80 it is JSON.
    line = (json.dumps(finite, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    end = f.seek(0, os.SEEK_END)
    written = 0
    with contextlib.suppress(OSError):
        written = f.write(line)
    if written < len(line):  # the disk is full
        f.truncate(end)
        print(f"WARNING: no room for a line of {f.name}, it is left out",
              file=sys.stderr, flush=True)


def log_bad(out_dir, records):
    """Append unreadable records to bad_samples.jsonl, each of them once.

    A resumed run repeats steps, so it meets some of them a second time.
    """
    if not records:
        return
    path = Path(out_dir) / "bad_samples.jsonl"
    check_file(path)
    with open(path, "ab+", buffering=0) as f:
        f.seek(0)
        known = set(f.read().decode(errors="replace").splitlines())
        for record in records:
            line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace").decode()
            if line not in known:
                log_line(f, record)


def open_tracker(cfg, values):
    """A function that passes a row of log.jsonl to the tracker of --track; None without one.

    ValueError if it is not installed.
    """
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(cfg.out_dir)

            def add_scalars(row):
                for name, value in row.items():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(f"{row['stage']}/{name}", value, row["step"])
            return add_scalars
        if cfg.track == "wandb":
            import wandb
            name = Path(cfg.out_dir).name
            return wandb.init(project="sail-vl", name=name, dir=cfg.out_dir, config=values).log
    except ImportError:
        raise ValueError(f"--track={cfg.track} is not installed: pip install {cfg.track}") from None
    return None


def print_data(packs, progress):
    """Say what of the data is not read, how many samples there are, and where the stage starts."""
    for line in source_notes(packs.sources, most=10):
        print(line, flush=True)
    n = len(packs.sources)
    sources = "1 source" if n == 1 else f"{n} sources"
    start = "resumes at" if progress.step else "starts at"
    print(f"{packs.n:,} samples in {sources}, {packs.n_bad} unreadable; "
          f"{start} step {progress.step}", flush=True)


# ---- the time of a step --------------------------------------------------------------------------


class Clock:
    """Where the time of a step goes: lap("forward") ends a part that the lap before it began.

    On a GPU the laps are events in its queue. Nobody waits for them before `split`.
    """

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.start = time.perf_counter()
        self.laps = []
        self.lap("start")

    def lap(self, part):
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.laps.append((part, now))

    def split(self):
        """(seconds since the start, {part: seconds}); waits for the last lap."""
        if self.cuda:
            self.laps[-1][1].synchronize()
        parts = collections.Counter()
        for (_, a), (part, b) in itertools.pairwise(self.laps):
            parts[part] += a.elapsed_time(b) / 1000 if self.cuda else b - a
        return time.perf_counter() - self.start, parts


# ---- the row of a step ---------------------------------------------------------------------------


def step_totals(micro_batches):
    """{name: sum over the micro-batches of this rank} of what a batch counts: tokens, tiles, ..."""
    names = micro_batches[0]["size"]
    return {name: sum(batch["size"][name] for batch in micro_batches) for name in names}


def speed(totals, seconds, parts, peak, world):
    """Counts and rates of a step.

    seconds, parts: of Clock.split. peak: FLOP/s of one GPU, None if unknown. mfu is strict: only
    the FLOPs that the gradients need count, over what all GPUs could do.
    """
    row = {name: int(totals[name]) for name in ("tokens", "tiles", "supervised", "samples")}
    row["seconds"] = seconds
    row |= {f"{part}_s": s for part, s in parts.items()}
    row["tflop"] = totals["flops"] / 1e12
    row["tokens_per_s"] = totals["tokens"] / seconds
    row["tiles_per_s"] = totals["tiles"] / seconds
    row["mfu"] = totals["flops"] / seconds / (peak * world) if peak else None
    row["data_wait"] = parts["data"] / seconds
    return row


def packing_quality(totals, micro_batches):
    """How full the packs are, and the planned FLOPs of the busiest rank over the mean of all."""
    costs = np.sum([batch["costs"] for batch in micro_batches], axis=0)  # (ranks,)
    return {
        "fill": totals["tokens"] / totals["token_room"],
        "tile_fill": totals["tiles"] / totals["tile_room"],
        "straggler": float(costs.max() / costs.mean()),
    }


def counts_so_far(progress):
    """What the stage has seen and lost up to now."""
    return {
        "tokens_seen": progress.tokens_seen,
        "samples_seen": progress.samples_seen,
        "spike": progress.spike,
        "dropped": sum(dropped(progress.counts).values()),
        "quarantined": progress.quarantined + progress.counts.get("unreadable", 0),
    }


def time_left(seconds, steps, later_steps):
    """Seconds that the stage and the whole run still take, if all steps are as long as this one."""
    return {"eta_s": seconds * steps, "run_eta_s": seconds * (steps + later_steps)}


def dropped(counts):
    """{reason: samples dropped whole} of the counts of Packs."""
    return {reason: n for reason, n in counts.items() if reason not in ("used", "unreadable")}


def account(counts_before, progress, packs, is_last):
    """{"epoch": sums} where each record of the data went, if an epoch or the stage ends here.

    counts_before: the counts before this step. to_come: records still to come in this epoch. All
    ranks have the same counts. AssertionError if what they made of their packs is not what was
    planned: a sample was lost or doubled.
    """
    counts = progress.counts
    bad = progress.quarantined
    if counts["used"] != progress.samples_seen + bad:
        raise AssertionError(f"{counts['used']} samples were planned, {progress.samples_seen} "
                             f"used and {bad} quarantined; report this")
    records = sum(counts.values())
    epochs = records // packs.n
    epochs_before = sum(counts_before.values()) // packs.n
    if epochs == epochs_before and not is_last:
        return {}
    sums = {
        "epochs": epochs,
        "records": records,
        "to_come": -records % packs.n,
        "used": progress.samples_seen,
        "dropped": dropped(counts),
        "quarantined": {"in the index": counts.get("unreadable", 0), "in training": bad},
    }
    return {"epoch": sums}


SPIKE = 6  # standard deviations
TREND = 128  # losses that make the trend; half as many are needed before there is one


def spike(losses, loss):
    """(standard deviations of `loss` above the trend of the last losses, the losses to keep).

    The trend is a straight line. A spike is kept as 3 deviations only: it must not hide the next
    one, but a loss that stays up ends the alarm. Not finite: it is not kept.
    """
    if not math.isfinite(loss):
        return 0.0, losses
    n = len(losses)
    if n < TREND // 2:
        return 0.0, [*losses, loss]
    x = np.arange(n) - (n - 1) / 2
    y = np.array(losses)
    slope = x @ y / (x @ x)
    expected = y.mean() + slope * (n + 1) / 2
    deviation = max((y - y.mean() - slope * x).std(ddof=2), 1e-12)
    sigmas = (loss - expected) / deviation
    kept = float(expected + 3 * deviation) if sigmas > SPIKE else loss
    return float(sigmas), [*losses, kept][-TREND:]


@torch.no_grad()
def validation_loss(model, batches, dist):
    """Mean loss over held-out batches: summed over all ranks, then divided once.

    batches: (arguments of the model, weight of what is supervised), as many on each rank.
    """
    model = unwrap(model).eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, weight
    for inputs, weight in batches:
        sums += torch.tensor([model(**inputs).item(), weight], dtype=torch.float64)
    reshard(model)
    model.train()
    loss, weight = all_reduce_sum(sums.to(dist.device), dist).tolist()
    return loss / weight if weight else math.nan  # nothing could be read


def format_step(row):
    """The printed line of a step from its row of log.jsonl."""
    rates = " ".join(f"{name} {value:.1e}" for name, value in row["lr"].items() if value)
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    eta = datetime.timedelta(seconds=int(row["eta_s"]))
    run_eta = datetime.timedelta(seconds=int(row["run_eta_s"]))
    fields = [
        f"{row['stage']} {row['step']}/{row['steps']}",
        f"loss {row['loss']:.4f}",
        f"lr {rates}",
        f"{row['tokens_per_s']:,.0f} tok/s {row['tiles_per_s']:,.1f} tiles/s",
        f"mfu {mfu}",
        f"data wait {100 * row['data_wait']:.0f}%",
        f"mem {row['memory_gb']:.1f} GB",
        f"dropped {row['dropped']} quarantined {row['quarantined']}",
        f"left: stage {eta}, run {run_eta}",
    ]
    if row["spike"] > SPIKE:
        fields.append(f"SPIKE {row['spike']:.0f} sigma")
    for name, value in row.items():
        if name.startswith("val_loss"):
            fields.append(f"{name.replace('val_loss', 'val loss')} {value:.4f}")
    if "best" in row:
        fields.append("lowest so far, this checkpoint is kept")
    if "epoch" in row:
        fields.append(json.dumps(row["epoch"]))
    return " | ".join(fields)


class StepPrinter:
    """Prints the line of every so many steps, and of the last one, above a progress bar.

    The sums of an epoch come with the next of these lines: a tiny set ends one at every step.
    """

    def __init__(self, bar, every):
        self.bar = bar
        self.every = every
        self.epoch = {}  # the last one that is not printed yet

    def add(self, row):
        if "epoch" in row:
            self.epoch = {"epoch": row["epoch"]}
        if row["step"] % self.every == 0 or row["step"] == row["steps"]:
            self.bar.write(format_step(row | self.epoch))
            self.epoch = {}


# ---- the machine ---------------------------------------------------------------------------------

# Dense bf16 tensor-core TFLOP/s from the vendor's data sheets.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989,
    "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "H200 NVL": 835,
    "H800": 989, "H800 PCIe": 756, "H20": 148, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125, "RTX A6000": 155,
    "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71,
}
# What may stand around the name of a card: maker, socket, memory.
CARD_EXTRAS = r"nvidia|geforce|tesla|pcie|sxm\d*|hbm\S*|\d+gb"


def peak_flops(device):
    """Peak bf16 FLOP/s of one device, None if it is not known: no MFU rather than a wrong one.

    Not known are all CPUs, slices of a GPU and the GPUs of laptops.
    """
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s-]+", torch.cuda.get_device_name(device).lower()))
    # Longer names first, so that "H100 PCIe" is not taken for "H100".
    for name, tflops in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0].split())):
        own = set(name.lower().split())
        if own <= words and all(re.fullmatch(CARD_EXTRAS, word) for word in words - own):
            return tflops * 1e12
    return None


def peak_memory_gb():
    """Most memory this process has held, in GB (1e9 bytes): on its GPU, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
