"""Ranks, reductions, DDP and FSDP, activation checkpointing."""
import datetime
import functools
import os
import torch
import torch.distributed as td
from dataclasses import dataclass
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.checkpoint import noop_context_fn



# ---- distributed set-up ---------------------------------------------------------------------------------------------
@dataclass(slots=True, frozen=True)
class Dist:
    """Where this process stands: rank of world processes, on `device`."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    background: object = None  # a second process group, for checkpoints that are written beside the training
    is_main = property(lambda self: self.rank == 0)

def own_device(device="auto"):
    """The GPU of this process, made the current one, on which kernels and graphs run; or the CPU."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    gpu = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if gpu and local >= (n := torch.cuda.device_count()):
        raise ValueError(f"process {local} of this machine finds {n} GPUs; use --nproc_per_node={n} or --device=cpu")
    if gpu: torch.cuda.set_device(local)
    return torch.device("cuda", local) if gpu else torch.device("cpu")

def setup_distributed(device="auto", timeout_s=600):
    """Join torchrun's process group where there is one (nccl on CUDA, gloo on CPU). Returns Dist."""
    rank, world, where = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), own_device(device)
    if "RANK" in os.environ:
        timeout = datetime.timedelta(seconds=timeout_s + 60)  # later than `watch`, which has more to say
        kind, gpu = ("nccl", where) if where.type == "cuda" else ("gloo", None)
        td.init_process_group(kind, timeout=timeout, device_id=gpu)
        return Dist(rank, world, where, td.new_group(backend="gloo", timeout=timeout))
    return Dist(rank, world, where)

def all_reduce_sum(tensor, dist):
    """Sum `tensor` over the ranks, in place; returns it."""
    if dist.world > 1: td.all_reduce(tensor)
    return tensor

def all_reduce_dict(values, dist):
    """{name: sum over the ranks} of plain numbers, exact up to 2**53."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=dist.device)
    return dict(zip(values, all_reduce_sum(total, dist).tolist()))

def gather(value, dist, group=None):
    """[value of rank 0, value of rank 1, ...] of any Python value, on every rank."""
    values = [value] * dist.world
    if dist.world > 1: td.all_gather_object(values, value, group)
    return values

def barrier():
    if td.is_initialized(): td.barrier()

def close_distributed():
    """The last thing a script does: all ranks leave the process group together. Nothing to do without one."""
    barrier()
    if td.is_initialized(): td.destroy_process_group()

def say(dist, text):
    """Print a line, once."""
    if dist.is_main: print(text, flush=True)

def compute_dtype(name, device):
    """torch dtype of the arithmetic for a --dtype word: auto is bfloat16 on a GPU that has it, else float32."""
    if name != "auto": return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32

# outputs that selective checkpointing keeps: matmuls and fused attention are what is dear to compute twice
DEAR = ("mm addmm _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention").split()

def dear_operations():
    """PyTorch's, and ours where kernels/attention.py has registered it."""
    found = [getattr(torch.ops.aten, name) for name in DEAR] + [getattr(torch.ops.sail_vl, "attention", None)]
    return [op.default for op in found if op is not None]

def parallelize(model, cfg, dist):
    """Move the model to its device and spread it over the ranks; returns the module to call. On a fresh model in each
    stage, after `set_trainable`. From the meta device it comes without weights: all ranks then fill it alike. DDP has
    copies; FSDP2 shards weights, gradients and moments, one unit per block of the language model, one for the ViT, and
    one for the rest. A rank whose pack holds no tile then sees a black one even through a frozen ViT, for the others
    wait for it to gather the weights. Both average: loss = loss_sum * world / supervised tokens."""
    vision, blocks = getattr(model, "vision_model", None), list(model.language_model.model.layers)
    if cfg.activation_checkpointing != "none":
        contexts = (noop_context_fn if cfg.activation_checkpointing == "full" else
                    functools.partial(create_selective_checkpoint_contexts, dear_operations()))
        for block in blocks + (list(vision.encoder.layers) if vision is not None else []):  # in place: names stay
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    move = model.to_empty if any(p.is_meta for p in model.parameters()) else model.to
    if not td.is_initialized(): return move(device=dist.device)
    if cfg.parallel == "ddp":  # without device_ids, with which DDP would move cu_seqlens to the GPU
        return DistributedDataParallel(move(device=dist.device), gradient_as_bucket_view=True, init_sync=False)
    model.always_run_vision = True
    mesh, dtype = td.init_device_mesh(dist.device.type, (dist.world,)), compute_dtype(cfg.dtype, dist.device)
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)  # so that loss weights stay fp32
    for unit in filter(None, [*blocks, vision, model]): fully_shard(unit, mesh=mesh, mp_policy=policy)
    return move(device=dist.device)

def set_gradient_sync(model, on):
    """Before each forward: DDP adds up over ranks in a step's last micro-batch only. FSDP does in each, for else every
    rank would hold whole gradients: 32 GB at 8B; the sum runs beside the backward pass of the block before."""
    model.require_backward_grad_sync = on  # means nothing to any other module

def full_state(model):
    """{name: whole tensor on the CPU} on rank 0, {} on the others; all ranks call it. CPU tensors are the live ones."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
