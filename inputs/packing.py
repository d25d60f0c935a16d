"""The order of the samples and the packs they go into, planned from lengths alone."""
import bisect
import collections
import contextlib
import gc
import itertools
import numpy as np
import torch
from dataclasses import dataclass
from dataclasses import field

from inputs.chat import IGNORE, cell_words, render
from inputs.files import json_hash
from inputs.images import GRAY, count_tiles, load_image, make_tiles
from inputs.index import UNREADABLE

# ---- order --------------------------------------------------------------------------------------------------------
def permute(i, n, seed, epoch):
    """Positions i (int64 array) under a permutation of range(n), a pure function of (seed, epoch, i).

    Four Feistel rounds on the next even power of two, walked until inside n (cycle walking; Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64(2 ** half - 1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2 ** 63, 4, dtype=np.uint64)
    x = np.asarray(i).astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo = x >= n
    return x.astype(np.int64)

# ---- packs --------------------------------------------------------------------------------------------------------
WAITING = 64                                        # samples that may wait for a pack they fill up
# What a tile costs in tokens, and tokens**2 of a document over what in tokens: train_flops of the 2B, fine-tuning
TILE_COST, PAIR_COST = 276, 2 ** 15
REASON = {-1: "unreadable", -2: "too_long"}         # what stands for the tokens of a sample in no pack, and why it is

@contextlib.contextmanager
def gc_paused():
    """Plans are many small objects, for which Python would look through all that is loaded, again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was: gc.enable()

def fill_packs(tokens, tiles, tokens_per_pack, tiles_per_pack):
    """Lists of indices of the samples in each pack, for samples in random order, none longer than a pack.

    A pack takes the oldest of the WAITING samples while more room stays than two samples need, then the one or two of
    them that fill it best. So packs are nearly in random order (sorted by length, a pack would hold samples of one
    kind), and each begins with the oldest sample: none waits for more than WAITING packs."""
    shift, n, packs = 32, len(tokens), []
    keys, low = [(t << shift) + i for i, t in enumerate(tokens)], (1 << shift - 1) - 1    # sort and add like tokens
    waiting, come = keys[:WAITING], WAITING
    keep, least = 2 * sum(tokens) // max(n, 1) << shift, min(keys, default=0)
    while waiting:
        pack, room, tile_room, k = [], (tokens_per_pack + 1 << shift) - 1, tiles_per_pack, 0
        while k < len(waiting) and (not pack or room - waiting[k] >= keep):
            if waiting[k] <= room and tiles[i := waiting[k] & low] <= tile_room:
                pack.append(i)
                room, tile_room = room - (tokens[i] << shift), tile_room - tiles[i]
                del waiting[k]
            else:
                k += 1
        while True:
            if (more := WAITING - len(waiting)) and come < n:
                waiting, come = waiting + keys[come:come + more], come + more
            if room < least or not waiting or (order := sorted(waiting))[0] > room: break
            best, chosen, i, j = 0, (), 0, bisect.bisect(order, room) - 1     # j: the longest that fits
            for a in order[j::-1]:
                if tiles[a & low] <= tile_room:
                    best, chosen = a, (a,)
                    break
            a, b, enough = order[0], order[j], room - (tokens_per_pack >> 12 << shift)
            while i < j and best < enough:                             # two that fit better, from both ends inward
                if a + b > room:
                    j -= 1
                    b = order[j]
                else:
                    if a + b > best and tiles[a & low] + tiles[b & low] <= tile_room:
                        best, chosen = a + b, (a, b)
                    i += 1
                    a = order[i]
            if not chosen: break
            for a in chosen:
                waiting.remove(a)
                pack.append(i := a & low)
                room, tile_room = room - (tokens[i] << shift), tile_room - tiles[i]
        packs.append(pack)
    return packs

@dataclass(slots=True)
class Pack:
    samples: list = field(default_factory=list)     # of (source, row, (tiles of each image))
    tokens: int = 0                                 # planned tokens, visual ones included
    tiles: int = 0
    cost: float = 0.0                               # relative FLOPs, for dealing packs of like cost to the ranks
    position: tuple = ()                            # where to resume after it: (epoch, window, packs of it consumed)
    counts: dict = None                             # samples used and dropped so far, those of this pack included
    number: int = 0                                 # among those of a loader: says where a worker puts its tiles
    together: tuple = ()                            # position and counts after, and costs of, what all ranks do at once

class Packs(torch.utils.data.Dataset):
    """Plans packs from lengths alone and turns a planned pack into a batch; stateless but for the paths of its sources
    and the shared memory that a Loader lends its workers.
    tokens_per_pack, tiles_per_pack: the two budgets. The global sequence of packs depends on (seed, sources, budgets,
    packs_per_step) only, never on the number of ranks or workers."""
    def __init__(self, sources, tokenizer, template, *, tile_size, tokens_per_tile, min_tiles=1, max_tiles=12,
                 thumbnail=True, tokens_per_pack=8192, tiles_per_pack=48, seed=0, image_as="pixels", cell_labels="none",
                 packs_per_step=1, window=16384, shuffle=True, pad=False, loss_weight="token"):
        self.sources, self.tokenizer, self.template, self.image_as = sources, tokenizer, template, image_as
        self.tile_size, self.tokens_per_tile, self.thumbnail = tile_size, tokens_per_tile, thumbnail
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.cell_labels, self.loss_weight = cell_labels, loss_weight
        self.tokens_per_pack, self.tiles_per_pack, self.packs_per_step = tokens_per_pack, tiles_per_pack, packs_per_step
        self.window, self.shuffle, self.pad, self.seed = window, shuffle, pad, seed
        # repeat_time as InternVL has it: below 1 the first part of the source, above 1 whole repeats. With weights, an
        # epoch is as long, and each source goes round as often as its share of it asks, from epoch to epoch
        self.counts = [int(len(s.rows) * (s.repeat if s.repeat < 1 else int(s.repeat))) for s in sources]
        if weights := [s.weight for s in sources if s.weight]:
            if len(weights) < len(sources):
                raise ValueError(f"{len(weights)} of {len(sources)} sources have a `weight`: give one above 0 to "
                                 "each, or none")
            if empty := [str(s.path) for s in sources if not len(s.rows)]:
                raise ValueError(f"no rows in {', '.join(empty)}, so it cannot have a share by `weight`; leave it out")
            self.counts = [round(sum(self.counts) * weight / sum(weights)) for weight in weights]
        self.starts = np.cumsum([0, *self.counts])
        self.n, self.n_bad = int(self.starts[-1]), sum(len(s.meta["bad"]) for s in sources)
        if self.n == 0 or self.n_bad == sum(len(s.rows) for s in sources):
            raise ValueError(f"no usable sample in {', '.join(str(s.path) for s in sources)} ({self.n} rows, "
                             f"{self.n_bad} unreadable); try: python data.py check {sources[0].path}")
        self.fingerprint = json_hash([[s.name, s.meta["digest"], s.repeat, s.weight, s.max_tiles] for s in sources] + [
            seed, shuffle, window, packs_per_step, tokens_per_pack, tiles_per_pack, min_tiles, max_tiles, thumbnail,
        ])[:16]

    def count_all_tiles(self, sizes, n, limit):
        """Tiles of each of the images `sizes` of samples that have n[k] of them and share `limit` tiles."""
        share = np.maximum(self.min_tiles, limit // np.maximum(n, 1)).repeat(n)
        least, side, thumbnail = map(itertools.repeat, (self.min_tiles, self.tile_size, self.thumbnail))
        columns = sizes["width"].tolist(), sizes["height"].tolist(), least, share.tolist(), side, thumbnail
        return [*map(count_tiles, *columns)]

    def plan_samples(self, at, epoch=0):
        """[(source, row, tiles per image)], tokens, tiles of the samples `at` of an epoch, the latter two as arrays;
        tokens are -1 where a row is unreadable, -2 where it is too long even with the fewest tiles (REASON)."""
        which, samples = np.searchsorted(self.starts, at, side="right") - 1, [None] * len(at)
        all_tokens, all_tiles = np.empty((2, len(at)), np.int64)
        room, tile_room = self.tokens_per_pack, self.tiles_per_pack
        fits = lambda tokens, tiles: (tokens + tiles * self.tokens_per_tile <= room) & (tiles <= tile_room)
        for s in np.unique(which).tolist():
            source, mine = self.sources[s], np.flatnonzero(which == s)
            row = (at[mine] - self.starts[s] + (epoch * self.counts[s] if source.weight else 0)) % len(source.rows)
            records, most = source.rows[row], min(self.max_tiles, source.max_tiles or self.max_tiles)
            n, tokens = records["n_images"], records["tokens"].astype(np.int64)
            border = np.append(0, np.cumsum(n))                        # of each sample's images among all of them
            sizes = source.images[(records["first_image"] - border[:-1]).repeat(n) + np.arange(border[-1])]
            counts = self.count_all_tiles(sizes, n, most)
            tiles, border = np.diff(np.append(0, np.cumsum(counts, dtype=np.int64))[border]), border.tolist()
            for k in np.flatnonzero(~fits(tokens, tiles)).tolist():    # too long: fewer tiles, then dropped whole
                a, b, tokens_now = border[k], border[k + 1], tokens[k]
                tokens[k] = -2
                for limit in range(most - 1, self.min_tiles - 1, -1):
                    fewer = self.count_all_tiles(sizes[a:b], n[k:k + 1], limit)
                    if fits(tokens_now, sum(fewer)):
                        counts[a:b], tiles[k], tokens[k] = fewer, sum(fewer), tokens_now
                        break
            for k, i, a, b in zip(mine.tolist(), row.tolist(), border, border[1:]):
                samples[k] = s, i, tuple(counts[a:b])
            all_tokens[mine] = np.where(tokens < 0, tokens, tokens + tiles * self.tokens_per_tile)
            all_tiles[mine] = tiles
        return samples, all_tokens, all_tiles

    @gc_paused()
    def plan_window(self, epoch, w, taken=0):
        """(packs, dropped by reason) of window w of an epoch, dealt in steps of like cost: a rank waits for the others.
        taken: packs that the step which is open when the window begins has already."""
        at = np.arange(w * self.window, min((w + 1) * self.window, self.n))
        at = permute(at, self.n, self.seed, epoch) if self.shuffle else at
        samples, tokens, tiles = self.plan_samples(at, epoch)
        dropped = {why: n for code, why in REASON.items() if (n := int((tokens == code).sum()))}
        kept = np.flatnonzero(tokens >= 0)
        columns = tokens, tiles, tokens + TILE_COST * tiles + tokens * tokens / PAIR_COST
        (tokens, tiles, costs), samples = (x[kept].tolist() for x in columns), [samples[i] for i in kept.tolist()]
        packs = [Pack([samples[i] for i in p], *(sum([x[i] for i in p]) for x in (tokens, tiles, costs)))
                 for p in fill_packs(tokens, tiles, self.tokens_per_pack, self.tiles_per_pack)]
        packs.sort(key=lambda pack: pack.cost)
        first = min(-taken % self.packs_per_step, len(packs))          # the open step and one that stays open: middling
        last = (len(packs) - first) % self.packs_per_step              # packs, as other windows give them
        a = (len(packs) - first - last) // 2
        middle, packs[a:a + first + last] = packs[a:a + first + last], []
        steps = [packs[i:i + self.packs_per_step] for i in range(0, len(packs), self.packs_per_step)]
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 1, epoch * 2 ** 32 + w]))
        rng.shuffle(steps)                                             # alike inside a step, random order outside
        return [*middle[:first], *itertools.chain(*steps), *middle[first:]], dropped

    def sequence(self, position=(0, 0, 0), counts=()):
        """Endless global sequence of packs from a position on, which must be the end of a step; each pack says where to
        resume after it. Raises ValueError if an epoch ends with other samples than it has."""
        (epoch, w, skip), counts = position, collections.Counter(counts)
        taken = -skip % self.packs_per_step                            # a step ends behind `skip` packs of the window
        while True:
            packs, dropped = self.plan_window(epoch, w, taken)
            if skip == 0:
                counts.update(dropped)
            for k, pack in enumerate(packs[skip:], skip + 1):
                counts["used"] += len(pack.samples)
                pack.position, pack.counts = (epoch, w, k), dict(counts)
                yield pack
            taken, skip, w = (taken + len(packs)) % self.packs_per_step, 0, w + 1
            if w * self.window >= self.n:
                epoch, w = epoch + 1, 0
                if counts.total() != epoch * self.n:
                    raise ValueError(f"{counts.total()} samples are accounted for after {epoch} epochs of {self.n}: "
                                     f"{dict(counts)}")
                if not counts["used"]:
                    raise ValueError(f"no sample fits into a pack: {dict(counts)}; raise --tokens_per_pack (now "
                                     f"{self.tokens_per_pack}) or --max_tiles_per_pack (now {self.tiles_per_pack})")

    def __getitem__(self, pack):
        """The batch of a planned pack: its images decoded and tiled, its text rendered.
        tokens, labels, positions (T,) int64; weights (T,) fp32; cu_seqlens (S+1,) int32; tiles (N, 3, s, s) uint8,
        or int64 (visual tokens, W) of words;
        ids; bad: samples that failed to decode and are left out; size: how much of everything there is; lengths: tokens
        of each sample."""
        samples, answers, words, ids, bad, filled = [], [], [], [], [], 0
        n, side, slot = sum([sum(n_tiles) for *_, n_tiles in pack.samples]), self.tile_size, None
        if n and torch.utils.data.get_worker_info():                   # written where Loader finds them
            slot = pack.number % len(self.slots)
        tiles = torch.empty(n, 3, side, side, dtype=torch.uint8) if slot is None else self.slots[slot, :n]
        for k, i, n_tiles in pack.samples:
            source = self.sources[k]
            row, end = {"id": f"{source.name}:{i}"}, filled
            try:
                row = source.row(i)
                for at, n in enumerate(n_tiles):
                    image, into, end = load_image(source.image(i, at, row)), tiles[end:end + n], end + n
                    how = self.min_tiles, n - (n > 1 and self.thumbnail), self.tile_size, self.thumbnail
                    if (found := count_tiles(*image.size, *how)) != n:   # the file is no longer what the index saw
                        raise ValueError(f"image {at + 1} gives {found} tiles where {n} were planned")
                    into.copy_(GRAY) if self.image_as == "blank" else make_tiles(image, *how, into)
                if self.image_as == "words":
                    new = [torch.from_numpy(cell_words(cells, self.tokenizer)) for cells in row["cells"]]
                sample = render(row, self.tokenizer, self.template, n_tiles, self.tokens_per_tile, self.image_as,
                                self.cell_labels)
                cells = sum(map(len, row.get("cells") or ())) if self.cell_labels != "none" else 0
            except UNREADABLE as e:
                bad.append({"source": source.name, "id": row["id"], "reason": f"{type(e).__name__}: {e}"[:300]})
                continue
            samples.append(sample)
            answers.append(max(1, (sample[1] != IGNORE).sum() - cells))    # supervised tokens, labels of cells apart
            words, filled = words + new if self.image_as == "words" else [], end
            ids.append(str(row["id"]))
        if not samples:                                                # nothing readable: one token that asks nothing
            samples = [(np.array([self.tokenizer.eos_id]), np.array([IGNORE]))]
        real = [len(x) for x, _ in samples]
        if self.pad and (room := self.tokens_per_pack - sum(real)):        # a last document that asks nothing
            samples.append((np.full(room, self.tokenizer.eos_id), np.full(room, IGNORE)))
        tokens, labels = map(np.concatenate, zip(*samples))
        lengths = [len(x) for x, _ in samples]
        answers += [1] * (len(samples) - len(answers))                 # of documents that ask nothing
        weights = [{"token": 1.0, "sample": 1 / n, "sqrt": n ** -0.5}[self.loss_weight] for n in answers]
        weights = np.repeat(np.array(weights, np.float32), lengths)
        arrays = {"tokens": tokens, "labels": labels, "positions": np.concatenate([np.arange(n) for n in lengths]),
                  "weights": weights, "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32)}
        tiles, at = torch.cat(words) if words else tiles[:filled], labels != IGNORE
        tiles = tiles if slot is None else (slot, filled)
        size = {"tokens": sum(real), "tiles": filled, "samples": len(ids), "bad": len(bad),
                "token_room": self.tokens_per_pack, "tile_room": self.tiles_per_pack,
                "supervised": int(at.sum()), "weight": float(weights[at].sum())}
        position, counts, costs = pack.together or (pack.position, pack.counts, [pack.cost])
        return {k: torch.from_numpy(v) for k, v in arrays.items()} | {
            "tiles": tiles, "ids": ids, "bad": bad, "size": size, "lengths": real, "position": position,
            "counts": counts, "costs": costs}
