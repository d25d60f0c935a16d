"""The Triton kernels of packed attention, and how they are launched.

The kernels walk over the keys block by block and never hold a row of scores (FlashAttention,
arXiv 2205.14135 and 2307.08691). With t = log2(e) / sqrt(D) and, per query row, a maximum m, a sum
l (`total` in the code) and a vector a:

    s = t q K_b^T      m' = max(m, max s)      p = 2^(s - m')      c = 2^(m - m')
    l' = c l + sum p   a' = c a + p V_b        at the end: out = a / l,  lse = m + log2(l)

lse is kept for the backward pass:

    p = 2^(s - lse)    delta = dout . out    ds = p * (dout V^T - delta)
    dV = p^T dout      dQ = ds K / sqrt(D)   dK = ds^T Q / sqrt(D)

dQ is one kernel: a program owns query rows and walks keys. dK and dV are another: a program owns
keys and walks the queries of all H/K heads that share them. So there are no atomics, gradients are
deterministic, and K and V are never expanded. A program gets a block of rows of one document; its
bounds are scalars from a small table. Tensor descriptors (TMA on Hopper) end with the document. So
the loop loads no mask, which lets Triton specialise the warps of the forward kernel, and nothing of
a neighbour is ever read.

A tile of the ViT has 1 + 1024 tokens. 1025 rows and keys fill 81 pairs of blocks of 128, and 21 %
of that is empty. So where every document is one longer than whole blocks, and nothing is causal,
the first token is folded in: its key enters the starting values (m = s_0, l = 1, a = v_0), its
query those of dK and dV, and its own row is a block of 16. That leaves 65 pairs.
Compiled for sm_90a and interpreted on a CPU; not timed on a GPU yet.

Shape letters: T tokens of a pack, H query heads, K key/value heads (H is a multiple of K), D head
dim, BM query rows and BN keys of a block.
"""
import functools
import itertools
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without it
    triton = None
    tl = None

FOLD = True  # fold the first token of documents that are one longer than whole blocks

if triton:
    # T is another number in every pack: nothing may be compiled for what it divides by
    jit = triton.jit(do_not_specialize=["T"])
    constexpr = tl.constexpr
else:
    constexpr = None

    def jit(kernel):
        return kernel


def reason_against(D):
    """Why the kernels cannot run for head dim D; "" if they can."""
    if not triton:
        return "Triton is not installed (pip install triton)"
    if D not in (16, 32, 64, 128, 256):
        return f"head_dim {D} is not a power of two from 16 to 256"
    return ""


# ---- the kernels ---------------------------------------------------------------------------------
# All read a table (blocks, 4): first and last row in the document, its start and end in the pack.
# q_row, k_row, v_row: elements from one row to the next. lse and delta: (H, T).

@jit
def _document(x, start, end, stride, width: constexpr, B: constexpr, D: constexpr):
    """Rows start..end of x (T, width) in blocks (B, D).

    What lies beyond the end reads as 0 and is not written.
    """
    base = x + start.to(tl.int64) * stride
    return tl.make_tensor_descriptor(base, [end - start, width], [stride, 1], [B, D])


@jit
def _forward(q, k, v, out, lse, table, T, q_row, k_row, v_row, scale,
             H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
             CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr, WARPS: constexpr = 0):
    """One block of query rows of one head -> out, lse."""
    head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    kv_head = head // (H // K)
    rows = first + tl.arange(0, BM)
    queries = _document(q, start, start + last, q_row, H * D, BM, D).load([first, head * D])
    keys = _document(k, start, end, k_row, K * D, BN, D)
    values = _document(v, start, end, v_row, K * D, BN, D)
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    a = tl.zeros([BM, D], tl.float32)
    if FOLD:
        # by a dot, with one key and 15 zeros: a loaded vector in a sum stops warp specialisation
        key_0 = _document(k, start, start + 1, k_row, K * D, 16, D).load([0, kv_head * D])
        m = tl.sum(tl.dot(queries, key_0.T, input_precision=DOT), 1) * scale
        total += 1.0
        place = v + start.to(tl.int64) * v_row + kv_head * D + tl.arange(0, D)
        a += tl.load(place).to(tl.float32)[None, :]

    if CAUSAL:
        limit = rows
        stop = last
    else:
        limit = tl.zeros_like(rows) + (end - start - 1)
        stop = end - start
    for n in tl.range(1 if FOLD else 0, stop, BN, warp_specialize=WARPS):
        block_k = keys.load([n, kv_head * D])
        s = tl.dot(queries, block_k.T, input_precision=DOT) * scale  # (BM, BN)
        if not FOLD:
            s = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        c = tl.exp2(m - m_new)
        total = total * c + tl.sum(p, 1)
        m = m_new
        block_v = values.load([n, kv_head * D])
        a = tl.dot(p.to(block_v.dtype), block_v, a * c[:, None], input_precision=DOT)
    result = (a / total[:, None]).to(queries.dtype)
    _document(out, start, start + last, H * D, H * D, BM, D).store([first, head * D], result)
    tl.store(lse + head * T + start + rows, m + tl.log2(total), rows < last)


@jit
def _backward_q(q, k, v, out, dout, lse, delta, dq, table, T, q_row, k_row, v_row, scale,
                H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
                CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr):
    """One block of query rows of one head -> dq, and delta for the kernel of dK and dV."""
    head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    kv_head = head // (H // K)
    rows = first + tl.arange(0, BM)
    queries = _document(q, start, start + last, q_row, H * D, BM, D).load([first, head * D])
    grad = _document(dout, start, start + last, H * D, H * D, BM, D).load([first, head * D])
    result = _document(out, start, start + last, H * D, H * D, BM, D).load([first, head * D])
    keys = _document(k, start, end, k_row, K * D, BN, D)
    values = _document(v, start, end, v_row, K * D, BN, D)
    d = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + head * T + start + rows, d, rows < last)
    z = tl.load(lse + head * T + start + rows, rows < last, other=0.0)
    a = tl.zeros([BM, D], tl.float32)
    if FOLD:
        place = kv_head * D + tl.arange(0, D)
        k_0 = tl.load(k + start.to(tl.int64) * k_row + place).to(tl.float32)[None, :]
        v_0 = tl.load(v + start.to(tl.int64) * v_row + place).to(tl.float32)[None, :]
        p_0 = tl.exp2(tl.sum(queries.to(tl.float32) * k_0, 1) * scale - z)
        a += (p_0 * (tl.sum(grad.to(tl.float32) * v_0, 1) - d))[:, None] * k_0

    if CAUSAL:
        limit = rows
        stop = last
    else:
        limit = tl.zeros_like(rows) + (end - start - 1)
        stop = end - start
    for n in tl.range(1 if FOLD else 0, stop, BN):
        block_k = keys.load([n, kv_head * D])
        s = tl.dot(queries, block_k.T, input_precision=DOT) * scale  # (BM, BN)
        p = tl.exp2(s - z[:, None])
        if not FOLD:
            p = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], p, 0.0)
        block_v = values.load([n, kv_head * D])
        ds = p * (tl.dot(grad, block_v.T, input_precision=DOT) - d[:, None])
        a = tl.dot(ds.to(block_k.dtype), block_k, a, input_precision=DOT)
    a *= scale * 0.6931471805599453  # scale holds log2(e), which is 1 / ln(2)
    dq_block = _document(dq, start, start + last, H * D, H * D, BM, D)
    dq_block.store([first, head * D], a.to(queries.dtype))


@jit
def _backward_kv(q, k, v, dout, lse, delta, dk, dv, table, T, q_row, k_row, v_row, scale,
                 H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
                 CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr):
    """One block of keys of one key/value head -> dk, dv.

    Walks the query rows of all H/K heads that share it.
    """
    kv_head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    cols = first + tl.arange(0, BN)
    block_k = _document(k, start, start + last, k_row, K * D, BN, D).load([first, kv_head * D])
    block_v = _document(v, start, start + last, v_row, K * D, BN, D).load([first, kv_head * D])
    queries = _document(q, start, end, q_row, H * D, BM, D)
    grads = _document(dout, start, end, H * D, H * D, BM, D)
    a_k = tl.zeros([BN, D], tl.float32)
    a_v = tl.zeros([BN, D], tl.float32)
    if FOLD:
        for g in range(H // K):
            head = kv_head * (H // K) + g
            place = head * D + tl.arange(0, D)
            at = head * T + start
            q_0 = tl.load(q + start.to(tl.int64) * q_row + place).to(tl.float32)[None, :]
            g_0 = tl.load(dout + start.to(tl.int64) * (H * D) + place).to(tl.float32)[None, :]
            s_0 = tl.sum(block_k.to(tl.float32) * q_0, 1) * scale
            p_0 = tl.exp2(s_0 - tl.load(lse + at))
            dp_0 = tl.sum(block_v.to(tl.float32) * g_0, 1)
            a_k += (p_0 * (dp_0 - tl.load(delta + at)))[:, None] * q_0
            a_v += p_0[:, None] * g_0

    if CAUSAL:
        begin = first  # earlier queries do not see these keys
    elif FOLD:
        begin = 1
    else:
        begin = 0
    steps = tl.cdiv(end - start - begin, BM)
    for i in tl.range(0, steps * (H // K)):
        head = kv_head * (H // K) + i // steps
        m = begin + i % steps * BM
        rows = m + tl.arange(0, BM)
        z = tl.load(lse + head * T + start + rows, start + rows < end, other=0.0)
        d = tl.load(delta + head * T + start + rows, start + rows < end, other=0.0)
        block_q = queries.load([m, head * D])
        block_g = grads.load([m, head * D])
        s = tl.dot(block_k, block_q.T, input_precision=DOT) * scale  # (BN, BM)
        p = tl.exp2(s - z[None, :])
        if CAUSAL:
            p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
        a_v = tl.dot(p.to(block_g.dtype), block_g, a_v, input_precision=DOT)
        ds = p * (tl.dot(block_v, block_g.T, input_precision=DOT) - d[None, :])
        a_k = tl.dot(ds.to(block_q.dtype), block_q, a_k, input_precision=DOT)
    a_k *= scale * 0.6931471805599453
    dk_block = _document(dk, start, start + last, K * D, K * D, BN, D)
    dk_block.store([first, kv_head * D], a_k.to(block_k.dtype))
    dv_block = _document(dv, start, start + last, K * D, K * D, BN, D)
    dv_block.store([first, kv_head * D], a_v.to(block_k.dtype))


# ---- from tensors to launches --------------------------------------------------------------------

# For head dims up to this: (BM, BN, warps, stages) for 16-bit numbers. tests/sm90.py compiles all.
BLOCKS = {
    "_forward": {128: (128, 128, 4, 2), 256: (128, 64, 8, 2)},
    "_backward_q": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
    "_backward_kv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)},
}


def launch_settings(kernel, D, dtype, capability):
    """-> BM, BN and the other keyword arguments of a launch.

    kernel: its name. capability: (9, 0) is Hopper, which the sizes are for; older and smaller GPUs
    have less shared memory; () is the interpreter. fp32 is exact, slow and meant for tests.
    """
    limit = min(limit for limit in BLOCKS[kernel] if D <= limit)
    BM, BN, warps, stages = BLOCKS[kernel][limit]
    exact = dtype == torch.float32
    if exact and capability:
        BM, BN, warps, stages = (32, 32, 4, 1) if D <= 128 else (16, 16, 4, 1)
    elif capability and capability[0] not in (9, 10):  # 8: A100, RTX 40; 12: RTX 50
        BM = BM // 2
        BN = BN // 2
        stages = 1 if D > 64 else 2
    options = dict(num_warps=warps, num_stages=stages, DOT="ieee" if exact else "tf32")
    if capability == (9, 0) and kernel == "_forward" and (warps, stages) == (4, 2):
        options["WARPS"] = True
    return BM, BN, options


@functools.lru_cache(256)
@torch.inference_mode(False)
def _table(borders, size, begin, limit, of_queries, device):
    """Rows begin..limit of each document in blocks of up to `size` -> int32 (blocks, 4).

    Each row of the table is what a program of a kernel reads. The blocks that a causal mask lets
    walk the longest way come first.
    """
    blocks = []
    for start, end in itertools.pairwise(borders):
        for first in range(begin, min(end - start, limit), size):
            blocks.append((first, min(first + size, end - start, limit), start, end))
    if of_queries:
        blocks.sort(key=lambda block: -block[0])
    else:
        blocks.sort(key=lambda block: block[0] - (block[3] - block[2]))
    table = torch.tensor(blocks, dtype=torch.int32).view(-1, 4)
    return table.to(device, non_blocking=True)


def _launch(kernel, tensors, q, k, v, cu_seqlens, causal):
    """Run a kernel over all blocks of all documents; tensors: its arguments before `table`."""
    T, H, D = q.shape
    K = k.shape[1]
    borders = tuple(cu_seqlens.tolist())
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    name = kernel.fn.__name__
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else ()
    BM, BN, options = launch_settings(name, D, q.dtype, capability)
    if q.is_cuda:
        # Where descriptors live. It is set here because the backward pass has a thread of its own.
        # The allocator outlives this call, so it must not hold on to q.
        device = q.device
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))

    # A program owns rows of queries, or of keys, in blocks of `own`. With folding, the first row
    # of each document is a launch of its own with blocks of 16.
    of_queries = name != "_backward_kv"
    own = BM if of_queries else BN
    longest = max(borders)
    fold = FOLD and not causal and all(n > 1 and n % 128 == 1 for n in lengths)
    parts = [(own, 1, longest), (16, 0, 1)] if fold else [(own, 0, longest)]
    scale = D**-0.5 * math.log2(math.e)
    for size, begin, limit in parts:
        if of_queries:
            BM = size
        else:
            BN = size
        if size < own:
            options.pop("WARPS", None)
        table = _table(borders, size, begin, limit, of_queries, q.device)
        if len(table) == 0:
            continue
        grid = (H if of_queries else K, len(table))
        kernel[grid](
            *tensors, table, T, q.stride(0), k.stride(0), v.stride(0), scale,
            H, K, D, BM, BN, causal, fold, **options)


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
    _launch(_forward, (q, k, v, out, lse), q, k, v, cu_seqlens, causal)
    return out, lse


def run_backward(dout, q, k, v, out, lse, cu_seqlens, causal):
    """The gradient dout (T, H, D) and what run_forward read and returned -> dq, dk, dv."""
    q = _aligned(q)
    k = _aligned(k)
    v = _aligned(v)
    dout = _aligned(dout)
    delta = torch.empty_like(lse)
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    _launch(_backward_q, (q, k, v, out, dout, lse, delta, dq), q, k, v, cu_seqlens, causal)
    _launch(_backward_kv, (q, k, v, dout, lse, delta, dk, dv), q, k, v, cu_seqlens, causal)
    return dq, dk, dv
