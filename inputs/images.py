"""Image files -> RGB pictures -> tiles.

Shapes: N tiles of a picture, s side of a tile in pixels.
"""
import base64
import contextlib
import functools
import io
import math
import os
import struct
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from inputs.files import check_file

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# Pictures, videos and sounds that are not read. A row beside one is refused, not trained without.
MEDIA_SUFFIXES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".j2k",
                  ".jxl", ".apng", ".svg", ".ppm", ".pgm", ".tga", ".ico", ".psd", ".dng", ".cr2",
                  ".nef", ".arw", ".mp4", ".webm", ".avi", ".mov", ".mkv", ".wav", ".mp3", ".flac",
                  ".ogg")
# Nothing else is even tried. Pillow opens MPO as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Type of a picture file by its first two bytes.
IMAGE_TYPES = {
    b"\xff\xd8": "jpeg",
    b"\x89P": "png",
    b"RI": "webp",
    b"GI": "gif",
    b"BM": "bmp",
}
# A larger picture is refused before it is decoded. Pillow's own limit is looser and only warns.
MAX_PIXELS = 64_000_000
Image.MAX_IMAGE_PIXELS = None
# Places where a PNG may say how it is turned: the name of a chunk, or of a text in one.
PNG_TURNS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
# No picture is cut into more tiles: the choice of a grid takes time for each of its candidates.
MAX_TILES = 1024
# ImageNet's mean and standard deviation of each channel, as in InternVL.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# The mean colour: what a blind model sees.
GRAY = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)

# torch.from_numpy warns of arrays it could damage; resize() only reads them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def keep_freed_memory():
    """Make glibc keep freed memory, so that the next picture does not pay for new pages.

    By default glibc returns large blocks to the system. Once a block of nearly 32 MB was freed, it
    keeps blocks up to that size (mallopt(3), M_MMAP_THRESHOLD). Where pictures of 1024 x 768 are
    tiled one after the other, each then takes 26 new pages instead of 3,400, and a CPU core tiles
    20.1 a second instead of 16.6. A loader frees such blocks anyway, and sees no difference.
    """
    np.empty(2 ** 25 - 2 ** 16, np.uint8)


keep_freed_memory()


# ---- image files --------------------------------------------------------------------------------

@contextlib.contextmanager
def open_image(source):
    """Open bytes, str or Path as a Pillow image, not decoded yet.

    Raises ValueError that names the picture (format, size, damage; also damage that shows while
    the caller decodes it) or OSError (no such file, no permission).
    """
    name = source
    file = source
    if isinstance(source, bytes):
        name = f"image of {len(source)} bytes"
        file = io.BytesIO(source)
    else:
        check_file(source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            n_pixels = image.width * image.height
            if n_pixels <= MAX_PIXELS:
                yield image
                return
        problem = (f"{image.width}x{image.height} is more than {MAX_PIXELS / 1e6:.0f} megapixels; "
                   "shrink it first")
    except UnidentifiedImageError:
        problem = f"not a picture in one of the formats {', '.join(FORMATS)}"
    except MemoryError:
        raise
    except Exception as e:  # Pillow raises many kinds of them for damaged files
        if getattr(e, "errno", None):  # no such file, no permission
            raise
        problem = f"damaged picture ({e or type(e).__name__})"
    raise ValueError(f"{name}: {problem}")


def load_image(source):
    """bytes, str or Path -> Pillow image in RGB, upright, alpha on white, first frame.

    Raises ValueError (format, size, damage) or OSError (no such file).
    """
    with open_image(source) as image:
        image.load()
        # In place: a copy takes a tenth of the time that decoding takes.
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # 16-bit grey: keep the upper byte.
        upper = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(upper.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def image_type(content):
    """The type of a picture file, as text, by its bytes; "jpeg" where they say nothing."""
    return IMAGE_TYPES.get(content[:2], "jpeg")


def image_size(source):
    """(width, height) in pixels as load_image would give them, from the header only.

    Raises like load_image.
    """
    with open_image(source) as image:
        # Pillow would decode a whole PNG to look for EXIF, which may stand behind the pixels.
        may_be_turned = image.format != "PNG" or png_may_be_turned(image.fp)
        # The four orientations that swap width and height.
        if may_be_turned and image.getexif().get(0x0112) in (5, 6, 7, 8):
            return image.size[::-1]
        return image.size


def png_may_be_turned(file):
    """Whether a chunk of an open PNG may say how it is turned. Reads no pixels."""
    start = file.tell()
    # The chunks follow the 8 bytes of the signature. Each has 4 bytes of checksum at its end.
    file.seek(8)
    found = False
    while not found:
        header = file.read(8)
        if len(header) < 8:
            break
        size, kind = struct.unpack(">I4s", header)
        if kind in (b"iTXt", b"tEXt", b"zTXt"):
            begin = file.read(min(size, 40))
            found = begin.startswith(PNG_TURNS)
            size -= len(begin)
        found = found or kind == b"eXIf"
        file.seek(size + 4, os.SEEK_CUR)
    file.seek(start)
    return found


def picture_uri(image):
    """Pillow image -> JPEG data URI for a page. Shrinks the image in place."""
    image.thumbnail((224, 224))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


# ---- dynamic tiling -----------------------------------------------------------------------------

@functools.lru_cache
def _candidates(min_tiles, max_tiles):
    """All grids (columns, rows) of min_tiles to max_tiles tiles, by their number of tiles.

    Grids of as many tiles come in the order of a Python set of tuples, as in the released code.
    That order decides between grids that fit equally well, so it is part of the format. It depends
    on the order in which they enter the set: by their longer side, from min_tiles on.
    """
    grids = []
    for columns in range(1, max_tiles + 1):
        for rows in range(math.ceil(min_tiles / columns), max_tiles // columns + 1):
            grids.append((columns, rows))
    grids.sort(key=lambda grid: (max(*grid, min_tiles), grid))
    return sorted(set(grids), key=math.prod)


@functools.lru_cache(65536)
def tile_grid(width, height, min_tiles=1, max_tiles=12, tile_size=448, beside=None):
    """The grid (columns, rows) whose aspect ratio is nearest to the picture's.

    On an exact tie a later, larger grid wins if the picture has more than half of its pixels
    (find_closest_aspect_ratio in InternVL). beside: a grid; none whose lines are all among its
    lines is taken.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles={min_tiles} and max_tiles={max_tiles}: "
                         "need 1 <= min_tiles <= max_tiles")
    aspect = width / height
    best = (1, 1)
    best_gap = math.inf
    for columns, rows in _candidates(min_tiles, max_tiles):
        if beside and beside[0] % columns == 0 and beside[1] % rows == 0:
            continue
        gap = abs(aspect - columns / rows)
        large = width * height > 0.5 * tile_size ** 2 * columns * rows
        if gap < best_gap or (gap == best_gap and large):
            best = (columns, rows)
            best_gap = gap
    return best


def with_thumbnail(n_grid, thumbnail):
    """Tiles of a picture whose grid has n_grid: one more where a thumbnail of it follows.

    A single tile is the whole picture already, so only larger grids get one.
    """
    return n_grid + 1 if thumbnail and n_grid > 1 else n_grid


def without_thumbnail(n_tiles, thumbnail):
    """Tiles in the grid of a picture that has n_tiles, the inverse of with_thumbnail."""
    return n_tiles - 1 if thumbnail and n_tiles > 1 else n_tiles


@functools.lru_cache(65536)
def count_tiles(width, height, min_tiles=1, max_tiles=12, tile_size=448, thumbnail=True):
    """How many tiles make_tiles gives for a picture of this size, thumbnail included."""
    n_grid = math.prod(tile_grid(width, height, min_tiles, max_tiles, tile_size))
    return with_thumbnail(n_grid, thumbnail)


def resize(image, width, height):
    """Pillow RGB image -> uint8 (3, height, width), bicubic, each value within 1 of Pillow's.

    Pillow makes a pass over the columns, then one over the rows, and rounds in between. PyTorch's
    passes are up to four times as fast, but each may round differently, by 1. The second pass
    carries a difference of the first on in full, unless it shrinks by half. So Pillow makes the
    first pass where that matters. It makes both where it begins with the rows, as it does from
    release 13 on if the height shrinks by more than twice as much as the width (Resample.c).
    """
    w, h = image.size
    if h - height > max(0, 2 * (w - width)):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    elif h < 2 * height:
        image = image.resize((width, h), Image.Resampling.BICUBIC)
    # The pixels stay in Pillow's order, channels last: PyTorch has fast code for it.
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    if image.size != (width, height):
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return pixels[0]


def make_tiles(image, min_tiles=1, max_tiles=12, tile_size=448, thumbnail=True, out=None):
    """Pillow RGB image -> uint8 (N, 3, s, s), written to `out` if that is given.

    The whole picture is resized to its grid and cut row by row. If that gives more than one tile,
    the whole picture comes once more, as a thumbnail, last.
    """
    s = tile_size
    columns, rows = tile_grid(*image.size, min_tiles, max_tiles, s)
    n_grid = columns * rows
    tiles = out
    if tiles is None:
        tiles = torch.empty(with_thumbnail(n_grid, thumbnail), 3, s, s, dtype=torch.uint8)
    pixels = resize(image, s * columns, s * rows).view(3, rows, s, columns, s)
    grid = tiles[:n_grid].view(rows, columns, 3, s, s)
    grid.copy_(pixels.permute(1, 3, 0, 2, 4))
    if len(tiles) > n_grid:
        tiles[n_grid] = resize(image, s, s)
    return tiles


def normalize(tiles, dtype=torch.float32):
    """uint8 (N, 3, s, s) -> (tiles / 255 - mean) / std in `dtype`.

    Computed in fp32 on the tiles' device, in place on one copy of them.
    """
    mean, std = colour_statistics(tiles.device)
    return tiles.float().sub_(mean).div_(std).to(dtype)


# Copied to a device once: the GPU's queue would be waited for at each copy.
@functools.lru_cache
@torch.inference_mode(False)
def colour_statistics(device):
    """MEAN and STD of pixels from 0 to 255, each (3, 1, 1) on `device`."""
    mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = 255 * torch.tensor(STD, device=device).view(3, 1, 1)
    return mean, std
