"""One step of the model with a cache: whole prompts, or one more token of each row.

Shape letters: T tokens of a pack, S rows that decode together, C width, H query heads, K key/value
heads, D head dim, L places of the cache that attention looks at, V vocabulary, N tiles of side s.
"""
import functools
import itertools
import math

import torch
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor

from model import packed, rope_table

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


# ---- one token of each row -----------------------------------------------------------------------

def cached_attention(q, kept, mask):
    """Attention of q (S, H, D) to the cache of its layer, kept (2, S, K, places, D) -> (S, H, D).

    mask (S, 1, 1, L): 0, or -inf for places not to look at.
    """
    # the H/K query heads that share a key head stand where a sequence of queries would
    grouped = q.unflatten(1, (kept.shape[2], -1))  # (S, K, H/K, D)
    keys, values = kept[:, :, :, :mask.shape[-1]]  # (S, K, L, D) each
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.flatten(1, 2)


# torch.compile has to see a single operation: for a symbolic L it copies the mask in each block.
@torch.library.custom_op("sail_vl::cached_attention", mutates_args=())
def _operation(q: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    return cached_attention(q, kept, mask).contiguous()


@_operation.register_fake
def _shape(q, kept, mask):
    return q.new_empty(q.shape)


def rope_and_mask(llm, positions, length, dtype):
    """What all blocks of a step need -> (rope of the positions (S,), mask (S, 1, 1, L))."""
    beyond = torch.arange(length, device=positions.device) > positions[:, None]  # (S, L)
    mask = torch.zeros_like(beyond, dtype=dtype).masked_fill_(beyond, float("-inf"))
    rope = rope_table(positions, llm.cfg.head_dim, llm.cfg.rope_theta)
    return rope, mask[:, None, None]


def decode_block(block, x, added, rope, kept, where, mask):
    """Run x + added (S, C) through a Block -> (x, added) again, whose sum is what it returns.

    So the next block adds them, in the same kernel as its norm, if this is compiled. kept: the
    cache of the layer; where: (rows (S,), positions (S,)) of the tokens in it; mask: of
    rope_and_mask.
    """
    def attend(q, k, v):  # q (S, H, D), k and v (S, K, D)
        rows, positions = where
        kept[:, rows, :, positions] = torch.stack([k, v], 1)  # (S, 2, K, D)
        if torch.compiler.is_compiling():
            return _operation(q, kept, mask)
        return cached_attention(q, kept, mask)

    x = x + added
    x = x + block.self_attn.o_proj(block.run_heads(x, rope, attend))
    return x, block.feed_forward(x)


def no_compiler(function):
    return function


@functools.cache
def compiler(function, backend="inductor"):
    """torch.compile of a function of decode_step: one graph for all blocks, however long they look.

    S and L are symbols. Only a single row gets a graph of its own.
    """
    # Sizes that are equal now are not the same size.
    fx_config.use_duck_shape = False
    # The patterns would turn a product and a sum into one call, which copies one of them first.
    # combo_kernels: queries are rotated in the same kernel that puts keys and values into the cache
    options = {"pattern_matcher": False, "combo_kernels": True} if backend == "inductor" else None
    return torch.compile(function, dynamic=True, backend=backend, options=options)


def decode_step(model, tokens, positions, cache, length, compiler=no_compiler):
    """Run one token of each row, tokens (S,) at positions (S,), and fill the cache with it.

    Attention looks at the first `length` places of the cache. Returns logits (S, V).
    """
    positions = positions.to(cache.device)
    where = torch.arange(len(positions), device=cache.device), positions
    llm = model.language_model
    # made once, not in each block
    rope, mask = compiler(rope_and_mask)(llm, positions, length, cache.dtype)
    run_block = compiler(decode_block)
    x = llm.embed(tokens)
    added = torch.zeros_like(x)
    for block, kept in zip(llm.model.layers, cache, strict=True):
        x, added = run_block(block, x, added, rope, kept, where, mask)
    return llm.head(x + added)


# ---- on a GPU ------------------------------------------------------------------------------------

def join_weights(model):
    """Let the queries, keys and values of a block come from one product, and the halves of its MLP.

    A GPU then has fewer kernels to start. Last bits may change, so a CPU keeps its products. The
    weights become views of joined ones, so the memory stays. Nothing may train or move them later.
    """
    for block in model.language_model.model.layers:
        attn = block.self_attn
        _join([attn.q_proj, attn.k_proj, attn.v_proj])
        _join([block.mlp.gate_proj, block.mlp.up_proj])
        # The weights that were apart leave holes that the next joined ones do not fit into.
        torch.cuda.empty_cache()


def _join(linears):
    sizes = [linear.out_features for linear in linears]
    whole = {"weight": None, "bias": None}
    for name, _ in linears[0].named_parameters():
        whole[name] = torch.cat([getattr(linear, name).detach() for linear in linears])
        for linear, part in zip(linears, whole[name].split(sizes), strict=True):
            getattr(linear, name).data = part
    linears[0].joined = whole["weight"], whole["bias"]


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
        step = functools.partial(decode_step, model, batch.tokens, where, batch.cache, length,
                                 batch.compiler)
        # Lazy set-up has to happen outside of the graph. The step can run twice: it writes the
        # same into the cache.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs["pool"]):
            logits = step()
        graphs[length] = graph, logits
    graph, logits = graphs[length]
    graph.replay()
    return logits
