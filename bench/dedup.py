"""dedup: edited pictures that are found, pictures that are wrongly merged, beside hashes of others.

Each folder in --pictures is a kind of picture. All edits of all pictures lie in one heap with the
originals. An edit counts as found if it is merged with its original. Every picture is compared with
the originals; a merge with another one's original is wrong.
"""
import collections
import hashlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from curation.compare import PAIRS_AT_ONCE
from curation.look import LOOK, hash_of, look_of
from curation.overlay import compare_looks, margin_of
from curation.pairs import picture_pairs
from curation.ranks import Ranks
from inputs.images import IMAGE_SUFFIXES, load_image

FOUND = 0.9  # the default of --found
DISTANCE = 20  # the default of --distance
MOST_PICTURES = 120  # of a kind that are edited; the others lie in the heap unedited
N_PAGES = 47


# ---- pictures ------------------------------------------------------------------------------------


def read_kinds(folder):
    """Yield (kind, image) of all pictures in the sub-folders of a folder, and of white pages.

    Of equal files the first.
    """
    seen = set()
    for kind in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        for path in sorted(kind.rglob("*")):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            content = path.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            if sha256 not in seen:
                seen.add(sha256)
                yield kind.name, load_image(content)
    for k in range(N_PAGES):
        yield "white pages", white_page(k)


def white_page(k):
    """A page with two lines of text, like no other."""
    page = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(page)
    draw.text((40, 60), f"invoice {k * 37} total", fill="black", font_size=28)
    draw.text((40, 120), f"No. {k * 7919}", fill="black", font_size=28)
    return page


def half_size(image):
    size = (max(1, image.width // 2), max(1, image.height // 2))
    return image.resize(size, Image.Resampling.LANCZOS)


def jpeg_30(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return load_image(file.getvalue())


def crop(image):
    """Without 2 % on each side."""
    x = max(1, round(image.width * 0.02))
    y = max(1, round(image.height * 0.02))
    return image.crop((x, y, image.width - x, image.height - y))


def crop_corner(image):
    """Without 2 % at the left and at the top."""
    x = max(1, round(image.width * 0.02))
    y = max(1, round(image.height * 0.02))
    return image.crop((x, y, image.width, image.height))


def watermark(image, place="middle", color=(255, 255, 255)):
    """With half transparent text over it, as wide as half the picture, or small in a corner."""
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    size = max(10, round(image.width * (0.1 if place == "middle" else 0.05)))
    _, _, width, height = draw.textbbox((0, 0), "example.com", font_size=size)
    x = (image.width - width) // 2 if place == "middle" else image.width - width - size
    y = (image.height - height) // 2 if place == "middle" else image.height - height - size
    draw.text((x, y), "example.com", fill=(*color, 100), font_size=size)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def caption_bar(image):
    """With a white bar of a tenth of its height below it, and text in the bar."""
    height = image.height // 10
    canvas = Image.new("RGB", (image.width, image.height + height), "white")
    canvas.paste(image)
    place = (image.width // 20, image.height + height // 5)
    size = max(8, height // 2)
    ImageDraw.Draw(canvas).text(place, "a caption", fill="black", font_size=size)
    return canvas


EDITS = {
    "half size": half_size,
    "jpeg 30": jpeg_30,
    "crop 2 %": crop,
    "crop 2 % of a corner": crop_corner,
    "brightness +10 %": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "watermark": watermark,
    "watermark in a corner": lambda image: watermark(image, "corner"),
    "dark watermark": lambda image: watermark(image, color=(90, 90, 90)),
    "caption bar": caption_bar,
    "gray": lambda image: image.convert("L").convert("RGB"),
    "contrast +20 %": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    # These are other pictures.
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
}
OTHER_PICTURES = ("mirrored", "turned", "upside down")


def other_hashes():
    """{name: (function from an image to a hash of bits, most bits that differ)} of what is here.

    The distances are those that imagededup and PDQ's authors name.
    """
    found = {}
    try:
        phash = importlib.import_module("imagehash").phash
        found["pHash of imagehash"] = (lambda image: phash(image).hash.ravel(), 10)
    except ImportError:
        print("not beside pHash: pip install imagehash")
    try:
        pdq = importlib.import_module("pdqhash").compute
        found["PDQ of pdqhash"] = (lambda image: pdq(np.asarray(image))[0], 31)
    except ImportError:
        print("not beside PDQ: pip install pdqhash")
    return found


def make_heap(folder, others):
    """All pictures with their edits -> [(kind, edit, original)], LOOK (n,), {name: hashes (n, w)}.

    original: what two pictures of one origin have in common. A mirrored picture has another.
    """
    names = []
    looks = []
    hashes = {name: [] for name in others}
    seen = collections.Counter()
    for number, (kind, image) in enumerate(read_kinds(folder)):
        seen[kind] += 1
        edits = {"original": lambda image: image}
        if seen[kind] <= MOST_PICTURES:
            edits |= EDITS
        for edit, make in edits.items():
            edited = make(image)
            origin = f"{number} {edit}" if edit in OTHER_PICTURES else str(number)
            names.append((kind, edit, origin))
            looks.append(look_of(edited))
            for name, (compute, _) in others.items():
                hashes[name].append(np.packbits(compute(edited).astype(bool)))
    words = {name: np.array(rows).view("u8") for name, rows in hashes.items()}
    return names, np.array(looks, LOOK), words


# ---- merges --------------------------------------------------------------------------------------


def our_merges(names, looks):
    """Pairs (p, 2) of an original and another picture that dedup takes for near-duplicates."""
    hashes = []
    unsure = []
    for part in np.array_split(looks, 64):
        found = hash_of(part["gray"])
        hashes.append(found[0])
        unsure.append(found[1])
    hashes = np.concatenate(hashes)
    unsure = np.concatenate(unsure)
    pairs = picture_pairs(Ranks(), np.arange(len(looks)), hashes, unsure, DISTANCE)
    pairs = pairs[with_original(names, pairs)]
    margins = [np.zeros(0)]
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        first, second = pairs[start : start + PAIRS_AT_ONCE].T
        margins.append(margin_of(compare_looks(looks[first], looks[second]), FOUND))
    return pairs[np.concatenate(margins) >= 0]


def with_original(names, pairs):
    """Which of the pairs (p, 2) hold an original."""
    is_original = np.array([edit == "original" for _, edit, _ in names])
    return is_original[pairs].any(1)


def hash_merges(names, hashes, distance):
    """Pairs (p, 2) with an original whose hashes (n, words) differ in at most `distance` bits."""
    found = []
    for k in range(len(hashes) - 1):
        differ = np.bitwise_count(hashes[k] ^ hashes[k + 1 :]).sum(1)
        near = np.flatnonzero(differ <= distance)
        found += [(k, k + 1 + int(other)) for other in near]
    found = np.array(found).reshape(-1, 2)
    return found[with_original(names, found)]


def score_merges(names, merges):
    """{(kind, edit): share that is found}, share of the merges that are right, Counter of others.
    """
    merged = {tuple(pair) for pair in merges.tolist()}
    original = {}
    for number, (_, edit, origin) in enumerate(names):
        if edit == "original":
            original[origin] = number
    found = collections.defaultdict(list)
    for number, (kind, edit, origin) in enumerate(names):
        if edit != "original" and edit not in OTHER_PICTURES:
            found[kind, edit].append((original[origin], number) in merged)
    right = [names[a][2] == names[b][2] for a, b in merges.tolist()]
    wrong = collections.Counter()
    for (a, b), good in zip(merges.tolist(), right, strict=True):
        if not good:
            wrong[" with ".join(sorted({names[a][0], names[b][0]}))] += 1
    return {key: np.mean(hits) for key, hits in found.items()}, np.mean(right), wrong


def merge_rows(cfg, device, row):
    """Recall of each edit and kind, precision of all merges, pictures and pairs a second."""
    if not cfg.pictures:
        print(f"{row}: not run; give --pictures=FOLDER, with a folder of pictures for each kind")
        return
    others = other_hashes()
    names, looks, hashes = make_heap(cfg.pictures, others)
    recall, precision, wrong = score_merges(names, our_merges(names, looks))
    print(f"{len(names)} pictures; merged wrongly: {dict(wrong) or 'none'}")
    for (kind, edit), share in recall.items():
        yield percent_row(f"{kind}, {edit}", share)
    if not others:
        yield from summary_rows(names, recall, precision)
    for name, (_, distance) in others.items():
        peer = score_merges(names, hash_merges(names, hashes[name], distance))[:2]
        yield from summary_rows(names, recall, precision, name, *peer)


def summary_rows(names, recall, precision, peer="", peer_recall=None, peer_precision=None):
    """Recall of each edit over all kinds and the precision, beside another hash if there is one."""
    for edit in EDITS:
        keys = [key for key in recall if key[1] == edit]
        if keys:
            counts = [sum(name[:2] == key for name in names) for key in keys]
            ours = np.average([recall[key] for key in keys], weights=counts)
            theirs = None
            if peer:
                theirs = np.average([peer_recall[key] for key in keys], weights=counts)
            yield percent_row(f"all, {edit}", ours, peer, theirs)
    yield percent_row("precision of merges", precision, peer, peer_precision)


def percent_row(row, ours, peer="", theirs=None):
    result = {"row": row, "value": 100 * float(ours), "unit": "%"}
    if theirs is not None:
        result |= {"peer": peer, "peer_value": 100 * float(theirs)}
        result["ratio"] = float(ours / theirs) if theirs else float("inf")
    return result


# ---- speed ---------------------------------------------------------------------------------------


def speed_rows(cfg, device, row):
    """Looks and comparisons of one core, on pictures of noise."""
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (64, 30, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(part).resize((640, 480), Image.Resampling.BICUBIC) for part in pixels]
    start = time.perf_counter()
    looks = np.array([look_of(image) for image in images], LOOK)
    hash_of(looks["gray"])
    yield {"row": f"{row}_looks", "value": 64 / (time.perf_counter() - start), "unit": "pictures/s"}
    start = time.perf_counter()
    compare_looks(looks[:32], looks[32:])
    yield {"row": f"{row}_pairs", "value": 32 / (time.perf_counter() - start), "unit": "pairs/s"}


def many_hash_rows(cfg, device, row):
    """--hashes hashes, a tenth of them copies with turned bits, on 1, 2 and 4 ranks."""
    if not cfg.hashes:
        print(f"{row}: not run; give --hashes=10e6")
        return
    alone = None
    for n_ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc_per_node={n_ranks}", "-m", "bench.many_hashes", str(cfg.hashes),
                       f"{folder}/result.json"]
            subprocess.run(command, check=True)
            result = json.loads(Path(folder, "result.json").read_text())
        alone = alone or result
        assert result["clusters"] == alone["clusters"], "other clusters than on one rank"
        yield {"row": f"{row}_{n_ranks}_ranks", "value": result["seconds"], "unit": "s"}
        # The same where other work runs beside, but for the caches.
        yield {"row": f"{row}_{n_ranks}_ranks_cpu", "value": result["cpu_seconds"],
               "unit": "CPU s of the busiest rank"}
        yield {"row": f"{row}_{n_ranks}_ranks_memory", "value": result["gigabytes"],
               "unit": "GB a rank at most"}


def dedup_rows(cfg, device, row):
    """The rows of one part: edits, speed or hashes."""
    parts = {"edits": merge_rows, "speed": speed_rows, "hashes": many_hash_rows}
    yield from parts[row](cfg, device, row)
