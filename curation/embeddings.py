"""Pictures as the ViT of a model sees them: a vector of each, and pairs of rows with near vectors.

Shapes: n rows of all shards, of which each rank has a block, m of them; C width of a vector.
"""
import math
from typing import NamedTuple

import numpy as np
import torch

from curation.pairs import REACH, unique_pairs
from curation.shards import in_blocks, read_records
from inputs.images import load_image, make_tiles, normalize

VIT_BATCH = 32  # pictures that go through the ViT at once
# Rows drawn by their sha256. Their mean is taken off all vectors, which else are alike: those of
# strangers have a cosine of 0.9. Some of them are pivots. A row is compared with those that have
# one of its nearest pivots in common.
MOST_DRAWN = 2**15
ROWS_OF_PIVOT = 1024
NEAREST_PIVOTS = 4
CELL_REACH = 2**15  # rows of one pivot that a row is compared with, those behind it
ROWS_AT_ONCE = 256  # times CELL_REACH products are in memory
BYTES_AT_ONCE = 2**30  # of vectors that a rank sends; more are sent in several rounds
SLACK = 2e-3  # of the cosine of vectors of 16 bits


@torch.inference_mode()
def vit_features(assistant, shard, fields):
    """The mean patch vector (n, C) float32 of each picture, seen as one tile by a model's ViT.

    NaN where there is no picture, or none that decodes. fields: those of the row that are read.
    """
    model = assistant.model
    weight = next(model.vision_model.parameters())
    features = [torch.empty(0, model.vision.dim)]
    for block in in_blocks(read_records(shard, fields), VIT_BATCH):
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


def cosine_of(a, b, centre):
    """Vectors (C,) -> the cosine of what they have beside the centre; 0 if one has nothing."""
    a = a.astype(np.float64) - centre
    b = b.astype(np.float64) - centre
    lengths = np.sqrt((a * a).sum() * (b * b).sum())
    return (a * b).sum() / max(lengths, 1e-12)


# ---- pairs ---------------------------------------------------------------------------------------


class VectorBlock(NamedTuple):
    """The pictures of one own shard, m of them."""
    features: np.ndarray  # (rows of the shard, C), on the disk
    places: np.ndarray  # (m,) of the pictures in it
    rows: np.ndarray  # (m,) their rows
    ids: np.ndarray  # (m,) S20


def embedding_pairs(ranks, device, blocks, cosine):
    """Blocks of all own pictures -> centre (C,), pairs (p, 2) of rows with at least this cosine.

    But for SLACK. Each rank returns some of the pairs.
    """
    centre, pivots = draw_vectors(ranks, blocks)
    pivots = unit_vectors(device, pivots, centre)
    # (m, NEAREST_PIVOTS) of each block
    cells = [nearest_pivots(device, block, centre, pivots) for block in blocks]
    entry = np.dtype([
        ("cell", "i8"),
        ("row", "i8"),
        ("vector", "f2", len(centre)),
    ])
    n_bytes = sum(part.size for part in cells) * entry.itemsize
    n_rounds = max(1, *ranks.gather(math.ceil(n_bytes / BYTES_AT_ONCE)))
    found = [np.zeros((0, 2), np.int64)]
    for turn in range(n_rounds):
        entries = [np.zeros(0, entry)]
        for block, part in zip(blocks, cells, strict=True):
            own, near = np.nonzero(part % n_rounds == turn)
            made = np.zeros(len(own), entry)
            made["cell"] = part[own, near]
            made["row"] = block.rows[own]
            vectors = block.features[block.places[own]]
            made["vector"] = unit_vectors("cpu", vectors, centre)
            entries.append(made)
        entries = np.concatenate(entries)
        owner = entries["cell"] // n_rounds % ranks.world
        entries, _ = ranks.exchange(entries, owner)
        order = np.lexsort((entries["row"], entries["cell"]))
        entries = entries[order]
        edges = np.flatnonzero(np.diff(entries["cell"], prepend=-1))
        for cell in np.split(entries, edges)[1:]:
            found.append(cell_pairs(device, cell, cosine - SLACK))
    return centre, unique_pairs(np.concatenate(found))


def draw_vectors(ranks, blocks):
    """The mean (C,) of some rows of all ranks, pivots (k, C): the same on any number of ranks."""
    m = sum(len(block.rows) for block in blocks)
    n = sum(ranks.gather(m))
    width = max((block.features.shape[1] for block in blocks), default=0)
    width = max(ranks.gather(width))
    share = min(1, MOST_DRAWN / max(1, n))
    ids = [np.zeros(0, "S20")]
    vectors = [np.zeros((0, width), np.float32)]
    for block in blocks:
        drawn = are_drawn(block.ids, share)
        ids.append(block.ids[drawn])
        vectors.append(block.features[block.places[drawn]])
    ids = np.concatenate(ids)
    vectors = np.concatenate(vectors)
    ids = np.concatenate(ranks.gather(ids))
    vectors = np.concatenate(ranks.gather(vectors))
    if len(vectors) == 0:
        return np.zeros(width), np.zeros((1, width), np.float32)
    centre = vectors.mean(0, dtype=np.float64)
    pivots = vectors[are_drawn(ids, min(share, 1 / ROWS_OF_PIVOT))]
    if len(pivots) == 0:
        pivots = vectors[:1]
    return centre, pivots


def are_drawn(ids, share):
    """ids (m,) S20, the beginnings of sha256 -> about this share of them, bool (m,)."""
    if share == 1:
        return np.ones(len(ids), bool)
    lowest = format(int(share * 16**12), "012x")
    return ids < lowest.encode()


def nearest_pivots(device, block, centre, pivots):
    """Numbers (m, at most NEAREST_PIVOTS) of the pivots (k, C) that are nearest to its pictures."""
    n_nearest = min(NEAREST_PIVOTS, len(pivots))
    cells = [np.zeros((0, n_nearest), np.int64)]
    for start in range(0, len(block.places), ROWS_AT_ONCE):
        places = block.places[start : start + ROWS_AT_ONCE]
        vectors = unit_vectors(device, block.features[places], centre)
        nearest = (vectors @ pivots.T).topk(n_nearest).indices
        cells.append(nearest.cpu().numpy())
    return np.concatenate(cells)


def unit_vectors(device, vectors, centre):
    vectors = (vectors - centre).astype(np.float32)
    vectors = torch.from_numpy(vectors).to(device)
    return torch.nn.functional.normalize(vectors)


def cell_pairs(device, entries, cosine):
    """Entries of one pivot, in order of their rows -> pairs (p, 2) of rows of at least this cosine.

    A row makes pairs with the REACH nearest rows behind it. Equal ones form one chain all the same.
    """
    vectors = np.ascontiguousarray(entries["vector"])
    vectors = torch.from_numpy(vectors).to(device).float()
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = vectors[start : start + ROWS_AT_ONCE]
        others = vectors[start : start + CELL_REACH]
        near = block @ others.T >= cosine
        near = near.triu(1)
        near &= near.cumsum(1, dtype=torch.int32) <= REACH
        pairs = near.nonzero().cpu().numpy() + start
        found.append(entries["row"][pairs])
    return np.concatenate(found)
