"""The language model, the vision-language model around it, and the loss.

Everything is packed: the documents of a pack lie end to end in one row of T tokens, cu_seqlens
(S+1,) holds their borders and positions restart at 0 in each. Parameter names are those of the
released InternVL / SAIL-VL checkpoints; the ModuleDicts are there for these names.

Shape letters: T tokens of a pack, S its documents, C width, H query heads, K key/value heads,
D head dim, V vocabulary, N tiles, s their side.
Sources of the decoder: Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), modeling_qwen2.py and
modeling_qwen3.py in huggingface/transformers.
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from aimv2 import AIMv2Block, vision_encoder
from configurator import setting
from inputs.chat import IGNORE
from inputs.images import normalize
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from vision import (
    Linear,
    Projector,
    RMSNorm,
    VisionBlock,
    pixel_shuffle,
    products,
    working_dtype,
)


@dataclass(slots=True)
class LLMConfig:
    vocab_size: int = setting(151936, at_least=1, at_most=2**20)  # V
    dim: int = setting(1536, at_least=1, at_most=2**16)  # width C
    n_layers: int = setting(28, at_least=1, at_most=256)
    n_heads: int = setting(12, at_least=1, at_most=2**16)  # query heads H
    n_kv_heads: int = setting(2, at_least=1, at_most=2**16)  # key/value heads K
    head_dim: int = setting(128, at_least=1, at_most=2**16)  # D; need not be dim / n_heads
    ffn_dim: int = setting(8960, at_least=1, at_most=2**20)
    rope_theta: float = setting(1e6, above=0, at_most=1e12)
    norm_eps: float = setting(1e-6, above=0, at_most=1)
    tie_embeddings: bool = False  # the head shares the embedding table
    max_positions: int = setting(32768, at_least=1, at_most=2**24)
    qwen3: bool = False  # Qwen3's attention: queries and keys get a norm, their matrices no bias
    PRESETS = {
        "qwen2.5-1.5b": {},  # untied, as SAIL-VL-2B is released
        "qwen2.5-0.5b": dict(dim=896, n_layers=24, n_heads=14, head_dim=64, ffn_dim=4864,
                             tie_embeddings=True),
        "qwen2.5-7b": dict(vocab_size=152064, dim=3584, n_heads=28, n_kv_heads=4, ffn_dim=18944),
        "qwen3-1.7b": dict(dim=2048, n_heads=16, n_kv_heads=8, ffn_dim=6144, tie_embeddings=True,
                           max_positions=40960, qwen3=True),
        "qwen3-8b": dict(dim=4096, n_layers=36, n_heads=32, n_kv_heads=8, ffn_dim=12288,
                         max_positions=40960, qwen3=True),
        "toy": dict(vocab_size=1056, dim=128, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=32,
                    ffn_dim=384, rope_theta=1e4, tie_embeddings=True, max_positions=2048),
    }


# ---- the language model --------------------------------------------------------------------------

def rope_table(positions, head_dim, theta):
    """Angles of the rotary embedding: positions (T,) -> (cos, sin), each (T, 1, D) in fp32.

    sin carries the sign that `rotate` needs: minus in the first half of D, plus in the second.
    """
    # Keep this formula as it was in training: an error in the last bit of a frequency turns
    # position 32,767 by 0.002.
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1 / theta ** (exponents / head_dim)  # (D/2,)
    angles = positions.float()[:, None, None] * frequencies  # (T, 1, D/2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864, GPT-NeoX layout) of x (T, heads, D).

    Entry i of the first half of D and entry i of the second are one pair, turned together:
        first' = first * cos - second * sin        second' = second * cos + first * sin
    The sin of `rope_table` is negative in the first half already. So both formulas are
    x * cos + swapped * sin, where `swapped` has the two halves exchanged.
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class Block(nn.Module):
    """One layer of the decoder: pre-norm attention, then a gated MLP (SwiGLU)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        D = cfg.head_dim
        bias = not cfg.qwen3
        self.head_dim = D
        self.self_attn = nn.ModuleDict({
            "q_proj": Linear(C, cfg.n_heads * D, bias),
            "k_proj": Linear(C, cfg.n_kv_heads * D, bias),
            "v_proj": Linear(C, cfg.n_kv_heads * D, bias),
            "o_proj": Linear(cfg.n_heads * D, C, bias=False),
        })
        self.qk_norm = cfg.qwen3
        if self.qk_norm:
            self.self_attn["q_norm"] = RMSNorm(D, cfg.norm_eps)
            self.self_attn["k_norm"] = RMSNorm(D, cfg.norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": Linear(C, cfg.ffn_dim, bias=False),
            "up_proj": Linear(C, cfg.ffn_dim, bias=False),
            "down_proj": Linear(cfg.ffn_dim, C, bias=False),
        })
        self.input_layernorm = RMSNorm(C, cfg.norm_eps)
        self.post_attention_layernorm = RMSNorm(C, cfg.norm_eps)

    def forward(self, x, rope, attend, rows=None):
        """x (T, C) -> (T, C). rope: (cos, sin) of rope_table. attend(q, k, v): see `packed`.

        rows: indices of the rows to return, or None for all. Past the attention no row needs
        another one, so the last block computes only those that have a label.
        """
        attention_out = self.run_heads(x, rope, attend)
        if rows is not None:
            x = x.index_select(0, rows)
            attention_out = attention_out.index_select(0, rows)
        x = x + self.self_attn.o_proj(attention_out)
        return x + self.feed_forward(x)

    def run_heads(self, x, rope, attend):
        """x (T, C) -> what the heads found (T, H*D), for o_proj; arguments as in forward."""
        T = len(x)
        attn = self.self_attn
        y = self.input_layernorm(x)
        q, k, v = products(y, attn.q_proj, attn.k_proj, attn.v_proj)
        q = q.view(T, -1, self.head_dim)  # (T, H, D)
        k = k.view(T, -1, self.head_dim)  # (T, K, D)
        v = v.view(T, -1, self.head_dim)  # (T, K, D)
        if self.qk_norm:
            q = attn.q_norm(q)
            k = attn.k_norm(k)
        q = rotate(q, *rope)
        k = rotate(k, *rope)
        return attend(q, k, v).flatten(1)

    def feed_forward(self, x):
        """x (T, C) -> what the MLP adds to it (T, C)."""
        mlp = self.mlp
        y = self.post_attention_layernorm(x)
        gate, up = products(y, mlp.gate_proj, mlp.up_proj)  # (T, ffn_dim) each
        return mlp.down_proj(F.silu(gate) * up)


def packed(cu_seqlens):
    """The attention of a pack -> attend(q, k, v): causal inside each document of cu_seqlens.

    cu_seqlens may be a list too.
    """
    cu_seqlens = torch.as_tensor(cu_seqlens, dtype=torch.int32, device="cpu")
    max_seqlen = int(cu_seqlens.diff().max())

    def attend(q, k, v):
        return attention(q, k, v, cu_seqlens, max_seqlen, causal=True)

    return attend


class LanguageModel(nn.Module):
    """Decoder and head, from embeddings on.

    ValueError unless n_heads is a multiple of n_kv_heads and head_dim is even.
    """

    def __init__(self, cfg):
        super().__init__()
        if cfg.n_heads % cfg.n_kv_heads:
            raise ValueError(f"{cfg.n_heads} heads do not divide over {cfg.n_kv_heads} kv heads")
        if cfg.head_dim % 2:
            raise ValueError(f"head_dim {cfg.head_dim} must be even for the rotary embedding")
        self.cfg = cfg
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(cfg.vocab_size, cfg.dim),
            "layers": nn.ModuleList([Block(cfg) for _ in range(cfg.n_layers)]),
            "norm": RMSNorm(cfg.dim, cfg.norm_eps),
        })
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Make the head share the embedding table, if the configuration says so."""
        if self.cfg.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, tokens):
        """tokens (T,) -> embeddings (T, C) in the dtype of the arithmetic, see working_dtype."""
        h = self.model.embed_tokens(tokens)
        return h.to(working_dtype(h))

    def hidden(self, h, positions, attend, cache=None, rows=None):
        """Run the blocks on embeddings h (T, C) at positions (T,) -> (T, C), before the last norm.

        attend(q, k, v) is the attention, see `packed`; with a cache it is called as
        attend(cache[layer], q, k, v). rows: indices of the rows to return, or None for all.
        """
        rope = rope_table(positions, self.cfg.head_dim, self.cfg.rope_theta)
        last = len(self.model.layers) - 1
        for i, block in enumerate(self.model.layers):
            attend_here = attend if cache is None else functools.partial(attend, cache[i])
            h = block(h, rope, attend_here, rows if i == last else None)
        if rows is not None and last < 0:
            h = h.index_select(0, rows)  # there was no block to do it
        return h

    def head(self, h):
        """h (rows, C) of `hidden` -> fp32 logits (rows, V)."""
        return self.lm_head(self.model.norm(h)).float()

    def loss(self, h, labels, positions, cu_seqlens, weights=None):
        """Embeddings h (T, C) of one pack -> the SUM of its cross-entropy, an fp32 scalar.

        labels (T,) int64: what each position has to predict (already shifted), or IGNORE.
        positions (T,); cu_seqlens (S+1,) int32 on the CPU, or a list; weights (T,) fp32 or None: a
        factor for the loss of each position. Past the last block's attention, only rows that have a
        label are computed.
        """
        rows = (labels != IGNORE).nonzero()[:, 0]  # (supervised tokens,)
        h = self.hidden(h, positions, packed(cu_seqlens), rows=rows)
        labels = labels.index_select(0, rows)
        if weights is not None:
            weights = weights.index_select(0, rows)

        # The fused loss never holds all logits, but it needs the head's weight as a plain tensor.
        # parallelize() leaves the head to FSDP's outermost unit, whose weights are gathered while
        # this call runs. A head that is an FSDP unit of its own is still sharded here: only its
        # own forward gathers it, so it is called as a module and gets PyTorch's loss.
        weight = self.lm_head.weight
        if isinstance(weight, DTensor):
            losses = F.cross_entropy(self.head(h), labels, reduction="none")
            if weights is not None:
                losses = losses * weights
            return losses.sum()
        return linear_cross_entropy(self.model.norm(h), weight, labels, weights)


# ---- the vision-language model -------------------------------------------------------------------

def needs_gradients(module):
    """Whether a forward pass of this module now prepares gradients of its weights."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())


class VLM(nn.Module):
    """ViT -> pixel shuffle -> projector -> language model.

    Built under torch.device("meta") it has no weights: call `to_empty`, then fill it.
    """

    def __init__(self, vision, llm, image_token_id):
        super().__init__()
        self.vision = vision
        self.llm = llm
        self.image_token_id = image_token_id
        # Set under FSDP: each rank has to gather the weights of the ViT in every forward pass,
        # even if its pack has no tile and the ViT is frozen, because the other ranks wait for it.
        self.always_run_vision = False
        self.vision_model = vision_encoder(vision)
        self.mlp1 = Projector(vision, llm.dim)
        self.language_model = LanguageModel(llm)

    def to_empty(self, *, device, recurse=True):
        super().to_empty(device=device, recurse=recurse)
        self.language_model.tie_weights()  # both names got a tensor of their own
        return self

    def init_weights(self, seed, std=0.02):
        """Random weights, see the function init_weights. Returns the model."""
        init_weights(self, seed, std, self.vision.init_values)
        return self

    def visual_tokens(self, tiles):
        """uint8 tiles (N, 3, s, s) -> visual tokens (N * tokens_per_tile, C of the LLM).

        Autograd is off for a part whose gradients nobody needs: it keeps no activations.
        """
        train_vit = needs_gradients(self.vision_model)
        with torch.set_grad_enabled(train_vit):
            dtype = next(self.vision_model.parameters()).dtype
            x = self.vision_model(normalize(tiles, dtype))  # (N, P, C of the ViT)
            x = pixel_shuffle(x, self.vision.downsample)
        with torch.set_grad_enabled(train_vit or needs_gradients(self.mlp1)):
            return self.mlp1(x).flatten(0, 1)

    def embed(self, tokens, tiles):
        """tokens (T,), uint8 tiles (N, 3, s, s) or None -> embeddings (T, C).

        Visual tokens take the places of <IMG_CONTEXT>; ValueError if their numbers differ.
        """
        h = self.language_model.embed(tokens)  # (T, C)
        image_rows = (tokens == self.image_token_id).nonzero()[:, 0]
        n_tiles = 0 if tiles is None else len(tiles)
        expected = n_tiles * self.vision.tokens_per_tile
        if len(image_rows) != expected:
            raise ValueError(f"the pack has {len(image_rows)} <IMG_CONTEXT> tokens, "
                             f"but its {n_tiles} tiles give {expected}")
        if n_tiles == 0:
            # All ranks must join the same collectives, with or without pictures: the sum of the
            # gradients of what trains and, under FSDP, the gathering of even a frozen ViT's
            # weights. So a black tile goes through, and no row takes it.
            trains = needs_gradients(self.vision_model) or needs_gradients(self.mlp1)
            if not (trains or self.always_run_vision):
                return h
            side = self.vision.image_size
            tiles = tokens.new_zeros(1, 3, side, side, dtype=torch.uint8)
        visual = self.visual_tokens(tiles)[:len(image_rows)]
        return h.index_copy(0, image_rows, visual.to(h.dtype))

    def forward(self, tokens, labels, positions, cu_seqlens, tiles=None, weights=None):
        """One pack -> the SUM of the cross-entropy of its supervised tokens, an fp32 scalar.

        tokens (T,) int64; tiles (N, 3, s, s) uint8, N may be 0; the others as in
        LanguageModel.loss. ValueError if <IMG_CONTEXT> tokens and tiles disagree.
        """
        h = self.embed(tokens, tiles)
        return self.language_model.loss(h, labels, positions, cu_seqlens, weights)

    def logits(self, tokens, positions, cu_seqlens, tiles=None):
        """fp32 logits (T, V) of every position; arguments as in forward."""
        h = self.embed(tokens, tiles)
        h = self.language_model.hidden(h, positions, packed(cu_seqlens))
        return self.language_model.head(h)


# ---- random weights ------------------------------------------------------------------------------

ADAPTER_NAMES = (".lora_A", ".lora_B")  # how names of adapters end; no stored model has them


@torch.no_grad()
def init_weights(module, seed, std=0.02, layer_scale=1.0):
    """Fill every parameter of a module but adapters, which training/lora.py fills.

    Matrices are normal(0, std), those that write to the residual stream smaller by
    sqrt(2 * layers) (Radford et al., 2019, section 2.3), token tables normal(0, width**-0.5).
    Biases are 0, norms 1, layer scales as given. The numbers are drawn on the CPU, parameter by
    parameter: they depend neither on the device nor on the number of ranks.
    """
    vit_layers = sum(isinstance(m, (VisionBlock, AIMv2Block)) for m in module.modules())
    llm_layers = sum(isinstance(m, Block) for m in module.modules())
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if name.endswith(ADAPTER_NAMES):
            continue
        if name.endswith(("ls1", "ls2")):
            p.fill_(layer_scale)
        elif p.dim() < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            scale = std
            if name.endswith("embed_tokens.weight"):
                scale = p.shape[1] ** -0.5
            elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
                scale = std / max(1, 2 * vit_layers) ** 0.5
            elif name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
                scale = std / max(1, 2 * llm_layers) ** 0.5
            whole = torch.empty(p.shape, dtype=torch.float32).normal_(0, scale, generator=generator)
            local, rows = kept_rows(p)
            local.copy_(whole[rows])


def kept_rows(p):
    """What this rank keeps of a parameter -> (its tensor, a slice: these rows of the whole).

    That is everything, unless FSDP has sharded the parameter. FSDP cuts the rows into equal
    pieces, rounded up, one after the other; so the last ranks may have less, or nothing. Under
    HSDP these are the ranks of a node, the last dimension of the mesh.
    """
    if not isinstance(p, DTensor):
        return p, slice(0, len(p))
    local = p.to_local()
    mesh = p.device_mesh
    shards = mesh.ndim - 1
    rows_per_rank = math.ceil(len(p) / mesh.size(shards))
    first = min(len(p), rows_per_rank * mesh.get_local_rank(shards))
    return local, slice(first, first + len(local))
