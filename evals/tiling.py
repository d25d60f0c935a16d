"""Tiles of a benchmark's pictures that no model is trained on: in two scales, and gray ones."""
import torch

from inputs.images import GRAY, Image, make_tiles, resize, tile_grid

# The most tiles of all pictures of a row together.
MAX_ROW_TILES = 64


def row_tiles(images, b, side, thumbnail, max_tiles=0):
    """Pillow RGB images of a row -> uint8 tiles (N, 3, s, s) of each, as benchmark `b` wants them.

    max_tiles: of one picture, its thumbnail not counted; 0 = the benchmark's number.
    """
    share = MAX_ROW_TILES // len(images)
    most = max(1, min(max_tiles or b.tiles, share))
    width, height = images[0].size
    size = (b.upscale * width, b.upscale * height)
    first = images[0].resize(size, Image.Resampling.BILINEAR)
    if b.two_scales and len(images) == 1:
        return [two_scales(first, most, side, thumbnail)]
    tiles = []
    for image in [first, *images[1:]]:
        found = make_tiles(image, 1, most, side, thumbnail)
        tiles.append(found)
    return tiles


def two_scales(image, max_tiles, side, thumbnail):
    """Pillow RGB image -> uint8 (N, 3, s, s): its grid, a second grid, and the thumbnail last.

    The second grid is the nearest one with a line that the first has not (load_image_msac of
    vlmeval/vlm/sail_vl.py). As there, the second grid comes before the first one's last tile where
    there is no thumbnail.
    """
    tiles = make_tiles(image, 1, max_tiles, side, thumbnail)
    first_grid = tile_grid(*image.size, 1, max_tiles, side)
    second_grid = tile_grid(*image.size, 1, max_tiles, side, first_grid)
    second = cut(image, second_grid, side)
    return torch.cat([tiles[:-1], second, tiles[-1:]])


def cut(image, grid, side):
    """Pillow RGB image -> uint8 tiles (columns * rows, 3, s, s) of a grid, row by row."""
    columns, rows = grid
    width = side * columns
    height = side * rows
    pixels = resize(image, width, height)
    pixels = pixels.view(3, rows, side, columns, side)
    # (rows, columns, 3, side, side)
    pixels = pixels.permute(1, 3, 0, 2, 4)
    return pixels.reshape(-1, 3, side, side)


def gray(tiles):
    """As many tiles as each of these, all gray."""
    return [GRAY.expand_as(t) for t in tiles]
