"""Checkpoints in and out.

    python convert.py assemble --vision=InternViT-300M-448px --llm=Qwen2.5-1.5B-Instruct --out=start_2b
    python convert.py check start_2b
    python convert.py export out/sft/model exported --layout=transformers

assemble joins a released ViT and a released language model (each may also be a whole model folder, of which that part
is taken) with a fresh projector and adds the image tokens to the tokenizer. export writes InternVL's layout, which
vLLM, llama.cpp and VLMEvalKit read, or the layout of transformers' own InternVL classes. Nothing is ever half written.
"""
import math, sys
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import torch

from configurator import configure, launch
from data import SPECIAL_TOKENS, TEMPLATES
from model import init_weights
from vision import MEAN, STD, Projector
from weights import (HEAD, TOKENIZER_FILES, TOP_DEFAULTS, added_tokens, config_json, image_token_id, inspect_folder,
                     load_folder, read_json, read_tensors, save_folder, write_folder)

USAGE = "usage: convert.py assemble --vision=DIR --llm=DIR --out=DIR | check DIR | export SRC DST --layout=LAYOUT"

@dataclass(slots=True)
class Assemble:
    vision: str = ""                    # folder of a released InternViT, or a whole model folder
    llm: str = ""                       # folder of a released Qwen2.5, or a whole model folder
    out: str = ""                       # the model folder to write
    seed: int = 1234                    # of the fresh projector
    template: Literal[tuple(TEMPLATES)] = "sailvl-chat"  # prompt template, stored in config.json
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the stored weights

@dataclass(slots=True)
class Export:
    layout: Literal["internvl", "transformers"] = "internvl"  # whose names and config.json to write

def assemble(cfg):
    for name in ("vision", "llm", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}=DIR is missing; {USAGE}")
    (vision, _, _, ours), (_, llm, _, theirs) = inspect_folder(cfg.vision), inspect_folder(cfg.llm)
    for folder, part, word in ((cfg.vision, vision, "vision encoder"), (cfg.llm, llm, "language model")):
        if part is None:
            raise ValueError(f"{folder} holds no {word}")
    table = {name: entry for name, entry in ours.items() if name.startswith("vision_model.")}
    table |= {name: entry for name, entry in theirs.items() if name.startswith("language_model.")}
    llm.tie_embeddings = HEAD not in table
    init_weights(projector := Projector(vision, llm.dim), cfg.seed)
    state = dict(read_tensors(table)) | {"mlp1." + name: t for name, t in projector.state_dict().items()}
    files = extend_tokenizer(Path(cfg.llm), llm.vocab_size)
    save_folder(state, vision, llm, cfg.out, cfg.llm, cfg.template, getattr(torch, cfg.dtype), files=files)
    print(f"{cfg.out}: written; the projector is untrained (seed {cfg.seed})")

def extend_tokenizer(folder, vocab_size):
    """Give the special tokens of SAIL-VL that a tokenizer does not have the next free ids -> {file name: new content}.
    The embedding table is never resized: ValueError if an id does not fit in it."""
    read = {name: read_json(folder / name) for name in TOKENIZER_FILES
            if name.endswith(".json") and (folder / name).is_file()}
    whole, known = read.get("tokenizer.json"), added_tokens(folder)
    if "vocab.json" not in read and not whole:
        raise ValueError(f"{folder}: no vocab.json and no tokenizer.json, so there is no tokenizer to take")
    vocab = read["vocab.json"] if "vocab.json" in read else whole["model"]["vocab"]
    fresh = zip([token for token in SPECIAL_TOKENS if token not in known],
                count(max([*vocab.values(), *known.values()]) + 1))
    ids = dict(sorted([*known.items(), *fresh], key=lambda item: item[1]))
    if max(ids.values()) >= vocab_size:
        raise ValueError(f"{folder}: the embedding table has {vocab_size} rows, token ids go up to {max(ids.values())}")
    plain = ("<tool_call", "</tool_call", "<|fim", "<|repo", "<|file")      # added, not special: decoding shows them
    tokens = {i: dict(content=token, lstrip=False, normalized=False, rstrip=False, single_word=False,
                      special=not token.startswith(plain)) for token, i in ids.items()}
    special = [token["content"] for token in tokens.values() if token["special"]]
    if whole:
        have = {token["content"] for token in whole.setdefault("added_tokens", [])}
        whole["added_tokens"] += [{"id": i, **token} for i, token in tokens.items() if token["content"] not in have]
    config = read.get("tokenizer_config.json") or dict(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, bos_token=None, unk_token=None, errors="replace",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072, clean_up_tokenization_spaces=False)
    return {"added_tokens.json": ids, "tokenizer_config.json": config | dict(
                added_tokens_decoder={str(i): token for i, token in tokens.items()}, additional_special_tokens=special),
            "special_tokens_map.json": dict(
                eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special),
            **({"tokenizer.json": whole} if whole else {})}

def check(folder):
    """Print what a folder is; ValueError unless every tensor and every parameter is accounted for."""
    vision, llm, raw, table = inspect_folder(folder)
    print(f"{folder}: {raw['architectures'][0]}, {len(table)} tensors in {len({e[0] for e in table.values()})} file(s)")
    for cfg in filter(None, (vision, llm)):
        print(f"  {type(cfg).__name__}: " + ", ".join(f"{name}={value}" for name, value in asdict(cfg).items()))
    for prefix in ("vision_model.", "mlp1.", "language_model."):
        if entries := [entry for name, entry in table.items() if name.startswith(prefix)]:
            numel, kinds = sum(math.prod(e[2]) for e in entries), "/".join(sorted({e[3] for e in entries}))
            print(f"  {prefix[:-1]}: {numel:,} parameters, {len(entries)} tensors, {kinds}")
    if llm:
        print("  head: " + ("its own" if HEAD in table else "shares the embedding table"))
        print(f"  <IMG_CONTEXT>: {image_token_id(folder)}, template: {raw.get('template', 'none')}")
    print("ok: every tensor used once, every parameter filled once")

# ---- export ----------------------------------------------------------------------------------------------------------

# our name -> the name in the released "-hf" checkpoints, which transformers 4.52 and later read; applied one by one
RENAMED = {"vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
           "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
           "vision_model.embeddings.patch_embedding.": "vision_tower.embeddings.patch_embeddings.projection.",
           "vision_model.encoder.layers.": "vision_tower.encoder.layer.", ".attn.proj.": ".attention.projection_layer.",
           ".norm1.": ".layernorm_before.", ".norm2.": ".layernorm_after.", ".ls1": ".lambda_1", ".ls2": ".lambda_2",
           "mlp1.0.": "multi_modal_projector.layer_norm.", "mlp1.1.": "multi_modal_projector.linear_1.",
           "mlp1.3.": "multi_modal_projector.linear_2."}

def transformers_tensors(state):
    """Rename, and cut each fused qkv of the ViT into its three parts."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in RENAMED.items() if not name.startswith("language_model.") else ():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for x, rows in zip("qkv", tensor.chunk(3)):
                out[name.replace(".attn.qkv.", f".attention.{x}_proj.")] = rows
        else:
            out[name] = tensor
    return out

def chat_template(template):
    """The prompt template as the Jinja text that transformers keeps beside a tokenizer."""
    system, sep = TEMPLATES[template]["system"], "<|im_end|>" + TEMPLATES[template]["sep"].replace("\n", "\\n")
    return ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + system + sep + "' }}{% endif %}"
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{{ '<IMG_CONTEXT>\\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
            "{{ '" + sep + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

def export(source, target, layout):
    model, raw = load_folder(source)
    vision, llm, state = model.vision, model.llm, model.state_dict()
    dtype, template = model.language_model.lm_head.weight.dtype, raw.get("template", "sailvl-chat")
    if vision is None:
        raise ValueError(f"{source} is a language model only; assemble it with a vision encoder first")
    if layout == "internvl":
        extra = {name: value for name, value in raw.items() if name in TOP_DEFAULTS}
        return save_folder(state, vision, llm, target, source, template, dtype, extra)
    if template not in TEMPLATES:
        raise ValueError(f"{source}: config.json names the template {template!r}; known are {', '.join(TEMPLATES)}")
    if llm.tie_embeddings:
        state.pop(HEAD)
    config = dict(
        architectures=["InternVLForConditionalGeneration"], model_type="internvl", image_token_id=model.image_token_id,
        torch_dtype=str(dtype).removeprefix("torch."), image_seq_length=vision.tokens_per_tile,
        downsample_ratio=1 / vision.downsample, projector_hidden_act="gelu", vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=llm.tie_embeddings, vision_config=dict(
            architectures=["InternVLVisionModel"], model_type="internvl_vision", image_size=[vision.image_size] * 2,
            patch_size=[vision.patch_size] * 2, hidden_size=vision.dim, num_hidden_layers=vision.n_layers,
            num_attention_heads=vision.n_heads, intermediate_size=vision.ffn_dim, layer_norm_eps=vision.norm_eps,
            attention_bias=vision.qkv_bias, layer_scale_init_value=vision.init_values, norm_type="layer_norm",
            hidden_act="gelu", use_qk_norm=False, use_absolute_position_embeddings=True, use_mean_pooling=True),
        text_config=config_json(None, llm, dtype))
    files = {"processor_config.json": dict(
                processor_class="InternVLProcessor", image_seq_length=vision.tokens_per_tile),
             "preprocessor_config.json": dict(
                 image_processor_type="GotOcr2ImageProcessorFast", processor_class="InternVLProcessor",
                 crop_to_patches=True, min_patches=raw.get("min_dynamic_patch", 1), do_resize=True, resample=3,
                 max_patches=raw.get("max_dynamic_patch", 12), do_rescale=True, rescale_factor=1 / 255,
                 size=dict(height=vision.image_size, width=vision.image_size), do_normalize=True, image_mean=MEAN,
                 image_std=STD, do_convert_rgb=True)}
    if (tokenizer := Path(source) / "tokenizer_config.json").is_file():
        words = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                     video_token="<|video_pad|>")
        words |= dict(extra_special_tokens=dict(words), chat_template=chat_template(template))
        files[tokenizer.name] = read_json(tokenizer) | words
    write_folder(transformers_tensors(state), config, target, source, dtype, files)

def main():
    words, flags = ([a for a in sys.argv[1:] if a.startswith("-") == dashed] for dashed in (False, True))
    match words:
        case ["assemble"]:
            configure(cfg := Assemble(), flags)
            assemble(cfg)
        case ["check", folder] if set(flags) <= {"--debug=True", "--debug=False"}:
            check(folder)
        case ["export", source, target]:
            configure(cfg := Export(), flags)
            export(source, target, cfg.layout)
            print(f"{target}: written in the {cfg.layout} layout")
        case _:
            raise ValueError(USAGE)

if __name__ == "__main__":
    launch(main)
