"""Build the index beside a source: where each row is, how long, and how large its images are.

The index is built once, by whichever process comes first, and again when the source or the
tokenizer changed. Readers map it into memory (inputs/records.py).
"""
import collections
import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import stat
import sys
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

from inputs.chat import check_pictures, image_names, row_segments
from inputs.files import (
    atomic_write,
    file_hash,
    json_hash,
    printable,
    read_json,
    write_atomic,
)
from inputs.images import IMAGE_SUFFIXES, image_size
from inputs.records import (
    IMAGE,
    ROW,
    ROW_READERS,
    UNREADABLE,
    Record,
    Source,
    add_caption,
    map_index,
    parse_row,
    read_record,
    record_pictures,
    tar_record,
)
from inputs.row_keys import short, unknown_keys
from inputs.tars import MAX_BYTES, check_size, open_tar, tar_key, tar_members

COMPRESSED = (".gz", ".tgz", ".zst", ".xz", ".bz2", ".zip", ".lz4", ".parquet", ".arrow")
# Rises when rows are read in another way, so that older indexes are not believed.
READING_RULES = 4
# So many unknown keys of a source are named.
UNKNOWN_KEYS = 20
# Records that one process measures at a time: about a second of work.
RECORDS_PER_TASK = 20_000


def open_source(path, tokenizer, template, name="", root=None, sha256=""):
    """The Source of a file or folder.

    Builds its index first if that is missing or old, which takes minutes for millions of rows.
    Raises FileNotFoundError, or ValueError if the whole source cannot be read. Rows that cannot
    be read are listed in `meta["bad"]`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data source {path} does not exist")
    if path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{path} is compressed, and rows are read by their place in a file; "
                         "unpack it")
    root = Path(root or (path if path.is_dir() else path.parent))
    folder = index_folder(path, root, tokenizer, template, sha256)
    source = Source(name or path.stem, path, root, folder, sha256=sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        complete = (folder / "meta.json").exists()
        if not complete or a_bad_row_is_readable_now(source, tokenizer, template):
            build_index(source, tokenizer, template)
    source.meta = read_json(folder / "meta.json")
    return source


def index_folder(path, root, tokenizer, template, sha256):
    """The folder of a source's index; its name is a hash of all that the index depends on."""
    here = path.resolve()
    files = [here]
    if here.is_dir():
        # The indexes that lie in the folder are no part of it.
        files = [f for f in sorted(here.rglob("*")) if "/." not in f"/{f.relative_to(here)}"]
    # "pixels" is a constant today. It stays, so that an index built before is still found.
    about = [str(here), str(root.resolve()), tokenizer.hash, template, "pixels", sha256]
    for file in files:
        # A file may be a dangling link, or gone meanwhile.
        with contextlib.suppress(OSError):
            known = file.stat()
            if stat.S_ISREG(known.st_mode):
                about.append([str(file), known.st_size, known.st_mtime_ns])
    # Data may lie where nobody may write.
    beside = path.parent if os.access(path.parent, os.W_OK) else Path("shards/index")
    return beside / f".{path.name}.index-{json_hash([*about, ROW.descr, READING_RULES])[:12]}"


def a_bad_row_is_readable_now(source, tokenizer, template):
    """Whether a row that was unreadable can be read: its picture is there now.

    A tar changes only as a whole, and then has another index.
    """
    if source.is_tar:
        return False
    for bad in read_json(source.index / "meta.json")["bad"]:
        with contextlib.suppress(*UNREADABLE):
            offset, size, *_ = source.rows[bad["row"]].item()
            row = parse_row(source.read(offset, size), False)
            measure_row(source, row, Record(offset, size), tokenizer, template, {})
            map_index.cache_clear()
            return True
    return False


def build_index(source, tokenizer, template):
    """Write rows.bin, images.bin and, last, meta.json, which says that the index is complete.

    A long source is read on all cores, with the same result.
    """
    if source.sha256:
        found = file_hash(source.path)
        if found != source.sha256.lower():
            raise ValueError(f"{source.path} has sha256 {found}, its meta file says "
                             f"{source.sha256}; copy it again")
    n_images = 0
    bad = []
    unknown = collections.Counter()
    row_hash = hashlib.sha256()
    image_hash = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        # Both are renamed when they are complete: a run may have the old ones mapped.
        row_file = stack.enter_context(atomic_write(source.index / "rows.bin", "wb"))
        image_file = stack.enter_context(atomic_write(source.index / "images.bin", "wb"))
        bar = stack.enter_context(
            tqdm(desc=f"index {printable(source.path.name)}", unit=" rows", leave=False))
        for rows, images, unreadable, keys in measure_all(source, tokenizer, template, stack):
            rows["first_image"] += n_images
            n_images += len(images)
            bad += unreadable
            unknown += keys
            row_file.write(rows.tobytes())
            row_hash.update(rows.tobytes())
            image_file.write(images.tobytes())
            image_hash.update(images.tobytes())
            bar.update(len(rows))
    digest = json_hash([row_hash.hexdigest(), image_hash.hexdigest()])
    meta = {"bad": bad, "digest": digest, "unknown": dict(unknown.most_common(UNKNOWN_KEYS))}
    write_atomic(source.index / "meta.json", json.dumps(meta))


# ---- finding records ----------------------------------------------------------------------------

def find_records(source):
    """Yield the Record of every row of a source, in order."""
    if source.is_tar:
        yield from tar_records(source.path)
        return
    if source.lines != source.path:
        read_rows = folder_rows
        if not source.path.is_dir():
            read_rows = ROW_READERS[source.path.suffix.lower()]
        with atomic_write(source.lines) as file:
            for row in read_rows(source.path):
                file.write(json.dumps(row) + "\n")
    with open(source.lines, "rb") as file:
        start = 0
        while line := file.readline(MAX_BYTES):
            # A longer line is not kept, only its length is counted: the row will be refused.
            part = line
            while part and not part.endswith(b"\n"):
                part = file.readline(MAX_BYTES)
            end = file.tell()
            if line.strip():
                yield Record(start, end - start)
            start = end


def tar_records(path):
    """Yield the Record of every group of members that share a key. Nothing is extracted."""
    with open_tar(path) as tar:
        # Links and devices are no data.
        members = (member for member in tar_members(tar) if member.isreg())
        for _, group in itertools.groupby(members, tar_key):
            yield tar_record(group)


def folder_rows(folder):
    """Yield a row for every picture of a folder, described by the .json or .txt beside it."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                described = read_description(path)
            except (ValueError, OSError) as e:
                # The row is listed as unreadable when it is measured.
                described = {"unreadable": str(e)}
            yield {"id": path.stem, **described, "image": str(path.relative_to(folder))}


def read_description(path):
    """The row of a picture in the .json and the .txt of its stem, read as those of a tar are."""
    found = {}
    for suffix in (".json", ".txt"):
        file = path.with_suffix(suffix)
        if file.exists():
            check_size(file.stat().st_size, f"{file.name}, a row")
            found[suffix] = file.read_bytes()
    row = {"caption": ""}
    if ".json" in found:
        row = parse_row(found[".json"], False)
    if ".txt" in found:
        row = add_caption(row, found[".txt"])
    names = image_names(row)
    if any(os.path.basename(name) != path.name for name in names):
        raise ValueError(f"{path.stem}.json names {', '.join(map(short, names))}; in a folder a "
                         "picture is described by the files of its own stem, mend its name")
    return row


# ---- measuring them -----------------------------------------------------------------------------

def measure_all(source, tokenizer, template, stack):
    """Yield (rows, images, bad, unknown) of measure_records for all records of a source, in order.

    The first RECORDS_PER_TASK are measured in this process. If there are more, a pool of processes
    takes them; `stack` ends it.
    """
    records = find_records(source)
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    pool = None
    waiting = collections.deque()
    told = []  # whether a killed process has been told of
    first = 0
    while task := list(itertools.islice(records, RECORDS_PER_TASK)):
        if pool is None and first > 0 and cores > 1:
            # Fresh processes: a fork would copy the threads' locks.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                cores, context, start_indexer, (tokenizer, template)))
        if pool is None:
            yield measure_records(source, task, first, tokenizer, template)
        else:
            waiting.append((submit(pool, source, task, first), task, first))
        first += len(task)
        if len(waiting) > 2 * cores:
            yield result_of(*waiting.popleft(), source, tokenizer, template, told)
    for future, task, number in waiting:
        yield result_of(future, task, number, source, tokenizer, template, told)


def submit(pool, source, task, first):
    """A Future of measure_task, or None if a process of the pool was killed."""
    try:
        return pool.submit(measure_task, source, task, first)
    except concurrent.futures.BrokenExecutor:
        return None


def result_of(future, task, first, source, tokenizer, template, told):
    """What a Future brings. If its process was killed, this one measures the records itself."""
    with contextlib.suppress(concurrent.futures.BrokenExecutor):
        if future:
            return future.result()
    if not told:
        print(f"WARNING: {source.path}: a process that measured records was killed (out of "
              f"memory?); from record {first} on this one does", file=sys.stderr, flush=True)
        told.append(True)
    return measure_records(source, task, first, tokenizer, template)


# (tokenizer, template) of this process, if it is one of the pool
INDEXER = None


def start_indexer(tokenizer, template):
    """Set a process of the pool up. It gets the tokenizer once, which is large."""
    global INDEXER
    INDEXER = (tokenizer, template)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    # Where the parent is killed, nobody would end the pool.
    threading.Thread(target=end_with_parent, daemon=True).start()


def measure_task(source, records, first):
    """measure_records in a process of the pool."""
    return measure_records(source, records, first, *INDEXER)


def measure_records(source, records, first, tokenizer, template):
    """(rows, images, bad, unknown) of some records in order.

    They are arrays of ROW and IMAGE, a list of dicts, and a Counter of keys that are not known.
    first: the number of the first of them. A row's `first_image` counts from there.
    """
    rows = []
    images = []
    bad = []
    unknown = collections.Counter()
    known_sizes = {}
    with open(source.lines, "rb") as file:
        for i, record in enumerate(records, first):
            place = (record.offset, record.size)
            is_text = record.is_text
            try:
                row, is_text = read_record(file, record)
                tokens, found = measure_row(source, row, record, tokenizer, template, known_sizes)
                unknown.update(unknown_keys(row))
                if is_text and record.caption:
                    place = record.caption
            except UNREADABLE as e:
                reason = str(e) if type(e) is ValueError else f"{type(e).__name__}: {e}"
                bad.append({"source": source.name, "row": i, "reason": reason[:300]})
                place = (record.offset, min(record.size, 2 ** 31 - 1))
                tokens = -1
                found = []
            rows.append((*place, tokens, len(images), len(found), is_text))
            images += found
    return np.array(rows, ROW), np.array(images, IMAGE), bad, unknown


def measure_row(source, row, record, tokenizer, template, known_sizes):
    """(tokens apart from visual ones, [(offset, size, width, height) of each image]) of a row.

    known_sizes: {name: size} of pictures measured before. Raises one of UNREADABLE.
    """
    images = []
    if record.pictures is None:
        for name in image_names(row):
            if name not in known_sizes:
                known_sizes[name] = size_of_file(source.root / name, name)
            images.append((0, 0, *known_sizes[name]))
    else:
        for _, place in record_pictures(record, row):
            images.append((*place, *image_size(source.read(*place))))
    check_pictures(row, len(images))
    parts = row_segments(row, tokenizer, template, [0] * len(images), 0)
    return sum(len(ids) for ids, _ in parts), images


def size_of_file(path, name):
    """(width, height) of a picture's file; ValueError that names it as the row does."""
    try:
        return image_size(path)
    except OSError as e:
        raise ValueError(f"image {name}: {e.strerror} ({path}); mend its path or remove "
                         "the row") from None
