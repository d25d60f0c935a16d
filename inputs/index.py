"""The index beside a source: where each row is, how long, and how large its images are.

The index is built once, by whichever process comes first, and again when the source, its pictures
or the tokenizer changed, or when the index itself is damaged. Readers map it into memory
(inputs/records.py).
"""
import bisect
import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import os
import platform
import shutil
import stat
import sys
from pathlib import Path

from tqdm import tqdm

from inputs.building import Building
from inputs.files import (
    atomic_write,
    check_file,
    file_crc,
    file_hash,
    json_hash,
    printable,
    read_json,
    write_atomic,
)
from inputs.folders import folder_files, folder_rows
from inputs.images import IMAGE_SUFFIXES
from inputs.locks import lock_first
from inputs.measure import measure_all, measure_row
from inputs.parquet import converted_parquet
from inputs.patience import is_passing
from inputs.picture_names import image_names
from inputs.records import (
    ROW,
    ROW_READERS,
    UNREADABLE,
    Record,
    Source,
    forget_maps,
    parse_row,
    tar_record,
)
from inputs.tars import MAX_BYTES, open_tar, tar_key, tar_members

COMPRESSED = (".gz", ".tgz", ".zst", ".xz", ".bz2", ".zip", ".lz4", ".arrow")
# Rises when rows are read in another way, so that older indexes are not believed.
READING_RULES = 6
# Pictures of a source whose files are looked at when it is opened.
LOOKED_AT = 256
# Where the index of data goes that lie where nobody may write.
INDEX_HOME = Path("shards/index")
# Folders of which this process has said that no index can be written there.
PLACES_TOLD = set()


def open_source(path, tokenizer, template, name="", root=None, sha256=""):
    """The Source of a file or folder.

    Builds its index first if that is missing, old or damaged, which takes minutes for millions of
    rows. Raises FileNotFoundError, or ValueError if the whole source cannot be read. Rows that
    cannot be read are listed in `meta["bad"]`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data source {path} does not exist")
    if not path.is_dir():
        check_file(path)
    if path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{path} is compressed, and rows are read by their place in a file; "
                         "unpack it")
    root = Path(root or (path if path.is_dir() else path.parent))
    homes = [path.parent, INDEX_HOME]
    converted = None
    if path.suffix.lower() == ".parquet" and path.is_file():
        converted = converted_parquet(path, root, homes)
    index = index_name(path, root, tokenizer, template, sha256, converted)
    sources = []
    for home in homes:
        sources.append(Source(name or path.stem, path, root, home / index, sha256=sha256,
                              converted=converted))
    for source in sources:
        if not index_problem(source, tokenizer, template):
            break
    else:
        source = make_index(sources, tokenizer, template)
    source.meta = read_json(source.index / "meta.json", dict, most=None)
    return source


def index_name(path, root, tokenizer, template, sha256, converted=None):
    """The name of a source's index: a hash of the source, then one of how its rows are read."""
    here = path.resolve()
    source = [str(here), str(root.resolve()), sha256]
    files = [(str(here), here.stat())]
    if here.is_dir():
        files = folder_files(here, collections.Counter())
    if converted:
        files.append((str(converted), converted.stat()))
    for file, known in files:
        if stat.S_ISREG(known.st_mode):
            source.append([file, known.st_size, known.st_mtime_ns])
    reading = [tokenizer.hash, template, ROW.descr, READING_RULES]
    return f".{path.name}.index-{json_hash(source)[:12]}-{json_hash(reading)[:8]}"


def indexes_of(source):
    """The source with each of its indexes that are whole, its own first.

    There is one for each tokenizer and template with which it was read.
    """
    found = [source]
    same_source = source.index.name.rpartition("-")[0]
    for place in (source.path.parent, INDEX_HOME):
        for folder in place.glob(f"{glob.escape(same_source)}-*"):
            other = dataclasses.replace(source, index=folder)
            with contextlib.suppress(ValueError, OSError):
                other.meta = read_json(folder / "meta.json", dict, most=None)
                if folder != source.index and not index_damage(other):
                    found.append(other)
    return found


# ---- whether it is good -------------------------------------------------------------------------

NOT_THERE = "no index"


def index_problem(source, tokenizer, template):
    """Why the index of a source cannot be used, as text; "" if it can."""
    about = source.index / "meta.json"
    if not os.access(about, os.R_OK):
        return NOT_THERE
    try:
        source.meta = read_json(about, dict, most=None)
        damage = index_damage(source)
    except (ValueError, OSError) as e:
        damage = str(e)
    if damage:
        return f"its index is damaged ({damage})"
    # A tar changes only as a whole, and then has another index.
    if source.is_tar:
        return ""
    changed = changed_picture(source)
    if changed:
        return f"pictures changed since they were measured ({printable(changed)})"
    if a_bad_row_is_readable_now(source, tokenizer, template):
        return "a row that could not be read is readable now"
    return ""


def index_damage(source):
    """Which file of an index is not as it was written, or "".

    A gigabyte is read in less than a second: 14 million rows with a picture each.
    """
    checked = {key: value for key, value in source.meta.items() if key != "check"}
    if source.meta.get("check") != json_hash(checked):
        return "meta.json"
    for name, crc in source.meta["files"].items():
        if file_crc(source.index / name) != crc:
            return name
    return ""


def changed_picture(source):
    """The name of a picture whose file is not as it was when it was measured, or "".

    LOOKED_AT pictures are looked at, evenly spread: a million calls of the file system at every
    start of every rank would take too long. The others are compared when they are read, and by
    `data.py check`.
    """
    rows = source.rows
    n = len(source.stats)
    for j in range(0, n, max(1, n // LOOKED_AT)):
        # A picture inside its row has no file.
        if source.stats[j].item() == (0, 0):
            continue
        # The row that has image j.
        i = bisect.bisect_right(range(len(rows)), j, key=lambda k: rows[k]["first_image"]) - 1
        name = "its row"
        try:
            name = image_names(source.row(i))[j - int(rows[i]["first_image"])]
            about = os.stat(source.root / name)
            if (about.st_size, about.st_mtime_ns) != source.stats[j].item():
                return name
        except UNREADABLE as e:
            # A file system that is away for a while has changed nothing.
            if not is_passing(e):
                return name
    return ""


def a_bad_row_is_readable_now(source, tokenizer, template):
    """Whether a row that was unreadable can be read: its picture is there now."""
    for bad in source.meta["bad"]:
        with contextlib.suppress(*UNREADABLE):
            offset, size, *_ = source.rows[bad["row"]].item()
            row = parse_row(source.read(offset, size), False)
            measure_row(source, row, Record(offset, size), tokenizer, template, {})
            return True
    return False


# ---- building it --------------------------------------------------------------------------------

def make_index(sources, tokenizer, template):
    """Build an index in the first place that can be written; returns the Source of that place.

    sources: the same one with each of the places. ValueError, with what to do, if none can be
    written.
    """
    folders = [source.index for source in sources]
    number, lock, locked, refused = lock_first(folders, f"index of {sources[0].path}")
    source = sources[number]
    with lock:
        # Another process may have built it meanwhile.
        forget_maps()
        problem = index_problem(source, tokenizer, template)
        if problem:
            tell_of_index(source, problem, refused)
            build_index(source, tokenizer, template, locked)
    return source


def tell_of_index(source, problem, refused):
    """Say why an index is made again, and where it goes if not beside its source."""
    if problem != NOT_THERE:
        print(f"{source.path}: {problem}; the index is made again", file=sys.stderr, flush=True)
    if refused and source.path.parent not in PLACES_TOLD:
        PLACES_TOLD.add(source.path.parent)
        print(f"indexes cannot be written beside their data ({refused[0]}); they go to "
              f"{source.index.parent.absolute()}", file=sys.stderr, flush=True)


def build_index(source, tokenizer, template, locked):
    """Write the files of an index and, last, meta.json, which says that it is complete.

    A build that was stopped goes on behind the records that were measured. locked: no other
    process can be at it.
    """
    if source.sha256:
        found = file_hash(source.path)
        if found != source.sha256.lower():
            raise ValueError(f"{source.path} has sha256 {found}, its meta file says "
                             f"{source.sha256}; copy it again")
    name = "building" if locked else f"building-{platform.node()}-{os.getpid()}"
    draft = dataclasses.replace(source, index=source.index / name)
    draft.index.mkdir(exist_ok=True)
    unread = collections.Counter()
    records = find_records(draft, unread)
    with contextlib.ExitStack() as stack:
        building = Building(draft.index, stack)
        n = building.n_rows
        title = f"index {printable(source.path.name)}"
        if n:
            print(f"{title}: goes on behind row {n:,}, where it was stopped", file=sys.stderr,
                  flush=True)
            collections.deque(itertools.islice(records, n), 0)
        bar = stack.enter_context(tqdm(desc=title, unit=" rows", leave=False, initial=n))
        for found in measure_all(draft, records, n, tokenizer, template, stack):
            building.add(found)
            bar.update(len(found.rows))
        meta = building.finish(source.index)
    if draft.lines.parent == draft.index:
        meta["files"][draft.lines.name] = file_crc(draft.lines)
        os.replace(draft.lines, source.lines)
    meta["unread"] = dict(unread)
    meta["check"] = json_hash(meta)
    write_atomic(source.index / "meta.json", json.dumps(meta))
    shutil.rmtree(draft.index, ignore_errors=True)
    forget_maps()


# ---- finding records ----------------------------------------------------------------------------

def find_records(source, unread):
    """Yield the Record of every row of a source, in order.

    unread: a Counter of the files that are not read, by their suffix.
    """
    if source.is_tar:
        yield from tar_records(source.lines, unread)
        return
    if source.lines != source.path:
        if source.path.is_dir():
            rows = folder_rows(source.path, unread)
        else:
            rows = ROW_READERS[source.path.suffix.lower()](source.path)
        with atomic_write(source.lines) as file:
            for row in rows:
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


def tar_records(path, unread):
    """Yield the Record of every group of members that share a key. Nothing is extracted."""
    with open_tar(path) as tar:
        members = regular_members(tar, unread)
        for _, group in itertools.groupby(members, tar_key):
            yield tar_record(group)


def regular_members(tar, unread):
    """Yield the members of a tar that may be data; count those that are not read."""
    for member in tar_members(tar):
        suffix = os.path.splitext("name" + os.path.basename(member.name))[1].lower()
        if not member.isreg():
            unread["links and devices"] += 1
        else:
            if suffix not in (*IMAGE_SUFFIXES, ".json", ".txt"):
                unread[suffix or "no suffix"] += 1
            yield member
