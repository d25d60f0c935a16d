"""Attention of packs by PyTorch's own kernel: flash-attention 2, or 3 where it is activated."""
import inspect

from torch.nn.attention.varlen import varlen_attn

# PyTorch 2.13 wants to be told that query heads share key heads; 2.11 has no word for it.
GROUPED = {}
if "enable_gqa" in inspect.signature(varlen_attn).parameters:
    GROUPED["enable_gqa"] = True


def attend_varlen(q, k, v, cu_seqlens, max_seqlen, causal):
    """As kernels.attention.attention: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    borders = cu_seqlens.to(q.device, non_blocking=True)
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(
        q, k, v, borders, borders, max_seqlen, max_seqlen, window_size=window, **GROUPED)
