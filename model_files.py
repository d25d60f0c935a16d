"""The files of a model folder: which are ours, and whether they are as they were written."""
import json
import os
import re
from pathlib import Path

from inputs.files import check_file, file_hash, json_hash, read_json, write_atomic

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.json", "chat_template.jinja",
)
# of our own folders, of both layouts of convert.py export
OTHER_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "model.safetensors.index.json",
    "configuration_internvl_chat.py",
)
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
MAX_HEADER = 4 * 2**20  # bytes of a safetensors header; the largest models have about a million
CHECKSUMS = "checksums.json"  # {"format": 1, "files": {name: sha256}}, written last


def stored_files(folder):
    """The safetensors files of a folder, sorted: those of its index, or the only one."""
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return [index.with_name("model.safetensors")]
    try:
        names = {str(name) for name in read_json(index, dict)["weight_map"].values()}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} has no weight_map from tensors to files; copy it again") from None
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name[:80]!r} is not the name of a .safetensors file of "
                             "this folder; copy it again")
    return sorted(index.with_name(name) for name in names)


def check_header(path):
    """ValueError if a safetensors file is none, or its header is longer than that of any model.

    Reading the header of a million tensors takes 17 s.
    """
    check_file(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"{path}: a header of {size:,} bytes, at most {MAX_HEADER:,} are read; "
                         "damaged, or no model of this kind")


def is_ours(path):
    """Whether a file of a model folder is one that this program writes."""
    known = path.name in (*TOKENIZER_FILES, *OTHER_FILES, CHECKSUMS)
    return (known or bool(WEIGHT_FILE.fullmatch(path.name))) and path.is_file()


def check_target(folder):
    """ValueError unless a model folder may be written here: a new or empty one, or an older one.

    The older one is deleted, so it must hold nothing but files of ours.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another name or remove it")
    files = sorted(folder.iterdir())
    is_model = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if files and not is_model:  # such as the folder of a run
        raise ValueError(
            f"{folder} exists and is not a model folder; choose another name or remove it")
    others = [path.name for path in files if not is_ours(path)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(f"{folder} also holds {', '.join(others[:3])}{more}, which would be "
                         "deleted with the old model; move them away or choose another name")


def write_checksums(folder):
    """Read the files of a folder back and write down their sha256."""
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"format": 1, "files": files, "all": json_hash(files)}, indent=1)
    write_atomic(folder / CHECKSUMS, text + "\n")


def find_change(folder, rank=0, world=1):
    """Which file of a model folder is not as it was written, as text; None if all are.

    A folder of other programs has no checksums, and nothing is known of it. Hashing is slow, so
    each rank takes its share of the files.
    """
    path = Path(folder) / CHECKSUMS
    if not path.is_file():
        return None
    try:
        content = read_json(path, dict)
        files = content["files"]
        if json_hash(files) != content["all"]:
            return f"{path} has changed since it was written"
        for name, digest in list(files.items())[rank::world]:
            file = path.with_name(name)
            if not file.is_file():
                return f"{file} is missing"
            if file_hash(file) != digest:
                return f"{file} has changed since it was written"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"{path} cannot be read ({e})"
    return None
