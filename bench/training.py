"""Rows of `train`, `stages`, `warmup` and `vs-hf`: training steps.

Shape letters: S samples, L longest sample, N tiles."""
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.measure import compare_sides, largest_error, seconds_per_call
from bench.samples import (
    BENCH_SIZES,
    TOKENIZER_FOLDER,
    TRAINED_PARTS,
    WARMUP_PACKS,
    batches_of_8,
    build_model,
    count_supervised,
    pack_samples,
    pad_samples,
    random_samples,
    training_step,
)
from inputs.chat import IGNORE
from inputs.images import normalize
from model_config import config_json
from training import distributed, metrics
from training.compile import compile_blocks
from training.copies import copy_weights
from training.flops import train_flops
from weights import save_folder


def padded_packs(model, samples, tiles, device):
    """Arguments of VLM.forward for batches of eight, padded to the longest of each batch."""
    packs = []
    first = 0
    for batch in batches_of_8(samples):
        some = [samples[i] for i in batch]
        visual = sum(int((tokens == model.image_token_id).sum()) for tokens, _ in some)
        n_tiles = visual // model.vision.tokens_per_tile
        tokens, labels = pad_samples(some)
        padded = list(zip(tokens, labels, strict=True))
        packs.append(pack_samples(padded, tiles[first:first + n_tiles], device))
        first += n_tiles
    return packs


def training_rows(cfg, device, name, size, stage, checkpointing="none"):
    """A step on one pack beside a step on the same samples padded: tokens/s, strict MFU, memory."""
    dtype = distributed.compute_dtype("auto", device)
    model, optimizer = build_model(size, stage, dtype, device)
    distributed.checkpoint_activations(model, checkpointing)
    samples, tiles = random_samples(size)
    supervised = count_supervised(samples)
    lengths = [len(tokens) for tokens, _ in samples]

    copies = ([], [])
    if device.type == "cuda":
        compile_blocks(model)
        copies = copy_weights(model, dtype)

    def step_over(packs):
        def loss():
            return sum(model(**pack) for pack in packs) / supervised
        return lambda: training_step(loss, optimizer, dtype, device, copies)

    sides = {"ours": step_over([pack_samples(samples, tiles, device)]),
             "ours, padded": step_over(padded_packs(model, samples, tiles, device))}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        # alone, so that the peak is that of our side
        sides["ours"]()
    memory = metrics.peak_memory_gb()

    row, = compare_sides(name, sides, cfg.rounds, device, float(sum(lengths)), "tokens/s")
    shape = BENCH_SIZES[size]
    flops = train_flops(
        shape.vision, shape.llm, len(tiles), lengths, supervised, TRAINED_PARTS[stage])
    tflops = row["value"] / sum(lengths) * flops / 1e12
    peak = metrics.peak_flops(device)
    mfu = 100 * tflops * 1e12 / peak if peak else ""
    yield row | dict(tflops=tflops, mfu_percent=mfu, gb=memory)


def stage_rows(cfg, device, name, size):
    """Seconds of a step with frozen parts beside one in which all train, over the same ratio of
    FLOPs: 1 is ideal."""
    dtype = distributed.compute_dtype("auto", device)
    samples, tiles = random_samples(size)
    shape = BENCH_SIZES[size]
    pack = pack_samples(samples, tiles, device)
    lengths = [len(tokens) for tokens, _ in samples]
    supervised = count_supervised(samples)

    def step_of(model, optimizer, copies):
        return lambda: training_step(
            lambda: model(**pack) / supervised, optimizer, dtype, device, copies)

    sides = {}
    flops = {}
    for stage, trained in TRAINED_PARTS.items():
        model, optimizer = build_model(size, stage, dtype, device)
        copies = ([], [])
        if device.type == "cuda":
            compile_blocks(model)
            copies = copy_weights(model, dtype)
        sides[stage] = step_of(model, optimizer, copies)
        flops[stage] = train_flops(
            shape.vision, shape.llm, len(tiles), lengths, supervised, trained)
    seconds = seconds_per_call(sides, cfg.rounds, device)
    for stage in ("alignment", "advance"):
        share = seconds[stage] / seconds["sft"]
        ideal = flops[stage] / flops["sft"]
        yield dict(row=f"{name}_{stage}", value=share, unit="of sft", flop_share=ideal,
                   over_share=share / ideal)


def warmup_rows(cfg, device, name, size):
    """Seconds until the first compiled step is done; graphs compiled for 20 more packs."""
    dtype = distributed.compute_dtype("auto", device)
    model, optimizer = build_model(size, "sft", dtype, device)
    if device.type == "cuda":
        distributed.checkpoint_activations(model, "selective")
    compile_blocks(model)
    copies = copy_weights(model, dtype)

    def step_on(pack):
        training_step(lambda: model(**pack) / 1000, optimizer, dtype, device, copies).item()

    seconds = []
    graphs = []
    for seed in range(WARMUP_PACKS):
        pack = pack_samples(*random_samples(size, seed), device)
        start = time.perf_counter()
        step_on(pack)
        seconds.append(time.perf_counter() - start)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    yield dict(row=f"{name}_first_step", value=seconds[0], unit="s")
    yield dict(row=f"{name}_next_20_steps", value=sum(seconds[1:]), unit="s")
    more = graphs[-1] - graphs[0]
    yield dict(row=f"{name}_graphs_after_the_first_step", value=more, unit="graphs")


# ---- beside transformers -------------------------------------------------------------------------


@functools.cache
def temporary_folder():
    """A folder that goes with the process."""
    return tempfile.TemporaryDirectory()


def export_for_transformers(state, vision, llm, dtype, device):
    """-> transformers' InternVL with these weights, and the folder of ours that it came from."""
    from transformers import InternVLForConditionalGeneration
    folder = Path(tempfile.mkdtemp(dir=temporary_folder().name))
    ours = folder / "ours"
    theirs = folder / "theirs"
    save_folder(state, config_json(vision, llm, torch.float32), ours, TOKENIZER_FOLDER)
    export = [sys.executable, "convert.py", "export", ours, theirs, "--layout=transformers"]
    root = Path(__file__).resolve().parent.parent
    subprocess.run(export, cwd=root, check=True, capture_output=True)
    peer = InternVLForConditionalGeneration.from_pretrained(theirs, dtype=dtype)
    return peer.to(device), ours


def losses_beside_transformers(model, peer, samples, tiles, device):
    """{side: function -> mean loss of these samples}. Theirs takes a right-padded batch."""
    pack = pack_samples(samples, tiles, device)
    supervised = count_supervised(samples)
    tokens, labels = pad_samples(samples)  # (S, L) each
    lengths = torch.tensor([[len(t)] for t, _ in samples])
    inputs = dict(
        input_ids=tokens,
        attention_mask=torch.arange(tokens.shape[1]) < lengths,
        pixel_values=normalize(tiles),
        # they shift the labels themselves
        labels=F.pad(labels[:, :-1], (1, 0), value=IGNORE))
    inputs = {name: x.to(device) for name, x in inputs.items()}
    return {"ours": lambda: model(**pack) / supervised,
            "transformers": lambda net=peer: net(**inputs, use_cache=False).loss}


def loss_and_gradient(loss, parameter):
    value = loss()
    return [value, torch.autograd.grad(value, parameter)[0]]


def transformers_rows(cfg, device, name, size, dtype, compiled=False):
    """Steps that train everything with AdamW, in the row's arithmetic, after a check in fp32.

    At 2B only the first sample is checked, for the memory."""
    samples, tiles = random_samples(size)
    model, optimizer = build_model(size, "sft", dtype, device)
    shape = BENCH_SIZES[size]
    peer, _ = export_for_transformers(
        model.state_dict(), shape.vision, shape.llm, torch.float32, device)
    peer.train()
    losses = losses_beside_transformers(model, peer, samples, tiles, device)
    checked = losses
    if size == "2b_4k":
        few = tiles[:shape.tiles[0]]
        checked = losses_beside_transformers(model, peer, samples[:1], few, device)
    weight = "layers.0.self_attn.k_proj.weight"
    ours = loss_and_gradient(
        checked["ours"], model.get_parameter(f"language_model.model.{weight}"))
    theirs = loss_and_gradient(
        checked["transformers"], peer.get_parameter(f"model.language_model.{weight}"))
    # the tolerance of tests/test_parity.py
    error = largest_error(ours, theirs)
    assert error <= 1e-4, f"loss or gradient differ by {error:.2g} in fp32"

    if device.type == "cuda":
        compile_blocks(model)
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        with_cudnn = sdpa_kernel(backends, set_priority=True)
        losses["transformers, cudnn"] = with_cudnn(losses["transformers"])
    if cfg.compiled and compiled:
        losses["transformers, compiled"] = functools.partial(
            losses["transformers"], torch.compile(peer))
    adam = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    sides = {}
    for side, loss in losses.items():
        own = optimizer if side == "ours" else adam
        sides[side] = functools.partial(training_step, loss, own, dtype, device)
    for row in compare_sides(name, sides, cfg.rounds, device, float(len(samples)), "samples/s"):
        yield row | dict(error=error)
