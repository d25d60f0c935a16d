"""Stage dedup: of each cluster of near-duplicate pictures or captions, the best one stays.

Shapes: n rows of all shards.
"""
import functools
import hashlib
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from curation.rows import row_caption
from curation.shards import ShardRecord, all_inputs_hash, find_input_shards, read_records
from curation.stages import run_stage
from curation.text import HASH_MULTIPLIER, caption_words, ngram_keys
from inputs.files import atomic_write

MINHASHES = 32  # values of a MinHash signature
BANDS = 8  # parts of a signature, one of which must agree before two captions are compared
REACH = 256  # rows of equal key that a row is compared with
MAX_TONE = 12  # levels of 256 by which the mean colours of near-duplicates may differ
MAX_DISTANCE = 8
# Fewer bits of a hash than this are set, or not set, by an almost empty picture: a white page with
# two lines of text sets 3 to 5, a photo 7 to 48. All such pictures look alike to the hash.
MIN_BITS = 6

# What dedup and select read of a row.
COMPARED_FIELDS = ("dhash", "tone", "sha256", "source", "width", "height", "id", "caption")
# What they know of it. The id of a row that is dropped with a reason is empty.
ROW_FEATURES = np.dtype([
    ("id", "S20"),
    ("source", "u4"),
    ("hash", "u8"),
    ("tone", "u1", 48),
    ("pixels", "i8"),
    ("words", "i4"),
    ("minhash", "u4", MINHASHES),
])


def drop_near_duplicates(cfg):
    """Of each cluster keep the row with most pixels, then most words, then the first."""
    if cfg.distance > MAX_DISTANCE:
        raise ValueError(f"--distance={cfg.distance} of 64 bits: pictures that differ; give 0 to 8")

    @functools.cache
    def best_of_clusters():
        table, starts = build_row_table(cfg, find_input_shards(cfg))
        cluster = np.arange(len(table))
        if cfg.by != "text":
            good = np.flatnonzero(table["id"] != b"")
            hashes = table["hash"][good]
            cluster[good] = good[near_duplicates(hashes, table["tone"][good], cfg.distance)]
        if cfg.by != "image":
            near_texts(np.array(table["minhash"]), cfg.jaccard, cluster)
        return table["id"], choose_best(cluster, table), starts

    def process(shard, counts):
        ids, best, starts = best_of_clusters()
        for i, record in enumerate(read_records(shard, COMPARED_FIELDS), starts[shard.name]):
            if best[i] == i:
                yield record
                continue
            row = {**record.row, "duplicate_of": ids[best[i]].decode()}
            yield ShardRecord(row, record.pictures, record.reason or "near_duplicate")

    run_stage(cfg, "dedup", process, alone=True, by=cfg.by, distance=cfg.distance,
              jaccard=cfg.jaccard, inputs=all_inputs_hash(cfg))


def choose_best(cluster, table):
    """cluster (n,) -> the number (n,) of the row that stays of each row's cluster."""
    n = len(cluster)
    if n == 0:
        return cluster
    # Sorted by cluster, then from the worst to the best.
    order = np.lexsort((-np.arange(n), table["words"], table["pixels"], cluster))
    is_last = np.append(cluster[order][1:] != cluster[order][:-1], True)
    best_rows = order[is_last]
    best = np.empty_like(cluster)
    best[cluster[best_rows]] = best_rows
    return best[cluster]


# ---- the table of all rows -----------------------------------------------------------------------


def build_row_table(cfg, shards):
    """Read all rows once -> ROW_FEATURES (n,), mapped from disk, and {shard name: its first row}.

    The rows of each shard are kept in .shards/NAME.rows.npy, so that a killed process goes on.
    """
    folder = Path(cfg.out) / ".shards"
    for shard in tqdm(shards, desc="index", unit="shard", disable=None):
        path = folder / f"{shard.name}.rows.npy"
        if not is_whole_array(path):
            features = row_features(cfg, shard)
            with atomic_write(path, "wb") as file:
                np.save(file, features)

    # One file is open at a time: Linux maps at most 65,530 into a process.
    def load_rows(shard):
        return np.load(folder / f"{shard.name}.rows.npy", mmap_mode="r")

    sizes = [len(load_rows(shard)) for shard in shards]
    table = np.lib.format.open_memmap(folder / "index.npy", "w+", ROW_FEATURES, (sum(sizes),))
    starts = {}
    start = 0
    for shard, size in zip(shards, sizes, strict=True):
        starts[shard.name] = start
        table[start : start + size] = load_rows(shard)
        start += size
    return table, starts


def is_whole_array(path):
    """Whether a .npy is there and not cut off."""
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):
        return False
    return True


def row_features(cfg, shard):
    """ROW_FEATURES of all rows of a shard. ValueError if collect has not made it."""
    records = list(read_records(shard, COMPARED_FIELDS, with_pictures=False))
    reasons = {record.reason for record in records}
    if "no_dhash" in reasons and None not in reasons:
        raise ValueError(f"{shard.path} has no dhash: run `curate.py collect` first")
    table = np.zeros(len(records), ROW_FEATURES)
    for entry, record in zip(table, records, strict=True):
        if record.reason:
            continue
        row = record.row
        source = hashlib.sha256(row["source"].encode("utf-8", "replace")).hexdigest()
        entry["id"] = row["sha256"][:20]
        entry["source"] = int(source[:8], 16)
        entry["hash"] = int(row["dhash"], 16)
        entry["tone"] = np.frombuffer(bytes.fromhex(row["tone"]), np.uint8)
        entry["pixels"] = row["width"] * row["height"]
        entry["words"] = len(caption_words(row_caption(row)))
        if cfg.by != "image":
            entry["minhash"] = minhash(row_caption(row))
    return table


def minhash(text):
    """MinHash signature (MINHASHES,) uint32 of the word 3-grams of a text; zeros if it has none.

    Value k is the smallest that hash function k takes. The functions are multiply-shift
    (Dietzfelbinger et al., 1997).
    """
    keys = ngram_keys([caption_words(text)], 3)
    if len(keys) == 0:
        return np.zeros(MINHASHES, np.uint32)
    rng = np.random.default_rng(1)
    salt = rng.integers(1, 2**63, (MINHASHES, 1), dtype=np.uint64)
    odd = salt | np.uint64(1)
    hashes = (keys * odd) >> np.uint64(32)  # (MINHASHES, n-grams)
    return hashes.min(1).astype(np.uint32)


# ---- clusters ------------------------------------------------------------------------------------


def near_duplicates(hashes, tone, distance):
    """hashes (n,) uint64, tone (n, 48) uint8 -> cluster (n,) int64, its first row in sorted order.

    Two hashes that differ in at most d bits agree in k of d + k blocks of bits (pigeonhole; Manku
    et al., WWW 2007). The rows are sorted once for each choice of k blocks, and rows that agree in
    them are compared. Almost empty pictures are nobody's duplicates, see MIN_BITS.
    """
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    root = np.arange(len(hashes))
    n_bits = np.bitwise_count(hashes)
    says_enough = (n_bits >= MIN_BITS) & (n_bits <= 64 - MIN_BITS)

    def are_duplicates(i, j):
        near = np.bitwise_count(hashes[i] ^ hashes[j]) <= distance
        near &= says_enough[i] & says_enough[j]
        near &= root[i] != root[j]
        # Equal shapes in other colours are no duplicates.
        tone_i = tone[order[i[near]]].astype(np.int16)
        tone_j = tone[order[j[near]]]
        near[near] = (np.abs(tone_i - tone_j) <= MAX_TONE).all(1)
        return near

    k = 2 if distance <= 4 else 3
    edges = np.linspace(0, 64, distance + k + 1).astype(int).tolist()
    blocks = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    choices = list(itertools.combinations(blocks, k))
    for chosen in tqdm(choices, desc="near pictures", leave=False, disable=None):
        keys = hashes & np.uint64(sum(chosen))
        for i, j in near_pairs(keys, are_duplicates):
            merge_clusters(root, i, j)

    # Back from sorted order to the order of the rows.
    cluster = np.empty_like(root)
    cluster[order] = order[root]
    return cluster


def near_texts(signatures, jaccard, root):
    """Merge in root (n,) the rows whose MinHash signatures (n, MINHASHES) agree in this share.

    Two rows are compared if one of their bands agrees. With a share s of common 3-grams that
    happens with probability 1 - (1 - s^4)^8: 98 % at 0.8, 89 % at 0.7, 67 % at 0.6.
    """
    # A text too short for a 3-gram has no signature and is nobody's duplicate.
    rows = np.flatnonzero(signatures.any(1))

    def are_duplicates(i, j):
        shared = (signatures[rows[i]] == signatures[rows[j]]).mean(1)
        return (shared >= jaccard) & (root[rows[i]] != root[rows[j]])

    for band in np.split(np.arange(MINHASHES), BANDS):
        keys = np.zeros(len(root), np.uint64)
        for k in band:
            keys = (keys ^ signatures[:, k]) * HASH_MULTIPLIER
        for i, j in near_pairs(keys[rows], are_duplicates):
            merge_clusters(root, rows[i], rows[j])
    return root


def near_pairs(keys, are_duplicates):
    """Yield arrays (i, j) of pairs of equal key (n,) for which are_duplicates(i, j) holds.

    A row is compared with at most REACH others of its key, those behind it in sorted order. That
    bounds the work if thousands are equal, and they form one chain all the same.
    """
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.arange(len(keys))
    for step in range(1, REACH + 1):
        first = first[first + step < len(keys)]
        first = first[keys[first] == keys[first + step]]
        if len(first) == 0:
            return
        i = order[first]
        j = order[first + step]
        good = are_duplicates(i, j)
        yield i[good], j[good]


def merge_clusters(root, i, j):
    """Union-find: merge the clusters of rows i and j, arrays, in place.

    root (n,) int holds the smallest member of each row's cluster.
    """
    while len(i):
        i = root[i]
        j = root[j]
        np.minimum.at(root, np.maximum(i, j), np.minimum(i, j))
        # Follow the roots until each row points at the end of its chain.
        while True:
            up = root[root]
            if (up == root).all():
                break
            root[:] = up
        differ = root[i] != root[j]
        i = i[differ]
        j = j[differ]
