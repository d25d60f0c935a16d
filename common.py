"""Leaf functions shared by train.py and sft.py: settings, distributed set-up, optimizer, checkpoints, log, plot."""
import collections, concurrent.futures, contextlib, datetime, faulthandler, fcntl, functools, hashlib
import importlib.metadata, itertools, json, math, os, platform, re, resource, shutil, signal, subprocess, sys
import time, warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch, torch.distributed as td, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP on one process, which is what is meant

# ---- settings -------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Stage:
    """One stage of a run. A learning rate of 0 freezes the module."""
    steps: int = 1000  # optimizer updates in this stage
    data: str = ""  # sources as name=path pairs separated by commas; "": the run's
    lr_vision: float = 0.0  # peak learning rate of the ViT; 0: frozen
    lr_projector: float = 0.0  # of the projector
    lr_llm: float = 0.0  # of the language model
    warmup_steps: int = 0  # linear warm-up, in steps
    min_lr_ratio: float = 0.0  # the cosine ends at this share of the peak
    weight_decay: float = 0.01  # on matrices only
    drop_path: float = 0.0  # stochastic depth of the ViT, linear over its depth

@dataclass(slots=True)
class RunConfig:
    """What every training run can set; train.Config and sft.Config add their model and their stages."""
    out_dir: str = "out/run"  # the run folder: log.jsonl, config.json, checkpoints/, bad_samples.jsonl, loss.png
    data: str = ""  # sources as name=path pairs separated by commas
    val_data: str = ""  # held-out sources, of which a loss is computed as well
    val_every: int = 500  # steps between validations, when there are val_data
    val_packs: int = 32  # packs of one validation, on all ranks together
    init_from: str = ""  # model folder to start from; "": random weights
    tokenizer: str = ""  # folder of the tokenizer, when init_from is empty
    template: str = ""  # prompt template; "": the folder's, else sailvl-chat
    stages: str = ""  # names of the stages to run, in order, separated by commas
    seed: int = 1234  # of weights, data order and stochastic depth
    init_std: float = 0.02  # of random matrices, where no folder gives weights
    max_steps: int = 0  # caps each stage; 0: no cap
    # input
    tokens_per_pack: int = 8192  # tokens of one pack = one micro-batch of one rank
    max_tiles_per_pack: int = 48  # tiles of one pack, the ViT's batch
    min_tiles: int = 1  # tiles per image, at least
    max_tiles: int = 12  # tiles per image, at most, the thumbnail not counted
    thumbnail: bool = True  # add the whole picture as a last tile when there are several
    image_as: Literal["pixels", "blank", "words"] = "pixels"  # blank: gray, a control; words: toy cells, for its LLM
    cell_labels: Literal["none", "also", "only"] = "none"  # toy: each visual token predicts a word of its own cell
    shuffle: bool = True  # False: samples in the order of the files
    pad_packs: bool = False  # fill each pack up with unsupervised tokens: one shape for torch.compile
    num_workers: int = 2  # processes per rank that decode and tile
    # optimization
    grad_accum_steps: int = 1  # micro-batches per step and rank; a run that goes on on other ranks keeps its batch
    loss_weight: Literal["token", "sample", "sqrt"] = "token"  # a supervised token weighs 1, 1/n or 1/sqrt(n)
    embed_noise: float = 0.0  # noise on what enters projector and LLM, grows to this share of its size in half a stage
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping
    # machine
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: bfloat16 on cuda, else float32
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: weights copied or sharded over ranks
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile per block; auto: on cuda only
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute all but the dear parts; or all
    threads: int = 0  # CPU threads of one rank; 0: PyTorch's choice
    timeout_s: int = 600  # a step that hangs this long ends the run; last_step/ then says where
    # saving and showing
    save_every: int = 1000  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, at least 2
    save_async: bool = True  # write checkpoints beside the training, from a copy, where there is memory for one
    resume: Literal["auto", "strict", "never"] = "auto"  # go on from the newest good checkpoint; the newest; refuse
    track: Literal["none", "tensorboard", "wandb"] = "none"  # who gets the log as well, if it is installed
    print_every: int = 10  # steps per printed line
    mfu_assumed: float = 0.4  # for the days that --dry_run shows
    dry_run: bool = False  # print what would run, on 8 GPUs or on WORLD_SIZE=n of them, and stop

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
    model.always_sees = True
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

# ---- checkpoints ----------------------------------------------------------------------------------------------------
# checkpoints/step_00001234/ holds DCP files (which reshard when the number of ranks changes), state.json and, written
# last, manifest.json with size and sha256 of each. The folder has a temporary name until all of it is on the disk.
def write_atomic(path, text):
    """Write a small file whole or not at all, for good: temporary name, fsync, rename, fsync of the folder."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

def file_hash(path, kind="sha256"):
    with open(path, "rb") as f: return hashlib.file_digest(f, kind).hexdigest()

def weights_hash(folder):
    """sha256 of a model folder's safetensors file; of the digests, one after the other, where there are several."""
    digests = [file_hash(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not digests: raise FileNotFoundError(f"no *.safetensors in {folder!r}; give the model folder, --model=DIR")
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

def tensors_of(model, optimizer):
    """{name: live tensor} of weights and AdamW moments; the names are the same for a plain, DDP or FSDP model. Rates,
    betas and decay are not among them: on resume the configuration's count."""
    state = {}
    for name, p in getattr(model, "module", model).named_parameters():  # out of DDP
        state[f"model.{name}"] = p.detach()
        if p.requires_grad:
            if not optimizer.state[p]:  # before the first step, to be filled by load_checkpoint
                zeros = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return state

def deal(tensors, dist):
    """This rank's part of {name: tensor} to write: its shards and, of what all ranks hold alike, a share of its own."""
    total, before, mine = sum(t.nbytes for t in tensors.values() if not isinstance(t, DTensor)) + 1, 0, {}
    for name, t in tensors.items():
        if isinstance(t, DTensor) or before * dist.world // total == dist.rank: mine[name] = t
        before += 0 if isinstance(t, DTensor) else t.nbytes
    return mine

def check_room(folder, need, what):
    """OSError, with what to do, unless `need` bytes are free where `folder` is."""
    if need > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder}: {what} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room or choose "
                      "another --out_dir, then start the same command again")

def memory_for(tensors):
    """Whether this machine, and the control group that a job scheduler may have put the run into, has memory for a copy
    of `tensors` on each of its ranks, with as much again to spare; where the system does not say, no."""
    need = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())
    try:
        free = 1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
        found = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = Path("/sys/fs/cgroup", found[1] if found else "")
        for folder in (group, *group.parents)[:-3]:  # down to /sys/fs/cgroup
            if (folder / "memory.max").exists() and (most := (folder / "memory.max").read_text().strip()) != "max":
                free = min(free, int(most) - int((folder / "memory.current").read_text()))
    except (OSError, LookupError, ValueError):
        free = 0
    return 2 * need * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < free

def save_checkpoint(out_dir, step, model, optimizer, state, dist, keep, before=None, wait=True, copy=True):
    """Write checkpoints/step_{step:08d}/, delete what is older than the newest max(2, keep) good ones. All ranks call
    it, each with its state, a JSON value. A crash at any point leaves the earlier ones usable. wait=False copies what
    is to be saved, lets a thread write it and returns its Future, to be given as `before` to the next call, which waits
    for it; without copy, or memory for it, it writes at once. Raises OSError, but with wait=False only says so: no room
    ends no run that goes on, and the next save tries again."""
    saved(before)
    tensors = deal(everything := tensors_of(model, optimizer), dist)
    final, problem = Path(out_dir) / "checkpoints" / f"step_{step:08d}", None
    tmp = final.with_name(f".tmp_{final.name}")
    if dist.is_main:
        try:
            for left in final.parent.glob(".tmp_*"): shutil.rmtree(left)  # of a save that failed
            tmp.mkdir(parents=True)
            check_room(tmp.parent, sum(t.nbytes for t in everything.values()), "a checkpoint")
        except OSError as e:
            problem = str(e)
    states, problems = zip(*gather((state, problem), dist))
    copied = copy and not wait and not problems[0] and memory_for(tensors)
    tensors = {name: t.to("cpu", copy=True) for name, t in tensors.items()} if copied else tensors
    thread = concurrent.futures.ThreadPoolExecutor(1)  # the last rank had the last pack of the step: its state
    future = thread.submit(write_checkpoint, final, tmp, step, tensors, states[-1], dist, keep, problems[0])
    thread.shutdown(wait=not copied)
    if wait: future.result()
    return future

def saved(future):
    """Wait for what save_checkpoint returned, None at first. A save that failed is told, loudly, on each rank."""
    try:
        if future: future.result()
    except OSError as e:
        print(f"WARNING: NO CHECKPOINT: {e}. The earlier ones are whole; the next save tries again", file=sys.stderr,
              flush=True)

def write_checkpoint(final, tmp, step, tensors, state, dist, keep, problem):
    """The slow part of save_checkpoint, on all ranks: files, hashes, manifest, new name, `latest`, in this order."""
    if problem: raise OSError(problem)  # no room on rank 0: all ranks give up alike
    try:
        dcp.save(tensors, checkpoint_id=tmp, process_group=dist.background, no_dist=not td.is_initialized())
        files = list(tmp.glob(f"__{dist.rank}_*.distcp"))  # fsynced; each rank reads back what it wrote
        if dist.is_main:
            write_atomic(tmp / "state.json", json.dumps(state))
            files += [tmp / ".metadata", tmp / "state.json"]
        written = {f.name: [f.stat().st_size, file_hash(f)] for f in files}
    except (dcp.CheckpointException, OSError) as e:
        written = str(next(iter(e.failures.values()))[0] if isinstance(e, dcp.CheckpointException) else e)
    parts = gather(written, dist, dist.background)
    if failed := [part for part in parts if isinstance(part, str)]:
        shutil.rmtree(tmp, ignore_errors=True)  # what is there of it takes the room that another may need
        raise OSError(f"{tmp}: the checkpoint could not be written ({failed[0]}); is the disk full?")
    if not dist.is_main: return
    manifest = {"step": step, "files": {name: entry for part in parts for name, entry in sorted(part.items())}}
    write_atomic(tmp / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(final, ignore_errors=True)  # a damaged one, or the run would have gone on behind it
    os.rename(tmp, final)
    write_atomic(final.parent / "latest", final.name + "\n")
    paths = sorted(final.parent.glob("step_*"))
    good = [path for path in paths if not damage(path, hashes=False)][-max(2, keep):]
    for path in paths[:paths.index(good[0])]:
        shutil.rmtree(path.rename(tmp))  # under another name: an interrupted deletion must not look like damage

def damage(path, hashes=True, dist=Dist()):
    """What is wrong with a checkpoint folder, in words; None: all files have the size and sha256 of the manifest. Of
    the hashes, the slow part, each rank makes a share."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if f"step_{manifest['step']:08d}" != path.name: return "manifest.json belongs to another step"
        if lacks := {"state.json", ".metadata"} - manifest["files"].keys(): return f"no {lacks.pop()} in the manifest"
        for i, (name, (size, digest)) in enumerate(sorted(manifest["files"].items())):
            if (path / name).stat().st_size != size or (
                    hashes and i % dist.world == dist.rank and file_hash(path / name) != digest):
                return f"{name} has changed since it was written"
    except Exception as e:
        return f"{type(e).__name__}: {e}"

def find_checkpoint(out_dir, dist=Dist(), strict=False):
    """Path of the newest checkpoint that verifies, or None if there is none at all; all ranks call it and get the same.
    A loud line per damaged one; ValueError where none is whole, with strict already where the newest is damaged."""
    reason, paths = None, gather(sorted(Path(out_dir).glob("checkpoints/step_*"), reverse=True), dist)[0]
    for path in paths:
        reason = next(filter(None, gather(damage(path, dist=dist), dist)), None)
        if not reason: return path
        if strict: raise ValueError(f"damaged checkpoint {path}: {reason}; --resume=auto goes on from the one before")
        say(dist, f"WARNING: DAMAGED CHECKPOINT {path}: {reason}; trying the one before")
    if reason:
        raise ValueError(f"{paths[0].parent}: no checkpoint is whole; restore one, or remove the folder to start anew")

def set_aside(out_dir, step):
    """Give checkpoints of a later step than `step`, at which a run goes on, another name: damaged ones, and those of
    stages that are done again. Pruning would keep them, and a later start take them, for newer than what now comes."""
    for path in sorted(Path(out_dir).glob("checkpoints/step_*")):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(aside := path.with_name(f"aside_{path.name}"), ignore_errors=True)
            path.rename(aside)
            print(f"WARNING: {path} is of a later step than {step}, where this run goes on; it is now {aside}",
                  file=sys.stderr, flush=True)

def read_state(path):
    """The state that was saved with the checkpoint `path` (stage, position, ...), without its tensors."""
    return json.loads((Path(path) / "state.json").read_text())

def load_checkpoint(path, model, optimizer, dist):
    """Fill model and optimizer in place, at any number of ranks; returns the saved state. ValueError: does not fit."""
    tensors, saved = tensors_of(model, optimizer), dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    here, there = {k: tuple(t.shape) for k, t in tensors.items()}, {k: tuple(t.size) for k, t in saved.items()}
    wrong = [f"{name} is {there.get(name, 'not there')}, here {here.get(name, 'not known')}"
             for name in here | there if here.get(name) != there.get(name)]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {'; '.join(wrong[:3])}{' and more' * (len(wrong) > 3)}. Go "
                         "on with the configuration it was written with, or start anew in another --out_dir")
    dcp.load(tensors, checkpoint_id=path, no_dist=not td.is_initialized())
    return read_state(path)

# ---- the run folder -------------------------------------------------------------------------------------------------
def lock_run_folder(out_dir):
    """Take the run folder (rank 0), then remove what an interrupted save left. Raises ValueError naming the holder. The
    lock is fcntl's: the system releases it however the process ends, and forked data workers do not inherit it."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    lock = os.open(Path(out_dir) / "lock", os.O_RDWR | os.O_CREAT)  # never closed: held as long as the process lives
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out_dir} is in use by {os.read(lock, 200).decode() or 'another process'}; wait for it, "
                         "stop it, or choose another --out_dir") from None
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    for leftover in Path(out_dir).glob("checkpoints/.tmp_*"): shutil.rmtree(leftover)

class Preemption:
    """SIGTERM and SIGUSR1 ask for a checkpoint at the next step boundary. Create it before the first slow thing."""
    def __init__(self):
        self.signals, self.parent = [], os.getppid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: self.signals.append(number))

    def stop_requested(self, dist):
        """True on all ranks, which all call it once per step, when any was asked to stop. Raises ValueError in a worker
        whose torchrun has died: an orphan must not write into the folder of the job that takes its place."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            raise ValueError("torchrun has ended, so this worker ends too; the same command goes on")
        return all_reduce_sum(torch.tensor(len(self.signals), device=dist.device), dist).item() > 0

def watch(cfg, dist, note):
    """Watch over what comes next, the note says what, until the next call; an empty note ends the watch. The note goes
    to last_step/rank_K.txt; after cfg.timeout_s the stacks of all threads follow. Under torchrun an alarm of the
    system, which needs no Python, ends the process 5 s later: a rank that waits in a driver cannot do it itself, and by
    then all ranks, which call this at about the same moment, have written their stacks. One process ends at once."""
    path = Path(cfg.out_dir) / "last_step" / f"rank_{dist.rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    faulthandler.cancel_dump_traceback_later()
    if td.is_initialized(): signal.alarm(cfg.timeout_s + 5 if note else 0)
    if note:
        (file := open(path, "wb", buffering=0)).write(f"{note}\n".encode())
        faulthandler.dump_traceback_later(cfg.timeout_s, file=file, exit=not td.is_initialized())  # keeps it open

def open_log(out_dir):
    """Open log.jsonl for appending; a last line torn by a crash is cut off first."""
    f = open(Path(out_dir) / "log.jsonl", "ab+", buffering=0)
    f.seek(0)
    f.truncate(f.read().rfind(b"\n") + 1)
    return f

def log_line(f, row, track=None):
    """Append one row as one write. Numbers that are not finite become null, so that every reader takes the line."""
    if track: track(row)
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    line, end, written = (json.dumps(row, ensure_ascii=False) + "\n").encode(), f.seek(0, os.SEEK_END), 0
    with contextlib.suppress(OSError): written = f.write(line)
    if written < len(line):  # a full disk
        f.truncate(end)
        print(f"WARNING: no room for a line of {f.name}, it is left out", file=sys.stderr, flush=True)

def open_tracker(cfg, values):
    """A function that hands a row of log.jsonl to the program that --track names, if it is installed; None without."""
    try:
        if cfg.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            add = SummaryWriter(cfg.out_dir).add_scalar
            return lambda row: [add(f"{row['stage']}/{name}", value, row["step"]) for name, value in row.items()
                                if isinstance(value, (int, float))]
        if cfg.track == "wandb":
            import wandb
            return wandb.init(project="sail-vl", name=Path(cfg.out_dir).name, dir=cfg.out_dir, config=values).log
    except ImportError:
        raise ValueError(f"--track={cfg.track} is not installed: pip install {cfg.track}") from None

def log_bad(out_dir, records):
    """Append unreadable records to bad_samples.jsonl, one write per line, each once."""
    if not records: return
    with open(Path(out_dir) / "bad_samples.jsonl", "ab+", buffering=0) as f:
        f.seek(0)
        known = {*f.read().decode().splitlines()}  # of the steps that a run which went on does again
        for record in records:
            if json.dumps(record, ensure_ascii=False) not in known: log_line(f, record)

def read_run_config(out_dir):
    """What write_run_config wrote, {} if nothing."""
    path = Path(out_dir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}

def write_run_config(out_dir, values, origins, world):
    """config.json: `values` (configurator.resolved), their `origins`, argv, versions, machine, commit of this code;
    world: ranks that the run began on."""
    commit = subprocess.run("git describe --always --abbrev=40 --exclude='*' --dirty", shell=True,  # COMMIT[-dirty]
                            cwd=Path(__file__).resolve().parent, capture_output=True, text=True).stdout.strip()
    versions = {d.name: d.version for d in importlib.metadata.distributions()}  # of all that is installed
    record = {"config": values, "origins": origins, "argv": sys.argv, "commit": commit or None,
              "versions": {"python": platform.python_version(), **versions}, "host": platform.node(),
              "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
              "world": world, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_atomic(Path(out_dir) / "config.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")

def named_stages(cfg):
    """[(name, Stage), ...] of cfg.stages, in order. Raises ValueError naming the stages there are."""
    known = {f.name: getattr(cfg, f.name) for f in fields(cfg) if isinstance(getattr(cfg, f.name), Stage)}
    names = cfg.stages.replace(" ", "").split(",")
    for name in set(names) - known.keys():
        raise ValueError(f"--stages: unknown stage {name!r}, choose from {', '.join(known)}")
    return [(name, known[name]) for name in names]

def stage_steps(cfg, stage):
    return min(stage.steps, cfg.max_steps or stage.steps)

def where_to_start(cfg, origins, name):
    """(model folder, first step) of stage `name`. The folder is that of the stage before it, if this run folder has one
    and --init_from does not name another for the first stage to run. Steps count on from stage to stage, run or not."""
    order, selected, out = type(cfg)().stages.split(","), named_stages(cfg), Path(cfg.out_dir)
    before = order[:order.index(name)] if name in order else []
    done = [n for n in before if (out / n / "config.json").exists()]
    told = name == selected[0][0] and origins["init_from"] == "command line"
    first_step = sum(stage_steps(cfg, getattr(cfg, n)) for n in before)
    return str(out / done[-1]) if done and not told else cfg.init_from, first_step

def open_run(cfg, origins, stages, dist, values):
    """Take the run folder and tell which of `values` an earlier start had otherwise; returns the newest good checkpoint
    in it (None: start anew) and the number of ranks that the run began on. All ranks call it."""
    out, start = Path(cfg.out_dir), cfg.init_from or cfg.tokenizer
    if not os.path.isdir(start) or (Path(start) / "log.jsonl").exists():
        raise ValueError(f"{start or '--init_from='} is not a model folder: give --init_from=FOLDER, the one of a run "
                         "being RUN/STAGE, or --tokenizer=FOLDER for random weights")
    for name, stage in stages:
        if not (cfg.data or stage.data):
            raise ValueError(f"stage {name} has no data: give --data=PATH or {name}.data in the config")
        if stage.data and origins["data"] == "command line" != origins[f"{name}.data"]:
            raise ValueError(f"{origins[f'{name}.data']} gives stage {name} data of its own: instead of --data, write "
                             f"--{name}.data=PATH")
    problem = None
    try:
        if dist.is_main: lock_run_folder(out)
    except (ValueError, OSError) as e:
        problem = e
    if problem := gather(problem, dist)[0]: raise problem  # on every rank: one line each, no lost connection
    old = read_run_config(out).get("config", values)
    if changed := [f"{k}: {old.get(k)!r} -> {v!r}" for k, v in values.items() if old.get(k) != v]:
        say(dist, f"settings that changed since this run was started: {'; '.join(changed)}")
    checkpoint = find_checkpoint(out, dist, cfg.resume == "strict")
    finished = any((out / name / "config.json").exists() for name, _ in stages)
    if cfg.resume == "never" and (checkpoint or finished):
        raise ValueError(f"{out} holds an earlier run and --resume=never; choose another --out_dir or remove it")
    state = read_state(checkpoint) if checkpoint else read_run_config(out) if finished else {}
    return checkpoint, state.get("world", dist.world)

def micro_batches(accum, began, name, checkpoint, dist):
    """(micro-batches of a step here, ranks the run began on). On other ranks a step keeps its packs, so that a run that
    was resized goes on by itself, as does one whose grad_accum_steps was set by hand to what keeps them. ValueError
    names the sizes that fit."""
    state = read_state(checkpoint) if checkpoint else {}
    if state.get("stage") == name and state.get("packs_per_step") == accum * dist.world: return accum, dist.world
    packs = accum * began
    if packs % dist.world:
        raise ValueError(f"a step of this run is {packs} packs, which {dist.world} ranks cannot share alike; start it "
                         f"on {', '.join(str(n) for n in range(1, packs + 1) if packs % n == 0)} ranks")
    return packs // dist.world, began

def resume(checkpoint, name, steps, packs, began, model, optimizer, dist):
    """State of stage `name`: the checkpoint's, with weights and moments loaded, if it is of this stage; else new."""
    state = read_state(checkpoint) if checkpoint else {}
    if state.get("stage") != name:
        return {"stage": name, "fingerprint": packs.fingerprint, "packs_per_step": packs.packs_per_step, "world": began,
                "position": [0, 0, 0], "counts": {}, "step": 0, "bad_steps": 0, "quarantined": 0, "tokens_seen": 0,
                "samples_seen": 0}
    if state["fingerprint"] != packs.fingerprint:
        raise ValueError(f"the data of stage {name}, their order or the size of packs and steps changed since "
                         f"{checkpoint} was written; go on with the same or start anew in another --out_dir")
    if state["step"] > steps:
        raise ValueError(f"stage {name} is to have {steps} steps, but {checkpoint} is {state['step']} steps into it; "
                         f"raise --max_steps or {name}.steps, or start anew in another --out_dir")
    return load_checkpoint(checkpoint, model, optimizer, dist) | {"world": began}

def announce(cfg, values, origins, name, model, stage, packs, state, first_step, dist):
    """Write config.json, now that the stage really runs, print what it trains on what, set aside checkpoints that are
    not its past, note the records that its index could not read. OSError: no room for what the stage will save."""
    out_dir, sizes = cfg.out_dir, [(p.nbytes, p.numel(), p.requires_grad) for p in model.parameters()]
    saves = max(1, (stage_steps(cfg, stage) - state["step"]) // cfg.save_every)
    saves = min(saves, max(2, cfg.keep) + 1 - len(list(Path(out_dir).glob("checkpoints/step_*"))))
    need = sum(max(0, saves) * n * (3 if trains else 1) + 2 * elements for n, elements, trains in sizes)
    check_room(out_dir, need, f"stage {name} with {max(0, saves)} more checkpoints and a model folder")
    if dist.is_main:
        set_aside(out_dir, first_step + state["step"])
        write_run_config(out_dir, values, origins, state["world"])
        if state["step"] == 0:
            log_bad(out_dir, [bad for source in packs.sources for bad in source.meta["bad"]])
        print_stage_table(name, model, stage)
        print(f"{packs.n:,} samples in {(n := len(packs.sources))} source{'s' * (n > 1)}, {packs.n_bad} unreadable; "
              f"{'goes on at' if state['step'] else 'starts at'} step {state['step']}", flush=True)

def check_quarantine(state, packs, out_dir):
    """Stop a run whose data are rotten: max(100, 1 %) of the rows in the index, or of the samples seen, are unreadable.
    Raises ValueError."""
    for bad, n in ((packs.n_bad, packs.n), (state["quarantined"], state["samples_seen"])):
        if bad > max(100, 0.01 * n):
            raise ValueError(f"{bad} unreadable samples of {n}: see {out_dir}/bad_samples.jsonl, mend or remove them")

SPIKE = 6  # standard deviations

def spike(losses, loss):
    """(standard deviations that `loss` lies above the straight line through the last 64 to 128; the losses to keep). A
    spike is kept as 3 only: it must not hide the next one, but a loss that stays up ends the alarm."""
    if not math.isfinite(loss) or (n := len(losses)) < 64: return 0.0, losses + [loss] * math.isfinite(loss)
    x, y = np.arange(n) - (n - 1) / 2, np.array(losses)
    slope = x @ y / (x @ x)
    line, sigma = y.mean() + slope * (n + 1) / 2, max((y - y.mean() - slope * x).std(ddof=2), 1e-12)
    sigmas = (loss - line) / sigma
    return float(sigmas), [*losses, float(line + 3 * sigma) if sigmas > SPIKE else loss][-128:]

def next_state(state, step, batch, totals, loss, finite):
    """What a checkpoint after this step must know: where the data go on, and the counts so far."""
    sigmas, losses = spike(state.get("losses", []), loss)
    return state | {"step": step, "position": batch["position"], "counts": batch["counts"], "spike": sigmas,
                    "bad_steps": 0 if finite else state["bad_steps"] + 1, "losses": losses,
                    "quarantined": state["quarantined"] + int(totals["bad"]),
                    "tokens_seen": state["tokens_seen"] + int(totals["tokens"]),
                    "samples_seen": state["samples_seen"] + int(totals["samples"])}

class Clock:
    """Where the time of a step goes: clock("forward") ends a part that began when the one before it ended. On CUDA the
    borders are events in its queue, for which nobody waits before `split`."""
    def __init__(self, device):
        self.cuda, self.start, self.marks = device.type == "cuda", time.perf_counter(), []
        self("start")

    def __call__(self, part):
        at = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda: at.record()
        self.marks.append((part, at))

    def split(self):
        """(seconds since the start, {part: seconds}); the last mark is waited for."""
        if self.cuda: self.marks[-1][1].synchronize()
        parts = collections.Counter()
        for (_, a), (part, b) in itertools.pairwise(self.marks):
            parts[part] += a.elapsed_time(b) / 1000 if self.cuda else b - a
        return time.perf_counter() - self.start, parts

def account(before, state, packs, ends):
    """{"epoch": sums} for the line of a step in which an epoch ended (`before`: the counts before it) or the stage
    ends: where each record of the index went, so far, and how many are to come in this epoch. All ranks stand at the
    same counts; AssertionError if what they made of their packs is not what was planned: a sample lost or doubled."""
    counts, bad = state["counts"], state["quarantined"]
    seen, unreadable = sum(counts.values()), counts.get("unreadable", 0)
    assert counts["used"] == state["samples_seen"] + bad, (
        f"{counts['used']} samples were planned, {state['samples_seen']} used and {bad} quarantined; report this")
    if seen // packs.n == sum(before.values()) // packs.n and not ends: return {}
    return {"epoch": {"epochs": seen // packs.n, "records": seen, "to_come": -seen % packs.n,
                      "used": state["samples_seen"], "dropped": dropped(counts),
                      "quarantined": {"in the index": unreadable, "in training": bad}}}

def dropped(counts):
    """{reason: samples dropped whole} of the counts of a Packs."""
    return {reason: n for reason, n in counts.items() if reason not in ("used", "unreadable")}

def step_row(steps, loss, norm, norms, optimizer, totals, state, micro, clock, peak, dist):
    """The line of log.jsonl of one step. steps: of the stage, behind the stage; for the ETA of the run all are as long
    as this one. mfu is strict: FLOPs the gradients need, over the peak of all GPUs; None on a CPU. fill, tile_fill: of
    the packs; straggler: planned FLOPs of the busiest rank over the mean of all."""
    (steps, later), step, (seconds, parts) = steps, state["step"], clock.split()
    costs = np.sum([batch["costs"] for batch in micro], axis=0)
    return {"stage": state["stage"], "step": step, "steps": steps, "loss": loss, "grad_norm": norm.item(),
            **{f"grad_norm_{k}": v.item() for k, v in norms.items()},
            "lr": {g["name"].split("/")[0]: g["lr"] for g in optimizer.param_groups},
            **{k: int(totals[k]) for k in ("tokens", "tiles", "supervised", "samples")}, "seconds": seconds,
            **{f"{part}_s": s for part, s in parts.items()}, "tflop": totals["flops"] / 1e12,
            "tokens_per_s": totals["tokens"] / seconds, "tiles_per_s": totals["tiles"] / seconds,
            "mfu": totals["flops"] / seconds / (peak * dist.world) if peak else None,
            "data_wait": parts["data"] / seconds, "fill": totals["tokens"] / totals["token_room"],
            "tile_fill": totals["tiles"] / totals["tile_room"], "straggler": float(costs.max() / costs.mean()),
            "memory_gb": peak_memory_gb(),
            **{k: state[k] for k in ("tokens_seen", "samples_seen", "spike")},
            "dropped": sum(dropped(state["counts"]).values()),
            "quarantined": state["quarantined"] + state["counts"].get("unreadable", 0),
            "eta_s": seconds * (steps - step), "run_eta_s": seconds * (steps - step + later)}

@torch.no_grad()
def validation_loss(model, batches, dist):
    """Mean loss of held-out `batches` of (arguments of the model, weight of what is supervised), as many on each rank:
    the sums are added up over the ranks and divided once."""
    model = getattr(model, "module", model).eval()  # out of DDP
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs, weight in batches: sums += torch.tensor([model(**inputs).item(), weight], dtype=torch.float64)
    model.train()
    loss, weight = all_reduce_sum(sums.to(dist.device), dist).tolist()
    return loss / max(weight, 1e-9)

# ---- numbers to look at ---------------------------------------------------------------------------------------------
# Dense bf16 tensor-core TFLOP/s from the vendor's data sheets
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "GH200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989,
               "H200 NVL": 835, "H800": 989, "H800 PCIe": 756, "H20": 148, "A100": 312, "A800": 312, "L40S": 362,
               "L40": 181, "L4": 121, "A40": 150, "RTX A6000": 155, "A10G": 70, "A10": 125, "RTX 5090": 209,
               "RTX 4090": 165, "RTX 3090": 71}
FORM = r"nvidia|geforce|tesla|pcie|sxm\d*|hbm\S*|\d+gb"  # what may stand around a name: maker, socket, memory

def peak_flops(device):
    """Peak bf16 FLOP/s of one device; None where it is not known (any CPU, a slice of a GPU, a laptop's): no MFU rather
    than a wrong one."""
    words = {*re.split(r"[\s-]+", torch.cuda.get_device_name(device).lower())} if device.type == "cuda" else set()
    for name, tflops in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0].split())):  # "H100 PCIe" first
        if words >= (own := {*name.lower().split()}) and all(re.fullmatch(FORM, word) for word in words - own):
            return tflops * 1e12

def peak_memory_gb():
    """Most memory this process has held so far, in GB (1e9 bytes): allocated on the GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

def format_step(row):
    """The printed line of one step from its row of log.jsonl (`step_row`)."""
    rates = " ".join(f"{name} {value:.1e}" for name, value in row["lr"].items() if value)
    mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
    return (f"{row['stage']} {row['step']}/{row['steps']} | loss {row['loss']:.4f} | lr {rates} | "
            f"{row['tokens_per_s']:,.0f} tok/s {row['tiles_per_s']:,.1f} tiles/s | mfu {mfu} | "
            f"data wait {100 * row['data_wait']:.0f}% | mem {row['memory_gb']:.1f} GB | dropped {row['dropped']} "
            f"quarantined {row['quarantined']} | eta {datetime.timedelta(seconds=int(row['eta_s']))} "
            f"of {datetime.timedelta(seconds=int(row['run_eta_s']))}" + f" | SPIKE {row['spike']:.0f} sigma" * (
                row["spike"] > SPIKE) + (f" | val loss {row['val_loss']:.4f}" if "val_loss" in row else "") + (
                f" | {json.dumps(row['epoch'])}" if "epoch" in row else ""))

def read_log(path):
    """Yield the rows of a log.jsonl, without what a full disk tore."""
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(ValueError): yield json.loads(line)

def plot_loss(log_path, png_path):
    """Draw the loss of each stage of a log.jsonl: raw thin, mean over 1/40 of the stage thick. After a resume the later
    line of a step counts. Where matplotlib is missing, a line says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print(f"{png_path} not drawn: pip install matplotlib")
    ax = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    curves, start = {}, 0  # stage -> {step: loss}
    for row in read_log(log_path):
        if row.get("loss") is not None: curves.setdefault(row["stage"], {})[row["step"]] = row["loss"]
    for stage, points in curves.items():
        steps, losses = zip(*sorted(points.items()))
        x, window = start + np.array(steps), np.ones(max(1, len(steps) // 40))  # step counts from 1 in each stage
        mean = np.convolve(losses, window, "same") / np.convolve(np.ones(len(steps)), window, "same")
        line, = ax.plot(x, mean, lw=1.8, label=stage)
        ax.plot(x, losses, lw=0.6, alpha=0.3, color=line.get_color())
        start = x[-1]
    ax.set(xlabel="step", ylabel="loss (nats per supervised token)")
    if curves: ax.legend(frameon=False)
    ax.figure.savefig(png_path, dpi=120)
