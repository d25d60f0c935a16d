"""The files of a model folder: which are ours, whether they are as they were written, and what they
call the tensors.
"""
import glob
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from inputs.files import check_file, file_hash, json_hash, read_json, write_atomic
from inputs.tokenizer import read_vocabulary
from training.metadata import METADATA, is_checkpoint, read_weight

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "tokenizer.json", "chat_template.jinja",
)
# of our own folders, of both layouts of convert.py export
OTHER_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "model.safetensors.index.json",
    "configuration_internvl_chat.py", "modeling_sailvl.py",
)
# the first one with both layouts; without a version some take the tokenizer for a damaged one
TRANSFORMERS_VERSION = "4.52.0"
ADAPTER_FOLDER = "adapter"  # of a model folder: what LoRA trained, see training/adapter.py
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
READ_NUMBERS = 2**24  # that are checked at a time
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


def check_tensor_header(path):
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


def some_of(items, separator):
    """The first five items as text, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


class StoredTensor(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""
    file: Path
    name: str
    shape: tuple
    dtype: str  # safetensors' word, see weights.DTYPES


def read_headers(paths):
    """{stored name: StoredTensor} of all tensors in these files."""
    tensors = {}
    for path in paths:
        check_tensor_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in tensors:
                        raise ValueError(f"{path}: {name} is stored in an earlier file too")
                    header = file.get_slice(name)
                    shape = tuple(header.get_shape())
                    tensors[name] = StoredTensor(path, name, shape, header.get_dtype())
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; the folder is incomplete, copy it again "
                                    "(of weights, only .safetensors files are read)") from None
        except SafetensorError as e:
            raise ValueError(f"{path}: damaged or cut short ({e}); copy it again") from None
    return tensors


# ---- transformers' names of tensors --------------------------------------------------------------

# our name -> that of the released "-hf" checkpoints (transformers 4.52 and later), one by one
RENAMED = {
    "InternVLForConditionalGeneration": {
        "vision_model.": "vision_tower.",
        ".class_embedding": ".cls_token",
        ".position_embedding": ".position_embeddings",
        ".patch_embedding.": ".patch_embeddings.projection.",
        ".encoder.layers.": ".encoder.layer.",
        ".attn.": ".attention.",
        ".proj.": ".projection_layer.",
        ".norm1.": ".layernorm_before.",
        ".norm2.": ".layernorm_after.",
        ".ls1": ".lambda_1",
        ".ls2": ".lambda_2",
    },
    "SailVLForConditionalGeneration": {
        "language_model.lm_head.": "lm_head.",
        "vision_model.": "vision_tower.",
        ".preprocessor.patchifier.proj.": ".embeddings.patch_embed.",
        ".preprocessor.patchifier.norm.": ".embeddings.rms_norm.",
        ".preprocessor.pos_embed": ".embeddings.position_embedding.weight",
        ".trunk.post_trunk_norm.": ".rms_norm.",
        ".trunk.blocks.": ".encoder.layers.",
        ".attn.proj.": ".attention.out_proj.",
        ".attn.": ".attention.",
        ".mlp.fc1.": ".ffn.gate_proj.",
        ".mlp.fc2.": ".ffn.down_proj.",
        ".mlp.fc3.": ".ffn.up_proj.",
        ".norm_1.": ".rms_norm1.",
        ".norm_2.": ".rms_norm2.",
    },
}
PROJECTOR_RENAMED = {
    "mlp1.0.": "multi_modal_projector.layer_norm.",
    "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2.",
}


def stored_names(name, architecture, prefix):
    """What a folder of an architecture calls our tensor `name` -> a list of names.

    prefix: what its names lack of ours. They are three in transformers' layout where the ViT's
    queries, keys and values have one matrix here. ValueError for a projector it does not have.
    """
    if architecture not in RENAMED:
        return [name.removeprefix(prefix)]
    for ours, theirs in (RENAMED[architecture] | PROJECTOR_RENAMED).items():
        name = name.replace(ours, theirs)
    if name.startswith("mlp1."):
        raise ValueError(f"{name}: transformers has no such projector; use --layout=internvl")
    if ".qkv." in name:
        return [name.replace("qkv", part) for part in ("q_proj", "k_proj", "v_proj")]
    return [name]


def stored_shape(name, shape, n_pieces):
    """The shape of one of the n_pieces that our tensor of this shape has in a folder."""
    if name.endswith("vision_tower.embeddings.position_embedding.weight"):
        return shape[1:]  # an AIMv2's positions, a plain table in transformers
    return (shape[0] // n_pieces, *shape[1:]) if shape else shape


def transformers_tensors(state, architecture):
    """Rename the tensors of the model, and cut each fused qkv of the ViT into its three parts."""
    out = {}
    for name, tensor in state.items():
        names = stored_names(name, architecture, "")
        for stored, rows in zip(names, tensor.chunk(len(names)), strict=True):
            out[stored] = rows.view(stored_shape(stored, tensor.shape, len(names)))
    return out


# ---- whether they are as they were written -------------------------------------------------------

def is_ours(path):
    """Whether a file of a model folder, or its adapter folder, is one that this program writes."""
    if path.name == ADAPTER_FOLDER and path.is_dir() and not path.is_symlink():
        return all(file.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) for file in path.iterdir())
    known = path.name in (*TOKENIZER_FILES, *OTHER_FILES, CHECKSUMS)
    return (known or bool(WEIGHT_FILE.fullmatch(path.name))) and path.is_file()


def check_target(folder):
    """ValueError unless a model folder may be written here: a new or empty one, or an older one.

    The older one is deleted, so this program must have written it, and nothing else may be in it.
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
    if files and not (folder / CHECKSUMS).is_file():
        raise ValueError(f"{folder} holds a model without {CHECKSUMS}, so another program wrote it "
                         "(or an old version of this one); choose another name or remove it")
    others = [path.name for path in files if not is_ours(path)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(f"{folder} also holds {', '.join(others[:3])}{more}, which would be "
                         "deleted with the old model; move them away or choose another name")


def remove_leftovers(out):
    """Remove what writes of the folder `out` that were killed have left beside it."""
    own = re.compile(rf"\.{re.escape(out.name)}\.(tmp|old)-\d+")
    for path in out.parent.glob(f".{glob.escape(out.name)}.*-*"):
        if own.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def write_small_files(folder, config, tokenizer_dir, files):
    """Write all files of a model folder but the weights."""
    if tokenizer_dir:
        for name in TOKENIZER_FILES:
            source = Path(tokenizer_dir) / name
            if source.is_file():
                (folder / name).write_bytes(source.read_bytes())
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_content(path, content)
    ends = {}
    if has_tokenizer(folder):
        _, ids, _ = read_vocabulary(folder)
        ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
        write_content(folder / "generation_config.json", ends)
    # llama.cpp looks for the end of an answer in config.json, and else takes a comma for it.
    version = {"transformers_version": TRANSFORMERS_VERSION}
    write_content(folder / "config.json", config | ends | version)


def has_tokenizer(folder):
    return any((Path(folder) / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def write_content(path, content):
    """Write text or bytes as they are, anything else as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    if not isinstance(content, str):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8")


def small_file_hashes(folder):
    """{name: sha256} of the files beside the weights that decide a model's answers."""
    paths = [Path(folder) / name for name in ("config.json", *TOKENIZER_FILES)]
    return {path.name: file_hash(path) for path in paths if path.is_file()}


def write_checksums(folder):
    """Read the files of a folder back and write down their sha256 and sizes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    files = {names[path]: file_hash(path) for path in paths}
    record = {
        "format": 1,
        "files": files,
        "sizes": {names[path]: path.stat().st_size for path in paths},
        "all": json_hash(files),
    }
    write_atomic(folder / CHECKSUMS, json.dumps(record, indent=1) + "\n")


def find_change(folder, rank=0, world=1, known=()):
    """Which file of a model folder is not as it was written, as text; None if all are.

    A folder of other programs has no checksums, and nothing is known of it. Hashing is slow, so
    each rank takes its share of the files; known: {name: sha256} of files that were hashed already.
    """
    path = Path(folder) / CHECKSUMS
    if not path.exists():
        return None
    known = dict(known)
    try:
        content = read_json(path, dict)
        files = content["files"]
        if json_hash(files) != content["all"]:
            return f"{path} has changed since it was written"
        for name, digest in list(files.items())[rank::world]:
            file = path.parent / name
            if not file.is_file():
                return f"{file} is missing"
            if (known.get(name) or file_hash(file)) != digest:
                return f"{file} has changed since it was written"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"{path} cannot be read ({e})"
    return None


IF_CHANGED = "copy the folder again, or, if it was changed on purpose, remove its checksums.json"


def check_sizes_of_weights(folder):
    """ValueError if a file of weights has another size than when it was written.

    That takes no time. Whether all content is the same, find_change says.
    """
    path = Path(folder) / CHECKSUMS
    if not path.exists():
        return
    sizes = read_json(path, dict).get("sizes", {})
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        file = path.with_name(os.path.basename(name) or CHECKSUMS)
        have = file.stat().st_size if file.is_file() else 0
        if WEIGHT_FILE.fullmatch(name) and have != size:
            raise ValueError(f"{file} has {have:,} bytes, {size} when it was written; {IF_CHANGED}")


def is_finite(stored):
    """Whether a StoredTensor holds no NaN and no infinity; read some rows at a time."""
    if stored.file.name == METADATA:
        return bool(read_weight(stored.file.parent, stored.name).isfinite().all())
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, READ_NUMBERS * rows // max(1, math.prod(stored.shape)))
    for start in range(0, rows, step):
        # Opened anew, because what was read is let go only when the file is closed.
        with safe_open(stored.file, framework="pt") as file:
            part = file.get_slice(stored.name)
            part = part[start:start + step] if stored.shape else file.get_tensor(stored.name)
        if not part.isfinite().all():
            return False
    return True


def check_content(folder, tensors):
    """ValueError if a file has changed since it was written, or if a weight is not finite.

    tensors: {name: [StoredTensor, ...]}. All of them are read.
    """
    change = find_change(folder)
    if change:
        raise ValueError(f"{change}; {IF_CHANGED}")
    broken = [name for name, pieces in tensors.items() if not all(map(is_finite, pieces))]
    if broken:
        raise ValueError(f"{folder}: not finite: {some_of(broken, ', ')}; take an earlier "
                         "checkpoint, or copy the folder again")


def weights_hashes(folder):
    """{name: sha256} of a folder's safetensors files."""
    if is_checkpoint(folder):  # which was verified
        files = read_json(Path(folder) / "manifest.json", dict)["files"]
        return {name: digest for name, (_, digest) in files.items() if name.endswith(".distcp")}
    digests = {path.name: file_hash(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    if not digests:
        raise FileNotFoundError(
            f"no *.safetensors in {folder!r}; give the model folder, --model=DIR")
    return digests


def weights_hash(folder):
    """sha256 of a folder's safetensors file; of their digests joined, if there are several."""
    return joined_hash(weights_hashes(folder))


def joined_hash(digests):
    """One hash of {name: sha256}."""
    digests = list(digests.values())
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
