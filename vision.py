"""Vision: image bytes -> tiles -> ViT -> pixel shuffle -> projector.

Shape letters: N tiles (thumbnail included), s tile side in pixels, P patches per tile, C width, H heads, D head dim,
L = 1 + P: the class token and the patches.
Sources: InternVL's modeling_intern_vit.py, modeling_internvl_chat.py and dynamic_preprocess (OpenGVLab/InternVL).
"""
import math
import torch
import torch.nn as nn
import torch.nn.functional as F
from dataclasses import dataclass

from configurator import setting
from kernels.attention import attention

# ---- the ViT and the projector ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class VisionConfig:
    image_size: int = setting(448, at_least=1)  # side of a tile in pixels
    patch_size: int = setting(14, at_least=1)  # side of a patch in pixels
    dim: int = setting(1024, at_least=1)  # width C
    n_layers: int = 24
    n_heads: int = setting(16, at_least=1)
    ffn_dim: int = 4096
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    init_values: float = 1.0            # layer scale of a fresh model (InternVL: initializer_factor)
    downsample: int = setting(2, at_least=1)  # pixel shuffle: this many patches per side become one visual token
    PRESETS = {"internvit-300m": {}, "toy": dict(image_size=84, dim=192, n_layers=3, n_heads=6, ffn_dim=768)}

    n_patches = property(lambda self: (self.image_size // self.patch_size) ** 2)                # P
    tokens_per_tile = property(lambda self: self.n_patches // self.downsample ** 2)

def working_dtype(x):
    """The dtype matmuls on x run in: autocast's where it is on. Norms hand it out, so that nothing is cast twice."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        """In fp32 whatever comes in, out in the dtype of the matmul that follows."""
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(working_dtype(x))

class VisionEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, cfg.dim))
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + cfg.n_patches, cfg.dim))

    def forward(self, tiles):                                               # (N, 3, s, s)
        x, table = self.patch_embedding(tiles), self.position_embedding     # (N, C, rows, columns), (1, 1 + P, C)
        side, grid = math.isqrt(table.shape[1] - 1), x.shape[2:]
        if grid != (side, side):                             # tiles of another size than it was trained on
            places = table[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)           # (1, C, side, side)
            places = F.interpolate(places, size=grid, mode="bicubic", align_corners=False)
            table = torch.cat([table[:, :1], places.flatten(2).transpose(1, 2).to(table.dtype)], 1)
        first = (self.class_embedding + table[:, :1]).expand(len(x), -1, -1)                    # (N, 1, C)
        return torch.cat([first, x.flatten(2).transpose(1, 2) + table[:, 1:]], 1)               # (N, L, C)

class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(cfg.dim, 3 * cfg.dim, bias=cfg.qkv_bias),
                                       proj=nn.Linear(cfg.dim, cfg.dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(cfg.dim, cfg.ffn_dim), fc2=nn.Linear(cfg.ffn_dim, cfg.dim)))
        self.norm1, self.norm2 = LayerNorm(cfg.dim, eps=cfg.norm_eps), LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.ls1, self.ls2 = nn.Parameter(torch.empty(cfg.dim)), nn.Parameter(torch.empty(cfg.dim))

    def forward(self, x, cu_seqlens, drop):                                 # (N, L, C)
        N, L, C = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(N * L, 3, self.n_heads, C // self.n_heads)      # (N*L, 3, H, D)
        seen = attention(*qkv.unbind(1), cu_seqlens, L, causal=False).reshape(N, L, C)
        x = x + drop_path(self.attn.proj(seen) * self.ls1, drop)
        return x + drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) * self.ls2, drop)

def drop_path(x, rate):
    """Stochastic depth (arXiv 1603.09382): drop a tile's residual branch with probability `rate`, scale the others."""
    if rate == 0.0: return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)

class ViT(nn.Module):
    """InternViT: class token, learned positions, pre-norm blocks with layer scale, no final norm."""
    def __init__(self, cfg):
        super().__init__()
        if cfg.dim % cfg.n_heads:
            raise ValueError(f"dim {cfg.dim} does not divide by n_heads {cfg.n_heads}")
        if cfg.image_size % (cfg.patch_size * cfg.downsample):
            raise ValueError(f"image_size {cfg.image_size} does not divide by patch_size {cfg.patch_size} x downsample "
                             f"{cfg.downsample}")
        self.embeddings = VisionEmbeddings(cfg)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.n_layers))})
        self.drop_path = 0.0                        # rate of the last block; grows linearly from 0 over the depth

    def forward(self, tiles):
        """Normalised tiles (N, 3, s, s) -> patch vectors (N, P, C) of the last block, without the class token."""
        x = self.embeddings(tiles)
        cu_seqlens = x.shape[1] * torch.arange(len(x) + 1, dtype=torch.int32)
        step = self.drop_path / max(1, len(self.encoder.layers) - 1) if self.training else 0.0
        for i, block in enumerate(self.encoder.layers):
            x = block(x, cu_seqlens, step * i)
        return x[:, 1:]

def pixel_shuffle(x, factor=2):
    """(N, P, C) -> (N, P/f^2, f^2*C): each f x f square of patches becomes one token, channels in the order
    (row offset, column offset, channel). InternVL's ps_version "v2"."""
    N, P, C = x.shape
    side = math.isqrt(P) // factor                              # of the grid of visual tokens
    x = x.reshape(N, side, factor, side, factor, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, side * side, factor * factor * C)

class Projector(nn.Sequential):
    """InternVL's mlp1: LayerNorm, Linear, GELU, Linear; (N, P/f^2, f^2*C of the ViT) -> (N, P/f^2, C of the LLM)."""
    def __init__(self, cfg, llm_dim):
        width = cfg.dim * cfg.downsample ** 2
        super().__init__(LayerNorm(width, eps=1e-5), nn.Linear(width, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
