"""Measuring one side beside another: the same inputs, medians of interleaved rounds, a table."""
import importlib.metadata
import itertools
import json
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch

# One call of a side is repeated until it takes this long, so that the clock's own time is small.
SHORTEST_S = 0.02


def time_calls(function, n, device):
    """Mean seconds of n calls; on a GPU its queue is empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n


def seconds_per_call(sides, rounds, device):
    """sides {name: function} -> {name: median seconds of a call}. The order turns every round."""
    # compilation and caches come first
    for function in sides.values():
        function()
    repeats = {}
    for name, function in sides.items():
        repeats[name] = max(1, int(SHORTEST_S / time_calls(function, 1, device)))

    times = {name: [] for name in sides}
    for i in range(rounds):
        order = list(sides) if i % 2 else list(reversed(sides))
        for name in order:
            times[name].append(time_calls(sides[name], repeats[name], device))
    return {name: median(seconds) for name, seconds in times.items()}


def compare_sides(row, sides, rounds, device, work, unit):
    """Rows of `ours` beside each other side: value = work of a call / its seconds."""
    assert sides.keys() > {"ours"}, f"only {list(sides)} runs here: nothing to compare"
    seconds = seconds_per_call(sides, rounds, device)
    ours = work / seconds["ours"]
    rows = []
    for peer in sides:
        if peer != "ours":
            theirs = work / seconds[peer]
            rows.append(dict(row=row, value=ours, unit=unit, peer=peer, peer_value=theirs,
                             ratio=ours / theirs))
    return rows


def largest_error(ours, theirs):
    """Largest difference over the largest value, of two lists of tensors."""
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        a = a.double()
        b = b.double()
        errors.append(((a - b).abs().max() / b.abs().max()).item())
    return max(errors)


def refuse_larger_error(errors):
    """errors {side: error against fp64}: AssertionError where ours is over twice the best peer's.

    The rule of flash-attention's tests: no invented tolerances."""
    best = min(error for side, error in errors.items() if side != "ours")
    assert errors["ours"] <= 2 * best + 1e-6, (
        f"ours errs by {errors['ours']:.2g}, the best peer by {best:.2g}")


# ---- the table -----------------------------------------------------------------------------------


def format_cell(x):
    if not isinstance(x, float):
        return str(x)
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def describe_machine(device):
    """Device, CPU threads and versions in one line."""
    name = "CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif sys.platform == "linux":
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    packages = ("torch", "triton", "transformers", "flash-attn")
    versions = [f"{p} {installed[p]}" for p in packages if p in installed]
    return f"{name}, {torch.get_num_threads()} CPU threads, {', '.join(versions)}"


def markdown_table(rows):
    """Rows {column: value} as text, with every column that some row has, in order of first use."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        lines.append([format_cell(row.get(column, "")) for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(rows, device):
    """The machine, a markdown table and, on the last line, the rows as JSON."""
    print(f"\n{describe_machine(device)}\n")
    print(markdown_table(rows))
    print(json.dumps(rows))
