"""Files read with an error that says what to do, and written whole or not at all."""
import hashlib
import json
import os
from pathlib import Path



def read_json(path, kind=object):
    """What a JSON file holds; ValueError if that is none, or not of this kind (dict for the files of a model)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:                          # a million brackets are no data
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; copy it again")
    return content

def json_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

# ---- checkpoints ----------------------------------------------------------------------------------------------------
# checkpoints/step_00001234/ holds DCP files (which reshard when the number of ranks changes), state.json and, written
# last, manifest.json with size and sha256 of each. The folder has a temporary name until all of it is on the disk.
def write_atomic(path, text):
    """Write a small file whole or not at all, for good: temporary name, fsync, rename, fsync of the folder."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)

def file_hash(path, kind="sha256"):
    with open(path, "rb") as f: return hashlib.file_digest(f, kind).hexdigest()
