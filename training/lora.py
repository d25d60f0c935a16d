"""LoRA (arXiv 2106.09685): small matrices that train beside linear layers, which stay frozen.

    y = x W^T + b  becomes  y = x W^T + b + alpha / rank * (x A^T) B^T

A (rank, inputs) starts at random, B (outputs, rank) at zero: the first step sees the model as it
was. At the end of a stage merge_adapters adds the product to W.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ADAPTER_NAMES, kept_rows
from vision import Linear


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, in the place of `linear`, whose parameters it takes over."""

    def __init__(self, linear, rank, scale):
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank, device=device))
        self.scale = scale

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def is_adapter(name):
    """Whether this is the name of a parameter of an adapter."""
    return name.endswith(ADAPTER_NAMES)


def ranks(cfg, stage):
    """Ranks of the adapters of ViT and language model in a stage; 0: it has none."""
    vision = cfg.lora_rank if cfg.lora_vision and stage.lr_vision > 0 else 0
    return vision, cfg.lora_rank if stage.lr_llm > 0 else 0


def add_adapters(model, cfg, stage):
    """Give adapters to the linear layers of the blocks that train, if cfg.lora_rank is set.

    init_adapters fills them when the model has memory.
    """
    vision_rank, llm_rank = ranks(cfg, stage)
    blocks = []
    if vision_rank:
        blocks += model.vision_model.blocks[cfg.freeze_vision_layers:]
    if llm_rank:
        blocks += model.language_model.model.layers[cfg.freeze_llm_layers:]
    for block in blocks:
        for part in block.children():
            for name, layer in part.named_children():
                if type(layer) is Linear:
                    part[name] = LoraLinear(layer, cfg.lora_rank, cfg.lora_alpha / cfg.lora_rank)


@torch.no_grad()
def init_adapters(model, seed):
    """Fill the adapters of a model, sharded or not: A uniform as LoRA does it, B zero.

    They are drawn on the CPU, so that the number of ranks does not matter.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        local, rows = kept_rows(p)
        if name.endswith(".lora_A"):
            bound = p.shape[1] ** -0.5
            whole = torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
            local.copy_(whole[rows])
        elif name.endswith(".lora_B"):
            local.zero_()


def merge_adapters(weights, scale):
    """Merge the adapters among {name: tensor} into the weights beside them.

    Returns ({name: tensor} without adapters, {name of a linear layer: (A, B)}). The tensors that
    are given are left as they are.
    """
    merged = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
    adapters = {}
    for name in weights:
        if not name.endswith(".lora_A"):
            continue
        linear = name.removesuffix(".lora_A")
        A_and_B = (weights[name], weights[f"{linear}.lora_B"])
        merged[f"{linear}.weight"] = add_product(weights[f"{linear}.weight"], *A_and_B, scale)
        adapters[linear] = A_and_B
    return merged, adapters


def add_product(weight, A, B, scale):
    """weight + scale * B A, computed in fp32 -> a new tensor of the weight's dtype."""
    return (weight.float() + scale * (B.float() @ A.float())).to(weight.dtype)
