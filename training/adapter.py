"""The adapter folder of a stage: LoRA matrices in the layout of PEFT, written and merged.

adapter_config.json says rank, alpha and modules, adapter_model.safetensors holds the matrices. The
names are those that modules have in transformers' own InternVL classes, which load what
`convert.py export --layout=transformers` writes.
"""
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from inputs.files import read_json
from model_config import TRANSFORMERS, config_json
from model_files import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    check_tensor_header,
    transformers_tensors,
    weights_hash,
)
from training.lora import add_product
from weights import load_folder, save_folder, some_of

PREFIX_OF_PEFT = "base_model.model."

# entries of adapter_config.json, and refused if a folder has another value: another method
ADAPTER_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def transformers_modules(linear, weight, vision):
    """{name of a module in transformers: its rows of `weight`} of our linear layer of this name.

    That is one module, or three for the qkv of the ViT. The rows are views.
    """
    architecture = TRANSFORMERS[1] if vision.kind == "aimv2" else TRANSFORMERS[0]
    modules = {}
    for name, rows in transformers_tensors({f"{linear}.weight": weight}, architecture).items():
        module = name.removesuffix(".weight")
        if module.startswith("language_model.model."):
            module = module.removeprefix("language_model.model.")
            module = f"language_model.{module}"
        modules[f"model.{module}"] = rows
    return modules


# ---- writing -------------------------------------------------------------------------------------

def adapter_files(adapters, cfg, source, trained_whole):
    """The files of an adapter folder -> {path in the model folder: content}.

    adapters: {linear layer: (A, B)} of lora.merge_adapters; source: the ModelFolder that training
    began from; trained_whole: parts that trained too, without adapters, as text.
    """
    tensors = {}
    modules = []
    for linear, (A, B) in adapters.items():
        for module, rows in transformers_modules(linear, B, source.vision).items():
            modules.append(module)
            # Copies, because a file cannot hold one tensor under several names.
            tensors[f"{PREFIX_OF_PEFT}{module}.lora_A.weight"] = A.clone()
            tensors[f"{PREFIX_OF_PEFT}{module}.lora_B.weight"] = rows.clone()
    metadata = {"format": "pt", "base": hash_of_base(source), "trained_whole": trained_whole}
    config = ADAPTER_FIXED | {
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    return {
        f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}": config,
        f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}": safetensors.torch.save(tensors, metadata),
    }


def hash_of_base(source):
    """weights_hash of the folder of a ModelFolder; "" if there is none, or it is gone by now."""
    if not source.tensors:
        return ""
    first_piece = next(iter(source.tensors.values()))[0]
    try:
        return weights_hash(first_piece.file.parent)
    except OSError:
        return ""


# ---- merging -------------------------------------------------------------------------------------

def write_merged(base, folder, target):
    """Write the model folder `base` with the adapter of a folder added to its weights."""
    model, base_config = load_folder(base)
    trained_whole = merge_adapter(model, base, folder)
    dtype = model.language_model.lm_head.weight.dtype
    template = base_config.get("template", "sailvl-chat")
    config = config_json(model.vision, model.llm, dtype, template, base_config)
    save_folder(model.state_dict(), config, target, base)
    if trained_whole:
        print(f"WARNING: {trained_whole} trained too, without adapters; {target} has not what they "
              f"learned, the model folder beside {folder} has", file=sys.stderr)


@torch.no_grad()
def merge_adapter(model, base, folder):
    """Add the product of each adapter of `folder` to the weights of a model, in place.

    base: the model's folder. ValueError or FileNotFoundError if the adapter is not one of this
    model, or not of this method. Returns which parts trained without adapters, as text.
    """
    config = read_adapter_config(folder)
    path = Path(folder) / ADAPTER_WEIGHTS
    tensors, metadata = read_adapter(path)
    if metadata.get("base", "") not in ("", weights_hash(base)):
        raise ValueError(f"{path} was trained beside other weights than those of {base}; give the "
                         "model folder that its stage began from, not an export of it")
    scale = config["lora_alpha"] / config["r"]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if model.llm.tie_embeddings:
        linears.pop("language_model.lm_head")
    merged = []
    for linear, module in linears.items():
        parts = transformers_modules(linear, module.weight.data, model.vision)
        for name, rows in parts.items():
            A = tensors.pop(f"{PREFIX_OF_PEFT}{name}.lora_A.weight", None)
            B = tensors.pop(f"{PREFIX_OF_PEFT}{name}.lora_B.weight", None)
            if A is None and B is None:
                continue
            check_pair(path, name, A, B, config["r"], tuple(rows.shape))
            rows.copy_(add_product(rows, A, B, scale))
            merged.append(name)
    if tensors:
        names = some_of(sorted(tensors), ", ")
        raise ValueError(f"{path}: {len(tensors)} tensors belong to no linear layer of {base}: "
                         f"{names}")
    missing = [target for target in config["target_modules"]
               if not any(f".{name}".endswith(f".{target}") for name in merged)]
    if missing or not merged:
        raise ValueError(f"{path} has no matrices for {some_of(missing, ', ') or 'any module'}; "
                         "copy it again")
    return metadata.get("trained_whole", "")


def read_adapter_config(folder):
    """The content of adapter_config.json. ValueError for an entry that is missing or unknown."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the folder {ADAPTER_FOLDER}/ of a "
                                "stage that was trained with --lora_rank")
    config = read_json(path, dict)
    kinds = {"r": int, "lora_alpha": (int, float), "target_modules": list}
    for name, kind in kinds.items():
        value = config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) or not value:
            raise ValueError(f"{path}: {name} = {json.dumps(value)} is not supported; it must be "
                             + ("a list of modules" if kind is list else "a positive number"))
    if min(config["r"], config["lora_alpha"]) <= 0:
        raise ValueError(f"{path}: r and lora_alpha must be above 0")
    for name, value in ADAPTER_FIXED.items():
        found = config.get(name)
        if found and found != value:
            raise ValueError(f"{path}: {name} = {json.dumps(found)} is not supported, only "
                             f"{json.dumps(value)}")
    return config


def read_adapter(path):
    """({name: tensor}, metadata) of adapter_model.safetensors."""
    check_tensor_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; copy the folder again") from None
    except SafetensorError as e:
        raise ValueError(f"{path}: damaged or cut short ({e}); copy it again") from None


def check_pair(path, name, A, B, rank, shape):
    """ValueError unless both matrices of a module are there and fit its weight of this shape."""
    outputs, inputs = shape
    for matrix, suffix, want in ((A, "lora_A", (rank, inputs)), (B, "lora_B", (outputs, rank))):
        if matrix is None:
            raise ValueError(f"{path}: {name} has no {suffix}; copy it again")
        if tuple(matrix.shape) != want:
            raise ValueError(f"{path}: {suffix} of {name} has shape {tuple(matrix.shape)}, but "
                             f"rank {rank} and the weight {shape} ask for {want}")
