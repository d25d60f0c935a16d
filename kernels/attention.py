"""Packed attention: many documents laid end to end in one row of tokens, none sees another.

    out_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j

over the keys j of the same document (causal: j <= i). There are four paths to it:
    triton      16-bit numbers on CUDA: the kernels of attention_triton.py
    sdpa        elsewhere: documents of similar length as a batch of PyTorch's own attention
    varlen      16-bit numbers on CUDA: PyTorch's own kernel for packs, if it is asked for
    reference   the definition, for tests
The environment variable ATTENTION=reference|sdpa|triton|varlen overrides the choice.

Shape letters: T tokens of a pack, H query heads, K key/value heads (H is a multiple of K), D head
dim, S documents (samples, or tiles in the ViT), L tokens of the longest document of a group.
cu_seqlens (S+1,) int32 holds the borders, 0 and T included; keep it on the CPU when you can.
"""
import functools
import importlib.util
import itertools
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from kernels import attention_launch

SHORT_DOCUMENT = 128  # on a CPU, up to this length two batched matmuls are faster than SDPA


def attention(q, k, v, cu_seqlens, max_seqlen, causal):
    """Softmax attention inside each document, scale 1/sqrt(D).

    q (T, H, D), k and v (T, K, D) -> (T, H, D). max_seqlen: the longest document, a plain int.
    causal: position i sees 0..i of its own document. What a document gets does not depend on what
    the others hold, to the last bit. Triton needs D to be a power of two from 16 to 256.
    """
    H = q.shape[1]
    K = k.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads do not divide over {K} key/value heads")
    against = attention_launch.reason_against(q.shape[2])
    path = os.environ.get("ATTENTION")
    if not path:
        path = "triton" if q.is_cuda and q.element_size() == 2 and not against else "sdpa"

    if path == "triton" and against:
        raise ValueError(f"ATTENTION=triton: {against}")
    if path == "varlen" and not (q.is_cuda and q.element_size() == 2):
        raise ValueError(
            f"ATTENTION=varlen: {q.dtype} on {q.device.type}, but it needs bfloat16 on a CUDA GPU; "
            "use --attention=auto")
    if path not in ("triton", "varlen", *PYTORCH_PATHS):
        raise ValueError(
            f"ATTENTION={path!r} is not a known path; use reference, sdpa, triton or varlen")
    if path == "varlen":
        # It brings the compiler, most of a second: only who asks for it waits.
        from kernels.varlen import attend_varlen
        return attend_varlen(q, k, v, cu_seqlens, max_seqlen, causal)

    # torch.compile has to see a single operation. The borders of documents are data: if they were
    # traced, every new pack would compile anew.
    if path == "triton" or torch.compiler.is_compiling():
        out, lse = _operation(q, k, v, cu_seqlens, causal, path)
        return out
    return PYTORCH_PATHS[path](q, k, v, cu_seqlens, max_seqlen, causal)


def choose_attention(path, device):
    """Take this path from now on (--attention); auto leaves the choice to attention()."""
    if path == "auto":
        return
    if path in ("triton", "varlen") and device.type != "cuda":
        raise ValueError(f"--attention={path} needs a CUDA GPU; on a {device.type} use auto")
    os.environ["ATTENTION"] = path
    installed = importlib.util.find_spec("flash_attn_interface")
    if path == "varlen" and installed and torch.cuda.get_device_capability(device) == (9, 0):
        activate_flash_attention_impl("FA3")


# ---- reference: the definition, one document at a time -------------------------------------------

def _reference(q, k, v, cu_seqlens, max_seqlen, causal):
    groups = q.shape[1] // k.shape[1]
    out = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        Q = q[start:end].transpose(0, 1)  # (H, L, D)
        K = k[start:end].transpose(0, 1).repeat_interleave(groups, 0)  # (H, L, D)
        V = v[start:end].transpose(0, 1).repeat_interleave(groups, 0)  # (H, L, D)
        scores = Q @ K.transpose(1, 2) * q.shape[2] ** -0.5  # (H, L, L)
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        out.append((scores.softmax(-1) @ V).transpose(0, 1))  # (L, H, D)
    return torch.cat(out)


# ---- sdpa: documents of similar length as one right-padded batch ---------------------------------

def _sdpa(q, k, v, cu_seqlens, max_seqlen, causal):
    T, H, D = q.shape
    if q.is_cuda and not os.environ.get("ATTENTION"):
        against = attention_launch.reason_against(D)
        _warn_slow(against or f"{q.dtype} has no tensor cores to run on")

    S = len(cu_seqlens) - 1
    if T == S * max_seqlen:  # all equally long (the ViT): views only
        shape = (S, max_seqlen, -1, D)
        out = _batched(q.view(shape), k.view(shape), v.view(shape), causal)
        return out.reshape(T, H, D)

    gather, scatter, groups = _plan(tuple(cu_seqlens.tolist()), causal, q.device)
    rows = [n_documents * length for n_documents, length in groups]
    q_groups = q.index_select(0, gather).split(rows)
    k_groups = k.index_select(0, gather).split(rows)
    v_groups = v.index_select(0, gather).split(rows)
    out = []
    for i, (n_documents, length) in enumerate(groups):
        shape = (n_documents, length, -1, D)
        part = _batched(q_groups[i].view(shape), k_groups[i].view(shape),
                        v_groups[i].view(shape), causal)
        out.append(part.reshape(-1, H, D))
    out = out[0] if len(out) == 1 else torch.cat(out)
    return out.index_select(0, scatter)  # (T, H, D)


@functools.cache  # once per reason
def _warn_slow(reason):
    print(f"WARNING: SLOW ATTENTION: {reason}; PyTorch's own runs instead",
          file=sys.stderr, flush=True)


def _batched(q, k, v, causal):
    """q (S, L, H, D), k and v (S, L, K, D) -> (S, L, H, D)."""
    S, L, H, D = q.shape
    K = k.shape[2]
    if L > SHORT_DOCUMENT or q.is_cuda:
        dtype = q.dtype
        if not q.is_cuda:  # SDPA's backward on a CPU is several times slower in bf16 than in fp32
            q = q.float()
            k = k.float()
            v = v.float()
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                is_causal=causal, enable_gqa=H != K)
        return out.transpose(1, 2).to(dtype)

    # The H/K query heads that share a key head are stacked along the length. So k and v are not
    # copied for each of them.
    q = q.transpose(1, 2).reshape(S * K, H // K * L, D)
    k = k.transpose(1, 2).reshape(S * K, L, D)
    v = v.transpose(1, 2).reshape(S * K, L, D)
    mask = _mask(L, H // K, causal, q.dtype).expand(S * K, -1, -1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)  # (S*K, H/K*L, L)
    out = torch.bmm(scores.softmax(-1).to(v.dtype), v)  # (S*K, H/K*L, D)
    return out.view(S, H, L, D).transpose(1, 2)


# What is cached during an evaluation may later be saved for a backward pass, which refuses
# tensors of inference mode. Hence inference_mode(False), here and below.
@functools.lru_cache(64)
@torch.inference_mode(False)
def _mask(L, groups, causal, dtype):
    """What is added to the scores, (1, groups*L, L): 0, and -inf in the future.

    Without a causal mask it is a single 0, (1, 1, 1).
    """
    if not causal:
        return torch.zeros(1, 1, 1, dtype=dtype)
    mask = torch.full((L, L), float("-inf"), dtype=dtype).triu(1)
    return mask.repeat(groups, 1)[None]


@functools.lru_cache(64)
@torch.inference_mode(False)
def _plan(borders, causal, device):
    """Group documents by length, for batches that are padded on the right.

    -> (gather (rows,), scatter (T,), [(number of documents, padded length), ...]). Row i of the
    padded groups is token gather[i] of the pack; token t stands in row scatter[t]. Padding repeats
    a document's own last token, where a causal mask hides it. Every layer asks again, hence the
    cache.
    """
    documents = []  # (length, start), the longest first
    for start, end in itertools.pairwise(borders):
        if end > start:
            documents.append((end - start, start))
    documents.sort(reverse=True)

    gather = []
    scatter = torch.empty(borders[-1], dtype=torch.long)
    groups = []
    row = 0
    while documents:
        # A group holds documents at least 5/8 as long as its longest one. Without a causal mask
        # padding would be seen, and long documents waste too much: those have to be equally long.
        longest = documents[0][0]
        shortest = longest
        if causal and longest <= SHORT_DOCUMENT:
            shortest = longest * 5 / 8
        group = [document for document in documents if document[0] >= shortest]
        documents = documents[len(group):]
        for length, start in group:
            tokens = torch.arange(start, start + longest)
            gather.append(tokens.clamp(max=start + length - 1))
            scatter[start:start + length] = torch.arange(row, row + length)
            row += longest
        groups.append((len(group), longest))
    return torch.cat(gather).to(device), scatter.to(device), groups


PYTORCH_PATHS = {"reference": _reference, "sdpa": _sdpa}


# ---- the paths as one operation that autograd and torch.compile know -----------------------------

@torch.library.custom_op("sail_vl::attention", mutates_args=())
def _operation(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool,
               path: str) -> tuple[Tensor, Tensor]:
    """-> out (T, H, D), lse (H, T), which is 0 where the path does not need it."""
    if path == "triton":
        return attention_launch.run_forward(q, k, v, cu_seqlens, causal)
    T, H, _ = q.shape
    out = PYTORCH_PATHS[path](q, k, v, cu_seqlens, _longest(cu_seqlens), causal)
    return out.contiguous(), q.new_zeros((H, T), dtype=torch.float32)


@_operation.register_fake
def _shapes(q, k, v, cu_seqlens, causal, path):
    T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((H, T), dtype=torch.float32)


@torch.library.custom_op("sail_vl::attention_backward", mutates_args=())
def _backward_operation(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cu_seqlens: Tensor, causal: bool, path: str) -> Tensor:
    """-> the gradients of q, k and v as heads of one tensor, (T, H + 2K, D)."""
    if path == "triton":
        return attention_launch.run_backward(dout, q, k, v, out, lse, cu_seqlens, causal)

    def forward(q, k, v):
        return PYTORCH_PATHS[path](q, k, v, cu_seqlens, _longest(cu_seqlens), causal)

    # PyTorch differentiates its own path. That computes the forward pass once more, which only
    # compiled models pay.
    _, differentiate = torch.func.vjp(forward, q, k, v)
    return torch.cat(differentiate(dout), 1)


@_backward_operation.register_fake
def _backward_shapes(dout, q, k, v, out, lse, cu_seqlens, causal, path):
    T, H, D = q.shape
    return q.new_empty((T, H + 2 * k.shape[1], D))


def _longest(cu_seqlens):
    return int(cu_seqlens.diff().max())


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, causal, path = inputs
    out, lse = output
    ctx.causal = causal
    ctx.path = path
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _gradients(ctx, dout, dlse):
    saved = ctx.saved_tensors  # checkpointing lets it be read once
    q, k, v, *_ = saved
    gradient = _backward_operation(dout, *saved, ctx.causal, ctx.path)
    dq, dk, dv = gradient.split([q.shape[1], k.shape[1], v.shape[1]], 1)
    return dq, dk, dv, None, None, None  # cu_seqlens, causal and path have none


_operation.register_autograd(_gradients, setup_context=_save_for_backward)
