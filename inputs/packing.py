"""The order of the samples and the packs they go into, planned from lengths alone.

Shapes: n samples; T tokens and N tiles are the two budgets of a pack.
"""
import collections
import contextlib
import gc
import itertools
from dataclasses import dataclass, field

import numpy as np

from inputs.files import json_hash
from inputs.fill import fill_in_order, fill_packs
from inputs.images import count_tiles

# Relative FLOPs of a pack: each token 1, each tile TILE_COST, and of each document its tokens**2
# over PAIR_COST. From train_flops of the 2B model in fine-tuning.
TILE_COST = 276
PAIR_COST = 2 ** 15
# What stands for the tokens of a sample that goes into no pack, and why it does not.
UNREADABLE_ROW = -1
TOO_LONG = -2
REASON = {UNREADABLE_ROW: "unreadable", TOO_LONG: "too_long"}


@dataclass(frozen=True)
class PackSettings:
    """What decides, beside the sources, which samples and tiles go into which pack."""

    tile_size: int               # pixels of a tile's side
    tokens_per_tile: int         # visual tokens of a tile
    min_tiles: int = 1           # limits of a picture's grid
    max_tiles: int = 12
    thumbnail: bool = True       # add the whole picture as one more tile
    tokens_per_pack: int = 8192  # the two budgets
    tiles_per_pack: int = 48
    seed: int = 0
    packs_per_step: int = 1      # micro-batches of all ranks in one optimizer step
    window: int = 16384          # samples that are planned together
    shuffle: bool = True         # False: samples keep the order of the sources


@dataclass(slots=True)
class Pack:
    """One planned pack."""

    samples: list = field(default_factory=list)  # of (source, row, (tiles of each image))
    tokens: int = 0         # planned tokens, visual ones included
    tiles: int = 0
    cost: float = 0.0       # relative FLOPs
    position: tuple = ()    # where to resume after it: (epoch, window, packs of it consumed)
    counts: dict = None     # samples used and dropped so far, those of this pack included
    # Set by data.rank_packs.
    number: int = 0         # among the packs of a loader: says where a worker puts its tiles
    together: tuple = ()    # (position, counts, costs) after the micro-batch of all ranks


# ---- order --------------------------------------------------------------------------------------

def permute(i, n, seed, epoch):
    """Positions i (int64 array) under a permutation of range(n).

    A pure function of (seed, epoch, i): four Feistel rounds on the next even power of two, walked
    until the result is below n (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    half_bits = np.uint64(half)
    mask = np.uint64(2 ** half - 1)
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    keys = generator.integers(0, 2 ** 63, 4, dtype=np.uint64)
    x = np.asarray(i).astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left = x[todo] >> half_bits
        right = x[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            new_right = left ^ ((mixed >> np.uint64(32)) & mask)
            left = right
            right = new_right
        x[todo] = (left << half_bits) | right
        todo = x >= n
    return x.astype(np.int64)


@contextlib.contextmanager
def gc_paused():
    """Pause the garbage collector.

    A plan is many small objects, and for every few hundred of them the collector would look through
    all that is loaded: 5.4 us a sample became 6.9 to 10.8 us (CPU, torch and transformers loaded).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---- planning -----------------------------------------------------------------------------------

class Packs:
    """The packs of a run, planned from the lengths in the indexes of its sources.

    Holds no state: the global sequence of packs depends on the sources and the settings only,
    never on the number of ranks or workers.
    """

    def __init__(self, sources, settings):
        self.sources = sources
        self.settings = settings
        self.samples_per_epoch = samples_per_epoch(sources)  # of each source
        self.starts = np.cumsum([0, *self.samples_per_epoch])
        self.n = int(self.starts[-1])
        self.n_used = sum(self.used_rows())  # different rows, however often an epoch repeats them
        self.n_bad = len(self.unreadable())
        if self.n == 0 or self.n_bad == self.n_used:
            paths = ", ".join(str(s.path) for s in sources)
            raise ValueError(f"no usable sample in {paths} ({self.n} rows, {self.n_bad} "
                             f"unreadable); try: python data.py check {sources[0].path}")

    def used_rows(self):
        """How many rows of each source are used: all, or the first ones where it is cut short."""
        used = []
        for source, n in zip(self.sources, self.samples_per_epoch, strict=True):
            # With a weight the epochs go through all of it, part by part.
            n_rows = len(source.rows)
            used.append(n_rows if source.weight else min(n, n_rows))
        return used

    def unreadable(self):
        """The rows that are used and could not be read when they were indexed."""
        found = []
        for source, n in zip(self.sources, self.used_rows(), strict=True):
            about = {"source": source.name, "file": str(source.path)}
            found += [bad | about for bad in source.meta["bad"] if bad["row"] < n]
        return found

    @property
    def fingerprint(self):
        """Hash of all that decides the sequence of packs. A run resumes on the same one only."""
        s = self.settings
        sources = [[x.name, x.meta["digest"], x.repeat, x.weight, x.max_tiles]
                   for x in self.sources]
        return json_hash(sources + [
            s.seed, s.shuffle or "in order", s.window, s.packs_per_step, s.tokens_per_pack,
            s.tiles_per_pack, s.min_tiles, s.max_tiles, s.thumbnail,
        ])[:16]

    def plan_samples(self, positions, epoch=0):
        """Samples at these positions (int64 array) of an unshuffled epoch.

        Returns [(source, row, tiles of each image)], tokens (n,), tiles (n,). Where a sample goes
        into no pack, its tokens are UNREADABLE_ROW, or TOO_LONG if it does not fit with the fewest
        tiles either.
        """
        samples = [None] * len(positions)
        tokens = np.empty(len(positions), np.int64)
        tiles = np.empty(len(positions), np.int64)
        source_of = np.searchsorted(self.starts, positions, side="right") - 1
        for s in np.unique(source_of).tolist():
            source = self.sources[s]
            mine = np.flatnonzero(source_of == s)
            rows = positions[mine] - self.starts[s]
            if source.weight:
                # An epoch takes up where the last one stopped in this source.
                rows += epoch * self.samples_per_epoch[s]
            rows %= len(source.rows)
            per_image, tokens[mine], tiles[mine] = self.plan_rows(source, rows)
            for k, row, n_tiles in zip(mine.tolist(), rows.tolist(), per_image, strict=True):
                samples[k] = (s, row, n_tiles)
        return samples, tokens, tiles

    def plan_rows(self, source, rows):
        """[tiles of each image], tokens (n,), tiles (n,) of rows (n,) of one source."""
        records = source.rows[rows]
        n_images = records["n_images"]
        text_tokens = records["tokens"].astype(np.int64)
        max_tiles = min(self.settings.max_tiles, source.max_tiles or self.settings.max_tiles)
        # The images of all rows end to end: those of row k are border[k] to border[k + 1].
        border = np.append(0, np.cumsum(n_images))
        place = (records["first_image"] - border[:-1]).repeat(n_images) + np.arange(border[-1])
        sizes = source.images[place]
        counts = self.count_all_tiles(sizes, n_images, max_tiles)
        tiles_before = np.append(0, np.cumsum(counts, dtype=np.int64))
        tiles = np.diff(tiles_before[border])
        fits = self.fits(text_tokens, tiles)
        border = border.tolist()
        for k in np.flatnonzero(~fits).tolist():
            images = slice(border[k], border[k + 1])
            fewer = self.fewer_tiles(sizes[images], text_tokens[k], max_tiles)
            if fewer is None:
                text_tokens[k] = TOO_LONG
            else:
                counts[images] = fewer
                tiles[k] = sum(fewer)
        tokens = text_tokens + tiles * self.settings.tokens_per_tile
        tokens = np.where(text_tokens < 0, text_tokens, tokens)
        per_image = [tuple(counts[a:b]) for a, b in itertools.pairwise(border)]
        return per_image, tokens, tiles

    def fits(self, text_tokens, tiles):
        """Whether a sample alone fits into a pack; arrays or numbers."""
        s = self.settings
        tokens = text_tokens + tiles * s.tokens_per_tile
        return (tokens <= s.tokens_per_pack) & (tiles <= s.tiles_per_pack)

    def fewer_tiles(self, sizes, text_tokens, max_tiles):
        """Tiles of each image of a sample that is too long, as many as fit; None if none do."""
        for limit in range(max_tiles - 1, self.settings.min_tiles - 1, -1):
            counts = self.count_all_tiles(sizes, np.array([len(sizes)]), limit)
            if self.fits(text_tokens, sum(counts)):
                return counts
        return None

    def count_all_tiles(self, sizes, n_images, max_tiles):
        """Tiles of each image of samples that have n_images[k] of them and share max_tiles."""
        s = self.settings
        share = np.maximum(s.min_tiles, max_tiles // np.maximum(n_images, 1)).repeat(n_images)
        return list(map(
            count_tiles, sizes["width"].tolist(), sizes["height"].tolist(),
            itertools.repeat(s.min_tiles), share.tolist(), itertools.repeat(s.tile_size),
            itertools.repeat(s.thumbnail)))

    @gc_paused()
    def plan_window(self, epoch, w, taken=0):
        """(packs, {reason: samples dropped}) of window w of an epoch.

        taken: packs already in the step that the window before left open.
        """
        s = self.settings
        positions = np.arange(w * s.window, min((w + 1) * s.window, self.n))
        if s.shuffle:
            positions = permute(positions, self.n, s.seed, epoch)
        samples, tokens, tiles = self.plan_samples(positions, epoch)
        dropped = {}
        for code, reason in REASON.items():
            n_dropped = int((tokens == code).sum())
            if n_dropped:
                dropped[reason] = n_dropped
        kept = np.flatnonzero(tokens >= 0)
        tokens = tokens[kept]
        tiles = tiles[kept]
        samples = [samples[i] for i in kept.tolist()]
        costs = (tokens + TILE_COST * tiles + tokens * tokens / PAIR_COST).tolist()
        tokens = tokens.tolist()
        tiles = tiles.tolist()
        packs = []
        fill = fill_packs if s.shuffle else fill_in_order
        for members in fill(tokens, tiles, s.tokens_per_pack, s.tiles_per_pack):
            packs.append(Pack(
                samples=[samples[i] for i in members],
                tokens=sum([tokens[i] for i in members]),
                tiles=sum([tiles[i] for i in members]),
                cost=sum([costs[i] for i in members])))
        if not s.shuffle:
            return packs, dropped
        rng = np.random.Generator(np.random.Philox(key=[s.seed + 1, epoch * 2 ** 32 + w]))
        return order_in_steps(packs, s.packs_per_step, taken, rng), dropped

    def sequence(self, position=(0, 0, 0), counts=()):
        """Yield the endless global sequence of packs.

        position: (epoch, window, packs of it consumed), the end of a step; counts: as of the pack
        before it. Each pack says where to resume after it. Raises ValueError if an epoch ends with
        other samples than it has, or has no sample that fits.
        """
        s = self.settings
        epoch, w, skip = position
        counts = collections.Counter(counts)
        # `skip` packs of the window are used, and they end a step.
        taken = -skip % s.packs_per_step
        while True:
            packs, dropped = self.plan_window(epoch, w, taken)
            if skip == 0:
                counts.update(dropped)
            for k, pack in enumerate(packs[skip:], skip + 1):
                counts["used"] += len(pack.samples)
                pack.position = (epoch, w, k)
                pack.counts = dict(counts)
                yield pack
            taken = (taken + len(packs)) % s.packs_per_step
            skip = 0
            w += 1
            if w * s.window >= self.n:
                w = 0
                epoch += 1
                self.check_epoch(epoch, counts)

    def check_epoch(self, epoch, counts):
        """ValueError if so many epochs used and dropped other samples than they have."""
        if counts.total() != epoch * self.n:
            raise ValueError(f"{counts.total()} samples are accounted for after {epoch} epochs of "
                             f"{self.n}: {dict(counts)}")
        if not counts["used"]:
            s = self.settings
            raise ValueError(f"no sample fits into a pack: {dict(counts)}; raise --tokens_per_pack "
                             f"(now {s.tokens_per_pack}) or --max_tiles_per_pack "
                             f"(now {s.tiles_per_pack})")


def samples_per_epoch(sources):
    """Samples of each source in an epoch.

    `repeat` is InternVL's repeat_time: below 1 the first part of the source, above 1 whole repeats.
    With weights the epoch is as long, but each source has its share of it, and goes round from
    epoch to epoch.
    """
    counts = []
    for source in sources:
        repeat = source.repeat if source.repeat < 1 else int(source.repeat)
        counts.append(int(len(source.rows) * repeat))
    weights = [source.weight for source in sources if source.weight]
    if not weights:
        return counts
    if len(weights) < len(sources):
        raise ValueError(f"{len(weights)} of {len(sources)} sources have a `weight`: "
                         "give one above 0 to each, or none")
    empty = [str(source.path) for source in sources if not len(source.rows)]
    if empty:
        raise ValueError(f"no rows in {', '.join(empty)}, so it cannot have a share by `weight`; "
                         "leave it out")
    n = sum(counts)
    return [round(n * weight / sum(weights)) for weight in weights]


def order_in_steps(packs, packs_per_step, taken, rng):
    """Packs of a window in the order of training: alike inside a step, steps in random order.

    The ranks of a step wait for each other, so its packs should cost the same: packs are sorted by
    cost and cut into steps. A window seldom ends with a step:

        | first | step | step | ... | step | last |
          |                                  |
          complete the step that is open     open a step that the next window completes

    These `first` and `last` packs share a step with packs of another window. They are taken from
    the middle of the sorted packs, for packs of middle cost are alike in all windows.
    """
    packs = sorted(packs, key=lambda pack: pack.cost)
    n_first = min(-taken % packs_per_step, len(packs))
    n_last = (len(packs) - n_first) % packs_per_step
    n_middle = n_first + n_last
    start = (len(packs) - n_middle) // 2
    middle = packs[start:start + n_middle]
    rest = packs[:start] + packs[start + n_middle:]
    steps = [rest[i:i + packs_per_step] for i in range(0, len(rest), packs_per_step)]
    rng.shuffle(steps)
    return [*middle[:n_first], *itertools.chain(*steps), *middle[n_first:]]
