"""Whether two pictures are near-duplicates: one look is laid over the other, edge by edge.

They are brought to one place and one light. Then it counts how much of the edges of one is found in
the other. Pictures of one template share its frame, and no more.

Shapes: n pairs, S = LOOK_SIDE.
"""
import numpy as np

from curation.look import MIN_EDGE
from curation.pixels import blur, box_mean, halve, resample, steepest_near, steepness

# Steps that lay one look over another, at half its pixels and at all of them.
COARSE_STEPS = 4
FINE_STEPS = 3
# A pixel differs if it is further off than this, in levels and as a share of the steepest edge near
# it. The share allows for a shift of a tenth of a pixel.
MOST_LEVELS = 2.0
EDGE_SHARE = 0.1
BACKGROUND = 6  # pixels on either side whose mean is taken off as the light of a place
MAX_GAIN = 1.4  # of the contrast
# A picture with fewer pixels of edges is sparse, such as a white page with two lines of text. Half
# as much of its edges may be missing.
SPARSE = 450
# A watermark is darker or lighter than the picture, all over, and lets it through: in levels, where
# it differs most. Then more may be missing.
ONE_SIDED = 0.2
FAINT = 64
MORE_MISSING = 2.0
# Else no place may lack more than this share of its edges: charts of one template differ in the
# tops of their bars alone. The edges of a mean place are added to its own, so that a place with few
# counts less.
PLACE_RADIUS = 4  # pixels on either side of its middle
MOST_OF_A_PLACE = 0.35
# Levels by which the colour of a cell may lie outside those of the cells around it, and a share of
# its own, for a stronger contrast.
COLOR_LEVELS = 16
COLOR_SHARE = 0.25
GRAY_LEVELS = 6  # a picture whose cells have no more colour is a grey one

# How two looks compare. found: share of the edges of one picture that is in the other, the larger
# of both. one_sided: 0 if all that differs is darker, or all is lighter; 1 if as much is either.
# most: levels by which they differ where they differ most. place: share of its edges that is
# missing at the place that lacks most. gain: contrast of the second over that of the first.
# edges: pixels that hold the edges, of the picture that has fewer.
COMPARISON = np.dtype([
    ("found", "f4"),
    ("one_sided", "f4"),
    ("most", "f4"),
    ("place", "f4"),
    ("gain", "f4"),
    ("edges", "f4"),
    ("same_color", "?"),
])


def compare_looks(first, second):
    """first, second (n,) LOOK -> COMPARISON (n,)."""
    result = np.zeros(len(first), COMPARISON)
    a = blur(first["gray"].astype(np.float32))
    b = blur(second["gray"].astype(np.float32))
    scale = np.ones((len(a), 2), np.float32)
    shift = np.zeros((len(a), 2), np.float32)
    scale, shift = align(halve(a), halve(b), scale, shift, COARSE_STEPS)
    scale, shift = align(a, b, scale, 2 * shift, FINE_STEPS)
    b, inside = resample(b, scale, shift)
    result["gain"], a, b = even_light(a, b, inside)
    compare_edges(a, b, inside, result)
    result["same_color"] = same_color(first["color"], second["color"])
    return result


def margin_of(result, found):
    """COMPARISON (n,) -> by how much they are near-duplicates (n,); below 0 they are none.

    found: least share of the edges of a picture that its near-duplicate has.
    """
    allowed = np.full(len(result), 1 - found)
    sparse = result["edges"] < SPARSE
    watermark = (result["one_sided"] <= ONE_SIDED) & (result["most"] <= FAINT)
    allowed[watermark] *= MORE_MISSING
    allowed[sparse] = (1 - found) / 2
    margin = allowed - (1 - result["found"])
    of_place = np.where(watermark, margin, MOST_OF_A_PLACE - result["place"])
    margin = np.minimum(margin, of_place)
    gain = result["gain"]
    other_light = (gain > MAX_GAIN) | (gain < 1 / MAX_GAIN)
    margin[other_light | ~result["same_color"]] = -1
    return margin


# ---- place ---------------------------------------------------------------------------------------


def align(a, b, scale, shift, steps):
    """Images (n, s, s) and a first scale, shift (n, 2) of x and y -> those that lay b over a.

    Scale, shift, gain and light are fitted by Gauss-Newton, with the gradient of a alone (Baker and
    Matthews, 2004). It finds crops of some percent.
    """
    n, side, _ = a.shape
    solve = solution_of(a)
    for _ in range(steps):
        moved, inside = resample(b, scale, shift)
        off = (moved - a) * inside
        step = solve @ off.reshape(n, -1, 1)
        step = step.reshape(n, 2, 2)  # of x and y: of the scale, of the shift
        scale = scale / (1 + np.clip(step[:, :, 0], -0.1, 0.1))
        scale = np.clip(scale, 0.8, 1.25)
        shift = shift - np.clip(step[:, :, 1], -2, 2) * scale
        shift = np.clip(shift, -side / 6, side / 6)
    return scale, shift


def solution_of(a):
    """Images (n, s, s) -> matrices (n, 4, s * s) from what is off to a step of scale and shift."""
    n, side, _ = a.shape
    middle = np.arange(side, dtype=np.float32) - (side - 1) / 2
    along_y = np.gradient(a, axis=1)
    along_x = np.gradient(a, axis=2)
    slopes = [
        along_x * middle,
        along_x,
        along_y * middle[:, None],
        along_y,
        a - a.mean((1, 2), keepdims=True),  # gain
        np.ones_like(a),  # light
    ]
    slopes = np.stack(slopes, 1).reshape(n, 6, -1)
    products = slopes @ slopes.transpose(0, 2, 1)
    # A little more on the diagonal, for what a flat picture does not determine.
    diagonal = np.einsum("nii->ni", products)
    products = products + np.eye(6) * (1e-3 * diagonal + 1e-2)[:, :, None]
    inverse = np.linalg.inv(products)[:, :4]
    return inverse.astype(np.float32) @ slopes


# ---- light ---------------------------------------------------------------------------------------


def even_light(a, b, inside):
    """Give images (n, S, S) one light -> gain (n,) of b over a, and both images.

    The one with fewer white pixels gets the other's light, and is cut off at black and white as the
    other was.
    """
    white_a = ((a > 250) & inside).sum((1, 2))
    white_b = ((b > 250) & inside).sum((1, 2))
    swap = white_a > white_b
    dark = np.where(swap[:, None, None], b, a)
    bright = np.where(swap[:, None, None], a, b)
    # Where either is cut off, the line between them bends.
    used = inside & ~is_cut_off(dark) & ~is_cut_off(bright)
    too_few = used.mean((1, 2)) <= 0.02
    used[too_few] = inside[too_few]
    for _ in range(3):
        gain, level = fit_light(dark, bright, used)
        lit = np.clip(gain * dark + level, 0, 255)
        off = np.abs(lit - bright)
        limit = MOST_LEVELS + 2 * mean_where(off, used)
        used &= off < limit
    gain = gain[:, 0, 0]
    return np.where(swap, 1 / gain, gain), lit, bright


def is_cut_off(images):
    return (images < 4) | (images > 251)


def mean_where(images, used):
    """The mean (n, 1, 1) of the used pixels of images (n, S, S)."""
    total = (images * used).sum((1, 2), keepdims=True)
    return total / (used.sum((1, 2), keepdims=True) + 1e-3)


def fit_light(x, y, used):
    """gain, level (n, 1, 1) of y = gain * x + level over the used pixels.

    Both have errors, so that the gain is the ratio of their spreads.
    """
    mean_x = mean_where(x, used)
    mean_y = mean_where(y, used)
    spread_x = mean_where((x - mean_x) ** 2, used)
    spread_y = mean_where((y - mean_y) ** 2, used)
    gain = np.sqrt((spread_y + 1e-3) / (spread_x + 1e-3))
    gain = np.clip(gain, 0.5, 2)
    return gain, mean_y - gain * mean_x


# ---- edges ---------------------------------------------------------------------------------------


def compare_edges(a, b, inside, result):
    """Images of one place and light -> the other fields of a COMPARISON, in place."""
    covered = box_mean(inside.astype(np.float32), BACKGROUND) + 1e-6
    difference = (b - a) * inside
    background = box_mean(difference, BACKGROUND) / covered
    local = (difference - background) * inside
    steep_a = steepness(a) * inside
    steep_b = steepness(b) * inside
    steepest = steepest_near(np.minimum(steep_a, steep_b))
    differs = np.abs(local) > MOST_LEVELS + EDGE_SHARE * steepest

    missing = np.minimum(share_where(steep_a, differs), share_where(steep_b, differs))
    result["most"] = np.abs(local).max((1, 2))
    of_a = missing_by_place(steep_a, differs)
    of_b = missing_by_place(steep_b, differs)
    result["place"] = np.minimum(of_a, of_b).max((1, 2))
    flat = np.minimum(steep_a.mean((1, 2)), steep_b.mean((1, 2))) < MIN_EDGE
    result["found"] = np.where(flat, 0, 1 - missing)
    result["edges"] = np.minimum(pixels_of(steep_a), pixels_of(steep_b))
    lighter = (np.maximum(difference, 0) * differs).sum((1, 2))
    darker = (np.maximum(-difference, 0) * differs).sum((1, 2))
    less = np.minimum(lighter, darker)
    more = np.maximum(lighter, darker)
    result["one_sided"] = less / (more + 1e-3)


def share_where(steep, differs):
    """The share (n,) of all steepness that lies on these pixels."""
    total = steep.sum((1, 2))
    return (steep * differs).sum((1, 2)) / (total + 1e-3)


def missing_by_place(steep, differs):
    """The share (n, S, S) of the steepness around each pixel that lies on these pixels."""
    mean = steep.mean((1, 2), keepdims=True)
    return box_mean(steep * differs, PLACE_RADIUS) / (box_mean(steep, PLACE_RADIUS) + mean + 1e-6)


def pixels_of(steep):
    """How many pixels of one steepness would have this sum, and this sum of squares: (n,)."""
    total = steep.sum((1, 2))
    squares = (steep * steep).sum((1, 2))
    return total * total / (squares + 1e-3)


# ---- colours -------------------------------------------------------------------------------------


def same_color(first, second):
    """Colours (n, 8, 8, 3) uint8 of two pictures -> whether they agree (n,), or one is grey."""
    first = tint_of(first)
    second = tint_of(second)
    strongest = np.minimum(np.abs(first).max((1, 2, 3)), np.abs(second).max((1, 2, 3)))
    agree = is_within(first, second) & is_within(second, first)
    return agree | (strongest <= GRAY_LEVELS)


def tint_of(color):
    """Colours (n, 8, 8, 3) without their lightness, in levels."""
    color = color.astype(np.float32)
    return color - color.mean(3, keepdims=True)


def is_within(inner, outer):
    """Whether each tint of a picture lies among those of the other's cells around it: (n,) bool."""
    side = inner.shape[1]
    padded = np.pad(outer, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    around = []
    for y in range(3):
        for x in range(3):
            around.append(padded[:, y : y + side, x : x + side])
    slack = COLOR_LEVELS + COLOR_SHARE * np.abs(inner)
    low = np.minimum.reduce(around) - slack
    high = np.maximum.reduce(around) + slack
    return ((inner >= low) & (inner <= high)).all((1, 2, 3))
