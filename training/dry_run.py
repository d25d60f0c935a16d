"""What a run will cost: --dry_run=True prints modules, memory, FLOPs, tokens and days."""
import torch

from model import VLM
from model_config import read_configs
from training.distributed import check_nodes
from training.flops import train_flops
from training.memory import SUPERVISED, TILES, TOKENS, fullest_tiles, memory_plan
from training.optim import print_stage_table, set_trained_parts
from training.traffic import traffic_plan

GPU_TFLOPS = 989  # of an H100, dense bf16; see PEAK_TFLOPS of metrics.py


def print_plan(cfg, stages, world):
    """Print the plan of all stages of a run for `world` GPUs; the model is built without memory.

    Memory: see training/memory.py; for the fullest pack and compiled blocks. FLOPs are strict
    (train_flops), for packs full of samples of TOKENS. Days: at cfg.mfu_assumed of
    GPU_TFLOPS.
    """
    check_nodes(cfg.parallel, world)
    vision, llm = cfg.vision, cfg.llm
    if cfg.init_from:
        vision, llm, _ = read_configs(cfg.init_from)
    if llm is None:
        raise ValueError(f"{cfg.init_from} is a vision encoder alone; "
                         "convert.py assemble joins it with the rest")
    days = sum(print_stage_plan(cfg, name, stage, vision, llm, world) for name, stage in stages)
    with torch.device("meta"):
        model = VLM(vision, llm, 0)
    tensors = sum(1 for _ in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    gpus = "GPU" if world == 1 else "GPUs"
    print(f"{tensors} tensors, {parameters:,} parameters; {days:.3g} days in all on {world} {gpus}")


def print_stage_plan(cfg, name, stage, vision, llm, world):
    """Print the plan of one stage; returns its days."""
    with torch.device("meta"):
        model = VLM(vision, llm, 0)
    trained = set_trained_parts(model, stage, cfg)
    print_stage_table(name, model, stage)

    # time
    pack = cfg.tokens_per_pack
    tokens = min(TOKENS, pack)
    tiles = max(1, min(TILES, tokens // vision.tokens_per_tile))
    samples = pack // tokens * cfg.grad_accum_steps * world  # of one step
    flops = samples * train_flops(vision, llm, tiles, [tokens], SUPERVISED, trained)
    step_tokens = samples * tokens
    days = stage.steps * flops / world / (cfg.mfu_assumed * GPU_TFLOPS * 1e12) / 86400

    forward = samples * train_flops(vision, llm, tiles, [tokens], SUPERVISED, (False,) * 3)
    memory = memory_plan(cfg, model, trained, world)
    most_tiles = fullest_tiles(cfg, vision)
    checkpointing = cfg.activation_checkpointing

    print(f"    {stage.steps:,} steps x {step_tokens:,} tokens = "
          f"{stage.steps * step_tokens / 1e9:.3g}B tokens; {flops / 1e12:,.6g} TFLOP per step")
    print(f"    weights, gradients and moments: {memory.state / 1e9:.1f} GB per GPU "
          f"({world} x {cfg.parallel}), bf16 copies: {memory.copies / 1e9:.1f} GB, "
          f"activations at {most_tiles} tiles (checkpointing {checkpointing}): "
          f"{memory.activations / 1e9:.1f} GB, at work: {memory.work / 1e9:.1f} GB, "
          f"in all: {memory.allocated / 1e9:.1f} GB; "
          f"PyTorch reserves about {memory.reserved / 1e9:.1f} GB")
    if cfg.compile == "off":
        print("    without --compile the activations take up to half as much again")
    if cfg.dtype == "fp8":
        print("    calculated as for bfloat16; the MFU of --dtype=fp8 is a share of that peak too")
    if world > 1:
        print_traffic(cfg, traffic_plan(cfg.parallel, model, world), flops / world,
                      forward / world)
    print(f"    {days:.3g} days at {100 * cfg.mfu_assumed:.0f} % of {GPU_TFLOPS} TFLOP/s")
    return days


def print_traffic(cfg, traffic, flops, forward):
    """Print what a GPU sends, and when it is hidden. FLOPs of a step of a GPU, and its forward."""
    packs = cfg.grad_accum_steps
    pack_seconds = flops / packs / (cfg.mfu_assumed * GPU_TFLOPS * 1e12)
    backward_seconds = pack_seconds * (flops - forward) / flops
    places = ("inside its node", "to other nodes")
    sent = traffic.of_step(packs)
    speeds = traffic.speeds(pack_seconds, backward_seconds)
    parts = [f"{size / 1e9:.3g} GB {place} (no wait from {speed / 1e9:.3g} GB/s on)"
             for place, size, speed in zip(places, sent, speeds, strict=True) if size]
    print(f"    a GPU sends in a step: {', '.join(parts)}")
