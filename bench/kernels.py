"""Rows of `attn` and `ce`: our kernels beside PyTorch's own and the packages people install.

Shape letters: T tokens of a pack, S documents, L longest document, H query heads, K key/value
heads, D head dim, R supervised rows, C width, V vocabulary.
"""
import contextlib
import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.measure import compare_sides, largest_error, refuse_larger_error
from kernels import attention, cross_entropy, varlen


@dataclass(slots=True)
class AttentionShape:
    lengths: list  # tokens of each document
    n_heads: int  # H
    n_kv_heads: int  # K
    head_dim: int  # D
    causal: bool


LENGTHS_DEMO = [60, 45, 110, 80, 75, 62, 51, 97, 70, 55, 48, 47]
LENGTHS_MIXED_8K = [700, 3000, 1024, 1500, 1968]
LENGTHS_MIXED_16K = [700, 3000, 1024, 1500, 4096, 2992, 2048, 1024]
ATTENTION_SHAPES_CPU = {
    "vit_1025": AttentionShape([1025] * 2, 4, 4, 64, False),
    "vit_demo": AttentionShape([37] * 40, 6, 6, 32, False),
    "llm_demo": AttentionShape(LENGTHS_DEMO, 4, 2, 32, True),
    "llm_1k": AttentionShape([500, 300, 224], 12, 2, 128, True),
}
ATTENTION_SHAPES_CUDA = {
    # packs of 8k with their 32 tiles, which the configs train on, and of 16k
    "vit_1024": AttentionShape([1024] * 32, 16, 16, 64, False),
    "vit_1025": AttentionShape([1025] * 32, 16, 16, 64, False),
    "llm_2b_8k": AttentionShape([2048] * 4, 12, 2, 128, True),
    "llm_2b_8k_mixed": AttentionShape(LENGTHS_MIXED_8K, 12, 2, 128, True),
    "llm_2b_8k_one": AttentionShape([8192], 12, 2, 128, True),
    "llm_8b_8k": AttentionShape([2048] * 4, 28, 4, 128, True),
    "llm_2b_16k": AttentionShape([2048] * 8, 12, 2, 128, True),
    "llm_2b_16k_mixed": AttentionShape(LENGTHS_MIXED_16K, 12, 2, 128, True),
}


def sdpa_sides(lengths, causal):
    """{name: f(q, k, v)} of PyTorch's default, for q (T, H, D), k and v (T, K, D)."""
    S = len(lengths)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)

    def as_batch(*qkv):
        batch = [x.unflatten(0, (S, -1)).transpose(1, 2) for x in qkv]  # (S, heads, L, D)
        return sdpa(*batch).transpose(1, 2).flatten(0, 1)

    def document_by_document(*qkv):
        split = [x.transpose(0, 1).split(lengths, 1) for x in qkv]  # (heads, length, D) each
        parts = [sdpa(q[None], k[None], v[None])[0] for q, k, v in zip(*split, strict=True)]
        return torch.cat(parts, 1).transpose(0, 1)

    if len(set(lengths)) == 1:
        return {"sdpa": as_batch}
    return {"sdpa, a loop": document_by_document}


def flex_side(lengths, causal, device):
    """f(q, k, v) of FlexAttention, compiled, with the block mask of these documents."""
    # or it would run eagerly after eight graphs
    torch._dynamo.reset()
    S = len(lengths)
    T = sum(lengths)
    document = torch.repeat_interleave(torch.arange(S), torch.tensor(lengths)).to(device)

    def visible(b, h, i, j):
        same = document[i] == document[j]
        return same & (i >= j) if causal else same

    mask = create_block_mask(visible, None, None, T, T, device)
    flex = torch.compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=True))
    return lambda *qkv: flex(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)


def varlen_sides(lengths, causal, device):
    """{name: f(q, k, v)} of the packed kernels that are installed."""
    L = max(lengths)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    # PyTorch's own, of flash-attn 2
    sides = {"varlen": lambda *qkv: varlen.attend_varlen(*qkv, ends, L, causal)}
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_varlen_func as flash_3
        sides["flash-attn 3"] = lambda *qkv: flash_3(*qkv, ends, ends, L, L, causal=causal)
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_varlen_func as flash_2
        sides["flash-attn"] = lambda *qkv: flash_2(*qkv, ends, ends, L, L, causal=causal)
    return sides


def attention_sides(lengths, causal, device):
    """{name: f(q, k, v)} of packed q (T, H, D), k and v (T, K, D). The second runs everywhere."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    L = max(lengths)
    sides = {"ours": lambda *qkv: attention.attention(*qkv, cu_seqlens, L, causal)}
    sides |= sdpa_sides(lengths, causal)
    if device.type == "cuda":
        if "sdpa" in sides:
            sides["sdpa, cudnn"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sides["sdpa"])
        sides["flex"] = flex_side(lengths, causal, device)
        sides |= varlen_sides(lengths, causal, device)
    return sides


def run_attention(function, qkv, dout, dtype):
    """-> [output, gradients of q, k, v], and a function that makes these gradients again."""
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
    out = function(*inputs)
    dout = dout.to(dtype)
    backward = functools.partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
    return [out.detach(), *backward()], backward


def attention_rows(cfg, device, name, shape):
    """TFLOP/s of forward and backward, once each side agrees with the exact result."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    T = sum(shape.lengths)
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)
    *qkv, dout = [torch.randn(T, n, shape.head_dim, device=device, dtype=dtype) for n in heads]
    sides = attention_sides(shape.lengths, shape.causal, device)
    reference = list(sides.values())[1]
    exact_dtype = torch.float32 if device.type == "cuda" else torch.float64
    exact, _ = run_attention(reference, qkv, dout, exact_dtype)

    forwards = {}
    backwards = {}
    errors = {}
    for side, function in sides.items():
        try:
            results, backward = run_attention(function, qkv, dout, dtype)
        except Exception as e:
            # a library that is built for other machines
            reason = str(e).strip().splitlines()[0][:150]
            print(f"{name}: {side} does not run here: {reason}", flush=True)
            continue
        errors[side] = largest_error(results, exact)
        forwards[side] = functools.partial(torch.no_grad()(function), *qkv)
        backwards[side] = backward
    refuse_larger_error(errors)

    # only the pairs that a query sees; the backward pass has five matmuls where the forward has two
    if shape.causal:
        pairs = sum(n * (n + 1) // 2 for n in shape.lengths)
    else:
        pairs = sum(n * n for n in shape.lengths)
    tflop = 4 * shape.head_dim * shape.n_heads * pairs / 1e12
    for mode, mode_sides, work in (("fwd", forwards, tflop), ("bwd", backwards, 2.5 * tflop)):
        rows = compare_sides(f"{name}_{mode}", mode_sides, cfg.rounds, device, work, "TFLOP/s")
        for row in rows:
            yield row | dict(error=errors["ours"], peer_error=errors[row["peer"]])


# ---- head and loss -------------------------------------------------------------------------------


def plain_head_loss(h, weight, labels):
    """All logits at once: h (R, C), weight (V, C), labels (R,)."""
    return F.cross_entropy((h @ weight.to(h.dtype).T).float(), labels, reduction="sum")


def extra_memory_mb(function):
    """Peak of one call on top of what is allocated, gradients included, in MB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def head_loss_rows(cfg, device, name, trains):
    """Head, loss and gradients; trains: the head's weight needs a gradient too."""
    if device.type == "cuda":
        R = 4096
        C = 1536
        V = 151936
        dtype = torch.bfloat16
    else:
        R = 1024
        C = 384
        V = 16384
        dtype = torch.float32
    h = torch.randn(R, C, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (R,), device=device)
    weight = (0.02 * torch.randn(V, C, device=device)).to(torch.float32 if trains else dtype)
    weight.requires_grad_(trains)
    inputs = [h, weight] if trains else [h]

    def gradients_of(loss):
        return lambda: torch.autograd.grad(loss(h, weight, labels) / R, inputs)

    sides = {"ours": gradients_of(cross_entropy.linear_cross_entropy),
             "plain": gradients_of(plain_head_loss)}
    wide = [x.detach().double().requires_grad_() for x in inputs]
    wide_weight = wide[1] if trains else weight.double()
    exact = torch.autograd.grad(plain_head_loss(wide[0], wide_weight, labels) / R, wide)
    errors = {side: largest_error(function(), exact) for side, function in sides.items()}
    refuse_larger_error(errors)
    del wide, wide_weight, exact

    row, = compare_sides(name, sides, cfg.rounds, device, 1.0, "steps/s")
    row |= dict(error=errors["ours"], peer_error=errors["plain"])
    if device.type == "cuda":
        for side, function in sides.items():
            row[f"{side}_mb"] = extra_memory_mb(function)
    yield row
