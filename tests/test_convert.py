"""convert.py: assemble, check, export; refusals in one line."""

import json
import os
import types

import command_line
import pytest
import torch
from folders import edit, same_state, save, sparse_folder
from small_model import pack, tiny

import convert
import model_config
import weights
from generate import generate
from model import LLMConfig
from vision import VisionConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small Qwen2 tokenizer as released: 256 bytes, 22 special tokens, no image tokens."""
    from inputs.tokenizer import BYTE_TO_CHAR, SPECIAL_TOKENS

    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {c: i for i, c in enumerate(BYTE_TO_CHAR.values())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    decoder = {
        str(256 + i): {"content": t, "special": True} for i, t in enumerate(SPECIAL_TOKENS[:22])
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": decoder,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 131072,
            }
        )
    )
    return folder


def run(*args):
    """convert.py with these arguments, in this process. -> return code, stdout, stderr."""
    code, out, err = command_line.run(convert.main, ["convert.py", *args])
    return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)


def test_assemble_joins_released_parts_and_adds_the_image_tokens(tmp_path, tokenizer):
    from inputs.tokenizer import SPECIAL_TOKENS, Tokenizer

    one, two = tiny(seed=1), tiny(seed=2, tie_embeddings=True)
    save(tmp_path / "vit", one, "vit")
    save(tmp_path / "llm", two, "llm", tokenizer)
    join = ("assemble", "--dtype=float32")
    done = run(*join, f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all")
    assert done.returncode == 0, done.stderr
    vlm, raw = weights.load_folder(tmp_path / "all")
    assert raw["template"] == "sailvl-chat" and vlm.image_token_id == 256 + 24
    state = vlm.state_dict()
    for name, tensor in state.items():
        if not name.startswith("mlp1."):
            assert torch.equal(
                tensor, (one if name.startswith("vision") else two).state_dict()[name]
            )
    assert 0.015 < state["mlp1.1.weight"].std() < 0.025 and not state["mlp1.1.bias"].any()
    read = Tokenizer(tmp_path / "all")
    assert (
        read.special == {t: 256 + i for i, t in enumerate(SPECIAL_TOKENS)}
        and read.image_id == vlm.image_token_id
    )
    again = run(
        *join,
        f"--vision={tmp_path}/all",
        f"--llm={tmp_path}/all",
        f"--out={tmp_path}/all2",
        "--seed=9",
    )
    assert again.returncode == 0
    assert run("check", tmp_path / "all2").stdout.endswith("every parameter filled once\n")
    assert not torch.equal(
        weights.load_folder(tmp_path / "all2")[0].mlp1[1].weight, state["mlp1.1.weight"]
    )


def test_assemble_never_resizes_the_vocabulary(tmp_path, tokenizer):
    vlm = tiny(vocab_size=285)
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm", tokenizer)
    done = run(
        "assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all"
    )
    assert done.returncode == 2 and "has 285 rows, token ids go up to 286" in done.stderr
    config = json.loads((tmp_path / "llm/tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["278"] = {"content": "<think>"}
    (tmp_path / "llm/tokenizer_config.json").write_text(json.dumps(config))
    done = run(
        "assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all"
    )
    assert done.returncode == 2 and "<think> with id 278 is not one of Qwen2.5's" in done.stderr
    assert not (tmp_path / "all").exists()


def assembled(tmp_path, tokenizer, **llm):
    """A whole model with its tokenizer at tmp_path/m -> m; its values are no library's defaults."""
    vlm = tiny(vocab_size=330, rope_theta=1e6, norm_eps=1e-3, **llm)
    vlm.vision.norm_eps = 1e-3
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm", tokenizer)
    done = run(
        "assemble",
        f"--vision={tmp_path}/vit",
        f"--llm={tmp_path}/llm",
        f"--out={tmp_path}/m",
        "--dtype=float32",
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "m"


def assert_refused(words, *args):
    done = run(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, (
        done.stderr
    )


def test_export_and_assemble_never_replace_their_sources(tmp_path, tokenizer):
    folder = assembled(tmp_path / "run", tokenizer)
    for target in (folder, folder / ".", folder.parent):
        for layout in ("internvl", "transformers"):
            assert_refused("is or holds the source", "export", folder, target, f"--layout={layout}")
    assert_refused(
        "is or holds the source",
        "assemble",
        f"--vision={folder}",
        f"--llm={folder}",
        f"--out={folder}",
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")  # such as a run's, which holds no weights
    assert_refused("is not a model folder", "export", folder, tmp_path / "other")
    assert run("check", folder).returncode == 0


def test_damaged_or_missing_tokenizers_are_refused_in_words_and_before_weights_are_read(
    tmp_path, tokenizer, monkeypatch
):
    folder = assembled(tmp_path, tokenizer)
    monkeypatch.setattr(convert, "load_folder", None)
    for name, content, words in (
        ("added_tokens.json", [1], "added_tokens.json holds a list, not a dict"),
        ("added_tokens.json", {"<img>": "a"}, "token ids must be whole numbers"),
        ("added_tokens.json", {"<img>": 0}, "each of one token"),
        ("tokenizer_config.json", [1], "tokenizer_config.json holds a list, not a dict"),
        ("added_tokens.json", {"<img>": 400}, "smaller than the tokenizer's 401 tokens"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(json.dumps(content))
        assert_refused(words, "export", folder, tmp_path / "out")
        (folder / name).write_text(whole)
    config = json.loads((tmp_path / "llm/tokenizer_config.json").read_text())
    (tmp_path / "llm/tokenizer_config.json").write_text(
        json.dumps(config | dict(added_tokens_decoder=[1]))
    )
    assert_refused(
        "added_tokens_decoder is no table of tokens",
        "assemble",
        f"--vision={tmp_path}/vit",
        f"--llm={tmp_path}/llm",
        f"--out={tmp_path}/out",
    )
    (folder / "vocab.json").unlink()
    assert_refused("no tokenizer in", "export", folder, tmp_path / "out")
    edit(folder, template="mine", use_thumbnail=False)
    assert "<IMG_CONTEXT>: no tokenizer, template: unknown, mine" in run("check", folder).stdout
    edit(folder, template="sailvl-chat")
    assert_refused(
        "cannot say use_thumbnail = False",
        "export",
        folder,
        tmp_path / "out",
        "--layout=transformers",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["internvl", "transformers"])
def test_an_export_is_complete_where_tokenizer_json_is_all_there_is(tmp_path, tokenizer, layout):
    folder = assembled(tmp_path, tokenizer)
    vocab, added = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("vocab", "added_tokens")
    )
    (folder / "tokenizer.json").write_text(
        json.dumps(
            dict(
                model=dict(vocab=vocab),
                added_tokens=[dict(content=token, id=i) for token, i in added.items()],
            )
        )
    )
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert (
        weights.image_token_id(folder) == 280
        and "<IMG_CONTEXT>: 280" in run("check", folder).stdout
    )
    done = run("export", folder, tmp_path / "out", f"--layout={layout}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == added
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 258
    assert weights.image_token_id(tmp_path / "out") == 280


def test_transformers_reads_the_configuration_of_the_internvl_layout(
    tmp_path, tokenizer, monkeypatch
):
    """vLLM reads config.json so; every value of both parts is there as an attribute."""
    t = pytest.importorskip(
        "transformers", reason="transformers reads the export; pip install -r requirements-dev.txt"
    )
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    assert run("export", assembled(tmp_path, tokenizer), tmp_path / "out").returncode == 0
    raw = json.loads((tmp_path / "out/config.json").read_text())
    config = t.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name in model_config.INTERNVIT.names:
        assert getattr(config.vision_config, name) == raw["vision_config"][name]
    for name in set(model_config.QWEN2.names) - {"rope_theta"}:
        assert getattr(config.llm_config, name) == raw["llm_config"][name]
    assert config.llm_config.rope_parameters["rope_theta"] == 1e6 and isinstance(
        config.llm_config, t.Qwen2Config
    )
    assert config.model_type == "internvl_chat" and config.get_text_config() is config.llm_config
    assert type(config)().llm_config.model_type == "qwen2"  # defaults for all


def test_wrong_commands_end_with_one_line_and_code_2(tmp_path):
    for args, words in (
        ((), "usage:"),
        (("check",), "usage:"),
        (("check", tmp_path / "x"), "x/config.json does not exist"),
        (("assemble", "--vision=a"), "--llm=DIR is missing"),
        (("export", "a", "b", "--layot=x"), "layout"),
        (("export", tmp_path / "x", tmp_path / "y"), "x/config.json does not exist"),
    ):
        done = run(*args)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        )
        assert words in done.stderr and not done.stdout


def test_both_exports_keep_the_model(tmp_path, tokenizer):
    t = pytest.importorskip(
        "transformers", reason="transformers reads the export; pip install -r requirements-dev.txt"
    )
    assembled(tmp_path, tokenizer, tie_embeddings=True).rename(tmp_path / "a")
    for layout in ("internvl", "transformers"):
        assert (
            run("export", tmp_path / "a", tmp_path / layout, f"--layout={layout}").returncode == 0
        )
    ours, (again, _) = (
        weights.load_folder(tmp_path / "a")[0].eval(),
        weights.load_folder(tmp_path / "internvl"),
    )
    assert same_state(ours, again)
    theirs, info = t.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "transformers", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = ours.image_token_id
    from inputs.images import normalize

    pixels = normalize(tiles)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(tokens, positions, cu, tiles),
            theirs.eval()(input_ids=tokens[None], pixel_values=pixels).logits[0],
            atol=1e-4,
            rtol=1e-4,
        )
    answer = theirs.generate(
        input_ids=tokens[None],
        pixel_values=pixels,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
    )
    assert generate(ours, [tokens.tolist()], [tiles], 8, set()) == [answer[0, -8:].tolist()]
    words = t.AutoTokenizer.from_pretrained(tmp_path / "transformers")
    assert (
        words.convert_tokens_to_ids("<IMG_CONTEXT>")
        == ours.image_token_id
        == words.context_image_token_id
    )
    from inputs.chat import chat_ids
    from inputs.tokenizer import Tokenizer

    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    rendered = words.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    mine = Tokenizer(tmp_path / "a")
    expected = chat_ids(mine, "sailvl-chat", [("<image>\nwhat?", None)], [0], 4)
    got = words(rendered.replace("<IMG_CONTEXT>", "<img></img>"))["input_ids"]
    assert got == expected


@pytest.mark.parametrize(
    "llm, parameters, files",
    [
        ("qwen2.5-1.5b", 2_089_762_304, 1),
        # check reads all of its 16 GB
        pytest.param("qwen2.5-7b", 7_947_169_280, 4, marks=pytest.mark.nightly),
    ],
)
def test_check_accounts_for_folders_of_the_released_shapes(tmp_path, llm, parameters, files):
    folder = sparse_folder(tmp_path / "m", VisionConfig(), LLMConfig(**LLMConfig.PRESETS[llm]))
    sizes = [f.stat().st_size for f in folder.glob("*.safetensors")]
    assert len(sizes) == files and 2 * parameters < sum(sizes) < 2 * parameters + 100_000
    done = run("check", folder)
    assert done.returncode == 0, done.stderr
    assert f"InternVLChatModel, 685 tensors in {files} file(s)" in done.stdout
    counts = [
        int(line.split()[1].replace(",", ""))
        for line in done.stdout.splitlines()
        if " parameters," in line
    ]
    assert sum(counts) == parameters and counts[0] == 304_012_288


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", ["internvl", "transformers"])
def test_an_export_in_three_shards_loses_nothing(tmp_path, tokenizer, monkeypatch, layout, tied):
    """R22: others read it, total_size is right, every key is used, logits and bits are equal."""
    t = pytest.importorskip(
        "transformers", reason="transformers reads the export; pip install -r requirements-dev.txt"
    )
    from test_parity import their_names

    from inputs.images import normalize

    vlm = weights.load_folder(assembled(tmp_path, tokenizer, tie_embeddings=tied))[0].eval()
    bytes_ = sum(p.nbytes for p in vlm.parameters())
    monkeypatch.setattr(weights, "SHARD_BYTES", bytes_ // 3 + 60_000)
    before = os.umask(0o022)
    try:
        done = run("export", tmp_path / "m", tmp_path / "out", f"--layout={layout}")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    files, index = (
        sorted(f.name for f in (tmp_path / "out").iterdir()),
        tmp_path / "out/model.safetensors.index.json",
    )
    assert [f for f in files if f.endswith(".safetensors")] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert json.loads(index.read_text())["metadata"]["total_size"] == bytes_
    assert {oct((tmp_path / "out" / f).stat().st_mode)[-3:] for f in files} == {"644"}
    needed = {
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert needed | {"preprocessor_config.json"} <= set(files)
    config = json.loads((tmp_path / "out/config.json").read_text())
    if layout == "internvl":
        assert (
            config["vision_config"]["architectures"] == ["InternVisionModel"]
            and config["min_dynamic_patch"] == 1
        )
        assert (
            config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
            and config["max_dynamic_patch"] == 12
        )
        again = weights.load_folder(tmp_path / "out")[0].state_dict()
        assert all(torch.equal(again[n], x) for n, x in vlm.state_dict().items())
        return
    theirs, info = t.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    state = theirs.state_dict()
    for name, tensor in vlm.state_dict().items():
        assert torch.equal(torch.cat([state[n] for n in their_names(name)]), tensor), name
    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = vlm.image_token_id
    with torch.no_grad():
        got = theirs.eval()(input_ids=tokens[None], pixel_values=normalize(tiles)).logits[0]
        torch.testing.assert_close(
            vlm.logits(tokens, positions, cu, tiles), got, atol=1e-4, rtol=1e-4
        )
