"""Candidates are compared one by one, and of each cluster the best row stays.

Shapes: m rows that are in a pair, p pairs.
"""
import functools
import heapq

import numpy as np

from curation.embeddings import cosine_of
from curation.look import LOOK
from curation.minhash import jaccard_of
from curation.overlay import compare_looks, margin_of

PAIRS_AT_ONCE = 32  # as many as a processor's cache holds
# What comes of a comparison. margin: at least 0 for near-duplicates. NaN: not compared.
RESULT = np.dtype([("margin", "f4"), ("found", "f4"), ("one_sided", "f4"), ("jaccard", "f4"),
                   ("cosine", "f4")])
# A row that is dropped, the one that stays, and how they compare.
VERDICT = np.dtype([("row", "i8"), ("kept", "i8"), ("kept_id", "S20"), *RESULT.descr])


class Comparer:
    """Compares rows by what `measure_looks` has written of them, and remembers it."""

    def __init__(self, cfg, folder, inputs, starts):
        """inputs: all shards; starts: their first rows, and the end."""
        self.cfg = cfg
        self.folder = folder
        self.inputs = inputs
        self.starts = starts
        self.centre = 0.0  # (C,) what is taken off the vectors of pictures
        self.known = {}  # {(row, row): RESULT}
        self.load = functools.lru_cache(128)(self.map_array)

    def map_array(self, shard, kind):
        return np.load(self.folder / f"{self.inputs[shard].name}.{kind}.npy", mmap_mode="r")

    def compare(self, pairs):
        """pairs (p, 2) of rows, the lower first -> RESULT (p,)."""
        new = [pair for pair in map(tuple, pairs.tolist()) if pair not in self.known]
        for k in range(0, len(new), PAIRS_AT_ONCE):
            block = new[k : k + PAIRS_AT_ONCE]
            self.known.update(zip(block, self.compare_block(np.array(block)), strict=True))
        return np.array([self.known[pair] for pair in map(tuple, pairs.tolist())], RESULT)

    def compare_block(self, pairs):
        cfg = self.cfg
        results = np.full(len(pairs), np.nan, RESULT)
        margins = []
        if cfg.by in ("image", "both"):
            first = self.read_looks(pairs[:, 0])
            second = self.read_looks(pairs[:, 1])
            compared = compare_looks(first, second)
            margins.append(margin_of(compared, cfg.found))
            results["found"] = compared["found"]
            results["one_sided"] = compared["one_sided"]
        if cfg.by == "embedding":
            for k, (first, second) in enumerate(pairs):
                first = self.read_vector(first)
                second = self.read_vector(second)
                results["cosine"][k] = cosine_of(first, second, self.centre)
            margins.append(results["cosine"] - cfg.cosine)
        if cfg.by in ("text", "both"):
            for k, (first, second) in enumerate(pairs):
                jaccard = jaccard_of(self.read_ngrams(first), self.read_ngrams(second))
                results["jaccard"][k] = jaccard
            # What is asked for is a number with few digits.
            margins.append(results["jaccard"] - cfg.jaccard + 1e-6)
        results["margin"] = np.max(margins, 0)
        return results

    def place(self, row):
        """(number of its shard, number in it) of a row."""
        shard = int(np.searchsorted(self.starts, row, "right")) - 1
        return shard, int(row - self.starts[shard])

    def read_looks(self, rows):
        looks = np.zeros(len(rows), LOOK)
        for number, row in enumerate(rows):
            shard, k = self.place(row)
            looks[number] = self.load(shard, "looks")[k]
        return looks

    def read_ngrams(self, row):
        shard, k = self.place(row)
        ends = self.load(shard, "ends")
        ngrams = self.load(shard, "ngrams")
        return np.array(ngrams[ends[k] : ends[k + 1]])

    def read_vector(self, row):
        shard, k = self.place(row)
        return self.load(shard, "features")[k]

    def nearest(self, n):
        """The n compared pairs nearest to the threshold, as [{"records": ..., "margin": ...}, ...].

        records: the file of each and its number there.
        """
        nearest = heapq.nsmallest(
            n, self.known.items(), key=lambda item: (abs(item[1]["margin"]), item[0]))
        found = []
        for pair, result in nearest:
            places = [self.place(row) for row in pair]
            numbers = {name: round(float(result[name]), 4) for name in RESULT.names
                       if not np.isnan(result[name])}
            records = [[str(self.inputs[shard].path.resolve()), k] for shard, k in places]
            found.append({"records": records, **numbers})
        return found


def keep_best(comparer, rows, facts, pairs):
    """rows (m,) in order, their facts (id, pixels, words), pairs (p, 2) -> VERDICT of the dropped.

    Pairs that are near-duplicates form clusters. The best row of a cluster stays and drops those
    that are its own near-duplicates; so it goes on with what is left.
    """
    numbers = np.searchsorted(rows, pairs)
    cluster = merge_pairs(comparer, rows, numbers)
    best_first = np.lexsort((rows, -facts["words"], -facts["pixels"]))

    verdicts = [np.zeros(0, VERDICT)]
    left = best_first
    while True:
        # The first of each cluster is the best that is left of it.
        _, first, inverse = np.unique(cluster[left], return_index=True, return_inverse=True)
        leader = left[first][inverse]
        other = left != leader
        if not other.any():
            return np.concatenate(verdicts)
        dropped = left[other]
        leader = leader[other]
        pairs = np.stack([rows[dropped], rows[leader]], 1)
        results = comparer.compare(np.sort(pairs, 1))
        same = results["margin"] >= 0
        verdict = np.zeros(same.sum(), VERDICT)
        verdict["row"] = rows[dropped[same]]
        verdict["kept"] = rows[leader[same]]
        verdict["kept_id"] = facts["id"][leader[same]]
        for name in RESULT.names:
            verdict[name] = results[name][same]
        verdicts.append(verdict)
        left = dropped[~same]


def merge_pairs(comparer, rows, numbers):
    """numbers (p, 2) of pairs of rows (m,) -> cluster (m,), the lowest number of each.

    A pair that is connected already is not compared.
    """
    root = list(range(len(rows)))
    for k in range(0, len(numbers), PAIRS_AT_ONCE):
        block = [pair for pair in numbers[k : k + PAIRS_AT_ONCE].tolist()
                 if root_of(root, pair[0]) != root_of(root, pair[1])]
        if block:
            results = comparer.compare(rows[np.array(block)])
            for pair, margin in zip(block, results["margin"], strict=True):
                if margin >= 0:
                    low, high = sorted(root_of(root, member) for member in pair)
                    root[high] = low
    return np.array([root_of(root, member) for member in root], np.int64)


def root_of(root, member):
    """The lowest member of a cluster. root: for each member one nearer to it, shortened here."""
    while root[member] != member:
        root[member] = root[root[member]]
        member = root[member]
    return member
