"""The language model's head and its cross-entropy in one: logits are never whole in memory, nor computed twice.

    z = h W^T     loss = sum_r w_r (logsumexp_v z_rv - z_r,label(r))     dz_rv = w_r (softmax_v z_rv - [v = label(r)])

The loss is the last thing a forward pass does, so its gradients dh = dz W and dW = dz^T h can be made at once, chunk by
chunk of rows, while the logits of the chunk are there: three matmuls in all, two with a frozen head, and none in the
backward pass, which only multiplies by the gradient that comes in (loss scaling). What stays in between is dh and, if
the head trains, dW in fp32, added up over the chunks: a plain backward pass would make them a moment later. On CUDA a
Triton kernel turns the logits of a chunk into dz in place; elsewhere PyTorch does the same.

Shape letters: R rows (supervised positions), C width, V vocabulary.
"""
import torch
from torch.autograd.function import once_differentiable

try:
    import triton, triton.language as tl
except ImportError:                                             # PyTorch for the CPU comes without it
    triton = tl = None

CHUNK = 160 * 2 ** 20           # logits held at once: 1,024 rows of a vocabulary of 152 k, 0.3 GB in bf16

def linear_cross_entropy(h, weight, labels, weights=None):
    """Sum over the rows of weight times cross-entropy: a scalar, fp32 (fp64 for fp64). h (R, C), in the dtype of the
    matmuls; weight (V, C), a plain tensor, not a sharded one; labels (R,) int64 in 0..V-1; weights (R,) or None, a
    constant. One backward pass per forward: a second one raises RuntimeError."""
    grad, weights = torch.is_grad_enabled(), torch.ones_like(labels) if weights is None else weights
    weights = weights.to(torch.promote_types(h.dtype, torch.float32))
    trains = (grad and h.requires_grad, grad and weight.requires_grad)
    return _LinearCrossEntropy.apply(h, weight, labels, weights, *trains)

class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, labels, weights, trains_h, trains_weight):
        R, W, step = len(h), weight.to(h.dtype), CHUNK // len(weight)
        step = step // 128 * 128 or step or 1                   # matmuls like whole blocks of rows
        loss = weights.new_zeros(())
        dh = torch.empty_like(h) if trains_h else None
        dW = torch.zeros(weight.shape, dtype=weights.dtype, device=h.device) if trains_weight else None
        to_gradient = _by_triton if h.is_cuda and triton else _by_pytorch
        with torch.autocast(h.device.type, enabled=False):
            for part in (slice(i, i + step) for i in range(0, R, step)):
                z = h[part] @ W.T                                                   # (rows of the chunk, V)
                loss += to_gradient(z, labels[part], weights[part])                 # z is dz from here on
                if trains_h:
                    torch.mm(z, W, out=dh[part])
                if trains_weight:
                    dW.addmm_(z.T, h[part]) if z.dtype == dW.dtype else dW.add_(z.T @ h[part])
                del z                                           # before the next chunk is there
        ctx.save_for_backward(dh, None if dW is None else dW.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        # in place, for dW may be a gigabyte; should anyone ask again, autograd sees that what it saved was changed
        return *(None if x is None else x.mul_(scale) for x in ctx.saved_tensors), None, None, None, None

def _by_pytorch(z, labels, weights):
    """Logits z (rows, V) become dz in place -> the summed loss of the rows."""
    x, at = z.to(weights.dtype), (torch.arange(len(z), device=z.device), labels)    # a view if z is wide already
    x.sub_(x.amax(1, keepdim=True))
    picked = x[at]
    x.exp_()
    total = x.sum(1, keepdim=True)                                                  # (rows, 1)
    x.div_(total)
    x[at] -= 1
    x.mul_(weights[:, None])
    if x is not z:
        z.copy_(x)
    return ((total[:, 0].log() - picked) * weights).sum()

def _by_triton(z, labels, weights):
    """The same with the kernel below."""
    losses = torch.empty(len(z), dtype=torch.float32, device=z.device)
    if len(z):
        _to_gradient[(len(z),)](z, labels, weights, losses, z.shape[1], z.stride(0), BLOCK=4096, num_warps=8)
    return losses.sum()

jit, constexpr = (triton.jit, tl.constexpr) if triton else (lambda f: f, None)

@jit
def _to_gradient(z, labels, weights, losses, V, row, BLOCK: constexpr):
    """One row of logits, read twice (the second time from the cache) and written once. row: elements between rows."""
    r = tl.program_id(0)
    z += r.to(tl.int64) * row
    label, weight = tl.load(labels + r), tl.load(weights + r)
    picked, m, total = tl.load(z + label).to(tl.float32), float("-inf"), 0.0
    for i in tl.range(0, V, BLOCK):
        x = tl.load(z + i + tl.arange(0, BLOCK), i + tl.arange(0, BLOCK) < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, 0))
        total, m = total * tl.exp(m - m_new) + tl.sum(tl.exp(x - m_new), 0), m_new
    tl.store(losses + r, (m + tl.log(total) - picked) * weight)
    for i in tl.range(0, V, BLOCK):
        cols = i + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(z + cols, cols < V, other=0.0).to(tl.float32) - m) / total
        tl.store(z + cols, tl.where(cols == label, p - 1, p) * weight, cols < V)
