"""Pairs of rows that may be near-duplicates: those with a key in common, found by all ranks.

Shapes: n rows of all shards, of which each rank has a block, m of them.
"""
import numpy as np

from curation.look import (
    HASH_WORDS,
    HASHED_CROPS,
    KEY_BITS,
    KEY_TABLES,
    UNSURE_BITS,
    hash_keys,
    turned_keys,
)

REACH = 64  # rows of equal key that a row is compared with
# Bits by which the second word is turned for each table: more than REACH rows of one key then have
# other neighbours in each.
ROTATION = 21
# Keys of all ranks together that are in memory, or these many of each; more are made in rounds.
KEYS_AT_ONCE = 2**23
FEWEST_KEYS_AT_ONCE = 2**20
# An entry of the table of keys. order: a key, in its upper bits, and how its rows are sorted.
ENTRY = np.dtype([("order", "u8"), ("hash", "u8", HASH_WORDS), ("row", "i8")])
KEY_SHIFT = np.uint64(64 - KEY_BITS)


def picture_pairs(ranks, rows, hashes, unsure, distance):
    """rows (m,), hashes (m, 2, 2), unsure (m, 2, 3, UNSURE_BITS) of own pictures -> pairs (p, 2).

    Two rows make a pair if they have a key in common and their hashes differ in at most `distance`
    bits. rows: their numbers. Each rank returns some of the pairs, each once.
    """
    def is_near(a, b):
        return np.bitwise_count(a ^ b).sum(1) <= distance

    m = len(hashes)
    per_row = len(HASHED_CROPS) * 2**UNSURE_BITS
    at_once = keys_at_once(ranks.world)
    n_rounds = max(ranks.gather(-(-m * per_row // at_once) or 1))
    found = []
    for table in range(len(KEY_TABLES)):
        keys = [hash_keys(hashes[:, crop, 0], table) for crop in range(len(HASHED_CROPS))]
        for part in range(n_rounds):
            low = part * 2**KEY_BITS // n_rounds
            high = (part + 1) * 2**KEY_BITS // n_rounds
            entries = []
            for crop, of_crop in enumerate(keys):
                for turned in turned_keys(of_crop, unsure[:, crop, table]):
                    spread = spread_keys(turned)
                    own = np.flatnonzero((spread >= low) & (spread < high))
                    order = spread[own].astype(np.uint64) << KEY_SHIFT
                    second = rotated(hashes[own, crop, 1], ROTATION * table)
                    order |= second >> np.uint64(KEY_BITS)
                    entries.append(make_entries(order, hashes[own, crop], rows[own]))
            entries = np.concatenate(entries)
            owner = (entries["order"] >> KEY_SHIFT) % np.uint64(ranks.world)
            found.append(entry_pairs(ranks, entries, owner, KEY_SHIFT, is_near))
    return unique_pairs(np.concatenate(found))


def keys_at_once(n_ranks):
    """How many keys a rank makes in a round."""
    return max(KEYS_AT_ONCE // n_ranks, FEWEST_KEYS_AT_ONCE)


def spread_keys(keys):
    """Keys (m,) of KEY_BITS bits -> as many other numbers, uint32, that lie evenly."""
    # The factor is odd, so that no two become one.
    return (keys * np.uint32(0x9E3779B1)) & np.uint32(2**KEY_BITS - 1)


def rotated(words, bits):
    """uint64 words, rotated to the left by so many bits."""
    return (words << np.uint64(bits)) | (words >> np.uint64(-bits % 64))


def text_pairs(ranks, rows, bands):
    """rows (m,), bands (m, b) uint64 of own captions -> pairs (p, 2) of rows with one in common.

    A band of 0 is none.
    """
    found = [np.zeros((0, 2), np.int64)]
    for band in range(bands.shape[1]):
        own = np.flatnonzero(bands[:, band])
        keys = bands[own, band]
        entries = make_entries(keys, 0, rows[own])
        owner = keys % np.uint64(ranks.world)
        found.append(entry_pairs(ranks, entries, owner, np.uint64(0), are_any))
    return unique_pairs(np.concatenate(found))


def are_any(a, b):
    """All pairs of captions that have a band in common are compared."""
    return np.ones(len(a), bool)


def make_entries(order, hashes, rows):
    entries = np.empty(len(order), ENTRY)
    entries["order"] = order
    entries["hash"] = hashes
    entries["row"] = rows
    return entries


def entry_pairs(ranks, entries, owner, shift, is_near):
    """ENTRY arrays of all ranks -> pairs (p, 2) of rows of one key for which is_near(a, b) holds.

    a, b: their hashes (p, 2). owner: the rank that gets an entry, which follows from its key.
    shift: of the order, for the key. A row is compared with at most REACH others of its key, those
    behind it. That bounds the work where thousands are equal; they form one chain all the same.
    """
    entries, _ = ranks.exchange(entries, owner.astype(np.int64))
    entries = sorted_entries(entries)
    keys = entries["order"] >> shift
    hashes = np.ascontiguousarray(entries["hash"])
    rows = np.ascontiguousarray(entries["row"])
    found = [np.zeros((0, 2), np.int64)]
    first = np.arange(len(entries))
    for step in range(1, REACH + 1):
        first = first[first + step < len(entries)]
        first = first[keys[first] == keys[first + step]]
        if len(first) == 0:
            break
        near = first[is_near(hashes[first], hashes[first + step])]
        pairs = np.stack([rows[near], rows[near + step]], 1)
        found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    return unique_pairs(np.concatenate(found))


def sorted_entries(entries):
    """ENTRY in the order of `order`, then of row: the same on any number of ranks."""
    entries = entries[np.argsort(entries["order"])]
    order = entries["order"]
    same = order[1:] == order[:-1]
    tied = np.zeros(len(entries), bool)
    tied[:-1] |= same
    tied[1:] |= same
    # Few are: one sort by both would be ten times as slow.
    ties = entries[tied]
    entries[tied] = ties[np.lexsort((ties["row"], ties["order"]))]
    return entries


def unique_pairs(pairs):
    """Pairs (p, 2), the lower row first, each once, in order."""
    pairs = np.sort(pairs, 1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return pairs[new]
