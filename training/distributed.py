"""Ranks and what they share: set-up, sums, DDP, FSDP and HSDP, activation checkpointing."""
import datetime
import functools
import os
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from training.meeting import store_of_this_start

# ---- ranks ---------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Dist:
    """Where this process stands among all ranks; without torchrun it is the only one."""
    rank: int = 0
    world: int = 1  # number of ranks
    device: torch.device = torch.device("cpu")
    background: object = None  # second process group, for checkpoints written during training
    timeout: datetime.timedelta | None = None  # of what the ranks do together

    @property
    def is_main(self):
        return self.rank == 0


ALONE = Dist()  # one process on the CPU


def rank_variable(name, default):
    """A number that torchrun sets in the environment; an empty one counts as not set."""
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"{name} is {text[:40]!r} and not a number; start with torchrun, or "
                         f"unset it for a single process")
    return int(text) if text else default


def own_device(device="auto"):
    """The device of this process: its GPU, made the current one, or the CPU.

    ValueError if the machine has fewer GPUs than processes.
    """
    local_rank = rank_variable("LOCAL_RANK", 0)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    n = torch.cuda.device_count()
    if local_rank >= n:
        raise ValueError(f"process {local_rank} of this machine finds {n} GPUs; "
                         f"use --nproc_per_node={n} or --device=cpu")
    torch.cuda.set_device(local_rank)  # Triton kernels and CUDA graphs run on the current device
    return torch.device("cuda", local_rank)


def setup_distributed(device="auto", timeout_s=600):
    """Join torchrun's process group if there is one (nccl on GPUs, else gloo). Returns Dist."""
    rank = rank_variable("RANK", -1)
    world = rank_variable("WORLD_SIZE", 1)
    if rank < 0 and world > 1:  # as Kubernetes and MPI leave it
        raise ValueError(f"WORLD_SIZE is {world}, but RANK is not set; start with torchrun, or "
                         "unset WORLD_SIZE for a single process")
    if rank >= world:
        raise ValueError(f"RANK is {rank}, which needs a WORLD_SIZE above it, not {world}; start "
                         "with torchrun")
    device = own_device(device)
    if rank < 0:
        return Dist(device=device)

    # Later than the watchdog of signals.py, which says more about where a rank hangs.
    timeout = datetime.timedelta(seconds=timeout_s + 60)
    if device.type == "cuda":
        td.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        store = store_of_this_start(rank, world, timeout)
        td.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    background = td.new_group(backend="gloo", timeout=timeout)
    return Dist(rank, world, device, background, timeout)


def close_distributed():
    """The last thing a script does: all ranks leave the process group together, if there is one."""
    barrier()
    if td.is_initialized():
        td.destroy_process_group()


def barrier():
    """Wait until all ranks are here."""
    if td.is_initialized():
        td.barrier()


def all_reduce_sum(tensor, dist):
    """Sum `tensor` over the ranks, in place; returns it."""
    if dist.world > 1:
        td.all_reduce(tensor)
    return tensor


def all_reduce_dict(values, dist):
    """{name: sum over the ranks} of plain numbers, exact up to 2**53."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=dist.device)
    sums = all_reduce_sum(total, dist).tolist()
    return dict(zip(values, sums, strict=True))


def gather(value, dist, group=None):
    """[value of rank 0, value of rank 1, ...] of any Python value, on every rank."""
    values = [value] * dist.world
    if dist.world > 1:
        td.all_gather_object(values, value, group)
    return values


def say(dist, text):
    """Print a line, once for all ranks."""
    if dist.is_main:
        print(text, flush=True)


def compute_dtype(name, device):
    """The torch dtype of --dtype; auto is bfloat16 on a GPU that has it, else float32.

    fp8 is bfloat16, but for what training/fp8.py multiplies. ValueError if the GPU has no fp8.
    """
    if name == "fp8":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            gpu = torch.cuda.get_device_name(device)
            raise ValueError(f"--dtype=fp8: {gpu} does not multiply 8-bit floats, as an H100 does; "
                             "set --dtype=bfloat16")
        return torch.bfloat16
    if name != "auto":
        return getattr(torch, name)
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def is_compiled(how, device):
    """Whether --compile=how means to compile on this device; auto: on a GPU."""
    return how == "on" or (how == "auto" and device.type == "cuda")


# ---- nodes ---------------------------------------------------------------------------------------


def ranks_of_node(world):
    """Ranks on each node, as torchrun says; where it has not started us, as in a plan, 8."""
    return rank_variable("LOCAL_WORLD_SIZE", min(8, world))


def shards_of(how, world):
    """Over how many ranks one copy of the model is spread."""
    return {"ddp": 1, "fsdp": world, "hsdp": ranks_of_node(world)}[how]


def check_nodes(how, world):
    """ValueError if --parallel=hsdp has no sense on this number of ranks."""
    if how != "hsdp":
        return
    n = ranks_of_node(world)
    if n < 2:
        raise ValueError("--parallel=hsdp shards the model over the ranks of a node, and a node "
                         "has one rank; set --parallel=ddp, which does the same")
    if world <= n:
        raise ValueError(f"--parallel=hsdp needs several nodes, and {world} ranks are one; set "
                         "--parallel=fsdp, which does the same there (to plan for more ranks, set "
                         "WORLD_SIZE)")
    if world % n:
        raise ValueError(f"--parallel=hsdp: {world} ranks are not nodes of {n} ranks each; use a "
                         f"multiple of {n}, or --parallel=fsdp")


def check_ranks(how, dist):
    """check_nodes, and ValueError on all ranks unless those of a node follow one another."""
    if how != "hsdp":
        return
    n = ranks_of_node(dist.world)
    in_order = dist.rank % n == rank_variable("LOCAL_RANK", 0)
    places = gather((n, in_order), dist)
    sizes = sorted({size for size, _ in places})
    if len(sizes) > 1:
        raise ValueError(f"--parallel=hsdp needs as many ranks on each node, and there are nodes "
                         f"of {' and '.join(map(str, sizes))}; use --parallel=fsdp")
    check_nodes(how, dist.world)
    if not all(in_order for _, in_order in places):
        raise ValueError("--parallel=hsdp needs the ranks of a node one after the other, RANK = "
                         "node * LOCAL_WORLD_SIZE + LOCAL_RANK; start with torchrun")


@functools.cache
def mesh_of(how, dist):
    """The ranks as FSDP divides them: a row, or under HSDP a table with a row for each node.

    One for all stages, as each table comes with communicators of its own.
    """
    if how == "fsdp":
        return td.init_device_mesh(dist.device.type, (dist.world,))
    n = ranks_of_node(dist.world)
    mesh = td.init_device_mesh(dist.device.type, (dist.world // n, n),
                               mesh_dim_names=("copies", "shards"))
    # Without this NCCL gives up after ten minutes, whatever --timeout_s is.
    for group in mesh.get_all_groups():
        td.distributed_c10d._set_pg_timeout(dist.timeout, group)
    return mesh


# ---- activation checkpointing --------------------------------------------------------------------

# Matrix products and fused attention: too expensive to compute twice.
EXPENSIVE = (
    "mm",
    "addmm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention",
)


def expensive_operations():
    """The operators of EXPENSIVE, and our own attention if kernels/attention.py registered it."""
    operators = [getattr(torch.ops.aten, name) for name in EXPENSIVE]
    if hasattr(torch.ops.sail_vl, "attention"):
        operators.append(torch.ops.sail_vl.attention)
    return [operator.default for operator in operators]


def checkpoint_activations(model, how):
    """Compute activations again in the backward pass instead of keeping them.

    how: "none"; "selective" keeps the outputs of the expensive operations; "full" keeps the input
    of each block alone. Replaces the blocks' forward in place, so parameter names stay.
    """
    if how == "none":
        return
    settings = {"use_reentrant": False}
    if how == "selective":
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts,
                                                   expensive_operations())
    for block in blocks_of(model):
        block.forward = checkpointed(block.forward, settings)


def blocks_of(model):
    """The blocks of the language model and, if the model has one, of the ViT."""
    blocks = list(model.language_model.model.layers)
    if getattr(model, "vision_model", None) is not None:
        blocks += model.vision_model.blocks
    return blocks


def checkpointed(forward, settings):
    """`forward` under activation checkpointing.

    A function of ours, for torch.compile skips one that begins inside torch.utils.checkpoint.
    """
    def run(*args):
        return checkpoint(forward, *args, **settings)

    return run


# ---- DDP and FSDP --------------------------------------------------------------------------------


def parallelize(model, how, dtype, dist):
    """Move the model to its device and spread it over the ranks; returns the module to call.

    how: "ddp" gives each rank a copy, "fsdp" shards weights, gradients and moments, "hsdp" shards
    them over the ranks of a node and gives each node a copy. dtype: of the arithmetic. Call it on
    a fresh model in each stage, after set_trainable. A model on the meta device comes back without
    values, and all ranks then fill it alike. All of them average gradients over the ranks, so the
    loop uses loss = loss_sum * world / supervised tokens.
    """
    if not td.is_initialized():
        return to_device(model, dist.device)
    if how != "ddp":
        shard(model, dtype, mesh_of(how, dist))
        return to_device(model, dist.device)
    model = to_device(model, dist.device)
    # Gradients that exist when DDP is made become views of its buckets. Without them, those of the
    # first micro-batches would be held twice.
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    # No device_ids: the inputs are on the GPU already.
    return DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)


def to_device(model, device):
    """Move a model; one on the meta device gets memory there, but no values yet."""
    if any(p.is_meta for p in model.parameters()):
        return model.to_empty(device=device)
    return model.to(device=device)


def shard(model, dtype, mesh):
    """Shard the model over the ranks in place (FSDP2): each block, the ViT, then all the rest.

    Of a mesh with two dimensions the first counts the copies, the second the shards of each.
    """
    # The ranks gather a unit's weights together. So a rank whose pack holds no tile has to run the
    # ViT too, on a black tile, even if the ViT is frozen.
    model.always_run_vision = True
    # Inputs are not cast, so that the weights of the loss stay fp32.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    units = [*model.language_model.model.layers]
    if getattr(model, "vision_model", None) is not None:
        units.append(model.vision_model)
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def set_gradient_sync(model, on):
    """Call before each forward; on: whether it is the step's last micro-batch.

    DDP then sums gradients over the ranks once a step. FSDP ignores this and sums in every
    micro-batch: otherwise each rank would hold whole gradients, 32 GB at 8B. Its sum runs while
    the backward pass computes the block before. HSDP does that inside a node, and sums the shards
    of all nodes once a step.
    """
    model.require_backward_grad_sync = on  # DDP reads it, no other module does
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(on)


def clear_gradients(model, optimizer):
    """Forget the gradients of a step.

    Under DDP they become zeros in place, because they are views of its buckets. New ones would be
    held beside the buckets until the last micro-batch: 8 GB more at 2B.
    """
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def reshard(model):
    """Give back the whole weights that FSDP has gathered; other models stay as they are.

    FSDP does it in the backward pass. After a forward pass alone its last unit still has whole
    weights, and these are not the parameters that the optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrap(model):
    """The model inside DDP; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def full_state(model):
    """{name: whole tensor on the CPU} on rank 0, {} on the others; all ranks call it.

    Tensors that are on the CPU already are not copied.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)
