"""What a run will cost, before it runs: stage table, memory, FLOPs, tokens and days. Printed by `--dry_run=True`."""
import torch

import common
from model import VLM, train_flops

SAMPLE = dict(tokens=2048, tiles=7, supervised=192)   # 6 tiles and a thumbnail

def stage_plan(model, stage, cfg, world):
    """Costs of one stage: parameters, trainable, state_gb (per GPU), step_flops, step_tokens, tokens, seconds.

    state_gb: fp32 master, gradient and two Adam moments for what trains (16 bytes), bf16 for what is frozen; under
    --parallel=fsdp all ranks share both. Activations come on top. FLOPs are strict (model.train_flops), for full packs
    of SAMPLEs; seconds at `mfu_assumed` of a GPU of 989 TFLOP/s.
    """
    rows = common.stage_table(model, stage)
    total, trainable = sum(r[1] for r in rows), sum(r[2] for r in rows)
    share = world if cfg.parallel == "fsdp" else 1
    pack = stage.tokens_per_pack or cfg.tokens_per_pack
    tokens = min(SAMPLE["tokens"], pack)
    samples = max(1, pack // tokens) * (stage.grad_accum_steps or cfg.grad_accum_steps) * world
    train = tuple(lr > 0 for lr in (stage.lr_vision, stage.lr_projector, stage.lr_llm))
    flops = samples * train_flops(model.vision, model.llm, SAMPLE["tiles"], [tokens], SAMPLE["supervised"], train)
    steps = min(stage.steps, cfg.max_steps or stage.steps)
    return {"rows": rows, "parameters": total, "trainable": trainable, "steps": steps,
            "state_gb": (16 * trainable + 2 * (total - trainable)) / share / 1e9, "step_flops": flops,
            "step_tokens": samples * tokens, "tokens": steps * samples * tokens,
            "seconds": steps * flops / world / (cfg.mfu_assumed * 989e12)}

def print_plan(cfg, stages, world):
    """Print the plan of all stages of a run for `world` GPUs; builds the model without memory."""
    with torch.device("meta"):
        model = VLM(None if cfg.image_as == "words" else cfg.vision, cfg.llm, 0)
    days = 0.0
    for name, stage in stages:
        plan = stage_plan(model, stage, cfg, world)
        common.print_stage_table(name, plan["rows"])
        print(f"    {plan['steps']:,} steps x {plan['step_tokens']:,} tokens = {plan['tokens'] / 1e9:.3g}B tokens; "
              f"{plan['step_flops'] / 1e12:,.3g} TFLOP per step\n"
              f"    weights, gradients and moments: {plan['state_gb']:.1f} GB per GPU ({world} x {cfg.parallel}), "
              f"plus activations; {plan['seconds'] / 86400:.3g} days at {100 * cfg.mfu_assumed:.0f} % of 989 TFLOP/s")
        days += plan["seconds"] / 86400
    print(f"{sum(1 for _ in model.parameters())} tensors, {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{days:.3g} days in all on {world} GPU{'s' * (world > 1)}")
