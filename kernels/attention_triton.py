"""The Triton kernels of packed attention. attention_launch.py launches them.

The kernels walk over the keys block by block and never hold a row of scores (FlashAttention,
arXiv 2205.14135 and 2307.08691). With t = log2(e) / sqrt(D) and, per query row, a maximum m, a sum
l (`total` in the code) and a vector a:

    s = t q K_b^T      m' = max(m, max s)      p = 2^(s - m')      c = 2^(m - m')
    l' = c l + sum p   a' = c a + p V_b        at the end: out = a / l,  lse = m + log2(l)

lse is kept for the backward pass:

    p = 2^(s - lse)    delta = dout . out    ds = p * (dout V^T - delta)
    dV = p^T dout      dQ = ds K / sqrt(D)   dK = ds^T Q / sqrt(D)

A program owns a block of rows of one document and one query head; its bounds are scalars from a
small table. dQ is one kernel: a program owns query rows and walks keys. dK and dV are another: a
program owns keys and walks query rows. So there are no atomics, gradients are deterministic, and K
and V are never expanded. The price is that S and dP are computed twice: seven products, not five.

A program first walks its edges: the diagonal of a causal mask, and the last rows of a document
where they are not a whole block. There it loads row by row, reads nothing of a neighbour, and
masks. Then it walks full blocks, in a loop without a mask. Every row of those belongs to the
document, so they are loaded by descriptors of the whole pack (TMA on Hopper), which the CPU makes.

A tile of the ViT has 1 + 1024 tokens. 1025 rows and keys fill 81 pairs of blocks of 128, and 21 %
of that is empty. So where every document is one longer than whole blocks, and nothing is causal,
the first token is folded in: its key enters the starting values (m = s_0, l = 1, a = v_0), and its
own row is a block of 16. That leaves 65 pairs and no edges: one loop, the only shape in which
Triton specialises the warps of the forward kernel. Backward, such documents are many and short
enough that a program owns one, with all its queries and keys: five products, in one kernel.
Compiled for sm_90a and interpreted on a CPU; not timed on a GPU yet.

Shape letters: T tokens of a pack, H query heads, K key/value heads (H is a multiple of K), D head
dim, BM query rows and BN keys of a block.
"""
try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without it
    triton = None
    tl = None

if triton:
    # T is another number in every pack: nothing may be compiled for what it divides by
    jit = triton.jit(do_not_specialize=["T"])
    constexpr = tl.constexpr
else:
    constexpr = None

    def jit(kernel):
        return kernel


# All read a table (blocks, 4): first and last row in the document, its start and end in the pack.
# q_row and the like: elements from one row to the next. lse and delta: (H, T). A name that ends in
# _blocks is a descriptor of all rows of the pack.

@jit
def _rows(x, first, stop, stride, column, B: constexpr, D: constexpr):
    """Rows first.. of x in a block (B, D). Rows from `stop` on are not read: they are 0."""
    rows = tl.arange(0, B)
    place = x + first.to(tl.int64) * stride + column
    place = place + rows[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(place, (first + rows < stop)[:, None], other=0.0)


@jit
def _write(x, block, first, stop, stride, column, B: constexpr, D: constexpr):
    """The counterpart of _rows: rows from `stop` on are not written."""
    rows = tl.arange(0, B)
    place = x + first.to(tl.int64) * stride + column
    place = place + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(place, block.to(x.dtype.element_ty), (first + rows < stop)[:, None])


@jit
def _edge(first, last, length, rows, BN: constexpr, CAUSAL: constexpr):
    """The keys that need a mask -> from which one, up to which, and the last that each row sees."""
    if CAUSAL:
        edge = first
        stop = last
        limit = rows
    else:
        edge = length // BN * BN
        stop = length
        limit = tl.zeros_like(rows) + (length - 1)
    return edge, stop, limit


@jit
def _attend(queries, block_k, block_v, n, limit, m, total, a, scale, BN: constexpr,
            EDGE: constexpr, DOT: constexpr):
    """One block of keys from n on -> m, total, a. A row of an edge sees keys up to its limit."""
    s = tl.dot(queries, block_k.T, input_precision=DOT)  # (BM, BN)
    if EDGE:
        s = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    c = tl.exp2(m - m_new)
    total = total * c + tl.sum(p, 1)
    a = tl.dot(p.to(block_v.dtype), block_v, a * c[:, None], input_precision=DOT)
    return m_new, total, a


@jit
def _forward(q, k, v, k_blocks, v_blocks, k_starts, out, lse, table, T, q_row, k_row, v_row, scale,
             H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
             STEP: constexpr, CAUSAL: constexpr, FOLD: constexpr, DOT: constexpr,
             WARPS: constexpr = 0):
    """One block of query rows of one head -> out, lse."""
    head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    column = head // (H // K) * D
    rows = first + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    a = tl.zeros([BM, D], tl.float32)
    if FOLD:
        begin = 1
        edge = end - start
        # Warp specialisation divides the queries among its warps. It can do that only to a
        # descriptor that is made here: one from the CPU would still load whole blocks.
        queries = tl.make_tensor_descriptor(
            q + start.to(tl.int64) * q_row, [last, H * D], [q_row, 1], [BM, D]
        ).load([first, head * D])
        # The first key by a dot with 16: a loaded vector in a sum stops warp specialisation.
        s_0 = tl.dot(queries, k_starts.load([start, column]).T, input_precision=DOT)  # (BM, 16)
        m = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, s_0, 0.0), 1) * scale
        total += 1.0
        place = v + start.to(tl.int64) * v_row + column + tl.arange(0, D)
        a += tl.load(place).to(tl.float32)[None, :]
    else:
        begin = 0
        queries = _rows(q, start + first, start + last, q_row, head * D, BM, D)
        m = tl.full([BM], float("-inf"), tl.float32)
        edge, stop, limit = _edge(first, last, end - start, rows, BN, CAUSAL)
        for n in tl.range(edge, stop, STEP):
            block_k = _rows(k, start + n, end, k_row, column, STEP, D)
            block_v = _rows(v, start + n, end, v_row, column, STEP, D)
            m, total, a = _attend(
                queries, block_k, block_v, n, limit, m, total, a, scale, STEP, True, DOT)
    for n in tl.range(begin, edge, BN, warp_specialize=WARPS):
        block_k = k_blocks.load([start + n, column])
        block_v = v_blocks.load([start + n, column])
        m, total, a = _attend(
            queries, block_k, block_v, n, rows, m, total, a, scale, BN, False, DOT)
    _write(out, a / total[:, None], start + first, start + last, H * D, head * D, BM, D)
    tl.store(lse + head * T + start + rows, m + tl.log2(total), rows < last)


@jit
def _add_dq(queries, grad, block_k, block_v, n, limit, z, d, a, scale, BN: constexpr,
            EDGE: constexpr, DOT: constexpr):
    """One block of keys from n on -> a, the sum of ds K."""
    s = tl.dot(queries, block_k.T, input_precision=DOT)  # (BM, BN)
    p = tl.exp2(s * scale - z[:, None])
    if EDGE:
        p = tl.where(n + tl.arange(0, BN)[None, :] <= limit[:, None], p, 0.0)
    ds = p * (tl.dot(grad, block_v.T, input_precision=DOT) - d[:, None])
    return tl.dot(ds.to(block_k.dtype), block_k, a, input_precision=DOT)


@jit
def _backward_q(q, k, v, k_blocks, v_blocks, out, dout, lse, delta, dq, table, T,
                q_row, k_row, v_row, dq_row, scale,
                H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
                STEP: constexpr, CAUSAL: constexpr, DOT: constexpr):
    """One block of query rows of one head -> dq, and delta for the kernel of dK and dV."""
    head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    column = head // (H // K) * D
    rows = first + tl.arange(0, BM)
    queries = _rows(q, start + first, start + last, q_row, head * D, BM, D)
    grad = _rows(dout, start + first, start + last, H * D, head * D, BM, D)
    result = _rows(out, start + first, start + last, H * D, head * D, BM, D)
    d = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + head * T + start + rows, d, rows < last)
    z = tl.load(lse + head * T + start + rows, rows < last, other=0.0)
    a = tl.zeros([BM, D], tl.float32)
    edge, stop, limit = _edge(first, last, end - start, rows, BN, CAUSAL)
    for n in tl.range(edge, stop, STEP):
        block_k = _rows(k, start + n, end, k_row, column, STEP, D)
        block_v = _rows(v, start + n, end, v_row, column, STEP, D)
        a = _add_dq(queries, grad, block_k, block_v, n, limit, z, d, a, scale, STEP, True, DOT)
    for n in tl.range(0, edge, BN):
        block_k = k_blocks.load([start + n, column])
        block_v = v_blocks.load([start + n, column])
        a = _add_dq(queries, grad, block_k, block_v, n, rows, z, d, a, scale, BN, False, DOT)
    a *= scale * 0.6931471805599453  # scale holds log2(e), which is 1 / ln(2)
    _write(dq, a, start + first, start + last, dq_row, head * D, BM, D)


@jit
def _add_dkv(block_q, block_g, block_k, block_v, cols, rows, z, d, a_k, a_v, scale,
             EDGE: constexpr, DOT: constexpr):
    """One block of query rows -> a_k and a_v, the sums of ds^T Q and p^T dout."""
    s = tl.dot(block_k, block_q.T, input_precision=DOT)  # (BN, BM)
    p = tl.exp2(s * scale - z[None, :])
    if EDGE:
        p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
    a_v = tl.dot(p.to(block_g.dtype), block_g, a_v, input_precision=DOT)
    ds = p * (tl.dot(block_v, block_g.T, input_precision=DOT) - d[None, :])
    a_k = tl.dot(ds.to(block_q.dtype), block_q, a_k, input_precision=DOT)
    return a_k, a_v


@jit
def _backward_kv(q, k, v, q_blocks, g_blocks, dout, lse, delta, dk, dv, table, T,
                 q_row, k_row, v_row, dk_row, scale,
                 H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
                 STEP: constexpr, CAUSAL: constexpr, DOT: constexpr):
    """One block of keys and one query head -> what this head gives to dk and dv."""
    head = tl.program_id(0)
    block = table + 4 * tl.program_id(1)
    first = tl.load(block)
    last = tl.load(block + 1)
    start = tl.load(block + 2)
    end = tl.load(block + 3)
    column = head // (H // K) * D
    cols = first + tl.arange(0, BN)
    block_k = _rows(k, start + first, start + last, k_row, column, BN, D)
    block_v = _rows(v, start + first, start + last, v_row, column, BN, D)
    z_rows = lse + head * T + start
    d_rows = delta + head * T + start
    a_k = tl.zeros([BN, D], tl.float32)
    a_v = tl.zeros([BN, D], tl.float32)
    # the query rows of the diagonal, then those of the last block if it is not whole
    if CAUSAL:  # earlier queries do not see these keys
        diagonal = tl.minimum(tl.cdiv(end - start - first, STEP), BN // STEP)
        begin = first + BN
    else:
        diagonal = 0
        begin = 0
    whole = tl.maximum(end - start - begin, 0) // BM
    tail = begin + whole * BM
    edges = diagonal + tl.maximum(tl.cdiv(end - start - tail, STEP), 0)
    for i in tl.range(0, edges):
        m = tl.where(i < diagonal, first + i * STEP, tail + (i - diagonal) * STEP)
        rows = m + tl.arange(0, STEP)
        z = tl.load(z_rows + rows, start + rows < end, other=0.0)
        d = tl.load(d_rows + rows, start + rows < end, other=0.0)
        block_q = _rows(q, start + m, end, q_row, head * D, STEP, D)
        block_g = _rows(dout, start + m, end, H * D, head * D, STEP, D)
        a_k, a_v = _add_dkv(
            block_q, block_g, block_k, block_v, cols, rows, z, d, a_k, a_v, scale, CAUSAL, DOT)
    for m in tl.range(begin, tail, BM):
        # m is added to the pointer, not to the numbers of rows: that takes fewer registers
        z = tl.load(z_rows + m + tl.arange(0, BM))
        d = tl.load(d_rows + m + tl.arange(0, BM))
        block_q = q_blocks.load([start + m, head * D])
        block_g = g_blocks.load([start + m, head * D])
        a_k, a_v = _add_dkv(
            block_q, block_g, block_k, block_v, cols, cols, z, d, a_k, a_v, scale, False, DOT)
    a_k *= scale * 0.6931471805599453
    _write(dk, a_k, start + first, start + last, dk_row, head * D, BN, D)
    _write(dv, a_v, start + first, start + last, dk_row, head * D, BN, D)


@jit
def _first_row(x, start, row, column, D: constexpr):
    """The first row of a document in fp32, (1, D)."""
    place = x + start.to(tl.int64) * row + column + tl.arange(0, D)
    return tl.load(place).to(tl.float32)[None, :]


@jit
def _backward_whole(q, k, v, q_blocks, g_blocks, k_blocks, v_blocks, out, dout, lse, delta, sums,
                    k_sums, v_sums, dq, dk, dv, table, T, q_row, k_row, v_row, dq_row, dk_row,
                    scale,
                    H: constexpr, K: constexpr, D: constexpr, BM: constexpr, BN: constexpr,
                    CHUNK: constexpr, DOT: constexpr):
    """A whole document and one query head -> dq, dk, dv, with five products a block, not seven.

    The document is one longer than blocks of 128. Keys are walked in the outer loop, queries in the
    inner one. sums, k_sums, v_sums (H, T, D), fp32, hold dq, dk and dv until they are whole. Only
    this program adds to its rows, always in the same order.
    """
    head = tl.program_id(0)
    start = tl.load(table + 4 * tl.program_id(1) + 2)
    end = tl.load(table + 4 * tl.program_id(1) + 3)
    length = end - start
    column = head // (H // K) * D
    z_rows = lse + head * T + start
    d_rows = delta + head * T + start
    sums_0 = sums + (head * T + start).to(tl.int64) * D
    place_0 = sums_0 + tl.arange(0, D)[None, :]
    STEP: constexpr = 2 * BM  # of what only moves memory
    to_gradient = scale * 0.6931471805599453  # scale holds log2(e), which is 1 / ln(2)

    # the first key and the first query meet
    q_0 = _first_row(q, start, q_row, head * D, D)
    k_0 = _first_row(k, start, k_row, column, D)
    v_0 = _first_row(v, start, v_row, column, D)
    g_0 = _first_row(dout, start, H * D, head * D, D)
    z_0 = tl.load(z_rows)
    d_0 = tl.sum(g_0 * _first_row(out, start, H * D, head * D, D), 1)
    p_00 = tl.exp2(tl.sum(q_0 * k_0, 1) * scale - z_0)
    ds_00 = p_00 * (tl.sum(g_0 * v_0, 1) - d_0)
    tl.store(d_rows + tl.arange(0, 1), d_0)
    tl.store(place_0, ds_00[:, None] * k_0)
    dk_0 = ds_00[:, None] * q_0
    dv_0 = p_00[:, None] * g_0

    # the first key and all other queries
    for m in tl.range(1, length, STEP):
        rows = m + tl.arange(0, STEP)
        block_q = _rows(q, start + m, end, q_row, head * D, STEP, D).to(tl.float32)
        block_g = _rows(dout, start + m, end, H * D, head * D, STEP, D).to(tl.float32)
        result = _rows(out, start + m, end, H * D, head * D, STEP, D).to(tl.float32)
        d = tl.sum(block_g * result, 1)
        tl.store(d_rows + rows, d)
        p = tl.exp2(tl.sum(block_q * k_0, 1) * scale - tl.load(z_rows + rows))
        ds = p * (tl.sum(block_g * v_0, 1) - d)
        dk_0 += tl.sum(ds[:, None] * block_q, 0)[None, :]
        dv_0 += tl.sum(p[:, None] * block_g, 0)[None, :]
        _write(sums, ds[:, None] * k_0, head * T + start + m, head * T + end, D, 0, STEP, D)
    _write(dk, dk_0 * to_gradient, start, end, dk_row, head * D, 1, D)
    _write(dv, dv_0, start, end, dk_row, head * D, 1, D)

    # A chunk of queries at a time, whose rows of q, dout and sums stay in the cache (L2) until all
    # keys have met them.
    for chunk in tl.range(1, length, CHUNK):
        chunk_end = tl.minimum(chunk + CHUNK, length)
        for n in tl.range(1, length, BN):
            # what was written above or in the round before is read by other threads
            tl.debug_barrier()
            block_k = k_blocks.load([start + n, column])
            block_v = v_blocks.load([start + n, column])
            # the first query and these keys, before the first chunk
            dq_0 = tl.load(place_0)
            q_0 = _first_row(q, start, q_row, head * D, D)
            g_0 = _first_row(dout, start, H * D, head * D, D)
            rows_k = block_k.to(tl.float32)
            p_0 = tl.exp2(tl.sum(rows_k * q_0, 1) * scale - tl.load(z_rows))
            p_0 = tl.where(chunk == 1, p_0, 0.0)
            ds_0 = p_0 * (tl.sum(block_v.to(tl.float32) * g_0, 1) - tl.load(d_rows))
            dq_0 += tl.sum(ds_0[:, None] * rows_k, 0)[None, :]
            tl.debug_barrier()  # all threads have read it
            tl.store(place_0, dq_0)
            # dk and dv of the chunks before
            key = head * T + start + n
            stop = tl.where(chunk == 1, key, key + BN)
            a_k = _rows(k_sums, key, stop, D, 0, BN, D) + ds_0[:, None] * q_0
            a_v = _rows(v_sums, key, stop, D, 0, BN, D) + p_0[:, None] * g_0
            for m in tl.range(chunk, chunk_end, BM):
                z = tl.load(z_rows + m + tl.arange(0, BM))
                block_q = q_blocks.load([start + m, head * D])
                block_g = g_blocks.load([start + m, head * D])
                s = tl.dot(block_k, block_q.T, input_precision=DOT)  # (BN, BM)
                p = tl.exp2(s * scale - z[None, :])
                dp = tl.dot(block_v, block_g.T, input_precision=DOT)
                a_v = tl.dot(p.to(block_g.dtype), block_g, a_v, input_precision=DOT)
                d = tl.load(d_rows + m + tl.arange(0, BM))
                ds = (p * (dp - d[None, :])).to(block_q.dtype)
                a_k = tl.dot(ds, block_q, a_k, input_precision=DOT)
                place = sums_0 + m * D + (tl.arange(0, BM)[:, None] * D + tl.arange(0, D)[None, :])
                a = tl.dot(ds.T, block_k, tl.load(place), input_precision=DOT)
                tl.store(place, a)
            if chunk_end < length:
                _write(k_sums, a_k, key, key + BN, D, 0, BN, D)
                _write(v_sums, a_v, key, key + BN, D, 0, BN, D)
            else:
                _write(dk, a_k * to_gradient, start + n, end, dk_row, head * D, BN, D)
                _write(dv, a_v, start + n, end, dk_row, head * D, BN, D)

    tl.debug_barrier()  # as above
    _write(dq, tl.load(place_0) * to_gradient, start, end, dq_row, head * D, 1, D)
    for m in tl.range(1, length, STEP):
        a = _rows(sums, head * T + start + m, head * T + end, D, 0, STEP, D)
        _write(dq, a * to_gradient, start + m, end, dq_row, head * D, STEP, D)
