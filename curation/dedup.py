"""Stage dedup: of each cluster of near-duplicate pictures or captions, the best one stays.

All ranks measure the shards, then find candidates, then compare these, then write the shards.

Shapes: n rows of all shards, of which each rank has a block, m of them.
"""
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from curation.compare import Comparer, keep_best
from curation.embeddings import VectorBlock, embedding_pairs, vit_features
from curation.local_model import load_assistant, model_key
from curation.look import (
    HASH_WORDS,
    HASHED_CROPS,
    KEY_TABLES,
    LOOK,
    UNSURE_BITS,
    has_edges,
    hash_of,
    look_of,
)
from curation.minhash import caption_ngrams, choose_bands, minhash_bands
from curation.pairs import picture_pairs, text_pairs, unique_pairs
from curation.ranks import connected, is_whole_array, owner_of, save_array
from curation.rows import row_caption
from curation.shards import ShardRecord, all_inputs_hash, in_blocks, read_records
from curation.stages import run_stage
from curation.text import caption_words
from inputs import files
from inputs.images import load_image
from training.distributed import own_device

MAX_DISTANCE = 40
NEAR_PAIRS = 60  # pairs nearest to the threshold that are kept for the report
READ_AT_ONCE = 256

COMPARED_FIELDS = ("sha256", "width", "height", "id", "caption")
# What a rank holds of each of its rows. The id of a row that is dropped with a reason is empty.
# seen: whether there is a picture with edges to compare.
DEDUP_ROW = np.dtype([
    ("id", "S20"),
    ("pixels", "i8"),
    ("words", "i4"),
    ("seen", "?"),
    ("hash", "u8", (len(HASHED_CROPS), HASH_WORDS)),
    ("unsure", "u1", (len(HASHED_CROPS), len(KEY_TABLES), UNSURE_BITS)),
])


def drop_near_duplicates(cfg):
    """Of each cluster keep the row with most pixels, then most words, then the first."""
    if cfg.distance > MAX_DISTANCE:
        raise ValueError(f"--distance={cfg.distance} of 128 bits: pictures that have nothing in "
                         f"common; give 0 to {MAX_DISTANCE}")
    if (cfg.by == "embedding") != bool(cfg.model):
        raise ValueError("dedup --by=embedding compares what the ViT of a model sees: give both, "
                         "--by=embedding and --model=FOLDER, or neither")
    folder = Path(cfg.out) / ".shards"
    settings = {"by": cfg.by, "distance": cfg.distance, "found": cfg.found, "jaccard": cfg.jaccard}
    if cfg.model:
        settings |= {"model": model_key(cfg.model), "cosine": cfg.cosine}

    def prepare(ranks, inputs, missing):
        assistant = load_assistant(cfg) if cfg.model else None
        for shard in tqdm(ranks.deal(inputs), desc="measure", unit="shard", disable=None):
            measure_looks(cfg, folder, shard, assistant)
        ranks.gather(None)
        find_dropped(cfg, ranks, folder, inputs)
        ranks.gather(None)

    def process(shard, counts):
        dropped = np.load(folder / f"{shard.name}.dropped.npy")
        verdicts = {int(verdict["row"]): verdict for verdict in dropped}
        for k, record in enumerate(read_records(shard, COMPARED_FIELDS)):
            verdict = verdicts.get(k)
            if record.reason or verdict is None:
                yield record
                continue
            row = {**record.row, "duplicate_of": verdict["kept_id"].decode()}
            for name in ("found", "one_sided", "jaccard", "cosine"):
                if not np.isnan(verdict[name]):
                    row[name] = round(float(verdict[name]), 3)
            yield ShardRecord(row, record.pictures, "near_duplicate")

    run_stage(cfg, "dedup", process, prepare, inputs=all_inputs_hash(cfg), **settings)


# ---- measure -------------------------------------------------------------------------------------


def measure_looks(cfg, folder, shard, assistant):
    """Write what is compared of the rows of a shard. A killed stage goes on with the next one."""
    path = folder / f"{shard.name}.rows.npy"
    if is_whole_array(path):
        return
    rows = [np.zeros(0, DEDUP_ROW)]
    looks = [np.zeros(0, LOOK)]
    ngrams = []
    reasons = set()
    sees = cfg.by in ("image", "both")
    reads = cfg.by in ("text", "both")
    with ThreadPoolExecutor(cfg.workers) as pool:
        for block in in_blocks(read_records(shard, COMPARED_FIELDS, sees), READ_AT_ONCE):
            reasons |= {record.reason for record in block}
            part = np.array([row_facts(record) for record in block], DEDUP_ROW)
            if sees:
                seen = np.array(list(pool.map(see_record, block)), LOOK)
                part["hash"], part["unsure"] = hash_of(seen["gray"])
                part["seen"] = has_edges(seen["gray"]) & (part["id"] != b"")
                looks.append(seen)
            if reads:
                ngrams += [record_ngrams(record) for record in block]
            rows.append(part)
    if "no_sha256" in reasons and None not in reasons:
        raise ValueError(f"{shard.path} has no sha256: run `curate.py collect` first")

    table = np.concatenate(rows)
    if sees:
        save_array(folder / f"{shard.name}.looks.npy", np.concatenate(looks))
    if reads:
        save_ngrams(cfg, folder, shard, ngrams)
    if assistant:
        features = vit_features(assistant, shard, COMPARED_FIELDS)
        table["seen"] = (table["id"] != b"") & (np.abs(features).sum(1) > 0)  # and not NaN
        save_array(folder / f"{shard.name}.features.npy", features)
    # The last one says that all are there.
    save_array(path, table)


def save_ngrams(cfg, folder, shard, ngrams):
    """Write the keys of the 3-grams of all captions end to end, where each ends, their bands."""
    size, count = choose_bands(cfg.jaccard)
    bands = [minhash_bands(keys, size, count) for keys in ngrams]
    bands = np.array(bands, np.uint64).reshape(-1, count)
    flat = np.concatenate([np.zeros(0, np.uint64), *ngrams])
    save_array(folder / f"{shard.name}.ngrams.npy", flat)
    save_array(folder / f"{shard.name}.ends.npy", np.cumsum([0, *map(len, ngrams)]))
    save_array(folder / f"{shard.name}.bands.npy", bands)


def row_facts(record):
    """What a record puts into DEDUP_ROW, but for its look."""
    if record.reason:
        return np.zeros((), DEDUP_ROW)
    facts = np.zeros((), DEDUP_ROW)
    facts["id"] = record.row["sha256"][:20]
    facts["pixels"] = record.row["width"] * record.row["height"]
    facts["words"] = len(caption_words(row_caption(record.row)))
    return facts


def see_record(record):
    """The LOOK of the first picture of a record; an empty one if none can be read."""
    for content in record.pictures.values():
        try:
            return look_of(load_image(content))
        except (ValueError, OSError):
            break
    return np.zeros((), LOOK)


def record_ngrams(record):
    return caption_ngrams("" if record.reason else row_caption(record.row))


# ---- judge ---------------------------------------------------------------------------------------


def find_dropped(cfg, ranks, folder, inputs):
    """Write for each shard which of its rows are dropped: .dropped.npy, compare.VERDICT.

    All ranks together: candidates by key, those that hang together on one rank, compared there.
    """
    own = ranks.share(inputs)
    tables = [np.load(folder / f"{shard.name}.rows.npy") for shard in own]
    sizes = ranks.gather([len(table) for table in tables])
    starts = np.cumsum([0, *itertools.chain(*sizes)])  # first row of each shard of all
    bounds = np.cumsum([0, *(sum(part) for part in sizes)])
    table = np.concatenate([np.zeros(0, DEDUP_ROW), *tables])
    first_row = bounds[ranks.rank]

    comparer = Comparer(cfg, folder, inputs, starts)
    if cfg.by == "embedding":
        blocks = vector_blocks(folder, own, first_row)
        comparer.centre, pairs = embedding_pairs(ranks, own_device(), blocks, cfg.cosine)
    else:
        pairs = candidate_pairs(cfg, ranks, folder, own, table, first_row)
    cluster = connected(ranks, bounds, pairs[:, 0], pairs[:, 1])
    owner = ranks.fetch(cluster, bounds, pairs[:, 0]) % ranks.world
    pairs, _ = ranks.exchange(pairs, owner)
    pairs = unique_pairs(pairs)
    rows = np.unique(pairs)
    facts = ranks.fetch(table[["id", "pixels", "words"]].copy(), bounds, rows)
    verdicts = keep_best(comparer, rows, facts, pairs)

    verdicts, _ = ranks.exchange(verdicts, owner_of(bounds, verdicts["row"]))
    verdicts = verdicts[np.argsort(verdicts["row"])]
    start = first_row
    for shard, part in zip(own, tables, strict=True):
        first, stop = np.searchsorted(verdicts["row"], [start, start + len(part)])
        mine = verdicts[first:stop].copy()
        mine["row"] -= start
        save_array(folder / f"{shard.name}.dropped.npy", mine)
        start += len(part)
    write_near_pairs(cfg, ranks, comparer)


def write_near_pairs(cfg, ranks, comparer):
    """Write the pairs of all ranks that are nearest to the threshold, for the report."""
    near = sum(ranks.gather(comparer.nearest(NEAR_PAIRS)), [])
    if ranks.rank == 0:
        near.sort(key=lambda pair: (abs(pair["margin"]), pair["records"]))
        lines = "".join(json.dumps(pair) + "\n" for pair in near[:NEAR_PAIRS])
        files.write_atomic(Path(cfg.out) / "near_pairs.jsonl", lines)


def candidate_pairs(cfg, ranks, folder, own, table, first_row):
    """Pairs of rows (p, 2) that may be near-duplicates, some on each rank."""
    found = [np.zeros((0, 2), np.int64)]
    if cfg.by in ("image", "both"):
        seen = np.flatnonzero(table["seen"])
        found.append(picture_pairs(ranks, seen + first_row, table["hash"][seen],
                                   table["unsure"][seen], cfg.distance))
    if cfg.by in ("text", "both"):
        bands = [np.load(folder / f"{shard.name}.bands.npy") for shard in own]
        bands = np.concatenate([np.zeros((0, choose_bands(cfg.jaccard)[1]), np.uint64), *bands])
        good = np.flatnonzero(table["id"] != b"")
        found.append(text_pairs(ranks, good + first_row, bands[good]))
    return unique_pairs(np.concatenate(found))


def vector_blocks(folder, own, first_row):
    """The pictures of each own shard that have a vector, for embedding_pairs."""
    blocks = []
    start = first_row
    for shard in own:
        table = np.load(folder / f"{shard.name}.rows.npy")
        features = np.load(folder / f"{shard.name}.features.npy", mmap_mode="r")
        seen = np.flatnonzero(table["seen"])
        blocks.append(VectorBlock(features, seen, seen + start, table["id"][seen]))
        start += len(table)
    return blocks
