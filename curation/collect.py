"""Stage collect: any source -> shards of pictures that decode, each file once, with alt-text."""
import functools
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from curation.ranks import on_first_rank, owner_of
from curation.rows import find_alt_text
from curation.shards import DamagedShard, ShardRecord, in_blocks, read_records
from curation.stages import run_stage
from inputs.files import read_json
from inputs.images import load_image

BLOCK_RECORDS = 16  # records in memory for each thread that decodes
# What is read of a source's row; all else may be of any kind.
SOURCE_FIELDS = ("id", "alt_text", "first_text")
# Keys of a source's row that a collected row holds in another form, or not at all.
REPLACED_KEYS = ("id", "alt_text", "caption", "text", "image", "sha256")
# A picture file: where it lies, and whether its shard will be made.
FILE = np.dtype([("key", "u8"), ("shard", "u4"), ("record", "u4"), ("new", "?")])


def collect_pictures(cfg):
    """Collect every picture that decodes and is large enough, once."""
    folder = Path(cfg.out) / ".shards"

    def prepare(ranks, inputs, missing):
        missing += forget_copies(ranks, folder, inputs, missing)
        for shard in ranks.deal(missing):
            np.save(folder / f"{shard.name}.keys.npy", file_keys(shard))
        ranks.gather(None)
        mark_copies(ranks, folder, inputs, {shard.name for shard in missing})
        ranks.gather(None)

    def process(shard, counts):
        is_copy = np.load(folder / f"{shard.name}.copies.npy")
        kept = []
        for k, record in enumerate(examine_in_threads(cfg, shard)):
            if not record.reason and is_copy[k]:
                record = record._replace(reason="same_file")
            if not record.reason:
                kept.append(file_key(record.row["sha256"]))
            yield record
        np.save(folder / f"{shard.name}.npy", np.array(kept, np.uint64))

    run_stage(cfg, "collect", process, prepare, min_side=cfg.min_side,
              max_aspect=cfg.max_aspect, rows=cfg.shard_size)


# ---- each file once ------------------------------------------------------------------------------


def forget_copies(ranks, folder, inputs, missing):
    """The finished shards that hold copies, if an input has changed: they are no longer finished.

    What they are copies of may be gone.
    """

    def forget():
        facts_of = {shard.name: folder / f"{shard.name}.json" for shard in inputs}
        if not any(facts_of[shard.name].exists() for shard in missing):
            return []
        finished = facts_of.keys() - {shard.name for shard in missing}
        forgotten = [name for name in sorted(finished)
                     if read_json(facts_of[name], dict).get("dropped same_file")]
        for name in forgotten:
            facts_of[name].unlink()
        return forgotten

    names = set(ranks.gather(on_first_rank(ranks, forget))[0])
    return [shard for shard in inputs if shard.name in names]


def file_key(sha256):
    """A number that stands for a file."""
    return int(sha256[:16], 16)


def file_keys(shard):
    """The key of the picture of each record of a shard, uint64; 0 where there is not one picture.

    A damaged shard owns no file. It is told of when it is read again.
    """
    keys = []
    try:
        for record in read_records(shard, SOURCE_FIELDS):
            key = 0
            if not record.reason and len(record.pictures) == 1:
                content = next(iter(record.pictures.values()))
                key = file_key(hashlib.sha256(content).hexdigest())
            keys.append(key)
    except DamagedShard:
        keys = [0] * len(keys)
    return np.array(keys, np.uint64)


def mark_copies(ranks, folder, inputs, missing):
    """Write for each missing shard which of its records are copies, NAME.copies.npy (n,) bool.

    A file belongs to the finished shard that has it, else to the first record that has it. missing:
    names of the shards that will be made.
    """
    numbers = ranks.share(range(len(inputs)))
    parts = [np.zeros(0, FILE)]
    for number in numbers:
        name = inputs[number].name
        if name in missing:
            keys = np.load(folder / f"{name}.keys.npy")
            part = np.zeros(len(keys), FILE)
            part["record"] = np.arange(len(keys))
            part["shard"] = number
            part["new"] = True
        else:
            keys = np.load(folder / f"{name}.npy")
            part = np.zeros(len(keys), FILE)
        part["key"] = keys
        parts.append(part[keys != 0])
    files = np.concatenate(parts)
    files, _ = ranks.exchange(files, (files["key"] % np.uint64(ranks.world)).astype(np.int64))

    files = files[np.lexsort((files["record"], files["shard"], files["new"], files["key"]))]
    copies = files[1:][files["key"][1:] == files["key"][:-1]]
    copies = copies[copies["new"]]
    starts = [len(inputs) * rank // ranks.world for rank in range(ranks.world)]
    copies, _ = ranks.exchange(copies, owner_of(starts, copies["shard"]))
    copies = copies[np.argsort(copies["shard"], kind="stable")]
    edges = np.searchsorted(copies["shard"], [*numbers, numbers.stop])
    for number, (start, stop) in zip(numbers, itertools.pairwise(edges), strict=True):
        name = inputs[number].name
        if name in missing:
            is_copy = np.zeros(len(np.load(folder / f"{name}.keys.npy")), bool)
            is_copy[copies["record"][start:stop]] = True
            np.save(folder / f"{name}.copies.npy", is_copy)


# ---- pictures ------------------------------------------------------------------------------------


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
