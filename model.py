"""The language model, the vision-language model, its loss, FLOPs and generation.

Everything is packed: the documents of a pack lie end to end in one row of T tokens, cu_seqlens (S+1,) holds their
borders and positions restart at 0 in each. Parameter names are those of the released InternVL / SAIL-VL checkpoints.

Shape letters: T tokens of a pack, S its documents, C width, H query heads, K key/value heads, D head dim,
V vocabulary, N tiles, s their side. During generation S is also the number of rows that decode together.
Source of the decoder: Qwen2 (arXiv 2407.10671), modeling_qwen2.py in huggingface/transformers.
"""
import functools
import torch
import torch.nn as nn
import torch.nn.functional as F
from dataclasses import dataclass
from torch.distributed.tensor import DTensor

from configurator import setting
from inputs.chat import IGNORE
from inputs.images import normalize
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from vision import Projector, ViT, pixel_shuffle, working_dtype


@dataclass(slots=True)
class LLMConfig:
    vocab_size: int = 151936
    dim: int = setting(1536, at_least=1)  # width C
    n_layers: int = 28
    n_heads: int = setting(12, at_least=1)  # query heads H
    n_kv_heads: int = setting(2, at_least=1)  # key/value heads K
    head_dim: int = setting(128, at_least=1)  # D; need not be dim / n_heads
    ffn_dim: int = 8960
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = False        # the head shares the embedding table
    max_positions: int = 32768
    PRESETS = {
        "qwen2.5-1.5b": {},             # untied, as SAIL-VL-2B is released
        "qwen2.5-0.5b": dict(dim=896, n_layers=24, n_heads=14, head_dim=64, ffn_dim=4864, tie_embeddings=True),
        "qwen2.5-7b": dict(vocab_size=152064, dim=3584, n_heads=28, n_kv_heads=4, ffn_dim=18944),
        "toy": dict(vocab_size=1056, dim=128, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=384,
                    rope_theta=1e4, tie_embeddings=True, max_positions=2048)}

# ---- the decoder -----------------------------------------------------------------------------------------------------

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        """In fp32 whatever comes in, out in the dtype of the matmul that follows."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(working_dtype(x))

def rope_table(positions, head_dim, theta):
    """positions (T,) -> (cos, sin), each (T, 1, D) fp32. sin carries the sign of rotate_half: - in the first half."""
    # exactly as it was in training: one unit in the last place of a frequency turns position 32,767 by 0.002
    frequency = 1 / theta ** (torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.float()[:, None, None] * frequency                                        # (T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

def rotate(x, cos, sin):
    """Rotary position embedding of x (T, heads, D), halves rotated together (arXiv 2104.09864, GPT-NeoX layout)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, D, inner = cfg.dim, cfg.head_dim, cfg.ffn_dim
        self.D = D
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(C, cfg.n_heads * D), k_proj=nn.Linear(C, cfg.n_kv_heads * D),
            v_proj=nn.Linear(C, cfg.n_kv_heads * D), o_proj=nn.Linear(cfg.n_heads * D, C, bias=False)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(C, inner, bias=False), up_proj=nn.Linear(C, inner, bias=False),
            down_proj=nn.Linear(inner, C, bias=False)))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(C, cfg.norm_eps), RMSNorm(C, cfg.norm_eps)

    def forward(self, x, rope, attend, rows=None):                          # x (T, C) -> (T, C), or rows alone
        y, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (p(y).view(len(y), -1, self.D) for p in (attn.q_proj, attn.k_proj, attn.v_proj))  # (T, H or K, D)
        seen = attend(rotate(q, *rope), rotate(k, *rope), v).flatten(1)                             # (T, H*D)
        if rows is not None: x, seen = x.index_select(0, rows), seen.index_select(0, rows)
        x = x + attn.o_proj(seen)
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))

def kept_rows(p):
    """(what this rank keeps of a parameter, which rows of the whole they are): all, unless FSDP has sharded it."""
    if not isinstance(p, DTensor): return p, slice(0, len(p))
    local, most = p.to_local(), -(-len(p) // p.device_mesh.size())
    first = min(len(p), most * p.device_mesh.get_local_rank())
    return local, slice(first, first + len(local))

@torch.no_grad()
def init_weights(module, seed, std=0.02, layer_scale=1.0):
    """Fill every parameter: matrices normal(0, std), those that write to the residual stream smaller by
    sqrt(2 * layers) (Radford et al., 2019, section 2.3), token tables normal(0, width**-0.5), biases 0, norms 1, layer
    scale as given. The numbers are drawn on the CPU, parameter by parameter: they do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, _ in module.named_parameters()]
    vit, llm = (sum(name.endswith(end) for name in names) for end in ("attn.proj.weight", "o_proj.weight"))
    depth = dict(proj=vit, fc2=vit, o_proj=llm, down_proj=llm)
    for name, p in module.named_parameters():
        *_, owner, leaf = ("." + name).split(".")
        if leaf in ("ls1", "ls2"):
            p.fill_(layer_scale)
        elif p.dim() == 1:                                                  # of a norm, unless it is a bias
            p.fill_(leaf != "bias")
        else:
            scale = p.shape[1] ** -0.5 if owner == "embed_tokens" else std / max(1, 2 * depth.get(owner, 0)) ** 0.5
            local, rows = kept_rows(p)
            local.copy_(torch.empty(p.shape, dtype=torch.float32).normal_(0, scale, generator=generator)[rows])

# ---- the vision-language model ---------------------------------------------------------------------------------------

def trains(module):
    return torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())

class VLM(nn.Module):
    """ViT -> pixel shuffle -> projector -> decoder. vision=None builds a text-only model (no vision_model, no mlp1).
    Build it under torch.device("meta"), then `to_empty(device=...)` and `init_weights`; or see weights.fill."""
    def __init__(self, vision, llm, image_token_id):
        super().__init__()
        if llm.n_heads % llm.n_kv_heads:
            raise ValueError(f"{llm.n_heads} heads do not divide over {llm.n_kv_heads} kv heads")
        if llm.head_dim % 2:
            raise ValueError(f"head_dim {llm.head_dim} must be even for the rotary embedding")
        self.vision, self.llm, self.image_token_id = vision, llm, image_token_id
        self.embed_noise = 0.0              # see noisy()
        self.always_sees = False            # see embed(); FSDP needs it
        if vision:
            self.vision_model, self.mlp1 = ViT(vision), Projector(vision, llm.dim)
        self.language_model = nn.ModuleDict(dict(
            model=nn.ModuleDict(dict(embed_tokens=nn.Embedding(llm.vocab_size, llm.dim),
                                     layers=nn.ModuleList(Block(llm) for _ in range(llm.n_layers)),
                                     norm=RMSNorm(llm.dim, llm.norm_eps))),
            lm_head=nn.Linear(llm.dim, llm.vocab_size, bias=False)))
        self.tie_weights()

    def tie_weights(self):
        if self.llm.tie_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight
        return self

    def to_empty(self, *, device, recurse=True):
        return super().to_empty(device=device, recurse=recurse).tie_weights()   # both names got a tensor of their own

    def init_weights(self, seed, std=0.02):
        init_weights(self, seed, std, self.vision.init_values if self.vision else 1.0)
        return self

    def noisy(self, x):
        """x (..., C), in training with normal noise of up to embed_noise times its size, each row a level of its own.
        NEFTune (arXiv 2310.05914) has one level. A base trained so gets on well with a fresh projector."""
        if not (self.embed_noise and self.training): return x
        level = self.embed_noise * torch.rand_like(x[..., :1]) * x.detach().square().mean(-1, True).sqrt()
        return x + level * torch.randn_like(x)

    def visual_tokens(self, tiles):
        """uint8 tiles (N, 3, s, s) -> (N * tokens_per_tile, C of the LLM). Frozen parts keep no activations."""
        with torch.set_grad_enabled(train_vit := trains(self.vision_model)):
            x = normalize(tiles, self.vision_model.embeddings.patch_embedding.weight.dtype)
            x = self.noisy(pixel_shuffle(self.vision_model(x), self.vision.downsample))
        with torch.set_grad_enabled(train_vit or trains(self.mlp1)):
            return self.mlp1(x).flatten(0, 1)

    def embed(self, tokens, tiles):
        """tokens (T,), tiles (N, 3, s, s) uint8 or None -> embeddings (T, C), visual tokens at <IMG_CONTEXT>. A pack
        without tiles runs a black one, unused, through trainable vision: all ranks must reduce the same gradients.
        A text-only model may see words, tiles (N, W) int64: a visual token is the sum of W embeddings."""
        h = self.language_model.model.embed_tokens(tokens)                                      # (T, C)
        rows, n_tiles = (tokens == self.image_token_id).nonzero()[:, 0], 0 if tiles is None else len(tiles)
        if len(rows) != (expected := n_tiles * (self.vision.tokens_per_tile if self.vision else 1)):
            raise ValueError(f"the pack has {len(rows)} <IMG_CONTEXT> tokens, but its {n_tiles} tiles give {expected}")
        if not n_tiles:
            if self.vision is None or not (self.always_sees or trains(self.vision_model) or trains(self.mlp1)):
                return h
            tiles = tokens.new_zeros(1, 3, self.vision.image_size, self.vision.image_size, dtype=torch.uint8)
        if self.vision is None:
            return h.index_copy(0, rows, self.language_model.model.embed_tokens(tiles).sum(1))
        return h.index_copy(0, rows, self.visual_tokens(tiles)[:len(rows)].to(h.dtype))

    def hidden(self, h, positions, attend, cache=None, rows=None):
        """Run the blocks on h (T, C), positions (T,); attend(q, k, v), with a cache attend(cache[layer], q, k, v).
        -> (T, C), or rows of it: past the last block's attention only these are computed."""
        rope, last = rope_table(positions, self.llm.head_dim, self.llm.rope_theta), self.llm.n_layers - 1
        for i, block in enumerate(self.language_model.model.layers):
            look = attend if cache is None else functools.partial(attend, cache[i])
            h = block(h, rope, look, rows if i == last else None)
        return h if rows is None or last >= 0 else h.index_select(0, rows)

    def head(self, h):
        """h (rows, C) -> fp32 logits (rows, V)."""
        return self.language_model.lm_head(self.language_model.model.norm(h)).float()

    def forward(self, tokens, labels, positions, cu_seqlens, tiles=None, weights=None):
        """One pack -> the SUM of the cross-entropy of its supervised positions, an fp32 scalar.
        tokens, labels, positions (T,) int64: labels[t] is what position t has to predict (already shifted), -100 where
        nothing is asked. cu_seqlens (S+1,) int32. tiles (N, 3, s, s) uint8; N may be 0. weights (T,) fp32 multiplies
        the loss of each position. Only supervised rows go through the last block's MLP, the final norm and the head.
        ValueError if image tokens and tiles disagree."""
        rows = (labels != IGNORE).nonzero()[:, 0]                                               # (supervised,)
        h = self.hidden(self.noisy(self.embed(tokens, tiles)), positions, packed(cu_seqlens), rows=rows)
        labels, weights = (x if x is None else x.index_select(0, rows) for x in (labels, weights))
        # Under FSDP the head belongs to the root, whose weights are whole during this call. Who shards it as a unit of
        # its own gets the plain loss, for only the head's own call gathers its weight.
        head = self.language_model.lm_head.weight
        if isinstance(head, DTensor):
            loss = F.cross_entropy(self.head(h), labels, reduction="none")
            return (loss if weights is None else loss * weights).sum()
        return linear_cross_entropy(self.language_model.model.norm(h), head, labels, weights)

    def logits(self, tokens, positions, cu_seqlens, tiles=None):
        """fp32 logits (T, V) of every position; arguments as in forward."""
        return self.head(self.hidden(self.embed(tokens, tiles), positions, packed(cu_seqlens)))

def packed(cu_seqlens):
    """The attention of a pack: causal inside each document."""
    cu_seqlens = cu_seqlens.cpu()
    max_seqlen = int(cu_seqlens.diff().max())
    return lambda q, k, v: attention(q, k, v, cu_seqlens, max_seqlen, causal=True)

def compile_blocks(model):
    """Compile every transformer block in place: names and checkpoints do not change."""
    llm = model.language_model.model.layers
    for block in (*llm, *(model.vision_model.encoder.layers if model.vision else ())):
        block.compile(dynamic=True if block in llm[-1:] else None)  # it ends with other numbers of rows

# ---- FLOPs -----------------------------------------------------------------------------------------------------------

def train_flops(vision, llm, n_tiles, lengths, n_supervised, train=(True, True, True)):
    """Strict FLOPs of the forward and backward pass of packed documents, an int: the numerator of MFU.
    lengths: tokens of each document; n_supervised: rows through the head; train: (vision, projector, llm) trainable.
    Counted: matmuls at 2 per weight and row forward, the same again for each gradient that is needed (input, weight),
    attention over visible pairs only (forward 4*D per head and pair, backward twice that). Not counted: lookups,
    norms, recomputation, padding, what the last block skips. vision=None for a text-only model."""
    flops, (train_vit, train_mlp1, train_llm), backward = 0, train, any(train)
    if vision:
        C, L, rows = vision.dim, vision.n_patches + 1, n_tiles * vision.tokens_per_tile
        block = 2 * L * (4 * C * C + 2 * C * vision.ffn_dim) + 4 * L * L * C
        patches = 2 * 3 * vision.patch_size ** 2 * C * vision.n_patches
        flops += n_tiles * (vision.n_layers * block * (1 + 2 * train_vit) + patches * (1 + train_vit))
        flops += 2 * rows * vision.downsample ** 2 * C * llm.dim * (1 + train_vit + train_mlp1)
        flops += 2 * rows * llm.dim ** 2 * (1 + (train_vit or train_mlp1) + train_mlp1)
    weights = llm.n_layers * (2 * llm.dim * llm.head_dim * (llm.n_heads + llm.n_kv_heads) + 3 * llm.dim * llm.ffn_dim)
    tail = bool(llm.n_layers) * llm.dim * (llm.n_heads * llm.head_dim + 3 * llm.ffn_dim)    # only for supervised rows
    matmuls = 2 * (weights * sum(lengths) + (tail + llm.dim * llm.vocab_size) * n_supervised - tail * sum(lengths))
    attn = llm.n_layers * 4 * llm.n_heads * llm.head_dim * sum(n * (n + 1) // 2 for n in lengths)
    return flops + matmuls * (1 + backward + train_llm) + attn * (1 + 2 * backward)
