"""The look of a picture: a small grey copy, a grid of colours, and a hash by which to find it.

The hash is made of the signs of the lowest frequencies. It finds candidates; overlay.py decides.

Shapes: n pictures, S = LOOK_SIDE.
"""
import numpy as np
from PIL import Image

from curation.pixels import blur, resample, steepness

LOOK_SIDE = 96  # pixels; at 64, charts of one template are taken for each other
COLOR_GRID = 8
LOOK = np.dtype([
    ("gray", "u1", (LOOK_SIDE, LOOK_SIDE)),
    ("color", "u1", (COLOR_GRID, COLOR_GRID, 3)),
])
MIN_EDGE = 0.05  # mean steepness, levels a pixel: less is a flat picture, nobody's duplicate

HASH_BITS = 128
HASH_WORDS = HASH_BITS // 64
N_FREQUENCIES = 16  # along either axis
# A picture has two hashes, of all of it and of its middle. A crop has one in common with it.
HASHED_CROPS = (0.0, 0.015)  # cut off on each side
KEY_BITS = 24
UNSURE_BITS = 3  # of a key, which stands for all their values
# Three selections of the hash's bits. Bit 0 has the lowest frequency.
KEY_TABLES = (range(KEY_BITS), range(0, 2 * KEY_BITS, 2), range(1, 2 * KEY_BITS, 2))


def look_of(image):
    """The LOOK of a PIL image, a scalar array."""
    look = np.zeros((), LOOK)
    side = (LOOK_SIDE, LOOK_SIDE)
    # Shrunk roughly first, which is four times as quick for a large picture.
    gray = image.convert("L").resize(side, Image.Resampling.LANCZOS, reducing_gap=3.0)
    look["gray"] = np.asarray(gray)
    color = image.resize((COLOR_GRID, COLOR_GRID), Image.Resampling.BOX)
    look["color"] = np.asarray(color)
    return look


def has_edges(gray):
    """gray (n, S, S) uint8 -> whether there is anything to compare (n,)."""
    steep = steepness(blur(gray.astype(np.float32)))
    return steep.mean((1, 2)) >= MIN_EDGE


# ---- hash ----------------------------------------------------------------------------------------


def low_frequencies():
    """The lowest frequencies but the mean: cosines (16, S), and the rows and columns (128,)."""
    places = []
    for row in range(N_FREQUENCIES):
        for column in range(N_FREQUENCIES):
            places.append((row + column, abs(row - column), row, column))
    chosen = np.array(sorted(places)[1 : HASH_BITS + 1])
    x = 2 * np.arange(LOOK_SIDE) + 1
    frequency = np.arange(N_FREQUENCIES)[:, None]
    cosines = np.cos(np.pi * frequency * x / (2 * LOOK_SIDE))
    return cosines.astype(np.float32), chosen[:, 2], chosen[:, 3]


COSINES, HASH_ROWS, HASH_COLUMNS = low_frequencies()
# Natural pictures have less of a frequency the higher it is.
FALL_OFF = np.hypot(HASH_ROWS, HASH_COLUMNS).astype(np.float32)


def hash_of(gray):
    """gray (n, S, S) uint8 -> hash (n, 2, 2) uint64, unsure (n, 2, 3, UNSURE_BITS) uint8.

    A hash of 128 bits for the picture and one for its middle. A bit is the sign of a frequency, the
    lowest ones in the first word. unsure: bits of each key that an edit may turn, those whose
    frequency is weakest for its place.
    """
    gray = gray.astype(np.float32)
    hashes = []
    unsure = []
    for crop in HASHED_CROPS:
        scale = np.full((len(gray), 2), 1 - 2 * crop, np.float32)
        part, _ = resample(gray, scale, np.zeros_like(scale))
        frequencies = COSINES @ part @ COSINES.T  # (n, 16, 16)
        strength = frequencies[:, HASH_ROWS, HASH_COLUMNS]  # (n, 128)
        bits = np.packbits(strength > 0, axis=1, bitorder="little")
        hashes.append(np.ascontiguousarray(bits).view("<u8"))
        weakest = []
        for table in KEY_TABLES:
            weakness = np.abs(strength[:, table]) * FALL_OFF[table]
            order = np.argsort(weakness, 1, kind="stable")
            weakest.append(order[:, :UNSURE_BITS])
        unsure.append(np.stack(weakest, 1))
    return np.stack(hashes, 1), np.stack(unsure, 1).astype(np.uint8)


def hash_keys(hashes, table):
    """First words (m,) of hashes -> their keys (m,) uint32 of KEY_BITS bits."""
    keys = np.zeros(len(hashes), np.uint32)
    for place, bit in enumerate(KEY_TABLES[table]):
        found = (hashes >> np.uint64(bit)) & np.uint64(1)
        keys |= found.astype(np.uint32) << np.uint32(place)
    return keys


def turned_keys(keys, unsure):
    """keys (m,), unsure (m, UNSURE_BITS) -> yield the keys for all values of their unsure bits.

    Two pictures have one of them in common if all bits agree of which neither is unsure. In Gray's
    order, so that one bit is turned at a time, in place.
    """
    keys = keys.copy()
    yield keys
    for number in range(1, 2**UNSURE_BITS):
        bit = (number & -number).bit_length() - 1
        keys ^= np.uint32(1) << unsure[:, bit].astype(np.uint32)
        yield keys
