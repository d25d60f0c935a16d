"""The language model's head and its cross-entropy in one: logits are never whole in memory.

    z = h W^T     loss = sum_r w_r (logsumexp_v z_rv - z_r,label(r))
    dz_rv = w_r (softmax_v z_rv - [v = label(r)])

The loss is the last thing a forward pass does. So its gradients dh = dz W and dW = dz^T h can be
made at once, chunk by chunk of rows, while the logits of the chunk are there. That makes three
matmuls in all, or two with a frozen head. The backward pass has none: it only multiplies by the
gradient that comes in (loss scaling). What stays in between is dh and, if the head trains, dW in
fp32, added up over the chunks: a plain backward pass would make them a moment later. On CUDA a
Triton kernel turns the logits of a chunk into dz in place; elsewhere PyTorch does the same.

Shape letters: R rows (supervised positions), C width, V vocabulary.
"""
import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without it
    triton = None
    tl = None

LOGITS_AT_ONCE = 160 * 2**20  # 1,024 rows of a vocabulary of 152 k, 0.3 GB in bf16

if triton:
    jit = triton.jit
    constexpr = tl.constexpr
else:
    constexpr = None

    def jit(kernel):
        return kernel


def linear_cross_entropy(h, weight, labels, weights=None):
    """Sum over the rows of weight times cross-entropy: a scalar, fp32 (fp64 for fp64).

    h (R, C), in the dtype of the matmuls; weight (V, C), a plain tensor, not a sharded one; labels
    (R,) int64 in 0..V-1; weights (R,) or None, a constant. One backward pass per forward: a second
    one raises RuntimeError.
    """
    if weights is None:
        weights = torch.ones_like(labels)
    weights = weights.to(torch.promote_types(h.dtype, torch.float32))
    grad = torch.is_grad_enabled()
    trains_h = grad and h.requires_grad
    trains_weight = grad and weight.requires_grad
    return _LinearCrossEntropy.apply(h, weight, labels, weights, trains_h, trains_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, weights, trains_h, trains_weight):
        W = weight.to(h.dtype)
        loss = weights.new_zeros(())
        dh = None
        dW = None
        if trains_h:
            dh = torch.empty_like(h)
        if trains_weight:
            dW = torch.zeros(weight.shape, dtype=weights.dtype, device=h.device)
        to_gradient = _by_triton if h.is_cuda and triton else _by_pytorch

        step = rows_at_once(len(weight))
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, len(h), step):
                part = slice(start, start + step)
                z = h[part] @ W.T  # (rows of the chunk, V)
                loss += to_gradient(z, labels[part], weights[part])  # z is dz from here on
                if trains_h:
                    torch.mm(z, W, out=dh[part])
                if trains_weight and z.dtype == dW.dtype:
                    dW.addmm_(z.T, h[part])
                elif trains_weight:
                    dW.add_(z.T @ h[part])
                del z  # before the next chunk is there
        if trains_weight:
            dW = dW.to(weight.dtype)
        ctx.save_for_backward(dh, dW)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        # In place, because dW may be a gigabyte. If somebody asks for the gradients again, autograd
        # notices that what it saved was changed.
        dh, dW = ctx.saved_tensors
        if dh is not None:
            dh.mul_(scale)
        if dW is not None:
            dW.mul_(scale)
        return dh, dW, None, None, None, None


def rows_at_once(V):
    """Rows of a chunk: at least one, and whole blocks of 128 if there are that many."""
    rows = LOGITS_AT_ONCE // V
    if rows >= 128:
        rows -= rows % 128
    return max(1, rows)


def _by_pytorch(z, labels, weights):
    """Logits z (rows, V) become dz in place -> the summed loss of the rows."""
    x = z.to(weights.dtype)  # z itself if it is wide already
    label_places = (torch.arange(len(z), device=z.device), labels)
    x.sub_(x.amax(1, keepdim=True))
    picked = x[label_places]
    x.exp_()
    total = x.sum(1, keepdim=True)  # (rows, 1)
    x.div_(total)
    x[label_places] -= 1
    x.mul_(weights[:, None])
    if x is not z:
        z.copy_(x)
    return ((total[:, 0].log() - picked) * weights).sum()


def _by_triton(z, labels, weights):
    """The same with the kernel below."""
    n_rows, V = z.shape
    losses = torch.empty(n_rows, dtype=torch.float32, device=z.device)
    if n_rows:
        grid = (n_rows,)
        _to_gradient[grid](z, labels, weights, losses, V, z.stride(0), BLOCK=4096, num_warps=8)
    return losses.sum()


@jit
def _to_gradient(z, labels, weights, losses, V, row, BLOCK: constexpr):
    """One row of logits, read twice (the second time from the cache) and written once.

    row: elements from one row to the next.
    """
    r = tl.program_id(0)
    z += r.to(tl.int64) * row
    label = tl.load(labels + r)
    weight = tl.load(weights + r)
    picked = tl.load(z + label).to(tl.float32)
    m = float("-inf")
    total = 0.0
    for i in tl.range(0, V, BLOCK):
        cols = i + tl.arange(0, BLOCK)
        x = tl.load(z + cols, cols < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 0))
        total = total * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0)
        m = m_new
    tl.store(losses + r, (m + tl.log(total) - picked) * weight)
    for i in tl.range(0, V, BLOCK):
        cols = i + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(z + cols, cols < V, other=0.0).to(tl.float32) - m) / total
        tl.store(z + cols, tl.where(cols == label, p - 1, p) * weight, cols < V)
