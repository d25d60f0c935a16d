"""AIMv2, the ViT of SAIL-VL-1.5-2B, SAIL-VL-1.6-8B and SAIL-VL2.

Beside InternViT (vision.py): RMSNorm instead of LayerNorm, a gated MLP (SwiGLU), no class token, no
layer scale, no bias but in the patch embedding, a norm after it and one after the last block.

Shape letters as in vision.py; here L = P. Sources: arXiv 2411.14402 and Apple's modeling_aimv2.py,
which the released SAIL-VL folders use. The ModuleDicts give parameters the names that they have.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from vision import (
    Linear,
    RMSNorm,
    ViT,
    add_branch,
    attend_tiles,
    check_division,
    resize_positions,
    run_blocks,
)


class AIMv2Embeddings(nn.Module):
    """Patches to vectors: one convolution, a norm, learned positions."""

    def __init__(self, cfg):
        super().__init__()
        self.patchifier = nn.ModuleDict({
            "proj": nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size),
            "norm": RMSNorm(cfg.dim, cfg.norm_eps),
        })
        self.pos_embed = nn.Parameter(torch.empty(1, cfg.n_patches, cfg.dim))

    def forward(self, tiles):
        """tiles (N, 3, s, s) -> (N, P, C)."""
        x = self.patchifier.proj(tiles)  # (N, C, rows, columns)
        positions = resize_positions(self.pos_embed, x.shape[2:])
        return self.patchifier.norm(x.flatten(2).transpose(1, 2)) + positions


class AIMv2Block(nn.Module):
    """Pre-norm attention, then a gated MLP."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.dim
        self.n_heads = cfg.n_heads
        self.attn = nn.ModuleDict({
            "qkv": Linear(C, 3 * C, bias=False),
            "proj": Linear(C, C, bias=False),
        })
        self.mlp = nn.ModuleDict({
            "fc1": Linear(C, cfg.ffn_dim, bias=False),  # the gate
            "fc2": Linear(cfg.ffn_dim, C, bias=False),
            "fc3": Linear(C, cfg.ffn_dim, bias=False),
        })
        self.norm_1 = RMSNorm(C, cfg.norm_eps)
        self.norm_2 = RMSNorm(C, cfg.norm_eps)

    def forward(self, x, cu_seqlens, keep=None):
        """x (N*P, C) -> (N*P, C); cu_seqlens and keep as in vision.VisionBlock."""
        qkv = self.attn.qkv(self.norm_1(x))
        branch = self.attn.proj(attend_tiles(qkv, self.n_heads, cu_seqlens))
        x = add_branch(x, branch, None if keep is None else keep[0])

        mlp = self.mlp
        y = self.norm_2(x)
        branch = mlp.fc2(F.silu(mlp.fc1(y)) * mlp.fc3(y))
        return add_branch(x, branch, None if keep is None else keep[1])


class AIMv2(nn.Module):
    """The whole ViT; ValueError for sizes that do not divide."""

    def __init__(self, cfg):
        super().__init__()
        check_division(cfg)
        self.preprocessor = AIMv2Embeddings(cfg)
        blocks = [AIMv2Block(cfg) for _ in range(cfg.n_layers)]
        self.trunk = nn.ModuleDict({
            "blocks": nn.ModuleList(blocks),
            "post_trunk_norm": RMSNorm(cfg.dim, cfg.norm_eps),
        })
        self.drop_path = 0.0  # as in vision.ViT

    @property
    def blocks(self):
        return self.trunk.blocks

    def forward(self, tiles):
        """Normalised tiles (N, 3, s, s) -> patch vectors (N, P, C)."""
        x = run_blocks(self, self.preprocessor(tiles))
        return self.trunk.post_trunk_norm(x)


def vision_encoder(cfg):
    """The ViT of a VisionConfig, of either kind."""
    return AIMv2(cfg) if cfg.kind == "aimv2" else ViT(cfg)
