"""inputs/images.py: image files and dynamic tiling."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from inputs import images
from inputs.images import (
    MEAN,
    STD,
    count_tiles,
    image_size,
    load_image,
    make_tiles,
    normalize,
    tile_grid,
)

torch.set_num_threads(1)
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"  # optional test data


def encode(image, format, **kw):
    buffer = io.BytesIO()
    image.save(buffer, format, **kw)
    return buffer.getvalue()


def gradient(w=64, h=48):
    x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


# ---- image files ----


@pytest.mark.parametrize(
    "format, kw",
    [
        ("PNG", {}),
        ("BMP", {}),
        ("GIF", {}),
        ("WEBP", dict(lossless=True)),
        ("JPEG", dict(quality=98, subsampling=0)),
        ("MPO", dict(quality=98, subsampling=0)),
    ],
)
def test_common_formats_come_out_as_the_same_rgb_picture(format, kw, tmp_path):
    (tmp_path / "a").write_bytes(encode(gradient(), format, **kw))
    image = load_image(tmp_path / "a")
    assert image.mode == "RGB" and image.size == (64, 48) == image_size(str(tmp_path / "a"))
    assert np.abs(np.asarray(image, int) - np.asarray(gradient(), int)).max() <= (
        40 if format == "GIF" else 8
    )


def test_unusual_modes_keep_their_look():
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64)
    cases = {
        "L": Image.fromarray(grey.astype(np.uint8)),
        "1": gradient().convert("1"),
        "P": gradient().quantize(64),
        "I;16": Image.fromarray((grey * 257).astype(np.uint16)),
        "LA": gradient().convert("LA"),
    }
    for mode, image in cases.items():
        got = np.asarray(load_image(encode(image, "PNG")), int)
        want = (
            np.repeat(grey[..., None], 3, -1)
            if mode in ("L", "I;16")
            else np.asarray(image.convert("RGB"), int)
        )
        assert got.shape == (48, 64, 3) and np.abs(got - want).max() <= 1, mode
    got = np.asarray(load_image(encode(gradient().convert("CMYK"), "JPEG", quality=98)), int)
    assert np.abs(got - np.asarray(gradient(), int)).mean() < 3


def test_transparency_is_shown_on_white():
    image = gradient().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert np.asarray(load_image(encode(image, "PNG"))).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    for source in (encode(palette, "PNG", transparency=0), encode(palette, "GIF", transparency=0)):
        assert np.asarray(load_image(source)).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_picture_and_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encode(gradient(), "JPEG", exif=exif)
    assert (
        load_image(source).size
        == image_size(source)
        == ((48, 64) if orientation >= 5 else (64, 48))
    )


def png_turned(how):
    """A PNG of 40 x 20 that says, in one of the ways there are, that it stands on its side."""
    xmp = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    if how == "xmp":
        info.add_itxt("XML:com.adobe.xmp", xmp)
    elif how == "raw profile":
        content = exif.tobytes()
        info.add_text("Raw profile type exif", f"\nexif\n{len(content):8}\n{content.hex()}\n", True)
    content = encode(gradient(40, 20), "PNG", pnginfo=info)
    late = {
        "late exif": (b"eXIf", exif.tobytes()[6:]),
        "late xmp": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode()),
        "late date": (b"tEXt", b"date:create\x002024-01-01"),
    }
    if how in late:
        kind, value = late[how]
        chunk = struct.pack(">I", len(value)) + kind + value
        chunk += struct.pack(">I", zlib.crc32(kind + value))
        content = content[:-12] + chunk + content[-12:]
    return content


@pytest.mark.parametrize(
    "how", ["xmp", "raw profile", "late exif", "late xmp", "late date", "plain"]
)
def test_the_size_of_a_png_is_the_one_it_has_when_it_is_decoded_however_it_is_turned(how):
    content = png_turned(how)
    turned = how not in ("late date", "plain")
    assert image_size(content) == ((20, 40) if turned else (40, 20))
    assert load_image(content).size == image_size(content)


def test_a_png_that_says_nothing_of_its_orientation_is_not_decoded_to_know_its_size(monkeypatch):
    content = png_turned("late date")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)
    assert image_size(content) == (40, 20)


@pytest.mark.parametrize("kind", [ZeroDivisionError, OverflowError, AttributeError, RuntimeError])
def test_whatever_a_decoder_raises_the_picture_is_damaged_and_no_more(monkeypatch, kind):
    def broken(self):
        raise kind("odd")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    with pytest.raises(ValueError, match="damaged picture"):
        load_image(png_turned("plain"))


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    assert load_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel(
        (0, 0)
    ) == (255, 0, 0)


def test_what_is_no_picture_is_refused_in_words(monkeypatch):
    png = encode(gradient(), "PNG")
    for source, words in (
        (b"", "not a picture"),
        (b"hello" * 99, "not a picture"),
        (png[: len(png) // 2], "damaged"),
        (encode(gradient(), "TIFF"), "not a picture"),
        (encode(gradient(), "JPEG")[:400], "damaged"),
    ):
        with pytest.raises(ValueError, match=words):
            load_image(source)
    with pytest.raises(OSError, match="nowhere.png"):
        load_image("nowhere.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match="64x48 is more than 0 megapixels"):
            read(png)


def test_a_header_that_claims_a_huge_picture_is_refused_before_decoding():
    bomb = bytearray(encode(gradient(), "PNG"))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match="more than 64 megapixels"):
            read(bytes(bomb))


# ---- tiling ----

LISTED_12 = (
    "11 12 21 31 13 22 41 14 51 15 16 61 32 23 71 17 42 24 18 81 19 33 91 25 52 10,1 1,10 "
    "11,1 1,11 12,1 34 43 1,12 62 26"
)
LISTED_6 = "11 12 21 31 13 41 14 22 15 51 61 23 16 32"


def test_candidate_grids_come_in_the_released_order():
    def parse(text):
        return [
            tuple(map(int, x.split(","))) if "," in x else (int(x[0]), int(x[1]))
            for x in text.split()
        ]

    assert images._candidates(1, 12) == parse(LISTED_12) and images._candidates(1, 6) == parse(
        LISTED_6
    )
    assert images._candidates(1, 10) == parse(LISTED_12)[:27]


@pytest.mark.parametrize(
    "size, grids",
    [
        ((448, 448), "11 11 11 11"),
        ((300, 300), "11 11 11 11"),
        ((640, 480), "32 32 43 43"),
        ((1280, 720), "21 42 42 53"),
        ((1920, 1080), "21 42 42 53"),
        ((900, 900), "22 22 22 22"),
        ((1000, 1500), "23 23 23 23"),
        ((500, 400), "11 11 43 54"),
        ((2480, 3508), "23 23 23 46"),
        ((4000, 1000), "41 41 41 82"),
    ],
)
def test_grids_of_the_released_code(size, grids):
    for grid, most in zip(grids.split(), (6, 10, 12, 24), strict=True):
        assert tile_grid(*size, 1, most, 448) == (int(grid[0]), int(grid[1]))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (333, 777), (1000, 700)])
@pytest.mark.parametrize(
    "least, most, thumbnail", [(1, 12, True), (1, 6, False), (2, 6, True), (1, 1, True)]
)
@pytest.mark.parametrize("pattern", ["gradient", "noise"])
def test_tiles_are_the_resized_picture_cut_row_by_row_with_the_thumbnail_last(
    size, least, most, thumbnail, pattern
):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = gradient(*size) if pattern == "gradient" else Image.fromarray(noise)
    s = 28
    tiles = make_tiles(image, least, most, s, thumbnail)
    columns, rows = tile_grid(*size, least, most, s)
    resized = image.resize((s * columns, s * rows))  # Pillow's default filter, as the released code
    boxes = [(x * s, y * s, x * s + s, y * s + s) for y in range(rows) for x in range(columns)]
    want = [resized.crop(box) for box in boxes]
    if thumbnail and len(boxes) > 1:
        want.append(image.resize((s, s)))
    assert tiles.dtype == torch.uint8
    assert len(tiles) == len(want) == count_tiles(*size, least, most, s, thumbnail)
    assert least <= columns * rows <= most and tiles.is_contiguous()
    for tile, crop in zip(tiles, want, strict=True):
        off = np.abs(tile.permute(1, 2, 0).numpy().astype(int) - np.asarray(crop))
        assert off.max() <= 1 and off.mean() < 0.2  # PyTorch's last pass may round otherwise


def test_every_value_is_within_1_of_pillows_resize_whatever_the_sizes():
    """Noise, black-and-white noise (the hardest) and photos, by every path of `resize`."""
    rng = np.random.default_rng(3)
    photos = sorted((SHARED / "photos" / "images").glob("*"))[:8]
    pictures = [load_image(path) for path in photos]
    for i in range(60):
        w, h = (int(x) for x in np.exp(rng.uniform(np.log(3), np.log(900), 2)))
        grey = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(grey if i % 2 else (grey > 127) * np.uint8(255)))
    # Pillow 13 begins with the rows of this one.
    pictures.append(Image.fromarray(rng.integers(0, 256, (626, 68, 3), dtype=np.uint8)))
    for image in pictures:
        size = (28, 336)
        if image.width != 68:
            size = tuple(int(x) for x in 112 * rng.integers(1, 5, 2))
        got = images.resize(image, *size).permute(1, 2, 0).numpy()
        want = np.asarray(image.resize(size, Image.BICUBIC))
        assert got.shape == want.shape, (image.size, size)
        assert np.abs(got.astype(int) - want).max() <= 1, (image.size, size)


def test_impossible_tile_limits_are_refused():
    with pytest.raises(ValueError, match="min_tiles=3 and max_tiles=2"):
        tile_grid(10, 10, 3, 2)


def test_normalize_is_imagenet_mean_and_std():
    tiles = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    want = (tiles / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(tiles), want, atol=1e-6, rtol=1e-6)
    assert normalize(tiles, torch.bfloat16).dtype == torch.bfloat16
