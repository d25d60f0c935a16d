"""What trains and how fast: what is frozen, AdamW, learning rate, clipping, seeds."""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from training.distributed import unwrap
from training.flops import Trained
from training.lora import add_adapters, is_adapter, ranks

# The modules of a vision-language model and the setting of a stage that has the peak rate of each.
RATES = {"vision_model": "lr_vision", "mlp1": "lr_projector", "language_model": "lr_llm"}

# Parameters without weight decay, besides everything with one dimension (norms, biases, scales).
NO_DECAY = ("embed_tokens.weight", "class_embedding", "position_embedding", "pos_embed")

# ---- what trains ---------------------------------------------------------------------------------


def modules_of(model):
    """{name: module} of the modules of RATES that this model has."""
    model = unwrap(model)
    found = {name: getattr(model, name, None) for name in RATES}
    return {name: module for name, module in found.items() if module is not None}


def peak_rate(stage, name):
    """The peak learning rate of the module `name` in a stage; 0: it is frozen."""
    return getattr(stage, RATES[name])


def set_trainable(model, stage):
    """Freeze the modules whose learning rate is 0.

    Returns whether ViT, projector and language model train, three booleans. ValueError if none
    does.
    """
    trains = dict.fromkeys(RATES, False)
    for name, module in modules_of(model).items():
        trains[name] = peak_rate(stage, name) > 0
        module.requires_grad_(trains[name])
    if not any(trains.values()):
        raise ValueError("this stage trains nothing: "
                         "set one of lr_vision, lr_projector, lr_llm above 0")
    return tuple(trains.values())


def set_trained_parts(model, stage, cfg):
    """set_trainable, then add adapters and freeze parts of what trains, as cfg says -> Trained.

    Frozen are the first cfg.freeze_vision_layers and cfg.freeze_llm_layers blocks with the
    embeddings before them, and all that stands beside adapters. A head that shares the embedding
    table is frozen with it. ValueError if nothing of a module is left.
    """
    add_adapters(model, cfg, stage)
    vision, projector, llm = set_trainable(model, stage)
    vit = model.vision_model
    decoder = model.language_model
    vision_rank, llm_rank = ranks(cfg, stage)
    if vision:
        embeddings = next(vit.children())  # first in a ViT of either kind
        in_order = [embeddings, *vit.blocks]
        freeze_first(in_order, cfg.freeze_vision_layers, "freeze_vision_layers")
        keep_adapters(vit, vision_rank, "lr_vision")
    if llm:
        in_order = [decoder.model.embed_tokens, *decoder.model.layers]
        freeze_first(in_order, cfg.freeze_llm_layers, "freeze_llm_layers")
        keep_adapters(decoder, llm_rank, "lr_llm")
    return Trained(vision, projector, llm, cfg.freeze_vision_layers, cfg.freeze_llm_layers,
                   vision_rank, llm_rank)


def freeze_first(parts, n, setting):
    """Freeze the first n blocks of parts, [embeddings, block, block, ...], and the embeddings."""
    if n >= len(parts):
        raise ValueError(f"--{setting}={n}: there are {len(parts) - 1} blocks; freeze fewer")
    if n:
        for part in parts[:n + 1]:
            part.requires_grad_(False)


def keep_adapters(module, rank, rate):
    """Freeze all of a module but its adapters, if these have a rank."""
    if rank:
        for name, p in module.named_parameters():
            p.requires_grad_(is_adapter(name))
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"all that {rate} would train is frozen; freeze fewer blocks, or set "
                         f"{rate} to 0")


def set_dtypes(model, dtype):
    """Keep what trains in fp32, the optimizer's master copy; what is frozen in `dtype`."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


class TableRow(NamedTuple):
    """One module of the table that print_stage_table prints."""
    name: str
    parameters: int
    trainable: int  # of the parameters
    lr: float
    weight_decay: float


def print_stage_table(title, model, stage):
    """Print what a stage trains, one line per module; returns the rows. After set_trainable."""
    rows = []
    for name, module in modules_of(model).items():
        n = sum(p.numel() for p in module.parameters())
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        decay = stage.weight_decay if trainable else 0.0
        rows.append(TableRow(name, n, trainable, peak_rate(stage, name), decay))

    print(f"{title:16s} {'parameters':>15s} {'trainable':>15s} {'lr':>9s} {'weight decay':>13s}")
    for name, n, trainable, lr, decay in rows:
        print(f"{name:16s} {n:15,d} {trainable:15,d} {lr:9.2g} {decay:13.3g}")
    total = sum(row.parameters for row in rows)
    trainable = sum(row.trainable for row in rows)
    print(f"{'total':16s} {total:15,d} {trainable:15,d}", flush=True)
    whole = unwrap(model)
    tied = stage.lr_llm > 0 and whole.llm.tie_embeddings
    if tied and not whole.language_model.lm_head.weight.requires_grad:
        print("frozen with the embedding table: the head, which shares it", flush=True)
    return rows


# ---- the optimizer -------------------------------------------------------------------------------


def make_optimizer(model, stage, cfg):
    """AdamW over what trains; the loop sets lr = base_lr * lr_scale(...) of each group.

    Each module has a group with weight decay, its matrices, and one without: norms, biases,
    embeddings, layer scales. Groups are named MODULE/decay and MODULE/no_decay. For an optimizer
    with other moments, change state_check.MOMENTS too: a save looks for them.
    """
    groups = []
    for name, module in modules_of(model).items():
        lr = peak_rate(stage, name)
        decay = []
        no_decay = []
        for parameter_name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            if p.ndim >= 2 and not parameter_name.endswith(NO_DECAY):
                decay.append(p)
            else:
                no_decay.append(p)
        common = {"lr": lr, "base_lr": lr}
        if decay:
            groups.append({"params": decay, "name": f"{name}/decay",
                           "weight_decay": stage.weight_decay, **common})
        if no_decay:
            groups.append({"params": no_decay, "name": f"{name}/no_decay",
                           "weight_decay": 0.0, **common})
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def make_moments(optimizer):
    """Give every parameter its AdamW state, all zeros, as AdamW itself does at its first step.

    A checkpoint can then be loaded into them, and one saved before the first step has them all.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def lr_scale(step, stage_steps, warmup, min_ratio):
    """Fraction of the peak rate at update `step` (from 0) of a stage.

    Linear warm-up, then a cosine down to min_ratio.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, stage_steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def clip_grad_norm(model, max_norm):
    """Scale all gradients to a global norm of at most max_norm; 0: leave them.

    Returns (norm before clipping, {module: norm}), 0-d fp32 tensors, the same on all ranks. They
    are not finite if any gradient is not.
    """
    norms = {}
    for name, module in modules_of(model).items():
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        if not grads:
            continue
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    total = (torch.stack(list(norms.values())) ** 2).sum().sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total, foreach=True)
    return total, norms


def seed_everything(*integers):
    """Seed torch from integers, (seed, step, pack): a resume then needs no saved generator."""
    seed = np.random.SeedSequence(integers).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(seed >> 1))
