"""Small grey images, many at once: smoothing, means, edges, and reading at other places.

Shapes: n images of S x S pixels, float32.
"""
import numpy as np


def blur(images):
    """Images (n, S, S), each smoothed by [1 2 1] / 4 along both axes."""
    for axis in (1, 2):
        n = images.shape[axis]
        padded = pad(images, axis, 1, 1, "edge")
        before = slice_of(padded, axis, 0, n)
        middle = slice_of(padded, axis, 1, n)
        after = slice_of(padded, axis, 2, n)
        images = (before + 2 * middle + after) / 4
    return images


def box_mean(images, radius):
    """The mean of the square around each pixel (n, S, S); zeros outside."""
    width = 2 * radius + 1
    for axis in (1, 2):
        n = images.shape[axis]
        padded = pad(images, axis, radius + 1, radius, "constant")
        sums = padded.cumsum(axis, dtype=np.float32)
        stop = slice_of(sums, axis, width, n)
        start = slice_of(sums, axis, 0, n)
        images = (stop - start) / width
    return images


def pad(images, axis, before, after, mode):
    padding = [(0, 0), (0, 0), (0, 0)]
    padding[axis] = (before, after)
    return np.pad(images, padding, mode)


def slice_of(images, axis, start, n):
    """n rows (axis 1) or columns (axis 2) of images."""
    if axis == 1:
        return images[:, start : start + n]
    return images[:, :, start : start + n]


def halve(images):
    """The mean of each 2 x 2 pixels."""
    rows = images[:, ::2] + images[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4


def steepness(images):
    """Length of the gradient at each pixel."""
    along_y = np.gradient(images, axis=1)
    along_x = np.gradient(images, axis=2)
    return np.hypot(along_y, along_x)


def steepest_near(steep):
    """The largest value of the 3 x 3 pixels around each."""
    for axis in (1, 2):
        n = steep.shape[axis]
        padded = pad(steep, axis, 1, 1, "edge")
        shifted = [slice_of(padded, axis, start, n) for start in range(3)]
        steep = np.maximum.reduce(shifted)
    return steep


def resample(images, scale, shift):
    """Images (n, S, S) at scaled and shifted places, scale and shift (n, 2) of x and y.

    Returns the images and which of their pixels lie inside (n, S, S) bool.
    """
    side = images.shape[1]
    middle = (side - 1) / 2
    centred = np.arange(side, dtype=np.float32) - middle
    places = scale[:, :, None] * centred
    places += shift[:, :, None] + middle  # (n, 2, S)
    within = (places > -0.6) & (places < side - 0.4)
    places = np.clip(places, 0, side - 1)
    read_x = cubic_weights(places[:, 0], side)
    read_y = cubic_weights(places[:, 1], side)
    moved = read_y @ images @ read_x.transpose(0, 2, 1)
    inside = within[:, 1, :, None] & within[:, 0, None, :]
    return moved, inside


def cubic_weights(places, side):
    """Weights (n, S, side) of cubic convolution that read rows at places (n, S) (Keys, 1981)."""
    pixels = np.arange(side, dtype=np.float32)
    far = np.abs(places[:, :, None] - pixels)
    # The formulas for the two pixels around a place and the two behind these.
    inner = (1.5 * far - 2.5) * far * far + 1
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    outer[far >= 2] = 0
    weights = np.where(far < 1, inner, outer)
    return weights / weights.sum(2, keepdims=True)
