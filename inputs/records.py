"""A source of records: where its rows are, and how one row or picture of it is read."""
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from inputs.chat import image_names
from inputs.files import read_json
from inputs.tars import MAX_BYTES, check_size

# The two files of an index. A row has its place in the file of rows, its tokens apart from the
# visual ones (-1: unreadable) and its images, which stand together in the file of images.
ROW = np.dtype([
    ("offset", "i8"),
    ("size", "i4"),
    ("tokens", "i4"),
    ("first_image", "i8"),
    ("n_images", "i4"),
    ("is_text", "i4"),  # 1: a bare caption, the .txt of a tar
])
# The place of an image is known in a tar alone.
IMAGE = np.dtype([("offset", "i8"), ("size", "i4"), ("width", "i4"), ("height", "i4")])


def array_rows(path):
    """The rows of LLaVA's one JSON array."""
    return read_json(path, list)


# Formats that are not lines of JSON: a function that yields the rows of such a file, by its suffix.
ROW_READERS = {".json": array_rows}

# What a bad row raises.
UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError)


@functools.lru_cache(None)
def map_index(path):
    """The array in an index file, read from the disk as it is needed; empty if the file is.

    It takes no memory of this process. Unlike numpy's memory map it keeps no file open: there may
    be more sources than files a process may have open.
    """
    dtype = ROW if path.endswith("rows.bin") else IMAGE
    size = os.path.getsize(path)
    if size == 0:
        return np.empty(0, dtype)
    return torch.from_file(path, size=size, dtype=torch.uint8).numpy().view(dtype)


@dataclass
class Source:
    """One file or folder of records with an index beside it. `open_source` makes one.

    It holds paths and numbers only, so that it travels to workers for nothing; each process maps
    the index for itself.
    """

    name: str
    path: Path
    root: Path              # where the names of images begin
    index: Path             # folder of the index: rows.bin, images.bin, meta.json
    repeat: float = 1.0     # times an epoch goes through it; below 1: the first part only
    max_tiles: int = 0      # tile limit of its images, 0: the run's
    weight: float = 0.0     # share of the samples, 0: by its length
    sha256: str = ""        # of the annotation file, checked when the index is built
    meta: dict = field(default_factory=dict)  # unreadable rows and digest, from meta.json

    @property
    def rows(self):
        return map_index(f"{self.index}/rows.bin")

    @property
    def images(self):
        return map_index(f"{self.index}/images.bin")

    @property
    def is_tar(self):
        return self.path.suffix.lower() == ".tar"

    @property
    def lines(self):
        """The file that holds the rows.

        The rows of a folder, and of the formats in ROW_READERS, are written as lines beside the
        index.
        """
        if self.path.is_dir() or self.path.suffix.lower() in ROW_READERS:
            return self.index / "rows.jsonl"
        return self.path

    def read(self, offset, size):
        """Bytes of the file that holds the rows."""
        with open(self.lines, "rb") as file:
            file.seek(offset)
            return file.read(check_size(size, "a row or picture"))

    def row(self, i):
        """Row i as a dict with an `id`; raises one of UNREADABLE."""
        offset, size, *_, is_text = self.rows[i].item()
        row = parse_row(self.read(offset, size), is_text)
        return {"id": f"{self.name}:{i}", **row}

    def image(self, i, k, row):
        """Bytes of image k of row i; raises one of UNREADABLE."""
        if self.is_tar:
            offset, size, *_ = self.images[self.rows[i]["first_image"] + k].item()
            return self.read(offset, size)
        path = self.root / image_names(row)[k]
        # /dev/zero has no end.
        if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_BYTES):
            raise ValueError(f"{path}: no file, or larger than {MAX_BYTES} bytes")
        return path.read_bytes()


def parse_row(raw, is_text):
    """Bytes of a row -> dict; is_text: they are a bare caption. ValueError if it is broken."""
    try:
        row = {"caption": raw.decode("utf-8-sig")} if is_text else json.loads(raw)
    except json.JSONDecodeError as e:
        raise not_json(f"{e.msg} at character {e.pos + 1}") from None
    except ValueError as e:
        raise not_json(e) from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, where a row is one JSON object; write {{...}}")
    return row


def not_json(reason):
    return ValueError(f"not valid JSON ({reason}); write one object {{...}} per row, in UTF-8")
