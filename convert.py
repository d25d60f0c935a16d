"""Checkpoints in and out.

    python convert.py assemble --vision=InternViT-300M-448px --llm=Qwen2.5-1.5B-Instruct --out=start_2b
    python convert.py check start_2b
    python convert.py export out/demo/model exported --layout=transformers

assemble joins a released ViT and a released language model (each may also be a whole model folder, of which that part
is taken) with a fresh projector and adds the image tokens to the tokenizer. export writes InternVL's layout, made for
vLLM and llama.cpp, or the layout of transformers' own InternVL classes. Nothing is ever half written.
"""
import math
import sys
import torch
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import configure, run_script
from inputs.chat import TEMPLATES
from inputs.files import read_json
from inputs.images import MEAN, STD
from inputs.tokenizer import Tokenizer
from model import VLM, init_weights
from weights import (
    HEAD,
    check_vocabulary,
    config_json,
    fill,
    has_tokenizer,
    inspect_folder,
    load_folder,
    save_folder,
    write_folder,
)

USAGE = ("usage: convert.py assemble --vision=DIR --llm=DIR --out=DIR | check DIR | "
         "export SRC DST --layout=internvl|transformers")

@dataclass(slots=True)
class Assemble:
    vision: str = ""                    # folder of a released InternViT, or a whole model folder
    llm: str = ""                       # folder of a released Qwen2.5, or a whole model folder
    out: str = ""                       # the model folder to write
    seed: int = 1234                    # of the fresh projector
    template: Literal[tuple(TEMPLATES)] = "sailvl-chat"  # prompt template, stored in config.json
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the stored weights

def assemble(cfg):
    for name in ("vision", "llm", "out"):
        if not getattr(cfg, name): raise ValueError(f"--{name}=DIR is missing; {USAGE}")
    spare_the_source(cfg.out, cfg.vision, cfg.llm)
    (vision, *_, ours), (_, llm, _, theirs) = map(inspect_folder, (cfg.vision, cfg.llm))
    if not vision or not llm:
        raise ValueError(f"{cfg.llm} holds no language model" if vision else f"{cfg.vision} holds no vision encoder")
    with torch.device("meta"):
        model = VLM(vision, llm, -1).to(dtype := getattr(torch, cfg.dtype))
    fill(model.to_empty(device="cpu"), {name: entry for part, table in (("vision", ours), ("language", theirs))
                                        for name, entry in table.items() if name.startswith(part + "_model.")})
    init_weights(model.mlp1, cfg.seed)
    files = extend_tokenizer(Path(cfg.llm), llm.vocab_size, cfg.template)
    save_folder(model.state_dict(), vision, llm, cfg.out, cfg.llm, cfg.template, dtype, files=files)
    print(f"{cfg.out}: written; the projector is untrained (seed {cfg.seed})")

def spare_the_source(target, *sources):
    """ValueError if writing the folder target would replace a source, or what holds one."""
    for source in sources:
        if Path(target).resolve() in ((path := Path(source).resolve()), *path.parents):
            raise ValueError(f"{target} is or holds the source {source}; name another folder for the result")

def extend_tokenizer(folder, vocab_size, template):
    """Give the special tokens of SAIL-VL that Qwen2.5's tokenizer does not have the ids that follow -> {file name: new
    content}. ValueError for other added tokens, and if an id has no row in the embedding table: it is never resized."""
    ids, config = Tokenizer(folder).special, read_json(folder / "tokenizer_config.json", dict)
    try:
        added = {int(i): token["content"] for i, token in config.get("added_tokens_decoder", {}).items()}
        strange = [f"{token} with id {i}" for i, token in added.items() if ids.get(token) != i]
    except (AttributeError, TypeError, KeyError, ValueError):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder is no table of tokens; copy it "
                         "again") from None
    if strange:
        raise ValueError(f"{folder}: added token {strange[0]} is not one of Qwen2.5's")
    if (last := max(ids.values())) >= vocab_size:
        raise ValueError(f"{folder}: the embedding table has {vocab_size} rows, token ids go up to {last}")
    plain = ("<tool_call", "</tool_call", "<|fim", "<|repo", "<|file")      # added, not special: decoding shows them
    tokens = {i: dict(content=token, lstrip=False, normalized=False, rstrip=False, single_word=False,
                      special=not token.startswith(plain)) for token, i in ids.items()}
    special = dict(additional_special_tokens=[token["content"] for token in tokens.values() if token["special"]])
    files = prompt_files(config | special | dict(added_tokens_decoder=tokens), template, "<image>") | {
        "added_tokens.json": ids,
        "special_tokens_map.json": special | dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")}
    if (path := folder / "tokenizer.json").is_file():
        files[path.name] = read_json(path, dict) | dict(
            added_tokens=[{"id": i, **token} for i, token in tokens.items()])
    return files

def check(folder):
    """Print what a folder is; ValueError unless every tensor and every parameter is accounted for."""
    vision, llm, raw, table = inspect_folder(folder)
    print(f"{folder}: {raw['architectures'][0]}, {len(table)} tensors in {len({e[0] for e in table.values()})} file(s)")
    for prefix, cfg in (("vision_model.", vision), ("mlp1.", ""), ("language_model.", llm)):
        if entries := [entry for name, entry in table.items() if name.startswith(prefix)]:
            numel, kinds = sum(math.prod(e[2]) for e in entries), "/".join(sorted({e[3] for e in entries}))
            print(f"  {prefix[:-1]}: {numel:,} parameters, {len(entries)} tensors, {kinds} {cfg}".rstrip())
    if llm:
        if tokenizer := Tokenizer(folder) if has_tokenizer(folder) else None:
            check_vocabulary(llm, tokenizer)
        known = "" if (template := raw.get("template", "none")) in (*TEMPLATES, "none") else "unknown, "
        print(f"  <IMG_CONTEXT>: {tokenizer.image_id if tokenizer else 'no tokenizer'}, template: {known}{template}")
    print("ok: every tensor used once, every parameter filled once")

# ---- export ----------------------------------------------------------------------------------------------------------

# our name -> the name in the released "-hf" checkpoints, which transformers 4.52 and later read; applied one by one
RENAMED = {
    "vision_model.": "vision_tower.", ".class_embedding": ".cls_token", ".position_embedding": ".position_embeddings",
    ".patch_embedding.": ".patch_embeddings.projection.", ".encoder.layers.": ".encoder.layer.",
    ".attn.": ".attention.", ".proj.": ".projection_layer.", ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.", ".ls1": ".lambda_1", ".ls2": ".lambda_2",
    "mlp1.0.": "multi_modal_projector.layer_norm.", "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2."}

# the internvl layout's; transformers does not know this model_type, and vLLM reads config.json through it
CONFIGURATION = '''"""config.json of an InternVL folder, for AutoConfig with trust_remote_code=True."""
from transformers import PretrainedConfig, Qwen2Config

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    attribute_map = {"text_config": "llm_config"}

    def __init__(self, vision_config=None, llm_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**others)
'''

def transformers_tensors(state):
    """Rename, and cut each fused qkv of the ViT into its three parts."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in RENAMED.items() if not name.startswith("language_model.") else ():
            name = name.replace(ours, theirs)
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)) if ".qkv." in name else [("qkv", tensor)]
        out |= {name.replace("qkv", part): rows for part, rows in parts}
    return out

def prompt_files(config, template, image):
    """tokenizer_config.json (of its content so far) and chat_template.jinja: the prompt template as Jinja, for others.
    image: what stands for a picture, `<image>` where a model's own code or vLLM puts its tokens in."""
    system, sep = TEMPLATES[template]["system"], "<|im_end|>" + TEMPLATES[template]["sep"].replace("\n", "\\n")
    text = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + system + sep + "' }}{% endif %}"
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            "{{ '" + image + "\\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
            "{{ '" + sep + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    return {"tokenizer_config.json": config | dict(chat_template=text), "chat_template.jinja": text}

def export(source, target, transformers):
    """Write a whole model folder for others; ValueError or OSError, before weights are read, if it cannot be."""
    spare_the_source(target, source)
    vision, llm, raw, _ = inspect_folder(source)
    template = raw.get("template", "sailvl-chat")
    if not vision or not llm:
        raise ValueError(f"{source} is no whole model; assemble a vision encoder and a language model first")
    if template not in TEMPLATES:
        raise ValueError(f"{source}: config.json names the template {template!r}; known are {', '.join(TEMPLATES)}")
    if transformers and not raw.get("use_thumbnail", True):
        raise ValueError(f"{source}: transformers' layout cannot say use_thumbnail = False; take --layout=internvl")
    check_vocabulary(llm, tokenizer := Tokenizer(source))
    words, added = read_json(Path(source) / "tokenizer_config.json", dict), {"added_tokens.json": tokenizer.special}
    model, _ = load_folder(source)
    state, dtype = model.state_dict(), model.language_model.lm_head.weight.dtype
    if not transformers:
        config = config_json(vision, llm, dtype, template, raw) | dict(
            auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"})
        return save_folder(state, vision, llm, target, source, template, dtype, raw, {
            **prompt_files(words, template, "<image>"), **added, "config.json": config,
            "configuration_internvl_chat.py": CONFIGURATION})
    if llm.tie_embeddings: state.pop(HEAD)
    config = dict(
        architectures=["InternVLForConditionalGeneration"], model_type="internvl", image_token_id=tokenizer.image_id,
        torch_dtype=str(dtype).removeprefix("torch."), image_seq_length=vision.tokens_per_tile,
        downsample_ratio=1 / vision.downsample, projector_hidden_act="gelu", vision_feature_layer=-1,
        vision_feature_select_strategy="default", tie_word_embeddings=llm.tie_embeddings,
        text_config=config_json(None, llm, dtype), vision_config=config_json(vision, None, dtype) | dict(
            architectures=["InternVLVisionModel"], model_type="internvl_vision", image_size=[vision.image_size] * 2,
            patch_size=[vision.patch_size] * 2, attention_bias=vision.qkv_bias, use_qk_norm=False,
            layer_scale_init_value=vision.init_values, use_absolute_position_embeddings=True, use_mean_pooling=True))
    processor = dict(processor_class="InternVLProcessor")
    pixels = dict(do_resize=True, resample=3, size=dict(height=vision.image_size, width=vision.image_size),
                  do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=MEAN, image_std=STD,
                  do_convert_rgb=True)
    image = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                 video_token="<|video_pad|>")
    words |= image | dict(extra_special_tokens=image)
    write_folder(transformers_tensors(state), config, target, source, dtype, {
        **prompt_files(words, template, "<IMG_CONTEXT>"), **added,
        "processor_config.json": processor | dict(image_seq_length=vision.tokens_per_tile),
        "video_preprocessor_config.json": processor | pixels | dict(video_processor_type="InternVLVideoProcessor"),
        "preprocessor_config.json": processor | pixels | dict(
            image_processor_type="GotOcr2ImageProcessorFast", crop_to_patches=True,
            min_patches=raw.get("min_dynamic_patch", 1), max_patches=raw.get("max_dynamic_patch", 12))})

def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--debug=")]
    match sorted(words, key=lambda word: word.startswith("-")):             # flags may stand anywhere
        case ["assemble", *flags]:
            configure(cfg := Assemble(), flags)
            assemble(cfg)
        case ["check", folder]:
            check(folder)
        case ["export", source, target, *flags] if flags in ([], ["--layout=internvl"], ["--layout=transformers"]):
            export(source, target, transformers=flags == ["--layout=transformers"])
            print(f"{target}: written")
        case _:
            raise ValueError(USAGE)

if __name__ == "__main__":
    run_script(main)
