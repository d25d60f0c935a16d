"""Data: records of any format -> token ids and labels in one pass -> packs -> batches, in an order that is arithmetic.

    python data.py check FILE...                        # every row validated: line, field, what to do; exit code 2
    python data.py show FILE --n=8 --tokenizer=DIR      # exactly what the model sees, supervised tokens marked
    python data.py preview FILE --out=page.html         # tiles and packs as pictures

Source row (json + image bytes) -> `render` (ids, labels) -> pack of documents, planned from lengths and image headers
alone -> `Packs.__getitem__` in a worker (decode, tile) -> batch. Nothing is cut: what does not fit gets fewer tiles,
else it is dropped and counted; an unreadable row is quarantined and counted.
Shapes: T tokens of a pack, S samples in a pack, N tiles of a pack, s tile side in pixels.
"""
import atexit
import concurrent.futures
import html
import itertools
import json
import math
import numpy as np
import os
import re
import signal
import sys
import torch
import weakref
from dataclasses import dataclass
from pathlib import Path
from tqdm import tqdm

from configurator import configure, run_script, setting, split_words, subcommand
from inputs.chat import IGNORE, image_names, render
from inputs.files import read_json
from inputs.images import Image, load_image, picture_uri
from inputs.index import UNREADABLE
from inputs.packing import Pack, Packs, REASON
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer

def _start_worker(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)                      # a preempted job saves; its workers must live
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)                      # until then
    torch.set_num_threads(1)

class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose workers end with the program also where it fails: at exit PyTorch asks them by SIGTERM, which
    they ignore, and Python waits for them for ever. Tiles come in shared memory whose slots are used again and again,
    for new pages cost a fifth of the time: batches come in order and prefetch_factor are under way for each worker, so
    that of one slot more than these the next is always free. OSError where there is no room for it."""
    def __iter__(self):
        packs = self.dataset
        if self.num_workers and any(len(source.images) for source in packs.sources):
            shape = self.num_workers * self.prefetch_factor + 1, packs.tiles_per_pack, 3, *2 * [packs.tile_size]
            try:
                memory = torch.UntypedStorage._new_shared(size := math.prod(shape))
            except RuntimeError as e:
                raise OSError(f"no room for {size / 1e6:.0f} MB of tiles in shared memory ({e}); enlarge /dev/shm "
                              "(docker: --shm-size) or take fewer --num_workers") from None
            packs.slots = slots = torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)
        ref = weakref.ref(batches := super().__iter__())               # alone: it is not kept until then
        if self.num_workers: atexit.register(lambda: (left := ref()) is None or left._shutdown_workers())
        try:
            for batch in batches:
                if type(batch["tiles"]) is list:                       # made of a tuple by DataLoader
                    slot, n = batch["tiles"]
                    tiles = slots[slot, :n]
                    batch["tiles"] = tiles.pin_memory() if self.pin_memory else tiles.clone()
                yield batch
        finally:
            packs.slots = None

def make_loader(packs, rank=0, world=1, num_workers=0, position=(0, 0, 0), counts=()):
    """DataLoader over this rank's packs of the global sequence, from a position on, whatever the number of workers."""
    def mine():
        sequence = packs.sequence(position, counts)
        for number in itertools.count():
            *_, last = together = [*itertools.islice(sequence, world)]     # the micro-batch of all ranks
            together[rank].together = last.position, last.counts, [pack.cost for pack in together]
            together[rank].number = number
            yield together[rank]
    return Loader(packs, sampler=mine(), batch_size=None, num_workers=num_workers, worker_init_fn=_start_worker,
                  prefetch_factor=4 if num_workers else None, pin_memory=torch.cuda.is_available())

def held_out(packs, n, dist):
    """Yield (arguments of VLM.forward, weight of what is supervised) of this rank's share of the first n packs. Each
    rank gets as many, as FSDP needs: what is left over is a repeat whose labels ask nothing."""
    if not (planned := packs.plan_window(0, 0)[0][:n]):
        raise ValueError("no sample of --val_data fits into a pack; raise --tokens_per_pack or --max_tiles_per_pack")
    for i in range(dist.rank, -(-len(planned) // dist.world) * dist.world, dist.world):
        batch, counts = packs[planned[i % len(planned)]], i < len(planned)
        if not counts: batch["labels"].fill_(IGNORE)
        for bad in batch["bad"]: print(f"WARNING: left out of the validation: {bad}", file=sys.stderr, flush=True)
        yield model_inputs(batch, dist.device), counts * batch["size"]["weight"]

def stage_packs(cfg, stage, tokenizer, vision, packs_per_step, data=""):
    """The Packs of one stage of a run: the stage's own data where it names some, else the run's."""
    sources = open_sources(data or stage.data or cfg.data, tokenizer, cfg.template, cfg.image_as)
    return Packs(sources, tokenizer, cfg.template, tile_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile,
                 min_tiles=cfg.min_tiles, max_tiles=cfg.max_tiles, thumbnail=cfg.thumbnail,
                 tokens_per_pack=cfg.tokens_per_pack, tiles_per_pack=cfg.max_tiles_per_pack,
                 seed=cfg.seed, image_as=cfg.image_as,
                 packs_per_step=packs_per_step, shuffle=cfg.shuffle,
                 loss_weight=cfg.loss_weight)

def model_inputs(batch, device):
    """The arguments of VLM.forward; the document borders stay on the CPU, where they are read as integers."""
    names = ("tokens", "labels", "positions", "tiles", "weights")
    return {"cu_seqlens": batch["cu_seqlens"]} | {k: batch[k].to(device, non_blocking=True) for k in names}

# ---- command line: check, show, preview ---------------------------------------------------------------------------
TOY_TOKENIZER = str(Path(__file__).parent / "toy" / "tokenizer")   # to validate, any vocabulary does

def check_sources(paths):
    """Validate every row, decode every image; print line, field, reason of bad ones. Their number; 1 if no rows."""
    total = n_bad = 0
    def damage(i):                                                     # of a picture of row i, or None
        where = "its row"
        try:
            row = source.row(i)
            for k in range(source.rows[i]["n_images"]):                # of a tar those that were found in it
                where = f"image {k + 1 if source.is_tar else image_names(row)[k]}"
                load_image(source.image(i, k, row))
        except UNREADABLE as e:
            return f"{where}: {e}; mend the file or remove the row"
    for source in open_sources(",".join(paths), Tokenizer(TOY_TOKENIZER), "sailvl-chat"):
        reasons, line, at = {bad["row"]: bad["reason"] for bad in source.meta["bad"]}, 1, 0
        rows = np.flatnonzero(source.rows["n_images"]).tolist()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for a in tqdm(range(0, len(rows), 500), f"{source.path.name}, 500 rows a step", leave=False):
                some = rows[a:a + 500]
                reasons |= {i: why for i, why in zip(some, pool.map(damage, some)) if why}
        for i in sorted(reasons):
            where, (offset, size, *_) = f"row {i + 1}", source.rows[i].item()
            if source.path.is_dir():
                where = json.loads(source._read(offset, size))["image"]
            elif source.lines == source.path and not source.is_tar:
                for k in range(at, offset, 2 ** 24):
                    line += source._read(k, min(2 ** 24, offset - k)).count(b"\n")
                where, at = f"line {line}", offset
            print(f"{source.path}: {where}: {reasons[i]}")
        total, n_bad = total + len(source.rows), n_bad + len(reasons)
    print(f"{total or 'no'} rows, {total - n_bad} good, {n_bad} bad")
    return n_bad or int(total == 0)

def marked_text(row, tokenizer, template, tiles, tokens_per_tile):
    """[(text, whether it is supervised)] of what the model sees; runs of visual tokens are shortened."""
    ids, labels = render(row, tokenizer, template, tiles, tokens_per_tile)
    supervised, parts = np.roll(labels, 1) != IGNORE, []               # a label is about the token that follows
    for target, run in itertools.groupby(range(len(ids)), lambda t: supervised[t]):
        words = tokenizer.decode([ids[t] for t in run], skip_special=False)
        parts.append((re.sub("(<IMG_CONTEXT>)+", lambda m: f"<IMG_CONTEXT x {len(m[0]) // len(m[1])}>", words), target))
    return parts, len(ids), supervised.sum()

def show_samples(packs, n):
    """Print the exact string of the first n samples, supervised tokens in [[ ]]."""
    for (s, k, tiles), tokens, _ in zip(*packs.plan_samples(np.arange(min(n, packs.n)))):
        if tokens < 0:
            print(f"--- row {k + 1}: {REASON[tokens]}; try: python data.py check {packs.sources[s].path}")
            continue
        row = packs.sources[s].row(k)
        parts, tokens, supervised = marked_text(row, packs.tokenizer, packs.template, tiles, packs.tokens_per_tile)
        print(f"--- row {k + 1}, id {row['id']}: {tokens} tokens, {supervised} supervised, tiles {[*tiles]}")
        print("".join(f"[[{text}]]" if target else text for text, target in parts))

def preview_packs(packs, n, out):
    """Write a page that needs nothing beside it: the first n packs as bars of their documents, then their samples:
    tiles in the order the model gets them, thumbnail last, and the text, supervised tokens marked."""
    (planned, dropped), body, shown = packs.plan_window(0, 0), [], []
    planned = planned[:n]
    for number, pack in enumerate(planned, 1):
        parts = []
        for k, (s, i, tiles) in enumerate(pack.samples):
            batch = packs[Pack([(s, i, tiles)])]
            share = 100 * batch["size"]["tokens"] / packs.tokens_per_pack
            title = html.escape(f"{batch['ids'] or batch['bad']}: {batch['size']['tokens']} tokens, {sum(tiles)} tiles")
            parts.append(f'<i style="width:{share:.2f}%;background:hsl({47 * k % 360} 60% 70%)" title="{title}"></i>')
            pictures = [f'<img src="{picture_uri(Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((112, 112)))}">'
                        for tile in batch["tiles"]]
            text = ""
            if batch["ids"]:
                said = marked_text(packs.sources[s].row(i), packs.tokenizer, packs.template, tiles, packs.tokens_per_tile)[0]
                text = "".join(f"<mark>{html.escape(t)}</mark>" if target else html.escape(t) for t, target in said)
            shown.append(f"<h3>pack {number}: {title}</h3>{''.join(pictures)}<pre>{text}</pre>")
        body.append(f"<p>pack {number}: {len(pack.samples)} documents, {pack.tokens} of {packs.tokens_per_pack} tokens "
                    f"({pack.tokens / packs.tokens_per_pack:.1%}), {pack.tiles} of {packs.tiles_per_pack} tiles</p>"
                    f"<div>{''.join(parts)}</div>")
    style = ("body{font:14px sans-serif;margin:2em}div{background:#eee;height:20px;display:flex}i{display:block}"
             "pre{white-space:pre-wrap}mark{background:#bfb}img{margin:1px}")
    Path(out).write_text(f'<!doctype html><meta charset="utf-8"><title>packs</title><style>{style}</style>'
                         + "\n".join(body + shown) + "\n", encoding="utf-8")
    print(f"{out}: {len(planned)} packs, {len(shown)} samples; in no pack: {dropped or 'none'}")

@dataclass(slots=True)
class Config:
    n: int = 8                       # show: samples to print; preview: packs to show
    out: str = "preview.html"        # preview: the page to write
    tokenizer: str = TOY_TOKENIZER   # tokenizer folder; of a model: with its template and tiles, unless these are given
    tile_size: int = 0               # pixels of a tile, else 448
    max_tiles: int = 0               # tile limit of an image, else 12
    tokens_per_pack: int = setting(8192, at_least=1)  # tokens of a pack
    tiles_per_pack: int = 48         # tiles of a pack

def main():
    cfg = Config()
    usage = "python data.py check FILE... | show FILE --n=8 --tokenizer=DIR | preview FILE --out=A"
    commands = {name: name for name in ("check", "show", "preview")}
    command, words = subcommand(commands, usage, cfg)
    paths, flags = split_words(words)
    configure(cfg, flags)
    if not paths:
        raise ValueError(f"usage: {usage}")
    if command == "check":
        sys.exit(2 if check_sources(paths) else 0)
    tokenizer, about = Tokenizer(cfg.tokenizer), Path(cfg.tokenizer, "config.json")
    about = read_json(about, dict) if about.exists() else {}
    side, template = cfg.tile_size or about.get("force_image_size", 448), about.get("template", "sailvl-chat")
    per_side = side // about.get("vision_config", {}).get("patch_size", 14) * about.get("downsample_ratio", 0.5)
    packs = Packs(open_sources(",".join(paths), tokenizer, template), tokenizer, template, tile_size=side,
                  tokens_per_tile=int(per_side ** 2), max_tiles=cfg.max_tiles or about.get("max_dynamic_patch", 12),
                  tokens_per_pack=cfg.tokens_per_pack, tiles_per_pack=cfg.tiles_per_pack)
    if cfg.tokenizer == TOY_TOKENIZER:
        print("tokens are those of the toy vocabulary; for a model's: --tokenizer=MODEL_FOLDER", file=sys.stderr)
    show_samples(packs, cfg.n) if command == "show" else preview_packs(packs, cfg.n, cfg.out)

if __name__ == "__main__":
    run_script(main)
