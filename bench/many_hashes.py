"""Clusters of N hashes on the ranks of torchrun: seconds, memory, a hash of what comes out.

    torchrun --standalone --nproc_per_node=2 -m bench.many_hashes N RESULT.json
"""
import hashlib
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

from bench.dedup import DISTANCE
from curation.look import HASH_WORDS, HASHED_CROPS, KEY_BITS, KEY_TABLES, UNSURE_BITS
from curation.pairs import picture_pairs
from curation.ranks import connected, join_ranks
from training.distributed import close_distributed

BLOCK = 100_000  # rows that are drawn together, so that they are the same on any number of ranks


def draw_block(number, size):
    """hashes (size, 2, 2), unsure (size, 2, 3, 3) of a block. A tenth are copies, but for a bit."""
    rng = np.random.default_rng(number)
    words = (size, len(HASHED_CROPS), HASH_WORDS)
    hashes = rng.integers(0, 2**63, words, dtype=np.uint64)
    shape = (size, len(HASHED_CROPS), len(KEY_TABLES), UNSURE_BITS)
    # Distinct bits: a first one, and the two that follow it at some distance.
    first = rng.integers(0, KEY_BITS, shape[:3])
    unsure = (first[..., None] + np.arange(UNSURE_BITS) * 7) % KEY_BITS
    copies = np.arange(size // 10) * 2 + 1
    hashes[copies] = hashes[copies - 1]
    turned = unsure[copies, 0, 0, 0].astype(np.uint64)
    hashes[copies, 0, 0] ^= np.uint64(1) << turned
    return hashes, unsure.astype(np.uint8)


def main():
    n = int(float(sys.argv[1]))
    ranks = join_ranks()
    blocks = ranks.share(range(0, n, BLOCK))
    parts = [draw_block(start, min(BLOCK, n - start)) for start in blocks]
    hashes = np.concatenate([part[0] for part in parts])
    unsure = np.concatenate([part[1] for part in parts])
    del parts
    bounds = np.cumsum([0, *ranks.gather(len(hashes))])
    rows = np.arange(len(hashes)) + bounds[ranks.rank]

    start = time.perf_counter()
    start_of_cpu = time.process_time()
    pairs = picture_pairs(ranks, rows, hashes, unsure, DISTANCE)
    cluster = connected(ranks, bounds, pairs[:, 0], pairs[:, 1])
    seconds = time.perf_counter() - start
    cpu_seconds = max(ranks.gather(time.process_time() - start_of_cpu))
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    merged = np.flatnonzero(cluster != rows)
    merged = ranks.gather(np.stack([rows[merged], cluster[merged]], 1))
    memory = ranks.gather(gigabytes)
    if ranks.rank == 0:
        merged = np.concatenate(merged)
        result = {"clusters": hashlib.sha256(merged.tobytes()).hexdigest(), "merged": len(merged),
                  "seconds": seconds, "cpu_seconds": cpu_seconds, "gigabytes": max(memory)}
        Path(sys.argv[2]).write_text(json.dumps(result))
    close_distributed()


if __name__ == "__main__":
    main()
