"""Checkpoints in and out.

    python convert.py assemble --vision=InternViT-300M-448px --llm=Qwen2.5-1.5B-Instruct --out=m
    python convert.py check m
    python convert.py export out/demo/model exported --layout=transformers
    python convert.py merge BASE out/lora/instruction/adapter merged

assemble joins a released ViT and language model, or those parts of whole model folders, with a
fresh projector and adds the image tokens to the tokenizer. export writes InternVL's layout, for
vLLM and llama.cpp, or that of transformers. It takes RUN/checkpoints/step_N or RUN as well.
merge adds a LoRA adapter to the weights it was trained beside.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import configure, run_script, setting, split_words, subcommand
from inputs.chat import TEMPLATES
from inputs.files import read_json
from inputs.images import MEAN, STD
from inputs.tokenizer import Tokenizer
from model import VLM, init_weights
from model_config import config_json, transformers_config
from model_files import check_content, has_tokenizer, transformers_tensors
from training.adapter import write_merged
from training.checkpoint_folder import model_folder
from weights import (
    HEAD,
    check_vocabulary,
    fill,
    inspect_folder,
    load_folder,
    save_folder,
    write_folder,
)

USAGE = ("convert.py assemble --vision=DIR --llm=DIR --out=DIR | check DIR | "
         "export SRC DST --layout=internvl|transformers --write_head=False | "
         "merge BASE ADAPTER DST")

# ---- assemble ------------------------------------------------------------------------------------


@dataclass(slots=True)
class AssembleConfig:
    vision: str = ""  # folder of a released InternViT, or a whole model folder
    llm: str = ""  # folder of a released Qwen2.5, or a whole model folder
    out: str = ""  # the model folder to write
    seed: int = setting(1234, at_most=2**32 - 1)  # of the fresh projector
    template: Literal[tuple(TEMPLATES)] = "sailvl-chat"  # prompt template, stored in config.json
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the stored weights


def assemble(cfg):
    """Join cfg.vision and cfg.llm to the model folder cfg.out."""
    for name in ("vision", "llm", "out"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}=DIR is missing; usage: {USAGE}")
    refuse_to_replace(cfg.out, cfg.vision, cfg.llm)
    vision_folder = inspect_folder(cfg.vision)
    llm_folder = inspect_folder(cfg.llm)
    vision = vision_folder.vision
    llm = llm_folder.llm
    if not vision:
        raise ValueError(f"{cfg.vision} holds no vision encoder")
    if not llm:
        raise ValueError(f"{cfg.llm} holds no language model")

    dtype = getattr(torch, cfg.dtype)
    with torch.device("meta"):
        model = VLM(vision, llm, -1).to(dtype)
    model.to_empty(device="cpu")
    fill(model.vision_model, vision_folder.tensors, "vision_model.")
    fill(model.language_model, llm_folder.tensors, "language_model.")
    init_weights(model.mlp1, cfg.seed)

    files = extend_tokenizer(Path(cfg.llm), llm.vocab_size, cfg.template)
    config = config_json(vision, llm, dtype, cfg.template)
    save_folder(model.state_dict(), config, cfg.out, cfg.llm, files)
    print(f"{cfg.out}: written; the projector is untrained (seed {cfg.seed})")


def refuse_to_replace(target, *sources):
    """ValueError if writing the folder target would replace a source, or what holds one."""
    for source in sources:
        path = Path(source).resolve()
        if Path(target).resolve() in (path, *path.parents):
            raise ValueError(
                f"{target} is or holds the source {source}; name another folder for the result")


def extend_tokenizer(folder, vocab_size, template):
    """Add SAIL-VL's special tokens to a Qwen tokenizer -> {file name: new content}.

    They get the ids that follow its own. ValueError for added tokens that are not Qwen's, and if an
    id has no row in the embedding table, which is never resized.
    """
    ids = Tokenizer(folder).special
    config = read_json(folder / "tokenizer_config.json", dict)
    check_added_tokens(folder, config, ids)
    last = max(ids.values())
    if last >= vocab_size:
        raise ValueError(
            f"{folder}: the embedding table has {vocab_size} rows, token ids go up to {last}")

    # Qwen adds these without making them special, so that decoding shows them.
    not_special = ("<tool_", "</tool_", "<|fim", "<|repo", "<|file", "<think", "</think")
    tokens = {}
    for token, i in ids.items():
        tokens[i] = {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": not token.startswith(not_special),
        }
    special = {"additional_special_tokens": [
        token["content"] for token in tokens.values() if token["special"]]}
    config = config | special | {"added_tokens_decoder": tokens}
    files = prompt_files(config, template, "<image>")
    files["added_tokens.json"] = ids
    files["special_tokens_map.json"] = special | {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    path = folder / "tokenizer.json"
    if path.is_file():
        added = [{"id": i, **token} for i, token in tokens.items()]
        files[path.name] = read_json(path, dict) | {"added_tokens": added}
    return files


def check_added_tokens(folder, config, ids):
    """ValueError unless the tokens that tokenizer_config.json adds have the ids we know."""
    try:
        decoder = config.get("added_tokens_decoder", {})
        added = {int(i): token["content"] for i, token in decoder.items()}
        strange = [f"{token} with id {i}" for i, token in added.items() if ids.get(token) != i]
    except (AttributeError, TypeError, KeyError, ValueError):
        raise ValueError(f"{folder}/tokenizer_config.json: added_tokens_decoder is no table of "
                         "tokens; copy it again") from None
    if strange:
        raise ValueError(f"{folder}: added token {strange[0]} is not one of Qwen2.5's or "
                         "Qwen3's")


def prompt_files(config, template, image):
    """The prompt template as Jinja, for other programs -> {file name: content}.

    config: the content of tokenizer_config.json so far. image: what stands for a picture, <image>
    where a model's own code or vLLM puts the image tokens in its place.
    """
    system = TEMPLATES[template]["system"]
    end = "<|im_end|>" + TEMPLATES[template]["sep"].replace("\n", "\\n")
    jinja = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\n" + system + end + "' }}{% endif %}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{{ '" + image + "\\n' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endif %}"
        "{{ '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return {
        "tokenizer_config.json": config | {"chat_template": jinja},
        "chat_template.jinja": jinja,
    }


# ---- check ---------------------------------------------------------------------------------------


def check_folder(folder):
    """Print what a folder is; ValueError unless all tensors and parameters are accounted for."""
    about = inspect_folder(folder)
    kind = about.config["architectures"][0]
    stored = [piece for pieces in about.tensors.values() for piece in pieces]
    n_files = len({piece.file for piece in stored})
    print(f"{folder}: {kind}, {len(stored)} tensors in {n_files} file(s)")
    for part, cfg in (("vision_model", about.vision), ("mlp1", ""), ("language_model", about.llm)):
        tensors = []
        for name, pieces in about.tensors.items():
            if name.startswith(f"{part}."):
                tensors += pieces
        if tensors:
            numel = sum(math.prod(tensor.shape) for tensor in tensors)
            kinds = "/".join(sorted({tensor.dtype for tensor in tensors}))
            print(f"  {part}: {numel:,} parameters, {len(tensors)} tensors, {kinds} {cfg}".rstrip())
    if about.llm:
        print_tokens(folder, about)
    check_content(folder, about.tensors)
    print("ok: every tensor used once, every parameter filled once")


def print_tokens(folder, about):
    """Print the id of <IMG_CONTEXT> and the prompt template; ValueError for a wrong tokenizer."""
    image_id = "no tokenizer"
    if has_tokenizer(folder):
        tokenizer = Tokenizer(folder)
        check_vocabulary(about.llm, tokenizer)
        image_id = tokenizer.image_id
    template = about.config.get("template", "none")
    if template not in (*TEMPLATES, "none"):
        template = f"unknown, {template}"
    print(f"  <IMG_CONTEXT>: {image_id}, template: {template}")


# ---- export --------------------------------------------------------------------------------------

# configuration_internvl_chat.py of the internvl layout: transformers does not know this
# model_type, and vLLM reads config.json through it
CONFIGURATION = '''\
"""config.json of an InternVL folder, for AutoConfig with trust_remote_code=True."""
from transformers import PretrainedConfig, Qwen2Config

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    attribute_map = {"text_config": "llm_config"}

    def __init__(self, vision_config=None, llm_config=None, **others):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**others)
'''


# modeling_sailvl.py of transformers' layout: its own InternVL cannot have an AIMv2
MODELING = '''\
"""transformers' InternVL with an AIMv2, for trust_remote_code=True."""
from transformers import Aimv2VisionConfig, InternVLConfig, InternVLForConditionalGeneration

class SailVLConfig(InternVLConfig):
    sub_configs_defaults = InternVLConfig.sub_configs_defaults | {
        "vision_config": Aimv2VisionConfig}

def put_in_order(module, inputs, output):
    # The pixel shuffle takes views, and the rows of an AIMv2 do not lie one after the other.
    output.last_hidden_state = output.last_hidden_state.contiguous()
    return output

class SailVLForConditionalGeneration(InternVLForConditionalGeneration):
    config_class = SailVLConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.vision_tower.register_forward_hook(put_in_order)
'''


@dataclass(slots=True)
class ExportConfig:
    layout: Literal["internvl", "transformers"] = "internvl"
    write_head: bool = False  # also write a head that shares the embedding table, for SGLang


def export(source, target, layout="internvl", write_head=False):
    """Write the whole model folder source as an ExportConfig has it.

    ValueError or OSError, before weights are read, if it cannot be.
    """
    refuse_to_replace(target, source)
    about = inspect_folder(source)
    template = about.config.get("template", "sailvl-chat")
    if not about.vision or not about.llm:
        raise ValueError(f"{source} is no whole model; assemble a vision encoder and a language "
                         "model first")
    if template not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise ValueError(
            f"{source}: config.json names the template {template!r}; known are {known}")
    if layout == "transformers" and not about.config.get("use_thumbnail", True):
        raise ValueError(f"{source}: transformers' layout cannot say use_thumbnail = False; "
                         "take --layout=internvl")
    tokenizer = Tokenizer(source)
    check_vocabulary(about.llm, tokenizer)
    tokenizer_config = read_json(Path(source) / "tokenizer_config.json", dict)

    model, _ = load_folder(source)
    if write_head and model.llm.tie_embeddings:
        model.llm.tie_embeddings = False
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    files = {"added_tokens.json": tokenizer.special}
    if layout == "internvl":
        files |= prompt_files(tokenizer_config, template, "<image>")
        export_internvl(model, about.config, template, source, target, files)
    else:
        files |= transformers_prompt_files(tokenizer_config, template)
        export_transformers(model, about.config, template, source, target, files)


def export_internvl(model, source_config, template, source, target, files):
    dtype = model.language_model.lm_head.weight.dtype
    config = config_json(model.vision, model.llm, dtype, template, source_config)
    config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    code = CONFIGURATION.replace("Qwen2", "Qwen3") if model.llm.qwen3 else CONFIGURATION
    files = files | {"configuration_internvl_chat.py": code}
    save_folder(model.state_dict(), config, target, source, files)


def export_transformers(model, source_config, template, source, target, files):
    vision = model.vision
    side = vision.image_size
    processor = {"processor_class": "InternVLProcessor"}
    pixels = {
        "do_resize": True, "resample": 3, "size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN,
        "image_std": STD, "do_convert_rgb": True,
    }
    files = files | {
        "processor_config.json": processor | {"image_seq_length": vision.tokens_per_tile},
        "video_preprocessor_config.json": processor | pixels | {
            "video_processor_type": "InternVLVideoProcessor"},
        "preprocessor_config.json": processor | pixels | {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": True,
            "min_patches": source_config.get("min_dynamic_patch", 1),
            "max_patches": source_config.get("max_dynamic_patch", 12),
        },
    }
    state = model.state_dict()
    if model.llm.tie_embeddings:
        state.pop(HEAD)
    dtype = model.language_model.lm_head.weight.dtype
    config = transformers_config(vision, model.llm, dtype, template, source_config)
    config["image_token_id"] = model.image_token_id
    if vision.kind == "aimv2":
        config["auto_map"] = {
            "AutoConfig": "modeling_sailvl.SailVLConfig",
            "AutoModelForImageTextToText": "modeling_sailvl.SailVLForConditionalGeneration",
        }
        files |= {"modeling_sailvl.py": MODELING}
    tensors = transformers_tensors(state, config["architectures"][0])
    write_folder(tensors, config, target, source, files)


def transformers_prompt_files(tokenizer_config, template):
    image_tokens = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    }
    config = tokenizer_config | image_tokens | {"extra_special_tokens": image_tokens}
    return prompt_files(config, template, "<IMG_CONTEXT>")


# ---- the command line ----------------------------------------------------------------------------

def assemble_command(paths, flags):
    cfg = AssembleConfig()
    configure(cfg, [*paths, *flags])
    assemble(cfg)


def check_command(paths, flags):
    if len(paths) != 1 or flags:
        raise ValueError(f"usage: {USAGE}")
    check_folder(model_folder(paths[0]))


def export_command(paths, flags):
    cfg = ExportConfig()
    configure(cfg, flags)
    if len(paths) != 2:
        raise ValueError(f"usage: {USAGE}")
    source = model_folder(paths[0])
    export(source, paths[1], cfg.layout, cfg.write_head)
    use = "vLLM and llama.cpp; AutoModel of transformers needs --layout=transformers"
    if inspect_folder(source).vision.kind == "aimv2":
        use = "transformers with trust_remote_code=True; vLLM does not know its ViT"
    elif cfg.layout == "transformers":
        use = "transformers and vLLM"
    print(f"{paths[1]}: written, for {use}")


def merge_command(paths, flags):
    if len(paths) != 3 or flags:
        raise ValueError(f"usage: {USAGE}")
    base, adapter, target = paths
    refuse_to_replace(target, base, adapter)
    write_merged(base, adapter, target)
    print(f"{target}: written")


COMMANDS = {"assemble": assemble_command, "check": check_command, "export": export_command,
            "merge": merge_command}


def main():
    command, words = subcommand(COMMANDS, USAGE)
    paths, flags = split_words(words)
    command(paths, [flag for flag in flags if not flag.startswith("--debug=")])


if __name__ == "__main__":
    run_script(main)
