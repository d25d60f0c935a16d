"""--data=... -> sources."""
import glob
import os
import re
from pathlib import Path

from inputs.chat import TEMPLATES
from inputs.files import read_json
from inputs.images import MAX_TILES
from inputs.index import open_source
from inputs.row_keys import TURNS_KEYS, short

# Keys of an entry of InternVL's meta file, as its documentation has them, and two of ours: weight,
# the source's share of the samples, and sha256 of the annotation file.
META_KEYS = {
    "annotation": (str,),
    "root": (str,),
    "repeat_time": (int, float),
    "length": (int,),
    "data_augment": (bool,),
    "max_dynamic_patch": (int,),
    "weight": (int, float),
    "sha256": (str,),
}
META_MOST = {"max_dynamic_patch": MAX_TILES, "repeat_time": 1e6, "weight": 1e12, "length": 2**63}


def open_sources(spec, tokenizer, template):
    """Sources of `--data`: comma-separated `path` or `name=path`.

    A path may be .jsonl, .json (an array of rows or InternVL's meta file), .tar, .parquet, a folder
    of captioned images, or a pattern with `*` or `{000..012}`. Builds the indexes that are missing.
    """
    if template not in TEMPLATES:
        raise ValueError(f"--template={template}: unknown, choose from {', '.join(TEMPLATES)}")
    sources = []
    paths = expand_paths(spec) if spec.strip() else ()
    for name, path in paths:
        if is_meta_file(path):
            entries = read_json(path)
            if any(key in entries for key in TURNS_KEYS):
                raise ValueError(f"{path} holds one row, where a .json is an array of rows or a "
                                 "meta file; write [...] around it, or call it .jsonl")
            for key, entry in entries.items():
                sources.append(open_meta_entry(path, key, entry, tokenizer, template))
        else:
            sources.append(open_source(path, tokenizer, template, name))
    if not sources:
        raise ValueError("no data: give --data=PATH (.jsonl, .json, .tar, .parquet, a folder, or a "
                         "pattern)")
    return sources


def source_notes(sources, most=None):
    """A line for each source of which something is not read, or has no picture, or is odd.

    most: of so many sources; one more line says how many others there are.
    """
    lines = []
    for source in sources:
        notes = list(source.notes)
        rows = source.rows
        n_blind = int(((rows["n_images"] == 0) & (rows["tokens"] >= 0)).sum())
        if n_blind:
            notes.append(f"{n_blind:,} of {len(rows):,} rows without a picture")
        unknown = source.meta.get("unknown")
        if unknown:
            keys = ", ".join(f"{key} ({n:,})" for key, n in unknown.items())
            notes.append(f"keys that are not read, and their rows: {keys}")
        unread = source.meta.get("unread")
        if unread:
            kinds = ", ".join(f"{short(kind)} ({n:,})" for kind, n in sorted(unread.items()))
            notes.append(f"files that are not read: {kinds}")
        if notes:
            lines.append(f"{short(source.name)}: {'; '.join(notes)}")
    if most is not None and len(lines) > most:
        rest = f"and {len(lines) - most:,} other sources with such notes, which data.py check names"
        lines = [*lines[:most], rest]
    return lines


# ---- paths --------------------------------------------------------------------------------------

def expand_paths(spec):
    """Yield (name or "", path) of comma-separated `path` or `name=path`, patterns filled in.

    `year=2026/*.jsonl` is a path where there are such files.
    """
    entries = [entry.strip() for entry in spec.split(",")]
    if entries == [""]:
        return  # the caller says what is missing
    if "" in entries:
        raise ValueError(f"--data={spec}: a path is empty; is a variable unset?")
    for entry in entries:
        name = ""
        paths = expand_pattern(entry)
        if "=" in entry and not any(os.path.exists(path) for path in paths):
            name, pattern = entry.split("=", 1)
            if not name.strip() or not pattern.strip():
                side = "behind" if name.strip() else "before"
                what = "path" if name.strip() else "name"
                raise ValueError(f"--data={entry}: no {what} {side} the =; is a variable unset?")
            paths = expand_pattern(pattern)
        for path in paths:
            yield name, Path(path)


def expand_pattern(path):
    """The paths of a pattern with `*` or `{000..012}`, or the path itself.

    A file with exactly this name goes first: it may be called `[1].jsonl`.
    """
    if os.path.exists(path):
        return [path]
    braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
    if braces:
        before, first, last, after = braces.groups()
        numbers = range(int(first), int(last) + 1)
        return [f"{before}{i:0{len(first)}d}{after}" for i in numbers]
    return sorted(glob.glob(path)) or [path]


# ---- InternVL's meta file -----------------------------------------------------------------------

def is_meta_file(path):
    """Whether a .json file holds one object, as InternVL's meta file, and not an array of rows."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with open(path, encoding="utf-8-sig") as file:
        return file.read(99).lstrip().startswith("{")


def open_meta_entry(path, key, entry, tokenizer, template):
    """The Source of one entry of a meta file; its name is the entry's key."""
    check_meta_entry(path, key, entry)

    def beside(name):
        """Paths are taken as they are written, else from the folder of the meta file."""
        return name if os.path.exists(name) else path.parent / name

    source = open_source(beside(entry["annotation"]), tokenizer, template, key,
                         beside(entry.get("root") or ""), entry.get("sha256", ""))
    source.repeat = float(entry.get("repeat_time", 1))
    source.max_tiles = entry.get("max_dynamic_patch", 0)
    source.weight = entry.get("weight", 0)
    if entry.get("data_augment"):
        source.notes.append("data_augment is not done here, pictures stay as they are")
    n_rows = len(source.rows)
    if entry.get("length", n_rows) != n_rows:
        source.notes.append(f"length says {entry['length']} rows, there are {n_rows}")
    return source


def check_meta_entry(path, key, entry):
    """ValueError if a key of a meta file's entry is missing, unknown or has a wrong value."""
    wrong = key
    if isinstance(entry, dict):
        wrong_keys = [name for name, value in entry.items() if not is_meta_value(name, value)]
        if not entry.get("annotation"):
            wrong_keys.append("annotation")
        wrong = wrong_keys[0] if wrong_keys else None
    if wrong:
        raise ValueError(f"{path}: {key}: {wrong} is missing, unknown, out of range or of a "
                         f"wrong type; there are {', '.join(META_KEYS)}, annotation being the path "
                         "of its rows")


def is_meta_value(name, value):
    """Whether a key of a meta file's entry exists and may have this value."""
    if type(value) not in META_KEYS.get(name, ()):
        return False
    # Written so that it is false for a NaN.
    return isinstance(value, str) or 0 <= value <= META_MOST.get(name, 1)
