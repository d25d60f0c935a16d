"""Small data for tests: pictures, rows about them, and packs of them in the toy vocabulary."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from data import PackedDataset
from inputs.packing import Packs, PackSettings
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # an optional folder of test data
TOY = Tokenizer(ROOT / "toy" / "tokenizer")
CHAT = "sailvl-chat"
SMALL = {
    "tile_size": 84,
    "tokens_per_tile": 9,
    "max_tiles": 4,
    "tokens_per_pack": 300,
    "tiles_per_pack": 20,
}


def picture(width=84, height=84, color=(200, 30, 30)):
    """Bytes of a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def talk(question="What?", answer="This.", **more):
    """A row of one question and one answer."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def write_rows(folder, rows, name="rows.jsonl"):
    """Write rows as lines; returns the path as --data has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def some_rows(folder, n, seed=0):
    """Write n rows about pictures of several shapes, some without a picture."""
    rng = np.random.default_rng(seed)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for k, size in enumerate([(84, 84), (168, 84), (84, 252), (168, 168)]):
        (folder / f"{k}.png").write_bytes(picture(*size))
    for i in range(n):
        question = "How many? " * int(rng.integers(1, 12))
        answer = "Some answer. " * int(rng.integers(1, 9))
        row = talk(question, answer, id=f"r{i}")
        rows.append(row | ({"image": f"{rng.integers(4)}.png"} if rng.random() < 0.8 else {}))
    return write_rows(folder, rows)


def image_spans(ids):
    """Lengths of the runs of <IMG_CONTEXT> between <img> and </img>.

    Nothing else may stand there, and none of them elsewhere.
    """
    start = TOY.special["<img>"]
    end = TOY.special["</img>"]
    found = []
    for i in np.flatnonzero(ids == start):
        n = int(np.flatnonzero(ids[i:] == end)[0]) - 1
        assert (ids[i + 1 : i + 1 + n] == TOY.image_id).all()
        found.append(n)
    assert sum(found) == (ids == TOY.image_id).sum()
    assert len(found) == (ids == end).sum()
    return found


def sources_of(spec):
    """The sources of --data=SPEC."""
    return open_sources(str(spec), TOY, CHAT)


def packs_of(sources, **settings):
    """Small packs of sources, or of the sources of --data."""
    if not isinstance(sources, list):
        sources = sources_of(sources)
    return Packs(sources, PackSettings(**SMALL | settings))


def dataset_of(sources, image_as="pixels", loss_weight="token", **settings):
    """The batches of small packs."""
    return PackedDataset(packs_of(sources, **settings), TOY, CHAT, image_as, loss_weight)
