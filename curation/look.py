"""The look of a picture: what tells a near-duplicate from a picture that only resembles it.

A look is a small grey copy and a grid of colours. `hash_of` finds candidates: signs of the lowest
frequencies. `compare_looks` decides: it lays one look over the other, evens out the light, and asks
how much of the edges of one is found in the other. A template shares its frame, and no more.

Shapes: n pictures or pairs, S = LOOK_SIDE.
"""
import numpy as np
from PIL import Image

LOOK_SIDE = 96  # pixels; at 64 charts of one template are taken for each other
COLOR_GRID = 8
LOOK = np.dtype([("gray", "u1", (LOOK_SIDE, LOOK_SIDE)), ("color", "u1", (COLOR_GRID,) * 2 + (3,))])

HASH_BITS = 64
# A picture has two hashes, of all of it and of its middle, so that a crop has one in common with it.
HASHED_CROPS = (0.0, 0.015)  # cut off on each side
KEY_BITS = 24
UNSURE_BITS = 3  # of a key, which stands for all their values
# Three selections of the hash's bits. Bit 0 has the lowest frequency.
KEY_TABLES = (range(KEY_BITS), range(0, 2 * KEY_BITS, 2), range(1, 2 * KEY_BITS, 2))

# Steps that lay one look over another, at half its pixels and at all of them.
COARSE_STEPS = 4
FINE_STEPS = 3
# A pixel differs if it is further off than this, in levels and as a share of the steepest edge near
# it. The share allows for a shift of a tenth of a pixel.
LEVELS = 2.0
EDGE_SHARE = 0.1
BACKGROUND = 6  # pixels on either side whose mean is taken off as the light of a place
MAX_GAIN = 1.4  # of the contrast
# A picture with fewer pixels of edges is sparse, such as a white page with two lines of text. Half
# as much of its edges may be missing.
SPARSE = 450
MIN_EDGE = 0.05  # mean steepness, levels a pixel: less is a flat picture, nobody's duplicate
# What is laid over a picture, as a watermark, is darker or lighter all over. Then more may be missing.
ONE_SIDED = 0.2
MORE_MISSING = 2.0
# Levels by which the colour of a cell may lie outside those of the cells around it.
COLOR_LEVELS = 16
COLOR_SHARE = 0.25  # and this share of its own, for a stronger contrast
GRAY_LEVELS = 6  # a picture whose cells have no more colour is a grey one

# ---- one picture ---------------------------------------------------------------------------------


def look_of(image):
    """The LOOK of a PIL image, a scalar array."""
    look = np.zeros((), LOOK)
    side = (LOOK_SIDE, LOOK_SIDE)
    gray = image.convert("L").resize(side, Image.Resampling.LANCZOS, reducing_gap=3.0)
    look["gray"] = np.asarray(gray)
    look["color"] = np.asarray(image.resize((COLOR_GRID, COLOR_GRID), Image.Resampling.BOX))
    return look


def has_edges(gray):
    """gray (n, S, S) uint8 -> whether there is anything to compare (n,)."""
    return steepness(blur(gray.astype(np.float32))).mean((1, 2)) >= MIN_EDGE


def low_frequencies():
    """(cosines (12, S), rows (64,), columns (64,)): the 64 lowest frequencies but the mean."""
    places = [(u + v, abs(u - v), u, v) for u in range(12) for v in range(12) if u + v]
    chosen = np.array(sorted(places)[:HASH_BITS])
    x = 2 * np.arange(LOOK_SIDE) + 1
    cosines = np.cos(np.pi * np.arange(12)[:, None] * x / (2 * LOOK_SIDE))
    return cosines.astype(np.float32), chosen[:, 2], chosen[:, 3]


COSINES, HASH_ROWS, HASH_COLUMNS = low_frequencies()
# A photo's frequencies fall off as one over the frequency.
FALL_OFF = np.sqrt(HASH_ROWS**2 + HASH_COLUMNS**2).astype(np.float32)


def hash_of(gray):
    """gray (n, S, S) uint8 -> hash (n, 2) uint64, unsure (n, 2, 3, UNSURE_BITS) uint8.

    A bit is the sign of a frequency. unsure: bits of each key that an edit may turn, those whose
    frequency is weakest for its place.
    """
    hashes = []
    unsure = []
    for crop in HASHED_CROPS:
        scale = np.full((len(gray), 2), 1 - 2 * crop, np.float32)
        part, _ = sample(gray.astype(np.float32), scale, np.zeros_like(scale))
        strength = (COSINES @ part @ COSINES.T)[:, HASH_ROWS, HASH_COLUMNS]  # (n, 64)
        bits = np.packbits(strength > 0, axis=1, bitorder="little")
        hashes.append(np.ascontiguousarray(bits).view("<u8")[:, 0])
        weakness = np.abs(strength) * FALL_OFF
        unsure.append(np.stack([
            np.argsort(weakness[:, list(table)], 1, kind="stable")[:, :UNSURE_BITS]
            for table in KEY_TABLES], 1))
    return np.stack(hashes, 1), np.stack(unsure, 1).astype(np.uint8)


def hash_keys(hashes, unsure, table):
    """hash (n,), unsure (n, UNSURE_BITS) of a table -> keys (n, 2 ** UNSURE_BITS) uint32.

    Two pictures have a key in common if all bits agree that neither is unsure of.
    """
    keys = np.zeros(len(hashes), np.uint32)
    for place, bit in enumerate(KEY_TABLES[table]):
        found = (hashes >> np.uint64(bit)) & np.uint64(1)
        keys |= found.astype(np.uint32) << np.uint32(place)
    turned = np.uint32(1) << unsure.astype(np.uint32)
    choices = (np.arange(2**UNSURE_BITS)[:, None] >> np.arange(UNSURE_BITS)) & 1
    masks = turned @ choices.T.astype(np.uint32)  # distinct bits, so that the sum is their union
    return keys[:, None] ^ masks.astype(np.uint32)


# ---- pairs of pictures ---------------------------------------------------------------------------


# How two looks compare. found: share of the edges of one picture that is in the other, the larger of
# both. one_sided: 0 if all that differs is darker, or all is lighter; 1 if as much is either. gain:
# contrast of the second over that of the first. edges: pixels that hold the edges of the one that has
# fewer.
COMPARISON = np.dtype([("found", "f4"), ("one_sided", "f4"), ("gain", "f4"), ("edges", "f4"),
                       ("same_color", "?")])


def compare_looks(first, second):
    """first, second (n,) LOOK -> COMPARISON (n,)."""
    result = np.zeros(len(first), COMPARISON)
    a = blur(first["gray"].astype(np.float32))
    b = blur(second["gray"].astype(np.float32))
    place = (np.ones((len(a), 2), np.float32), np.zeros((len(a), 2), np.float32))
    scale, shift = align(halve(a), halve(b), *place, COARSE_STEPS)
    scale, shift = align(a, b, scale, 2 * shift, FINE_STEPS)
    b, inside = sample(b, scale, shift)
    result["gain"], a, b = even_light(a, b, inside)
    compare_edges(a, b, inside, result)
    result["same_color"] = same_color(first["color"], second["color"])
    return result


def margin_of(result, found):
    """COMPARISON (n,) -> by how much they are near-duplicates (n,); below 0 they are none.

    found: least share of the edges of a picture that its near-duplicate has.
    """
    missing = 1 - result["found"]
    sparse = result["edges"] < SPARSE
    one_sided = (result["one_sided"] <= ONE_SIDED) & ~sparse
    allowed = (1 - found) * np.where(sparse, 0.5, np.where(one_sided, MORE_MISSING, 1.0))
    gain = result["gain"]
    same_light = (gain <= MAX_GAIN) & (gain >= 1 / MAX_GAIN)
    return np.where(same_light & result["same_color"], allowed - missing, -1.0)


def halve(images):
    """The mean of each 2 x 2 pixels."""
    rows = images[:, ::2] + images[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def blur(images):
    """Images (n, S, S), each smoothed by [1 2 1] / 4 along both axes."""
    for axis in (1, 2):
        padding = [(0, 0)] * 3
        padding[axis] = (1, 1)
        padded = np.pad(images, padding, "edge")
        before, middle, after = (np.take(padded, np.arange(images.shape[axis]) + k, axis)
                                 for k in range(3))
        images = (before + 2 * middle + after) / 4
    return images


def box_mean(images, radius):
    """The mean of the square around each pixel, (n, S, S); zeros outside."""
    for axis in (1, 2):
        n = images.shape[axis]
        padding = [(0, 0)] * 3
        padding[axis] = (radius + 1, radius)
        sums = np.pad(images, padding).cumsum(axis, dtype=np.float32)
        stop = np.take(sums, np.arange(n) + 2 * radius + 1, axis)
        images = (stop - np.take(sums, np.arange(n), axis)) / (2 * radius + 1)
    return images


def steepness(images):
    """Length of the gradient at each pixel."""
    return np.hypot(np.gradient(images, axis=1), np.gradient(images, axis=2))


def steepest_near(steep):
    """The largest value of the 3 x 3 pixels around each."""
    n = steep.shape[1]
    padded = np.pad(steep, ((0, 0), (1, 1), (1, 1)), "edge")
    rows = np.maximum(np.maximum(padded[:, :n], padded[:, 1 : n + 1]), padded[:, 2:])
    return np.maximum(np.maximum(rows[:, :, :n], rows[:, :, 1 : n + 1]), rows[:, :, 2:])


# ---- place ---------------------------------------------------------------------------------------


def align(a, b, scale, shift, steps):
    """Images (n, s, s) and a first scale, shift (n, 2) of x and y -> those that lay b over a.

    They are fitted, gain and light with them, by Gauss-Newton with the
    gradient of a alone (Baker and Matthews, 2004). It finds a crop of some percent.
    """
    n, side, _ = a.shape
    middle = (np.arange(side, dtype=np.float32) - (side - 1) / 2)
    along_y = np.gradient(a, axis=1)
    along_x = np.gradient(a, axis=2)
    light = a - a.mean((1, 2), keepdims=True)
    slopes = [along_x * middle, along_x, along_y * middle[:, None], along_y, light,
              np.ones_like(a)]
    slopes = np.stack(slopes, 1).reshape(n, 6, -1)
    products = (slopes @ slopes.transpose(0, 2, 1)).astype(np.float64)
    diagonal = np.einsum("nii->ni", products)
    products += np.eye(6) * (1e-3 * diagonal + 1e-2)[:, :, None]
    solve = (np.linalg.inv(products)[:, :4].astype(np.float32)) @ slopes

    for _ in range(steps):
        moved, inside = sample(b, scale, shift)
        step = (solve @ ((moved - a) * inside).reshape(n, -1, 1))[:, :, 0].reshape(n, 2, 2)
        scale = np.clip(scale / (1 + np.clip(step[:, :, 0], -0.1, 0.1)), 0.8, 1.25)
        shift = shift - np.clip(step[:, :, 1], -2, 2) * scale
        shift = np.clip(shift, -side / 6, side / 6)
    return scale, shift


def sample(images, scale, shift):
    """Images (n, S, S) at scaled and shifted places, scale and shift (n, 2) of x and y.

    Returns the images and which of their pixels lie inside.
    """
    side = images.shape[1]
    middle = (side - 1) / 2
    centred = np.arange(side, dtype=np.float32) - middle
    places = scale[:, :, None] * centred + shift[:, :, None] + middle  # (n, 2, S)
    within = (places > -0.6) & (places < side - 0.4)
    weights = cubic_weights(np.clip(places, 0, side - 1), side)  # (n, 2, S, S)
    moved = weights[:, 1] @ images @ weights[:, 0].transpose(0, 2, 1)
    return moved, within[:, 1, :, None] & within[:, 0, None, :]


def cubic_weights(places, side):
    """Weights (..., S, side) of cubic convolution (Keys, 1981) that read a row at places (..., S).
    """
    far = np.abs(places[..., None] - np.arange(side, dtype=np.float32))
    near = (1.5 * far - 2.5) * far * far + 1
    next_to = ((-0.5 * far + 2.5) * far - 4) * far + 2
    weights = np.where(far < 1, near, np.where(far < 2, next_to, np.float32(0)))
    return weights / weights.sum(-1, keepdims=True)


# ---- light ---------------------------------------------------------------------------------------


def even_light(a, b, inside):
    """Give images (n, S, S) one light -> gain (n,) of b over a, and both images.

    The image with fewer white pixels gets the other's light, and is cut at black and white as the
    other was.
    """
    swap = ((a > 250) & inside).sum((1, 2)) > ((b > 250) & inside).sum((1, 2))
    dark = np.where(swap[:, None, None], b, a)
    bright = np.where(swap[:, None, None], a, b)
    # Where either is cut off, the line between them bends.
    free = inside & (dark > 4) & (dark < 251) & (bright > 4) & (bright < 251)
    enough = free.mean((1, 2)) > 0.02
    used = np.where(enough[:, None, None], free, inside)
    for _ in range(3):
        gain, level = fit_line(dark, bright, used)
        lit = np.clip(gain * dark + level, 0, 255)
        off = np.abs(lit - bright)
        limit = LEVELS + 2 * (off * used).sum((1, 2)) / (used.sum((1, 2)) + 1)
        used = used & (off < limit[:, None, None])
    gain = np.where(swap, 1 / gain[:, 0, 0], gain[:, 0, 0])
    return gain, lit, bright


def fit_line(x, y, used):
    """Least squares of y = gain * x + level over the used pixels -> gain, level (n, 1, 1)."""
    n = used.sum((1, 2), keepdims=True) + 1e-3
    mean_x = (x * used).sum((1, 2), keepdims=True) / n
    mean_y = (y * used).sum((1, 2), keepdims=True) / n
    x = (x - mean_x) * used
    y = (y - mean_y) * used
    # Both axes have errors, so that the ratio of their spreads stands for the slope.
    gain = np.sqrt(((y * y).sum((1, 2), keepdims=True) + 1)
                   / ((x * x).sum((1, 2), keepdims=True) + 1))
    gain = np.clip(gain, 0.5, 2)
    return gain, mean_y - gain * mean_x


# ---- decision ------------------------------------------------------------------------------------


def compare_edges(a, b, inside, result):
    """Images of one place and light -> found, one_sided and edges of a COMPARISON, in place."""
    covered = box_mean(inside.astype(np.float32), BACKGROUND) + 1e-6
    difference = (b - a) * inside
    local = (difference - box_mean(difference, BACKGROUND) / covered) * inside
    steep = [steepness(a) * inside, steepness(b) * inside]
    allowed = LEVELS + EDGE_SHARE * steepest_near(np.minimum(*steep))
    differs = np.abs(local) > allowed
    totals = [edges.sum((1, 2)) for edges in steep]
    missing = [(edges * differs).sum((1, 2)) / (total + 1e-3)
               for edges, total in zip(steep, totals, strict=True)]
    flat = np.minimum(*totals) < MIN_EDGE * LOOK_SIDE**2
    result["found"] = np.where(flat, 0, 1 - np.minimum(*missing))
    # As many pixels of one steepness would have this sum and this sum of squares.
    counts = [total**2 / ((edges * edges).sum((1, 2)) + 1e-3)
              for edges, total in zip(steep, totals, strict=True)]
    result["edges"] = np.minimum(*counts)

    lighter = (np.maximum(difference, 0) * differs).sum((1, 2))
    darker = (np.maximum(-difference, 0) * differs).sum((1, 2))
    result["one_sided"] = np.minimum(lighter, darker) / (np.maximum(lighter, darker) + 1e-3)


def same_color(first, second):
    """Colours (n, 8, 8, 3) uint8 of two pictures -> whether they agree (n,), or one is grey."""
    first = tint_of(first)
    second = tint_of(second)
    gray = (np.minimum(np.abs(first).max((1, 2, 3)), np.abs(second).max((1, 2, 3))) <= GRAY_LEVELS)
    return gray | (is_within(first, second) & is_within(second, first))


def tint_of(color):
    """Colours (n, 8, 8, 3) without their lightness, in levels."""
    color = color.astype(np.float32)
    return color - color.mean(3, keepdims=True)


def is_within(inner, outer):
    """Whether each tint of a picture lies among those of the other's cells around it: (n,) bool."""
    side = inner.shape[1]
    padded = np.pad(outer, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    around = [padded[:, y : y + side, x : x + side] for y in range(3) for x in range(3)]
    slack = COLOR_LEVELS + COLOR_SHARE * np.abs(inner)
    low = np.minimum.reduce(around) - slack
    high = np.maximum.reduce(around) + slack
    return ((inner >= low) & (inner <= high)).all((1, 2, 3))
