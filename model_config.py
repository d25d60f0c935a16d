"""config.json of a model folder, in InternVL's layout: read into our configurations, and written.

`architectures` tells what a folder is: a whole model or one of its released parts, a language model
or a ViT, see PREFIX. What transformers' own classes write is read too, see
from_transformers.
"""
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from configurator import range_problem, setting
from inputs.files import read_json
from inputs.images import MAX_TILES
from model import LLMConfig
from vision import VisionConfig

# what a folder may be, and what its tensor names lack of ours
PREFIX = {
    "SailVLModel": "",  # SAIL-VL, and SAIL-VL-1.5 and 1.6
    "SAILVLModel": "",  # SAIL-VL2
    "InternVLChatModel": "",
    "Qwen2ForCausalLM": "language_model.",
    "Qwen3ForCausalLM": "language_model.",
    "InternVisionModel": "vision_model.",
    "AIMv2Model": "vision_model.",
    # in transformers' layout; the second one is InternVL with an AIMv2, see convert.MODELING
    "InternVLForConditionalGeneration": "",
    "SailVLForConditionalGeneration": "",
}


class Part(NamedTuple):
    """How config.json describes a kind of ViT or of language model."""
    names: dict  # {its name: the field of ours}; downsample has none, see downsample_ratio
    fixed: dict  # what is written, and refused if a folder has another value
    defaults: dict  # of names that a folder may leave out
    ours: dict  # fields of ours that the kind decides


VISION_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "ffn_dim",
}
INTERNVIT = Part(
    names=VISION_SIZES | {
        "layer_norm_eps": "norm_eps",
        "qkv_bias": "qkv_bias",
        "initializer_factor": "init_values",
    },
    fixed={
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "qk_normalization": False,
    },
    defaults={"layer_norm_eps": 1e-6, "qkv_bias": True, "initializer_factor": 1.0},
    ours={},
)
AIMV2 = Part(
    names=VISION_SIZES | {"rms_norm_eps": "norm_eps"},
    fixed={
        "architectures": ["AIMv2Model"],
        "model_type": "aimv2",
        "qkv_bias": False,
        "use_bias": False,
    },
    defaults={"rms_norm_eps": 1e-5},
    ours={"kind": "aimv2"},
)
QWEN2 = Part(
    names={
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
    },
    fixed={
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
    },
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": 0,  # none is refused
        "rope_theta": 1e4,
        "max_position_embeddings": 32768,
    },
    ours={},
)
QWEN3 = QWEN2._replace(
    fixed=QWEN2.fixed | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
    },
    ours={"qwen3": True},
)
TRANSFORMERS = ("InternVLForConditionalGeneration", "SailVLForConditionalGeneration")
LANGUAGE_MODELS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
VISION_ENCODERS = ("InternVisionModel", "AIMv2Model")
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

    A language model alone has no VisionConfig, a ViT alone no LLMConfig. The dict is in InternVL's
    words, whoever wrote the file. FileNotFoundError, or ValueError for an unknown architecture or
    option.
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
        raw = from_transformers(raw, path)
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
    if kind not in PREFIX:
        known = ", ".join(PREFIX)
        raise ValueError(f"{path}: architecture {kind} is not supported, only {known}")
    vision = None if kind in LANGUAGE_MODELS else parse_vision(raw, path)
    llm = None if kind in VISION_ENCODERS else parse_llm(raw, path)
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
    if raw["architectures"] == ["SAILVLModel"]:
        # SAIL-VL2 has no other ViT, and what it calls it is not known here.
        section = section | {name: AIMV2.fixed[name] for name in ("architectures", "model_type")}
    where = f"{path}: vision encoder"
    part = part_of(section, where, INTERNVIT, AIMV2)
    values = read_values(section, where, fields_of(VisionConfig, part.names), part.fixed,
                         part.defaults)
    sizes = {ours: values[theirs] for theirs, ours in part.names.items()}
    return VisionConfig(**sizes, **part.ours, downsample=int(1 / ratio))


def parse_llm(raw, path):
    section = raw.get("llm_config", raw)
    where = f"{path}: language model"
    # transformers 5 keeps rope_theta with what older versions call rope_scaling.
    rope = (section.get("rope_scaling") or {}) | (section.get("rope_parameters") or {})
    read_values(rope, f"{where}: rope", {}, {"partial_rotary_factor": 1.0}, {})
    # The dynamic kind of InternVL3 is another one only beyond max_position_embeddings tokens.
    if not {rope.get(name) for name in ("type", "rope_type")} <= {None, "default", "dynamic"}:
        raise ValueError(f"{where}: rope_scaling = {rope!r} is not supported, only the types "
                         "'default' and 'dynamic'")
    part = part_of(section, where, QWEN2, QWEN3)
    defaults = part.defaults | {name: rope[name] for name in ("rope_theta",) if name in rope}
    dim = section.get("hidden_size")
    heads = section.get("num_attention_heads")
    if type(dim) is int and type(heads) is int and heads != 0:
        defaults["head_dim"] = dim // heads
    values = read_values(section, where, fields_of(LLMConfig, part.names), part.fixed, defaults)
    return LLMConfig(**{ours: values[theirs] for theirs, ours in part.names.items()}, **part.ours)


def part_of(section, where, *parts):
    """The Part that a section's `architectures` names, else its `model_type`, else the first."""
    for name in ("architectures", "model_type"):
        value = section.get(name)
        if value is None:
            continue
        for part in parts:
            if value == part.fixed[name]:
                return part
        known = " or ".join(repr(part.fixed[name]) for part in parts)
        raise ValueError(f"{where}: {name} = {value!r} is not supported, only {known}")
    return parts[0]


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


# ---- writing -------------------------------------------------------------------------------------

def config_json(vision, llm, dtype=torch.bfloat16, template="sailvl-chat", extra=None):
    """The content of config.json in the released layouts; without vision or llm that of a part.

    extra: a dict, of which the entries of CHANGEABLE are taken for a whole model.
    """
    torch_dtype = str(dtype).removeprefix("torch.")
    if vision:
        part = AIMV2 if vision.kind == "aimv2" else INTERNVIT
        vision_section = section_json(part, vision) | {
            "torch_dtype": torch_dtype, "use_flash_attn": False, "dropout": 0.0,
            "attention_dropout": 0.0, "drop_path_rate": 0.0, "num_channels": 3,
        }
    if llm:
        llm_section = section_json(QWEN3 if llm.qwen3 else QWEN2, llm) | {
            "torch_dtype": torch_dtype, "attention_dropout": 0.0, "initializer_range": 0.02,
            "use_cache": True,
        }
    if not llm:
        return vision_section
    if not vision:
        return llm_section
    names = ("InternVLChatModel", "internvl_chat")
    if vision.kind == "aimv2":
        names = ("SAILVLModel", "sailvl") if llm.qwen3 else ("SailVLModel", "internvl_chat")
    extra = extra or {}
    config = {name: extra.get(name, value) for name, value in CHANGEABLE.items()}
    return config | MODEL_FIXED | {
        "architectures": [names[0]],
        "model_type": names[1],
        "torch_dtype": torch_dtype,
        "template": template,
        "downsample_ratio": 1 / vision.downsample,
        "force_image_size": vision.image_size,
        "tie_word_embeddings": llm.tie_embeddings,
        "vision_config": vision_section,
        "llm_config": llm_section,
    }


def section_json(part, cfg):
    """The section of a VisionConfig or LLMConfig, as a Part has it."""
    return {theirs: getattr(cfg, ours) for theirs, ours in part.names.items()} | part.fixed


# ---- transformers' words -------------------------------------------------------------------------

# Its name for an entry of vision_config that InternVL's layout calls otherwise.
INTERNVIT_WORDS = {
    "qkv_bias": "attention_bias",
    "initializer_factor": "layer_scale_init_value",
    "qk_normalization": "use_qk_norm",
}
AIMV2_WORDS = {"use_bias": "mlp_bias"}
# Entries that InternVL's layout does not have, and their only supported values.
INTERNVIT_ADDED = {
    "model_type": "internvl_vision",
    "use_mask_token": False,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
AIMV2_ADDED = {"model_type": "aimv2_vision_model", "use_head": False, "is_native": False}
MODEL_ADDED = {"projector_hidden_act": "gelu", "vision_feature_layer": -1}


def transformers_config(vision, llm, dtype, template, extra):
    """config.json for transformers' InternVLForConditionalGeneration; arguments as in config_json.

    The template and the entries of CHANGEABLE mean nothing to transformers. They are there for
    whoever reads the folder here.
    """
    ours = config_json(vision, llm, dtype, template, extra)
    is_aimv2 = vision.kind == "aimv2"
    words = AIMV2_WORDS if is_aimv2 else INTERNVIT_WORDS
    section = {words.get(name, name): value for name, value in ours["vision_config"].items()}
    section |= AIMV2_ADDED if is_aimv2 else INTERNVIT_ADDED
    section["architectures"] = ["Aimv2VisionModel" if is_aimv2 else "InternVLVisionModel"]
    if not is_aimv2:
        section |= {name: [section[name]] * 2 for name in ("image_size", "patch_size")}
    kept = ("torch_dtype", "template", "downsample_ratio", "tie_word_embeddings", *CHANGEABLE)
    architecture = "SailVLForConditionalGeneration" if is_aimv2 else TRANSFORMERS[0]
    return {name: ours[name] for name in kept} | MODEL_ADDED | {
        "architectures": [architecture],
        "model_type": "internvl",
        "image_seq_length": vision.tokens_per_tile,
        "vision_feature_select_strategy": "full" if is_aimv2 else "default",
        "text_config": ours["llm_config"],
        "vision_config": section,
    }


def from_transformers(raw, path):
    """The content of a config.json of transformers_config, in InternVL's words; others unchanged.

    ValueError for an option that is not supported.
    """
    if (raw.get("architectures") or [""])[0] not in TRANSFORMERS:
        return raw
    read_values(raw, path, {}, MODEL_ADDED, {})
    section = dict(raw["vision_config"])
    is_aimv2 = section["model_type"] == AIMV2_ADDED["model_type"]
    added = AIMV2_ADDED if is_aimv2 else INTERNVIT_ADDED
    read_values(section, f"{path}: vision encoder", {}, added, {})
    for ours, theirs in (AIMV2_WORDS if is_aimv2 else INTERNVIT_WORDS).items():
        if theirs in section:
            section[ours] = section.pop(theirs)
    part = AIMV2 if is_aimv2 else INTERNVIT
    section |= {name: part.fixed[name] for name in ("architectures", "model_type")}
    for name in ("image_size", "patch_size"):
        sides = section.get(name)
        if isinstance(sides, list) and len(set(sides)) == 1:
            section[name] = sides[0]
    # Released "-hf" folders are InternVL's, and say no template.
    template = {"template": "internvl2_5"}
    return template | raw | {"vision_config": section, "llm_config": raw["text_config"]}
