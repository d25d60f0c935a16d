"""weights.py and convert.py: model folders in and out, full accounting, refusals in one line."""
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import distributed
import convert
import weights as W
from configurator import run_script
from generate import generate
from model import VLM, LLMConfig
from test_model import IMG, pack, tiny
from vision import VisionConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A Qwen2 tokenizer folder as released, in small: 256 bytes, 22 special tokens, no image tokens."""
    from inputs.tokenizer import BYTE_TO_CHAR, SPECIAL_TOKENS
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {c: i for i, c in enumerate(BYTE_TO_CHAR.values())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    decoder = {str(256 + i): {"content": t, "special": True} for i, t in enumerate(SPECIAL_TOKENS[:22])}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder, "eos_token": "<|im_end|>",
         "pad_token": "<|endoftext|>", "model_max_length": 131072}))
    return folder


def save(folder, vlm, part="", tokenizer=None, **kw):
    vision, llm = (None if part == "llm" else vlm.vision), (None if part == "vit" else vlm.llm)
    W.save_folder(vlm.state_dict(), vision, llm, folder, tokenizer, dtype=torch.float32, **kw)
    return folder


def run(*args):
    """convert.py with these arguments, in this process. -> return code, stdout, stderr."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["convert.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_script(convert.main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = argv
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def edit(folder, **changes):
    """Change entries of config.json, `vision_config__image_size=3` also inside a section."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))


def sparse_folder(folder, vision, llm, shard_bytes=W.SHARD_BYTES):
    """A model folder of any size that takes no room on the disk: real headers, bf16 zeros that are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(W.config_json(vision, llm, torch.bfloat16)))
    headers = [{}]
    for name, shape in W.parameter_shapes(vision, llm).items():
        start = max((entry["data_offsets"][1] for entry in headers[-1].values()), default=0)
        if start + 2 * math.prod(shape) > shard_bytes:
            headers, start = [*headers, {}], 0
        headers[-1][name] = dict(dtype="BF16", shape=shape, data_offsets=[start, start + 2 * math.prod(shape)])
    names = [f"model-{i:05d}-of-{len(headers):05d}.safetensors" for i in range(1, len(headers) + 1)]
    if len(headers) == 1:
        names = ["model.safetensors"]
    for name, header in zip(names, headers):
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    if len(names) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {tensor: name for name, header in zip(names, headers) for tensor in header}}))
    return folder


# ---- a model folder --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied):
    vlm = tiny(tie_embeddings=tied, rope_theta=5e5)
    back, raw = W.load_folder(save(tmp_path / "m", vlm, extra=dict(max_dynamic_patch=6), template="internvl2_5"))
    assert (back.vision, back.llm) == (vlm.vision, vlm.llm)
    assert raw["max_dynamic_patch"] == 6 and raw["template"] == "internvl2_5" and raw["min_dynamic_patch"] == 1
    assert vlm.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(vlm.state_dict().values(), back.state_dict().values()))
    assert (back.language_model.lm_head.weight is back.language_model.model.embed_tokens.weight) == tied
    names = load_file(tmp_path / "m/model.safetensors").keys()
    assert names == {n for n in vlm.state_dict() if not (tied and "lm_head" in n)}
    half, _ = W.load_folder(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_stored_head_decides_whether_it_is_tied(tmp_path):
    vlm = tiny()
    folder = save(tmp_path / "m", vlm)
    edit(folder, llm_config__tie_word_embeddings=True)          # the config says tied, the file holds another head
    back, _ = W.load_folder(folder)
    assert torch.equal(back.language_model.lm_head.weight, vlm.language_model.lm_head.weight)
    assert not back.llm.tie_embeddings
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    edit(folder, llm_config__tie_word_embeddings=False)         # the config says untied, the file holds no head
    save_file(tensors, folder / "model.safetensors")
    back, _ = W.load_folder(folder)
    assert back.language_model.lm_head.weight is back.language_model.model.embed_tokens.weight
    assert back.llm.tie_embeddings


def test_shards_and_index_hold_the_same_model_with_readable_files(tmp_path, monkeypatch):
    vlm = tiny()
    monkeypatch.setattr(W, "SHARD_BYTES", 100_000)
    folder = save(tmp_path / "m", vlm)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in vlm.state_dict().values())
    assert all(oct(f.stat().st_mode)[-3:] == "644" for f in folder.iterdir())
    back, _ = W.load_folder(folder)
    assert all(torch.equal(a, b) for a, b in zip(vlm.state_dict().values(), back.state_dict().values()))
    first, *_, last = sorted(folder.glob("model-0*"))
    save_file(load_file(first) | load_file(last), last)
    with pytest.raises(ValueError, match="is stored in an earlier file too"):
        W.load_folder(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match="missing; the folder is incomplete"):
        W.load_folder(folder)


def test_the_language_model_alone_can_be_loaded_from_a_whole_folder(tmp_path):
    vlm = tiny()
    text, _ = W.load_folder(save(tmp_path / "m", vlm), vision=False)
    assert text.vision is None and all(n.startswith("language_model.") for n in text.state_dict())
    tokens, labels, positions, cu, _ = pack((9, 30))
    assert torch.equal(text(tokens, labels, positions, cu), vlm(tokens, labels, positions, cu))


def test_saving_replaces_an_old_model_folder_and_nothing_else(tmp_path, monkeypatch):
    folder = save(tmp_path / "m", tiny())
    save(folder, tiny(seed=1))
    assert torch.equal(W.load_folder(folder)[0].mlp1[1].weight, tiny(seed=1).mlp1[1].weight)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    (tmp_path / ".m.jsonl.index-1").mkdir()                            # of the data file beside it
    (tmp_path / ".m.tmp-1").mkdir()                                    # of a write that was killed
    save(folder, tiny(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.jsonl.index-1", "m", "notes"]
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        save(tmp_path / "notes", tiny())
    monkeypatch.setattr(W, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(folder, tiny(seed=2))
    assert torch.equal(W.load_folder(folder)[0].mlp1[1].weight, tiny(seed=1).mlp1[1].weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.jsonl.index-1", "m", "notes"]


@pytest.mark.parametrize("change, words", [
    (dict(architectures=["InternVLChatModelX"]), "architecture InternVLChatModelX is not supported"),
    (dict(vision_config__model_type="aimv2"), "model_type = 'aimv2' is not supported, only 'intern_vit_6b'"),
    (dict(vision_config__architectures=["AIMv2Model"]), r"vision encoder: architectures = \['AIMv2Model'\] is not sup"),
    (dict(llm_config__architectures=["InternLM2ForCausalLM"]),
     r"model: architectures = \['InternLM2ForCausalLM'\] is not"),
    (dict(vision_config__qk_normalization=True), "qk_normalization = True is not supported"),
    (dict(llm_config__rope_scaling={"type": "yarn"}), "rope_scaling = .* is not supported"),
    (dict(ps_version="v1"), "ps_version = 'v1' is not supported, only 'v2'"),
    (dict(select_layer=-4), "select_layer = -4 is not supported"),
    (dict(force_image_size=224), "force_image_size = 224 is not supported, only 56"),
    (dict(downsample_ratio=0.3), "downsample_ratio 0.3"),
    (dict(llm_config={"architectures": ["Qwen2ForCausalLM"]}), "lacks vocab_size, hidden_size"),
    (dict(llm_config__intermediate_size=97),
     r"mlp.down_proj.weight has shape \(64, 96\), config.json asks for \(64, 97\)"),
    (dict(llm_config__num_hidden_layers=4),
     "12 parameters without a tensor: language_model.model.layers.3.*and 7 more"),
    (dict(architectures="InternVLChatModel"), "architectures = 'InternVLChatModel' must be a list"),
    (dict(architectures=["InternVLForConditionalGeneration"]), "transformers' own layout is only written here"),
    (dict(llm_config__vocab_size="330"), "language model: vocab_size = '330' must be a whole number from 1"),
    (dict(llm_config__hidden_size=-64), "hidden_size = -64 must be a whole number"),
    (dict(llm_config__num_key_value_heads=0), "num_key_value_heads = 0 must be a whole number"),
    (dict(llm_config__num_key_value_heads=3), "m/config.json: 4 heads do not divide over 3 kv heads"),
    (dict(llm_config__num_hidden_layers=10 ** 6), "num_hidden_layers = 1000000 must be a whole number from 1 to 1000"),
    (dict(llm_config__rope_theta="x"), "rope_theta = 'x' must be a positive number"),
    (dict(llm_config__tie_word_embeddings=1), "tie_word_embeddings = 1 must be true or false"),
    (dict(vision_config__patch_size=0), "vision encoder: patch_size = 0 must be"),
    (dict(vision_config__image_size=[56, 56]), r"image_size = \[56, 56\] must be"),
    (dict(vision_config__num_attention_heads=5), "m/config.json: dim 64 does not divide by n_heads 5"),
    (dict(vision_config=[1]), "config.json is not what it should be"),
    (dict(min_dynamic_patch="a"), "min_dynamic_patch = 'a' must be a whole number"),
    (dict(template=[1]), r"template = \[1\] must be a name"),
    (dict(pad2square=True), "pad2square = True is not supported, only False"),
    (dict(dynamic_image_size=False), "dynamic_image_size = False is not supported"),
    (dict(vision_config__num_hidden_layers=1), "14 tensors without a parameter: vision_model.encoder.layers.1"),
])
def test_a_config_that_does_not_fit_is_refused_in_words(tmp_path, change, words):
    edit(save(tmp_path / "m", tiny()), **change)
    with pytest.raises(ValueError, match=words):
        W.load_folder(tmp_path / "m")


def test_damaged_folders_are_refused_in_words(tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return save(tmp_path / "m", tiny())
    with pytest.raises(FileNotFoundError, match="nowhere/config.json does not exist; give the folder"):
        W.load_folder(tmp_path / "nowhere")
    file = fresh() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        W.load_folder(tmp_path / "m")
    (fresh() / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        W.load_folder(tmp_path / "m")
    tensors = load_file(fresh() / "model.safetensors")
    save_file(tensors | {"mlp1.0.bias": tensors["mlp1.0.bias"].to(torch.int8)}, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match="mlp1.0.bias is stored as I8, which is none of F32, BF16"):
        W.load_folder(tmp_path / "m")
    moved = {n.replace("mlp1.0.", "mlp1.7."): x for n, x in tensors.items() if n != "mlp1.3.bias"}
    save_file(moved, tmp_path / "m/model.safetensors")          # both sides are listed
    with pytest.raises(ValueError, match="3 parameters without a tensor: mlp1.0.bias, mlp1.0.weight, mlp1.3.bias; "
                                         "2 tensors without a parameter: mlp1.7.bias, mlp1.7.weight"):
        W.load_folder(tmp_path / "m")
    wide = {n: torch.zeros(65) if n.endswith("layernorm.weight") else x for n, x in tensors.items()}
    save_file(wide, tmp_path / "m/model.safetensors")
    with pytest.raises(ValueError, match=r"layernorm.weight has shape \(65,\), config.json asks for \(64,\).*and 1 more"):
        W.load_folder(tmp_path / "m")
    shards = sparse_folder(tmp_path / "s", VisionConfig(), LLMConfig(), 10 ** 9)
    os.truncate(shards / "model-00002-of-00005.safetensors", 10 ** 8)
    with pytest.raises(ValueError, match="model-00002-of-00005.safetensors: damaged or cut short"):
        W.inspect_folder(shards)
    (shards / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00005.safetensors: missing; the folder is incomplete"):
        W.inspect_folder(shards)
    with pytest.raises(ValueError, match="vision encoder only; join it"):
        W.load_folder(save(tmp_path / "vit", tiny(), "vit"))


# ---- convert.py ------------------------------------------------------------------------------------------------------

def test_assemble_joins_released_parts_and_adds_the_image_tokens(tmp_path, tokenizer):
    from inputs.tokenizer import SPECIAL_TOKENS, Tokenizer
    one, two = tiny(seed=1), tiny(seed=2, tie_embeddings=True)
    save(tmp_path / "vit", one, "vit")
    save(tmp_path / "llm", two, "llm", tokenizer)
    join = ("assemble", "--dtype=float32")
    done = run(*join, f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all")
    assert done.returncode == 0, done.stderr
    vlm, raw = W.load_folder(tmp_path / "all")
    assert raw["template"] == "sailvl-chat" and vlm.image_token_id == 256 + 24
    state = vlm.state_dict()
    for name, tensor in state.items():
        if not name.startswith("mlp1."):
            assert torch.equal(tensor, (one if name.startswith("vision") else two).state_dict()[name])
    assert 0.015 < state["mlp1.1.weight"].std() < 0.025 and not state["mlp1.1.bias"].any()
    read = Tokenizer(tmp_path / "all")
    assert read.special == {t: 256 + i for i, t in enumerate(SPECIAL_TOKENS)} and read.image_id == vlm.image_token_id
    again = run(*join, f"--vision={tmp_path}/all", f"--llm={tmp_path}/all", f"--out={tmp_path}/all2", "--seed=9")
    assert again.returncode == 0
    assert run("check", tmp_path / "all2").stdout.endswith("every parameter filled once\n")
    assert not torch.equal(W.load_folder(tmp_path / "all2")[0].mlp1[1].weight, state["mlp1.1.weight"])


def test_assemble_never_resizes_the_vocabulary(tmp_path, tokenizer):
    vlm = tiny(vocab_size=285)
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm", tokenizer)
    done = run("assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all")
    assert done.returncode == 2 and "has 285 rows, token ids go up to 286" in done.stderr
    config = json.loads((tmp_path / "llm/tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["278"] = {"content": "<think>"}
    (tmp_path / "llm/tokenizer_config.json").write_text(json.dumps(config))
    done = run("assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all")
    assert done.returncode == 2 and "<think> with id 278 is not one of Qwen2.5's" in done.stderr
    assert not (tmp_path / "all").exists()


def assembled(tmp_path, tokenizer, **llm):
    """A whole model with its tokenizer at tmp_path/m, of values that are no library's defaults. -> its folder."""
    vlm = tiny(vocab_size=330, rope_theta=1e6, norm_eps=1e-3, **llm)
    vlm.vision.norm_eps = 1e-3
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm", tokenizer)
    done = run("assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/m", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    return tmp_path / "m"


def refused(words, *args):
    done = run(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_export_and_assemble_never_replace_their_sources(tmp_path, tokenizer):
    folder = assembled(tmp_path / "run", tokenizer)
    for target in (folder, folder / ".", folder.parent):
        for layout in ("internvl", "transformers"):
            refused("is or holds the source", "export", folder, target, f"--layout={layout}")
    refused("is or holds the source", "assemble", f"--vision={folder}", f"--llm={folder}", f"--out={folder}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")           # such as a run's, which holds no weights
    refused("is not a model folder", "export", folder, tmp_path / "other")
    assert run("check", folder).returncode == 0


def test_damaged_or_missing_tokenizers_are_refused_in_words_and_before_weights_are_read(tmp_path, tokenizer, monkeypatch):
    folder = assembled(tmp_path, tokenizer)
    monkeypatch.setattr(convert, "load_folder", None)
    for name, content, words in (("added_tokens.json", [1], "added_tokens.json holds a list, not a dict"),
                                 ("added_tokens.json", {"<img>": "a"}, "token ids must be whole numbers"),
                                 ("added_tokens.json", {"<img>": 0}, "each of one token"),
                                 ("tokenizer_config.json", [1], "tokenizer_config.json holds a list, not a dict"),
                                 ("added_tokens.json", {"<img>": 400}, "smaller than the tokenizer's 401 tokens")):
        whole = (folder / name).read_text()
        (folder / name).write_text(json.dumps(content))
        refused(words, "export", folder, tmp_path / "out")
        (folder / name).write_text(whole)
    config = json.loads((tmp_path / "llm/tokenizer_config.json").read_text())
    (tmp_path / "llm/tokenizer_config.json").write_text(json.dumps(config | dict(added_tokens_decoder=[1])))
    refused("added_tokens_decoder is no table of tokens", "assemble", f"--vision={tmp_path}/vit",
            f"--llm={tmp_path}/llm", f"--out={tmp_path}/out")
    (folder / "vocab.json").unlink()
    refused("no tokenizer in", "export", folder, tmp_path / "out")
    edit(folder, template="mine", use_thumbnail=False)
    assert "<IMG_CONTEXT>: no tokenizer, template: unknown, mine" in run("check", folder).stdout
    edit(folder, template="sailvl-chat")
    refused("cannot say use_thumbnail = False", "export", folder, tmp_path / "out", "--layout=transformers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["internvl", "transformers"])
def test_an_export_is_complete_where_tokenizer_json_is_all_there_is(tmp_path, tokenizer, layout):
    folder = assembled(tmp_path, tokenizer)
    vocab, added = (json.loads((folder / f"{name}.json").read_text()) for name in ("vocab", "added_tokens"))
    (folder / "tokenizer.json").write_text(json.dumps(dict(
        model=dict(vocab=vocab), added_tokens=[dict(content=token, id=i) for token, i in added.items()])))
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert W.image_token_id(folder) == 280 and "<IMG_CONTEXT>: 280" in run("check", folder).stdout
    done = run("export", folder, tmp_path / "out", f"--layout={layout}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == added
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 258
    assert W.image_token_id(tmp_path / "out") == 280


def test_transformers_reads_the_configuration_of_the_internvl_layout(tmp_path, tokenizer, monkeypatch):
    """vLLM reads config.json so; every value of both parts is there as an attribute."""
    t = pytest.importorskip("transformers", reason="transformers reads the export; pip install -r requirements-dev.txt")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert run("export", assembled(tmp_path, tokenizer), tmp_path / "out").returncode == 0
    raw = json.loads((tmp_path / "out/config.json").read_text())
    config = t.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name in W.VISION_NAMES:
        assert getattr(config.vision_config, name) == raw["vision_config"][name]
    for name in set(W.LLM_NAMES) - {"rope_theta"}:
        assert getattr(config.llm_config, name) == raw["llm_config"][name]
    assert config.llm_config.rope_parameters["rope_theta"] == 1e6 and isinstance(config.llm_config, t.Qwen2Config)
    assert config.model_type == "internvl_chat" and config.get_text_config() is config.llm_config
    assert type(config)().llm_config.model_type == "qwen2"      # defaults for all


def test_wrong_commands_end_with_one_line_and_code_2(tmp_path):
    for args, words in (((), "usage:"), (("check",), "usage:"), (("check", tmp_path / "x"), "x/config.json does not exist"),
                        (("assemble", "--vision=a"), "--llm=DIR is missing"),
                        (("export", "a", "b", "--layot=x"), "layout"),
                        (("export", tmp_path / "x", tmp_path / "y"), "x/config.json does not exist")):
        done = run(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words in done.stderr and not done.stdout


def test_both_exports_keep_the_model(tmp_path, tokenizer):
    t = pytest.importorskip("transformers", reason="transformers reads the export; pip install -r requirements-dev.txt")
    assembled(tmp_path, tokenizer, tie_embeddings=True).rename(tmp_path / "a")
    for layout in ("internvl", "transformers"):
        assert run("export", tmp_path / "a", tmp_path / layout, f"--layout={layout}").returncode == 0
    ours, (again, _) = W.load_folder(tmp_path / "a")[0].eval(), W.load_folder(tmp_path / "internvl")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
    theirs, info = t.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "transformers", output_loading_info=True)
    assert not any(info.values()), info
    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = ours.image_token_id
    from inputs.images import normalize
    pixels = normalize(tiles)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens, positions, cu, tiles), theirs.eval()(
            input_ids=tokens[None], pixel_values=pixels).logits[0], atol=1e-4, rtol=1e-4)
    answer = theirs.generate(input_ids=tokens[None], pixel_values=pixels, max_new_tokens=8, do_sample=False,
                             eos_token_id=-1)
    assert generate(ours, [tokens.tolist()], [tiles], 8, set()) == [answer[0, -8:].tolist()]
    words = t.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    assert words.convert_tokens_to_ids("<IMG_CONTEXT>") == ours.image_token_id == words.context_image_token_id
    from inputs.chat import chat_ids
    from inputs.tokenizer import Tokenizer
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    rendered = words.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    mine = Tokenizer(tmp_path / "a")
    expected = chat_ids(mine, "sailvl-chat", [("<image>\nwhat?", None)], [0], 4)
    got = words(rendered.replace("<IMG_CONTEXT>", "<img></img>"))["input_ids"]
    assert got == expected


def test_a_plain_qwen2_folder_is_read_by_transformers_with_equal_logits(tmp_path):
    t = pytest.importorskip("transformers", reason="transformers reads the folder; pip install -r requirements-dev.txt")
    vlm = tiny(vision=False, rope_theta=1e6)
    theirs = t.Qwen2ForCausalLM.from_pretrained(save(tmp_path / "llm", vlm, "llm")).eval()
    tokens, _, positions, cu, _ = pack((30,))
    torch.testing.assert_close(vlm.logits(tokens, positions, cu), theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "again")                  # and what transformers 5 writes is read here
    back, _ = W.load_folder(tmp_path / "again")
    torch.testing.assert_close(vlm.logits(tokens, positions, cu), back.logits(tokens, positions, cu))


def test_the_2b_and_8b_shapes_are_those_of_the_released_checkpoints():
    for llm, total in (("qwen2.5-1.5b", 2_089_762_304), ("qwen2.5-7b", 7_947_169_280)):
        shapes = W.parameter_shapes(VisionConfig(), LLMConfig(**LLMConfig.PRESETS[llm]))
        assert len(shapes) == 685 and sum(torch.Size(s).numel() for s in shapes.values()) == total
    with torch.device("meta"):
        tied = VLM(VisionConfig(), LLMConfig(tie_embeddings=True), 0)
    assert sum(p.numel() for p in tied.parameters()) == 1_856_388_608


@pytest.mark.parametrize("llm, parameters, files", [("qwen2.5-1.5b", 2_089_762_304, 1), ("qwen2.5-7b", 7_947_169_280, 4)])
def test_check_accounts_for_folders_of_the_released_shapes(tmp_path, llm, parameters, files):
    folder = sparse_folder(tmp_path / "m", VisionConfig(), LLMConfig(**LLMConfig.PRESETS[llm]))
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(sizes) == files and 2 * parameters < sum(sizes) < 2 * parameters + 100_000
    done = run("check", folder)
    assert done.returncode == 0, done.stderr
    assert f"InternVLChatModel, 685 tensors in {files} file(s)" in done.stdout
    counts = [int(line.split()[1].replace(",", "")) for line in done.stdout.splitlines() if " parameters," in line]
    assert sum(counts) == parameters and counts[0] == 304_012_288


# ---- streaming: what is read, and how much memory it takes -------------------------------------------------------------

class Counted:
    """safe_open that notes how many numbers were read."""
    read = 0

    def __init__(self, *args, **kw):
        self.file = W.safe_open.real(*args, **kw)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def get_slice(self, name):
        self.part = self.file.get_slice(name)
        return self

    def __getitem__(self, rows):
        part = self.part[rows]
        Counted.read += part.numel()
        return part


def on_two_ranks(folder):
    """Run by each of two ranks: start from the folders a and b sharded; note what was read, and that all is there."""
    torch.set_num_threads(1)
    dist, real = distributed.setup_distributed("cpu", 60), W.safe_open
    for name in ("a", "b"):
        model, _, table = W.start_model(types.SimpleNamespace(), {}, f"{folder}/{name}", types.SimpleNamespace(n_vocab=0))
        model = distributed.parallelize(model, "fsdp", torch.float32, dist)
        Counted.real, Counted.read = real, 0
        W.safe_open = type("safe_open", (Counted,), {"real": real})
        W.start_weights(model, table, types.SimpleNamespace())
        W.safe_open = real
        reads, full = distributed.gather(Counted.read, dist), distributed.full_state(model)
        if dist.is_main:
            stored = load_file(f"{folder}/{name}/model.safetensors")
            total = sum(x.numel() for x in stored.values())
            assert sum(reads) == total and max(reads) < 0.52 * total, (reads, total)
            assert all(torch.equal(full[n], x) for n, x in stored.items()) and len(full) - len(stored) == (name == "b")
            torch.save(reads, f"{folder}/reads.pt")
        whole, _ = W.load_folder(f"{folder}/{name}")
        whole.image_token_id = model.image_token_id = IMG
        loss = model(*pack((9, 30), (1, 2)))
        torch.testing.assert_close(loss, whole(*pack((9, 30), (1, 2))))
    distributed.close_distributed()


def test_under_fsdp_each_rank_reads_only_what_it_keeps(tmp_path):
    for name, tied in (("a", False), ("b", True)):
        save(tmp_path / name, tiny(tie_embeddings=tied))
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + (os.getpid() + 7) % 20000),
                            PYTHONPATH=str(Path(__file__).parent.parent), OMP_NUM_THREADS="1")
    jobs = [subprocess.Popen([sys.executable, __file__, tmp_path], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                             stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)[-3000:]
    assert len(torch.load(tmp_path / "reads.pt")) == 2


def test_loading_takes_less_than_1_15_times_the_weights(tmp_path):
    """At 230 MB here; tests/test_full_size.py measures the 2B: 1.11."""
    folder = sparse_folder(tmp_path / "m", VisionConfig(), LLMConfig(dim=512, vocab_size=8000, n_layers=14, n_heads=4,
                                                                     ffn_dim=1024))
    code = ("import resource, torch; from weights import load_folder\n"
            "torch.ones(9).to(torch.bfloat16).copy_(torch.ones(9))\n"
            "before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize(); vlm, _ = load_folder(%r)\n"
            "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
            "print((peak - before) / sum(p.nbytes for p in vlm.parameters()))" % str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15, done.stdout


# ---- R22 -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", ["internvl", "transformers"])
def test_an_export_in_three_shards_loses_nothing(tmp_path, tokenizer, monkeypatch, layout, tied):
    """R22: sharded, readable by others, total_size right, every key used, logits equal, bits equal."""
    t = pytest.importorskip("transformers", reason="transformers reads the export; pip install -r requirements-dev.txt")
    from test_parity import their_names
    from inputs.images import normalize
    vlm = W.load_folder(assembled(tmp_path, tokenizer, tie_embeddings=tied))[0].eval()
    bytes_ = sum(p.nbytes for p in vlm.parameters())
    monkeypatch.setattr(W, "SHARD_BYTES", bytes_ // 3 + 60_000)
    before = os.umask(0o022)
    try:
        done = run("export", tmp_path / "m", tmp_path / "out", f"--layout={layout}")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    files, index = sorted(f.name for f in (tmp_path / "out").iterdir()), tmp_path / "out/model.safetensors.index.json"
    assert [f for f in files if f.endswith(".safetensors")] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert json.loads(index.read_text())["metadata"]["total_size"] == bytes_
    assert {oct((tmp_path / "out" / f).stat().st_mode)[-3:] for f in files} == {"644"}
    needed = {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja"}
    assert needed | {"preprocessor_config.json"} <= set(files)
    config = json.loads((tmp_path / "out/config.json").read_text())
    if layout == "internvl":
        assert config["vision_config"]["architectures"] == ["InternVisionModel"] and config["min_dynamic_patch"] == 1
        assert config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"] and config["max_dynamic_patch"] == 12
        again = W.load_folder(tmp_path / "out")[0].state_dict()
        assert all(torch.equal(again[n], x) for n, x in vlm.state_dict().items())
        return
    theirs, info = t.InternVLForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    state = theirs.state_dict()
    for name, tensor in vlm.state_dict().items():
        assert torch.equal(torch.cat([state[n] for n in their_names(name)]), tensor), name
    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = vlm.image_token_id
    with torch.no_grad():
        got = theirs.eval()(input_ids=tokens[None], pixel_values=normalize(tiles)).logits[0]
        torch.testing.assert_close(vlm.logits(tokens, positions, cu, tiles), got, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])
