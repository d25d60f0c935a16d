"""Copies of fp32 weights in the 16 bits of the arithmetic, made once a step, for compiled blocks.

A compiled block would make them in every micro-batch, and once more where activations are computed
again, and cast each gradient to fp32 before it is added. Here the gradient of a copy is added to
that of its weight in one pass, with the same bits. FSDP has copies of its own.
"""
import torch
from torch.distributed.tensor import DTensor

from vision import Linear


class _Copy(torch.autograd.Function):
    """weight -> its copy. The backward pass may run any number of times, once a micro-batch."""

    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.weight = weight
        return weight.to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.weight
        if weight.grad is None:
            return gradient.to(weight.dtype), None
        # Autograd is left nothing to add. It still tells DDP that this gradient is there.
        weight.grad.add_(gradient)
        return None, None


def copy_weights(model, dtype):
    """Give the linear layers that train copies in `dtype`. Call it when the weights are there.

    -> (weights, their copies), two lists for refresh_copies.
    """
    weights = []
    copies = []
    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        for name, p in layer.named_parameters(recurse=False):
            if p.requires_grad and p.dtype != dtype and not isinstance(p, DTensor):
                copy = _Copy.apply(p, dtype)
                # What was computed first comes last in a backward pass. All gradients of copies
                # would wait for its end, and with them the sums of DDP.
                copy.grad_fn._set_sequence_nr(2**62)
                # To torch.compile its sizes are numbers, as those of a parameter are.
                torch._dynamo.mark_static(copy)
                setattr(layer, f"{name}_copy", copy)
                weights.append(p)
                copies.append(copy)
    return weights, copies


@torch.no_grad()
def refresh_copies(weights, copies):
    """Bring the copies up to date, after the optimizer has changed the weights."""
    if copies:
        torch._foreach_copy_(copies, weights)
