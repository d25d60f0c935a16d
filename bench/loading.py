"""Rows of `pack`, `image`, `loader` and `waiting`: data on its way to the model.

Shape letters: T tokens a pack may have, N tiles it may have."""
import contextlib
import io
import itertools
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

import data
from bench.samples import TOKENIZER_FOLDER, batches_of_8, length_file
from inputs import images, packing, sources
from inputs.tokenizer import Tokenizer
from model import LLMConfig
from training.flops import train_flops
from training.prefetch import Prefetcher
from vision import VisionConfig

H200_IMAGES_PER_S = 15.0


# ---- packs ---------------------------------------------------------------------------------------


def knapsack_packs(tokens, tiles, T, N):
    """nanoVLM's published method, as lists of sample numbers.

    Of a buffer of 64 packs' tokens, the longest first goes into the emptiest of
    ceil(tokens / T) + 5 packs; what fits into none opens another."""
    buffer = np.cumsum(tokens) // (64 * T)
    borders = [0, *(np.flatnonzero(np.diff(buffer)) + 1), len(tokens)]
    packs = []
    for first, last in itertools.pairwise(borders):
        bins = [KnapsackBin() for _ in range(math.ceil(sum(tokens[first:last]) / T) + 5)]
        for i in sorted(range(first, last), key=lambda i: -tokens[i]):
            fitting = [b for b in bins if b.tokens + tokens[i] <= T and b.tiles + tiles[i] <= N]
            if not fitting:
                fitting = [KnapsackBin()]
                bins += fitting
            emptiest = min(fitting, key=lambda b: b.tokens)
            emptiest.tokens += tokens[i]
            emptiest.tiles += tiles[i]
            emptiest.samples += (i,)
        packs += [b.samples for b in bins if b.samples]
    return packs


@dataclass(slots=True)
class KnapsackBin:
    tokens: int = 0
    tiles: int = 0
    samples: tuple = ()


def packing_rows(cfg, device, name, T, N):
    """How full packs are, how even the work of 8 ranks, how long planning takes.

    fill: tokens over room. straggler_8ranks: FLOPs of a step's busiest rank over the mean of all,
    2B fine-tuning, mean over steps. plan_us_per_sample: CPU time, ours from the index on, that of
    the others from lengths on."""
    settings = packing.PackSettings(tile_size=448, tokens_per_tile=256, tokens_per_pack=T,
                                    tiles_per_pack=N, packs_per_step=8)
    packs = packing.Packs([length_file()], settings)
    order = packing.permute(np.arange(packs.n), packs.n, settings.seed, 0)
    _, tokens, tiles = packs.plan_samples(order)
    tokens = tokens.tolist()
    tiles = tiles.tolist()

    def ours():
        planned = []
        for window in range(math.ceil(packs.n / settings.window)):
            planned += packs.plan_window(0, window, len(planned) % 8)[0]
        return planned

    methods = {"ours": ours,
               "knapsack": lambda: knapsack_packs(tokens, tiles, T, N),
               "padded 8": lambda: batches_of_8(tokens)}
    results = {}
    for side, method in methods.items():
        seconds = []
        for _ in range(cfg.rounds if side == "ours" else 1):
            start = time.process_time()
            planned = method()
            seconds.append(time.process_time() - start)
        if side == "ours":
            # rows of the source -> numbers in the order of the lengths
            number = {row: i for i, row in enumerate(order.tolist())}
            planned = [[number[row] for _, row, _ in pack.samples] for pack in planned]
        assert sorted(itertools.chain(*planned)) == list(range(packs.n)), (
            f"{side}: a sample was lost or doubled")
        fill, straggler = pack_quality(planned, tokens, tiles, T, padded=side == "padded 8")
        results[side] = (fill, straggler, median(seconds) / packs.n * 1e6)
    yield from packing_table(name, results)


def pack_quality(planned, tokens, tiles, T, padded):
    """(tokens over room, FLOPs of the busiest of 8 ranks over their mean) of planned packs."""
    lengths = [[tokens[i] for i in pack] for pack in planned]
    if padded:
        lengths = [[max(pack)] * len(pack) for pack in lengths]
    flops = []
    for pack, pack_lengths in zip(planned, lengths, strict=True):
        n_tiles = sum(tiles[i] for i in pack)
        supervised = sum(pack_lengths) // 10
        flops.append(train_flops(VisionConfig(), LLMConfig(), n_tiles, pack_lengths, supervised))
    whole_steps = len(flops) // 8 * 8
    steps = np.array(flops[:whole_steps]).reshape(-1, 8)  # (steps, ranks)
    room = sum(sum(pack) for pack in lengths) if padded else T * len(planned)
    return sum(tokens) / room, (steps.max(1) / steps.mean(1)).mean()


def packing_table(name, results):
    """Rows from {side: (fill, straggler, microseconds)}."""
    suffix = "" if name == "8k" else f"_{name}"
    quantities = [(f"fill_{name}", "of the room", True),
                  (f"straggler_8ranks{suffix}", "max / mean", False),
                  (f"plan_us_per_sample{suffix}", "us", False)]
    for k, (row, unit, more_is_better) in enumerate(quantities):
        ours = float(results["ours"][k])
        for peer in ("knapsack", "padded 8"):
            theirs = float(results[peer][k])
            ratio = ours / theirs if more_is_better else theirs / ours
            yield dict(row=row, value=ours, unit=unit, peer=peer, peer_value=theirs, ratio=ratio)


# ---- pictures ------------------------------------------------------------------------------------


def noise_photo(seed, width=1024, height=768):
    """JPEG bytes of blurred noise, about 0.2 MB as a photo of this size has."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photos(folder, n, width=1024, height=768):
    """n photos, each with a caption beside it."""
    for i in range(n):
        Path(folder, f"{i:02d}.jpg").write_bytes(noise_photo(i, width, height))
        Path(folder, f"{i:02d}.txt").write_text("a photo of nothing in particular, " * 24)


def tiles_by_pillow(jpeg):
    """Six tiles of 448 and a thumbnail by Pillow's resize alone, uint8 (7, 3, 448, 448)."""
    image = images.load_image(jpeg)
    s = 448
    big = np.array(image.resize((3 * s, 2 * s), Image.Resampling.BICUBIC))
    small = np.array(image.resize((s, s), Image.Resampling.BICUBIC))
    tiles = [big[y:y + s, x:x + s] for y in (0, s) for x in (0, s, 2 * s)]
    return torch.from_numpy(np.stack([*tiles, small])).permute(0, 3, 1, 2).contiguous()


def tiles_by_us(jpeg):
    return images.make_tiles(images.load_image(jpeg), 1, 6)


def transformers_image_side():
    """{"transformers": f(jpeg)}: its GotOcr2 processor, which InternVL's configuration names; {}
    where it is not installed."""
    with contextlib.suppress(ImportError):
        from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2
        process = got_ocr2.GotOcr2ImageProcessorPil(
            size=dict(height=448, width=448), min_patches=1, max_patches=6, crop_to_patches=True,
            image_mean=list(images.MEAN), image_std=list(images.STD))

        def side(jpeg):
            return process(images.load_image(jpeg), return_tensors="pt")["pixel_values"]
        return {"transformers": side}
    return {}


def image_rows(cfg, device, name):
    """1024x768 JPEG -> 6 tiles of 448 and a thumbnail, on one thread, in CPU time."""
    torch.set_num_threads(1)
    jpegs = [noise_photo(i) for i in range(4)]
    picture = images.load_image(jpegs[0])
    sides = {"ours": tiles_by_us, "Pillow": tiles_by_pillow}
    sides |= transformers_image_side()
    sides |= {"decoding alone": images.load_image,
              "tiles alone": lambda _: images.make_tiles(picture, 1, 6)}
    differences = [(tiles_by_us(j).int() - tiles_by_pillow(j).int()).abs().max() for j in jpegs]

    times = {side: [] for side in sides}
    for i in range(cfg.rounds * 4):
        for side, function in sides.items():
            # the time of this process: neighbours do not count
            start = time.process_time()
            function(jpegs[i % 4])
            times[side].append(time.process_time() - start)
    rates = {side: 1 / median(seconds) for side, seconds in times.items()}
    ours = rates.pop("ours")
    for side, rate in rates.items():
        yield dict(row=name, value=ours, unit="images per CPU s", peer=side, peer_value=rate,
                   ratio=ours / rate, most_off_pillow=max(differences).item())


def loader_rows(cfg, device, name, workers):
    """Whole batches from 64 photos with a caption each, decoded, tiled and batched by workers.

    The peer is what one H200 takes at 50 % strict MFU in 2B fine-tuning: 15 samples of 2,048 tokens
    with 7 tiles a second (alignment: 29)."""
    tokenizer = Tokenizer(TOKENIZER_FOLDER)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        write_photos(folder, 64)
        opened = sources.open_sources(folder, tokenizer, "sailvl-chat")
        settings = packing.PackSettings(tile_size=448, tokens_per_tile=256, max_tiles=6)
        dataset = data.PackedDataset(packing.Packs(opened, settings), tokenizer, "sailvl-chat")
        batches = iter(data.make_loader(dataset, num_workers=workers))
        # what the workers fetch ahead does not count
        for _ in range(4 * workers + 1):
            next(batches)
        for _ in range(cfg.rounds):
            start = time.perf_counter()
            n = 0
            while time.perf_counter() - start < 3:
                n += next(batches)["size"]["samples"]
            rates.append(n / (time.perf_counter() - start))
        del batches
    ours = median(rates)
    yield dict(row=name, value=ours, unit="images/s", peer="need of one H200",
               peer_value=H200_IMAGES_PER_S, ratio=ours / H200_IMAGES_PER_S)


# ---- waiting -------------------------------------------------------------------------------------

GPU_S = 0.17  # a pack of 2B alignment on an H100, the fastest of the plan


def random_packs(folder, settings, tokenizer, width, height):
    """A PackedDataset of 64 photos of this size, which are written into the folder."""
    write_photos(folder, 64, width, height)
    opened = sources.open_sources(folder, tokenizer, "sailvl-chat")
    return data.PackedDataset(packing.Packs(opened, settings), tokenizer, "sailvl-chat")


def light_packs(folder, tokenizer):
    """Packs that cost the loader little, so that it keeps up with the GPU on any machine."""
    settings = packing.PackSettings(tile_size=224, tokens_per_tile=64, max_tiles=2,
                                    tokens_per_pack=1024, tiles_per_pack=12)
    return random_packs(folder, settings, tokenizer, 320, 240)


def full_packs(folder, tokenizer):
    """The fullest packs of a recipe: 32 tiles of 448 pixels, four pictures of eight, and text."""
    settings = packing.PackSettings(tile_size=448, tokens_per_tile=256, max_tiles=8,
                                    thumbnail=False, tokens_per_pack=10240, tiles_per_pack=32)
    return random_packs(folder, settings, tokenizer, 1792, 896)


def waiting_rows(cfg, device, name, accum, make_packs=light_packs):
    """The share of its time that a GPU which needs GPU_S for a pack waits for two workers' packs.

    The GPU is pretended: the loop sleeps. The peer asks the loader for the packs of a step when the
    step before has ended. No prefetching helps where loader_s_per_pack is more than GPU_S.
    """
    tokenizer = Tokenizer(TOKENIZER_FOLDER)
    steps = max(2, 64 // accum)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_packs(folder, tokenizer)
        loader = data.make_loader(dataset, num_workers=2)
        pack_s = seconds_per_pack(iter(loader))
        between = between_steps(iter(loader), accum)
        theirs = share_waited(between, accum, steps)
        between.close()
        ahead = Prefetcher(iter(loader), accum, torch.device("cpu"), 2)
        ours = share_waited(prefetched(ahead), accum, steps)
        ahead.close()
    yield dict(row=name, value=100 * ours, unit="% of the time", peer="fetched between steps",
               peer_value=100 * theirs, ratio=theirs / ours, loader_s_per_pack=pack_s)


def seconds_per_pack(batches):
    """How long the loader needs for a pack when nobody waits."""
    # what the workers fetch ahead does not count
    for _ in range(9):
        next(batches)
    start = time.perf_counter()
    for _ in range(20):
        next(batches)
    return (time.perf_counter() - start) / 20


def between_steps(batches, accum):
    """Yield each step as a list of its packs, asked for when the step before has ended."""
    while True:
        yield [next(batches) for _ in range(accum)]


def prefetched(batches):
    """Yield each step of a Prefetcher as an iterator of its packs."""
    while True:
        batches.next_step()
        yield batches.on_device()


def share_waited(steps, accum, n):
    """The share of the time of n steps in which the pretended GPU had nothing to do."""
    # in the first packs the workers start
    for _ in range(max(1, 16 // accum)):
        for _ in next(steps):
            time.sleep(GPU_S)
    start = time.perf_counter()
    waited = 0.0
    for _ in range(n):
        asked = time.perf_counter()
        step = next(steps)
        waited += time.perf_counter() - asked
        for _ in step:
            time.sleep(GPU_S)
    return waited / (time.perf_counter() - start)
