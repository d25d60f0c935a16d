"""Candidates are compared one by one, and of each cluster the best row stays.

Shapes: m rows that are in a pair, p pairs.
"""
import functools

import numpy as np

from curation.look import compare_looks, margin_of
from curation.minhash import jaccard_of

PAIRS_AT_ONCE = 32  # as many as a processor's cache holds
# What comes of a comparison. margin: at least 0 for near-duplicates. NaN: not compared.
RESULT = np.dtype([("margin", "f4"), ("found", "f4"), ("one_sided", "f4"), ("jaccard", "f4")])
# A row that is dropped, the one that stays, and how they compare.
VERDICT = np.dtype([("row", "i8"), ("kept", "i8"), ("kept_id", "S20"), *RESULT.descr])


class Comparer:
    """Compares rows by what `measure_shard` has written of them, and remembers it."""

    def __init__(self, cfg, folder, inputs, starts):
        """inputs: all shards; starts: their first rows, and the end."""
        self.cfg = cfg
        self.folder = folder
        self.inputs = inputs
        self.starts = starts
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
        results = np.full(len(pairs), np.nan, RESULT)
        margins = np.full((len(pairs), 2), -1.0)
        if self.cfg.by != "text":
            looks = [self.read(rows, "looks") for rows in pairs.T]
            compared = compare_looks(*map(np.array, looks))
            margins[:, 0] = margin_of(compared, self.cfg.found)
            results["found"] = compared["found"]
            results["one_sided"] = compared["one_sided"]
        if self.cfg.by != "image":
            ngrams = [self.read_ngrams(rows) for rows in pairs.T]
            results["jaccard"] = [jaccard_of(*pair) for pair in zip(*ngrams, strict=True)]
            margins[:, 1] = results["jaccard"] - self.cfg.jaccard + 1e-6
        results["margin"] = margins.max(1)
        return results

    def place(self, row):
        """(number of its shard, number in it) of a row."""
        shard = int(np.searchsorted(self.starts, row, "right")) - 1
        return shard, int(row - self.starts[shard])

    def read(self, rows, kind):
        places = [self.place(row) for row in rows]
        return [self.load(shard, kind)[k] for shard, k in places]

    def read_ngrams(self, rows):
        found = []
        for shard, k in map(self.place, rows):
            ends = self.load(shard, "ends")
            found.append(np.array(self.load(shard, "ngrams")[ends[k] : ends[k + 1]]))
        return found

    def nearest(self, n):
        """The n compared pairs nearest to the threshold, as [{"records": ..., "margin": ...}, ...].

        records: the file of each and its number there.
        """
        nearest = sorted(self.known.items(), key=lambda item: (abs(item[1]["margin"]), item[0]))
        found = []
        for pair, result in nearest[:n]:
            places = [self.place(row) for row in pair]
            numbers = {name: round(float(result[name]), 4) for name in RESULT.names
                       if not np.isnan(result[name])}
            records = [[str(self.inputs[shard].path), k] for shard, k in places]
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
        results = comparer.compare(np.sort(rows[np.stack([dropped, leader], 1)], 1))
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
        block = numbers[k : k + PAIRS_AT_ONCE]
        block = [pair for pair in block.tolist() if root_of(root, pair[0]) != root_of(root, pair[1])]
        if block:
            results = comparer.compare(rows[np.array(block)])
            for pair, margin in zip(block, results["margin"], strict=True):
                if margin >= 0:
                    low, high = sorted(root_of(root, member) for member in pair)
                    root[high] = low
    return np.array([root_of(root, member) for member in root], np.int64)


def root_of(root, member):
    """The lowest member of a cluster. root: a member nearer to it for each, shortened on the way."""
    while root[member] != member:
        root[member] = root[root[member]]
        member = root[member]
    return member
