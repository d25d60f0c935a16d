"""Packed attention: many documents laid end to end in one row of tokens, none of which sees another.

Shape letters: T tokens of a pack, H query heads, K key/value heads (H is a multiple of K), D head dim, S documents
(samples, or tiles in the ViT), L tokens of the longest document of a group. cu_seqlens (S+1,) int32 holds the borders,
0 and T included; keep it on the CPU when you can. ATTENTION=sdpa (the default) or reference (slow, for tests).
"""
import functools, os

import torch
import torch.nn.functional as F

SHORT = 128         # on a CPU, documents up to this length are faster as two batched matmuls than as SDPA

@torch.compiler.disable       # the document borders are data: traced, every new pack would compile anew
def attention(q, k, v, cu_seqlens, max_seqlen, causal):
    """Softmax attention inside each document, scale 1/sqrt(D). q (T, H, D), k and v (T, K, D) -> (T, H, D).
    max_seqlen: the longest document, a plain int. causal: position i sees 0..i of its own document. What a document
    gets does not depend on what the others hold, to the last bit."""
    path = os.environ.get("ATTENTION", "sdpa")
    if path not in ("sdpa", "reference"):
        raise ValueError(f"ATTENTION={path!r} is not a known path; use sdpa or reference")
    assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads do not divide over {k.shape[1]} key/value heads"
    return (_sdpa if path == "sdpa" else _reference)(q, k, v, cu_seqlens, max_seqlen, causal)

# ---- reference: the definition, one document at a time ---------------------------------------------------------------
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
def _sdpa(q, k, v, cu_seqlens, max_seqlen, causal):
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
    if q.device.type != "cpu":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != K).transpose(1, 2)
    if L > SHORT:               # the CPU's backward is several times slower in bf16 than in fp32
        k, v = (x.repeat_interleave(H // K, 2) if 1 < K < H else x.expand(S, L, H, D) for x in (k, v))
        with torch.autocast("cpu", enabled=False):
            qkv = (x.float().transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*qkv, is_causal=causal).transpose(1, 2).to(q.dtype)
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
    if not causal:
        return torch.zeros(1, 1, 1, dtype=dtype)
    return torch.full((L, L), float("-inf"), dtype=dtype).triu(1).repeat(groups, 1)[None]

@functools.lru_cache(64)
@torch.inference_mode(False)
def _plan(borders, causal, device):
    """Group documents by length. -> (gather (rows,), scatter (T,), [(documents, padded length), ...]).
    Row i of the padded groups is token gather[i] of the pack; token t sits in row scatter[t]. A group holds documents
    at least 5/8 as long as its longest; padding repeats a document's own last token, on the right, where a causal
    mask hides it. Without a causal mask only equal lengths share a group. Every layer asks again, hence the cache."""
    documents = sorted(((end - start, start) for start, end in zip(borders, borders[1:]) if end > start), reverse=True)
    gather, scatter, groups, row = [], torch.empty(borders[-1], dtype=torch.long), [], 0
    while documents:
        length = documents[0][0]
        group = [d for d in documents if (d[0] * 8 >= length * 5 if causal else d[0] == length)]
        documents = documents[len(group):]
        for n, start in group:
            gather.append(torch.arange(start, start + length).clamp(max=start + n - 1))
            scatter[start:start + n] = torch.arange(row, row + n)
            row += length
        groups.append((len(group), length))
    return torch.cat(gather).to(device), scatter.to(device), groups
