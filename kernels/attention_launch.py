"""How the kernels of attention_triton.py are launched: sizes, tables, descriptors, gradients.

A kernel is launched over (query heads, blocks). A block is up to BM query rows, or BN keys, of one
document; the longest come first, so that the last programs to start are short ones. The kernel of
dK and dV runs for each query head too: with 2 key heads and 8,192 tokens there would be 128
programs of very unequal length for the 132 processors (SMs) of an H100. What the query heads of a
key head give is written in fp32 and summed afterwards, always in the same order. So gradients stay
deterministic. `python -m bench.sm_busy` prints how busy the processors are.
"""
import functools
import itertools
import math

import torch

from kernels import attention_triton

if attention_triton.triton:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

FOLD = True  # fold the first token of documents that are one longer than whole blocks


def reason_against(D):
    """Why the kernels cannot run for head dim D; "" if they can."""
    if not attention_triton.triton:
        return "Triton is not installed (pip install triton)"
    if D not in (16, 32, 64, 128, 256):
        return f"head_dim {D} is not a power of two from 16 to 256"
    return ""


# For head dims up to this: (BM, BN, STEP, warps, stages) for 16-bit numbers. tests/sm90.py compiles
# all. STEP is how far an edge is walked at once: it takes more registers than a full block.
BLOCKS = {
    "_forward": {128: (128, 128, 64, 8, 2), 256: (128, 64, 32, 8, 2)},
    "_backward_q": {128: (128, 128, 64, 8, 2), 256: (64, 64, 32, 8, 2)},
    "_backward_kv": {128: (64, 128, 32, 8, 2), 256: (16, 64, 16, 8, 2)},
    "_backward_whole": {64: (64, 128, 64, 8, 2)},
}
# Queries that a program of _backward_whole keeps in the cache: their rows of q, dout and sums of dq
# are 256 KB at head dim 64, for 132 programs 34 MB of the 50 that an H100 has.
CHUNK = 512
# What a program owns: rows of queries, rows of keys, or a document.
OWNS = {"_forward": "BM", "_backward_q": "BM", "_backward_kv": "BN", "_backward_whole": "document"}


def launch_settings(kernel, D, dtype, capability, fold):
    """-> BM, BN and the other keyword arguments of a launch.

    kernel: its name. capability: (9, 0) is Hopper, which the sizes are for; older and smaller GPUs
    have less shared memory; () is the interpreter. fp32 is exact, slow and meant for tests.
    """
    limit = min(limit for limit in BLOCKS[kernel] if D <= limit)
    BM, BN, STEP, warps, stages = BLOCKS[kernel][limit]
    exact = dtype == torch.float32
    if exact and capability:
        BM, BN, warps, stages = (32, 32, 4, 1) if D <= 128 else (16, 16, 4, 1)
    elif capability and capability[0] not in (9, 10):  # 8: A100, RTX 40; 12: RTX 50
        BM = BM // 2
        BN = BN // 2
        stages = 1 if D > 64 else 2
    options = dict(
        STEP=min(STEP, BM, BN),
        DOT="ieee" if exact else "tf32",
        num_warps=warps,
        num_stages=stages,
    )
    if kernel == "_forward" and fold and capability == (9, 0) and not exact and D <= 128:
        # a producer and two groups of four warps that each own half of the query rows
        options["num_warps"] = 4
        options["WARPS"] = True
    return BM, BN, options


def folds(lengths, causal):
    """Whether the first token of each document is folded in."""
    return FOLD and not causal and all(n > 1 and n % 128 == 1 for n in lengths)


def whole_documents(lengths, causal, D, programs, processors):
    """Whether _backward_whole is quicker than _backward_q and _backward_kv, with 5 products for 7.

    It has a program for each document and query head, which should not leave half of the processors
    of a GPU without one. At head dims over 64 it has no registers for its sums.
    """
    return folds(lengths, causal) and D <= 64 and 2 * programs >= processors


def launches(kernel, own, lengths, causal):
    """(size of a block, first row, limit) of each launch; own: what a program owns.

    With folding, the first row of each document is a launch of its own with blocks of 16. A program
    of _backward_whole owns a document, first row and all.
    """
    end = sum(lengths)
    if kernel == "_backward_whole":
        return [(end, 1, end)]
    if kernel == "_forward" and folds(lengths, causal):
        return [(own, 1, end), (16, 0, 1)]
    return [(own, 0, end)]


def split_into_blocks(borders, size, begin, limit, of_queries):
    """Rows begin..limit of each document in blocks of up to `size`.

    -> rows of a table, (first, last, start, end). Each is what a program of a kernel reads. The
    blocks that a causal mask lets walk the longest way come first.
    """
    blocks = []
    for start, end in itertools.pairwise(borders):
        for first in range(begin, min(end - start, limit), size):
            blocks.append((first, min(first + size, end - start, limit), start, end))
    if of_queries:
        blocks.sort(key=lambda block: -block[0])
    else:
        blocks.sort(key=lambda block: block[0] - (block[3] - block[2]))
    return blocks


@functools.lru_cache(256)
@torch.inference_mode(False)
def _table(borders, size, begin, limit, of_queries, device):
    """The table of split_into_blocks on the GPU, int32 (blocks, 4)."""
    blocks = split_into_blocks(borders, size, begin, limit, of_queries)
    table = torch.tensor(blocks, dtype=torch.int32).view(-1, 4)
    return table.to(device, non_blocking=True)


def _blocks_of(x, rows):
    """A descriptor of x (T, heads, D): what a kernel loads is `rows` rows of one head.

    It is made on the CPU and passed by value, so no program spends time on it.
    """
    T, heads, D = x.shape
    return TensorDescriptor(x, [T, heads * D], [x.stride(0), 1], [rows, D])


def _launch(kernel, tensors, cu_seqlens, causal):
    """Run a kernel over all blocks of all documents.

    tensors: {argument: tensor}, and of those that a kernel walks over block by block also
    {argument_blocks: tensor}. The other arguments are found here.
    """
    q = tensors["q"]
    T, H, D = q.shape
    if T == 0:
        return
    borders = tuple(cu_seqlens.tolist())
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    name = kernel.fn.__name__
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else ()
    fold = folds(lengths, causal)
    BM, BN, options = launch_settings(name, D, q.dtype, capability, fold)
    if q.is_cuda:
        # Where descriptors that a kernel makes live. It is set here because the backward pass has
        # a thread of its own. The allocator outlives this call, so it must not hold on to q.
        device = q.device
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))

    known = dict(T=T, scale=D**-0.5 * math.log2(math.e), H=H, K=tensors["k"].shape[1], D=D, BM=BM,
                 BN=BN, CHUNK=CHUNK, CAUSAL=causal, FOLD=fold, **options)
    rows_of = {"q_blocks": BM, "g_blocks": BM, "k_blocks": BN, "v_blocks": BN, "k_starts": 16}
    for argument, x in tensors.items():
        rows = rows_of.get(argument)
        known[argument] = _blocks_of(x, rows) if rows else x
        known[f"{argument}_row"] = x.stride(0)
    wanted = [*kernel.arg_names, "num_warps", "num_stages"]
    owns = OWNS[name]
    for size, begin, limit in launches(name, known.get(owns), lengths, causal):
        if owns in known:
            # a block of 16 is too small to divide among groups of warps
            if size < known[owns]:
                known.pop("WARPS", None)
            known[owns] = size
        known["table"] = _table(borders, size, begin, limit, owns != "BN", q.device)
        grid = (H, len(known["table"]))
        kernel[grid](**{name: known[name] for name in wanted if name in known})


def _aligned(x):
    """x (T, heads, D), copied where descriptors could not read it.

    They need the heads side by side and rows that start at multiples of 16 bytes.
    """
    together = x.stride()[1:] == (x.shape[2], 1)
    row_bytes = x.stride(0) * x.element_size()
    if together and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def run_forward(q, k, v, cu_seqlens, causal):
    """q (T, H, D), k and v (T, K, D) -> out (T, H, D), lse (H, T) fp32 in powers of 2."""
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}")
    q = _aligned(q)
    k = _aligned(k)
    v = _aligned(v)
    T, H, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((H, T), dtype=torch.float32)
    tensors = dict(q=q, k=k, v=v, k_blocks=k, v_blocks=v, k_starts=k, out=out, lse=lse)
    _launch(attention_triton._forward, tensors, cu_seqlens, causal)
    return out, lse


def run_backward(dout, q, k, v, out, lse, cu_seqlens, causal):
    """The gradient dout (T, H, D) and what run_forward read and returned -> those of q, k and v.

    They are heads of one tensor (T, H + 2K, D), queries first. Where q, k and v are such a tensor
    too, this is its gradient, and nobody has to put three together.
    """
    q = _aligned(q)
    k = _aligned(k)
    v = _aligned(v)
    dout = _aligned(dout)
    T, H, D = q.shape
    K = k.shape[1]
    gradient = q.new_empty((T, H + 2 * K, D))
    dq, dk, dv = gradient.split([H, K, K], 1)
    parts = (dk, dv)
    if H != K:
        parts = torch.empty((2, T, H, D), dtype=torch.float32, device=q.device)
    tensors = dict(q=q, k=k, v=v, q_blocks=q, g_blocks=dout, k_blocks=k, v_blocks=v, out=out,
                   dout=dout, lse=lse, delta=torch.empty_like(lse), dq=dq, dk=parts[0], dv=parts[1])
    lengths = cu_seqlens.diff().tolist()
    processors = 0
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    if whole_documents(lengths, causal, D, H * len(lengths), processors):
        sums = torch.empty((3, H, T, D), dtype=torch.float32, device=q.device)
        tensors |= dict(sums=sums[0], k_sums=sums[1], v_sums=sums[2])
        _launch(attention_triton._backward_whole, tensors, cu_seqlens, causal)
    else:
        _launch(attention_triton._backward_q, tensors, cu_seqlens, causal)
        _launch(attention_triton._backward_kv, tensors, cu_seqlens, causal)
    if H != K:
        dk.copy_(parts[0].view(T, K, H // K, D).sum(2))
        dv.copy_(parts[1].view(T, K, H // K, D).sum(2))
    return gradient
