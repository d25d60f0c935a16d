"""How much memory of a GPU a stage takes, term by term: what --dry_run prints.

The terms are those of compiled blocks, bf16 arithmetic and the Triton attention, at the fullest
pack. They were read off a history of the allocator; `make nogpu` compares them with every recipe.

Letters: C width, H query heads, K key/value heads, D head dim, F width of the MLP, V vocabulary,
T tokens of a pack.
"""
from dataclasses import dataclass

from kernels.cross_entropy import rows_at_once
from training.distributed import shards_of
from training.flops import Trained, gradients_pass

# The sample that a plan is made for: 6 tiles and a thumbnail, and an answer.
TOKENS = 2048
TILES = 7
SUPERVISED = 192

# What PyTorch's allocator reserves beyond the peak, fitted to all recipes of `make nogpu`: pieces
# of freed memory that fit nothing. FSDP takes and frees whole weights all the time, the others what
# a pass computes, and full checkpointing always the same blocks.
FRAGMENTS_DDP = 0.093  # of what a pass computes
FRAGMENTS_FSDP = 0.15  # of all
FRAGMENTS_FULL = 0.9e9  # bytes


@dataclass
class MemoryPlan:
    """Bytes on each GPU when a step needs most of them."""
    state: float  # weights, gradients and AdamW's moments
    copies: float  # weights in bf16: those of training/copies.py, or that FSDP has gathered
    activations: float  # what the forward pass keeps for the backward pass
    work: float  # what the head, or a block on its way back, needs for a moment
    fragments: float  # what the allocator reserves beside all that

    @property
    def allocated(self):
        return self.state + self.copies + self.activations + self.work

    @property
    def reserved(self):
        """What nvidia-smi would show at most, without the driver's and NCCL's own."""
        return self.allocated + self.fragments


# ---- activations ---------------------------------------------------------------------------------


def llm_row_bytes(llm, trains, checkpointing):
    """What a block of the language model keeps for each token -> (all of it, its MLP's part)."""
    C, H, K, D, F = llm.dim, llm.n_heads, llm.n_kv_heads, llm.head_dim, llm.ffn_dim
    residual = 2 * C
    if checkpointing == "full":
        return residual, 0
    heads = 2 * (H + 2 * K) * D + 2 * H * D + 4 * H  # q, k, v; attention and its log-sums
    gate_and_up = 4 * F
    normed = 2 * C
    if not trains:
        # Both norms need their inputs to pass gradients on, and nothing else does.
        return 2 * residual + heads + gate_and_up + 8, gate_and_up
    if checkpointing == "selective":
        return residual + normed + heads + gate_and_up, gate_and_up
    before_rotation = 2 * (H + K) * D  # q and k once more
    product = 2 * F  # of SwiGLU, the input of down_proj
    kept = residual + 2 * normed + heads + before_rotation + gate_and_up + product + 8
    if llm.qwen3:
        kept += 4 * (H + K)  # of the norms of queries and keys; not measured
    return kept, gate_and_up + product


def recomputed_row_bytes(llm, rank):
    """What a block of the language model holds for each token in its backward pass if all of it is
    computed again: tensors as wide as the MLP, and ten of width C.

    With adapters there are six of the forward and five of the backward pass, read off the
    allocator's history at 2B and 8B. Without them the product of an adapter falls away each time;
    that is not measured.
    """
    wide = 11 if rank else 6
    return 2 * wide * llm.ffn_dim + 20 * llm.dim


def vit_row_bytes(vision, checkpointing):
    """What a block of a ViT that trains keeps for each patch and class token."""
    C, H, F = vision.dim, vision.n_heads, vision.ffn_dim
    residual = 2 * C
    if checkpointing == "full":
        return residual
    qkv = 6 * C
    normed = 2 * C
    attention_out = 2 * C + 4 * H
    if vision.kind == "aimv2":  # a gated MLP and no layer scale; only "selective" is measured
        kept = residual + qkv + attention_out + normed + 4 * F
        return kept if checkpointing == "selective" else kept + normed + 2 * F + 8
    kept = residual + qkv + attention_out + 2 * normed + 2 * F
    if checkpointing == "selective":
        return kept
    # Layer scale needs what it multiplies, twice; the second matmul of the MLP its input.
    return kept + 4 * C + 2 * F + 16


def activation_bytes(cfg, model, trained):
    """Bytes that one micro-batch, the fullest pack, keeps from its forward for its backward pass.

    trained: a Trained, or its first three fields. Blocks that no gradient passes keep nothing.
    An adapter keeps x A^T beside its input. Frozen blocks and adapters are not measured.
    """
    vision = model.vision
    llm = model.llm
    tokens = cfg.tokens_per_pack
    tiles = fullest_tiles(cfg, vision)
    checkpointing = cfg.activation_checkpointing
    trained = Trained(*trained)

    frozen, passing = gradients_pass(llm, trained)
    of_frozen, mlp = llm_row_bytes(llm, False, checkpointing)
    kept_bytes = frozen * tokens * of_frozen if passing else 0
    if frozen < llm.n_layers:
        per_row, mlp = llm_row_bytes(llm, True, checkpointing)
        if checkpointing != "full":
            per_row += 7 * 2 * trained.llm_rank
        kept_bytes += (llm.n_layers - frozen) * tokens * per_row
    # Past its attention, the last block computes only rows that have a label.
    kept_bytes -= (tokens - supervised_rows(tokens)) * mlp
    if trained.vision:
        rows = tiles * vision.rows_per_tile
        pixels = 2 * tiles * 3 * vision.image_size**2
        per_row = vit_row_bytes(vision, checkpointing)
        if checkpointing != "full":
            per_row += 5 * 2 * trained.vision_rank
        kept_bytes += (vision.n_layers - trained.frozen_vision_layers) * rows * per_row + pixels
    if trained.vision or trained.projector:
        # The projector: input of its norm (fp32) and output, then what goes into and comes out of
        # the GELU, and the visual tokens.
        visual_tokens = tiles * vision.tokens_per_tile
        width = vision.dim * vision.downsample**2
        kept_bytes += visual_tokens * (4 * width + 2 * width + 6 * llm.dim)
    return kept_bytes


def fullest_tiles(cfg, vision):
    """The most tiles of a pack: all of its tokens may be visual ones."""
    return min(cfg.max_tiles_per_pack, cfg.tokens_per_pack // vision.tokens_per_tile)


def supervised_rows(tokens):
    """Rows of a pack that go through the head."""
    length = min(TOKENS, tokens)
    return tokens // length * min(SUPERVISED, length)


# ---- weights and the head ------------------------------------------------------------------------


def head_bytes(llm, tokens, trains, sharded):
    """What the head needs beside the activations while it makes its gradients."""
    rows = supervised_rows(tokens)
    # Its logits are those of a chunk, which a pack of short documents fills.
    chunk = min(tokens, rows_at_once(llm.vocab_size))
    table = llm.vocab_size * llm.dim
    needed = 2 * chunk * llm.vocab_size + 2 * rows * llm.dim  # logits; gradient of its input
    if trains:
        needed += 4 * table + 2 * table  # its gradient, and the part of it that a chunk gives
    if trains and not sharded:
        needed += 2 * table  # a copy of its weight in bf16
    return needed


def size_of(module):
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def trained_size(module):
    """Parameters of a module that train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def weight_copy_bytes(model):
    """bf16 copies of fp32 weights that train, see training/copies.py. The head has its own."""
    parts = (model.mlp1, model.vision_model, model.language_model.model.layers)
    return 2 * sum(trained_size(part) for part in parts)


def block_size(model):
    """Parameters of a block of the language model."""
    return size_of(model.language_model.model.layers) // max(1, model.llm.n_layers)


def gathered_bytes(model):
    """Whole bf16 weights that FSDP has gathered when the head runs.

    Those of the outermost unit, which is all but the blocks and the ViT, and of one block.
    """
    blocks = size_of(model.language_model.model.layers)
    outermost = size_of(model.mlp1) + size_of(model.language_model) - blocks
    return 2 * (outermost + block_size(model))


# ---- a stage -------------------------------------------------------------------------------------


def memory_plan(cfg, model, trained, world):
    """The MemoryPlan of a stage on `world` GPUs.

    model: a VLM, on the meta device; trained: what set_trained_parts has made of it.
    """
    trainable = trained_size(model)
    frozen = size_of(model) - trainable
    shards = shards_of(cfg.parallel, world)
    sharded = shards > 1

    # fp32 weight, gradient and two moments of what trains; a bf16 weight of what does not
    state = 16 * trainable + 2 * frozen
    # The peak is where the head runs, or where the backward pass enters the blocks: then there are
    # gradients of gate and up, and FSDP gathers the next block beside the one at work.
    head_trains = model.language_model.lm_head.weight.requires_grad
    at_head = head_bytes(model.llm, cfg.tokens_per_pack, head_trains, sharded)
    in_block = 4 * cfg.tokens_per_pack * model.llm.ffn_dim
    if cfg.activation_checkpointing == "full":
        in_block = cfg.tokens_per_pack * recomputed_row_bytes(model.llm, trained.llm_rank)
    if sharded:
        state /= shards
        copies = gathered_bytes(model)
        in_block += 2 * block_size(model)
    else:
        copies = weight_copy_bytes(model)
    work = max(at_head, in_block)
    activations = activation_bytes(cfg, model, trained)
    if sharded:
        fragments = FRAGMENTS_FSDP * (state + copies + activations + work)
    elif cfg.activation_checkpointing == "full":
        fragments = FRAGMENTS_FULL
    else:
        fragments = FRAGMENTS_DDP * (activations + work)
    return MemoryPlan(state, copies, activations, work, fragments)
