"""Vision: image bytes -> tiles -> ViT -> pixel shuffle -> projector.

Shape letters: N tiles (thumbnail included), s tile side in pixels, P patches per tile, C width, H heads, D head dim,
L = 1 + P: the class token and the patches.
Sources: InternVL's modeling_intern_vit.py, modeling_internvl_chat.py and dynamic_preprocess (OpenGVLab/InternVL).
"""
import base64, functools, io, math, struct, warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from kernels.attention import attention

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

# ---- the ViT and the projector ---------------------------------------------------------------------------------------
@dataclass(slots=True)
class VisionConfig:
    image_size: int = 448               # side of a tile in pixels
    patch_size: int = 14                # side of a patch in pixels
    dim: int = 1024                     # width C
    n_layers: int = 24
    n_heads: int = 16
    ffn_dim: int = 4096
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    init_values: float = 1.0            # layer scale of a fresh model (InternVL: initializer_factor)
    downsample: int = 2                 # pixel shuffle: this many patches per side become one visual token
    PRESETS = {"internvit-300m": {}, "toy": dict(image_size=84, dim=192, n_layers=3, n_heads=6, ffn_dim=768)}

    n_patches = property(lambda self: (self.image_size // self.patch_size) ** 2)                # P
    tokens_per_tile = property(lambda self: self.n_patches // self.downsample ** 2)

def working_dtype(x):
    """The dtype matmuls on x run in: autocast's where it is on. Norms hand it out, so that nothing is cast twice."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        """In fp32 whatever comes in, out in the dtype of the matmul that follows."""
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(working_dtype(x))

class VisionEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, cfg.dim))
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + cfg.n_patches, cfg.dim))

    def forward(self, tiles):                                               # (N, 3, s, s)
        x, table = self.patch_embedding(tiles), self.position_embedding     # (N, C, rows, columns), (1, 1 + P, C)
        side, grid = math.isqrt(table.shape[1] - 1), x.shape[2:]
        if grid != (side, side):                             # tiles of another size than it was trained on
            places = table[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)           # (1, C, side, side)
            places = F.interpolate(places, size=grid, mode="bicubic", align_corners=False)
            table = torch.cat([table[:, :1], places.flatten(2).transpose(1, 2).to(table.dtype)], 1)
        first = (self.class_embedding + table[:, :1]).expand(len(x), -1, -1)                    # (N, 1, C)
        return torch.cat([first, x.flatten(2).transpose(1, 2) + table[:, 1:]], 1)               # (N, L, C)

class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(cfg.dim, 3 * cfg.dim, bias=cfg.qkv_bias),
                                       proj=nn.Linear(cfg.dim, cfg.dim)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(cfg.dim, cfg.ffn_dim), fc2=nn.Linear(cfg.ffn_dim, cfg.dim)))
        self.norm1, self.norm2 = LayerNorm(cfg.dim, eps=cfg.norm_eps), LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.ls1, self.ls2 = nn.Parameter(torch.empty(cfg.dim)), nn.Parameter(torch.empty(cfg.dim))

    def forward(self, x, cu_seqlens, drop):                                 # (N, L, C)
        N, L, C = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(N * L, 3, self.n_heads, C // self.n_heads)      # (N*L, 3, H, D)
        seen = attention(*qkv.unbind(1), cu_seqlens, L, causal=False).reshape(N, L, C)
        x = x + drop_path(self.attn.proj(seen) * self.ls1, drop)
        return x + drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) * self.ls2, drop)

def drop_path(x, rate):
    """Stochastic depth (arXiv 1603.09382): drop a tile's residual branch with probability `rate`, scale the others."""
    if rate == 0.0: return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * (keep / (1 - rate)).to(x.dtype)

class ViT(nn.Module):
    """InternViT: class token, learned positions, pre-norm blocks with layer scale, no final norm."""
    def __init__(self, cfg):
        super().__init__()
        if cfg.dim % cfg.n_heads:
            raise ValueError(f"dim {cfg.dim} does not divide by n_heads {cfg.n_heads}")
        if cfg.image_size % (cfg.patch_size * cfg.downsample):
            raise ValueError(f"image_size {cfg.image_size} does not divide by patch_size {cfg.patch_size} x downsample "
                             f"{cfg.downsample}")
        self.embeddings = VisionEmbeddings(cfg)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.n_layers))})
        self.drop_path = 0.0                        # rate of the last block; grows linearly from 0 over the depth

    def forward(self, tiles):
        """Normalised tiles (N, 3, s, s) -> patch vectors (N, P, C) of the last block, without the class token."""
        x = self.embeddings(tiles)
        cu_seqlens = x.shape[1] * torch.arange(len(x) + 1, dtype=torch.int32)
        step = self.drop_path / max(1, len(self.encoder.layers) - 1) if self.training else 0.0
        for i, block in enumerate(self.encoder.layers):
            x = block(x, cu_seqlens, step * i)
        return x[:, 1:]

def pixel_shuffle(x, factor=2):
    """(N, P, C) -> (N, P/f^2, f^2*C): each f x f square of patches becomes one token, channels in the order
    (row offset, column offset, channel). InternVL's ps_version "v2"."""
    N, P, C = x.shape
    side = math.isqrt(P) // factor                              # of the grid of visual tokens
    x = x.reshape(N, side, factor, side, factor, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(N, side * side, factor * factor * C)

class Projector(nn.Sequential):
    """InternVL's mlp1: LayerNorm, Linear, GELU, Linear; (N, P/f^2, f^2*C of the ViT) -> (N, P/f^2, C of the LLM)."""
    def __init__(self, cfg, llm_dim):
        width = cfg.dim * cfg.downsample ** 2
        super().__init__(LayerNorm(width, eps=1e-5), nn.Linear(width, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))
