"""Checkpoints in and out.

    python convert.py assemble --vision=InternViT-300M-448px --llm=Qwen2.5-1.5B-Instruct --out=start_2b
    python convert.py check start_2b
    python convert.py export out/sft/model exported --layout=transformers

assemble joins a released ViT and a released language model (each may also be a whole model folder, of which that part
is taken) with a fresh projector and adds the image tokens to the tokenizer. export writes InternVL's layout, which
vLLM, llama.cpp and VLMEvalKit read, or the layout of transformers' own InternVL classes. Nothing is ever half written.
"""
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import configure, launch
from data import SPECIAL_TOKENS, TEMPLATES
from model import init_weights
from vision import MEAN, STD, Projector
from weights import (TOKENIZER_FILES, TOP_DEFAULTS, account, image_token_id, load_folder, read_configs, read_json,
                     read_tensors, save_folder, stored_tensors, write_folder)

USAGE = "usage: convert.py assemble --vision=DIR --llm=DIR --out=DIR | check DIR | export SRC DST --layout=LAYOUT"


@dataclass(slots=True)
class Assemble:
    vision: str = ""                    # folder of a released InternViT, or a whole model folder
    llm: str = ""                       # folder of a released Qwen2.5, or a whole model folder
    out: str = ""                       # the model folder to write
    seed: int = 1234                    # of the fresh projector
    template: str = "sailvl-chat"       # prompt template, stored in config.json
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the stored weights


@dataclass(slots=True)
class Export:
    layout: Literal["internvl", "transformers"] = "internvl"  # whose names and config.json to write


# ---- assemble --------------------------------------------------------------------------------------------------------

def assemble(cfg):
    for name in ("vision", "llm", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}=DIR is missing; {USAGE}")
    if cfg.template not in TEMPLATES:
        raise ValueError(f"--template={cfg.template}: unknown, choose from {', '.join(TEMPLATES)}")
    (vision, _, _), (_, llm, _) = read_configs(cfg.vision), read_configs(cfg.llm)
    if vision is None or llm is None:
        folder, part_name = (cfg.llm, "language model") if vision else (cfg.vision, "vision encoder")
        raise ValueError(f"{folder} holds no {part_name}")
    state = dict(part(cfg.vision, "vision_model.")) | dict(part(cfg.llm, "language_model."))
    llm.tie_embeddings = "language_model.lm_head.weight" not in state
    projector = Projector(vision, llm.dim)
    init_weights(projector, cfg.seed)
    state |= {"mlp1." + name: t for name, t in projector.state_dict().items()}
    with tempfile.TemporaryDirectory() as tokenizer:
        extend_tokenizer(Path(cfg.llm), Path(tokenizer), llm.vocab_size)
        save_folder(state, vision, llm, cfg.out, tokenizer, cfg.template, getattr(torch, cfg.dtype))


def part(folder, prefix):
    """The tensors of one part of a folder, after all of the folder has been accounted for."""
    vision, llm, _ = read_configs(folder)
    table = stored_tensors(folder)
    account(folder, vision, llm, table)
    return read_tensors(folder, {name: entry for name, entry in table.items() if name.startswith(prefix)})


def extend_tokenizer(source, target, vocab_size):
    """Copy a tokenizer's files and add the special tokens of SAIL-VL it does not have, each with the next free id.
    The embedding table is never resized: ValueError if an id does not fit in it."""
    files = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    known = {token["content"]: int(i) for i, token in
             read_json(files["tokenizer_config.json"]).get("added_tokens_decoder", {}).items()} \
        if "tokenizer_config.json" in files else {}
    known |= read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
    if "vocab.json" not in files and "tokenizer.json" not in files:
        raise ValueError(f"{source}: no vocab.json and no tokenizer.json, so there is no tokenizer to take")
    vocab = read_json(files["vocab.json"] if "vocab.json" in files else files["tokenizer.json"])
    vocab = vocab if "vocab.json" in files else vocab["model"]["vocab"]
    following = max([*vocab.values(), *known.values()]) + 1
    fresh = {token: following + i for i, token in enumerate(t for t in SPECIAL_TOKENS if t not in known)}
    ids = {token: i for token, i in sorted((known | fresh).items(), key=lambda item: item[1])}
    if max(ids.values()) >= vocab_size:
        raise ValueError(f"{source}: the embedding table has {vocab_size} rows, token ids go up to {max(ids.values())}")
    for name, path in files.items():
        (target / name).write_bytes(path.read_bytes())
    entry = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    special = {token: "tool_call" not in token and not token.startswith(("<|fim", "<|repo", "<|file")) for token in ids}
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else dict(
        tokenizer_class="Qwen2Tokenizer", add_bos_token=False, bos_token=None, unk_token=None, errors="replace",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=131072, clean_up_tokenization_spaces=False)
    entries = [{"id": i, "content": token, **entry, "special": special[token]} for token, i in ids.items()]
    config["added_tokens_decoder"] = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in entries}
    config["additional_special_tokens"] = [token for token in ids if special[token]]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
             "additional_special_tokens": config["additional_special_tokens"]}
    written = {"added_tokens.json": ids, "tokenizer_config.json": config, "special_tokens_map.json": named}
    if "tokenizer.json" in files:
        whole = read_json(files["tokenizer.json"])
        have = {token["content"] for token in whole.get("added_tokens", [])}
        whole["added_tokens"] = whole.get("added_tokens", []) + [e for e in entries if e["content"] not in have]
        written["tokenizer.json"] = whole
    for name, content in written.items():
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


# ---- check -----------------------------------------------------------------------------------------------------------

def check(folder):
    """Print what a folder is; ValueError unless every tensor and every parameter is accounted for."""
    vision, llm, raw = read_configs(folder)
    table = stored_tensors(folder)
    account(folder, vision, llm, table)
    n_files = len({path for path, *_ in table.values()})
    print(f"{folder}: {raw['architectures'][0]}, {len(table)} tensors in {n_files} file(s)")
    for cfg in filter(None, (vision, llm)):
        sizes = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(cfg).items())
        print(f"  {type(cfg).__name__}: {sizes}")
    for prefix in ("vision_model.", "mlp1.", "language_model."):
        entries = [entry for name, entry in table.items() if name.startswith(prefix)]
        if entries:
            count = sum(torch.Size(shape).numel() for _, _, shape, _ in entries)
            kinds = "/".join(sorted({dtype for *_, dtype in entries}))
            print(f"  {prefix[:-1]}: {count:,} parameters, {len(entries)} tensors, {kinds}")
    if llm:
        print("  head: " + ("its own" if "language_model.lm_head.weight" in table else "shares the embedding table"))
        print(f"  <IMG_CONTEXT>: {image_token_id(folder)}, template: {raw.get('template', 'none')}")
    print("ok: every tensor used once, every parameter filled once")


# ---- export ----------------------------------------------------------------------------------------------------------

# our name -> the name in the released "-hf" checkpoints, which transformers 4.52 and later read; the first match counts
NAMES = (("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
         ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
         ("vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.patch_embeddings.projection."),
         ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
         ("mlp1.0.", "multi_modal_projector.layer_norm."), ("mlp1.1.", "multi_modal_projector.linear_1."),
         ("mlp1.3.", "multi_modal_projector.linear_2."))
INSIDE = ((".attn.proj.", ".attention.projection_layer."), (".norm1.", ".layernorm_before."),
          (".norm2.", ".layernorm_after."), (".ls1", ".lambda_1"), (".ls2", ".lambda_2"))


def transformers_tensors(state):
    """Rename, and cut each fused qkv of the ViT into its three parts."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in (*NAMES, *INSIDE) if not name.startswith("language_model.") else ():
            name = name.replace(ours, theirs)
        if ".attn.qkv." in name:
            for x, rows in zip("qkv", tensor.chunk(3)):
                out[name.replace(".attn.qkv.", f".attention.{x}_proj.")] = rows
        else:
            out[name] = tensor
    return out


def transformers_config(vision, llm, dtype, image_id):
    kind = str(dtype).removeprefix("torch.")
    side = [vision.image_size] * 2
    return dict(
        architectures=["InternVLForConditionalGeneration"], model_type="internvl", torch_dtype=kind,
        image_token_id=image_id, image_seq_length=vision.tokens_per_tile, downsample_ratio=1 / vision.downsample,
        projector_hidden_act="gelu", vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=llm.tie_embeddings,
        vision_config=dict(
            architectures=["InternVLVisionModel"], model_type="internvl_vision", image_size=side,
            patch_size=[vision.patch_size] * 2, hidden_size=vision.dim, num_hidden_layers=vision.n_layers,
            num_attention_heads=vision.n_heads, intermediate_size=vision.ffn_dim, layer_norm_eps=vision.norm_eps,
            attention_bias=vision.qkv_bias, layer_scale_init_value=vision.init_values, norm_type="layer_norm",
            hidden_act="gelu", use_qk_norm=False, use_absolute_position_embeddings=True, use_mean_pooling=True),
        text_config=dict(
            architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=llm.vocab_size, hidden_size=llm.dim,
            num_hidden_layers=llm.n_layers, num_attention_heads=llm.n_heads, num_key_value_heads=llm.n_kv_heads,
            head_dim=llm.head_dim, intermediate_size=llm.ffn_dim, rope_theta=llm.rope_theta, rms_norm_eps=llm.norm_eps,
            tie_word_embeddings=llm.tie_embeddings, max_position_embeddings=llm.max_positions, hidden_act="silu"))


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
        state.pop("language_model.lm_head.weight")
    words = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                 video_token="<|video_pad|>")
    images = dict(
        image_processor_type="GotOcr2ImageProcessorFast", processor_class="InternVLProcessor", crop_to_patches=True,
        min_patches=raw.get("min_dynamic_patch", 1), max_patches=raw.get("max_dynamic_patch", 12), do_resize=True,
        size=dict(height=vision.image_size, width=vision.image_size), resample=3, do_rescale=True, do_normalize=True,
        rescale_factor=1 / 255, image_mean=MEAN, image_std=STD, do_convert_rgb=True)
    files = {"preprocessor_config.json": images, "processor_config.json": dict(
        processor_class="InternVLProcessor", image_seq_length=vision.tokens_per_tile)}
    if (Path(source) / "tokenizer_config.json").is_file():
        files["tokenizer_config.json"] = {**read_json(Path(source) / "tokenizer_config.json"), **words,
                                          "extra_special_tokens": words, "chat_template": chat_template(template)}
    config = transformers_config(vision, llm, dtype, model.image_token_id)
    write_folder(transformers_tensors(state), config, target, source, dtype, files)


# ---- main ------------------------------------------------------------------------------------------------------------

def main():
    words = [a for a in sys.argv[1:] if not a.startswith("-")]
    flags = [a for a in sys.argv[1:] if a.startswith("-")]
    command, folders = (words[0], words[1:]) if words else ("", [])
    if command == "assemble" and not folders:
        configure(cfg := Assemble(), flags)
        assemble(cfg)
        print(f"{cfg.out}: written; the projector is untrained (seed {cfg.seed})")
    elif command == "check" and len(folders) == 1 and not set(flags) - {"--debug=True", "--debug=False"}:
        check(folders[0])
    elif command == "export" and len(folders) == 2:
        configure(cfg := Export(), flags)
        export(*folders, cfg.layout)
        print(f"{folders[1]}: written in the {cfg.layout} layout")
    else:
        raise ValueError(USAGE)


if __name__ == "__main__":
    launch(main)
