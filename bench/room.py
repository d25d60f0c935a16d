"""Which rows fit on the card, from the plan of memory that --dry_run prints."""
import torch

from bench.samples import (
    BENCH_SIZES,
    TRAINED_PARTS,
    WARMUP_PACKS,
    batches_of_8,
    draw_lengths,
    stage_rates,
)
from model import VLM
from train import Config
from training import optim
from training.memory import memory_plan

DRIVER_BYTES = 2e9  # of the card, for the driver and the libraries of CUDA


def step_plan(size, stage, checkpointing="none", seeds=1):
    """The MemoryPlan of a step on the samples of a BenchSize, the most of these seeds.

    They are packed, or padded to the longest of eight, which is more. Padded batches have one
    backward pass together, so all are held at once.
    """
    shape = BENCH_SIZES[size]
    cfg = Config(activation_checkpointing=checkpointing, tokens_per_pack=0, max_tiles_per_pack=0)
    for seed in range(seeds):
        tiles, text = draw_lengths(shape, torch.Generator().manual_seed(seed))
        per_tile = shape.vision.tokens_per_tile
        lengths = [n * per_tile + more for n, more in zip(tiles, text, strict=True)]
        padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches_of_8(lengths)]
        cfg.tokens_per_pack = max(cfg.tokens_per_pack, sum(padded))
        cfg.max_tiles_per_pack = max(cfg.max_tiles_per_pack, sum(tiles))
    with torch.device("meta"):
        model = VLM(shape.vision, shape.llm, 0)
    trained = optim.set_trained_parts(model, stage_rates(stage), cfg)
    return memory_plan(cfg, model, trained, world=1)


def bytes_together(plans):
    """What models reserve that take turns: each keeps its state, and one of them is at work."""
    state = sum(plan.state for plan in plans)
    at_work = max(plan.allocated - plan.state for plan in plans)
    fragments = max(plan.fragments / plan.allocated for plan in plans)
    return (1 + fragments) * (state + at_work)


def row_bytes(part, arguments):
    """The most that a row of a part of bench needs of a GPU, 0 where it is little.

    Of transformers no plan is made. It keeps weights and moments as we do, and its eager blocks are
    taken to keep twice of what our compiled ones do.
    """
    if part == "train":
        return bytes_together([step_plan(*arguments)])
    if part == "stages":
        return bytes_together([step_plan(arguments[0], stage) for stage in TRAINED_PARTS])
    if part == "warmup":
        return bytes_together([step_plan(arguments[0], "sft", "selective", WARMUP_PACKS)])
    if part == "vs-hf":
        plan = step_plan(arguments[0], "sft")
        return bytes_together([plan, plan]) + plan.activations
    return 0


def fitting_rows(part, table, card_bytes):
    """The rows of a table that fit on the card; the others are named."""
    fitting = {}
    for name, arguments in table.items():
        need = row_bytes(part, arguments) + DRIVER_BYTES
        if need > card_bytes:
            print(f"{name}: not run, it needs {need / 1e9:.0f} GB, and the card has "
                  f"{card_bytes / 1e9:.0f}", flush=True)
        else:
            fitting[name] = arguments
    return fitting
