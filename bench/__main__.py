"""Speed beside what one would use instead: same inputs, same process, parity first.

    python -m bench attn      # packed attention beside PyTorch's, FlexAttention, flash-attn
    python -m bench ce        # head and cross-entropy beside the plain ones: time, memory
    python -m bench train     # training steps: tokens/s, strict MFU, memory, beside padded batches
    python -m bench vs-hf     # training steps beside transformers' InternVL: same weights, samples
    python -m bench decode    # one answer beside transformers' generate, many beside one by one
    python -m bench serving   # serve.py: 8 clients beside one, the first text beside sample.py's
    python -m bench stages    # alignment and advance beside sft: seconds against FLOPs
    python -m bench pack      # packs from lengths: fill, balance of 8 ranks, time, other methods
    python -m bench image     # JPEG to tiles on one core, beside Pillow and transformers
    python -m bench loader    # images/s of whole batches, beside what an H200 needs
    python -m bench waiting   # share of its time that a pretended GPU waits for packs
    python -m bench warmup    # seconds to the first compiled step, graphs for 20 more packs
    python -m bench dedup --pictures=FOLDER [--hashes=10e6]   # edits found, wrong merges; ranks

Rows come as they are measured. At the end, whatever happened, come device and versions, a markdown
table and, on the last line, the same rows as JSON: row, value, unit and, beside a peer, peer,
peer_value, ratio (ours over theirs, above 1 is better). A row that fails, or whose sides disagree,
is named and left out, and the exit code is 1. A row that does not fit on the GPU is named and not
run. Data and weights are random.
"""
import gc
import signal
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from bench import kernels, loading
from bench.decoding import decoding_rows
from bench.dedup import dedup_rows
from bench.measure import format_cell, print_table
from bench.room import fitting_rows
from bench.samples import TRAINED_PARTS
from bench.serving import serving_rows
from bench.training import stage_rows, training_rows, transformers_rows, warmup_rows
from configurator import configure, run_script, setting, subcommand
from training import distributed


@dataclass(slots=True)
class Config:
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one, else cpu
    rounds: int = setting(7, at_least=1, at_most=10**4)  # interleaved; the median counts
    rows: str = ""  # only rows whose name begins with one of these, separated by commas
    compiled: bool = True  # vs-hf: beside the compiled peer too, a minute or two of compilation
    threads: int = setting(0, at_most=1024)  # CPU threads; 0: PyTorch's choice
    pictures: str = ""  # dedup: a folder with a folder of pictures for each kind
    hashes: int = setting(0, at_most=10**9)  # dedup: so many hashes on 1, 2 and 4 ranks


def training_table(cuda):
    """{row: arguments of training_rows}: a size, a stage and what is recomputed."""
    size = "2b" if cuda else "toy"
    table = {f"{size}_{stage}": (size, stage) for stage in TRAINED_PARTS}
    if cuda:
        table["2b_mix_alignment"] = ("2b_mix", "alignment")
        table["2b_sft_selective"] = ("2b", "sft", "selective")
        table["2b_16k_sft_selective"] = ("2b_16k", "sft", "selective")
        table["8b_advance_selective"] = ("8b", "advance", "selective")
    else:
        table["7m_mix_sft"] = ("7m_mix", "sft")
    return table


def transformers_table(cuda):
    """{row: arguments of transformers_rows}: a size, the arithmetic, the compiled peer or not."""
    table = {
        "7m_fp32": ("7m", torch.float32, True),
        "7m_bf16": ("7m", torch.bfloat16, True),
        "25m_bf16": ("25m", torch.bfloat16),
    }
    if cuda:
        table = {"2b_4k_bf16": ("2b_4k", torch.bfloat16), **table,
                 "2b_4k_bf16_compiled": ("2b_4k", torch.bfloat16, True)}
    return table


def decoding_table():
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {f"{row}_{kind}": (dtype,) for row in ("tiny", "batched")
            for kind, dtype in kinds.items()}


def bench_parts(device):
    """{part: (function, {row: its further arguments})}; a function yields rows."""
    cuda = device.type == "cuda"
    stages = {"2b_4k": ("2b_4k",)} if cuda else {"toy": ("toy",), "25m": ("25m",)}
    shapes = kernels.ATTENTION_SHAPES_CUDA if cuda else kernels.ATTENTION_SHAPES_CPU
    packs = {"8k": (8192, 48), "16k": (16384, 64), "8k_28_tiles": (8192, 28),
             "16k_56_tiles": (16384, 56)}
    return {
        "attn": (kernels.attention_rows, {name: (shape,) for name, shape in shapes.items()}),
        "ce": (kernels.head_loss_rows, {"ce_frozen": (False,), "ce_trains": (True,)}),
        "train": (training_rows, training_table(cuda)),
        "stages": (stage_rows, stages),
        "warmup": (warmup_rows, {"2b_mix": ("2b_mix",)} if cuda else {"toy": ("toy",)}),
        "vs-hf": (transformers_rows, transformers_table(cuda)),
        "pack": (loading.packing_rows, packs),
        "image": (loading.image_rows, {"images_per_s_core": ()}),
        "loader": (loading.loader_rows, {"loader_2_workers": (2,), "loader_1_worker": (1,)}),
        "waiting": (loading.waiting_rows, {
            "wait_accum_1": (1,),
            "wait_accum_64": (64,),
            "wait_full_accum_1": (1, loading.full_packs),
            "wait_full_accum_64": (64, loading.full_packs)}),
        "decode": (decoding_rows, decoding_table()),
        "serving": (serving_rows, {"8_clients": (), "first_text": ()}),
        "dedup": (dedup_rows, {"edits": (), "speed": (), "hashes": ()}),
    }


def measure_rows(cfg, device, function, table):
    """Measure every row of a part. Returns the names of those that failed.

    What was measured is printed as a table at the end, also where a signal ends the program."""
    slow_bf16 = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    rows = []
    failed = []
    try:
        for name, arguments in table.items():
            if slow_bf16 and "bf16" in name and not cfg.rows:
                print(f"{name}: not run, this CPU has no bf16 products and needs minutes a step; "
                      f"--rows={name} runs it")
                continue
            try:
                for row in function(cfg, device, name, *arguments):
                    rows.append(row)
                    cells = [f"{key} {format_cell(value)}" for key, value in row.items()]
                    print(", ".join(cells), flush=True)
            except Exception as e:
                # the other rows still count
                failed.append(name)
                reason = str(e).strip()[:500]
                print(f"{name} FAILED: {type(e).__name__}: {reason}", flush=True)
            # the memory of this row, before the next one is built
            gc.collect()
    finally:
        print_table(rows, device)
    return failed


def end_by_signal(number, frame):
    """`timeout` sends SIGTERM; an exit by exception still prints the table."""
    sys.exit(143)


def main():
    cfg = Config()
    names = {name: name for name in bench_parts(torch.device("cpu"))}
    usage = f"python -m bench {' | '.join(names)} [--rounds=N --rows=a,b --device=cpu]"
    part, flags = subcommand(names, usage, cfg)
    configure(cfg, flags)
    device = distributed.setup_distributed(cfg.device).device
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    signal.signal(signal.SIGTERM, end_by_signal)

    function, table = bench_parts(device)[part]
    beginnings = tuple(cfg.rows.split(","))
    wanted = {name: arguments for name, arguments in table.items() if name.startswith(beginnings)}
    if not wanted:
        raise ValueError(f"--rows={cfg.rows}: no such row; there are {', '.join(table)}")
    if device.type == "cuda":
        wanted = fitting_rows(part, wanted, torch.cuda.get_device_properties(device).total_memory)
    failed = measure_rows(cfg, device, function, wanted)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
