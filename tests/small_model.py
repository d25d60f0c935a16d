"""A small random model and packs for it."""

import torch

from inputs.chat import IGNORE
from model import VLM, LLMConfig
from vision import VisionConfig

VISION = {  # 4 tokens per tile
    "image_size": 56,
    "patch_size": 14,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_dim": 128,
}
LLM = {
    "vocab_size": 320,
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "ffn_dim": 96,
    "rope_theta": 1e4,
}
IMG = 319  # id of <IMG_CONTEXT>


def tiny(seed=0, std=0.2, kind="internvit", **llm):
    """A small random VLM; the wide std makes mistakes visible."""
    vlm = VLM(VisionConfig(**VISION, kind=kind), LLMConfig(**{**LLM, **llm}), IMG)
    vlm.init_weights(seed, std=std)
    stir(vlm, seed + 1)
    return vlm


def stir(module, seed):
    """Move biases, norms and layer scales away from 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def pack(lengths, n_tiles=(), seed=0):
    """Random documents; document i holds n_tiles[i] tiles.

    -> tokens, labels, positions, cu_seqlens, tiles.
    """
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, 300, (sum(lengths),), generator=g)
    for start, n in zip(cu.tolist(), n_tiles, strict=False):
        tokens[start + 1 : start + 1 + 4 * n] = IMG
    labels = torch.randint(0, 300, tokens.shape, generator=g)
    labels[torch.rand(tokens.shape, generator=g) < 0.5] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    tiles = torch.randint(0, 256, (sum(n_tiles), 3, 56, 56), generator=g, dtype=torch.uint8)
    return tokens, labels, positions, cu.int(), tiles
