"""Models of several sizes and random samples for them.

Shape letters: T tokens of a pack, S samples, L longest sample, N tiles, s their side in pixels."""
import itertools
import math
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from inputs import records
from inputs.chat import IGNORE
from model import VLM, LLMConfig
from train import RunConfig, Stage
from training import optim
from training.copies import refresh_copies
from vision import VisionConfig
from weights import image_token_id

TOKENIZER_FOLDER = Path(__file__).resolve().parent.parent / "toy" / "tokenizer"
WARMUP_PACKS = 21  # of the rows of `warmup`
TRAINED_PARTS = dict(  # which of ViT, projector, LLM train
    alignment=(False, True, False),
    advance=(True, True, False),
    sft=(True, True, True),
)


@dataclass(slots=True)
class BenchSize:
    """A model and the samples it gets."""
    vision: VisionConfig
    llm: LLMConfig
    n_samples: int
    tiles: tuple | None  # tiles of a sample are drawn from these; None: as in `length_file`
    text: tuple | None  # text tokens of a sample: from, to; None: as in `length_file`


VISION_7M = VisionConfig(112, dim=192, n_layers=4, n_heads=3, ffn_dim=768)
LLM_7M = LLMConfig(8192, 256, 4, 4, 2, 64, 768, tie_embeddings=True)
VISION_25M = VisionConfig(112, dim=256, n_layers=6, n_heads=4, ffn_dim=1024)
LLM_25M = LLMConfig(16384, 384, 8, 6, 2, 64, 1024, tie_embeddings=True)
VISION_TOY = VisionConfig(**VisionConfig.PRESETS["toy"])
LLM_TOY = LLMConfig(**LLMConfig.PRESETS["toy"])
LLM_8B = LLMConfig(**LLMConfig.PRESETS["qwen2.5-7b"])
BENCH_SIZES = {
    "7m": BenchSize(VISION_7M, LLM_7M, 16, (1,), (24, 120)),
    "7m_mix": BenchSize(VISION_7M, LLM_7M, 32, None, None),
    "25m": BenchSize(VISION_25M, LLM_25M, 16, (1,), (24, 120)),
    "toy": BenchSize(VISION_TOY, LLM_TOY, 24, (0, 1, 1, 1, 3, 3, 4, 5), (16, 64)),
    # packs of 4k, of 8k, as the recipes train on, and of 16k
    "2b_4k": BenchSize(VisionConfig(), LLMConfig(), 2, (7,), (128, 384)),
    "2b": BenchSize(VisionConfig(), LLMConfig(), 4, (7,), (128, 384)),
    "2b_16k": BenchSize(VisionConfig(), LLMConfig(), 8, (7,), (128, 384)),
    "2b_mix": BenchSize(VisionConfig(), LLMConfig(), 4, (0, 1, 1, 3, 5, 7), (64, 512)),
    "8b": BenchSize(VisionConfig(), LLM_8B, 4, (7,), (128, 384)),
}


def length_file(n=60000):
    """A source of n samples of which only the lengths are there.

    12 % have text alone, 33 % one tile, 55 % 2 to 10 tiles and a thumbnail; the text is log-normal.
    On average 1,232 tokens and 3.9 tiles. The pictures have sizes that give these tiles."""
    rng = np.random.default_rng(0)
    grids = np.arange(2, 11)
    kind = rng.random(n)
    drawn = rng.choice(grids, n, p=(19 - grids) / sum(19 - grids))
    grid = np.where(kind < 0.12, 0, np.where(kind < 0.45, 1, drawn))
    rows = np.zeros(n, records.ROW)
    images = np.zeros(n, records.IMAGE)
    rows["tokens"] = np.maximum(16, rng.lognormal(math.log(235) - 0.32, 0.8, n))
    rows["n_images"] = grid > 0
    rows["first_image"] = np.arange(n)
    images["width"] = 448 * grid - rng.integers(0, 50, n)
    images["height"] = 448
    source = types.SimpleNamespace(rows=rows, images=images)
    source.name = "lengths"
    source.path = ""
    source.repeat = 1
    source.weight = 0
    source.max_tiles = 0
    source.meta = dict(bad=[], digest="")
    return source


def draw_lengths(size, generator):
    """(tiles, text tokens) of each sample of a BenchSize, two lists."""
    n = size.n_samples
    if size.text is None:
        file = length_file()
        grid = (file.rows["n_images"] * np.ceil(file.images["width"] / 448).astype(int))[:n]
        # several tiles have a thumbnail
        tiles = np.where(grid > 1, grid + 1, grid)
        return tiles.tolist(), file.rows["tokens"][:n].tolist()
    drawn = torch.randint(len(size.tiles), (n,), generator=generator)
    tiles = [size.tiles[i] for i in drawn]
    text = torch.randint(size.text[0], size.text[1] + 1, (n,), generator=generator)
    return tiles, text.tolist()


def random_samples(name, seed=0):
    """-> [(tokens, labels), ...] of a size, and uint8 tiles (N, 3, s, s) of all samples.

    The second half of each text is supervised."""
    size = BENCH_SIZES[name]
    generator = torch.Generator().manual_seed(seed)
    tiles, text = draw_lengths(size, generator)
    samples = []
    for n_tiles, length in zip(tiles, text, strict=True):
        visual = n_tiles * size.vision.tokens_per_tile
        image = torch.full((visual,), image_token_id(TOKENIZER_FOLDER))
        tokens = torch.cat([image, torch.randint(0, 1000, (length,), generator=generator)])
        labels = torch.full_like(tokens, IGNORE)
        # already shifted: position t holds the token at t + 1
        half = length // 2
        labels[-half - 1:-1] = tokens[-half:]
        samples.append((tokens, labels))
    side = size.vision.image_size
    pixels = torch.randint(0, 256, (sum(tiles), 3, side, side), generator=generator).byte()
    return samples, pixels


def pad_samples(samples):
    """Tokens and labels, right-padded: (S, L) each."""
    tokens = [t for t, _ in samples]
    labels = [y for _, y in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True), pad(labels, batch_first=True, padding_value=IGNORE)


def pack_samples(samples, tiles, device):
    """The arguments of VLM.forward: the samples end to end."""
    lengths = [len(tokens) for tokens, _ in samples]
    return dict(
        tokens=torch.cat([tokens for tokens, _ in samples]).to(device),
        labels=torch.cat([labels for _, labels in samples]).to(device),
        positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        tiles=tiles.to(device))


def count_supervised(samples):
    return sum(int((labels != IGNORE).sum()) for _, labels in samples)


def batches_of_8(samples):
    """Index ranges of eight samples each, in their order."""
    return [range(i, min(i + 8, len(samples))) for i in range(0, len(samples), 8)]


def stage_rates(stage):
    """The Stage in which these of TRAINED_PARTS have a learning rate."""
    vision, projector, llm = TRAINED_PARTS[stage]
    return Stage(lr_vision=1e-6 * vision, lr_projector=1e-6 * projector, lr_llm=1e-6 * llm)


def build_model(name, stage, dtype, device):
    """-> model, optimizer. What trains is kept in fp32; the arithmetic of `dtype` is autocast's."""
    size = BENCH_SIZES[name]
    with torch.device("meta"):
        model = VLM(size.vision, size.llm, image_token_id(TOKENIZER_FOLDER))
    model.to_empty(device=device)
    # drawn on the device: init_weights draws on the CPU and would take minutes at 8B
    torch.manual_seed(0)
    for parameter_name, p in model.named_parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.02)
        else:
            p.data.fill_(0.0 if parameter_name.endswith("bias") else 1.0)
    rates = stage_rates(stage)
    optim.set_trainable(model, rates)
    optim.set_dtypes(model, dtype)
    return model.train(), optim.make_optimizer(model, rates, RunConfig())


def training_step(loss, optimizer, dtype, device, copies=([], [])):
    """One step; loss() is the mean over supervised tokens; copies: of copy_weights."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        value = loss()
    value.backward()
    optimizer.step()
    refresh_copies(*copies)
    optimizer.zero_grad(set_to_none=True)
    return value.detach()
