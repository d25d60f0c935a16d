"""Cells as words: what the toy bases read in place of pixels, and what they have to say.

A cell such as "LargeRedCircle TopLeft" is two tokens, what is there and where. The language base
reads the sum of their embeddings where a visual token will stand. Both bases may have to name the
cell that a visual token stands for.

Shapes: T tokens of a sample, M visual tokens of a sample.
"""
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import PackedDataset, answer_weight
from inputs.chat import IGNORE, join_segments, place_images, segments
from inputs.dialogue import conversation
from inputs.records import IMAGE, ROW


def cell_ids(row, tokenizer):
    """Ids of the two words of each cell of a row's pictures, (M, 2) int64."""
    if not row.get("cells"):
        raise ValueError("a row without `cells`, which only data of the toy world have")
    cells = [cell.split() for picture in row["cells"] for cell in picture]
    return np.array([[tokenizer.encode(" " + word)[0] for word in words] for words in cells])


def label_cells(sample, row, tokenizer, cell_labels):
    """Make the visual tokens of a sample (see PackedDataset.make_sample) predict their own cells.

    cell_labels: "none"; "also" asks each for what is there, beside the answers; "only" asks for
    nothing else, and asks every second one for the place: the first or the second, by the id.
    """
    visual = sample["ids"] == tokenizer.image_id
    if cell_labels == "only":
        sample["labels"][:] = IGNORE
    if cell_labels == "none" or not visual.any():
        return
    cells = cell_ids(row, tokenizer)
    names = cells[:, 0]
    if cell_labels == "only":
        first = sum(row["id"].encode())
        asked_for_place = (np.arange(len(cells)) + first) % 2 == 1
        names = np.where(asked_for_place, cells[:, 1], cells[:, 0])
    sample["labels"][visual] = names


class CellDataset(PackedDataset):
    """Packs of pictures whose visual tokens predict their own cells, see label_cells."""

    def __init__(self, packs, tokenizer, template, cell_labels="none", loss_weight="token"):
        super().__init__(packs, tokenizer, template, loss_weight=loss_weight)
        self.cell_labels = cell_labels

    def make_sample(self, row, n_tiles):
        sample = super().make_sample(row, n_tiles)
        label_cells(sample, row, self.tokenizer, self.cell_labels)
        return sample


# ---- words in place of pictures ------------------------------------------------------------------

def word_segments(row, tokenizer, template):
    """The segments of a row, see inputs.chat.segments, with a visual token for each cell."""
    system, turns = conversation(row)
    images = [[tokenizer.image_id] * len(cells) for cells in row["cells"]]
    return segments(tokenizer, template, place_images(turns, len(images)), images, system)


class WordSource:
    """A text.jsonl of `python -m toy --parts=text`, for Packs. `measure` comes first."""

    repeat = 1.0
    max_tiles = 0
    weight = 0.0

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.stem
        self.rows = np.empty(0, ROW)
        self.images = np.empty(0, IMAGE)
        self.meta = {"bad": [], "digest": ""}

    def measure(self, tokenizer, template):
        """Find all rows and count their tokens. Returns itself."""
        records = []
        offset = 0
        with open(self.path, "rb") as file:
            for line in tqdm(file, desc=f"measure {self.path}", unit=" rows", leave=False):
                ids, _ = join_segments(word_segments(json.loads(line), tokenizer, template))
                records.append((offset, len(line), len(ids), 0, 0, 0))
                offset += len(line)
        self.rows = np.array(records, ROW)
        return self

    def row(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.rows[i]["offset"])
            return json.loads(file.read(self.rows[i]["size"]))


class WordDataset(CellDataset):
    """Packs of rows whose pictures are given as words: the batch has `cells` (M, 2).

    Each pack is filled up with a document that asks nothing. One shape of all packs makes compiled
    blocks 1.6 times faster.
    """

    def make_sample(self, row, n_tiles):
        ids, targets = join_segments(word_segments(row, self.tokenizer, self.template))
        labels = np.append(targets[1:], IGNORE)
        n_answer = int((labels != IGNORE).sum())
        sample = {
            "id": row["id"],
            "ids": np.array(ids),
            "labels": labels,
            "weight": answer_weight(n_answer, self.loss_weight),
            "cells": cell_ids(row, self.tokenizer),
        }
        label_cells(sample, row, self.tokenizer, self.cell_labels)
        return sample

    def collate(self, samples):
        n_tokens = sum(len(sample["ids"]) for sample in samples)
        n_missing = self.packs.settings.tokens_per_pack - n_tokens
        documents = list(samples)
        if n_missing:
            documents.append({
                "id": "padding",
                "ids": np.full(n_missing, self.tokenizer.eos_id),
                "labels": np.full(n_missing, IGNORE),
                "weight": 1.0,
            })
        batch = super().collate(documents)
        cells = np.concatenate([sample["cells"] for sample in samples])
        return batch | {"cells": torch.from_numpy(cells)}
