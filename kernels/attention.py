"""Packed attention: many documents laid end to end in one row of tokens, none of which sees another.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j      over the keys j of the same document (causal: j <= i)

Paths: `triton`, for 16-bit numbers on CUDA: the kernels below; `sdpa`, elsewhere: documents of similar length as a
batch of PyTorch's own attention; `reference`: the definition, for tests. ATTENTION=reference|sdpa|triton overrides.

The kernels walk over the keys block by block and never hold a row of scores (FlashAttention, arXiv 2205.14135 and
2307.08691). With t = log2(e) / sqrt(D) and, per query row, a maximum m, a sum l and a vector a:

    s = t q K_b^T      m' = max(m, max s)      p = 2^(s - m')      c = 2^(m - m')
    l' = c l + sum p   a' = c a + p V_b        at the end: out = a / l,  lse = m + log2(l), kept for the backward pass

    backward:  p = 2^(s - lse)    delta = dout . out    ds = p * (dout V^T - delta)
               dV = p^T dout      dQ = ds K / sqrt(D)   dK = ds^T Q / sqrt(D)

dQ is one kernel (a program owns query rows and walks keys), dK and dV another (it owns keys and walks the queries of
all H/K heads that share them): no atomics, so gradients are deterministic, and K and V are never expanded. A program
gets a block of rows of one document; its bounds are scalars from a small table, and tensor descriptors (TMA on Hopper)
end with the document: the loop loads no mask, which lets Triton specialise the warps of the forward kernel, and nothing
of a neighbour is ever read.

A tile of the ViT has 1 + 1024 tokens; 1025 rows and keys fill 81 pairs of blocks of 128, of which 21 % is air. So where
every document is one longer than whole blocks, and nothing is causal, the first token is folded: its key enters the
starting values (m = s_0, l = 1, a = v_0), its query those of dK and dV, its own row is a block of 16: 65 pairs.
Compiled for sm_90a and interpreted on a CPU; not timed on a GPU yet.

Shape letters: T tokens of a pack, H query heads, K key/value heads (H is a multiple of K), D head dim, S documents
(samples, or tiles in the ViT), L tokens of the longest document of a group; BM query rows and BN keys of a block.
cu_seqlens (S+1,) int32 holds the borders, 0 and T included; keep it on the CPU when you can.
"""
import functools, math, os, sys

import torch
import torch.nn.functional as F

try:
    import triton, triton.language as tl
except ImportError:                                             # PyTorch for the CPU comes without it
    triton = tl = None

SHORT = 128         # on a CPU, documents up to this length are faster as two batched matmuls than as SDPA
FOLD = True         # fold the first token of documents that are one longer than whole blocks

def attention(q, k, v, cu_seqlens, max_seqlen, causal):
    """Softmax attention inside each document, scale 1/sqrt(D). q (T, H, D), k and v (T, K, D) -> (T, H, D).
    max_seqlen: the longest document, a plain int. causal: position i sees 0..i of its own document. What a document
    gets does not depend on what the others hold, to the last bit. Triton: D a power of two from 16 to 256."""
    fast = q.is_cuda and q.element_size() == 2 and not _missing(q.shape[2])
    path = os.environ.get("ATTENTION") or ("triton" if fast else "sdpa")
    if path not in ("reference", "sdpa", "triton"):
        raise ValueError(f"ATTENTION={path!r} is not a known path; use reference, sdpa or triton")
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads do not divide over {k.shape[1]} key/value heads"
    if path == "triton":
        if reason := _missing(q.shape[2]):
            raise ValueError(f"ATTENTION=triton: {reason}")
        return _triton(q, k, v, cu_seqlens, causal)[0]
    return (_sdpa if path == "sdpa" else _reference)(q, k, v, cu_seqlens, max_seqlen, causal)

def _missing(D):
    """Why the kernels cannot run; "" if they can."""
    reason = "" if D in (16, 32, 64, 128, 256) else f"head_dim {D} is not a power of two from 16 to 256"
    return reason if triton else "Triton is not installed (pip install triton)"

@functools.cache                                                # once per reason
def _loud(reason):
    print(f"WARNING: SLOW ATTENTION: {reason}; PyTorch's own runs instead", file=sys.stderr, flush=True)

# ---- reference: the definition, one document at a time ---------------------------------------------------------------
@torch.compiler.disable       # the document borders are data: traced, every new pack would compile anew
def _reference(q, k, v, cu_seqlens, max_seqlen, causal):
    groups, borders, out = q.shape[1] // k.shape[1], cu_seqlens.tolist(), []
    for start, end in zip(borders, borders[1:]):
        Q = q[start:end].transpose(0, 1)                                            # (H, L, D)
        K, V = (x[start:end].transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        scores = Q @ K.transpose(1, 2) * q.shape[2] ** -0.5                         # (H, L, L)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        out.append((scores.softmax(-1) @ V).transpose(0, 1))                        # (L, H, D)
    return torch.cat(out)

# ---- sdpa: documents of similar length as one right-padded batch -----------------------------------------------------
@torch.compiler.disable
def _sdpa(q, k, v, cu_seqlens, max_seqlen, causal):
    if q.is_cuda and not os.environ.get("ATTENTION"):
        _loud(_missing(q.shape[2]) or f"{q.dtype} has no tensor cores to run on")
    (T, H, D), S = q.shape, cu_seqlens.shape[0] - 1
    if T == S * max_seqlen:                                     # all equally long (the ViT): views only
        return _batched(*(x.view(S, max_seqlen, -1, D) for x in (q, k, v)), causal).reshape(T, H, D)
    gather, scatter, groups = _plan(tuple(cu_seqlens.tolist()), causal, q.device)
    rows = [s * length for s, length in groups]
    parts = zip(groups, *(x.index_select(0, gather).split(rows) for x in (q, k, v)))            # (s*L, heads, D) each
    out = [_batched(*(x.view(*group, -1, D) for x in qkv), causal).reshape(-1, H, D) for group, *qkv in parts]
    return (out[0] if len(out) == 1 else torch.cat(out)).index_select(0, scatter)               # (T, H, D)

def _batched(q, k, v, causal):
    """q (S, L, H, D), k and v (S, L, K, D) -> (S, L, H, D)."""
    (S, L, H, D), K = q.shape, k.shape[2]
    if L > SHORT or q.is_cuda:  # the CPU's backward is several times slower in bf16 than in fp32
        with torch.autocast("cpu", enabled=False):
            qkv = ((x if q.is_cuda else x.float()).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=H != K)
        return out.transpose(1, 2).to(q.dtype)
    # The H/K query heads that share a key head are stacked along the length: no copies of k and v.
    q = q.transpose(1, 2).reshape(S * K, H // K * L, D)
    k, v = (x.transpose(1, 2).reshape(S * K, L, D) for x in (k, v))
    mask = _mask(L, H // K, causal, q.dtype).expand(S * K, -1, -1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5)             # (S*K, H/K*L, L)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(S, H, L, D).transpose(1, 2)

@functools.lru_cache(64)
@torch.inference_mode(False)        # what is cached by an evaluation may be saved for a backward pass later
def _mask(L, groups, causal, dtype):
    """What is added to the scores, (1, groups*L, L): 0, and -inf in the future. Without a future a single 0."""
    if not causal: return torch.zeros(1, 1, 1, dtype=dtype)
    return torch.full((L, L), float("-inf"), dtype=dtype).triu(1).repeat(groups, 1)[None]

@functools.lru_cache(64)
@torch.inference_mode(False)
def _plan(borders, causal, device):
    """Group documents by length. -> (gather (rows,), scatter (T,), [(documents, padded length), ...]).
    Row i of the padded groups is token gather[i] of the pack; token t sits in row scatter[t]. A group holds documents
    at least 5/8 as long as its longest; padding repeats a document's own last token, on the right, where a causal
    mask hides it. Longer ones than SHORT, and all without a causal mask, share a group only where they are equally
    long. Every layer asks again, hence the cache."""
    documents = sorted(((end - start, start) for start, end in zip(borders, borders[1:]) if end > start), reverse=True)
    gather, scatter, groups, row = [], torch.empty(borders[-1], dtype=torch.long), [], 0
    while documents:
        length = documents[0][0]
        group = [d for d in documents if (d[0] * 8 >= length * 5 if causal and length <= SHORT else d[0] == length)]
        documents = documents[len(group):]
        for n, start in group:
            gather.append(torch.arange(start, start + length).clamp(max=start + n - 1))
            scatter[start:start + n] = torch.arange(row, row + n)
            row += length
        groups.append((len(group), length))
    return torch.cat(gather).to(device), scatter.to(device), groups

# ---- triton: the kernels ---------------------------------------------------------------------------------------------
# T is another number in every pack: nothing may be compiled for what it divides by
jit, constexpr = (triton.jit(do_not_specialize=["T"]), tl.constexpr) if triton else (lambda f: f, None)

@jit
def _document(x, start, end, stride, width: constexpr, B: constexpr, D: constexpr):
    """Rows start..end of x (T, width) in blocks (B, D). What lies beyond the end reads as 0 and is not written."""
    return tl.make_tensor_descriptor(x + start.to(tl.int64) * stride, [end - start, width], [stride, 1], [B, D])

@jit
def _forward(q, k, v, out, lse, table, T, q_row, k_row, v_row, scale, H: constexpr, K: constexpr, D: constexpr,
             BM: constexpr, BN: constexpr, CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr, WARPS: constexpr = 0):
    """One block of query rows of one head. table (blocks, 4): first and last row in the document, its start and end in
    the pack. q_row, k_row, v_row: elements from one row to the next. lse, here and below: (H, T)."""
    head, block = tl.program_id(0), table + 4 * tl.program_id(1)
    first, last, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    kv_head, rows = head // (H // K), first + tl.arange(0, BM)
    queries = _document(q, start, start + last, q_row, H * D, BM, D).load([first, head * D])            # (BM, D)
    keys = _document(k, start, end, k_row, K * D, BN, D)
    values = _document(v, start, end, v_row, K * D, BN, D)
    m, l, a = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, D], tl.float32)
    if FOLD:                                        # by a dot: a loaded vector in a sum stops warp specialisation
        key_0 = _document(k, start, start + 1, k_row, K * D, 16, D).load([0, kv_head * D])       # one key and 15 zeros
        m = tl.sum(tl.dot(queries, key_0.T, input_precision=DOT), 1) * scale
        l += 1.0
        a += tl.load(v + start.to(tl.int64) * v_row + kv_head * D + tl.arange(0, D)).to(tl.float32)[None, :]
    limit, stop = (rows, last) if CAUSAL else (tl.zeros_like(rows) + (end - start - 1), end - start)
    for n in tl.range(1 if FOLD else 0, stop, BN, warp_specialize=WARPS):
        s = tl.dot(queries, keys.load([n, kv_head * D]).T, input_precision=DOT) * scale                 # (BM, BN)
        if not FOLD:
            s = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p, c = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
        l, m = l * c + tl.sum(p, 1), m_new
        block_v = values.load([n, kv_head * D])
        a = tl.dot(p.to(block_v.dtype), block_v, a * c[:, None], input_precision=DOT)
    result = (a / l[:, None]).to(queries.dtype)
    _document(out, start, start + last, H * D, H * D, BM, D).store([first, head * D], result)
    tl.store(lse + head * T + start + rows, m + tl.log2(l), rows < last)

@jit
def _backward_q(q, k, v, out, dout, lse, delta, dq, table, T, q_row, k_row, v_row, scale, H: constexpr, K: constexpr,
                D: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr):
    """dQ of one block of query rows of one head, and delta of these rows for the kernel of dK and dV."""
    head, block = tl.program_id(0), table + 4 * tl.program_id(1)
    first, last, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    kv_head, rows = head // (H // K), first + tl.arange(0, BM)
    queries = _document(q, start, start + last, q_row, H * D, BM, D).load([first, head * D])            # (BM, D)
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
    limit, stop = (rows, last) if CAUSAL else (tl.zeros_like(rows) + (end - start - 1), end - start)
    for n in tl.range(1 if FOLD else 0, stop, BN):
        block_k = keys.load([n, kv_head * D])
        p = tl.exp2(tl.dot(queries, block_k.T, input_precision=DOT) * scale - z[:, None])               # (BM, BN)
        if not FOLD:
            p = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], p, 0.0)
        ds = p * (tl.dot(grad, values.load([n, kv_head * D]).T, input_precision=DOT) - d[:, None])
        a = tl.dot(ds.to(block_k.dtype), block_k, a, input_precision=DOT)
    a *= scale * 0.6931471805599453                             # scale holds log2(e), which is 1 / ln(2)
    _document(dq, start, start + last, H * D, H * D, BM, D).store([first, head * D], a.to(queries.dtype))

@jit
def _backward_kv(q, k, v, dout, lse, delta, dk, dv, table, T, q_row, k_row, v_row, scale, H: constexpr, K: constexpr,
                 D: constexpr, BM: constexpr, BN: constexpr, CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr):
    """dK and dV of one block of keys of one key/value head: walks the query rows of all H/K heads that share it."""
    kv_head, block = tl.program_id(0), table + 4 * tl.program_id(1)
    first, last, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    cols = first + tl.arange(0, BN)
    block_k = _document(k, start, start + last, k_row, K * D, BN, D).load([first, kv_head * D])         # (BN, D)
    block_v = _document(v, start, start + last, v_row, K * D, BN, D).load([first, kv_head * D])
    queries = _document(q, start, end, q_row, H * D, BM, D)
    grads = _document(dout, start, end, H * D, H * D, BM, D)
    a_k, a_v = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
    if FOLD:
        for g in range(H // K):
            head = kv_head * (H // K) + g
            place, at = head * D + tl.arange(0, D), head * T + start
            q_0 = tl.load(q + start.to(tl.int64) * q_row + place).to(tl.float32)[None, :]
            g_0 = tl.load(dout + start.to(tl.int64) * (H * D) + place).to(tl.float32)[None, :]
            p_0 = tl.exp2(tl.sum(block_k.to(tl.float32) * q_0, 1) * scale - tl.load(lse + at))
            a_k += (p_0 * (tl.sum(block_v.to(tl.float32) * g_0, 1) - tl.load(delta + at)))[:, None] * q_0
            a_v += p_0[:, None] * g_0
    begin = first if CAUSAL else (1 if FOLD else 0)             # earlier queries do not see these keys
    steps = tl.cdiv(end - start - begin, BM)
    for i in tl.range(0, steps * (H // K)):
        head, m = kv_head * (H // K) + i // steps, begin + i % steps * BM
        rows = m + tl.arange(0, BM)
        z = tl.load(lse + head * T + start + rows, start + rows < end, other=0.0)
        d = tl.load(delta + head * T + start + rows, start + rows < end, other=0.0)
        block_q, block_g = queries.load([m, head * D]), grads.load([m, head * D])
        p = tl.exp2(tl.dot(block_k, block_q.T, input_precision=DOT) * scale - z[None, :])               # (BN, BM)
        if CAUSAL:
            p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
        a_v = tl.dot(p.to(block_g.dtype), block_g, a_v, input_precision=DOT)
        ds = p * (tl.dot(block_v, block_g.T, input_precision=DOT) - d[None, :])
        a_k = tl.dot(ds.to(block_q.dtype), block_q, a_k, input_precision=DOT)
    a_k *= scale * 0.6931471805599453
    _document(dk, start, start + last, K * D, K * D, BN, D).store([first, kv_head * D], a_k.to(block_k.dtype))
    _document(dv, start, start + last, K * D, K * D, BN, D).store([first, kv_head * D], a_v.to(block_k.dtype))

# ---- triton: from tensors to launches --------------------------------------------------------------------------------
BLOCKS = {           # up to this D: (BM, BN, warps, stages) for 16-bit numbers; tests/sm90.py compiles them all
    "_forward": {128: (128, 128, 4, 2), 256: (128, 64, 8, 2)},
    "_backward_q": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)},
    "_backward_kv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 2)}}

def launch_settings(kernel, D, dtype, capability):
    """-> BM, BN and the other keyword arguments of a launch. capability: (9, 0) is Hopper, which the sizes are for;
    older and smaller GPUs have less shared memory; () is the interpreter. fp32 is exact, slow and meant for tests."""
    BM, BN, warps, stages = next(blocks for limit, blocks in BLOCKS[kernel].items() if D <= limit)
    if dtype == torch.float32 and capability:
        BM, BN, warps, stages = (32, 32, 4, 1) if D <= 128 else (16, 16, 4, 1)
    elif capability and capability[0] not in (9, 10):           # 8: A100, RTX 40; 12: RTX 50
        BM, BN, stages = BM // 2, BN // 2, 1 if D > 64 else 2
    specialise = capability == (9, 0) and kernel == "_forward" and (warps, stages) == (4, 2)
    options = dict(WARPS=True) if specialise else {}
    return BM, BN, options | dict(num_warps=warps, num_stages=stages, DOT="ieee" if dtype == torch.float32 else "tf32")

@functools.lru_cache(256)
@torch.inference_mode(False)
def _table(borders, size, begin, limit, of_queries, device):
    """Rows begin..limit of each document in blocks of up to `size` -> int32 (blocks, 4), see _forward; longest walks of
    a causal mask first."""
    rows = [(first, min(first + size, end - start, limit), start, end) for start, end in zip(borders, borders[1:])
            for first in range(begin, min(end - start, limit), size)]
    rows.sort(key=lambda r: -r[0] if of_queries else r[0] - (r[3] - r[2]))
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)

def _launch(kernel, tensors, q, k, v, cu_seqlens, causal):
    """Run a kernel over all blocks of all documents; tensors: its arguments before `table`."""
    (T, H, D), K, borders = q.shape, k.shape[1], tuple(cu_seqlens.tolist())
    name, capability = kernel.fn.__name__, torch.cuda.get_device_capability(q.device) if q.is_cuda else ()
    BM, BN, options = launch_settings(name, D, q.dtype, capability)
    if q.is_cuda:                   # where descriptors live; set here because the backward pass has a thread of its own
        device = q.device           # not q: the allocator outlives this call and would hold on to it
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    fold = FOLD and not causal and all(b - a > 1 and (b - a) % 128 == 1 for a, b in zip(borders, borders[1:]))
    of_queries = name != "_backward_kv"
    own, longest = BM if of_queries else BN, max(borders)       # rows of the block that a program owns
    for size, begin, limit in ((own, 1, longest), (16, 0, 1)) if fold else ((own, 0, longest),):
        BM, BN = (size, BN) if of_queries else (BM, size)
        if size < own: options.pop("WARPS", None)
        table = _table(borders, size, begin, limit, of_queries, q.device)
        if len(table):
            kernel[(H if of_queries else K, len(table))](
                *tensors, table, T, q.stride(0), k.stride(0), v.stride(0), D ** -0.5 * math.log2(math.e), H, K, D,
                BM, BN, causal, fold, **options)

def _aligned(x):
    """x (T, heads, D) with its heads side by side and rows at multiples of 16 bytes, as descriptors need it."""
    good = x.stride()[1:] == (x.shape[2], 1) and x.stride(0) * x.element_size() % 16 == 0 == x.data_ptr() % 16
    return x if good else x.clone(memory_format=torch.contiguous_format)

@torch.library.custom_op("sail_vl::attention", mutates_args=())
def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor,
            causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (T, H, D), lse (H, T) fp32 in powers of 2."""
    assert q.dtype == k.dtype == v.dtype, f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    q, k, v = map(_aligned, (q, k, v))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)
    _launch(_forward, (q, k, v, out, lse), q, k, v, cu_seqlens, causal)
    return out, lse

_triton.register_fake(lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)))

@torch.library.custom_op("sail_vl::attention_backward", mutates_args=())
def _triton_backward(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                     lse: torch.Tensor, cu_seqlens: torch.Tensor,
                     causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (q, k, v, dout), delta = map(_aligned, (q, k, v, dout)), torch.empty_like(lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    _launch(_backward_q, (q, k, v, out, dout, lse, delta, dq), q, k, v, cu_seqlens, causal)
    _launch(_backward_kv, (q, k, v, dout, lse, delta, dk, dv), q, k, v, cu_seqlens, causal)
    return dq, dk, dv

_triton_backward.register_fake(lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)))

def _keep(ctx, inputs, output):
    ctx.causal = inputs[4]
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])

_triton.register_autograd(lambda ctx, dout, dlse: (*_triton_backward(dout, *ctx.saved_tensors, ctx.causal), None, None),
                          setup_context=_keep)
