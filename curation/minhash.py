"""Captions that share most of their 3-grams: MinHash finds them, their 3-grams decide.

Source: Broder (1997); bands as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
"""
import functools
import math

import numpy as np

from curation.text import HASH_MULTIPLIER, caption_words, ngram_keys

MAX_BANDS = 16
MISSED = 0.002  # share of the pairs at the asked-for Jaccard that no band finds


def caption_ngrams(text):
    """Keys of the word 3-grams of a text, uint64, each once, in order."""
    return np.unique(ngram_keys([caption_words(text)], 3))


def choose_bands(jaccard):
    """(values of a band, number of bands) that find all pairs of this Jaccard but MISSED of them.

    Two texts agree in a band of r values with probability J^r. The longest bands of which MAX_BANDS
    are enough bring the fewest other pairs.
    """
    for size in range(8, 1, -1):
        n = n_bands(jaccard, size)
        if n <= MAX_BANDS:
            return size, n
    return 1, n_bands(jaccard, 1)


def n_bands(jaccard, size):
    agree = min(jaccard**size, 1 - 1e-9)
    return max(1, math.ceil(math.log(MISSED) / math.log1p(-agree)))


@functools.cache
def hash_functions(count):
    """Odd factors (count, 1) and what is added (count, 1), uint64, of multiply-shift hashes
    (Dietzfelbinger et al., 1997)."""
    rng = np.random.default_rng(1)
    odd = rng.integers(1, 2**63, (count, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    return odd, rng.integers(0, 2**63, (count, 1), dtype=np.uint64)


def minhash_bands(keys, size, count):
    """keys of the 3-grams of a text -> keys of its bands (count,) uint64; zeros if it has none.

    Value k of a signature is the smallest that hash function k takes. A band's key stands for
    `size` values.
    """
    if len(keys) == 0:
        return np.zeros(count, np.uint64)
    odd, added = hash_functions(size * count)
    hashes = (keys * odd + added) >> np.uint64(32)  # (values, 3-grams)
    signature = hashes.min(1).reshape(count, size)
    bands = np.arange(1, count + 1, dtype=np.uint64)
    for k in range(size):
        bands = (bands ^ signature[:, k]) * HASH_MULTIPLIER
        bands ^= bands >> np.uint64(29)
    return np.maximum(bands, 1)  # 0 is for none


def jaccard_of(first, second):
    """Share of two sorted arrays of distinct keys that both have; 0 if both are empty."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / max(1, len(first) + len(second) - both)
