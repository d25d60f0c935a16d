"""Pairs of rows that may be near-duplicates: those with a key in common, found by all ranks.

Shapes: n rows of all shards, of which each rank has a block, m of them.
"""
import numpy as np

from curation.look import HASHED_CROPS, KEY_TABLES, UNSURE_BITS, hash_keys
from curation.text import HASH_MULTIPLIER

REACH = 64  # rows of equal key that a row is compared with
KEYS_AT_ONCE = 2**23  # of a rank; more are made in several rounds
# An entry of the table of keys. hash: what tells rows of equal key apart.
ENTRY = np.dtype([("key", "u8"), ("hash", "u8"), ("row", "i8")])


def picture_pairs(ranks, rows, hashes, unsure, distance):
    """rows (m,), hashes (m, 2), unsure (m, 2, 3, UNSURE_BITS) of own pictures -> pairs (p, 2).

    Two rows make a pair if they have a key in common and their hashes differ in at most `distance`
    bits. rows: their numbers. Each rank returns some of the pairs, each once.
    """
    def is_near(a, b):
        return np.bitwise_count(a["hash"] ^ b["hash"]) <= distance

    m = len(hashes)
    per_row = len(HASHED_CROPS) * 2**UNSURE_BITS
    n_rounds = max(ranks.gather(-(-m * per_row // KEYS_AT_ONCE) or 1))
    found = []
    for table in range(len(KEY_TABLES)):
        for part in range(n_rounds):
            entries = []
            for crop in range(len(HASHED_CROPS)):
                of_crop = hashes[:, crop]
                keys = hash_keys(of_crop, unsure[:, crop, table], table)  # (m, 8)
                keys = mixed(keys.astype(np.uint64))
                chosen = keys % np.uint64(n_rounds) == part
                own = np.nonzero(chosen)[0]
                entries.append(make_entries(keys[chosen], of_crop[own], rows[own]))
            entries = np.concatenate(entries)
            found.append(entry_pairs(ranks, entries, is_near))
    return unique_pairs(np.concatenate(found))


def text_pairs(ranks, rows, bands):
    """rows (m,), bands (m, b) uint64 of own captions -> pairs (p, 2) of rows with one in common.

    A band of 0 is none.
    """
    found = [np.zeros((0, 2), np.int64)]
    for band in range(bands.shape[1]):
        own = np.flatnonzero(bands[:, band])
        entries = make_entries(bands[own, band], bands[own, 0], rows[own])
        found.append(entry_pairs(ranks, entries, are_any))
    return unique_pairs(np.concatenate(found))


def are_any(a, b):
    """All pairs of captions that have a band in common are compared."""
    return np.ones(len(a), bool)


def mixed(keys):
    """Keys, uint64, in which all bits depend on all bits: evenly spread over rounds and ranks."""
    keys = (keys ^ (keys >> np.uint64(31))) * HASH_MULTIPLIER
    return keys ^ (keys >> np.uint64(29))


def make_entries(keys, hashes, rows):
    entries = np.empty(len(keys), ENTRY)
    entries["key"] = keys
    entries["hash"] = hashes
    entries["row"] = rows
    return entries


def entry_pairs(ranks, entries, is_near):
    """ENTRY arrays of all ranks -> pairs (p, 2) of rows of one key for which is_near(a, b) holds.

    A row is compared with at most REACH others of its key, those behind it in the order of hashes.
    That bounds the work where thousands are equal, and they form one chain all the same.
    """
    # The upper half: the lower one decides of the round.
    owner = (entries["key"] >> np.uint64(32)) % np.uint64(ranks.world)
    entries, _ = ranks.exchange(entries, owner.astype(np.int64))
    # The same order on any number of ranks.
    order = np.lexsort((entries["row"], entries["hash"], entries["key"]))
    entries = entries[order]
    keys = entries["key"]
    found = [np.zeros((0, 2), np.int64)]
    first = np.arange(len(entries))
    for step in range(1, REACH + 1):
        first = first[first + step < len(entries)]
        first = first[keys[first] == keys[first + step]]
        if len(first) == 0:
            break
        a = entries[first]
        b = entries[first + step]
        good = is_near(a, b) & (a["row"] != b["row"])
        pairs = np.stack([a["row"], b["row"]], 1)
        found.append(pairs[good])
    return unique_pairs(np.concatenate(found))


def unique_pairs(pairs):
    """Pairs (p, 2), the lower row first, each once, in order."""
    pairs = np.sort(pairs, 1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return pairs[new]
