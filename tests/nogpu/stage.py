"""Stages of a configuration through train.py's own loop, on packs made to measure.

    python tests/nogpu/stage.py train.py config/pretrain_2b.py --stages=advance ...

Two micro-batches a step. Step 1: two of the fullest packs. Step 2: two varied ones. Step 3: one of
each. With --compile=off one step is enough, to count kernels. For each stage a line of JSON says
what the card was asked for. $NOGPU_WORLD: the number of ranks to pretend.
"""
import contextlib
import importlib
import itertools
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402
import mixes  # noqa: E402
import torch  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch._inductor.runtime.triton_heuristics import CachingAutotuner  # noqa: E402

import model as model_file  # noqa: E402
import train  # noqa: E402
from training import checkpoint, distributed, memory, optim  # noqa: E402

MICRO = 2
STEPS = 3
FULL = (True, True, False, False, True, False)  # whether each pack is the fullest there can be


# ---- packs ---------------------------------------------------------------------------------------


def document_lengths(room, full, draw):
    """Lengths of documents that fill a pack of `room` tokens."""
    if full:
        length = min(memory.TOKENS, room)
        return [length] * (room // length)
    lengths = []
    while sum(lengths) < room - 64:
        length = int(torch.randint(64, 3000, (1,), generator=draw))
        lengths.append(min(length, room - sum(lengths)))
    return lengths


def make_pack(cfg, model, full, draw):
    """The tensors and sizes of a batch as data.py gives it, pinned."""
    per_tile = model.vision.tokens_per_tile
    lengths = document_lengths(cfg.tokens_per_pack, full, draw)
    T = sum(lengths)
    n_tiles = min(cfg.max_tiles_per_pack, T // per_tile)
    if not full:
        n_tiles = int(torch.randint(1, n_tiles, (1,), generator=draw))
    tokens = torch.zeros(T, dtype=torch.int64)
    tokens[:n_tiles * per_tile] = model.image_token_id
    ends = list(itertools.accumulate(lengths))
    labels = torch.full((T,), model_file.IGNORE)
    for length, end in zip(lengths, ends, strict=True):
        labels[end - min(memory.SUPERVISED, length):end] = 1
    supervised = int((labels != model_file.IGNORE).sum())
    side = model.vision.image_size
    tensors = {
        "tokens": tokens,
        "labels": labels,
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "weights": torch.ones(T),
        "tiles": torch.zeros(n_tiles, 3, side, side, dtype=torch.uint8),
    }
    size = {"tokens": T, "tiles": n_tiles, "samples": len(lengths), "supervised": supervised,
            "weight": float(supervised)}
    pack = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return pack | {"lengths": lengths, "size": size}


# ---- the loop of train.py, measured --------------------------------------------------------------


class Measured:
    """What is known of the stage that runs now."""
    model = None  # on the meta device, of the right sizes
    cfg = None
    marks = []  # for each forward pass: counts since the one before, graphs, collectives so far
    rows = []  # what was printed
    compiled_bytes = 0  # that Inductor's kernels have read and written since the last mark


def measured_packs(real_loader):
    """In place of data.make_loader: packs of FULL, dressed as the first real one."""
    def packs(dataset, rank, world, *_):
        real = next(iter(real_loader(dataset, rank, world)))
        draw = torch.Generator().manual_seed(1)
        used = 0
        for full in FULL:
            made = make_pack(Measured.cfg, Measured.model, full, draw)
            made["size"] = real["size"] | made["size"]
            used += made["size"]["samples"]
            yield real | made | {"bad": [], "counts": {"used": used}}

    return packs


def mark_forward_passes():
    """Note what was counted before each forward pass. Step 2 is watched for waiting."""
    forward = model_file.VLM.forward

    def marked(self, *args, **settings):
        graphs = counters["stats"]["unique_graphs"]
        found = card.counts() | {"compiled bytes": Measured.compiled_bytes}
        Measured.compiled_bytes = 0
        Measured.marks.append((found, graphs, dict(card.collectives)))
        card.watch_syncs(MICRO < len(Measured.marks) <= 2 * MICRO)
        return forward(self, *args, **settings)

    model_file.VLM.forward = marked


def count_compiled_bytes():
    """Inductor writes beside each kernel what it reads and writes, for the sizes of the first pack.

    That pack is the fullest. Graphs from Inductor's cache would bring the bytes of the pack they
    were compiled for, which may be one of another recipe: a ViT of half as many tiles.
    """
    inductor_config.benchmark_kernel = True  # else it does not write it
    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    run = CachingAutotuner.run

    def counted(self, *args, **settings):
        Measured.compiled_bytes += int(1e9 * self.inductor_meta.get("kernel_num_gb", 0))
        return run(self, *args, **settings)

    CachingAutotuner.run = counted


def skip(owner, name):
    """Let a function of the program do nothing. AttributeError if there is none of this name."""
    getattr(owner, name)
    setattr(owner, name, lambda *_: None)


def skip_weights():
    """Weights are not drawn, not checked and not written, and need no disk."""
    skip(train.run_folder, "check_disk")
    skip(train, "start_weights")
    skip(train, "write_result")
    skip(distributed, "full_state")
    skip(checkpoint.Saver, "check")


def measure_stages():
    """Wrap train.start_model and train.train_stage."""
    start_model = train.start_model
    train_stage = train.train_stage

    def started(cfg, *rest):
        model, source = start_model(cfg, *rest)
        with torch.device("meta"):
            Measured.model = model_file.VLM(model.vision, model.llm, model.image_token_id)
        Measured.cfg = cfg
        return model, source

    def measured(run, name, stage, later_steps):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        Measured.marks.clear()
        card.syncs.clear()
        counters.clear()
        # torch.compile would leave alone what runs while devices are watched.
        eager = run.cfg.compile == "off"
        with mixes.WatchDevices() if eager else contextlib.nullcontext() as watched:
            stopped = train_stage(run, name, stage, later_steps)
        card.watch_syncs(False)
        trained = optim.set_trained_parts(Measured.model, stage, run.cfg)
        plan = memory.memory_plan(run.cfg, Measured.model, trained, run.dist.world)
        row = {"stage": name} | summary(plan) | {"mixed": dict(watched.found) if eager else {}}
        print(json.dumps(row), flush=True)
        Measured.rows.append(row)
        return stopped

    train.start_model = started
    train.train_stage = measured


def summary(plan):
    """The row of a stage. plan: memory.memory_plan."""
    marks = Measured.marks
    one_step = len(marks) == MICRO
    pack = marks[1 if one_step else -1][0]  # what the fullest pack before this mark asked for
    collectives = {}
    if not one_step:
        before = marks[MICRO][2]
        after = marks[2 * MICRO][2]
        collectives = {name: n - before.get(name, 0) for name, n in after.items()}
    return {
        "allocated": torch.cuda.max_memory_allocated() / 1e9,
        "reserved": torch.cuda.max_memory_reserved() / 1e9,
        "planned_allocated": plan.allocated / 1e9,
        "planned_reserved": plan.reserved / 1e9,
        "kernels": card.kernels(pack),
        "compiled_gb": pack["compiled bytes"] / 1e9,
        "graphs": counters["stats"]["unique_graphs"],
        "recompiled": counters["stats"]["unique_graphs"] - marks[1][1],
        "breaks": sum(counters["graph_break"].values()),
        "syncs": dict(card.syncs),
        "collectives": collectives,
    }


def main():
    script_name, *argv = sys.argv[1:]
    world = int(os.environ.get("NOGPU_WORLD", 8))
    if world > 1:
        card.pretend_world(world)
    card.pretend_results(model_file)
    mark_forward_passes()
    count_compiled_bytes()
    skip_weights()
    measure_stages()
    train.make_loader = measured_packs(train.make_loader)
    script = importlib.import_module(script_name.removesuffix(".py"))
    steps = 1 if "--compile=off" in argv else STEPS
    sys.argv = [script_name, *argv, f"--grad_accum_steps={MICRO}", f"--max_steps={steps}"]
    script.main()


if __name__ == "__main__":
    main()
