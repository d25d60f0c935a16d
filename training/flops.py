"""What of a model trains, and the strict FLOPs of a step: the numerator of MFU."""
from typing import NamedTuple

from vision import vision_flops


class Trained(NamedTuple):
    """What of a model trains."""
    vision: bool = True
    projector: bool = True
    llm: bool = True
    # Of a module that trains, its first blocks and what lies before them may be frozen.
    frozen_vision_layers: int = 0
    frozen_llm_layers: int = 0
    # Adapters of this rank train in the other blocks, and nothing else of the module; 0: the
    # module itself trains.
    vision_rank: int = 0
    llm_rank: int = 0


def train_flops(vision, llm, n_tiles, lengths, n_supervised, trained=(True, True, True)):
    """Strict FLOPs of a forward and backward pass over packed documents, an int.

    lengths: tokens of each document; n_supervised: rows through the head; trained: a Trained, or
    its first three fields. Counted: matmuls at 2 per weight and row forward, the same again for
    each gradient that is needed (of the input, of the weight), attention over visible pairs only
    (forward 4 * D per head and pair, backward twice that). Not counted: lookups, norms,
    recomputation, padding, what the last block skips.
    """
    trained = Trained(*trained)
    flops = vision_flops(vision, llm.dim, n_tiles, trained)
    return flops + llm_flops(llm, lengths, n_supervised, trained)


def llm_flops(llm, lengths, n_supervised, trained):
    """Those of the decoder and the head."""
    tokens = sum(lengths)
    scores = document_scores(llm, lengths)
    rank = trained.llm_rank
    frozen, to_the_bottom = gradients_pass(llm, trained)
    flops = 0
    for layer in range(llm.n_layers):
        # o_proj and MLP of the last block: for supervised rows only
        rows = n_supervised if layer == llm.n_layers - 1 else tokens
        read, block, adapters = block_matmuls(llm, tokens, rows, rank)
        trains = layer >= frozen
        flops += block + scores  # forward
        if to_the_bottom or trains:
            flops += block + 2 * scores  # gradients of inputs
        if trains and not rank:
            flops += block  # gradients of weights
        if trains and rank:
            flops += 3 * adapters
        if trains and rank and layer == frozen and not to_the_bottom:
            flops -= read  # no input of this block needs a gradient

    head = 2 * llm.dim * llm.vocab_size * n_supervised
    flops += head
    if any(trained[:3]):
        flops += head  # gradient of its input
    if trained.llm and not rank and not (frozen and llm.tie_embeddings):
        flops += head  # gradient of its weight
    return flops


def document_scores(llm, lengths):
    """FLOPs of the attention of one block to these documents, forward; backward twice that."""
    pairs = sum(n * (n + 1) // 2 for n in lengths)  # causal: a token sees itself and those before
    return 4 * llm.n_heads * llm.head_dim * pairs


def gradients_pass(llm, trained):
    """-> (how many of the first blocks of the decoder are frozen, whether gradients pass them).

    They go down to the embeddings if these train, or something before them.
    """
    frozen = trained.frozen_llm_layers if trained.llm else llm.n_layers
    embeddings_train = trained.llm and not trained.llm_rank and not frozen
    return frozen, trained.vision or trained.projector or embeddings_train


def block_matmuls(llm, tokens, rows, rank):
    """FLOPs forward of one block -> (of what reads the block's input, of its matmuls, of adapters).

    tokens: rows of q, k, v; rows: those of o_proj and the MLP; rank: of the adapters. The first
    number is that of q, k, v and of the matrices A beside them.
    """
    C = llm.dim
    q = llm.n_heads * llm.head_dim
    k_and_v = 2 * llm.n_kv_heads * llm.head_dim
    qkv = 2 * tokens * C * (q + k_and_v)
    others = 2 * rows * (q * C + 3 * C * llm.ffn_dim)
    # A reads the input of a linear layer, B writes to its output.
    qkv_read = 2 * tokens * rank * 3 * C
    qkv_written = 2 * tokens * rank * (q + k_and_v)
    others_adapted = 2 * rows * rank * (q + C + 3 * C + 3 * llm.ffn_dim)
    return qkv + qkv_read, qkv + others, qkv_read + qkv_written + others_adapted
