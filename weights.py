"""Model folders: config.json in InternVL's layout, safetensors, tokenizer files. Reading, checking, writing.

`architectures` in config.json tells three kinds apart: a whole model (SailVLModel, InternVLChatModel), whose tensor
names are ours, a language model (Qwen2ForCausalLM) and a ViT (InternVisionModel) as they are released, whose names are
ours without the prefix. Every stored tensor is used once and every parameter filled once, or the folder is refused.
"""
import json, os, shutil
from dataclasses import astuple
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
DTYPES = dict(F32=torch.float32, BF16=torch.bfloat16, F16=torch.float16, F64=torch.float64)

# config.json's names for the fields of VisionConfig and LLMConfig, in their order; FIXED: what it may say only so
VISION_NAMES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size", "layer_norm_eps", "qkv_bias", "initializer_factor")
LLM_NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
VISION_FIXED = dict(hidden_act="gelu", norm_type="layer_norm", qk_normalization=False)
LLM_FIXED = dict(hidden_act="silu", use_sliding_window=False, rope_scaling=None)
TOP_FIXED = dict(ps_version="v2", select_layer=-1)
TOP_DEFAULTS = dict(template="sailvl-chat", dynamic_image_size=True, min_dynamic_patch=1, max_dynamic_patch=12,
                    use_thumbnail=True, pad2square=False, use_backbone_lora=0, use_llm_lora=0)

# ---- reading ---------------------------------------------------------------------------------------------------------

def read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no {path.name}, so this is not a model folder" if path.parent.is_dir()
                                else f"{path.parent}: no such folder; a model folder is needed here")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None

def _values(where, section, fixed, names=(), archs=()):
    """The values of these names in a section of config.json; refuse what is missing or not supported."""
    arch = (section.get("architectures") or [section.get("model_type")])[0]
    if archs and arch not in (None, *archs):
        raise ValueError(f"{where} {arch} is not supported, only InternViT and Qwen2 are")
    for name, value in fixed.items():
        if section.get(name, value) != value:
            raise ValueError(f"{where}: {name} = {section[name]!r} is not supported, only {value!r}")
    if missing := [name for name in names if name not in section]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return [section[name] for name in names]

def read_configs(folder):
    """-> (VisionConfig or None, LLMConfig or None, the raw config.json as a dict). One of the two is None for the
    folder of a ViT or of a language model alone. ValueError (unknown architecture or option) or FileNotFoundError."""
    path, vision, llm = Path(folder) / "config.json", None, None
    raw = read_json(path)
    kind = (raw.get("architectures") or ["none"])[0]
    if kind not in PREFIX:
        raise ValueError(f"{path}: architecture {kind} is not supported, only {', '.join(PREFIX)}")
    if kind != "Qwen2ForCausalLM":
        v = dict(layer_norm_eps=1e-6, qkv_bias=True, initializer_factor=1.0)
        v |= raw if kind == "InternVisionModel" else raw.get("vision_config", {})
        if (factor := 1 / raw.get("downsample_ratio", 0.5)) % 1:
            raise ValueError(f"{path}: downsample_ratio {raw['downsample_ratio']} is not one over a whole number")
        archs = "InternVisionModel", "intern_vit_6b"
        vision = VisionConfig(*_values(f"{path}: vision encoder", v, VISION_FIXED, VISION_NAMES, archs), int(factor))
    if kind != "InternVisionModel":
        t = raw if kind == "Qwen2ForCausalLM" else raw.get("llm_config", {})
        rope = t.get("rope_parameters") or {}                               # where transformers 5 keeps it
        _values(path, rope, dict(rope_type="default"))
        t = dict(rope_theta=rope.get("rope_theta", 1e4), rms_norm_eps=1e-6, tie_word_embeddings=False,
                 max_position_embeddings=32768, head_dim=t.get("hidden_size", 0) // t.get("num_attention_heads", 1)) | t
        llm = LLMConfig(*_values(f"{path}: language model", t, LLM_FIXED, LLM_NAMES, ("Qwen2ForCausalLM", "qwen2")))
    if vision and llm:
        _values(path, raw, TOP_FIXED)
        if (size := raw.get("force_image_size")) not in (None, vision.image_size):
            raise ValueError(f"{path}: force_image_size {size} differs from the ViT's image_size {vision.image_size}")
    return vision, llm, raw

def added_tokens(folder):
    """{token: id} of the special tokens, as far as the tokenizer files of the folder list them."""
    config, added = (read_json(path) if path.is_file() else {} for path in (
        Path(folder) / "tokenizer_config.json", Path(folder) / "added_tokens.json"))
    return {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()} | added

def image_token_id(folder):
    return added_tokens(folder).get("<IMG_CONTEXT>", IMG_CONTEXT)

def _count(names, what, n=5):
    """'7 tensors without a parameter: a, b, c, d, e and 2 more'"""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return f"{len(names)} {what}" + (f": {', '.join(sorted(names)[:n])}{more}" if names else "")

def inspect_folder(folder):
    """Account for a folder by its headers: every tensor must belong to one parameter and the reverse; a missing head
    shares the embedding table. -> (*read_configs, {our name: (file, stored name, shape, dtype)}), or ValueError."""
    vision, llm, raw = read_configs(folder)
    shapes, table, found = parameter_shapes(vision, llm), {}, set()
    index = Path(folder) / "model.safetensors.index.json"
    where = read_json(index).get("weight_map", {}) if index.is_file() else {}
    for path in sorted({index.with_name(file) for file in where.values()} or {index.with_name("model.safetensors")}):
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():
                    entry = path, name, tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype()
                    table[PREFIX[raw["architectures"][0]] + name] = entry
                    found.add((name, path.name))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; the folder is incomplete, copy it again") from None
        except SafetensorError as e:
            raise ValueError(f"{path}: damaged or cut short ({e}); copy it again") from None
    if where and (wrong := {name for name, _ in found ^ set(where.items())}):
        raise ValueError(f"{index}: {_count(wrong, 'tensors are not where the index says')}")
    if HEAD not in table:
        shapes.pop(HEAD, None)
    if shapes.keys() != table.keys():
        raise ValueError(f"{folder}: weights and config.json disagree; "
                         f"{_count(shapes.keys() - table.keys(), 'parameters without a tensor')}; "
                         f"{_count(table.keys() - shapes.keys(), 'tensors without a parameter')}")
    for name, (path, _, shape, dtype) in table.items():
        if shape != shapes[name]:
            raise ValueError(f"{path}: {name} has shape {shape}, config.json asks for {shapes[name]}")
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is stored as {dtype}; only floating-point weights can be loaded")
    return vision, llm, raw, table

def read_tensors(table):
    """Yield (our name, tensor on the CPU, as stored) for the entries of a table, one at a time, file by file."""
    for path in sorted({path for path, *_ in table.values()}):
        with safe_open(path, framework="pt") as f:
            yield from ((ours, f.get_tensor(name)) for ours, (file, name, *_) in table.items() if file == path)

def parameter_shapes(vision, llm):
    """{name: shape} of the model, its ViT alone (llm None) or its language model alone (vision None)."""
    with torch.device("meta"):
        model = VLM(vision, llm or LLMConfig(n_layers=0, vocab_size=1), -1)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if llm or name.startswith("vision_model.")}

def load_folder(folder, device="cpu", dtype=None, vision=True):
    """-> (VLM, config.json as a dict). dtype None keeps the stored one; vision=False loads the language model alone.
    Tensors are streamed one at a time. ValueError or FileNotFoundError when the folder is not what it says."""
    vision_cfg, llm, raw, table = inspect_folder(folder)
    if llm is None:
        raise ValueError(f"{folder} is a vision encoder only; join it with a language model: convert.py assemble")
    if not vision:
        vision_cfg, table = None, {name: entry for name, entry in table.items() if name.startswith("language_model.")}
    if HEAD in table and llm.tie_embeddings:            # stored beside the table it should share: the weights decide
        llm.tie_embeddings = torch.equal(*dict(read_tensors({name: table[name] for name in (HEAD, TABLE)})).values())
    llm.tie_embeddings |= HEAD not in table
    with torch.device("meta"):
        model = VLM(vision_cfg, llm, image_token_id(folder)).to(dtype or DTYPES[table[TABLE][3]])
    model.to_empty(device=device).tie_weights()
    state = model.state_dict()
    for name, tensor in read_tensors(table):
        state[name].copy_(tensor)
    return model, raw

def start_model(cfg, origins, folder, tokenizer, text_only=False):
    """-> (VLM on the CPU, config.json extras): a model folder's weights, or random ones of cfg.vision and cfg.llm.
    Sizes that the configuration sets by itself must be those of the folder, else ValueError."""
    if not folder:
        if cfg.llm.vocab_size < (n := tokenizer.n_vocab):
            raise ValueError(f"llm.vocab_size={cfg.llm.vocab_size} is smaller than the tokenizer's {n} tokens; "
                             f"set --llm.vocab_size={n} or more")
        with torch.device("meta"):
            model = VLM(None if text_only else cfg.vision, cfg.llm, tokenizer.image_id)
        return model.to_empty(device="cpu").init_weights(cfg.seed, cfg.init_std), {}
    model, raw = load_folder(folder, vision=not text_only)
    for key, origin in origins.items():
        part, _, name = key.partition(".")
        if name and part in ("vision", "llm") and getattr(model, part) and key != "llm.tie_embeddings":
            want, have = getattr(getattr(cfg, part), name), getattr(getattr(model, part), name)
            if origin != "default" and want != have:
                raise ValueError(f"{origin}: {key}={want}, but {folder} has {have}; leave it out, or start from "
                                 "random weights with --init_from=")
    return model, raw

# ---- writing ---------------------------------------------------------------------------------------------------------

def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

def config_json(vision, llm, dtype, template="sailvl-chat", extra=None):
    """config.json as a dict, in the released layouts; `extra` may add to and change the entries of a whole model."""
    kind = str(dtype).removeprefix("torch.")
    v = vision and dict(zip(VISION_NAMES, astuple(vision))) | VISION_FIXED | dict(
        architectures=["InternVisionModel"], model_type="intern_vit_6b", torch_dtype=kind, use_flash_attn=False,
        dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0, num_channels=3)
    t = llm and dict(zip(LLM_NAMES, astuple(llm))) | LLM_FIXED | dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", torch_dtype=kind, attention_dropout=0.0,
        initializer_range=0.02, use_cache=True)
    if vision is None or llm is None:
        return v or t
    return TOP_DEFAULTS | (extra or {}) | TOP_FIXED | dict(
        architectures=["InternVLChatModel"], model_type="internvl_chat", torch_dtype=kind, template=template,
        downsample_ratio=1 / vision.downsample, force_image_size=vision.image_size,
        tie_word_embeddings=llm.tie_embeddings, vision_config=v, llm_config=t)

def save_folder(state, vision, llm, out_dir, tokenizer_dir=None, template="sailvl-chat", dtype=torch.bfloat16,
                extra=None, files=None):
    """Write a model folder, whole or not at all (temporary folder, then rename; an older model folder is replaced).
    state: {our name: tensor}. vision=None writes a plain Qwen2 folder, llm=None an InternVisionModel folder, from the
    same names. Tokenizer files are copied from tokenizer_dir. extra: more entries for config.json. files: {name: dict},
    JSON files to write as well or instead of the tokenizer's."""
    config = config_json(vision, llm, dtype, template, extra)
    names = [name for name in parameter_shapes(vision, llm) if name != HEAD or not llm.tie_embeddings]
    if missing := set(names) - state.keys():
        raise ValueError(f"{out_dir}: cannot save; {_count(missing, 'parameters without a tensor')}")
    tensors = {name.removeprefix(PREFIX[config["architectures"][0]]): state[name] for name in names}
    write_folder(tensors, config, out_dir, tokenizer_dir if llm else None, dtype, files)

def write_folder(tensors, config, out_dir, tokenizer_dir, dtype, files=None):
    """The writing itself: tensors {stored name: tensor}, config a dict, files {name: dict} more JSON files."""
    out, files = Path(out_dir), {"config.json": config, **(files or {})}
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ValueError(f"{out} exists and is not a model folder; choose another name or remove it")
    if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
        raise FileNotFoundError(f"{tokenizer_dir}: no such folder (the tokenizer's files are copied from it)")
    new, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name in TOKENIZER_FILES if tokenizer_dir is not None else ():
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, new / name)
        for name, content in files.items():
            _write_json(new / name, content)
        if (new / "added_tokens.json").is_file():
            ids = read_json(new / "added_tokens.json")
            _write_json(new / "generation_config.json", dict(eos_token_id=ids.get("<|im_end|>"),
                                                             pad_token_id=ids.get("<|endoftext|>")))
        _write_shards(tensors, new, dtype)
        for path in (*new.iterdir(), new):
            path.chmod(0o755 if path is new else 0o644)
            os.fsync(fd := os.open(path, os.O_RDONLY))
            os.close(fd)
        if out.exists():
            out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)

def _write_shards(tensors, folder, dtype):
    sizes = {name: tensor.numel() * dtype.itemsize for name, tensor in tensors.items()}
    shards, room, where = [], 0, {}
    for name, size in sizes.items():
        if size > room:
            shards, room = [*shards, []], SHARD_BYTES
        shards[-1].append(name)
        room -= size
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        part = {name: tensors[name].detach().to("cpu", dtype).contiguous().clone() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
