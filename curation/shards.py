"""Shards of captioned pictures: find the inputs, read their records, write an output shard.

A shard is a WebDataset tar. A record of it is KEY.json with the row and KEY.jpg with the picture.
"""
import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

from curation.rows import row_problem
from data import TOY_TOKENIZER
from evals.endpoint import reply_key
from inputs import files
from inputs.images import IMAGE_SUFFIXES, image_type
from inputs.picture_names import image_names
from inputs.records import UNREADABLE, Source, read_place, read_record, record_pictures, tar_record
from inputs.sources import expand_paths, open_sources
from inputs.tars import MAX_BYTES, add_record, open_tar, tar_key, tar_members
from inputs.tokenizer import Tokenizer

# Limit of a record's .json and .txt. Python needs up to 25 times as much memory to read one.
MAX_JSON_BYTES = 4 * 2**20
# An id that may name the files of a record; row-000001 is for the others.
RECORD_KEY = re.compile(r"(?!row-)[\w-]{1,80}", re.ASCII)


class DamagedShard(ValueError):
    """An input that cannot be read to its end. The other shards go on."""


class PostponedShard(ValueError):
    """A shard that is made when the others are. Raised again then, it ends the stage."""


class ShardRecord(NamedTuple):
    """One row with its pictures on the way through a stage."""
    row: dict
    pictures: dict  # {file name: bytes}
    reason: str | None  # why the record is dropped; None: it is kept


@dataclasses.dataclass(slots=True)
class InputShard:
    """What becomes one output shard: a tar, or the rows start..stop of a source."""
    name: str  # of the output shard
    path: Path  # of the input file
    origin: str = ""  # name of the data set
    source: Source | None = None  # None: all records of the tar at path
    start: int = 0
    stop: int = 0


# ---- find ----------------------------------------------------------------------------------------


@functools.cache
def index_tokenizer():
    """The tokenizer that the index of a source is made with.

    The index of a training source counts tokens. Curation does not use these counts, so any
    vocabulary does; it takes the one that comes with the repository.
    """
    if not Path(TOY_TOKENIZER).is_dir():
        raise FileNotFoundError(
            f"{TOY_TOKENIZER} is missing, and rows that are not in tars are indexed with it; "
            "get it back, or give --in= shards (.tar) alone")
    return Tokenizer(TOY_TOKENIZER)


def find_input_shards(cfg, spec=""):
    """All input shards that a spec like --in names (default: --in itself), in order.

    ValueError if there is none, or if two output shards would get one name.
    """
    shards = []
    for name, path in expand_paths(spec or cfg.in_):
        tars = find_tars(path)
        for tar in tars:
            stem = f"{name}-{tar.stem}" if name else tar.stem
            shards.append(InputShard(stem, tar, name or tar.parent.name))
        if not tars:
            shards += find_row_shards(name, path, cfg.shard_size)
    for shard in shards:
        shard.name = shard.name.replace("/", "_")

    if not shards:
        raise ValueError("nothing to read: give --in=PATTERN of shards (.tar), a folder, "
                         ".jsonl or .json")
    counts = collections.Counter(shard.name for shard in shards)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(f"two inputs are called {name}: write --in=NAME=path,OTHER=path")
    return shards


def find_tars(path):
    """The tars of a folder, or the tar itself; [] if the path is another kind of source."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" and path.exists() else []


def find_row_shards(name, path, shard_size):
    """Shards of shard_size rows each of a .jsonl, .json or folder of pictures."""
    spec = f"{name}={path}" if name else str(path)
    shards = []
    for source in open_sources(spec, index_tokenizer(), "sailvl-chat"):
        if source.is_tar:  # an entry of a meta file
            shards.append(InputShard(source.name, source.lines, source.name))
            continue
        n_rows = len(source.rows)
        for k, start in enumerate(range(0, n_rows, shard_size)):
            stop = min(start + shard_size, n_rows)
            shard_name = f"{source.name}-{k:06d}"
            shards.append(InputShard(shard_name, source.path, source.name, source, start, stop))
    return shards


def input_state(shard):
    """[size, time of change] of a shard's input file: what makes a finished shard out of date."""
    stat = shard.path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def all_inputs_hash(cfg):
    """A hash of the names and states of all input shards."""
    states = [[shard.name, *input_state(shard)] for shard in find_input_shards(cfg)]
    return reply_key("inputs", states, None)


# ---- read ----------------------------------------------------------------------------------------


def read_records(shard, fields=("id",), with_pictures=True):
    """Yield every record of an input shard, in order.

    A record that cannot be taken comes with the reason and without pictures; fields: those of the
    row that the stage reads (see row_problem). with_pictures=False reads the rows alone. Raises
    DamagedShard if the file cannot be read to its end.
    """
    read_all = read_source_rows if shard.source else read_tar_records
    for record in read_all(shard, with_pictures):
        reason = record.reason or row_problem(record.row, fields, len(record.pictures))
        yield ShardRecord(record.row, {}, reason) if reason else record


def read_tar_records(shard, with_pictures):
    """The records of a shard that is a tar."""
    try:
        with open_tar(shard.path) as tar, open(shard.path, "rb") as file:
            for key, group in itertools.groupby(tar_members(tar), tar_key):
                yield read_tar_record(file, key, list(group), with_pictures)
    except (ValueError, OSError, EOFError) as e:
        message = str(e)
        if str(shard.path) not in message:
            message = f"{shard.path}: {message}"
        raise DamagedShard(message) from None


def in_blocks(records, size):
    """Yield an iterator's records in lists of `size`; the last may be shorter."""
    while True:
        block = list(itertools.islice(records, size))
        if not block:
            return
        yield block


def read_source_rows(shard, with_pictures):
    """The records of a shard that is part of a source."""
    source = shard.source
    for i in range(shard.start, shard.stop):
        row = {"id": f"{source.name}:{i}"}
        try:
            update_row(row, source.row(i))
            pictures = {}
            for k, name in enumerate(image_names(row)):
                content = source.image(i, k, row) if with_pictures else b""
                pictures[f"{k}/{name}"] = content
            yield ShardRecord(row, pictures, None)
        except UNREADABLE as e:
            yield bad_record(row, e, "no_such_file" if isinstance(e, OSError) else "bad_row")


def read_tar_record(file, key, members, with_pictures):
    """The record of these members of a tar, read in place as training reads it."""
    row = {"id": os.path.basename(key)}
    reason = members_problem(members)
    if reason:
        return ShardRecord(row, {}, reason)
    record = tar_record(members)
    try:
        if record.has_text or record.problem:
            found, _ = read_record(file, record)
            if record.caption and "caption" in found:
                row["caption"] = None  # its place in the row, before what the .json holds
            update_row(row, found)
        pictures = {}
        for k, (name, place) in enumerate(record_pictures(record, row)):
            content = read_place(file, *place, "a picture") if with_pictures else b""
            pictures[f"{k}/{name}"] = content
    except UNREADABLE as e:
        return bad_record(row, e, "bad_record" if record.problem else "bad_row")
    return ShardRecord(row, pictures, None)


def bad_record(row, error, reason):
    """The record of a row that cannot be read; `why` in the row says it in words."""
    why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return ShardRecord({**row, "why": why[:300]}, {}, reason)


def update_row(row, found):
    """Put what was read into a row, which has an id already; an id of null is none."""
    if found.get("id") is None:
        found.pop("id", None)
    row |= found


def members_problem(members):
    """Why the members of a record are refused, or None."""
    reason = None
    size = 0
    for member in members:
        size += member.size
        reason = member_problem(member, size) or reason
    return reason


def member_problem(member, record_size):
    """Why a member of a tar is refused, or None. record_size: bytes of the record up to it.

    Its name could point out of a folder, a link or device at any file, and a header can claim any
    size.
    """
    if not member.isreg():
        return "link_or_device"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "unsafe_name"
    if record_size > MAX_BYTES:
        return "too_big"
    if member.name.lower().endswith((".json", ".txt")) and member.size > MAX_JSON_BYTES:
        return "too_big"
    return None


# ---- write ---------------------------------------------------------------------------------------


def write_output_shard(out, shard, process):
    """Write all that process(shard, counts) yields: kept records to a tar, the others to a .jsonl.

    All files are on the disk before the first gets its name, and the shard itself is named last. A
    process that is killed leaves no shard, or a whole one. counts: a Counter that goes into
    .shards/NAME.json.
    """
    start = time.time()
    counts = collections.Counter({"in": 0, "out": 0})
    new_shard = out / ".shards" / f"{shard.name}.tar"
    new_dropped = out / "dropped" / f"{shard.name}.tmp"
    with (
        files.open_long(new_shard, "wb") as file,
        files.open_long(new_dropped, "w", encoding="utf-8", errors="replace") as dropped,
    ):
        tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        keys = set()
        for record in process(shard, counts):
            counts["in"] += 1
            if record.reason:
                line = json.dumps({**record.row, "reason": record.reason}, ensure_ascii=False)
                with files.naming(new_dropped):
                    dropped.write(line + "\n")
                counts[f"dropped {record.reason}"] += 1
            else:
                with files.naming(new_shard):
                    add_to_shard(tar, record, keys)
                counts["out"] += 1
        with files.naming(new_shard):
            tar.close()
        flush_to_disk(file)
        flush_to_disk(dropped)

    facts = {**counts, "seconds": time.time() - start, "input": input_state(shard)}
    facts["output"] = [new_shard.stat().st_size, new_dropped.stat().st_size]
    # An older shard was made of an input that has changed since.
    (out / f"{shard.name}.tar").unlink(missing_ok=True)
    os.replace(new_dropped, out / "dropped" / f"{shard.name}.jsonl")
    files.write_atomic(out / ".shards" / f"{shard.name}.json", json.dumps(facts))
    os.replace(new_shard, out / f"{shard.name}.tar")


def flush_to_disk(file):
    with files.naming(file.name):
        file.flush()
        os.fsync(file.fileno())


def add_to_shard(tar, record, keys):
    """Add one record to an open tar. keys: those of the records before it, extended by its own.

    Its key is its id if that can be a file name and is new, else its number.
    """
    key = str(record.row["id"])
    if not RECORD_KEY.fullmatch(key) or key in keys:
        key = f"row-{len(keys):06d}"
    keys.add(key)
    pictures = [(picture_suffix(name, data), data) for name, data in record.pictures.items()]
    add_record(tar, key, record.row, pictures)


def picture_suffix(name, content):
    """The suffix by which the next stage knows a picture: its own, else that of its format."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix
    return f".{image_type(content)}"
