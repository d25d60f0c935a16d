"""Model folders for tests: a small model saved, its config.json edited, a large one of holes."""

import json
import math
import os

import torch

import model_config
import weights


def save(folder, vlm, part="", tokenizer=None, template="sailvl-chat", extra=None):
    """Write a model, or its part "vit" or "llm" as it is released, in fp32. -> the folder."""
    vision = None if part == "llm" else vlm.vision
    llm = None if part == "vit" else vlm.llm
    config = model_config.config_json(vision, llm, torch.float32, template, extra)
    weights.save_folder(vlm.state_dict(), config, folder, tokenizer)
    return folder


def edit(folder, **changes):
    """Change entries of config.json, `vision_config__image_size=3` also inside a section."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def same_state(one, other):
    """Whether two models hold the same tensors under the same names."""
    one = one.state_dict()
    other = other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def sparse_folder(folder, vision, llm, shard_bytes=weights.SHARD_BYTES):
    """A model folder of any size that takes no room on the disk: real headers, zeros as holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model_config.config_json(vision, llm)))
    headers = [{}]
    start = 0
    for name, shape in weights.parameter_shapes(vision, llm).items():
        size = 2 * math.prod(shape)
        if start + size > shard_bytes:
            headers.append({})
            start = 0
        headers[-1][name] = dict(dtype="BF16", shape=shape, data_offsets=[start, start + size])
        start += size
    weight_map = {}
    for i, header in enumerate(headers, 1):
        file = "model.safetensors"
        if len(headers) > 1:
            file = f"model-{i:05d}-of-{len(headers):05d}.safetensors"
        text = json.dumps(header).encode()
        end = max(entry["data_offsets"][1] for entry in header.values())
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
        weight_map |= dict.fromkeys(header, file)
    if len(headers) > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    return folder
