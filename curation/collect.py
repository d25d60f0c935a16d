"""Stage collect: any source -> shards of pictures that decode, each file once, with alt-text."""
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from curation.rows import find_alt_text
from curation.shards import ShardRecord, find_input_shards, in_blocks, read_records
from curation.stages import run_stage, shard_is_finished
from inputs.images import load_image

BLOCK_RECORDS = 16  # records in memory for each thread that decodes
# What is read of a source's row; all else may be of any kind.
SOURCE_FIELDS = ("id", "alt_text", "first_text")
# Keys of a source's row that a collected row holds in another form, or not at all.
REPLACED_KEYS = ("id", "alt_text", "caption", "text", "image", "sha256")


def collect_pictures(cfg):
    """Collect every picture that decodes and is large enough, once.

    Which files were collected before is kept in memory: about 100 bytes for each.
    """
    out = Path(cfg.out)
    known_files = load_known_files(cfg, out)

    def process(shard, counts):
        new_files = set()  # not known to other shards before this one is whole
        for record in examine_in_threads(cfg, shard):
            if not record.reason:
                key = int(record.row["sha256"][:16], 16)
                if key in new_files or key in known_files:
                    record = record._replace(reason="same_file")
                else:
                    new_files.add(key)
            yield record
        np.save(out / ".shards" / f"{shard.name}.npy", np.array([*new_files], np.uint64))
        known_files.update(new_files)

    run_stage(cfg, "collect", process, alone=True, min_side=cfg.min_side,
              max_aspect=cfg.max_aspect, rows=cfg.shard_size)


def load_known_files(cfg, out):
    """Keys of the files in the finished shards of a folder, a set of int.

    The files of shards that will be made again are left out, or they would be dropped as copies of
    themselves.
    """
    to_make = {shard.name for shard in find_input_shards(cfg) if not shard_is_finished(out, shard)}
    known_files = set()
    for path in (out / ".shards").glob("*.npy"):
        if path.stem not in to_make and (out / f"{path.stem}.tar").exists():
            known_files.update(np.load(path).tolist())
    return known_files


def examine_in_threads(cfg, shard):
    """Yield the examined records of a shard, in order."""
    with ThreadPoolExecutor(cfg.workers) as pool:
        for block in in_blocks(read_records(shard, SOURCE_FIELDS), BLOCK_RECORDS * cfg.workers):
            yield from pool.map(functools.partial(examine, cfg, shard), block)


def examine(cfg, shard, record):
    """Decode a record's picture -> the record of the new shard, with a reason if it is dropped."""
    if record.reason:
        return record
    if len(record.pictures) != 1:
        reason = "several_pictures" if record.pictures else "no_picture"
        return record._replace(reason=reason)
    content = next(iter(record.pictures.values()))
    try:
        image = load_image(content)
    except (ValueError, OSError):
        return record._replace(reason="unreadable_picture")

    reason = None
    if min(image.size) < cfg.min_side:
        reason = "too_small"
    elif max(image.size) > cfg.max_aspect * min(image.size):
        reason = "too_narrow"
    row = collected_row(shard, record.row, content, image)
    return ShardRecord(row, record.pictures, reason)


def collected_row(shard, row, content, image):
    """The row of a collected picture: where it is from, its text, its size and its hashes."""
    text = find_alt_text(row)
    sha256 = hashlib.sha256(content).hexdigest()
    dhash, tone = perceptual_hash(image)
    rest = {}
    for key, value in row.items():
        if isinstance(value, (str, int, float)) and key not in REPLACED_KEYS:
            rest[key] = value
    return {
        "id": sha256[:20],
        "source": shard.origin,
        "source_id": row["id"],
        "alt_text": text,
        "caption": text,
        "width": image.width,
        "height": image.height,
        "sha256": sha256,
        "dhash": dhash,
        "tone": tone,
        "origin": rest,
    }


def perceptual_hash(image):
    """PIL image -> (64-bit difference hash, mean colours of a 4x4 grid), both in hexadecimal.

    A bit of the hash says whether the right neighbour of a pixel is lighter by more than 2 levels
    in a grey 9x8 copy. Because of the 2 levels, noise in flat areas sets no bit.
    """
    small = image.resize((9, 8), Image.Resampling.BOX).convert("L")
    gray = np.asarray(small, np.int16)  # (8, 9)
    bits = np.packbits(gray[:, 1:] - gray[:, :-1] > 2)
    tone = np.asarray(image.resize((4, 4), Image.Resampling.BOX))  # (4, 4, 3)
    return bits.tobytes().hex(), tone.tobytes().hex()
