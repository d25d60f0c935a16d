"""Parquet, as the datasets hub exports it -> a tar beside it, which is read like any other."""
import json
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

from inputs.files import atomic_write, check_file, json_hash, printable
from inputs.images import image_type
from inputs.locks import lock_first
from inputs.patience import is_passing
from inputs.picture_names import checked_image_name, picture_source
from inputs.row_keys import PAIR_WORDS, PICTURE_KEYS, TURNS_KEYS, is_empty
from inputs.tars import add_member, check_size

# Rises when rows are written in another way, so that older tars are not believed.
WRITING_RULES = 1
# Rows that are in memory at a time. Each may have 64 MB, most have less than one.
ROWS_AT_A_TIME = 32
# Where a part of a message names its picture.
PART_PICTURES = ("image", "path", "url", "base64", "image_url")
# What stands for bytes that are read under no key. It looks like a picture, so that a row in which
# no other was found is refused by the name of the key.
LOST_BYTES = "data:image/unknown"


def converted_parquet(path, root, places):
    """The tar that holds the rows and pictures of a parquet file, made if there is none yet.

    root: where the names of images begin; places: folders in which it may stand, the first that can
    be written gets it. A parquet file that changed gets another one. ValueError if the file is
    damaged, if pyarrow is missing, or if no place can be written.
    """
    about = path.stat()
    state = [str(path.resolve()), str(Path(root).resolve()), about.st_size, about.st_mtime_ns,
             WRITING_RULES]
    folder = f".{path.name}.rows-{json_hash(state)[:12]}"
    tars = [place / folder / "rows.tar" for place in places]
    for tar in tars:
        if tar.exists():
            return tar
    number, lock, _, _ = lock_first([tar.parent for tar in tars], f"tar of {path}")
    tar = tars[number]
    with lock:
        # Another process may have made it meanwhile.
        if not tar.exists():
            write_tar(path, Path(root), tar)
    return tar


def write_tar(path, root, tar_path):
    """Write the rows of a parquet file and their pictures into a tar, whole or not at all."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet is read by pyarrow, which is not installed; "
                         "pip install pyarrow") from None
    print_older(path, tar_path)
    try:
        with pyarrow.parquet.ParquetFile(path) as rows, atomic_write(tar_path, "wb") as file:
            n_rows = rows.metadata.num_rows
            title = f"convert {printable(path.name)}, once"
            bar = tqdm(desc=title, total=n_rows, unit=" rows", leave=False)
            with bar, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for batch in rows.iter_batches(ROWS_AT_A_TIME):
                    for row in batch.to_pylist():
                        add_parquet_row(tar, f"{bar.n:09d}", row, root)
                        bar.update()
    except pyarrow.ArrowException as e:
        reason = str(e).splitlines()[0][:200]
        raise ValueError(f"{path} is no whole parquet file ({reason}); copy it again") from None


def print_older(path, tar_path):
    """Say which tars were made of this file before it changed. A run may still read them."""
    for folder in tar_path.parent.parent.glob(f".{path.name}.rows-*"):
        if folder != tar_path.parent and (folder / "rows.tar").exists():
            print(f"{path}: it changed; {folder} was made of it before and can be removed",
                  file=sys.stderr, flush=True)


def add_parquet_row(tar, key, row, root):
    """Add a row and its pictures to an open tar; a row with a picture that is missing says so."""
    pictures = NamedPictures(key, root)
    try:
        row = pictures.name_all(row)
    except (ValueError, OSError) as e:
        if is_passing(e):
            raise
        # It is listed as unreadable when it is measured.
        row = {"unreadable": str(e)}
        pictures.names = {}
    content = json.dumps(row, ensure_ascii=False, default=plain_value)
    add_member(tar, f"{key}.json", content.encode("utf-8", "replace"))
    for picture, name in pictures.names.items():
        add_member(tar, name, picture)


def plain_value(value):
    """What JSON has for a value that it does not know: bytes, dates and decimal numbers."""
    return LOST_BYTES if isinstance(value, bytes) else str(value)


class NamedPictures:
    """The pictures of a row, {bytes: name in the tar}, and the row with names in their places."""

    def __init__(self, key, root):
        self.key = key
        self.root = root
        self.names = {}

    def name_all(self, row):
        """The row with a name in place of each picture. ValueError if one cannot be read."""
        named = dict(row)
        keys = [key for key in PICTURE_KEYS if row.get(key) is not None]
        # Beside pictures, names in another column say where these came from.
        stored = [key for key in keys if holds_bytes(row[key])]
        for key in keys:
            if stored and key not in stored:
                named[key] = None
            elif isinstance(row[key], list):
                named[key] = [self.name_of(value, key) for value in row[key]]
            elif not is_absent(row[key]):
                named[key] = self.name_of(row[key], key)
            else:
                named[key] = None
        for key in (*TURNS_KEYS, *PAIR_WORDS):
            if isinstance(row.get(key), list):
                named[key] = self.name_parts(row[key], key)
        return named

    def name_parts(self, value, key):
        """The same for the pictures in the parts of messages, at any depth."""
        if isinstance(value, list):
            return [self.name_parts(part, key) for part in value]
        if not isinstance(value, dict):
            return value
        named = {name: self.name_parts(part, key) for name, part in value.items()}
        if value.get("type") not in ("image", "image_url"):
            return named
        for name in PART_PICTURES:
            place = value.get(name)
            if isinstance(place, dict) and "url" in place:
                named[name] = place | {"url": self.name_of(place["url"], key)}
            elif not is_absent(place):
                named[name] = self.name_of(place, key)
        return named

    def name_of(self, value, key):
        """The name in the tar of one picture; key: its column, for errors."""
        content = value
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            content = value.get("path") if value.get("bytes") is None else value["bytes"]
        if not isinstance(content, bytes):
            content = self.read(checked_image_name(content, key), key)
        return self.names.setdefault(
            content, f"{self.key}.{len(self.names)}.{image_type(content)}")

    def read(self, name, key):
        """The bytes of a picture that is a file, or base64."""
        try:
            source = picture_source(self.root, name)
            if isinstance(source, bytes):
                return source
            check_file(source)
            check_size(source.stat().st_size, source)
            return source.read_bytes()
        except ValueError as e:
            raise ValueError(f"{key}: {e}") from None
        except OSError as e:
            if is_passing(e):
                raise
            raise ValueError(f"{key}: {e.strerror} ({e.filename}); mend its path or remove the "
                             "row") from None


def is_absent(value):
    """Whether there is no picture in a value."""
    if isinstance(value, dict):
        return all(part is None for part in value.values())
    return is_empty(value)


def holds_bytes(value):
    """Whether a value is a picture, or a list of which one is."""
    if isinstance(value, list):
        return any(map(holds_bytes, value))
    return isinstance(value.get("bytes") if isinstance(value, dict) else value, bytes)
