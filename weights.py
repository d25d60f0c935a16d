"""Model folders: config.json (see model_config.py), safetensors, tokenizer files.

The tensors of a whole model have our names. Those of a language model or a ViT alone have our
names without the prefix. Every stored tensor is used once and every parameter is filled once, or
the folder is refused.
"""
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from aimv2 import vision_encoder
from inputs.files import naming, read_json
from inputs.images import MEAN, STD
from inputs.tokenizer import Tokenizer
from model import VLM, LanguageModel, LLMConfig, kept_rows
from model_config import PREFIX, TRANSFORMERS, parse_config, read_configs
from model_files import (
    StoredTensor,
    check_target,
    has_tokenizer,
    read_headers,
    remove_leftovers,
    some_of,
    stored_files,
    stored_names,
    stored_shape,
    write_checksums,
    write_content,
    write_small_files,
)
from training.lora import is_adapter
from training.metadata import (
    LORA_SCALE,
    METADATA,
    described_weights,
    is_checkpoint,
    merged_weight,
)
from vision import VisionConfig

EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
IMG_CONTEXT_ID = 151667  # of <IMG_CONTEXT> in SAIL-VL and InternVL2.5, where there is no tokenizer
SHARD_BYTES = 5 * 10**9


# ---- reading and checking ------------------------------------------------------------------------

@dataclass
class ModelFolder:
    """A folder whose headers have been read and checked; no weight has been read yet."""
    vision: VisionConfig | None
    llm: LLMConfig | None
    config: dict  # config.json
    # {our name: [StoredTensor, ...]}: the pieces whose rows it has, one after the other, mostly a
    # single one; a head that shares the embedding table is not in it
    tensors: dict


def inspect_folder(folder):
    """Account for a folder by its headers -> ModelFolder.

    ValueError or FileNotFoundError unless every tensor belongs to one parameter and the reverse,
    of the right shape. A missing head shares the embedding table.
    """
    vision, llm, config = read_configs(folder)
    try:
        shapes = parameter_shapes(vision, llm)
    except ValueError as e:  # sizes that do not divide
        raise ValueError(f"{folder}/config.json: {e}") from None
    architecture = config["architectures"][0]
    if is_checkpoint(folder):
        stored = checkpoint_headers(folder, config)
        names = {name: [name] for name in shapes}
    else:
        stored = read_headers(stored_files(folder))
        if architecture in TRANSFORMERS:  # some of its versions put "model." before most names
            stored = {name.removeprefix("model."): piece for name, piece in stored.items()}
        names = {name: stored_names(name, architecture, PREFIX[architecture]) for name in shapes}
    if llm:  # the weights decide, whatever config.json says
        llm.tie_embeddings = names[HEAD][0] not in stored
        if llm.tie_embeddings:
            names.pop(HEAD)
    check_names(folder, {name for pieces in names.values() for name in pieces}, stored)
    tensors = {name: [stored[piece] for piece in pieces] for name, pieces in names.items()}
    check_shapes(folder, shapes, tensors)
    return ModelFolder(vision, llm, config, tensors)


def parameter_shapes(vision, llm):
    """{name: shape} of the whole model, its ViT (llm None) or language model (vision None)."""
    with torch.device("meta"):
        if vision and llm:
            model = VLM(vision, llm, image_token_id=-1)
        elif llm:
            model = nn.ModuleDict({"language_model": LanguageModel(llm)})
        else:
            model = nn.ModuleDict({"vision_model": vision_encoder(vision)})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def checkpoint_headers(folder, config):
    """{our name: StoredTensor} of a run's checkpoint, in the dtype that config.json asks for.

    Adapters are not among them: they are merged as the weights beside them are read.
    """
    words = {dtype: word for word, dtype in DTYPES.items()}
    dtype = words[getattr(torch, config["torch_dtype"])]
    path = Path(folder) / METADATA
    described = described_weights(folder)
    weights = {name: about for name, about in described.items() if not is_adapter(name)}
    if len(weights) < len(described) and LORA_SCALE not in config:
        raise ValueError(f"{folder} is from before checkpoints said how adapters are merged; let "
                         "the run go on to its next checkpoint")
    return {name.removeprefix("model."): StoredTensor(path, name, tuple(about.size), dtype)
            for name, about in weights.items()}


def check_names(folder, expected, stored):
    sides = []
    for names, what in ((expected - stored.keys(), "parameters without a tensor"),
                        (stored.keys() - expected, "tensors without a parameter")):
        if names:
            sides.append(f"{len(names)} {what}: {some_of(sorted(names), ', ')}")
    if sides:
        raise ValueError(f"{folder}: weights and config.json disagree; {'; '.join(sides)}")


def check_shapes(folder, shapes, tensors):
    wrong = []
    for name, pieces in tensors.items():
        for _, stored, shape, dtype in pieces:
            expected = stored_shape(stored, shapes[name], len(pieces))
            if dtype not in DTYPES:
                known = ", ".join(DTYPES)
                wrong.append(f"{stored} is stored as {dtype}, which is none of {known}")
            elif shape != expected:
                wrong.append(f"{stored} has shape {shape}, config.json asks for {expected}")
    if wrong:
        raise ValueError(f"{folder}: {some_of(wrong, '; ')}")


def image_token_id(folder):
    """The id of <IMG_CONTEXT> in a folder's tokenizer; ValueError if that is damaged."""
    path = Path(folder) / "added_tokens.json"
    if path.is_file():
        i = read_json(path, dict).get("<IMG_CONTEXT>")
        if type(i) is int:  # the rest of the tokenizer need not be read
            return i
    return Tokenizer(folder).image_id if has_tokenizer(folder) else IMG_CONTEXT_ID


def check_vocabulary(llm, tokenizer):
    """ValueError if the tokenizer has ids beyond the embedding table."""
    if llm.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"llm.vocab_size={llm.vocab_size} is smaller than the tokenizer's {tokenizer.n_vocab} "
            "tokens; take the tokenizer that belongs to the model, or, for random weights, set "
            "--llm.vocab_size")


# ---- filling a model -----------------------------------------------------------------------------

def open_folder(folder, dtype=None):
    """Build a folder's whole model on the meta device -> (VLM, ModelFolder); `fill` comes next.

    dtype: None takes that of the stored embedding table. Raises as inspect_folder.
    """
    about = inspect_folder(folder)
    for have, lack in (("vision", "llm"), ("llm", "vision")):
        if getattr(about, lack) is None:
            words = {"vision": "vision encoder", "llm": "language model"}
            raise ValueError(f"{folder} is a {words[have]} only; join it with a {words[lack]}: "
                             "convert.py assemble")
    with torch.device("meta"):
        model = VLM(about.vision, about.llm, image_token_id(folder))
    return model.to(dtype or DTYPES[about.tensors[EMBEDDINGS][0].dtype]), about


@torch.no_grad()
def fill(model, tensors, prefix=""):
    """Fill the parameters of a model from {our name: [StoredTensor, ...]}.

    ValueError names a parameter that would be left without a value; only adapters are drawn later.
    prefix: what the model's names lack of ours, as "language_model." for a LanguageModel. A rank
    reads only the rows it keeps. Beside the model this takes the memory of one tensor: the file is
    opened for each anew, because what was read of it is let go only when it is closed.
    """
    # A tied head is the embedding table under a second name, which is not among these.
    own = {name for name, _ in model.named_parameters()}
    lost = [name for name in own
            if prefix + name not in tensors and not is_adapter(name)]
    if lost:
        raise ValueError(f"no stored tensor fills {some_of(sorted(lost), ', ')}; read them from a "
                         "folder that has them, or initialize them after `fill`")
    for name, parameter in model.state_dict().items():
        local, rows = kept_rows(parameter)
        pieces = tensors.get(prefix + name)  # none for a tied head
        if pieces and len(local):
            local.copy_(read_pieces(pieces, parameter.shape, rows))


def read_pieces(pieces, shape, rows):
    """These rows (a slice) of the tensor of this shape that has these pieces."""
    first = pieces[0]
    if first.file.name == METADATA:
        return merged_weight(first.file.parent, first.name).to(DTYPES[first.dtype])[rows]
    if len(pieces) == 1 and first.shape == shape:
        with safe_open(first.file, framework="pt") as file:
            return file.get_slice(first.name)[rows]
    whole = []
    for piece in pieces:
        with safe_open(piece.file, framework="pt") as file:
            whole.append(file.get_tensor(piece.name))
    return torch.cat(whole).view(shape)[rows]


def load_folder(folder, device="cpu", dtype=None):
    """Read a folder's whole model -> (VLM, config.json as a dict); otherwise as open_folder."""
    model, about = open_folder(folder, dtype)
    model.folder = folder  # error messages name it
    fill(model.to_empty(device=device), about.tensors)
    return model, about.config


def start_model(cfg, origins, folder, tokenizer):
    """The model that a run starts from -> (VLM on the meta device, ModelFolder).

    That is a folder's, or one of the sizes cfg.vision and cfg.llm when folder is ""; it has no
    tensors then. start_weights fills the model. ValueError if the configuration sets a size that
    is not the folder's.
    """
    if not folder:
        check_vocabulary(cfg.llm, tokenizer)
        with torch.device("meta"):
            model = VLM(cfg.vision, cfg.llm, tokenizer.image_id)
        return model, ModelFolder(cfg.vision, cfg.llm, config={}, tensors={})
    model, about = open_folder(folder)
    check_vocabulary(model.llm, tokenizer)
    check_sizes(cfg, origins, folder, about)
    return model, about


def check_sizes(cfg, origins, folder, about):
    """ValueError if a size that was set by hand (origins: where) is not that of the folder."""
    for key, origin in origins.items():
        part, _, name = key.partition(".")
        if part not in ("vision", "llm") or origin == "default":
            continue
        if name in ("tie_embeddings", "init_values", "max_positions"):
            continue  # no loaded weight depends on these
        want = getattr(getattr(cfg, part), name)
        have = getattr(getattr(about, part), name)
        if want != have:
            raise ValueError(f"{origin}: {key}={want}, but {folder} has {have}; leave it out, or "
                             "start from random weights with --init_from=")


def start_weights(model, about, seed):
    """Fill the VLM of start_model on its device, sharded or not: from its folder, or at random."""
    if about.tensors:
        fill(model, about.tensors)
    else:
        model.init_weights(seed)


# ---- writing -------------------------------------------------------------------------------------

def save_folder(state, config, out_dir, tokenizer_dir=None, files=None):
    """Write a model folder of state {our name: tensor}, as `config` of config_json describes it.

    That may be a whole model, a plain Qwen2 or an InternVisionModel folder; the tensors are stored
    in the dtype of the config. The other arguments are those of write_folder.
    """
    vision, llm = parse_config(config)
    prefix = PREFIX[config["architectures"][0]]
    tensors = {}
    wanted = parameter_shapes(vision, llm)
    check_nothing_lost(out_dir, state, wanted, whole=vision and llm)
    for name in wanted:
        if not (name == HEAD and llm.tie_embeddings):
            tensors[name.removeprefix(prefix)] = state[name]
    files = files or {}
    if vision and llm:  # llama.cpp looks for mean and std in this file
        files = {"preprocessor_config.json": {
            "feature_extractor_type": "CLIPFeatureExtractor", "size": vision.image_size,
            "crop_size": vision.image_size, "resample": 3, "image_mean": MEAN, "image_std": STD,
        }} | files
    write_folder(tensors, config, out_dir, tokenizer_dir if llm else None, files)


def check_nothing_lost(out_dir, state, wanted, whole):
    """ValueError if a tensor of `state` has no place in the folder; of a part, only its own do."""
    parts = {name.partition(".")[0] for name in wanted}
    lost = [name for name in state
            if name not in wanted and (whole or name.partition(".")[0] in parts)]
    if lost:
        raise ValueError(f"{out_dir} is not written, for config.json has no place for "
                         f"{some_of(lost, ', ')}; the sizes there must tell of every parameter")


def write_folder(tensors, config, out_dir, tokenizer_dir=None, files=None):
    """Write a folder whole or not at all: under a temporary name, which is renamed at the end.

    tensors: {stored name: tensor}. The tokenizer's files are copied from tokenizer_dir. files:
    {name: dict, text or bytes}, in their place or as well. An older model folder is replaced;
    ValueError if out_dir holds anything else, or if a tensor is not finite. OSError if the disk is
    full.
    """
    check_target(out_dir)
    out = Path(out_dir).resolve()  # where a link leads, so that the link stays
    new = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    remove_leftovers(out)
    try:
        with naming(out_dir):
            new.mkdir(parents=True)
            write_small_files(new, config, tokenizer_dir, files or {})
            write_shards(new, tensors, getattr(torch, config["torch_dtype"]), out_dir)
            write_checksums(new)
            for path in (*new.rglob("*"), new):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors: the owner's alone
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_shards(folder, tensors, dtype, target):
    """Write tensors in this dtype: one safetensors file, or several of SHARD_BYTES and an index.

    target: what messages name, as the folder will be renamed. ValueError: not finite in the dtype.
    """
    shards = []
    room = 0  # bytes left in the last shard
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size

    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        for name, tensor in shard.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{target} is not written: {name} is not finite in {dtype}; "
                                 "start from earlier weights or with a lower learning rate")
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as e:
            raise OSError(
                f"{target}/{file} could not be written ({e}); is the disk full?") from None
        weight_map |= dict.fromkeys(names, file)

    if len(shards) > 1:
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        write_content(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": total}, "weight_map": weight_map})
