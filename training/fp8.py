"""--dtype=fp8: the linear layers of the blocks multiply 8-bit floats, as nanochat's fp8.py does.

Each tensor is divided by a scale of its own, so that its largest entry becomes the largest number
of the format: e4m3 (3 bits of mantissa) for inputs and weights, e5m2 (2 bits, but a wider range)
for gradients. Sums are fp32, results 16 bits. All else is as with bfloat16, fp32 weights included.
"""
import torch
import torch.nn.functional as F

from training.distributed import blocks_of, say
from vision import Linear

MULTIPLE = 16  # a GPU multiplies 8-bit matrices whose sizes are multiples of this
SMALLEST = 128  # in smaller layers the scales cost more than the products save


def quantize(x, dtype):
    """x -> (x / scale in 8 bits, scale). What is not finite becomes NaN, so the step is skipped."""
    scale = x.abs().amax().float() / torch.finfo(dtype).max  # on x's device: nobody waits for it
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # for a tensor of zeros
    return (x.float() / scale).to(dtype), scale


def transposed(x):
    """x (T, C) -> (C, T) in memory, with zeros behind until T is a multiple of MULTIPLE."""
    return F.pad(x.t(), (0, -len(x) % MULTIPLE)).contiguous()


def product(a, a_scale, b, b_scale, dtype, fast=False):
    """a (M, K) and b (N, K) in 8 bits -> a b^T (M, N) in `dtype`; fast: sums a bit less exact."""
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)


class _Matmul(torch.autograd.Function):
    """x (T, inputs), weight (outputs, inputs) -> (T, outputs) in bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        x8 = quantize(x, torch.float8_e4m3fn)
        weight8 = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(*x8, *weight8)
        ctx.dtypes = (x.dtype, weight.dtype)
        return product(*x8, *weight8, torch.bfloat16, fast=True)

    @staticmethod
    def backward(ctx, gradient):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        g8, g_scale = quantize(gradient, torch.float8_e5m2)
        of_x = None
        of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(g8, g_scale, weight8.t().contiguous(), weight_scale, ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_weight = product(transposed(g8), g_scale, transposed(x8), x_scale, ctx.dtypes[1])
        return of_x, of_weight


def linear(x, weight, bias):
    """F.linear in 8 bits."""
    if len(x) == 0:  # there is no largest entry
        return F.linear(x, weight, bias)
    y = _Matmul.apply(x, weight)
    return y if bias is None else y + bias.to(y.dtype)


def use_fp8(model, name, dist):
    """If --dtype is fp8, let the blocks multiply in 8 bits where sizes allow it, and say where."""
    if name != "fp8":
        return
    layers = [m for block in blocks_of(model) for m in block.modules() if isinstance(m, Linear)]
    chosen = [m for m in layers
              if min(m.weight.shape) >= SMALLEST and not any(n % MULTIPLE for n in m.weight.shape)]
    if not chosen:
        raise ValueError(f"--dtype=fp8: no linear layer has sizes of at least {SMALLEST} that are "
                         f"multiples of {MULTIPLE}; set --dtype=bfloat16")
    for layer in chosen:
        layer.multiply = linear
    say(dist, f"fp8: {len(chosen)} of {len(layers)} linear layers of the blocks")
