"""Model folders: config.json in InternVL's layout, safetensors, tokenizer files. Reading, checking, writing.

`architectures` in config.json tells three kinds apart: a whole model (SailVLModel, InternVLChatModel), whose tensor
names are ours, a language model (Qwen2ForCausalLM) and a ViT (InternVisionModel) as they are released, whose names are
ours without the prefix. Every stored tensor is used once and every parameter filled once, or the folder is refused.
"""
import glob
import hashlib
import json
import os
import shutil
import torch
from dataclasses import astuple
from dataclasses import fields
from pathlib import Path
from safetensors import SafetensorError
from safetensors import safe_open
from safetensors.torch import save_file

from inputs.files import file_hash, read_json
from inputs.images import MEAN, STD
from inputs.tokenizer import Tokenizer
from model import LLMConfig, VLM, init_weights, kept_rows
from vision import VisionConfig

PREFIX = {"SailVLModel": "", "InternVLChatModel": "", "Qwen2ForCausalLM": "language_model.",
          "InternVisionModel": "vision_model."}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
                   "tokenizer.json", "chat_template.jinja")
IMG_CONTEXT = 151667                    # id of <IMG_CONTEXT> in SAIL-VL and InternVL2.5, if there is no tokenizer
SHARD_BYTES = 5 * 10 ** 9
HEAD = "language_model.lm_head.weight"
DTYPES = dict(F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16, F64=torch.float64)

# config.json's names for the fields of VisionConfig and LLMConfig, in their order; FIXED: what it may say only so
VISION_NAMES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size", "layer_norm_eps", "qkv_bias", "initializer_factor")
LLM_NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
VISION_FIXED = dict(architectures=["InternVisionModel"], model_type="intern_vit_6b", hidden_act="gelu",
                    norm_type="layer_norm", qk_normalization=False)
LLM_FIXED = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", use_sliding_window=False,
                 rope_scaling=None)
TOP_FIXED = dict(ps_version="v2", select_layer=-1, dynamic_image_size=True, pad2square=False)
TOP_DEFAULTS = dict(min_dynamic_patch=1, max_dynamic_patch=12, use_thumbnail=True, use_backbone_lora=0, use_llm_lora=0)
VISION_KINDS = {name: field.type for name, field in zip(VISION_NAMES, fields(VisionConfig))}
LLM_KINDS = {name: field.type for name, field in zip(LLM_NAMES, fields(LLMConfig))}
TOP_KINDS = dict(min_dynamic_patch=int, max_dynamic_patch=int, use_thumbnail=bool, template=str)

# ---- reading ---------------------------------------------------------------------------------------------------------

def _values(where, section, fixed, kinds, **defaults):
    """The values of these names in a section of config.json; refuse what is missing, other than `fixed`, of another
    kind than its field's, or a size beyond any model's, which would be built for hours."""
    for name, value in fixed.items():
        if section.get(name) not in (None, value):
            raise ValueError(f"{where}: {name} = {section[name]!r} is not supported, only {value!r}")
    section = defaults | {name: value for name, value in section.items() if value is not None}
    if missing := [name for name in kinds if name not in section]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for name, kind in kinds.items():
        value, most = section[name], 1000 if "layers" in name else 2 ** 20
        words = {int: f"a whole number from 1 to {most}", float: "a positive number", bool: "true or false",
                 str: "a name"}
        if type(value) not in ((int, float) if kind is float else (kind,)) or (
                kind in (int, float) and not 0 < value <= (most if kind is int else 1e30)):
            raise ValueError(f"{where}: {name} = {value!r} must be {words[kind]}; mend config.json or copy it again")
    return [section[name] for name in kinds]

def read_configs(folder):
    """-> (VisionConfig or None, LLMConfig or None, the raw config.json as a dict). One of the two is None for the
    folder of a ViT or of a language model alone. ValueError (unknown architecture or option) or FileNotFoundError."""
    path = Path(folder) / "config.json"
    if not path.exists(): raise FileNotFoundError(f"{path} does not exist; give the folder of a model")
    if "argv" in (raw := read_json(path, dict)):
        models = [str(p.parent) for p in sorted(Path(folder).glob("*/config.json"))]
        raise ValueError(f"{folder} is the folder of a run; its models: {', '.join(models) or 'none yet'}")
    try:
        return *_read_config(path, raw), raw
    except (TypeError, AttributeError, ZeroDivisionError, KeyError) as e:
        raise ValueError(f"{path} is not what it should be: {e!r}") from None

def _read_config(path, raw):
    vision = llm = None
    if not isinstance(kinds := raw.get("architectures") or ["none"], list):
        raise ValueError(f"{path}: architectures = {kinds!r} must be a list of one name")
    if (kind := kinds[0]) == "InternVLForConditionalGeneration":
        raise ValueError(f"{path}: transformers' own layout is only written here; take the folder it was exported from")
    if kind not in PREFIX:
        raise ValueError(f"{path}: architecture {kind} is not supported, only {', '.join(PREFIX)}")
    if kind != "Qwen2ForCausalLM":
        ratio, = _values(path, raw, {}, dict(downsample_ratio=float), downsample_ratio=0.5)
        if 1 / ratio not in range(1, 65):
            raise ValueError(f"{path}: downsample_ratio {ratio} is not one over a whole number up to 64")
        vision = VisionConfig(*_values(
            f"{path}: vision encoder", raw.get("vision_config", raw), VISION_FIXED, VISION_KINDS, layer_norm_eps=1e-6,
            qkv_bias=True, initializer_factor=1.0), int(1 / ratio))
    if kind != "InternVisionModel":
        section = raw.get("llm_config", raw)
        rope = section.get("rope_parameters") or {}                         # where transformers 5 keeps it
        _values(path, rope, dict(rope_type="default"), {})
        dim, heads = section.get("hidden_size"), section.get("num_attention_heads")
        llm = LLMConfig(*_values(
            f"{path}: language model", section, LLM_FIXED, LLM_KINDS, rms_norm_eps=1e-6, tie_word_embeddings=False,
            head_dim=dim // heads if type(dim) is type(heads) is int and heads else 0,
            rope_theta=rope.get("rope_theta", 1e4), max_position_embeddings=32768))
    if vision and llm:
        _values(path, raw, TOP_FIXED | dict(force_image_size=vision.image_size), TOP_KINDS, **TOP_DEFAULTS, template="")
    return vision, llm

def has_tokenizer(folder):
    return any((Path(folder) / name).is_file() for name in ("vocab.json", "tokenizer.json"))

def image_token_id(folder):
    """The id of <IMG_CONTEXT> in a folder's tokenizer; ValueError if that is damaged."""
    path = Path(folder) / "added_tokens.json"
    if path.is_file() and type(i := read_json(path, dict).get("<IMG_CONTEXT>")) is int:     # saves reading vocab.json
        return i
    return Tokenizer(folder).image_id if has_tokenizer(folder) else IMG_CONTEXT

def parameter_shapes(vision, llm):
    """{name: shape} of the model, its ViT alone (llm None) or its language model alone (vision None)."""
    with torch.device("meta"):
        model = VLM(vision, llm or LLMConfig(n_layers=0, vocab_size=1), -1)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if llm or name.startswith("vision_model.")}

def inspect_folder(folder):
    """Account for a folder by its headers: every tensor must belong to one parameter and the reverse; a missing head
    shares the embedding table. -> (*read_configs, {our name: (file, stored name, shape, dtype)}), or ValueError."""
    vision, llm, raw = read_configs(folder)
    try:
        shapes, prefix, table = parameter_shapes(vision, llm), PREFIX[raw["architectures"][0]], {}
    except ValueError as e:                             # sizes that do not divide
        raise ValueError(f"{folder}/config.json: {e}") from None
    index = Path(folder) / "model.safetensors.index.json"
    try:
        named = read_json(index, dict)["weight_map"].values() if index.is_file() else ["model.safetensors"]
        files = set(map(str, named))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map from tensors to files; copy it again") from None
    if strange := [file for file in files if file != os.path.basename(file)]:
        raise ValueError(f"{index}: {strange[0]} is not a file of this folder")
    for path in sorted(map(index.with_name, files)):
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():
                    if prefix + name in table:
                        raise ValueError(f"{path}: {name} is stored in an earlier file too")
                    tensor = f.get_slice(name)
                    table[prefix + name] = path, name, tuple(tensor.get_shape()), tensor.get_dtype()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; the folder is incomplete, copy it again (of weights, only "
                                    ".safetensors files are read)") from None
        except SafetensorError as e:
            raise ValueError(f"{path}: damaged or cut short ({e}); copy it again") from None
    if llm:
        llm.tie_embeddings = HEAD not in table          # whatever config.json says, the weights decide
    if HEAD not in table:
        shapes.pop(HEAD, None)
    if shapes.keys() != table.keys():
        sides = {"parameters without a tensor": shapes.keys() - table.keys(),
                 "tensors without a parameter": table.keys() - shapes.keys()}
        raise ValueError(f"{folder}: weights and config.json disagree; " + "; ".join(
            f"{len(names)} {what}: {', '.join(sorted(names)[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5)
            for what, names in sides.items() if names))
    wrong = [f"{name} has shape {shape}, config.json asks for {shapes[name]}" if dtype in DTYPES else
             f"{name} is stored as {dtype}, which is none of {', '.join(DTYPES)}"
             for name, (_, _, shape, dtype) in table.items() if shape != shapes[name] or dtype not in DTYPES]
    if wrong:
        raise ValueError(f"{folder}: " + "; ".join(wrong[:5]) + f" and {len(wrong) - 5} more" * (len(wrong) > 5))
    return vision, llm, raw, table

def open_folder(folder, dtype=None, vision=True):
    """-> (VLM on the meta device, config.json as a dict, the table that `fill` needs). dtype None is that of the stored
    embedding table; vision=False is for the language model alone. Raises as inspect_folder."""
    vision_cfg, llm, raw, table = inspect_folder(folder)
    if llm is None:
        raise ValueError(f"{folder} is a vision encoder only; join it with a language model: convert.py assemble")
    with torch.device("meta"):
        model = VLM(vision_cfg if vision else None, llm, image_token_id(folder))
    return model.to(dtype or DTYPES[table["language_model.model.embed_tokens.weight"][3]]), raw, table

@torch.no_grad()
def fill(model, table):
    """Fill what a VLM has of a table's entries from their files; a rank reads only the rows it keeps. Memory beside the
    model: one tensor, because the file is closed, and what was read of it let go, after each."""
    for name, p in model.state_dict().items():
        local, rows = kept_rows(p)
        if name in table and len(local):                                    # a tied head is not in it
            with safe_open(table[name][0], framework="pt") as f:
                local.copy_(f.get_slice(table[name][1])[rows])

def load_folder(folder, device="cpu", dtype=None, vision=True):
    """-> (VLM, config.json as a dict) of a folder, whole, on a device; arguments and errors as of open_folder."""
    model, raw, table = open_folder(folder, dtype, vision)
    fill(model.to_empty(device=device), table)
    return model, raw

def check_vocabulary(llm, tokenizer):
    if llm.vocab_size < tokenizer.n_vocab:
        raise ValueError(f"llm.vocab_size={llm.vocab_size} is smaller than the tokenizer's {tokenizer.n_vocab} tokens; "
                         "take the tokenizer that belongs to the model, or, for random weights, set --llm.vocab_size")

def start_model(cfg, origins, folder, tokenizer, text_only=False):
    """-> (VLM on the meta device, config.json extras, table): a model folder's, or of cfg.vision and cfg.llm with table
    None; start_weights fills it. Sizes that the configuration sets itself must be the folder's, else ValueError."""
    if not folder:
        check_vocabulary(cfg.llm, tokenizer)
        with torch.device("meta"):
            return VLM(None if text_only else cfg.vision, cfg.llm, tokenizer.image_id), {}, None
    model, raw, table = open_folder(folder, vision=not text_only)
    check_vocabulary(model.llm, tokenizer)
    for key, origin in origins.items():
        part, _, name = key.partition(".")
        if (part in ("vision", "llm") and getattr(model, part) and origin != "default"
                and name not in ("tie_embeddings", "init_values", "max_positions")):    # which bind no loaded weight
            want, have = (getattr(getattr(one, part), name) for one in (cfg, model))
            if want != have:
                raise ValueError(f"{origin}: {key}={want}, but {folder} has {have}; leave it out, or start from random "
                                 "weights with --init_from=")
    return model, raw, table

def start_weights(model, table, cfg):
    """Fill the model of start_model once it is on its device, sharded or not: from its folder, or at random."""
    fill(model, table) if table else model.init_weights(cfg.seed)

# ---- writing ---------------------------------------------------------------------------------------------------------

def _write_json(path, content):
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")

def config_json(vision, llm, dtype, template="sailvl-chat", extra=None):
    """config.json as a dict, in the released layouts; `extra` may change the TOP_DEFAULTS of a whole model."""
    kind = str(dtype).removeprefix("torch.")
    v = vision and dict(zip(VISION_NAMES, astuple(vision))) | VISION_FIXED | dict(
        torch_dtype=kind, use_flash_attn=False, dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0, num_channels=3)
    t = llm and dict(zip(LLM_NAMES, astuple(llm))) | LLM_FIXED | dict(
        torch_dtype=kind, attention_dropout=0.0, initializer_range=0.02, use_cache=True)
    if vision is None or llm is None: return v or t
    return {name: (extra or {}).get(name, value) for name, value in TOP_DEFAULTS.items()} | TOP_FIXED | dict(
        architectures=["InternVLChatModel"], model_type="internvl_chat", torch_dtype=kind, template=template,
        downsample_ratio=1 / vision.downsample, force_image_size=vision.image_size,
        tie_word_embeddings=llm.tie_embeddings, vision_config=v, llm_config=t)

def save_folder(state, vision, llm, out_dir, tokenizer_dir=None, template="sailvl-chat", dtype=torch.bfloat16,
                extra=None, files=None):
    """Write the model folder of state {our name: tensor}; vision=None makes it a plain Qwen2 folder, llm=None an
    InternVisionModel folder. extra: entries of config.json. files: as for write_folder."""
    config = config_json(vision, llm, dtype, template, extra)
    tensors = {name.removeprefix(PREFIX[config["architectures"][0]]): state[name]
               for name in parameter_shapes(vision, llm) if name != HEAD or not llm.tie_embeddings}
    if vision and llm:                                                      # llama.cpp looks for mean and std here
        files = {"preprocessor_config.json": dict(
            feature_extractor_type="CLIPFeatureExtractor", size=vision.image_size, crop_size=vision.image_size,
            resample=3, image_mean=MEAN, image_std=STD)} | (files or {})
    write_folder(tensors, config, out_dir, tokenizer_dir if llm else None, dtype, files)

def write_folder(tensors, config, out_dir, tokenizer_dir, dtype, files=None):
    """Write a folder whole or not at all (temporary name, then rename); an older model folder is replaced. tensors:
    {stored name: tensor}. The tokenizer's files are copied; files: {name: dict or text}, in their stead or as well."""
    out = Path(out_dir)
    model = (out / "config.json").is_file() and any(out.glob("*.safetensors"))      # a run's folder has no weights
    if out.exists() and any(out.iterdir()) and not model:
        raise ValueError(f"{out} exists and is not a model folder; choose another name or remove it")
    new, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    for word in ("tmp", "old"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{word}-*"): shutil.rmtree(left)     # of a killed write
    new.mkdir(parents=True)
    try:
        for name in TOKENIZER_FILES if tokenizer_dir else ():
            if (path := Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(path, new / name)
        for name, content in {"config.json": config, **(files or {})}.items():
            _write_json(new / name, content)
        if (path := new / "added_tokens.json").is_file():
            ids = read_json(path, dict)
            _write_json(new / "generation_config.json", dict(
                eos_token_id=ids.get("<|im_end|>"), pad_token_id=ids.get("<|endoftext|>")))
        _write_shards(tensors, new, dtype)
        for path in (*new.iterdir(), new):
            path.chmod(0o755 if path is new else 0o644)                     # safetensors lets the owner alone read
            os.fsync(fd := os.open(path, os.O_RDONLY))
            os.close(fd)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)

def _write_shards(tensors, folder, dtype):
    shards, room, where = [], 0, {}
    for name, tensor in tensors.items():
        if (size := tensor.numel() * dtype.itemsize) > room:
            shards, room = [*shards, []], SHARD_BYTES
        shards[-1].append(name)
        room -= size
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        part = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(part, folder / file, metadata=dict(format="pt"))
        except SafetensorError as e:
            raise OSError(f"{folder / file} could not be written ({e}); is the disk full?") from None
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        _write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=size), weight_map=where))


def weights_hash(folder):
    """sha256 of a model folder's safetensors file; of the digests, one after the other, where there are several."""
    digests = [file_hash(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not digests: raise FileNotFoundError(f"no *.safetensors in {folder!r}; give the model folder, --model=DIR")
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
