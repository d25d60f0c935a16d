"""config.json of a model folder, in InternVL's layout: read into our configurations, and written.

`architectures` tells three kinds apart: a whole model (SailVLModel, InternVLChatModel) and its
released parts, a language model (Qwen2ForCausalLM) and a ViT (InternVisionModel).
"""
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from configurator import range_problem, setting
from inputs.files import read_json
from inputs.images import MAX_TILES
from model import LLMConfig
from vision import VisionConfig

# the kinds, and what their tensor names lack of ours
PREFIX = {
    "SailVLModel": "",
    "InternVLChatModel": "",
    "Qwen2ForCausalLM": "language_model.",
    "InternVisionModel": "vision_model.",
}

# config.json's name for each field of VisionConfig and LLMConfig; downsample has none of its own,
# see downsample_ratio
VISION_NAMES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "qkv_bias",
    "initializer_factor": "init_values",
}
LLM_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_positions",
}

# entries that are written, and refused if a folder has another value: that model is not ours
VISION_FIXED = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "qk_normalization": False,
}
LLM_FIXED = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
}
MODEL_FIXED = {
    "ps_version": "v2",
    "select_layer": -1,
    "dynamic_image_size": True,
    "pad2square": False,
}


@dataclass(slots=True)
class ModelEntries:
    """Entries of a whole model beside its two parts."""
    min_dynamic_patch: int = setting(1, at_least=1, at_most=MAX_TILES)
    max_dynamic_patch: int = setting(12, at_least=1, at_most=MAX_TILES)
    use_thumbnail: bool = True
    template: str = ""
    downsample_ratio: float = setting(0.5, above=0, at_most=1)


MODEL_FIELDS = {field.name: field for field in fields(ModelEntries)}
MODEL_DEFAULTS = {name: field.default for name, field in MODEL_FIELDS.items()}
# What a caller may change, as it is written.
CHANGEABLE = {name: MODEL_DEFAULTS[name]
              for name in ("min_dynamic_patch", "max_dynamic_patch", "use_thumbnail")}
CHANGEABLE |= {"use_backbone_lora": 0, "use_llm_lora": 0}


def read_configs(folder):
    """Read a folder's config.json -> (VisionConfig or None, LLMConfig or None, the file as a dict).

    A language model alone has no VisionConfig, a ViT alone no LLMConfig. FileNotFoundError, or
    ValueError for an unknown architecture or option.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a model")
    raw = read_json(path, dict)
    if "argv" in raw:  # config.json of a run folder
        models = [str(p.parent) for p in sorted(Path(folder).glob("*/config.json"))]
        there_are = ", ".join(models) or "none yet"
        raise ValueError(f"{folder} is the folder of a run; its models: {there_are}")
    try:
        vision, llm = parse_config(raw, path)
    except (TypeError, AttributeError, ZeroDivisionError, KeyError) as e:
        raise ValueError(f"{path} is not what it should be: {e!r}") from None
    return vision, llm, raw


def parse_config(raw, path="config.json"):
    """Content of config.json -> (VisionConfig or None, LLMConfig or None). path: for messages."""
    names = raw.get("architectures") or ["none"]
    if not isinstance(names, list):
        raise ValueError(f"{path}: architectures = {names!r} must be a list of one name")
    kind = names[0]
    if kind == "InternVLForConditionalGeneration":
        raise ValueError(f"{path}: transformers' own layout is only written here; take the folder "
                         "it was exported from")
    if kind not in PREFIX:
        known = ", ".join(PREFIX)
        raise ValueError(f"{path}: architecture {kind} is not supported, only {known}")
    vision = None if kind == "Qwen2ForCausalLM" else parse_vision(raw, path)
    llm = None if kind == "InternVisionModel" else parse_llm(raw, path)
    if vision and llm:
        fixed = MODEL_FIXED | {"force_image_size": vision.image_size}
        values = read_values(raw, path, MODEL_FIELDS, fixed, MODEL_DEFAULTS)
        least = values["min_dynamic_patch"]
        most = values["max_dynamic_patch"]
        if least > most:
            raise ValueError(f"{path}: min_dynamic_patch = {least} is more than max_dynamic_patch "
                             f"= {most}; mend config.json or copy it again")
    return vision, llm


def parse_vision(raw, path):
    name = "downsample_ratio"
    ratio = read_values(raw, path, {name: MODEL_FIELDS[name]}, {}, MODEL_DEFAULTS)[name]
    if 1 / ratio not in range(1, 65):
        raise ValueError(f"{path}: {name} {ratio} is not one over a whole number up to 64")

    section = raw.get("vision_config", raw)
    defaults = {"layer_norm_eps": 1e-6, "qkv_bias": True, "initializer_factor": 1.0}
    values = read_values(section, f"{path}: vision encoder",
                         fields_of(VisionConfig, VISION_NAMES), VISION_FIXED, defaults)
    sizes = {ours: values[theirs] for theirs, ours in VISION_NAMES.items()}
    return VisionConfig(**sizes, downsample=int(1 / ratio))


def parse_llm(raw, path):
    section = raw.get("llm_config", raw)
    rope = section.get("rope_parameters") or {}  # transformers 5 keeps rope_theta there
    read_values(rope, path, {}, {"rope_type": "default"}, {})

    defaults = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": 0,  # none is refused
        "rope_theta": rope.get("rope_theta", 1e4),
        "max_position_embeddings": 32768,
    }
    dim = section.get("hidden_size")
    heads = section.get("num_attention_heads")
    if type(dim) is int and type(heads) is int and heads != 0:
        defaults["head_dim"] = dim // heads
    values = read_values(section, f"{path}: language model", fields_of(LLMConfig, LLM_NAMES),
                         LLM_FIXED, defaults)
    return LLMConfig(**{ours: values[theirs] for theirs, ours in LLM_NAMES.items()})


def fields_of(config, names):
    """{name in config.json: the field of the dataclass config that it is for}."""
    ours = {field.name: field for field in fields(config)}
    return {theirs: ours[name] for theirs, name in names.items()}


def read_values(section, where, known, fixed, defaults):
    """Read the names of `known`, {name: field}, from a section of config.json -> {name: value}.

    A null counts as absent. ValueError for a value other than `fixed` allows, a name that is
    missing, or a value that does not fit its field.
    """
    for name, value in fixed.items():
        found = section.get(name)
        if found not in (None, value):
            raise ValueError(f"{where}: {name} = {found!r} is not supported, only {value!r}")
    given = {name: value for name, value in section.items() if value is not None}
    values = defaults | given
    missing = [name for name in known if name not in values]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for name, field in known.items():
        check_value(where, name, values[name], field)
    return {name: values[name] for name in known}


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def check_value(where, name, value, field):
    """ValueError unless value is of the field's kind and in its range.

    A model beyond all ranges would be built for hours before its weights are found to be others.
    """
    kind = field.type
    problem = f"must be {WORDS[kind]}"
    if type(value) is kind or (kind is float and type(value) is int):
        problem = range_problem(field, value) if kind in (int, float) else ""
    if problem:
        raise ValueError(f"{where}: {name} = {repr(value)[:40]} {problem}; mend config.json or "
                         "copy it again")


def config_json(vision, llm, dtype=torch.bfloat16, template="sailvl-chat", extra=None):
    """The content of config.json in the released layouts; without vision or llm that of a part.

    extra: a dict, of which the entries of CHANGEABLE are taken for a whole model.
    """
    torch_dtype = str(dtype).removeprefix("torch.")
    if vision:
        vision_section = {theirs: getattr(vision, ours) for theirs, ours in VISION_NAMES.items()}
        vision_section |= VISION_FIXED | {
            "torch_dtype": torch_dtype, "use_flash_attn": False, "dropout": 0.0,
            "attention_dropout": 0.0, "drop_path_rate": 0.0, "num_channels": 3,
        }
    if llm:
        llm_section = {theirs: getattr(llm, ours) for theirs, ours in LLM_NAMES.items()}
        llm_section |= LLM_FIXED | {
            "torch_dtype": torch_dtype, "attention_dropout": 0.0, "initializer_range": 0.02,
            "use_cache": True,
        }
    if not llm:
        return vision_section
    if not vision:
        return llm_section
    extra = extra or {}
    config = {name: extra.get(name, value) for name, value in CHANGEABLE.items()}
    return config | MODEL_FIXED | {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "torch_dtype": torch_dtype,
        "template": template,
        "downsample_ratio": 1 / vision.downsample,
        "force_image_size": vision.image_size,
        "tie_word_embeddings": llm.tie_embeddings,
        "vision_config": vision_section,
        "llm_config": llm_section,
    }
