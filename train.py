"""Pretraining in two stages: alignment trains the projector, advance the ViT and the projector.

The language model stays frozen. Examples:

    python train.py config/toy.py                                    # CPU, about a minute
    python train.py config/pretrain_2b.py --dry_run=True             # parameters, memory, FLOPs, days
    torchrun --nproc_per_node=8 train.py config/pretrain_2b.py --init_from=start_2b --data=captions.json

Everything a run produces is in --out_dir. To continue an interrupted run, repeat the same command.
"""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from configurator import configure, resolved, run_script
from data import held_out, make_loader, model_inputs, stage_packs
from model import LLMConfig, compile_blocks, train_flops
from inputs.tokenizer import Tokenizer
from training import checkpoint, distributed, metrics, optim, run_folder, settings
from training.settings import RunConfig, Stage
from training.dry_run import print_plan
from vision import VisionConfig
from weights import save_folder, start_model, start_weights


@dataclass(slots=True)
class Config(RunConfig):
    stages: str = "alignment,advance"  # run in this order
    vision: VisionConfig = field(default_factory=VisionConfig)  # a preset name, or field by field
    llm: LLMConfig = field(default_factory=LLMConfig)  # a preset name, or field by field
    alignment: Stage = field(default_factory=lambda: Stage(lr_projector=2e-4))
    advance: Stage = field(default_factory=lambda: Stage(lr_vision=2e-5, lr_projector=2e-5))
    base: Stage = field(default_factory=Stage)  # the toy world's own pretrained parts
    export: Literal["model", "vision"] = "model"  # what a finished stage writes


@dataclass
class Run:
    """What all stages of a run share."""
    cfg: Config
    origins: dict  # where each setting came from
    values: dict  # all settings, flat, as written to config.json
    dist: distributed.Dist
    out: Path
    preemption: run_folder.Preemption
    log: object = None  # rank 0 only
    track: object = None  # rank 0 only


def run(cfg):
    """Run all stages of cfg, one after the other."""
    origins = configure(cfg)
    stages = settings.named_stages(cfg)
    if cfg.dry_run:
        return print_plan(cfg, stages, int(os.environ.get("WORLD_SIZE", 8)))

    preemption = run_folder.Preemption()
    dist = distributed.setup_distributed(cfg.device, cfg.timeout_s)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    values = resolved(cfg)
    out = Path(cfg.out_dir)
    resume_from, began = run_folder.open_run(cfg, origins, stages, dist, values)
    this = Run(cfg, origins, values, dist, out, preemption)
    if dist.is_main:
        this.log = metrics.open_log(out)
        this.track = metrics.open_tracker(cfg, values)

    later_steps = sum(settings.stage_steps(cfg, stage) for _, stage in stages)
    for name, stage in stages:
        later_steps -= settings.stage_steps(cfg, stage)
        if (out / name / "config.json").exists():
            distributed.say(dist, f"{name}: finished before, in {out / name}; "
                                  "remove that folder to train it again")
            continue
        stopped = train_stage(this, name, stage, resume_from, began, later_steps)
        if stopped:
            return distributed.close_distributed()
        resume_from = None
    if dist.is_main:
        metrics.plot_loss(out / "log.jsonl", out / "loss.png")
    distributed.close_distributed()


def train_stage(run, name, stage, resume_from, began, later_steps):
    """Train one stage and write its model folder. Returns True if a signal asked to stop."""
    cfg, dist, out = run.cfg, run.dist, run.out
    # ---- model, data, optimizer ----
    dtype = distributed.compute_dtype(cfg.dtype, dist.device)
    autocast = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    steps = settings.stage_steps(cfg, stage)
    folder, first_step = run_folder.where_to_start(cfg, run.origins, name)
    accum, began = run_folder.micro_batches(cfg.grad_accum_steps, began, name, resume_from, dist)
    tokenizer_dir = folder or cfg.tokenizer
    tokenizer = Tokenizer(tokenizer_dir)

    model, extra, table = start_model(cfg, run.origins, folder, tokenizer,
                                      text_only=cfg.image_as == "words")
    vision, llm = model.vision, model.llm
    cfg.template = cfg.template or extra.get("template", "sailvl-chat")
    packs = stage_packs(cfg, stage, tokenizer, vision or cfg.vision, accum * dist.world)
    val = None
    if cfg.val_data:
        val = stage_packs(cfg, stage, tokenizer, vision or cfg.vision, 1, cfg.val_data)
        next(held_out(val, 1, dist))  # fail now, not only at step val_every

    trainable = optim.set_trainable(model, stage)
    optim.set_dtypes(model, dtype)
    if vision is not None:
        model.vision_model.drop_path = stage.drop_path
    if cfg.compile == "on" or (cfg.compile == "auto" and dist.device.type == "cuda"):
        compile_blocks(model)
    model = distributed.parallelize(model, cfg, dist).train()
    raw_model = getattr(model, "module", model)  # out of DDP
    start_weights(model, table, cfg)  # each rank reads only what it keeps
    optimizer = optim.make_optimizer(model, stage, cfg)

    state = run_folder.resume(resume_from, name, steps, packs, began, model, optimizer, dist)
    run_folder.announce(cfg, run.values, run.origins, name, model, stage, packs, state,
                        first_step, dist)
    batches = iter(make_loader(packs, dist.rank, dist.world, cfg.num_workers,
                               state["position"], state["counts"]))
    peak = metrics.peak_flops(dist.device)
    saving = None  # the checkpoint that is being written
    bar = tqdm(total=steps, initial=state["step"], desc=name,
               disable=None if dist.is_main else True)

    # ---- the loop ----
    for step in range(state["step"], steps):
        clock = metrics.Clock(dist.device)
        run_folder.watch(cfg, dist, f"{name} step {step + 1}: waiting for data")
        micro = [next(batches) for _ in range(accum)]
        clock("data")

        # Sums over all micro-batches of all ranks. The loss of a step is one mean over its tokens,
        # however unevenly these are spread.
        totals = {key: sum(b["size"][key] for b in micro) for key in micro[0]["size"]}
        lengths = [n for b in micro for n in b["lengths"]]
        totals["flops"] = train_flops(vision, llm, totals["tiles"], lengths, totals["supervised"],
                                      trainable)
        totals = distributed.all_reduce_dict(totals, dist)
        weight = max(totals["weight"], 1e-9)
        ids = [i for b in micro for i in b["ids"]]
        run_folder.watch(cfg, dist, f"{name} step {step + 1}: samples {', '.join(ids)}")

        # learning rate
        scale = optim.lr_scale(step, steps, stage.warmup_steps, stage.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        raw_model.embed_noise = cfg.embed_noise * min(1, 2 * step / steps)

        # forward and backward
        loss_sum = torch.zeros((), device=dist.device)
        for k, batch in enumerate(micro):
            pack_number = k * dist.world + dist.rank  # the same noise on any number of ranks
            optim.seed_everything(cfg.seed, first_step + step, pack_number)
            distributed.set_gradient_sync(model, k == accum - 1)
            with autocast:
                loss = model(**model_inputs(batch, dist.device))
            clock("forward")
            # DDP and FSDP average gradients over ranks; times world makes that a sum
            (loss * (dist.world / weight)).backward()
            loss_sum += loss.detach()
            clock("backward")
        loss = distributed.all_reduce_sum(loss_sum, dist).item() / weight

        # update, unless something is not finite (all ranks see the same numbers)
        norm, norms = optim.clip_grad_norm(model, cfg.grad_clip)
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock("optimizer")

        # ---- log, validate, save ----
        done = step + 1
        bar.update()
        metrics.log_bad(out, [bad for b in micro for bad in b["bad"]])
        counts_before = state["counts"]
        state = metrics.next_state(state, done, micro[-1], totals, loss, finite)
        row = metrics.step_row((steps, later_steps), loss, norm, norms, optimizer, totals, state,
                               micro, clock, peak, dist)
        row |= metrics.account(counts_before, state, packs, done == steps)
        if not finite:
            row["skipped"] = sum(distributed.gather(ids, dist), [])
            distributed.say(dist, f"WARNING: step {done} skipped: loss {loss}, "
                                  f"gradient norm {norm.item()}")
        if val and (done % cfg.val_every == 0 or done == steps):
            with autocast:
                row["val_loss"] = metrics.validation_loss(
                    model, held_out(val, cfg.val_packs, dist), dist)
        if dist.is_main:
            metrics.log_line(run.log, row, run.track)
            if done % cfg.print_every == 0 or "epoch" in row:
                bar.write(metrics.format_step(row))
        if state["bad_steps"] >= 3:
            raise ValueError("three steps in a row without a finite loss or gradient, "
                             f"see {out}/log.jsonl")
        run_folder.check_quarantine(state, packs, out)

        stop = run.preemption.stop_requested(dist)
        if stop or (done % cfg.save_every == 0 and finite):
            run_folder.watch(cfg, dist, f"{name} step {done}: checkpoint")
            saving = checkpoint.save_checkpoint(
                out, first_step + done, model, optimizer, state, dist, cfg.keep, saving,
                wait=stop, copy=cfg.save_async)
        if stop:
            distributed.say(dist, f"stopped by a signal after {name} {done}, saved; "
                                  "the same command goes on")
            return True

    # ---- the model folder ----
    checkpoint.saved(saving)
    run_folder.watch(cfg, dist, "")
    bar.close()
    weights = distributed.full_state(model)
    if dist.is_main:
        if getattr(cfg, "export", "model") == "vision":
            llm = None
        extra |= dict(min_dynamic_patch=cfg.min_tiles, max_dynamic_patch=cfg.max_tiles,
                      use_thumbnail=cfg.thumbnail)
        save_folder(weights, vision, llm, out / name, tokenizer_dir, cfg.template, extra=extra)
    distributed.barrier()
    distributed.say(dist, f"{name}: model folder {out / name}")
    return False


def main():
    run(Config())


if __name__ == "__main__":
    run_script(main)
