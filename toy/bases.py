"""The toy world's own ViT and language model: what InternViT and Qwen2.5 are to the real recipe.

    python -m toy --out=shards/toy_llm --n=230000 --seed=102 --parts=text
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m toy.bases llm
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m toy.bases vit --steps=2000

The recipes are below, one for each of the four parts, and runs/toy_bases.sh runs them in order. The
loop is a small one of its own: no stages, no checkpoints; a base takes half an hour on two cores.

The weights in toy/vit and toy/llm were made in five and seventeen parts, for the world grew
meanwhile; the train.log beside them has all but one. From scratch, 13,000 steps of `llm` answer
87.8 % of the toy questions from words, those weights 99.1 % (docs/log.md).

Shapes: T tokens of a pack, M visual tokens, C width.
"""
import itertools
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

from configurator import configure, run_script, setting, subcommand
from data import make_loader
from inputs.images import MAX_TILES, normalize
from inputs.packing import Packs, PackSettings
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer
from model import LanguageModel, LLMConfig, init_weights
from model_config import config_json
from toy.words import CellDataset, WordDataset, WordSource
from training.compile import compile_blocks
from training.distributed import (
    all_reduce_dict,
    all_reduce_sum,
    close_distributed,
    say,
    setup_distributed,
)
from training.optim import (
    clip_grad_norm,
    lr_scale,
    make_optimizer,
    seed_everything,
    set_dtypes,
    set_trainable,
)
from vision import Projector, VisionConfig, ViT, pixel_shuffle
from weights import fill, inspect_folder, save_folder

TOY_VOCABULARY = str(Path(__file__).with_name("tokenizer"))
TEMPLATE = "sailvl-chat"


# ---- recipes -------------------------------------------------------------------------------------

@dataclass(slots=True)
class Config:
    data: str = ""  # .jsonl of words, or tars of pictures
    out_dir: str = ""  # model folder to write
    init_from: str = ""  # model folder to start from; "": random weights
    reads: Literal["words", "pictures"] = "words"  # words: a language model alone
    cell_labels: Literal["none", "also", "only"] = "none"  # whether visual tokens name their cells
    noise: float = setting(0.0, at_most=100)  # on what enters projector and LLM, see add_noise
    tokens_per_pack: int = setting(800, at_least=1, at_most=2**22)  # a step is one pack per rank
    max_tiles_per_pack: int = setting(40, at_least=1, at_most=4096)
    max_tiles: int = setting(4, at_least=1, at_most=MAX_TILES)  # of a picture
    shuffle: bool = True  # False: in the order of the file, whose first fifth is easier
    loss_weight: Literal["token", "sample", "sqrt"] = "token"  # see data.answer_weight
    steps: int = setting(4000, at_least=1, at_most=10**9)
    lr_vision: float = setting(0.0, at_most=1)  # peak rates, 0: frozen
    lr_projector: float = setting(0.0, at_most=1)
    lr_llm: float = setting(0.0, at_most=1)
    warmup_steps: int = setting(50, at_most=10**9)
    min_lr_ratio: float = setting(0.0, at_most=1)  # the cosine ends at this fraction of the peak
    weight_decay: float = setting(0.02, at_most=1)
    beta1: float = setting(0.9, below=1)
    beta2: float = setting(0.98, below=1)
    eps: float = setting(1e-8, above=0, at_most=1)
    grad_clip: float = setting(1.0, at_most=1e9)
    init_std: float = setting(0.05, above=0, at_most=1)  # of random matrices; wider ones: 0.02
    seed: int = setting(1234, at_most=2**32 - 1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # float32: faster without AVX512-BF16, AMX
    compile: bool = True
    print_every: int = setting(100, at_least=1, at_most=10**9)


# The language model. Long captions would drown short answers, if each token counted alike.
LLM = Config(
    data="shards/toy_llm/text.jsonl",
    out_dir="out/toy_llm",
    shuffle=False,
    loss_weight="sample",
    steps=13500,
    lr_llm=1e-3,
    warmup_steps=100,
    min_lr_ratio=0.03,
)
# Its second part: noise on what it reads, so that it understands a fresh projector. Without the
# noise it teaches the projector letters last of all; with noise from the first step, multiple
# choice and counting are not learned. Alignment can ask the frozen model what a cell shows.
LLM_NOISE = replace(
    LLM,
    data="shards/toy_llm_noise/text.jsonl",
    out_dir="out/toy_llm_noise",
    init_from="out/toy_llm",
    shuffle=True,
    cell_labels="also",
    noise=1.0,
    steps=6000,
)
# The ViT. A head that is thrown away names what each visual token sees or, of every second one,
# its place.
VIT = Config(
    data="shards/toy_vit/pretrain-*.tar",
    out_dir="out/toy_vit",
    reads="pictures",
    cell_labels="only",
    tokens_per_pack=1600,
    lr_vision=1.5e-3,
    lr_projector=1.5e-3,
    lr_llm=1.5e-3,
    init_std=0.04,
)
# Its second part: noise on what it hands on, so that a fresh projector reads it easily. Behind the
# projector stands the frozen language model, as InternViT was trained before an InternLM. Captions
# and questions say where things are.
VIT_NOISE = replace(
    VIT,
    data="shards/toy_vit_noise/drill-*.tar",
    out_dir="out/toy_vit_noise",
    init_from="out/toy_vit_start",
    cell_labels="also",
    noise=0.8,
    max_tiles=8,                     # of two pictures
    steps=2000,
    lr_vision=5e-4,
    lr_projector=3e-3,
    lr_llm=0.0,
)
RECIPES = {"llm": LLM, "llm_noise": LLM_NOISE, "vit": VIT, "vit_noise": VIT_NOISE}


# ---- the model -----------------------------------------------------------------------------------

class BaseModel(nn.Module):
    """A language model and, unless vision is None, the ViT and projector in front of it.

    Without them a visual token is the sum of the embeddings of its cell's words. A language model
    of no layers is the ViT's head: its last norm and its embeddings.
    """

    def __init__(self, vision, llm, image_token_id):
        super().__init__()
        self.vision = vision
        self.llm = llm
        self.image_token_id = image_token_id
        if vision:
            self.vision_model = ViT(vision)
            self.mlp1 = Projector(vision, llm.dim)
        self.language_model = LanguageModel(llm)

    def forward(self, batch, noise):
        """A batch -> the SUM of the loss of its supervised tokens, an fp32 scalar."""
        h = add_noise(self.embed(batch, noise), noise)
        borders = [0, *itertools.accumulate(batch["lengths"])]
        return self.language_model.loss(
            h, batch["labels"], batch["positions"], borders, batch["weights"])

    def embed(self, batch, noise=0.0):
        """A batch -> its embeddings (T, C)."""
        tokens = batch["tokens"]
        h = self.language_model.embed(tokens)
        rows = (tokens == self.image_token_id).nonzero()[:, 0]  # (M,)
        visual = self.visual_tokens(batch, noise)
        return h.index_copy(0, rows, visual.to(h.dtype))

    def visual_tokens(self, batch, noise):
        """The `cells` or `tiles` of a batch -> (M, C)."""
        if self.vision is None:
            return self.language_model.embed(batch["cells"]).sum(1)
        x = self.vision_model(normalize(batch["tiles"]))
        x = add_noise(pixel_shuffle(x, self.vision.downsample), noise)
        return self.mlp1(x).flatten(0, 1)


def add_noise(x, noise):
    """x (..., C) with normal noise of up to `noise` times its size, each row at a random level.

    NEFTune (arXiv 2310.05914) has one level for all. A base trained so gets on well with a fresh
    projector.
    """
    if not noise:
        return x
    size = x.detach().square().mean(-1, True).sqrt()
    level = noise * torch.rand_like(x[..., :1]) * size
    return x + level * torch.randn_like(x)


def load_base(folder, tokenizer):
    """The BaseModel of a model folder. ValueError for a ViT alone."""
    about = inspect_folder(folder)
    if about.llm is None:
        raise ValueError(f"{folder} has no language model; join it with one: convert.py assemble")
    model = BaseModel(about.vision, about.llm, tokenizer.image_id)
    fill(model, about.tensors)
    return model


def start_base(cfg, tokenizer):
    """The BaseModel that a recipe starts from: a folder's, or of toy sizes with random weights."""
    if cfg.init_from:
        return load_base(cfg.init_from, tokenizer)
    llm = LLMConfig(**LLMConfig.PRESETS["toy"])
    vision = None
    if cfg.reads == "pictures":
        vision = VisionConfig(**VisionConfig.PRESETS["toy"])
        llm = replace(llm, n_layers=0)
    model = BaseModel(vision, llm, tokenizer.image_id)
    init_weights(model, cfg.seed, cfg.init_std)
    return model


# ---- training ------------------------------------------------------------------------------------

def open_packs(cfg, tokenizer, vision, packs_per_step):
    """The dataset of a recipe's data."""
    vision = vision or VisionConfig(**VisionConfig.PRESETS["toy"])
    settings = PackSettings(
        tile_size=vision.image_size,
        tokens_per_tile=vision.tokens_per_tile,
        max_tiles=cfg.max_tiles,
        tokens_per_pack=cfg.tokens_per_pack,
        tiles_per_pack=cfg.max_tiles_per_pack,
        seed=cfg.seed,
        packs_per_step=packs_per_step,
        shuffle=cfg.shuffle,
    )
    if cfg.reads == "words":
        source = WordSource(cfg.data).measure(tokenizer, TEMPLATE)
        packs = Packs([source], settings)
        return WordDataset(packs, tokenizer, TEMPLATE, cfg.cell_labels, cfg.loss_weight)
    packs = Packs(open_sources(cfg.data, tokenizer, TEMPLATE), settings)
    return CellDataset(packs, tokenizer, TEMPLATE, cfg.cell_labels, cfg.loss_weight)


def sum_gradients(parameters, dist):
    """Sum the gradients over the ranks, in one message."""
    grads = [p.grad for p in parameters]
    flat = all_reduce_sum(torch.cat([grad.flatten() for grad in grads]), dist)
    sizes = [grad.numel() for grad in grads]
    for grad, summed in zip(grads, flat.split(sizes), strict=True):
        grad.copy_(summed.view_as(grad))


def train_base(cfg):
    """Train the base of a recipe and write its model folder."""
    # ---- model and data ----
    dist = setup_distributed("cpu")
    tokenizer_dir = cfg.init_from or TOY_VOCABULARY
    tokenizer = Tokenizer(tokenizer_dir)
    model = start_base(cfg, tokenizer).train()
    set_trainable(model, cfg)
    dtype = getattr(torch, cfg.dtype)
    set_dtypes(model, dtype)
    if cfg.compile:
        compile_blocks(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    optimizer = make_optimizer(model, cfg, cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    dataset = open_packs(cfg, tokenizer, model.vision, packs_per_step=dist.world)
    batches = iter(make_loader(dataset, dist.rank, dist.world))

    # ---- the loop ----
    for step in range(cfg.steps):
        start = time.perf_counter()
        batch = next(batches)
        if batch["bad"]:
            raise ValueError(f"{cfg.data}: {batch['bad'][0]}")
        scale = lr_scale(step, cfg.steps, cfg.warmup_steps, cfg.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        # The noise grows over the first half.
        noise = cfg.noise * min(1, 2 * step / cfg.steps)
        seed_everything(cfg.seed, step, dist.rank)
        with autocast:
            loss = model(batch, noise)

        # The loss is one mean over the supervised tokens of all ranks.
        totals = {"weight": batch["size"]["weight"], "loss": loss.item()}
        totals = all_reduce_dict(totals, dist)
        if not math.isfinite(totals["loss"]):
            raise ValueError(f"step {step + 1}: the loss is {totals['loss']}; lower the rates")
        (loss * (1 / totals["weight"])).backward()
        if dist.world > 1:
            sum_gradients(trained, dist)
        clip_grad_norm(model, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % cfg.print_every == 0:
            seconds = time.perf_counter() - start
            say(dist, f"step {step + 1}/{cfg.steps} | loss {totals['loss'] / totals['weight']:.4f}"
                      f" | rate {scale:.3f} of the peak | {seconds:.2f} s")

    if dist.is_main:
        save_base(model, cfg.out_dir, tokenizer_dir)
    say(dist, f"model folder {cfg.out_dir}")
    close_distributed()


def save_base(model, out_dir, tokenizer_dir):
    """Write the ViT if there is one, else the language model."""
    if model.vision:
        config = config_json(model.vision, None)
    else:
        config = config_json(None, model.llm)
    save_folder(model.state_dict(), config, out_dir, tokenizer_dir)


def main():
    cfg, flags = subcommand(RECIPES, f"python -m toy.bases {'|'.join(RECIPES)} [--key=value]")
    configure(cfg, flags)
    train_base(cfg)


if __name__ == "__main__":
    run_script(main)
