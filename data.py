"""Data: a planned pack -> a batch; the loader; check, show and preview.

    python data.py check FILE...                        # validate every row; exit code 2 if bad
    python data.py show FILE --n=8 --tokenizer=DIR      # exactly what the model sees
    python data.py preview FILE --out=page.html         # tiles and packs as pictures

The way of a record: a row (json) and the bytes of its images are read by offset (inputs/records),
`render` makes token ids and labels in one pass (inputs/chat), samples are planned into packs from
lengths and image headers alone (inputs/packing). Here a worker turns a planned pack into a batch.
Nothing is cut: what does not fit gets fewer tiles, else it is dropped and counted. A row that
cannot be read is left out and counted.

Shapes: T tokens of a pack, S samples in a pack, N tiles of a pack, s side of a tile in pixels.
"""
import atexit
import itertools
import math
import signal
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import configure, run_script, setting, split_words, subcommand
from inputs.chat import IGNORE, render
from inputs.check import check_sources
from inputs.files import read_json
from inputs.images import GRAY, MAX_TILES, load_image, make_tiles, without_thumbnail
from inputs.measure import reason_of
from inputs.pack_flags import SHARED_SETTINGS, read_number, training_flags
from inputs.packing import Packs, PackSettings
from inputs.patience import read_patiently
from inputs.preview import preview_packs, show_samples
from inputs.records import UNREADABLE
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer

# To validate data, any vocabulary will do.
TOY_TOKENIZER = str(Path(__file__).parent / "toy" / "tokenizer")


# ---- a planned pack -> a batch ------------------------------------------------------------------

class PackedDataset(torch.utils.data.Dataset):
    """Turns a planned pack into a batch: dataset[pack].

    It holds no state but the shared memory that a Loader lends its workers.
    image_as: "pixels", or "blank" for the blind control, which sees gray tiles.
    loss_weight: "token", "sample" or "sqrt", see answer_weight.
    """

    def __init__(self, packs, tokenizer, template, image_as="pixels", loss_weight="token"):
        self.packs = packs
        self.tokenizer = tokenizer
        self.template = template
        self.image_as = image_as
        self.loss_weight = loss_weight
        self.slots = None  # (slots, tiles of a pack, 3, s, s), set by Loader

    def __getitem__(self, pack):
        """The batch of a planned pack: its images decoded and tiled, its text rendered.

        tokens, labels, positions (T,) int64; weights (T,) fp32; tiles (N, 3, s, s) uint8, or
        (slot, N) where a worker wrote them into shared memory; ids of the samples; lengths: tokens
        of each; bad: samples left out as unreadable; size: how much of everything there is;
        position, counts, costs: see Pack.
        """
        tiles, slot = self.tile_buffer(pack)
        samples = []
        bad = []
        n_tiles_read = 0
        for source_number, i, n_tiles in pack.samples:
            source = self.packs.sources[source_number]
            about = {"source": source.name, "file": str(source.path), "row": i}
            try:
                row = read_patiently(source.row, i)
                about["id"] = row["id"]
                room = tiles[n_tiles_read:]
                if n_tiles:
                    read_patiently(self.read_pictures, source, i, row, n_tiles, room)
                samples.append(self.make_sample(row, n_tiles))
            except UNREADABLE as e:
                bad.append(about | {"reason": reason_of(e)})
                continue
            n_tiles_read += sum(n_tiles)
        batch = self.collate(samples)
        batch["tiles"] = tiles[:n_tiles_read] if slot is None else (slot, n_tiles_read)
        batch["bad"] = bad
        batch["size"] |= {"tiles": n_tiles_read, "bad": len(bad)}
        position, counts, costs = pack.together or (pack.position, pack.counts, [pack.cost])
        return batch | {"position": position, "counts": counts, "costs": costs}

    def tile_buffer(self, pack):
        """(room for the tiles of a pack, its slot in shared memory or None)."""
        n = sum(sum(n_tiles) for _, _, n_tiles in pack.samples)
        if n > 0 and torch.utils.data.get_worker_info():
            slot = pack.number % len(self.slots)
            return self.slots[slot], slot
        side = self.packs.settings.tile_size
        return torch.empty(n, 3, side, side, dtype=torch.uint8), None

    def read_pictures(self, source, i, row, n_tiles, out):
        """Decode and tile the images of row i into `out`; n_tiles[k] were planned for image k."""
        settings = self.packs.settings
        start = 0
        for k, n in enumerate(n_tiles):
            image = load_image(source.image(i, k, row))
            source.check_picture(i, k, image.size)
            limits = (settings.min_tiles, without_thumbnail(n, settings.thumbnail),
                      settings.tile_size, settings.thumbnail)
            if self.image_as == "blank":
                out[start:start + n].copy_(GRAY)
            else:
                make_tiles(image, *limits, out=out[start:start + n])
            start += n

    def make_sample(self, row, n_tiles):
        """A row -> {id, ids (T,), labels (T,), weight of each of its tokens}."""
        ids, labels = render(row, self.tokenizer, self.template, n_tiles,
                             self.packs.settings.tokens_per_tile)
        n_answer = int((labels != IGNORE).sum())
        weight = answer_weight(n_answer, self.loss_weight)
        return {"id": str(row["id"]), "ids": ids, "labels": labels, "weight": weight}

    def collate(self, samples):
        """Samples of make_sample laid end to end, all of a batch but its tiles."""
        documents = samples
        if not documents:
            # Nothing could be read: one token that asks nothing stands in.
            documents = [{"ids": np.array([self.tokenizer.eos_id]),
                          "labels": np.array([IGNORE]), "weight": 1.0}]
        lengths = [len(d["ids"]) for d in documents]
        labels = np.concatenate([d["labels"] for d in documents])
        weights = np.repeat(np.array([d["weight"] for d in documents], np.float32), lengths)
        supervised = labels != IGNORE
        arrays = {
            "tokens": np.concatenate([d["ids"] for d in documents]),
            "labels": labels,
            "positions": np.concatenate([np.arange(n) for n in lengths]),
            "weights": weights,
        }
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["ids"] = [sample["id"] for sample in samples]
        batch["lengths"] = lengths
        batch["size"] = {
            "tokens": sum(lengths),
            "samples": len(samples),
            "token_room": self.packs.settings.tokens_per_pack,
            "tile_room": self.packs.settings.tiles_per_pack,
            "supervised": int(supervised.sum()),
            "weight": float(weights[supervised].sum()),
        }
        return batch


def answer_weight(n_answer, loss_weight):
    """Weight of each supervised token of a sample with n_answer of them.

    "token": each token counts alike; "sample": each sample; "sqrt": in between (InternVL's
    "square").
    """
    n = max(1, n_answer)
    return {"token": 1.0, "sample": 1 / n, "sqrt": n ** -0.5}[loss_weight]


def stage_dataset(cfg, stage, tokenizer, vision, packs_per_step, data=""):
    """The PackedDataset of one stage of a run: `data`, else the stage's own, else the run's."""
    sources = open_sources(data or stage.data or cfg.data, tokenizer, cfg.template)
    settings = PackSettings(
        tile_size=vision.image_size,
        tokens_per_tile=vision.tokens_per_tile,
        min_tiles=cfg.min_tiles,
        max_tiles=cfg.max_tiles,
        thumbnail=cfg.thumbnail,
        tokens_per_pack=cfg.tokens_per_pack,
        tiles_per_pack=cfg.max_tiles_per_pack,
        seed=cfg.seed,
        packs_per_step=packs_per_step,
        shuffle=cfg.shuffle,
    )
    packs = Packs(sources, settings)
    return PackedDataset(packs, tokenizer, cfg.template, cfg.image_as, cfg.loss_weight)


def model_inputs(batch, device):
    """The arguments of VLM.forward.

    The document borders are a list: FSDP moves every tensor to the GPU, and they are read on the
    CPU.
    """
    inputs = {"cu_seqlens": [0, *itertools.accumulate(batch["lengths"])]}
    for name in ("tokens", "labels", "positions", "tiles", "weights"):
        inputs[name] = batch[name].to(device, non_blocking=True)
    return inputs


# ---- the loader ---------------------------------------------------------------------------------

class Loader(torch.utils.data.DataLoader):
    """A DataLoader of a PackedDataset, with tiles in shared memory.

    Workers write tiles into slots that are used again and again: new pages would cost a fifth of
    the time. Batches come in order, and each worker has prefetch_factor of them under way, so with
    one slot more than that the next one is always free.
    Raises OSError if there is no room for the slots.
    """

    def __iter__(self):
        dataset = self.dataset
        # This loader's own: another one over the same dataset may run at the same time.
        slots = None
        if self.num_workers and any(len(source.images) for source in dataset.packs.sources):
            slots = self.share_slots(dataset.packs.settings)
            dataset.slots = slots
        # Workers start here, in the thread that makes the iterator, and not with the first batch.
        batches = super().__iter__()
        dataset.slots = None
        if self.num_workers:
            self.end_workers_at_exit(batches)
        return self.with_tiles(batches, slots)

    def with_tiles(self, batches, slots):
        """Yield the batches; tiles that lie in a slot are copied from there."""
        for batch in batches:
            # DataLoader made a list of the pair (slot, n).
            if isinstance(batch["tiles"], list):
                slot, n = batch["tiles"]
                tiles = slots[slot, :n]
                batch["tiles"] = tiles.pin_memory() if self.pin_memory else tiles.clone()
            yield batch

    def share_slots(self, settings):
        """uint8 (slots, tiles of a pack, 3, s, s) in shared memory."""
        side = settings.tile_size
        n_slots = self.num_workers * self.prefetch_factor + 1
        shape = (n_slots, settings.tiles_per_pack, 3, side, side)
        size = math.prod(shape)
        try:
            memory = torch.UntypedStorage._new_shared(size)
        except RuntimeError as e:
            raise OSError(f"no room for {size / 1e6:.0f} MB of tiles in shared memory ({e}); "
                          "enlarge /dev/shm (docker: --shm-size) or take fewer "
                          "--num_workers") from None
        return torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)

    def end_workers_at_exit(self, batches):
        """End the workers also where the program fails.

        At exit PyTorch sends them SIGTERM, which they ignore, and Python would wait for ever.
        """
        # A weak reference: the iterator should not live until the exit because of this.
        reference = weakref.ref(batches)

        def end_workers():
            left = reference()
            if left is not None:
                left._shutdown_workers()

        atexit.register(end_workers)


def start_worker(_):
    """Set a worker up. A preempted job still saves, and its workers must live until then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    torch.set_num_threads(1)


def rank_packs(packs, rank, world, position, counts):
    """Yield this rank's packs of the global sequence, each with what all ranks do at once."""
    sequence = packs.sequence(position, counts)
    for number in itertools.count():
        together = list(itertools.islice(sequence, world))
        last = together[-1]
        pack = together[rank]
        pack.together = (last.position, last.counts, [p.cost for p in together])
        pack.number = number
        yield pack


def make_loader(dataset, rank=0, world=1, num_workers=0, position=(0, 0, 0), counts=()):
    """Loader of this rank's batches, from a position of the global sequence of packs on.

    The batches are the same whatever the number of workers.
    """
    return Loader(
        dataset,
        sampler=rank_packs(dataset.packs, rank, world, position, counts),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        prefetch_factor=4 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )


def held_out(dataset, n, dist):
    """Yield (arguments of VLM.forward, weight of what is supervised) of a validation of n packs.

    Each rank gets its share of them, and all get as many, as FSDP needs: what is missing is a
    repeat whose labels ask nothing.
    """
    planned, _ = dataset.packs.plan_window(0, 0)
    planned = planned[:n]
    if not planned:
        raise ValueError("no sample of --val_data fits into a pack; raise --tokens_per_pack or "
                         "--max_tiles_per_pack")
    rounds = math.ceil(len(planned) / dist.world)
    for i in range(dist.rank, rounds * dist.world, dist.world):
        batch = dataset[planned[i % len(planned)]]
        weight = batch["size"]["weight"]
        if i >= len(planned):
            batch["labels"].fill_(IGNORE)
            weight = 0.0
        for bad in batch["bad"]:
            print(f"WARNING: left out of the validation: {bad}", file=sys.stderr, flush=True)
        yield model_inputs(batch, dist.device), weight


# ---- command line: check, show, preview ---------------------------------------------------------

@dataclass(slots=True)
class Config:
    n: int = setting(8, at_most=10**9)  # show: samples to print; preview: packs to show
    out: str = setting("preview.html", filled=True)  # preview: the page to write
    # tokenizer or model folder; a model's template and tiles count
    tokenizer: str = setting(TOY_TOKENIZER, filled=True)
    template: str = ""  # chat template; "": the model's, else sailvl-chat
    tile_size: int = setting(0, at_most=4096)  # pixels of a tile, 0: the model's, else 448
    min_tiles: int = setting(1, at_least=1, at_most=MAX_TILES)  # fewest tiles of an image
    max_tiles: int = setting(0, at_most=MAX_TILES)  # of an image, 0: the model's, else 12
    tokens_per_pack: int = setting(8192, at_least=1, at_most=2**22)  # tokens of a pack
    tiles_per_pack: int = setting(48, at_least=1, at_most=4096)  # tiles of a pack
    thumbnail: bool = True  # add the whole image as one more tile if it has several
    seed: int = setting(0, at_most=2**32 - 1)  # of the order
    shuffle: bool = True  # False: samples in the order of the files
    packs_per_step: int = setting(1, at_least=1, at_most=2**24)  # of all ranks


def open_dataset(cfg, paths):
    """The PackedDataset of some files, with tiles and template of the model folder if it is one."""
    tokenizer = Tokenizer(cfg.tokenizer)
    about = Path(cfg.tokenizer, "config.json")
    about = read_json(about, dict) if about.exists() else {}
    template = cfg.template or about.get("template", "sailvl-chat")
    vision = about.get("vision_config", {})
    side = cfg.tile_size or read_number(about, "force_image_size", 448, 4096)
    patches = side // read_number(vision, "patch_size", 14, 4096)
    tokens_per_side = patches * read_number(about, "downsample_ratio", 0.5, 1)
    settings = PackSettings(
        tile_size=side,
        tokens_per_tile=int(tokens_per_side ** 2),
        max_tiles=cfg.max_tiles or read_number(about, "max_dynamic_patch", 12, MAX_TILES),
        **{name: getattr(cfg, name) for name in SHARED_SETTINGS},
    )
    if cfg.tokenizer == TOY_TOKENIZER:
        print("tokens are those of the toy vocabulary; for a model's: --tokenizer=MODEL_FOLDER",
              file=sys.stderr)
    packs = Packs(open_sources(",".join(paths), tokenizer, template), settings)
    return PackedDataset(packs, tokenizer, template)


def check_files(paths, cfg=None):
    """Print every bad row of some files; return how many there are, 1 if there is no row at all."""
    sources = open_sources(",".join(paths), Tokenizer(TOY_TOKENIZER), "sailvl-chat")
    return check_sources(sources)


def show_files(paths, cfg):
    show_samples(open_dataset(cfg, paths), cfg.n)


def preview_files(paths, cfg):
    preview_packs(open_dataset(cfg, paths), cfg.n, cfg.out)


def main():
    cfg = Config()
    usage = ("python data.py check FILE... | show FILE [CONFIG.py] --n=8 --tokenizer=DIR | "
             "preview FILE [CONFIG.py] --out=A")
    commands = {"check": check_files, "show": show_files, "preview": preview_files}
    command, words = subcommand(commands, usage, cfg)
    words, flags = split_words(words)
    paths = [word for word in words if not word.endswith(".py")]
    # The packs of a training: those of its config, of which a flag may change something.
    configs = [word for word in words if word.endswith(".py")]
    configure(cfg, [*training_flags(configs), *flags])
    if not paths:
        raise ValueError(f"usage: {usage}")
    if command(paths, cfg):
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
