"""Stage select: a subset that is balanced over sources and clusters of pictures.

Shapes: n rows of all shards, C width of a feature.
"""
import functools
import hashlib

import numpy as np
import torch

from curation.dedup import COMPARED_FIELDS, build_row_table
from curation.local_model import load_assistant, model_key
from curation.shards import ShardRecord, all_inputs_hash, find_input_shards, in_blocks, read_records
from curation.stages import run_stage
from inputs.images import load_image, make_tiles, normalize

KMEANS_STEPS = 10
KMEANS_SAMPLE = 100_000  # rows that the centres are fitted on
VIT_BATCH = 32  # pictures that go through the ViT at once


def select_balanced(cfg):
    """Take as many rows from each cluster of each source as there are, up to a common level."""

    @functools.cache
    def selection():
        shards = find_input_shards(cfg)
        table, starts = build_row_table(cfg, shards)
        features = vit_features(cfg, shards) if cfg.model else hash_features(table)
        # Rows with a reason against them, and pictures that the ViT could not see, take no part.
        good = np.flatnonzero((table["id"] != b"") & ~np.isnan(features[:, 0]))
        keep = np.zeros(len(table), bool)
        cells = np.full(len(table), -1)
        cluster = kmeans(features[good], cfg.clusters, cfg.seed)
        pairs = np.stack([table["source"][good], cluster])  # (2, good rows)
        cells[good] = np.unique(pairs, axis=1, return_inverse=True)[1]
        keep[good] = choose_rows(cfg, table["id"][good], cells[good])
        return keep, cells, starts

    def process(shard, counts):
        keep, cells, starts = selection()
        for i, record in enumerate(read_records(shard, COMPARED_FIELDS), starts[shard.name]):
            if record.reason:
                yield record
            elif cells[i] < 0:
                yield record._replace(reason="unreadable_picture")
            else:
                row = {**record.row, "cluster": int(cells[i])}
                yield ShardRecord(row, record.pictures, None if keep[i] else "not_selected")

    model = model_key(cfg.model) if cfg.model else "hashes"
    run_stage(cfg, "select", process, alone=True, n=cfg.n, clusters=cfg.clusters, seed=cfg.seed,
              inputs=all_inputs_hash(cfg), model=model)


# ---- which rows ----------------------------------------------------------------------------------


def choose_rows(cfg, ids, cells):
    """ids (n,), cells (n,) int -> which rows to keep (n,) bool: random ones of each cell."""
    ranks = [random_rank(cfg.seed, name.decode()) for name in ids]
    order = np.lexsort((ranks, cells))
    sizes = np.bincount(cells)
    cell_starts = np.cumsum(sizes) - sizes
    rank_in_cell = np.arange(len(order)) - np.repeat(cell_starts, sizes)
    shares = fair_shares(sizes, cfg.n)
    keep = np.zeros(len(order), bool)
    keep[order] = rank_in_cell < shares[cells[order]]
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


def hash_features(table):
    """Mean colours and perceptual hashes of all rows as features (n, 48 + 64), float32."""
    hash_bytes = table["hash"].astype(">u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(hash_bytes, axis=1)
    return np.concatenate([table["tone"] / np.float32(255), bits / np.float32(8)], 1)


@torch.inference_mode()
def vit_features(cfg, shards):
    """The mean patch vector (n, C) float32 of each picture, seen as one tile by --model's ViT.

    NaN where there is no picture, or none that decodes.
    """
    model = load_assistant(cfg).model
    weight = next(model.vision_model.parameters())
    features = [torch.empty(0, model.vision.dim)]
    for shard in shards:
        for block in in_blocks(read_records(shard, COMPARED_FIELDS), VIT_BATCH):
            found = torch.full((len(block), model.vision.dim), torch.nan)
            tiles = [one_tile(record, model.vision.image_size) for record in block]
            seen = [k for k, tile in enumerate(tiles) if tile is not None]
            if seen:
                tiles = torch.cat([tiles[k] for k in seen])
                tiles = normalize(tiles.to(weight.device), weight.dtype)
                patches = model.vision_model(tiles)  # (pictures, P, C)
                found[seen] = patches.mean(1).float().cpu()
            features.append(found)
    return torch.cat(features).numpy()


def one_tile(record, size):
    """The first picture of a record as one tile (1, 3, size, size); None if there is none."""
    for content in record.pictures.values():
        try:
            return make_tiles(load_image(content), 1, 1, size)
        except (ValueError, OSError):
            return None
    return None


def kmeans(features, k, seed):
    """features (n, C) float32 -> cluster (n,) int64. The centres are fitted on a sample."""
    if len(features) == 0:
        return np.zeros(0, np.int64)
    features = torch.from_numpy(features)
    sample = features[shuffled(len(features), seed)[:KMEANS_SAMPLE].sort()[0]]
    centres = sample[shuffled(len(sample), seed)[:k]].clone()  # (k, C)
    for _ in range(KMEANS_STEPS):
        one_hot = torch.nn.functional.one_hot(nearest_centre(sample, centres), len(centres))
        one_hot = one_hot.float()  # (sample, k)
        sizes = one_hot.sum(0)
        full = sizes > 0  # an empty cluster keeps its centre
        centres[full] = (one_hot.T @ sample)[full] / sizes[full, None]
    return nearest_centre(features, centres).numpy()


def shuffled(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def nearest_centre(rows, centres):
    """rows (n, C), centres (k, C) -> the number (n,) of the nearest centre."""
    blocks = [torch.cdist(block, centres).argmin(1) for block in rows.split(8192)]
    return torch.cat(blocks)
