"""One step of the model with a cache: whole prompts, or one more token of each row.

Shape letters: T tokens of a pack, S rows that decode together, C width, H query heads, K key/value
heads, D head dim, L places of the cache that attention looks at, V vocabulary, N tiles of side s.
"""
import itertools
import math

import torch
import torch.nn.functional as F

from model import packed

GRAPH_TOKENS = 512  # a CUDA graph is captured for each so many tokens of length


def without_waiting(tensor, device):
    """A tensor of the CPU on `device`; the CPU does not wait for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefill(model, prompts, tiles, cache, slots):
    """Run prompts as one pack and fill these slots of the cache (n_layers, 2, S, K, places, D).

    prompts: lists of token ids; tiles: uint8 (N, 3, s, s) or None for each. Returns the logits
    (len(slots), V) of their last tokens.
    """
    device = cache.device
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor(list(itertools.chain(*prompts)), device=device)  # (T,)
    slot_of = torch.tensor(slots).repeat_interleave(torch.tensor(lengths))  # (T,)
    slot_of = slot_of.to(device)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (T,)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    attend_packed = packed(cu_seqlens)

    def attend(kept, q, k, v):
        kept[:, slot_of, :, positions] = torch.stack([k, v], 1)  # (T, 2, K, D)
        return attend_packed(q, k, v)

    pictures = [t for t in tiles if t is not None]
    all_tiles = None
    if pictures:
        all_tiles = torch.cat(pictures).to(device)
    h = model.embed(tokens, all_tiles)
    last_rows = (cu_seqlens[1:] - 1).to(device)
    h = model.language_model.hidden(h, positions, attend, cache, last_rows)
    return model.language_model.head(h)


def decode_step(model, tokens, positions, cache, length):
    """Run one token of each row, tokens (S,) at positions (S,), and fill the cache with it.

    Attention looks at the first `length` places of the cache. Returns logits (S, V).
    """
    device = cache.device
    positions = positions.to(device)
    rows = torch.arange(len(positions), device=device)
    beyond = torch.arange(length, device=device) > positions[:, None]  # (S, L)
    # made once, not in each block: 0 for the places to look at, else -inf
    mask = torch.zeros_like(beyond, dtype=cache.dtype).masked_fill_(beyond, float("-inf"))
    mask = mask[:, None, None]  # (S, 1, 1, L)

    def attend(kept, q, k, v):  # q (S, H, D), k and v (S, K, D)
        kept[:, rows, :, positions] = torch.stack([k, v], 1)  # (S, 2, K, D)
        # the H/K query heads that share a key head stand where a sequence of queries would
        q = q.unflatten(1, (k.shape[1], -1))  # (S, K, H/K, D)
        keys, values = kept[:, :, :, :length]  # (S, K, L, D) each
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return out.flatten(1, 2)  # (S, H, D)

    h = model.language_model.embed(tokens)
    h = model.language_model.hidden(h, positions, attend, cache)
    return model.language_model.head(h)


def graph_step(model, batch, positions, length):
    """decode_step of a Batch as a CUDA graph: one launch instead of some hundreds.

    A graph is captured once per GRAPH_TOKENS of length and kept in batch.graphs: it belongs to the
    tensors of this batch. Not run on a GPU yet.
    """
    graphs = batch.graphs
    places = batch.cache.shape[-2]
    length = min(places, GRAPH_TOKENS * math.ceil(length / GRAPH_TOKENS))
    if "positions" not in graphs:
        graphs["positions"] = torch.zeros_like(batch.tokens)
        graphs["pool"] = torch.cuda.graph_pool_handle()
    where = graphs["positions"]
    where.copy_(without_waiting(positions, where.device))
    if length not in graphs:
        # Lazy set-up has to happen outside of the graph. The step can run twice: it writes the
        # same into the cache.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            decode_step(model, batch.tokens, where, batch.cache, length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs["pool"]):
            logits = decode_step(model, batch.tokens, where, batch.cache, length)
        graphs[length] = graph, logits
    graph, logits = graphs[length]
    graph.replay()
    return logits
