import base64
import functools
import io
import math
import numpy as np
import struct
import torch
import torch.nn.functional as F
import warnings
from PIL import ImageOps
from PIL import UnidentifiedImageError



IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

from PIL import Image

warnings.filterwarnings("ignore", "The given NumPy array is not writable")   # resize only reads it
np.empty(2 ** 25 - 2 ** 16, np.uint8)   # gone at once; once 32 MB were freed, glibc keeps what is freed, which it else
                                        # gives back: the pages of every picture would be new

# ---- image files -----------------------------------------------------------------------------------------------------
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")             # nothing else is even tried; Pillow opens MPO as JPEG
MAX_PIXELS = 64_000_000                                     # a larger picture is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None                               # Pillow's own limit is looser and would only add a warning
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)   # Pillow's ways
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet, as in InternVL

def _read(source, read):
    """Open bytes or a path, -> read(image), which decodes the pixels or not. Every error names the picture."""
    name, file = source, source
    if isinstance(source, bytes):
        name, file = f"image of {len(source)} bytes", io.BytesIO(source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height <= MAX_PIXELS: return read(image)
        problem = f"{image.width}x{image.height} is more than {MAX_PIXELS / 1e6:.0f} megapixels; shrink it first"
    except UnidentifiedImageError:
        problem = f"not a picture in one of the formats {', '.join(FORMATS)}"
    except DAMAGE as e:
        if getattr(e, "errno", None):                       # no such file, no permission
            raise
        problem = f"damaged picture ({e})"
    raise ValueError(f"{name}: {problem}")

def upright(image):
    """Decode, and turn as EXIF says; in place, for a copy takes as long as a tenth of decoding."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image

def load_image(source):
    """bytes, str or Path -> PIL image in RGB, upright (EXIF), alpha on white, the first frame of an animation.
    Raises ValueError (format, size, damage) or OSError (no such file)."""
    image = _read(source, upright)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):   # 16-bit grey: keep the upper byte
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")

def image_size(source):
    """(width, height) in pixels as load_image would give them, from the header only. Raises like load_image."""
    def size(image):
        known = image.format != "PNG" or "exif" in image.info               # Pillow decodes a PNG to look for more
        turned = known and image.getexif().get(0x0112) in (5, 6, 7, 8)      # orientations that swap width and height
        return image.size[::-1] if turned else image.size
    return _read(source, size)

def picture_uri(image):
    """A Pillow image, which is made small in place, as a JPEG data URI for a page."""
    image.thumbnail((224, 224))
    image.save(file := io.BytesIO(), "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

# ---- dynamic tiling --------------------------------------------------------------------------------------------------
@functools.lru_cache
def _candidates(min_tiles, max_tiles):
    """All grids (columns, rows) of min..max tiles. Equal areas come in the order of a Python set of tuples, as in the
    released code: that order decides between grids equally good, so it is part of the format."""
    grids = {(i, j) for n in range(min_tiles, max_tiles + 1) for i in range(1, n + 1) for j in range(1, n + 1)
             if min_tiles <= i * j <= max_tiles}
    return sorted(grids, key=math.prod)

@functools.lru_cache(65536)
def tile_grid(width, height, min_tiles=1, max_tiles=12, tile_size=448):
    """The grid (columns, rows) whose aspect ratio is nearest to the image's. On an exact tie a later, larger grid is
    taken if the image has more than half its pixels. (find_closest_aspect_ratio in InternVL.)"""
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"min_tiles={min_tiles} and max_tiles={max_tiles}: need 1 <= min_tiles <= max_tiles")
    aspect, best, best_gap = width / height, (1, 1), math.inf
    for columns, rows in _candidates(min_tiles, max_tiles):
        gap = abs(aspect - columns / rows)
        if gap < best_gap or (gap == best_gap and width * height > 0.5 * tile_size ** 2 * columns * rows):
            best, best_gap = (columns, rows), gap
    return best

@functools.lru_cache(65536)
def count_tiles(width, height, min_tiles=1, max_tiles=12, tile_size=448, thumbnail=True):
    """How many tiles make_tiles gives for an image of this size, thumbnail included."""
    n = math.prod(tile_grid(width, height, min_tiles, max_tiles, tile_size))
    return n + (thumbnail and n > 1)

def resize(image, width, height):
    """PIL RGB image -> uint8 (3, height, width), bicubic, each value at most 1 from what Pillow's resize gives.
    Pillow makes a pass over the columns, then one over the rows, and rounds in between. PyTorch's passes are up to four
    times as fast; each may round otherwise, by 1, and the second carries that on whole unless it shrinks by half. So
    Pillow makes the first pass, where it must; and both where it begins with the rows: from release 13 on, if height
    loses more than twice as much as width (Resample.c)."""
    w, h = image.size
    if h - height > max(0, 2 * (w - width)):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    elif h < 2 * height:
        image = image.resize((width, h), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image))[None].permute(0, 3, 1, 2)  # channels last, and PyTorch sees it: the
    if image.size != (width, height):                                       # fast code
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return pixels[0]

def make_tiles(image, min_tiles=1, max_tiles=12, tile_size=448, thumbnail=True, out=None):
    """PIL RGB image -> uint8 (N, 3, s, s): the whole image resized (bicubic) to the grid and cut row by row, then,
    if there is more than one tile, the whole image again as a thumbnail. out: where to write them, if not anew."""
    s, (columns, rows) = tile_size, tile_grid(*image.size, min_tiles, max_tiles, tile_size)
    n = rows * columns
    tiles = torch.empty(n + (thumbnail and n > 1), 3, s, s, dtype=torch.uint8) if out is None else out
    pixels = resize(image, s * columns, s * rows).view(3, rows, s, columns, s)
    tiles[:n].view(rows, columns, 3, s, s).copy_(pixels.permute(1, 3, 0, 2, 4))
    if len(tiles) > n: tiles[n] = resize(image, s, s)
    return tiles

GRAY = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)      # the mean colour: what a blind model sees

def normalize(tiles, dtype=torch.float32):
    """uint8 (N, 3, s, s) -> (tiles / 255 - mean) / std in `dtype`, on the tiles' device, computed in fp32."""
    mean, std = (255 * torch.tensor(x, device=tiles.device).view(3, 1, 1) for x in (MEAN, STD))
    return tiles.float().sub_(mean).div_(std).to(dtype)
