"""Tiles of a benchmark's pictures: two scales, upscaling, shares of several pictures."""

import pytest
import torch
from PIL import Image

from evals import table, tiling
from inputs.images import make_tiles, tile_grid

SIDE = 28


def noise(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


def released(width, height, grids, side):
    """The choice of the released code, told again: nearest ratio, on a tie the larger grid."""
    best = (1, 1)
    gap = float("inf")
    for columns, rows in grids:
        this = abs(width / height - columns / rows)
        tie = this == gap and width * height > 0.5 * side * side * columns * rows
        if this < gap or tie:
            best = (columns, rows)
            gap = this
    return best


@pytest.mark.parametrize("most", [1, 4, 10, 12, 24])
def test_the_second_grid_is_that_of_load_image_msac(most):
    grids = {
        (i, j)
        for n in range(1, most + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= most
    }
    grids = sorted(grids, key=lambda grid: grid[0] * grid[1])
    for width in range(10, 300, 23):
        for height in range(10, 300, 31):
            first = released(width, height, grids, SIDE)
            left = [g for g in grids if first[0] % g[0] or first[1] % g[1]]
            second = released(width, height, left, SIDE)
            assert tile_grid(width, height, 1, most, SIDE) == first
            assert tile_grid(width, height, 1, most, SIDE, first) == second


def test_tiles_come_grid_by_grid_and_the_thumbnail_last():
    image = noise(150, 100)
    tiles = tiling.two_scales(image, 10, SIDE, True)
    once = make_tiles(image, 1, 10, SIDE, True)
    columns, rows = tile_grid(150, 100, 1, 10, SIDE, tile_grid(150, 100, 1, 10, SIDE))
    assert len(tiles) == len(once) + columns * rows
    assert torch.equal(tiles[: len(once) - 1], once[:-1]) and torch.equal(tiles[-1], once[-1])
    second = make_tiles(
        image.resize((SIDE * columns, SIDE * rows)), columns * rows, columns * rows, SIDE, False
    )
    assert (tiles[len(once) - 1 : -1].int() - second.int()).abs().max() <= 1


def test_only_a_single_picture_is_cut_in_two_scales():
    b = table.find_benchmark("MMStar", "vlmevalkit-2026-08")
    image = noise(150, 100)
    (alone,) = tiling.row_tiles([image], b, SIDE, True)
    assert torch.equal(alone, tiling.two_scales(image, 10, SIDE, True))
    both = tiling.row_tiles([image, image], b, SIDE, True)
    assert [len(t) for t in both] == [len(make_tiles(image, 1, 10, SIDE))] * 2
    paper = tiling.row_tiles([image], table.find_benchmark("MMStar"), SIDE, True)
    assert torch.equal(paper[0], make_tiles(image, 1, 6, SIDE))


def test_a_picture_of_one_tile_is_its_own_thumbnail():
    image = noise(20, 20)
    tiles = tiling.two_scales(image, 2, SIDE, True)
    assert len(tiles) == 3
    assert torch.equal(tiles[-1:], make_tiles(image, 1, 1, SIDE))
