"""The rows of `python -m bench` that a GPU fills, on a card that does nothing: each has to end.

    python tests/nogpu/rows.py OUT

Nothing is computed, so the sides are not compared, and no time counts. What counts: that a row
runs on a card of 80 GiB, and allocates no more than the plan it is admitted by (bench/room.py).
Reserved is more: sides of different shapes take turns, and what one has freed may fit no other.
The rows beside transformers are left out, for the environment of `make nogpu` has no transformers.
The last line is JSON.
"""
import gc
import json
import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402
import torch  # noqa: E402
from proof import MARGIN  # noqa: E402

import model as model_file  # noqa: E402
from bench import __main__ as bench  # noqa: E402
from bench import kernels, room  # noqa: E402

PARTS = ("attn", "ce", "train", "stages", "warmup")


def run_row(part, function, name, arguments, cfg, device):
    """-> (bytes it allocated, bytes it reserved, what is wrong with it or None)."""
    torch.cuda.reset_peak_memory_stats()
    try:
        list(function(cfg, device, name, *arguments))
    except Exception:
        traceback.print_exc()
        return 0, 0, "it stopped, see the log"
    allocated = torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    planned = room.row_bytes(part, arguments)
    fault = None
    if planned and allocated > (1 + MARGIN) * planned:
        fault = f"allocated {allocated / 1e9:.1f} GB, the plan says {planned / 1e9:.1f}"
    return allocated, reserved, fault


def main():
    card.pretend_results(model_file)
    # Nothing is computed that could agree.
    kernels.refuse_larger_error = lambda errors: None
    cfg = bench.Config(rounds=1)
    device = torch.device("cuda", 0)
    size = torch.cuda.get_device_properties(device).total_memory
    most = 0
    n_rows = 0
    faults = []
    for part in PARTS:
        function, table = bench.bench_parts(device)[part]
        for name, arguments in room.fitting_rows(part, table, size).items():
            allocated, reserved, fault = run_row(part, function, name, arguments, cfg, device)
            n_rows += 1
            most = max(most, reserved)
            if fault:
                faults.append(f"{name}: {fault}")
            print(f"{part} {name}: allocated {allocated / 1e9:.1f} GB, reserved "
                  f"{reserved / 1e9:.1f}, {fault or 'as planned'}", flush=True)
            # the memory of this row, before the next one is built
            gc.collect()
            torch.cuda.empty_cache()
    says = f"{n_rows} rows of bench, {most / 1e9:.1f} GB reserved at most"
    print(json.dumps({"faults": faults, "says": says}))


main()
