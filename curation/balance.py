"""Stage select: a subset that is balanced over sources and clusters of pictures.

Shapes: n rows of all shards, C width of a feature.
"""
import hashlib
import itertools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from curation.embeddings import vit_features
from curation.local_model import load_assistant, model_key
from curation.ranks import is_whole_array, save_array
from curation.shards import ShardRecord, all_inputs_hash, read_records
from curation.stages import run_stage

KMEANS_STEPS = 10
KMEANS_SAMPLE = 100_000  # about so many rows the centres are fitted on

# What is read of a row.
SELECT_FIELDS = ("dhash", "tone", "sha256", "source", "id")
# good: it takes part. rank: a random number that decides within a cell.
SELECT_ROW = np.dtype([("good", "?"), ("source", "u4"), ("rank", "f8")])
# What becomes of a row. cell: its cluster of its source, -1 for a picture that cannot be read.
CHOICE = np.dtype([("cell", "i8"), ("keep", "?")])


def select_balanced(cfg):
    """Take as many rows from each cluster of each source as there are, up to a common level."""
    folder = Path(cfg.out) / ".shards"

    def prepare(ranks, inputs, missing):
        assistant = load_assistant(cfg) if cfg.model else None
        for shard in tqdm(ranks.deal(inputs), desc="measure", unit="shard", disable=None):
            measure_features(cfg, folder, shard, assistant)
        ranks.gather(None)
        choose_balanced(cfg, ranks, folder, ranks.share(inputs))
        ranks.gather(None)

    def process(shard, counts):
        choices = np.load(folder / f"{shard.name}.choices.npy")
        for choice, record in zip(choices, read_records(shard, SELECT_FIELDS), strict=True):
            if record.reason:
                yield record
            elif choice["cell"] < 0:
                yield record._replace(reason="unreadable_picture")
            else:
                row = {**record.row, "cluster": int(choice["cell"])}
                reason = None if choice["keep"] else "not_selected"
                yield ShardRecord(row, record.pictures, reason)

    model = model_key(cfg.model) if cfg.model else "hashes"
    run_stage(cfg, "select", process, prepare, n=cfg.n, clusters=cfg.clusters, seed=cfg.seed,
              inputs=all_inputs_hash(cfg), model=model)


# ---- measure -------------------------------------------------------------------------------------


def measure_features(cfg, folder, shard, assistant):
    """Write what decides of the rows of a shard: .rows.npy and .features.npy (rows, C) float32."""
    path = folder / f"{shard.name}.rows.npy"
    if is_whole_array(path):
        return
    records = list(read_records(shard, SELECT_FIELDS, with_pictures=False))
    reasons = {record.reason for record in records}
    if "no_dhash" in reasons and None not in reasons:
        raise ValueError(f"{shard.path} has no dhash: run `curate.py collect` first")
    table = np.zeros(len(records), SELECT_ROW)
    hashes = np.zeros(len(records), "u8")
    tones = np.zeros((len(records), 48), np.uint8)
    for k, record in enumerate(records):
        if not record.reason:
            row = record.row
            source = hashlib.sha256(row["source"].encode("utf-8", "replace")).hexdigest()
            table["good"][k] = True
            table["source"][k] = int(source[:8], 16)
            table["rank"][k] = random_rank(cfg.seed, row["sha256"][:20])
            hashes[k] = int(row["dhash"], 16)
            tone = bytes.fromhex(row["tone"])
            tones[k] = np.frombuffer(tone, np.uint8)
    if assistant:
        features = vit_features(assistant, shard, SELECT_FIELDS)
        table["good"] &= ~np.isnan(features[:, 0])
    else:
        features = hash_features(hashes, tones)
    save_array(folder / f"{shard.name}.features.npy", features)
    # The last one says that all are there.
    save_array(path, table)


# ---- choose --------------------------------------------------------------------------------------


def choose_balanced(cfg, ranks, folder, own):
    """Write .choices.npy of each own shard. All ranks together."""
    tables = [np.load(folder / f"{shard.name}.rows.npy") for shard in own]
    table = np.concatenate([np.zeros(0, SELECT_ROW), *tables])
    good = np.flatnonzero(table["good"])
    features = [np.load(folder / f"{shard.name}.features.npy", mmap_mode="r") for shard in own]
    centres = fit_centres(cfg, ranks, features, tables)

    choices = np.zeros(len(table), CHOICE)
    choices["cell"] = -1
    if centres is not None:
        # Shard by shard, so that the same numbers come out on any number of ranks.
        clusters = [np.zeros(0, np.int64)]
        for part in features:
            rows = torch.from_numpy(np.array(part))
            clusters.append(nearest_centre(rows, centres).numpy())
        cluster = np.concatenate(clusters)[good]
        pairs = np.stack([table["source"][good], cluster], 1)  # (good rows, 2)
        own_pairs = np.unique(pairs, axis=0)
        all_pairs = np.concatenate(ranks.gather(own_pairs))
        all_pairs = np.unique(all_pairs, axis=0)
        cells = index_of(all_pairs, pairs)
        sizes = np.bincount(cells, minlength=len(all_pairs))
        shares = fair_shares(ranks.sum(sizes), cfg.n)
        choices["cell"][good] = cells
        choices["keep"][good] = choose_rows(ranks, table["rank"][good], cells, shares)
    start = 0
    for shard, part in zip(own, tables, strict=True):
        save_array(folder / f"{shard.name}.choices.npy", choices[start : start + len(part)])
        start += len(part)


def index_of(all_pairs, pairs):
    """pairs (n, 2) -> the number of each in all_pairs, sorted (m, 2)."""
    numbers = {tuple(pair): k for k, pair in enumerate(all_pairs.tolist())}
    return np.array([numbers[tuple(pair)] for pair in pairs.tolist()], np.int64)


def choose_rows(ranks, rank, cells, shares):
    """rank (n,), cells (n,) of own rows, shares (cells,) -> which of them to keep (n,) bool.

    Those of each cell that have the lowest random ranks of all.
    """
    rows = np.zeros(len(rank), [("cell", "i8"), ("rank", "f8"), ("row", "i8"), ("owner", "i8")])
    rows["cell"] = cells
    rows["rank"] = rank
    rows["row"] = np.arange(len(rank))
    rows["owner"] = ranks.rank
    rows, _ = ranks.exchange(rows, cells % ranks.world)
    rows = rows[np.lexsort((rows["row"], rows["owner"], rows["rank"], rows["cell"]))]
    _, first, inverse = np.unique(rows["cell"], return_index=True, return_inverse=True)
    place = np.arange(len(rows)) - first[inverse]
    kept = rows[place < shares[rows["cell"]]]
    kept, _ = ranks.exchange(kept, kept["owner"])
    keep = np.zeros(len(rank), bool)
    keep[kept["row"]] = True
    return keep


def fair_shares(sizes, n):
    """Sizes of cells (cells,) -> how many rows to take of each, n together.

    No cell gives more than another that could give as much.
    """
    take = np.zeros_like(sizes)
    n = min(n, int(sizes.sum()))
    while True:
        left = n - int(take.sum())
        if left == 0:
            return take
        room = np.flatnonzero(take < sizes)[:left]
        level = take[room] + max(1, left // len(room))
        take[room] = np.minimum(sizes[room], level)


def random_rank(seed, name):
    """A number in [0, 1) that depends on seed and name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:7], "little") / 2**56


# ---- features and clusters -----------------------------------------------------------------------


def hash_features(hashes, tones):
    """hashes (n,) uint64, mean colours (n, 48) uint8 -> features (n, 48 + 64) float32."""
    hash_bytes = hashes.astype(">u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(hash_bytes, axis=1)
    return np.concatenate([tones / np.float32(255), bits / np.float32(8)], 1)


def fit_centres(cfg, ranks, features, tables):
    """The centres (k, C) of clusters of the good rows of all ranks; None if there is no such row.

    They are fitted on rows whose random number is low.
    """
    m = sum(int(table["good"].sum()) for table in tables)
    n = sum(ranks.gather(m))
    if n == 0:
        return None
    sample = []
    for part, table in zip(features, tables, strict=True):
        chosen = table["good"] & (table["rank"] < KMEANS_SAMPLE / n)
        sample.append(np.array(part[chosen]))
    sample = itertools.chain(*ranks.gather(sample))
    sample = np.concatenate(list(sample))
    return kmeans(sample, cfg.clusters, cfg.seed)


def kmeans(sample, k, seed):
    """sample (n, C) float32 -> centres (k, C)."""
    sample = torch.from_numpy(sample)
    centres = sample[shuffled(len(sample), seed)[:k]].clone()
    for _ in range(KMEANS_STEPS):
        nearest = nearest_centre(sample, centres)
        one_hot = torch.nn.functional.one_hot(nearest, len(centres))
        one_hot = one_hot.float()  # (sample, k)
        sizes = one_hot.sum(0)
        full = sizes > 0  # an empty cluster keeps its centre
        centres[full] = (one_hot.T @ sample)[full] / sizes[full, None]
    return centres


def shuffled(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def nearest_centre(rows, centres):
    """rows (n, C), centres (k, C) -> the number (n,) of the nearest centre."""
    blocks = [torch.cdist(block, centres).argmin(1) for block in rows.split(8192)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *blocks])
