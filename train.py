"""Pretraining in two stages: alignment (projector), then advance (ViT + projector). The language model stays frozen.

    torchrun --nproc_per_node=8 train.py config/pretrain_2b.py --init_from=start_2b --data=captions.json     # 8 GPUs
    python train.py config/pretrain_2b.py --init_from=start_2b --data=captions.json --grad_accum_steps=512   # 1 GPU
    python train.py config/toy.py                                              # CPU, a minute
    python train.py config/pretrain_2b.py --dry_run=True                       # parameters, memory, FLOPs, days
    python train.py config/pretrain_2b.py --stages=advance --init_from=out/pretrain_2b/alignment --data=captions.json

Everything of a run is in --out_dir: log.jsonl, config.json, checkpoints/, bad_samples.jsonl, loss.png and, after each
stage, a model folder of the stage's name. The same command goes on where it stopped. `base` is the stage that made the
toy world's own ViT and language model (config/toy_vit.py, config/toy_llm.py).
"""
import math, os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common
from common import RunConfig, Stage
from configurator import configure, launch, resolved
from data import Tokenizer, held_out, make_loader, model_inputs, stage_packs
from model import LLMConfig, compile_blocks, train_flops
from plan import print_plan
from vision import VisionConfig
from weights import save_folder, start_model, start_weights

# ---- settings -------------------------------------------------------------------------------------------------------

@dataclass(slots=True)
class Config(RunConfig):
    stages: str = "alignment,advance"                                    # run in this order
    vision: VisionConfig = field(default_factory=VisionConfig)           # a preset name, or field by field
    llm: LLMConfig = field(default_factory=LLMConfig)                    # a preset name, or field by field
    alignment: Stage = field(default_factory=lambda: Stage(lr_projector=2e-4))
    advance: Stage = field(default_factory=lambda: Stage(lr_vision=2e-5, lr_projector=2e-5))
    base: Stage = field(default_factory=Stage)                           # the toy world's own pretrained parts
    export: Literal["model", "vision"] = "model"                         # what a finished stage writes

def main():
    cfg = Config()
    origins = configure(cfg)
    stages = common.named_stages(cfg)
    if cfg.dry_run:
        return print_plan(cfg, stages, int(os.environ.get("WORLD_SIZE", 8)))

    # ---- set-up -----------------------------------------------------------------------------------------------------
    preemption = common.Preemption()
    dist = common.setup_distributed(cfg.device, cfg.timeout_s)
    dtype = common.compute_dtype(cfg.dtype, dist.device)
    autocast = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    out, peak = Path(cfg.out_dir), common.peak_flops(dist.device)
    values = resolved(cfg)
    checkpoint, began = common.open_run(cfg, origins, stages, dist, values)  # the newest good one
    log, track = (common.open_log(out), common.open_tracker(cfg, values)) if dist.is_main else (None, None)
    later = sum(common.stage_steps(cfg, stage) for _, stage in stages)       # steps behind the stage at work
    torch.set_num_threads(cfg.threads or torch.get_num_threads())

    for name, stage in stages:
        # ---- one stage: model, data, optimizer ----------------------------------------------------------------------
        steps, accum = common.stage_steps(cfg, stage), cfg.grad_accum_steps
        later -= steps
        if (out / name / "config.json").exists():
            common.say(dist, f"{name}: finished before, in {out / name}; remove that folder to train it again")
            continue
        folder, first_step = common.where_to_start(cfg, origins, name)
        accum, began = common.micro_batches(accum, began, name, checkpoint, dist)
        tokenizer_dir = folder or cfg.tokenizer
        tokenizer = Tokenizer(tokenizer_dir)
        model, extra, table = start_model(cfg, origins, folder, tokenizer, text_only=cfg.image_as == "words")
        cfg.template = cfg.template or extra.get("template", "sailvl-chat")
        vision, llm, trainable = model.vision, model.llm, common.set_trainable(model, stage)
        packs = stage_packs(cfg, stage, tokenizer, vision or cfg.vision, packs_per_step=accum * dist.world)
        val = stage_packs(cfg, stage, tokenizer, vision or cfg.vision, 1, cfg.val_data) if cfg.val_data else None
        common.set_dtypes(model, dtype)
        if vision is not None: model.vision_model.drop_path = stage.drop_path
        if cfg.compile == "on" or (cfg.compile == "auto" and dist.device.type == "cuda"):
            compile_blocks(model)
        model = common.parallelize(model, cfg, dist).train()
        start_weights(model, table, cfg)                                     # each rank reads what it keeps
        optimizer = common.make_optimizer(model, stage, cfg)
        state, checkpoint = common.resume(checkpoint, name, steps, packs, began, model, optimizer, dist), None
        common.announce(cfg, values, origins, name, model, stage, packs, state, first_step, dist)
        if val: next(held_out(val, 1, dist))                                 # or it would fail only at val_every
        batches = iter(make_loader(packs, dist.rank, dist.world, cfg.num_workers, state["position"], state["counts"]))
        step, saving = state["step"], None
        bar = tqdm(total=steps, initial=step, desc=name, disable=None if dist.is_main else True)    # on a terminal

        # ==== the loop ===============================================================================================
        while step < steps:
            clock = common.Clock(dist.device)
            common.watch(cfg, dist, f"{name} step {step + 1}: waiting for data")
            micro = [next(batches) for _ in range(accum)]
            clock("data")
            # The loss is one token mean over the whole step: all ranks, all micro-batches, whatever their lengths.
            totals = {key: sum(b["size"][key] for b in micro) for key in micro[0]["size"]}
            lengths = [n for b in micro for n in b["lengths"]]
            totals["flops"] = train_flops(vision, llm, totals["tiles"], lengths, totals["supervised"], trainable)
            totals = common.all_reduce_dict(totals, dist)
            common.watch(cfg, dist, f"{name} step {step + 1}: samples {', '.join(i for b in micro for i in b['ids'])}")
            scale = common.lr_scale(step, steps, stage.warmup_steps, stage.min_lr_ratio)
            getattr(model, "module", model).embed_noise = cfg.embed_noise * min(1, 2 * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            loss_sum = torch.zeros((), device=dist.device)
            for k, batch in enumerate(micro):
                # by the pack's number: a run that goes on, on whatever ranks, draws the same
                common.seed_everything(cfg.seed, first_step + step, k * dist.world + dist.rank)
                common.set_gradient_sync(model, k == accum - 1)
                with autocast:
                    loss = model(**model_inputs(batch, dist.device))
                clock("forward")
                (loss * (dist.world / max(totals["weight"], 1e-9))).backward()  # averaged over ranks, hence * world
                loss_sum += loss.detach()
                clock("backward")
            loss = common.all_reduce_sum(loss_sum, dist).item() / max(totals["weight"], 1e-9)
            norm, norms = common.clip_grad_norm(model, cfg.grad_clip)
            finite = math.isfinite(loss) and bool(norm.isfinite())           # the same on every rank
            if finite: optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock("optimizer")
            step += 1
            bar.update()
            common.log_bad(out, [bad for b in micro for bad in b["bad"]])

            # ---- what happened ----
            before, state = state["counts"], common.next_state(state, step, micro[-1], totals, loss, finite)
            row = common.step_row((steps, later), loss, norm, norms, optimizer, totals, state, micro, clock, peak, dist)
            row |= common.account(before, state, packs, step == steps)
            if not finite:
                row["skipped"] = sum(common.gather([i for b in micro for i in b["ids"]], dist), [])
                common.say(dist, f"WARNING: step {step} skipped: loss {loss}, gradient norm {norm.item()}")
            if val and (step % cfg.val_every == 0 or step == steps):
                with autocast:
                    row["val_loss"] = common.validation_loss(model, held_out(val, cfg.val_packs, dist), dist)
            if dist.is_main:
                common.log_line(log, row, track)
                if step % cfg.print_every == 0 or "epoch" in row:
                    bar.write(common.format_step(row))
            if state["bad_steps"] >= 3:
                raise ValueError(f"three steps in a row without a finite loss or gradient, see {out}/log.jsonl")
            common.check_quarantine(state, packs, out)
            stop = preemption.stop_requested(dist)
            if stop or step % cfg.save_every == 0 and finite:
                common.watch(cfg, dist, f"{name} step {step}: checkpoint")
                saving = common.save_checkpoint(out, first_step + step, model, optimizer, state, dist, cfg.keep, saving,
                                                wait=stop, copy=cfg.save_async)
            if stop:
                common.say(dist, f"stopped by a signal after {name} {step}, saved; the same command goes on")
                return common.close_distributed()
        # ==== end of the loop ========================================================================================
        common.saved(saving)
        common.watch(cfg, dist, "")
        bar.close()

        parts = dict(model=(vision, llm), vision=(vision, None))[cfg.export]
        weights = common.full_state(model)
        if dist.is_main:
            save_folder(weights, *parts, out / name, tokenizer_dir, cfg.template, extra=extra | dict(
                min_dynamic_patch=cfg.min_tiles, max_dynamic_patch=cfg.max_tiles, use_thumbnail=cfg.thumbnail))
        common.barrier()
        common.say(dist, f"{name}: model folder {out / name}")
    if dist.is_main:
        common.plot_loss(out / "log.jsonl", out / "loss.png")
    common.close_distributed()

if __name__ == "__main__":
    launch(main)
