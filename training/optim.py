"""What trains and how fast: AdamW groups, schedule, clipping."""
import math
import numpy as np
import torch
from torch.distributed.tensor import DTensor

from training.settings import Stage

# ---- what trains, and how fast --------------------------------------------------------------------------------------
MODULES = (("vision_model", "lr_vision"), ("mlp1", "lr_projector"), ("language_model", "lr_llm"))
NO_DECAY = ("embed_tokens.weight", "class_embedding", "position_embedding")  # and everything with one dimension

def parts(model, stage):
    """[(name, module, peak learning rate)] of the modules this model has."""
    model = getattr(model, "module", model)  # out of DDP
    return [(name, module, getattr(stage, lr)) for name, lr in MODULES
            if (module := getattr(model, name, None)) is not None]

def set_trainable(model, stage):
    """Freeze the modules of learning rate 0; returns which of (ViT, projector, language model) are here and train."""
    trained = {name: lr > 0 for name, _, lr in parts(model, stage)}
    for name, module, _ in parts(model, stage): module.requires_grad_(trained[name])
    if not any(trained.values()):
        raise ValueError("this stage trains nothing: set one of lr_vision, lr_projector, lr_llm above 0")
    return tuple(trained.get(name, False) for name, _ in MODULES)

def set_dtypes(model, dtype):
    """What trains is kept in fp32, the master copy of the optimizer; what is frozen in the dtype of the arithmetic."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)

def print_stage_table(title, model, stage):
    """Print, and return, rows (module, parameters, trainable of them, peak learning rate, weight decay)."""
    rows = [(name, n := sum(p.numel() for p in module.parameters()), n * (lr > 0), lr, stage.weight_decay * (lr > 0))
            for name, module, lr in parts(model, stage)]
    print(f"{title:16s} {'parameters':>15s} {'trainable':>15s} {'lr':>9s} {'weight decay':>13s}")
    for name, n, trainable, lr, decay in rows:
        print(f"{name:16s} {n:15,d} {trainable:15,d} {lr:9.2g} {decay:13.3g}")
    print(f"{'total':16s} {sum(r[1] for r in rows):15,d} {sum(r[2] for r in rows):15,d}", flush=True)
    return rows

def make_optimizer(model, stage, cfg):
    """AdamW; each trained module is a group with decay (matrices) and one without (norms, biases, embeddings, layer
    scales), named MODULE/decay and MODULE/no_decay. The loop sets lr = base_lr * lr_scale(...) of each group."""
    groups = []
    for name, module, lr in parts(model, stage):
        for kind, decay in (("decay", stage.weight_decay), ("no_decay", 0.0)):
            params = [p for n, p in module.named_parameters() if p.requires_grad
                      and (kind == "decay") == (p.ndim >= 2 and not n.endswith(NO_DECAY))]
            groups.append(dict(params=params, name=f"{name}/{kind}", lr=lr, base_lr=lr, weight_decay=decay))
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)

def lr_scale(step, stage_steps, warmup, min_ratio):
    """Share of the peak rate at update `step` (from 0) of a stage: linear warm-up, then cosine to min_ratio."""
    if step < warmup: return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, stage_steps - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))

def clip_grad_norm(model, max_norm):
    """Scale all gradients to a norm of at most max_norm (0: leave them). Returns (norm before, {module: norm}), 0-d
    fp32 tensors, the same on all ranks; not finite when any gradient is not."""
    grads = {name: [p.grad for p in module.parameters() if p.grad is not None]
             for name, module, _ in parts(model, Stage())}
    norms = {name: torch.nn.utils.get_total_norm(tensors, foreach=True) for name, tensors in grads.items() if tensors}
    norms = {name: norm.full_tensor() if isinstance(norm, DTensor) else norm for name, norm in norms.items()}
    total = (torch.stack(list(norms.values())) ** 2).sum().sqrt()
    if max_norm > 0: torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total, foreach=True)
    return total, norms

def seed_everything(*parts):
    """Seed torch from integers, (seed, step, rank): a resumed run draws the same numbers without a saved state."""
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))
