"""A source of records: where its rows are, and how one row or picture of it is read."""
import contextlib
import functools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from inputs.files import naming, read_json
from inputs.images import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from inputs.patience import DataGone
from inputs.picture_names import image_names, inline_bytes, is_inline
from inputs.row_keys import CAPTION_KEYS, check_row_keys, dialogue_forms, is_empty, short
from inputs.tars import MAX_BYTES, check_size

# The files of an index. A row has its place in the file of rows, its tokens apart from the
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
# What the file of an image was like when it was measured. In a tar there is no such file.
STAT = np.dtype([("size", "i8"), ("mtime", "i8")])
INDEX_FILES = {"rows.bin": ROW, "images.bin": IMAGE, "stats.bin": STAT}


def array_rows(path):
    """The rows of LLaVA's one JSON array."""
    return read_json(path, list, most=None)


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
    dtype = INDEX_FILES[os.path.basename(path)]
    _, size = mapped_file(path)
    if size == 0:
        return np.empty(0, dtype)
    with open(path, "rb") as file:
        # PyTorch takes no name that is not UTF-8.
        name = path if path.isprintable() else f"/dev/fd/{file.fileno()}"
        return torch.from_file(name, size=size, dtype=torch.uint8).numpy().view(dtype)


@functools.lru_cache(None)
def mapped_file(path):
    """Which file map_index has mapped: its number and its size."""
    found = os.stat(path)
    return found.st_ino, found.st_size


def whole_map(path):
    """The array of map_index; DataGone if its file was cut off meanwhile.

    The system would end the process at the first byte that is missing, without a word. A file that
    was replaced or removed stays readable.
    """
    array = map_index(path)
    number, size = mapped_file(path)
    with contextlib.suppress(FileNotFoundError):
        now = os.stat(path)
        if now.st_ino == number and now.st_size < size:
            raise DataGone(f"{path} was cut off while it was in use ({size} bytes before, "
                           f"{now.st_size} now); run the same command again, which makes the "
                           "index again")
    return array


def forget_maps():
    """Map the files of indexes anew: some of them were written again."""
    map_index.cache_clear()
    mapped_file.cache_clear()


@dataclass
class Source:
    """One file or folder of records with an index beside it. `open_source` makes one.

    It holds paths and numbers only, so that it travels to workers for nothing; each process maps
    the index for itself.
    """

    name: str
    path: Path
    root: Path              # where the names of images begin
    index: Path             # folder of the index: INDEX_FILES and meta.json
    repeat: float = 1.0     # times an epoch goes through it; below 1: the first part only
    max_tiles: int = 0      # tile limit of its images, 0: the run's
    weight: float = 0.0     # share of the samples, 0: by its length
    sha256: str = ""        # of the annotation file, checked when the index is built
    meta: dict = field(default_factory=dict)  # unreadable rows, digest and more, from meta.json
    converted: Path | None = None  # the tar with the rows of a parquet file
    notes: list = field(default_factory=list)  # what its entry in a meta file says in vain

    @property
    def rows(self):
        return whole_map(f"{self.index}/rows.bin")

    @property
    def images(self):
        return whole_map(f"{self.index}/images.bin")

    @property
    def stats(self):
        return whole_map(f"{self.index}/stats.bin")

    @property
    def is_tar(self):
        return (self.converted or self.path).suffix.lower() == ".tar"

    @property
    def lines(self):
        """The file that holds the rows.

        The rows of a folder, and of the formats in ROW_READERS, are written as lines beside the
        index. Those of a parquet file are in its tar.
        """
        if self.converted:
            return self.converted
        if self.path.is_dir() or self.path.suffix.lower() in ROW_READERS:
            return self.index / "rows.jsonl"
        return self.path

    def read(self, offset, size):
        """Bytes of the file that holds the rows."""
        with naming(self.lines), open(self.lines, "rb") as file:
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
        name = image_names(row)[k]
        if is_inline(name):
            return inline_bytes(name)
        path = self.root / name
        # /dev/zero has no end.
        if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_BYTES):
            raise ValueError(f"{path}: no file, or larger than {MAX_BYTES} bytes")
        with naming(path):
            return path.read_bytes()

    def check_picture(self, i, k, size):
        """ValueError unless image k of row i has the (width, height) that its index has."""
        _, _, *indexed = self.images[self.rows[i]["first_image"] + k].item()
        if indexed != list(size):
            raise ValueError(f"image {k + 1} has {size[0]} x {size[1]} pixels, its index has "
                             f"{indexed[0]} x {indexed[1]}: it changed since it was measured; "
                             f"python data.py check {self.path} has it measured again")


def parse_row(raw, is_text):
    """Bytes of a row -> dict; is_text: they are a bare caption. ValueError if it is broken."""
    if is_text:
        return {"caption": decode_text(raw)}
    try:
        row = json.loads(raw, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as e:
        raise not_json(f"{e.msg} at character {e.pos + 1}") from None
    except ValueError as e:
        raise not_json(e) from None
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, where a row is one JSON object; write {{...}}")
    check_row_keys(row)
    return row


def unique_keys(pairs):
    """A JSON object as a dict; ValueError if it has a key twice, of which one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {short(twice)} stands twice")
    return row


def decode_text(raw):
    """The text of a .txt; ValueError if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"a .txt that is not UTF-8 text ({e.reason} at byte {e.start + 1}); "
                         "convert it") from None


def not_json(reason):
    return ValueError(f"not valid JSON ({reason}); write one object {{...}} per row, in UTF-8")


# ---- records before there is an index ----------------------------------------------------------

@dataclass(slots=True)
class Record:
    """Where a row is. In a tar also where the files beside it are, each as (offset, size)."""

    offset: int
    size: int
    is_text: bool = False
    pictures: dict | None = None  # {name: place}
    caption: tuple | None = None  # place of the .txt beside a .json
    problem: str = ""  # why the record is no row

    @property
    def has_text(self):
        """False for files of a tar without a .json or .txt."""
        return self.pictures is None or self.offset > 0


def tar_record(members):
    """The Record of the files of a tar that share a key.

    Of each kind of text there may be one: which of two belongs to the pictures is not known.
    """
    pictures = {}
    texts = {".json": [], ".txt": []}
    problem = ""
    for member in members:
        name = os.path.basename(member.name)
        suffix = os.path.splitext("name" + name)[1].lower()
        place = (member.offset_data, member.size)
        if suffix in IMAGE_SUFFIXES:
            if name in pictures:
                problem = f"two files called {name} in one record; rename one"
            pictures[name] = place
        elif suffix in texts:
            texts[suffix].append((name, place))
        elif suffix in MEDIA_SUFFIXES:
            problem = f"{short(name)}: suffix {suffix} is not read; convert it or remove the record"
    for suffix, found in texts.items():
        if len(found) > 1:
            names = ", ".join(name for name, _ in found[:4])
            problem = (f"{len(found)} {suffix} in one record ({names}), whose name ends at its "
                       "first dot; rename its files")
    json_place, text_place = (found[0][1] if found else None for found in texts.values())
    if json_place:
        return Record(*json_place, False, pictures, text_place, problem)
    if text_place:
        return Record(*text_place, True, pictures, None, problem)
    # A record without text is a row all the same, and will be listed as unreadable.
    return Record(0, 0, False, pictures, None, problem)


def read_record(file, record):
    """(row, whether its text is a bare caption) of a record in an open file of rows.

    A .txt beside a .json is the caption if the .json has none. Raises one of UNREADABLE.
    """
    if record.problem:
        raise ValueError(record.problem)
    if not record.has_text:
        raise ValueError("no .json or .txt beside the pictures; write one")
    row = parse_row(read_place(file, record.offset, record.size), record.is_text)
    if not record.caption:
        return row, record.is_text
    has_caption = any(not_blank(row.get(key)) for key in CAPTION_KEYS)
    row = add_caption(row, read_place(file, *record.caption))
    # Where the caption stands in the .txt alone, that is the row from here on.
    is_text = not has_caption and not dialogue_forms(row)
    if is_text and not is_empty(row.get("system")):
        raise ValueError("a system message in the .json and the caption in a .txt; write both "
                         "into the .json")
    return row, is_text


def add_caption(row, raw):
    """The row of a .json with the caption of a .txt beside it, which holds these bytes.

    A .txt is the caption if the .json has none. If both have one they must agree, unless the .json
    has a dialogue: captions are notes there.
    """
    text = decode_text(raw)
    known = [row[key] for key in CAPTION_KEYS if not_blank(row.get(key))]
    if not known:
        return row | {"caption": text}
    if not dialogue_forms(row) and text.strip() and text.strip() != str(known[0]).strip():
        raise ValueError("the .txt and the caption in the .json differ; keep one of them")
    return row


def read_place(file, offset, size, what="a row"):
    """Bytes of a row or picture in an open file; ValueError if they are too many, or cut off."""
    with naming(file.name):
        content = os.pread(file.fileno(), check_size(size, what), offset)
    if len(content) < size:
        raise ValueError(f"{file.name} ends too early; copy it again")
    return content


def not_blank(value):
    """Whether a field says something: it is there, and no text of spaces alone."""
    return value is not None and not (isinstance(value, str) and not value.strip())


def record_pictures(record, row):
    """[(name, place)] of the pictures of a tar's record.

    In the order of the row if it names them, else in that of the tar. ValueError if the row names a
    picture that is not in its record.
    """
    names = [os.path.basename(name) for name in image_names(row)]
    if not names and len(record.pictures) > 1 and "<image>" not in json.dumps(row):
        beside = short(", ".join(record.pictures))
        raise ValueError(f"{len(record.pictures)} pictures ({beside}) and no word which are meant; "
                         "name them in the .json as image, in their order")
    for name in names:
        if name not in record.pictures:
            beside = ", ".join(record.pictures) or "none"
            raise ValueError(f"image {short(name)} is not in this record of the tar, whose "
                             f"pictures are: {short(beside)}; add it or remove the row")
    return [(name, record.pictures[name]) for name in names] or list(record.pictures.items())
