"""Benchmark files: fetching them, their rows, their pictures; the folder of an evaluation.

A file is a .tsv of VLMEvalKit's: columns index, question, answer and others, pictures as base64.
Gigabytes of pictures stay in the file; of each only its place is kept. A file of one's own may
also be a .jsonl (evals/json_rows.py).
"""
import base64
import binascii
import csv
import http.client
import io
import itertools
import os
import random
import re
import shutil
import sys
import time
import urllib.request
from pathlib import Path

from tqdm import tqdm

from evals.json_rows import PictureCell, json_pictures, read_json_rows
from evals.scorers import as_list
from evals.totals import together
from inputs.files import NO_ROOM, check_file, file_hash, write_atomic
from inputs.images import load_image, open_image
from inputs.locks import take_folder
from training.distributed import rank_variable

# DATASET_URL of vlmeval/dataset/image_mcq.py and its like.
ADDRESS = "https://opencompass.openxlab.space/utils"
# What stands before the base64 in a data URI.
DATA_URI = re.compile(r"data:[^,]{,99};base64,", re.IGNORECASE)
# An image cell of at most so many characters names the row that holds the picture.
REFERENCE_LENGTH = 64
# Of the rows that --limit takes.
SAMPLE_SEED = 1


QUESTION_FILES = (".tsv", ".jsonl", ".xlsx", ".xls")  # the last two are refused with what to do


class RowError(ValueError):
    """A row that cannot be asked: the message names row and column."""


# ---- downloads ----------------------------------------------------------------------------------

def download(b, folder, base=""):
    """Fetch a benchmark's file into `folder`, from where an earlier try stopped.

    base: a web folder that has all files, "" = where VLMEvalKit has each. Raises ValueError if
    the file cannot be fetched or its MD5 is not that of the protocol.
    """
    url = f"{base.rstrip('/') or f'{ADDRESS}/{b.folder}'}/{b.file_name}"
    path = Path(folder) / b.file_name
    part = path.with_name(f"{path.name}.part")
    by_hand = f"give another --download_from=URL or put {path} (MD5 {b.md5}) there by hand"
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, part)
    except (OSError, http.client.HTTPException) as e:
        # The disk is at fault, and not the server.
        if getattr(e, "errno", None) in NO_ROOM:
            raise OSError(e.errno, e.strerror, str(part)) from None
        # 416: nothing was left to send.
        if getattr(e, "code", 0) != 416:
            raise ValueError(f"{url}: {e}; run again to go on, or {by_hand}") from e
    found = file_hash(part, "md5")
    if found != b.md5:
        part.unlink()
        raise ValueError(f"{url}: MD5 {found} is not that of the protocol, removed; run again, or "
                         f"{by_hand}")
    os.replace(part, path)


def find_file(b, folder, may_download=False, base=""):
    """The path of a benchmark's file in `folder`, which is fetched if it may be."""
    path = Path(b.path or Path(folder) / b.file_name)
    # The first process fetches. If it fails, torchrun ends the others, which wait.
    while may_download and b.md5 and not path.exists():
        if rank_variable("RANK", 0):
            time.sleep(1)
        else:
            download(b, folder, base)
    if not path.exists():
        way = "`python -m toy` writes --data_dir"
        if b.md5:
            way = f"--download=True fetches it, or put it there (MD5 {b.md5})"
        raise FileNotFoundError(f"{path}: no such file; {way}")
    return path


def fetch(url, part):
    """Fetch what is missing of a file, with a progress bar. Raises OSError or HTTPException."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=60) as web:
        # 206: the rest comes. Any other status: the server sends all of it again.
        if web.status != 206:
            have = 0
        total = have + int(web.headers.get("Content-Length") or 0)
        name = part.name.removesuffix(".tsv.part")
        with (open(part, "ab" if have else "wb") as f,
              tqdm.wrapattr(f, "write", total=total, initial=have, desc=name, disable=None) as out):
            shutil.copyfileobj(web, out, 1 << 20)
    size = part.stat().st_size
    if size < total:
        raise OSError(f"cut off at {size} of {total} bytes")


# ---- rows ---------------------------------------------------------------------------------------

def records(path, start=0):
    """Yield (byte offset, line number, fields) of the records of a .tsv, from an offset on.

    Raises ValueError with the line.
    """
    def lines():
        for line in iter(f.readline, b""):
            at_start = f.tell() == len(line)
            yield line.decode("utf-8-sig" if at_start else "utf-8")
        # `start` is the offset of the record that is being read.
        if start < f.tell():
            raise csv.Error("a field's opening quotation mark has no partner; the rows after are "
                            "in it")

    # Pictures are base64 columns.
    csv.field_size_limit(2**31 - 1)
    check_file(path)
    with open(path, "rb") as f:
        f.seek(start)
        reader = csv.reader(lines(), delimiter="\t")
        try:
            for fields in reader:
                yield start, reader.line_num, fields
                start = f.tell()
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path} line {reader.line_num + 1}: not a UTF-8 tab-separated file: "
                             f"{e}") from e


def read_tsv(path, columns=()):
    """A .tsv -> (rows as dicts of strings, {index: [PictureCell, ...]}).

    The pictures stay in the file: the `image` of a row that has some becomes its index. columns:
    those that must be there beside index, question and answer. Raises ValueError with the line.
    """
    refuse_other_files(path)
    rows = {}
    cells = {}
    header = None
    for offset, line, fields in records(path):
        if header is None:
            header = fields
            check_header(path, header, ["index", "question", "answer", *columns])
            continue
        # An empty line; a spreadsheet writes it as tabs alone.
        if not any(fields):
            continue
        if len(fields) != len(header):
            raise ValueError(f"{path} line {line}: not {len(header)} columns")
        row = dict(zip(header, fields, strict=True))
        index = row["index"]
        if not index.strip():
            raise ValueError(f"{path} line {line}: its index is empty; number the rows")
        if index in rows:
            raise ValueError(f"{path} line {line}: index {index!r} stands twice")
        if len(row.get("image", "")) > REFERENCE_LENGTH:
            n_pictures = len(as_list(row["image"]))
            cells[index] = [PictureCell(Path(path), offset, k) for k in range(n_pictures)]
            row["image"] = index
        rows[index] = row
    if not rows:
        problem = "no rows under the line of column names" if header else "an empty file"
        raise ValueError(f"{path}: {problem}")
    return list(rows.values()), cells


def read_benchmark(path, columns=()):
    """The rows of a file of any kind, as read_tsv gives them."""
    if Path(path).suffix.lower() == ".jsonl":
        return read_json_rows(path)
    return read_tsv(path, columns)


def refuse_other_files(path):
    """Raise for a file that is not there or that is one of Excel."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; eval.py and `python -m toy` write such "
                                "files")
    if path.suffix.lower() in (".xlsx", ".xls"):
        code = (f"import pandas; pandas.read_excel(r'{path}', dtype=str, keep_default_na=False)"
                f".to_csv(r'{path}.tsv', sep='\\t', index=False)")
        raise ValueError(f'{path}: an Excel file; make a .tsv of it: python -c "{code}"')


def check_header(path, header, wanted):
    for name in wanted:
        n = header.count(name)
        if n != 1:
            problem = "more than 1" if n else "no"
            raise ValueError(f"{path}: {problem} column {name!r} in line 1")


def read_rows(path, b, limit=0):
    """The rows of a benchmark's split: [(row, pictures)], each picture a PictureCell or a Path.

    Under VLMEvalKit's protocols rows whose image cell is empty are left out (ImageBaseDataset of
    vlmeval/dataset/image_base.py). limit: so many questions, spread over the file; 0 = all.
    """
    all_rows, cells = read_benchmark(path, b.columns)
    rows = [row for row in all_rows if not b.split or row.get("split", b.split) == b.split]
    if not rows:
        raise ValueError(f"{path}: no rows of split {b.split!r}")
    asked = rows
    if b.jpeg:
        asked = [row for row in rows if row.get("image", True)]
    if not asked:
        raise ValueError(f"{path}: no rows with a picture")
    n_blank = len(rows) - len(asked)
    if n_blank:
        print(f"warning: {path}: {n_blank} rows without a picture are left out, as in VLMEvalKit",
              file=sys.stderr)
    if limit:
        asked = spread_sample(asked, limit, b)
    return [(row, row_pictures(path, row, cells)) for row in asked]


def spread_sample(rows, limit, b):
    """The rows of `limit` questions: a random one, always the same, of each stretch of the file.

    What counts together stays together, such as the rotations of a question (totals.together).
    """
    questions = {}
    for row in rows:
        questions.setdefault(together(b.total, row), []).append(row)
    kept = list(questions)
    if limit < len(kept):
        rng = random.Random(SAMPLE_SEED)
        ends = [len(kept) * k // limit for k in range(limit + 1)]
        kept = [kept[rng.randrange(start, end)] for start, end in itertools.pairwise(ends)]
    if rank_variable("RANK", 0) == 0:
        print(f"{b.name}: {len(kept)} of {len(questions)} questions are asked, spread over the "
              "file; --limit=0 asks all")
    chosen = set(kept)
    return [row for row in rows if together(b.total, row) in chosen]


def row_pictures(path, row, cells):
    """The pictures of a row: those of the rows that its image cell names, else its files."""
    if not row.get("image"):
        names = as_list(row.get("image_path", ""))
        return [Path(path).parent / name for name in names if name]
    pictures = []
    for name in as_list(row["image"]):
        if name not in cells:
            raise RowError(f"{path} row {row['index']}, column 'image': {name!r} is no row with a "
                           "picture; the path of a picture belongs in a column 'image_path'")
        pictures += cells[name]
    return pictures


def write_tsv(path, rows):
    """Write rows, all with the same columns, as a .tsv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


# ---- pictures -----------------------------------------------------------------------------------

def open_picture(row, place, jpeg=False):
    """Pillow RGB image of a picture of read_rows. Raises RowError.

    jpeg: as VLMEvalKit reads it, not rotated and alpha dropped (load_image of sail_vl.py). There
    a picture from the .tsv went through JPEG on the disk before (decode_base64_to_image_file of
    vlmeval/smp), unless its row names several files and this one is of another type.
    """
    is_file = isinstance(place, Path)
    try:
        if is_file:
            return _read_picture(place, jpeg)
        image = _read_picture(cell_bytes(place), jpeg)
        if not jpeg or _stays_as_it_is(row, place.number):
            return image
        file = io.BytesIO()
        image.save(file, "JPEG")
        return _read_picture(file.getvalue(), jpeg)
    except (ValueError, OSError) as e:
        column = "image_path" if is_file else "image"
        raise RowError(f"benchmark row {row['index']}, column {column!r}: {e}") from e


def cell_bytes(place):
    """The bytes of the picture file that a PictureCell points at."""
    if place.path.suffix.lower() == ".jsonl":
        images = json_pictures(place)
    else:
        _, _, header = next(records(place.path))
        _, _, fields = next(records(place.path, place.offset))
        images = as_list(fields[header.index("image")])
    return decode_base64(images[place.number])


def decode_base64(text):
    """Base64 -> bytes. The signs of URLs (-_), a data URI and absent padding are fine."""
    text = "".join(DATA_URI.sub("", text.strip(), count=1).split())
    text = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise ValueError(f"{text[:20]!r}... is no base64 of a picture ({e}); the path of a picture "
                         "belongs in a column 'image_path'") from None


def _read_picture(source, jpeg):
    if not jpeg:
        return load_image(source)
    with open_image(source) as image:
        return image.convert("RGB")


def _stays_as_it_is(row, number):
    """Whether VLMEvalKit stores a picture under a name whose type is not JPEG."""
    names = as_list(row.get("image_path", ""))
    if len(names) <= 1:
        return False
    name = names[number] if number < len(names) else ""
    return not name.lower().endswith((".jpg", ".jpeg"))


# ---- the folder of an evaluation ----------------------------------------------------------------

def lock_folder(folder):
    """Make the folder and hold it -> the open lock file, which lets go when it is closed.

    Raises ValueError naming who holds it.
    """
    return take_folder(folder, "eval.lock", "an evaluation, ")
