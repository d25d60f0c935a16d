"""Pretraining in two stages: alignment trains the projector, advance the ViT and the projector.

The language model stays frozen in both. Fine-tuning (sft.py) runs through the same loop. Examples:

    python train.py config/toy.py               # CPU, a minute; config/toy.py: what to make first
    python train.py config/pretrain_2b.py --dry_run=True    # parameters, memory, FLOPs, days
    torchrun --nproc_per_node=8 train.py config/pretrain_2b.py --init_from=start_2b --data=c.json

Everything a run produces is in --out_dir. To continue an interrupted run, repeat its command.
"""
import math
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from configurator import configure, resolved, run_script, setting
from data import make_loader, model_inputs, stage_dataset
from inputs.images import MAX_TILES
from inputs.tokenizer import Tokenizer
from kernels.attention import choose_attention
from model import LLMConfig
from training import checkpoint, distributed, fp8, limits, lora, metrics, optim, run_folder, signals
from training.checkpoint_folder import checkpoint_config
from training.compile import compile_blocks
from training.copies import copy_weights, refresh_copies
from training.dry_run import print_plan
from training.flops import train_flops
from training.output import forgive_output
from training.plot import plot_loss
from training.prefetch import Prefetcher
from training.progress import Progress
from training.quarantine import Quarantine
from training.result import write_result
from training.validation import held_out_sets, validate
from vision import VisionConfig
from weights import start_model, start_weights

# ---- settings ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """One stage of a run. It freezes the modules whose learning rate is 0."""
    steps: int = setting(1000, at_least=1, at_most=10**9)  # optimizer steps
    data: str = setting("", files=True)  # training data of this stage; "": those of the run
    lr_vision: float = setting(0.0, at_most=1)  # peak learning rate of the ViT
    lr_projector: float = setting(0.0, at_most=1)  # peak learning rate of the projector
    lr_llm: float = setting(0.0, at_most=1)  # peak learning rate of the language model
    warmup_steps: int = setting(0, at_most=10**9)  # steps in which the rates rise to their peak
    min_lr_ratio: float = setting(0.0, at_most=1)  # the cosine ends at this fraction of the peak
    weight_decay: float = setting(0.01, at_most=1)  # on matrices, without embeddings
    drop_path: float = setting(0.0, below=1)  # stochastic depth of the ViT: rate at its last block


@dataclass(slots=True)
class RunConfig:
    """The settings of every training run; a script adds its model and its stages."""
    out_dir: str = setting("out/run", filled=True)  # folder for all that the run writes
    stages: str = ""  # stages to run, in this order, separated by commas
    init_from: str = ""  # model folder to start from; "": random weights
    tokenizer: str = ""  # tokenizer folder; needed only without init_from
    template: str = ""  # chat template; "": the one of init_from, else sailvl-chat
    seed: int = setting(1234, at_most=2**32 - 1)  # of random weights, order of data, drop_path
    max_steps: int = setting(0, at_most=10**9)  # most steps of each stage to run; 0: all
    # data
    data: str = setting("", files=True)  # paths or name=path pairs, separated by commas
    val_data: str = setting("", files=True)  # held-out data for a validation loss; "": none
    val_every: int = setting(500, at_least=1, at_most=10**9)  # steps between two validations
    val_packs: int = setting(32, at_least=1, at_most=10**6)  # packs of a validation, of all ranks
    tokens_per_pack: int = setting(8192, at_least=1, at_most=2**22)  # length of a pack
    max_tiles_per_pack: int = setting(48, at_least=1, at_most=4096)  # the ViT's largest batch
    min_tiles: int = setting(1, at_least=1, at_most=MAX_TILES)  # fewest tiles of an image
    max_tiles: int = setting(12, at_least=1, at_most=MAX_TILES)  # of an image, but its thumbnail
    thumbnail: bool = True  # add the whole image as one more tile if it has several
    image_as: Literal["pixels", "blank"] = "pixels"  # blank: all images gray, a blind control
    shuffle: bool = True  # False: samples in the order of the files
    num_workers: int = setting(2, at_most=256)  # processes per rank that read images; 0: none
    # optimization
    lora_rank: int = setting(0, at_most=2**12)  # adapters of this rank beside frozen weights
    lora_alpha: int = setting(32, at_least=1, at_most=2**16)  # their product times alpha / rank
    lora_vision: bool = False  # True: adapters in the ViT too, where the ViT trains
    freeze_llm_layers: int = setting(0, at_most=1000)  # freeze the first blocks and embeddings
    freeze_vision_layers: int = setting(0, at_most=1000)  # the same for the ViT
    grad_accum_steps: int = setting(1, at_least=1, at_most=2**16)  # micro-batches per step, rank
    loss_weight: Literal["token", "sample", "sqrt"] = "token"  # weight of a token: 1, 1/n, n**-0.5
    beta1: float = setting(0.9, below=1)  # AdamW: decay of the first moment
    beta2: float = setting(0.95, below=1)  # AdamW: decay of the second moment
    eps: float = setting(1e-8, above=0, at_most=1)  # AdamW: added to the denominator
    grad_clip: float = setting(1.0, at_most=1e9)  # largest global gradient norm; 0: no clipping
    # machine
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"  # auto: bfloat16 on GPUs only
    # each rank holds the whole model (ddp), a share of it (fsdp), or a share of its node's (hsdp)
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    attention: Literal["auto", "triton", "varlen", "sdpa"] = "auto"  # docs/speed.md: which to pick
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the blocks; auto: on GPUs only
    # save memory: compute again all but expensive operations (selective), or whole blocks (full)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    threads: int = setting(0, at_most=1024)  # CPU threads per rank; 0: PyTorch's choice
    timeout_s: int = setting(600, at_least=1, at_most=10**7)  # a run that hangs so long is ended
    # saving and logging
    save_every: int = setting(1000, at_least=1, at_most=10**9)  # steps between two checkpoints
    keep: int = setting(2, at_least=1, at_most=10**6)  # newest checkpoints to keep, at least 2
    keep_best: bool = False  # also keep the checkpoint of a stage's lowest validation loss
    save_async: bool = True  # write checkpoints in the background if there is memory for a copy
    # auto: newest intact checkpoint; strict: stop if the newest is damaged; never: new folders only
    resume: Literal["auto", "strict", "never"] = "auto"
    track: Literal["none", "tensorboard", "wandb"] = "none"  # also send the log there
    print_every: int = setting(10, at_least=1, at_most=10**9)  # steps between two printed lines
    dry_run: bool = False  # print what would run on 8 (or $WORLD_SIZE) GPUs, and stop
    mfu_assumed: float = setting(0.4, above=0, at_most=1)  # MFU from which dry_run computes days


@dataclass(slots=True)
class Config(RunConfig):
    stages: str = "alignment,advance"  # stages to run, in this order, separated by commas
    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    alignment: Stage = field(default_factory=lambda: Stage(lr_projector=2e-4))
    advance: Stage = field(default_factory=lambda: Stage(lr_vision=2e-5, lr_projector=2e-5))


def all_stages(cfg):
    """{name: Stage} of the stages that the script knows."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return {name: value for name, value in values.items() if isinstance(value, Stage)}


# ---- the run -------------------------------------------------------------------------------------


@dataclass
class Run:
    """What all stages of a run share."""
    cfg: RunConfig
    origins: dict  # where each setting came from
    values: dict  # all settings, flat, as config.json records them
    stages: list  # (name, Stage), those to run
    dist: distributed.Dist
    out: Path  # the run folder
    checkpoint: Path | None  # the first stage that runs resumes from it
    planned_world: int  # ranks for which grad_accum_steps was chosen: those the run began on
    preemption: signals.Preemption
    watchdog: signals.Watchdog
    saver: checkpoint.Saver
    at_end: ExitStack | None = None  # what to close when a stage ends or fails
    log: object = None  # log.jsonl, rank 0 only
    track: object = None  # the function of --track, rank 0 only


def run_stages(cfg):
    """Run the stages of a configuration, one after the other, and draw the loss."""
    origins = configure(cfg)
    values = resolved(cfg)  # config.json records them as they were given, before the next lines
    stages = limits.named_stages(cfg, all_stages(cfg))
    limits.check_together(cfg, origins, stages)
    if cfg.max_steps:
        for stage in all_stages(cfg).values():
            stage.steps = min(stage.steps, cfg.max_steps)
    if cfg.dry_run:
        print_plan(cfg, stages, distributed.rank_variable("WORLD_SIZE", 8))
        return

    run = set_up(cfg, origins, values, stages)
    later_steps = sum(stage.steps for _, stage in stages)
    for name, stage in stages:
        later_steps -= stage.steps
        if run_folder.is_there_already(run, name):
            continue
        with ExitStack() as run.at_end:
            stopped = train_stage(run, name, stage, later_steps)
        if stopped:
            distributed.close_distributed()
            return
        run.checkpoint = None
    if run.dist.is_main:
        plot_loss(run.out / "log.jsonl", run.out / "loss.png")
    distributed.close_distributed()


def set_up(cfg, origins, values, stages):
    """Join the other ranks, take the run folder, find the checkpoint to resume from."""
    # First of all: a signal during the slow parts must save as well.
    preemption = signals.Preemption()
    forgive_output()
    dist = distributed.setup_distributed(cfg.device, cfg.timeout_s)
    distributed.check_ranks(cfg.parallel, dist)
    choose_attention(cfg.attention, dist.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run_folder.check_start(cfg, origins, stages)
    path, planned_world = run_folder.open_run(cfg, stages, values, dist)
    run = Run(
        cfg=cfg,
        origins=origins,
        values=values,
        stages=stages,
        dist=dist,
        out=Path(cfg.out_dir),
        checkpoint=path,
        planned_world=planned_world,
        preemption=preemption,
        watchdog=signals.Watchdog(cfg.out_dir, dist, cfg.timeout_s),
        saver=checkpoint.Saver(cfg.out_dir, dist, cfg.keep, cfg.save_async, cfg.keep_best),
    )
    if dist.is_main:
        run.log = metrics.open_log(run.out)
        run.track = metrics.open_tracker(cfg, values)
    return run


# ---- the training loop ---------------------------------------------------------------------------


def train_stage(run, name, stage, later_steps):
    """Train one stage and write its model folder. Returns True if a signal asked to stop.

    later_steps: steps of the stages after this one; the log estimates the time of the whole run.
    """
    cfg = run.cfg
    dist = run.dist
    steps = stage.steps

    # ---- model and data ----
    folder, first_step = run_folder.where_to_start(run, name)
    if folder:
        run_folder.check_model_folder(folder, dist)
    accum, run.planned_world = run_folder.micro_batches(run, name)
    tokenizer_dir = folder or cfg.tokenizer
    tokenizer = Tokenizer(tokenizer_dir)
    model, source = start_model(cfg, run.origins, folder, tokenizer)  # no weights as yet
    dtype = distributed.compute_dtype(cfg.dtype, dist.device)
    fp8.use_fp8(model, cfg.dtype, dist)
    vision, llm = model.vision, model.llm
    cfg.template = cfg.template or source.config.get("template", "sailvl-chat")
    with run.preemption.at_once():
        dataset = stage_dataset(cfg, stage, tokenizer, vision, accum * dist.world)
        val = held_out_sets(cfg, stage, tokenizer, vision, dist)
    packs = dataset.packs

    # ---- what trains, on which device, with which weights ----
    trained = optim.set_trained_parts(model, stage, cfg)
    autocast = torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    optim.set_dtypes(model, dtype)
    model.vision_model.drop_path = stage.drop_path
    compiled = distributed.is_compiled(cfg.compile, dist.device)
    if compiled:
        compile_blocks(model)
    distributed.checkpoint_activations(model, cfg.activation_checkpointing)
    model = distributed.parallelize(model, cfg.parallel, dtype, dist).train()
    # Each rank reads only what it keeps.
    start_weights(distributed.unwrap(model), source, cfg.seed)
    lora.init_adapters(distributed.unwrap(model), cfg.seed)
    optimizer = optim.make_optimizer(model, stage, cfg)
    optim.make_moments(optimizer)

    # ---- start, or resume from a checkpoint of this stage ----
    fresh = Progress(name, packs.fingerprint, packs.settings.packs_per_step, run.planned_world)
    progress = run_folder.resume(run.checkpoint, fresh, steps, model, optimizer)
    run.saver.small_files = (checkpoint_config(cfg, source), tokenizer_dir)
    run_folder.check_disk(cfg, name, steps - progress.step, model)
    weights_and_copies = copy_weights(model, dtype) if compiled else ([], [])
    if dist.is_main:
        checkpoint.set_aside(run.out, first_step + progress.step)
        run_folder.write_finished(run.out, name, False)
        run_folder.write_run_config(run.out, run.values, run.origins, progress.world)
        if progress.step == 0:
            metrics.log_bad(run.out, packs.unreadable())
        optim.print_stage_table(name, model, stage)
        metrics.print_data(packs, progress)
    quarantine = Quarantine(packs, run.out, dist)
    loader = make_loader(dataset, dist.rank, dist.world, cfg.num_workers,
                         progress.position, progress.counts)
    batches = Prefetcher(iter(loader), accum, dist.device, cfg.num_workers)
    run.at_end.callback(batches.close)
    peak = metrics.peak_flops(dist.device)  # of one GPU; None on a CPU
    bar = tqdm(total=steps, initial=progress.step, desc=name, disable=not dist.is_main or None)
    printer = metrics.StepPrinter(bar, cfg.print_every)

    for step in range(progress.step, steps):
        done = step + 1  # steps, when this one is over
        clock = metrics.Clock(dist.device)

        # ---- data: the micro-batches of this step ----
        run.watchdog.note(f"{name} step {done}: waiting for data")
        micro = batches.next_step()
        clock.lap("data")
        ids = [i for batch in micro for i in batch["ids"]]
        run.watchdog.note(f"{name} step {done}: samples {', '.join(ids)}")

        # Summed over all micro-batches, then over all ranks. The loss of a step is one weighted
        # mean over its tokens (--loss_weight), however unevenly they are spread.
        totals = metrics.step_totals(micro)
        lengths = [n for batch in micro for n in batch["lengths"]]
        totals["flops"] = train_flops(vision, llm, totals["tiles"], lengths, totals["supervised"],
                                      trained)
        totals = distributed.all_reduce_dict(totals, dist)
        weight = max(totals["weight"], 1e-9)

        # ---- learning rate ----
        scale = optim.lr_scale(step, steps, stage.warmup_steps, stage.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale

        # ---- forward and backward ----
        loss_sum = torch.zeros((), device=dist.device)
        for k, batch in enumerate(batches.on_device()):
            # The number of the pack in the step, so that any number of ranks draws the same noise.
            pack_number = k * dist.world + dist.rank
            optim.seed_everything(cfg.seed, first_step + step, pack_number)
            distributed.set_gradient_sync(model, k == accum - 1)
            with autocast:
                loss = model(**model_inputs(batch, dist.device))
            clock.lap("forward")
            # DDP and FSDP average gradients over the ranks; times world makes that a sum.
            (loss * (dist.world / weight)).backward()
            loss_sum += loss.detach()
            clock.lap("backward")
        # Nothing but unreadable samples: there is no loss, and nothing is updated.
        loss = distributed.all_reduce_sum(loss_sum, dist).item() / (totals["weight"] or math.nan)

        # ---- update, unless something is not finite; all ranks see the same numbers ----
        norm, norms = optim.clip_grad_norm(model, cfg.grad_clip)
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            optimizer.step()
            refresh_copies(*weights_and_copies)
        distributed.clear_gradients(model, optimizer)
        clock.lap("optimizer")
        counts_before = progress.counts
        progress.advance(done, micro[-1], totals, finite)
        progress.spike, progress.losses = metrics.spike(progress.losses, loss)

        # ---- log ----
        bar.update()
        fault = quarantine.add(micro, totals)
        seconds, parts = clock.split()
        row = {"stage": name, "step": done, "steps": steps, "loss": loss, "grad_norm": norm.item()}
        row |= {f"grad_norm_{module}": value.item() for module, value in norms.items()}
        row["lr"] = {group["name"].split("/")[0]: group["lr"] for group in optimizer.param_groups}
        row |= metrics.speed(totals, seconds, parts, peak, dist.world)
        row |= metrics.packing_quality(totals, micro)
        row["memory_gb"] = metrics.peak_memory_gb()
        row |= metrics.counts_so_far(progress)
        row |= metrics.time_left(seconds, steps - done, later_steps)
        row |= metrics.account(counts_before, progress, packs, done == steps)
        if not finite:
            row["skipped"] = sum(distributed.gather(ids, dist), [])
            distributed.say(dist, f"WARNING: step {done} skipped: loss {loss}, "
                                  f"gradient norm {norm.item()}")

        # ---- validate ----
        if val and (done % cfg.val_every == 0 or done == steps):
            with autocast:
                row |= validate(model, val, cfg.val_packs, dist)
            if finite:
                row |= run.saver.lowest(name, row["val_loss"])

        if dist.is_main:
            metrics.log_line(run.log, row, run.track)
            printer.add(row)
        if progress.bad_steps >= 3 and not fault:
            raise ValueError("three steps in a row without a finite loss or gradient, "
                             f"see {run.out}/log.jsonl")

        # ---- save ----
        stop = run.preemption.stop_requested(dist)
        if stop or fault or "best" in row or (done % cfg.save_every == 0 and finite):
            run.watchdog.note(f"{name} step {done}: checkpoint")
            run.saver.save(first_step + done, model, optimizer, progress,
                           wait=bool(stop or fault), best=row.get("best"))
        if fault:
            raise ValueError(f"{fault}; step {done} is saved, the same command goes on from it")
        if stop:
            distributed.say(dist, f"stopped by a signal after {name} {done}, saved; "
                                  "run the same command to continue")
            return True

    # ---- the model folder ----
    run.saver.wait()
    run.watchdog.stop()
    bar.close()
    run_folder.check_trained(name, progress, run.out)
    run.saver.check(run.out / name, checkpoint.tensors_of(model, optimizer), progress)
    write_result(run, name, distributed.full_state(model), source, tokenizer_dir, trained)
    distributed.barrier()
    distributed.say(dist, f"{name}: model folder {run.out / name}")
    return False


def main():
    run_stages(Config())


if __name__ == "__main__":
    run_script(main)
