"""Model folders: config.json in InternVL's layout, safetensors, tokenizer files. Reading, checking, writing.

Three kinds of folders are known by `architectures` in their config.json, and all three are read and written:
    SailVLModel, InternVLChatModel   a whole model; its tensor names are ours
    Qwen2ForCausalLM                 a language model, as Qwen2.5 is released; ours with `language_model.` in front
    InternVisionModel                a ViT, as InternViT is released; ours with `vision_model.` in front
Every stored tensor is used exactly once and every parameter filled exactly once, or the folder is refused.
"""
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import VLM, LLMConfig
from vision import VisionConfig

PREFIX = {"SailVLModel": "", "InternVLChatModel": "", "Qwen2ForCausalLM": "language_model.",
          "InternVisionModel": "vision_model."}
TOKENIZER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json",
                   "tokenizer.json", "chat_template.jinja")
IMG_CONTEXT = 151667                    # id of <IMG_CONTEXT> in SAIL-VL and InternVL2.5, if no tokenizer file says so
SHARD_BYTES = 5 * 10 ** 9
HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

# our field -> the field of config.json
VISION_FIELDS = dict(image_size="image_size", patch_size="patch_size", dim="hidden_size", n_layers="num_hidden_layers",
                     n_heads="num_attention_heads", ffn_dim="intermediate_size", norm_eps="layer_norm_eps",
                     qkv_bias="qkv_bias", init_values="initializer_factor")
LLM_FIELDS = dict(vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers",
                  n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", head_dim="head_dim",
                  ffn_dim="intermediate_size", rope_theta="rope_theta", norm_eps="rms_norm_eps",
                  tie_embeddings="tie_word_embeddings", max_positions="max_position_embeddings")
# what else a config.json may say only like this, because the model is written for it
VISION_FIXED = dict(hidden_act="gelu", norm_type="layer_norm", qk_normalization=False)
LLM_FIXED = dict(hidden_act="silu", use_sliding_window=False, rope_scaling=None)
TOP_FIXED = dict(ps_version="v2", select_layer=-1)
TOP_DEFAULTS = dict(template="sailvl-chat", dynamic_image_size=True, min_dynamic_patch=1, max_dynamic_patch=12,
                    use_thumbnail=True, pad2square=False, use_backbone_lora=0, use_llm_lora=0)


# ---- config.json -----------------------------------------------------------------------------------------------------

def read_json(path):
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; a model folder is needed here")
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name}, so this is not a model folder")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def _fields(where, section, fields, fixed, optional):
    """Translate one section of config.json; refuse what is missing or what the model is not written for."""
    for name, value in fixed.items():
        if section.get(name, value) != value:
            raise ValueError(f"{where}: {name} = {section[name]!r} is not supported, only {value!r}")
    missing = [name for name in fields.values() if name not in section and name not in optional]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return {ours: section.get(theirs, optional.get(theirs)) for ours, theirs in fields.items()}


def read_configs(folder):
    """-> (VisionConfig or None, LLMConfig or None, the raw config.json as a dict). One of the two is None for the
    folder of a ViT or of a language model alone. ValueError (unknown architecture or option) or FileNotFoundError."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    kind = (raw.get("architectures") or ["none"])[0]
    if kind not in PREFIX:
        raise ValueError(f"{path}: architecture {kind} is not supported, only {', '.join(PREFIX)}")
    whole, vision, llm = PREFIX[kind] == "", None, None
    if whole or kind == "InternVisionModel":
        section, where = (raw.get("vision_config", {}), f"{path}, vision_config") if whole else (raw, str(path))
        arch = (section.get("architectures") or [section.get("model_type", "InternVisionModel")])[0]
        if arch not in ("InternVisionModel", "intern_vit_6b"):
            raise ValueError(f"{where}: vision encoder {arch} is not supported, only InternViT (InternVisionModel)")
        optional = dict(layer_norm_eps=1e-6, qkv_bias=True, initializer_factor=1.0)
        factor = 1 / raw.get("downsample_ratio", 0.5)
        if factor != int(factor):
            raise ValueError(f"{path}: downsample_ratio {raw['downsample_ratio']} is not one over a whole number")
        vision = VisionConfig(**_fields(where, section, VISION_FIELDS, VISION_FIXED, optional), downsample=int(factor))
    if whole:
        _fields(str(path), raw, {name: name for name in TOP_FIXED}, TOP_FIXED, {})
        if raw.get("force_image_size") not in (None, vision.image_size):
            raise ValueError(f"{path}: force_image_size {raw['force_image_size']} differs from the ViT's image_size "
                             f"{vision.image_size}")
    if whole or kind == "Qwen2ForCausalLM":
        section, where = (dict(raw.get("llm_config", {})), f"{path}, llm_config") if whole else (dict(raw), str(path))
        arch = (section.get("architectures") or ["Qwen2ForCausalLM"])[0]
        if arch != "Qwen2ForCausalLM":
            raise ValueError(f"{where}: language model {arch} is not supported, only Qwen2ForCausalLM")
        rope = section.get("rope_parameters") or {}                         # where transformers 5 keeps it
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{where}: rope_type {rope['rope_type']!r} is not supported, only 'default'")
        if "hidden_size" in section and "num_attention_heads" in section:
            section.setdefault("head_dim", section["hidden_size"] // section["num_attention_heads"])
        optional = dict(rope_theta=rope.get("rope_theta", 1e4), rms_norm_eps=1e-6, tie_word_embeddings=False,
                        max_position_embeddings=32768)
        llm = LLMConfig(**_fields(where, section, LLM_FIELDS, LLM_FIXED, optional))
    return vision, llm, raw


def image_token_id(folder):
    """The id of <IMG_CONTEXT> according to the tokenizer files; 151667 if they do not know it."""
    added = Path(folder) / "added_tokens.json"
    if added.is_file() and "<IMG_CONTEXT>" in (ids := read_json(added)):
        return ids["<IMG_CONTEXT>"]
    config = Path(folder) / "tokenizer_config.json"
    decoder = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    return next((int(i) for i, token in decoder.items() if token["content"] == "<IMG_CONTEXT>"), IMG_CONTEXT)


# ---- reading ---------------------------------------------------------------------------------------------------------

def _open(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the folder is incomplete, copy it again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged or cut short ({e}); copy it again") from None


def stored_tensors(folder):
    """-> {our name: (file, stored name, shape, dtype)} of all tensors in the folder, from the headers only."""
    folder = Path(folder)
    prefix = PREFIX[read_json(folder / "config.json")["architectures"][0]]
    index = folder / "model.safetensors.index.json"
    where = read_json(index).get("weight_map", {}) if index.is_file() else None
    files = [folder / name for name in (sorted(set(where.values())) if where is not None else ["model.safetensors"])]
    table = {}
    for path in files:
        with _open(path) as f:
            for name in f.keys():
                if where is not None and where.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {index.name} places in {where.get(name, 'no file')}")
                part = f.get_slice(name)
                table[prefix + name] = (path, name, tuple(part.get_shape()), part.get_dtype())
    lost = sorted(set(where or ()) - {name for _, name, _, _ in table.values()})
    if lost:
        raise ValueError(f"{index}: {_some(lost)} not in the file the index names")
    return table


def read_tensors(folder, table=None):
    """Yield (our name, tensor on the CPU, as stored), one at a time, file by file."""
    table = stored_tensors(folder) if table is None else table
    for path in sorted({path for path, *_ in table.values()}):
        with _open(path) as f:
            for ours, (file, name, _, _) in table.items():
                if file == path:
                    yield ours, f.get_tensor(name)


def _some(names, n=5):
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def account(folder, vision, llm, table):
    """Compare the stored tensors with the parameters of the model; ValueError listing both sides unless they agree.
    A missing head means that it shares the embedding table. -> the parameters' shapes {name: shape}."""
    shapes = parameter_shapes(vision, llm)
    if HEAD not in table:
        shapes.pop(HEAD, None)
    missing, unknown = sorted(set(shapes) - set(table)), sorted(set(table) - set(shapes))
    if missing or unknown:
        raise ValueError(f"{folder}: weights and config.json disagree; {len(missing)} parameters without a tensor"
                         f"{': ' if missing else ''}{_some(missing)}; {len(unknown)} tensors without a parameter"
                         f"{': ' if unknown else ''}{_some(unknown)}")
    for name, (path, _, shape, dtype) in table.items():
        if shape != shapes[name]:
            raise ValueError(f"{path}: {name} has shape {shape}, config.json asks for {shapes[name]}")
        if dtype not in ("F32", "BF16", "F16", "F64"):
            raise ValueError(f"{path}: {name} is stored as {dtype}; only floating-point weights can be loaded")
    return shapes


def parameter_shapes(vision, llm):
    """{name: shape} of the model, its ViT alone (llm None) or its language model alone (vision None)."""
    with torch.device("meta"):
        model = VLM(vision, llm or LLMConfig(n_layers=0, vocab_size=1), -1)
    keep = "" if vision and llm else "vision_model." if vision else "language_model."
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name.startswith(keep)}


def load_folder(folder, device="cpu", dtype=None, vision=True):
    """-> (VLM, config.json as a dict). dtype None keeps the stored one; vision=False loads the language model alone.

    Tensors are streamed one at a time. ValueError or FileNotFoundError when the folder is not what it says."""
    vision_cfg, llm, raw = read_configs(folder)
    if llm is None:
        raise ValueError(f"{folder} is a vision encoder only; join it with a language model: convert.py assemble")
    table = stored_tensors(folder)
    if not vision:
        vision_cfg, table = None, {name: entry for name, entry in table.items() if name.startswith("language_model.")}
    llm.tie_embeddings = HEAD not in table or (llm.tie_embeddings and _same(table, HEAD, TABLE))
    account(folder, vision_cfg, llm, table)
    names = dict(F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16, F64=torch.float64)
    with torch.device("meta"):
        model = VLM(vision_cfg, llm, image_token_id(folder)).to(dtype or names[table[TABLE][3]])
    model.to_empty(device=device).tie_weights()
    state = model.state_dict()
    for name, tensor in read_tensors(folder, table):
        state[name].copy_(tensor)
    return model, raw


def _same(table, one, other):
    """Are two stored tensors equal? (A head stored beside the table it is said to share: the weights decide.)"""
    pair = dict(read_tensors(None, {name: table[name] for name in (one, other)}))
    return torch.equal(pair[one], pair[other])


# ---- writing ---------------------------------------------------------------------------------------------------------

def config_json(vision, llm, dtype, template="sailvl-chat", extra=None):
    """config.json as a dict, in the released layouts; `extra` may add to and change the entries of a whole model."""
    kind = str(dtype).removeprefix("torch.")
    v = vision and dict(architectures=["InternVisionModel"], model_type="intern_vit_6b", torch_dtype=kind,
                        use_flash_attn=False, dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0, num_channels=3,
                        **{theirs: getattr(vision, ours) for ours, theirs in VISION_FIELDS.items()}, **VISION_FIXED)
    t = llm and dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype=kind, attention_dropout=0.0,
                     initializer_range=0.02, use_cache=True,
                     **{theirs: getattr(llm, ours) for ours, theirs in LLM_FIELDS.items()}, **LLM_FIXED)
    if vision is None or llm is None:
        return v or t
    return {**TOP_DEFAULTS, **(extra or {}), "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
            "torch_dtype": kind, "template": template, "downsample_ratio": 1 / vision.downsample, **TOP_FIXED,
            "force_image_size": vision.image_size, "tie_word_embeddings": llm.tie_embeddings,
            "vision_config": v, "llm_config": t}


def save_folder(state, vision, llm, out_dir, tokenizer_dir=None, template="sailvl-chat", dtype=torch.bfloat16,
                extra=None):
    """Write a model folder, whole or not at all (temporary folder, then rename; an older model folder is replaced).

    state: {our name: tensor}. vision=None writes a plain Qwen2 folder, llm=None an InternVisionModel folder, from the
    same names. Tokenizer files are copied from tokenizer_dir. extra: more entries for config.json."""
    shapes = parameter_shapes(vision, llm)
    if llm and llm.tie_embeddings:
        shapes.pop(HEAD)
    prefix = "" if vision and llm else "vision_model." if vision else "language_model."
    if missing := sorted(set(shapes) - set(state)):
        raise ValueError(f"{out_dir}: cannot save, no tensor for {_some(missing)}")
    tensors = {name.removeprefix(prefix): state[name] for name in shapes}
    config = config_json(vision, llm, dtype, template, extra)
    write_folder(tensors, config, out_dir, tokenizer_dir if llm else None, dtype)


def write_folder(tensors, config, out_dir, tokenizer_dir, dtype, files=None):
    """The writing itself: tensors {stored name: tensor}, config a dict, files {name: dict} more JSON files."""
    out, files = Path(out_dir), {"config.json": config, **(files or {})}
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out} exists and is not a model folder; choose another name or remove it")
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise FileNotFoundError(f"{tokenizer_dir}: no such folder (the tokenizer's files are copied from it)")
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, temporary / name)
        if (added := temporary / "added_tokens.json").is_file():
            ids = read_json(added)
            files.setdefault("generation_config.json", {"eos_token_id": ids.get("<|im_end|>"),
                                                        "pad_token_id": ids.get("<|endoftext|>")})
        _write_shards(tensors, temporary, dtype)
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            path.chmod(0o755 if path is temporary else 0o644)
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(tensors, folder, dtype):
    shards, sizes = [[]], [0]
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    where = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        part = {name: tensors[name].detach().to("cpu", dtype).contiguous().clone() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def start_model(cfg, origins, folder, tokenizer, text_only=False):
    """-> (VLM on the CPU, config.json extras): a model folder's weights, or random ones of cfg.vision and cfg.llm.

    Sizes that the configuration sets by itself must be those of the folder, else ValueError."""
    if not folder:
        if cfg.llm.vocab_size < tokenizer.n_vocab:
            raise ValueError(f"llm.vocab_size={cfg.llm.vocab_size} is smaller than the tokenizer's {tokenizer.n_vocab} "
                             f"tokens; set --llm.vocab_size={tokenizer.n_vocab} or more")
        with torch.device("meta"):
            model = VLM(None if text_only else cfg.vision, cfg.llm, tokenizer.image_id)
        return model.to_empty(device="cpu").init_weights(cfg.seed, cfg.init_std), {}
    model, raw = load_folder(folder, vision=not text_only)
    for part, config in (("vision", model.vision), ("llm", model.llm)):
        for key, origin in origins.items():
            name = key.removeprefix(part + ".")
            if key != name and config is not None and origin != "default" and key != "llm.tie_embeddings":
                want, have = getattr(getattr(cfg, part), name), getattr(config, name)
                if want != have:
                    raise ValueError(f"{origin}: {key}={want}, but {folder} has {have}; leave it out, or start from "
                                     "random weights with --init_from=")
    return model, {k: v for k, v in raw.items() if k not in ("vision_config", "llm_config")}
