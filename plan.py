"""What a run will cost, before it runs: stage table, memory, FLOPs, tokens and days. Printed by `--dry_run=True`."""
import torch

import common
from model import VLM, train_flops
from weights import read_configs

TOKENS, TILES, SUPERVISED = 2048, 7, 192  # of the sample that a plan is made for: 6 tiles and a thumbnail

def print_plan(cfg, stages, world):
    """Print the plan of all stages of a run for `world` GPUs; builds the model without memory.

    Memory: fp32 master, gradient and two Adam moments for what trains (16 bytes), bf16 for what is frozen; under
    --parallel=fsdp all ranks share both. FLOPs are strict (model.train_flops), for packs full of such samples; days at
    `mfu_assumed` of a GPU of 989 TFLOP/s."""
    vision, llm = read_configs(cfg.init_from)[:2] if cfg.init_from else (cfg.vision, cfg.llm)
    with torch.device("meta"):
        model = VLM(None if cfg.image_as == "words" else vision, llm, 0)
    days = 0.0
    for name, stage in stages:
        rows = common.print_stage_table(name, model, stage)
        memory = sum(16 * trainable + 2 * (n - trainable) for _, n, trainable, _, _ in rows)
        pack, steps = stage.tokens_per_pack or cfg.tokens_per_pack, common.stage_steps(cfg, stage)
        tokens = min(TOKENS, pack)
        samples = pack // tokens * (stage.grad_accum_steps or cfg.grad_accum_steps) * world
        trained = tuple(lr > 0 for lr in (stage.lr_vision, stage.lr_projector, stage.lr_llm))
        flops = samples * train_flops(model.vision, model.llm, TILES, [tokens], SUPERVISED, trained)  # of one step
        stage_days = steps * flops / world / (cfg.mfu_assumed * 989e12) / 86400
        print(f"    {steps:,} steps x {samples * tokens:,} tokens = {steps * samples * tokens / 1e9:.3g}B tokens; "
              f"{flops / 1e12:,.6g} TFLOP per step\n    weights, gradients and moments: "
              f"{memory / 1e9 / (world if cfg.parallel == 'fsdp' else 1):.1f} GB per GPU ({world} x {cfg.parallel}), "
              f"plus activations; {stage_days:.3g} days at {100 * cfg.mfu_assumed:.0f} % of 989 TFLOP/s")
        days += stage_days
    print(f"{sum(1 for _ in model.parameters())} tensors, {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{days:.3g} days in all on {world} GPU{'s' * (world > 1)}")
