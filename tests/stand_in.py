"""A stand-in with the three parts of a VLM, small enough to train in milliseconds, and its loop.

Run as a script it is one of two ranks: see `two_ranks` in conftest.py.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script

from train import RunConfig, Stage  # noqa: E402
from training import checkpoint, distributed, optim, signals  # noqa: E402
from training.distributed import ALONE  # noqa: E402
from training.progress import Progress  # noqa: E402

ALL = Stage(steps=4, lr_vision=1e-2, lr_projector=1e-2, lr_llm=1e-2)
ADVANCE = Stage(steps=4, lr_vision=1e-2, lr_projector=1e-2)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(dim)
        self.up_proj = nn.Linear(dim, 2 * dim)
        self.down_proj = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.input_layernorm(x))))


class Vision(nn.Module):
    def forward(self, tiles):
        x = (
            self.patch_embedding(tiles).flatten(2).transpose(1, 2) + self.class_embedding
        )  # (N, P, C)
        return self.encoder.layers[0](x * self.ls1)

    @property
    def blocks(self):
        return self.encoder.layers


class Tiny(nn.Module):
    """A stand-in with the three parts of a VLM; tied embedding as in the small language models.

    Odd sizes, so that no dimension divides evenly over two ranks.
    """

    def __init__(self, dim=7, vocab=11, tied=True):
        super().__init__()
        self.vision_model = Vision()
        self.vision_model.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.vision_model.patch_embedding = nn.Conv2d(3, dim, 2, 2)
        self.vision_model.ls1 = nn.Parameter(torch.ones(dim))
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList([Block(dim)])
        self.mlp1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.embed_tokens = nn.Embedding(vocab, dim)
        self.language_model.model.layers = nn.ModuleList([Block(dim), Block(dim)])
        self.language_model.lm_head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def logits(self, tokens, tiles):
        x = self.mlp1(self.vision_model(tiles).mean(dim=(0, 1)))  # (C,)
        x = self.language_model.model.embed_tokens(tokens) + x  # (T, C)
        for layer in self.language_model.model.layers:
            x = layer(x)
        return self.language_model.lm_head(x)

    def forward(self, tokens, tiles):
        return nn.functional.cross_entropy(
            self.logits(tokens, tiles), tokens.roll(-1), reduction="sum"
        )


def batch(step, rank):
    """One rank's micro-batch: rank 0 has 5 tokens, rank 1 has 3."""
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 11, (5 - 2 * rank,), generator=g), torch.randn(2, 3, 4, 4, generator=g)


def build(stage, parallel="ddp", dist=ALONE, cfg=None, activation_checkpointing="none", **sizes):
    """A fresh stand-in for a stage, wrapped and on its device, with its optimizer."""
    torch.manual_seed(0)
    model = Tiny(**sizes)
    optim.set_trainable(model, stage)
    distributed.checkpoint_activations(model, activation_checkpointing)
    model = distributed.parallelize(model, parallel, torch.float32, dist)
    optimizer = optim.make_optimizer(model, stage, cfg or RunConfig())
    optim.make_moments(optimizer)
    return model, optimizer


def train(model, optimizer, dist, ranks, steps):
    """`steps` updates on the batches of `ranks`, the loop of train.py in small.

    Returns the last gradient norm.
    """
    for step in steps:
        tokens = sum(len(batch(step, r)[0]) for r in range(2))
        for i, rank in enumerate(ranks):
            distributed.set_gradient_sync(model, i == len(ranks) - 1)
            (model(*batch(step, rank)) * dist.world / tokens).backward()
        norm, _ = optim.clip_grad_norm(model, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


def save(folder, step, model, optimizer, progress=None, dist=ALONE, keep=2):
    """A checkpoint that is on the disk when this returns."""
    saver = checkpoint.Saver(folder, dist, keep)
    saver.save(step, model, optimizer, progress or Progress(), wait=True)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def on_two_ranks(folder):
    """Every check that needs two ranks, so that they start once."""
    torch.set_num_threads(1)
    dist = distributed.setup_distributed("cpu", 60)
    results = {}
    for parallel in ("ddp", "fsdp"):
        model, optimizer = build(ADVANCE, parallel, dist)
        results[f"{parallel}_norm"] = train(model, optimizer, dist, [dist.rank], [0, 1])
        results[f"{parallel}_advance"] = distributed.full_state(model)
        model, optimizer = build(ALL, parallel, dist)  # the next stage
        train(model, optimizer, dist, [dist.rank], [2])
        results[f"{parallel}_all"] = distributed.full_state(model)
    # a checkpoint of one plain process -> ddp -> fsdp -> (back in the test) one plain process
    for source, parallel, step in (("none", "ddp", 2), ("ddp", "fsdp", 3)):
        model, optimizer = build(ALL, parallel, dist)
        path = checkpoint.find_checkpoint(f"{folder}/{source}", dist)
        checkpoint.load_checkpoint(path, model, optimizer)
        assert checkpoint.read_progress(path) == Progress(step=step)
        train(model, optimizer, dist, [dist.rank], [step])
        save(f"{folder}/{parallel}", step + 1, model, optimizer, Progress(step=step + 1), dist)
    guard = signals.Preemption()
    results["stop_before"] = guard.stop_requested(dist)
    if dist.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    results["stop_after"] = guard.stop_requested(dist)
    if dist.is_main:
        torch.save(results, f"{folder}/results.pt")
    distributed.close_distributed()


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])
