"""Vision: tiles -> ViT -> pixel shuffle -> projector -> visual tokens.

The ViT is InternViT; AIMv2, the other kind, is in aimv2.py.

Shape letters: N tiles (thumbnail included), s tile side in pixels, P patches per tile, C width,
H heads, D head dim, f the downsample factor, L = 1 + P: the class token and the patches.
Sources: InternVL's modeling_intern_vit.py and modeling_internvl_chat.py (OpenGVLab/InternVL).
The ModuleDicts give parameters the names that released checkpoints have.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import setting
from kernels.attention import attention


@dataclass(slots=True)
class VisionConfig:
    image_size: int = setting(448, at_least=1, at_most=4096)  # side of a tile in pixels
    patch_size: int = setting(14, at_least=1, at_most=4096)  # side of a patch in pixels
    dim: int = setting(1024, at_least=1, at_most=2**16)  # width C
    n_layers: int = setting(24, at_least=1, at_most=256)
    n_heads: int = setting(16, at_least=1, at_most=2**16)
    ffn_dim: int = setting(4096, at_least=1, at_most=2**20)
    norm_eps: float = setting(1e-6, above=0, at_most=1)
    qkv_bias: bool = True  # of InternViT
    # layer scale of a fresh InternViT (InternVL: initializer_factor)
    init_values: float = setting(1.0, above=0, at_most=1e3)
    # patches per side that become one visual token
    downsample: int = setting(2, at_least=1, at_most=64)
    kind: Literal["internvit", "aimv2"] = "internvit"
    PRESETS = {
        "internvit-300m": {},
        "aimv2-huge": dict(kind="aimv2", dim=1536, n_heads=12, norm_eps=1e-5),
        "toy": dict(image_size=84, dim=192, n_layers=3, n_heads=6, ffn_dim=768),
    }

    @property
    def n_patches(self):
        """P, of a whole tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def rows_per_tile(self):
        """L: InternViT has a class token beside the patches."""
        return self.n_patches + (self.kind == "internvit")

    @property
    def tokens_per_tile(self):
        """Visual tokens that one tile becomes."""
        return self.n_patches // self.downsample**2


def working_dtype(x):
    """The dtype in which matmuls on x run: autocast's where it is on, else x's own.

    The residuals have it. The norms compute in fp32 and return it. Under autocast, an fp32 result
    would be cast again by each matmul that reads it.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


class Linear(nn.Linear):
    weight_copy = None  # in 16 bits, see training/copies.py
    bias_copy = None
    multiply = staticmethod(F.linear)  # in 8 bits, see training/fp8.py
    joined = None  # (weight, bias) of this one and others, see join_weights in decoding.py

    def forward(self, x):
        weight = self.weight if self.weight_copy is None else self.weight_copy
        bias = self.bias if self.bias_copy is None else self.bias_copy
        return self.multiply(x, weight, bias)


def products(x, *linears):
    """[linear(x) for each Linear]; those whose weights are joined share one product."""
    joined = getattr(linears[0], "joined", None)
    if joined is None:
        return [linear(x) for linear in linears]
    return F.linear(x, *joined).split([linear.out_features for linear in linears], -1)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        """Compute in fp32, return the dtype of the matmul that follows."""
        weight = self.weight.float()
        bias = self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(working_dtype(x))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        """Compute in fp32, return the dtype of the matmul that follows."""
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.to(working_dtype(x))


# ---- the ViT -------------------------------------------------------------------------------------

class VisionEmbeddings(nn.Module):
    """Patches to vectors: one convolution, a class token in front, learned positions."""

    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, cfg.dim))
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + cfg.n_patches, cfg.dim))

    def forward(self, tiles):
        """tiles (N, 3, s, s) -> (N, L, C)."""
        x = self.patch_embedding(tiles)  # (N, C, rows, columns)
        table = self.position_embedding
        positions = resize_positions(table[:, 1:], x.shape[2:])  # (1, P, C)
        patches = x.flatten(2).transpose(1, 2) + positions  # (N, P, C)
        class_token = (self.class_embedding + table[:, :1]).expand(len(x), -1, -1)  # (N, 1, C)
        return torch.cat([class_token, patches], 1)


def resize_positions(table, grid):
    """Position embeddings (1, P, C) of patches for a grid of (rows, columns) patches.

    Tiles of another size than the ViT was trained on get interpolated ones.
    """
    side = math.isqrt(table.shape[1])
    if grid == (side, side):
        return table
    trained = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, ., .)
    resized = F.interpolate(trained, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(table.dtype)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled per channel (layer scale, arXiv 2103.17239)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.n_heads = cfg.n_heads
        self.attn = nn.ModuleDict({
            "qkv": Linear(C, 3 * C, bias=cfg.qkv_bias),
            "proj": Linear(C, C),
        })
        self.mlp = nn.ModuleDict({
            "fc1": Linear(C, cfg.ffn_dim),
            "fc2": Linear(cfg.ffn_dim, C),
        })
        self.norm1 = LayerNorm(C, eps=cfg.norm_eps)
        self.norm2 = LayerNorm(C, eps=cfg.norm_eps)
        self.ls1 = nn.Parameter(torch.empty(C))
        self.ls2 = nn.Parameter(torch.empty(C))

    def forward(self, x, cu_seqlens, keep=None):
        """x (N*L, C) -> (N*L, C). cu_seqlens (N+1,): every tile is a document of its own.

        keep (2, N*L): what stochastic depth multiplies the two branches by, see keep_factors.
        """
        qkv = self.attn.qkv(self.norm1(x))
        branch = self.attn.proj(attend_tiles(qkv, self.n_heads, cu_seqlens)) * self.ls1
        x = add_branch(x, branch, None if keep is None else keep[0])

        hidden = F.gelu(self.mlp.fc1(self.norm2(x)))
        branch = self.mlp.fc2(hidden) * self.ls2
        return add_branch(x, branch, None if keep is None else keep[1])


def add_branch(x, branch, keep=None):
    """x + branch, both (N*L, C), in x's dtype. keep (N*L,): factors of stochastic depth.

    Layer scales that train are fp32, and so is what they scale; keep is fp32. The sum is rounded
    once.
    """
    if keep is not None:
        branch = branch * keep[:, None]
    return (x + branch).to(x.dtype)


def attend_tiles(qkv, n_heads, cu_seqlens):
    """Attention inside each tile: qkv (N*L, 3*C), queries first -> (N*L, C)."""
    rows = len(qkv)
    L = rows // (len(cu_seqlens) - 1)
    # A split, not an unbind: the compiler knows that its gradient is the tensor that attention's
    # backward pass returns, and copies nothing.
    heads = qkv.view(rows, 3 * n_heads, -1)
    q, k, v = heads.split(n_heads, 1)  # (N*L, H, D) each
    return attention(q, k, v, cu_seqlens, L, causal=False).flatten(1)


def keep_factors(n_layers, n_tiles, length, rate, device):
    """Stochastic depth (arXiv 1603.09382) -> for each layer, fp32 factors of its branches (2, N*L).

    A tile's branch becomes 0 with a probability that grows linearly over the depth, from 0 to
    `rate`. The others are scaled up for it. All factors are drawn here, outside the blocks: a
    block that knew its own rate would be compiled once for each rate. In bf16 1 / (1 - rate) would
    be off by up to 0.4 %, and the mean with it.
    """
    rates = torch.linspace(0, rate, n_layers, device=device)[:, None, None]
    kept = torch.rand(n_layers, 2, n_tiles, device=device) >= rates
    factors = kept / (1 - rates)  # (n_layers, 2, N)
    tile_of_row = torch.arange(n_tiles, device=device).repeat_interleave(length)  # (N*L,)
    return [of_layer[:, tile_of_row] for of_layer in factors]


class ViT(nn.Module):
    """InternViT: class token, learned positions, pre-norm blocks with layer scale, no final norm.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, cfg):
        super().__init__()
        check_division(cfg)
        self.embeddings = VisionEmbeddings(cfg)
        blocks = [VisionBlock(cfg) for _ in range(cfg.n_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.drop_path = 0.0  # rate of the last block; it grows linearly from 0 over the depth

    @property
    def blocks(self):
        return self.encoder.layers

    def forward(self, tiles):
        """Normalised tiles (N, 3, s, s) -> patch vectors (N, P, C), without the class token."""
        return run_blocks(self, self.embeddings(tiles))[:, 1:]


def check_division(cfg):
    """ValueError for sizes of a ViT that do not divide."""
    if cfg.dim % cfg.n_heads:
        raise ValueError(f"dim {cfg.dim} does not divide by n_heads {cfg.n_heads}")
    if cfg.image_size % (cfg.patch_size * cfg.downsample):
        raise ValueError(f"image_size {cfg.image_size} does not divide by "
                         f"patch_size {cfg.patch_size} x downsample {cfg.downsample}")


def run_blocks(vit, x):
    """x (N, L, C) -> (N, L, C): the blocks of a ViT, with stochastic depth while it trains."""
    N, L, C = x.shape
    # (N*L, C): tiles end to end, as documents are in the language model. A copy, because
    # torch.compile makes another graph for a block whose input is a view.
    x = x.flatten(0, 1).to(working_dtype(x), copy=True)
    cu_seqlens = L * torch.arange(N + 1, dtype=torch.int32)
    keep = [None] * len(vit.blocks)
    if vit.training and vit.drop_path:
        keep = keep_factors(len(vit.blocks), N, L, vit.drop_path, x.device)
    for block, keep_here in zip(vit.blocks, keep, strict=True):
        x = block(x, cu_seqlens, keep_here)
    return x.view(N, L, C)


# ---- from patches to visual tokens ---------------------------------------------------------------

def pixel_shuffle(x, factor=2):
    """(N, P, C) -> (N, P/f^2, f^2*C): each f x f square of patches becomes one token.

    Channels stand in the order (row offset, column offset, channel): InternVL's ps_version "v2".
    """
    N, P, C = x.shape
    side = math.isqrt(P) // factor  # of the grid of visual tokens
    x = x.reshape(N, side, factor, side, factor, C)
    x = x.permute(0, 1, 3, 2, 4, 5)  # (N, side, side, f, f, C)
    return x.reshape(N, side * side, factor * factor * C)


class Projector(nn.Sequential):
    """InternVL's mlp1: LayerNorm, Linear, GELU, Linear.

    (N, P/f^2, f^2*C of the ViT) -> (N, P/f^2, C of the LLM). To try another one, change this class
    and, for the MFU, projector_flops. All that the model asks of it is `Projector(cfg, llm_dim)`
    and these shapes.
    """

    def __init__(self, cfg, llm_dim):
        width = cfg.dim * cfg.downsample**2
        super().__init__(
            LayerNorm(width, eps=1e-5),
            Linear(width, llm_dim),
            nn.GELU(),
            Linear(llm_dim, llm_dim),
        )


# ---- FLOPs ---------------------------------------------------------------------------------------

def vision_flops(vision, llm_dim, n_tiles, trained):
    """Strict FLOPs of ViT and projector, a part of train_flops of training/flops.py.

    That says what is counted, and what `trained` is.
    """
    flops = vit_flops(vision, n_tiles, trained)
    return flops + projector_flops(vision, llm_dim, n_tiles, trained.vision, trained.projector)


def vit_flops(vision, n_tiles, trained):
    """Those of the ViT. Pixels need no gradient."""
    C = vision.dim
    L = vision.rows_per_tile
    rank = trained.vision_rank
    frozen = trained.frozen_vision_layers if trained.vision else vision.n_layers
    trained_blocks = vision.n_layers - frozen
    mlp = 3 if vision.kind == "aimv2" else 2  # matrices of its MLP
    matmuls = 2 * L * (4 * C * C + mlp * C * vision.ffn_dim)  # of a block: qkv and proj, the MLP
    scores = tile_scores(vision)
    adapters = 2 * L * rank * (6 * C + mlp * (C + vision.ffn_dim))  # of inputs and outputs
    patch_embedding = 2 * 3 * vision.patch_size**2 * C * vision.n_patches

    flops = vision.n_layers * (matmuls + scores) + patch_embedding  # forward
    flops += trained_blocks * (matmuls + 2 * scores)  # gradients of inputs
    if rank:
        flops += trained_blocks * 3 * adapters
        if trained_blocks:
            flops -= 2 * L * C * (3 * C + rank)  # no input of the first one needs a gradient
    else:
        flops += trained_blocks * matmuls  # gradients of weights
    if trained.vision and not rank and not frozen:
        flops += patch_embedding  # gradient of its weight
    return n_tiles * flops


def tile_scores(vision):
    """FLOPs of the attention of one block to one tile, forward; backward they are twice that."""
    return 4 * vision.rows_per_tile**2 * vision.dim


def projector_flops(vision, llm_dim, n_tiles, train_vit, train_projector):
    """Those of the projector's two matrices."""
    rows = n_tiles * vision.tokens_per_tile
    first = 2 * rows * vision.dim * vision.downsample**2 * llm_dim
    second = 2 * rows * llm_dim * llm_dim
    flops = first + second  # forward
    if train_projector:
        flops += first + second  # gradients of the weights
    if train_vit or train_projector:
        flops += second  # gradient of the input of the second
    if train_vit:
        flops += first  # gradient of the input of the first
    return flops
