"""convert.py export: what other programs look for in the folders that it writes."""
# ruff: noqa: F811, a fixture of another file has the name of an argument
import json

import pytest
import torch
from folders import edit, same_state
from test_convert import assembled, run, tokenizer  # noqa: F401, a fixture

import weights

LAYOUTS = ["internvl", "transformers"]


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_json_names_the_end_of_an_answer_and_a_version(tmp_path, tokenizer, layout):
    """llama.cpp takes the token 11, a comma, for the end where it finds none there."""
    folder = assembled(tmp_path, tokenizer)
    done = run("export", folder, tmp_path / "out", f"--layout={layout}")
    assert done.returncode == 0, done.stderr
    for written in (folder, tmp_path / "out"):
        config = read(written / "config.json")
        assert config["eos_token_id"] == 258 and config["pad_token_id"] == 256
        assert config["transformers_version"]
        assert read(written / "generation_config.json") == {"eos_token_id": 258,
                                                            "pad_token_id": 256}


def test_a_folder_without_added_tokens_json_gets_a_generation_config(tmp_path, tokenizer):
    """Such as a stage's, of a run that took a released tokenizer as it is."""
    vlm, config = weights.load_folder(assembled(tmp_path, tokenizer))
    assert not (tokenizer / "added_tokens.json").exists()
    weights.save_folder(vlm.state_dict(), config, tmp_path / "out", tokenizer)
    ends = {"eos_token_id": 258, "pad_token_id": 256}
    assert read(tmp_path / "out" / "generation_config.json") == ends
    assert read(tmp_path / "out" / "config.json").items() >= ends.items()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_head_is_written_if_asked_for(tmp_path, tokenizer, layout):
    folder = assembled(tmp_path, tokenizer, tie_embeddings=True)
    flags = [f"--layout={layout}", "--write_head=True"]
    done = run("export", folder, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    model, config = weights.load_folder(tmp_path / "out")
    text = config["llm_config"]
    assert not config["tie_word_embeddings"] and not text["tie_word_embeddings"]
    assert not model.llm.tie_embeddings
    embeddings = model.language_model.model.embed_tokens.weight
    assert torch.equal(model.language_model.lm_head.weight, embeddings)
    tied, _ = weights.load_folder(folder)
    assert same_state(tied, model)


def test_the_last_line_of_an_export_says_who_reads_it(tmp_path, tokenizer):
    folder = assembled(tmp_path, tokenizer)
    for layout, words in (("internvl", "AutoModel of transformers needs --layout=transformers"),
                          ("transformers", "for transformers and vLLM")):
        done = run("export", folder, tmp_path / layout, f"--layout={layout}")
        assert words in done.stdout.splitlines()[-1]


# ---- folders of InternVL3 ------------------------------------------------------------------------

DYNAMIC = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_dynamic_rope_is_read_as_the_default_that_it_equals(tmp_path, tokenizer, name):
    folder = assembled(tmp_path, tokenizer)
    plain, _ = weights.load_folder(folder)
    edit(folder, **{f"llm_config__{name}": DYNAMIC})
    model, _ = weights.load_folder(folder)
    assert model.llm == plain.llm
    # What was read is written without it.
    assert run("export", folder, tmp_path / "out").returncode == 0
    assert not read(tmp_path / "out" / "config.json")["llm_config"].get("rope_scaling")


@pytest.mark.parametrize("rope", [
    {"type": "yarn"}, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default",
                                                              "partial_rotary_factor": 0.5},
    {"type": "dynamic", "rope_type": "yarn"}, ["dynamic"], "dynamic", {"type": ["dynamic"]},
])
def test_another_rope_is_refused_in_words(tmp_path, tokenizer, rope):
    folder = assembled(tmp_path, tokenizer)
    for name in ("rope_scaling", "rope_parameters"):
        edit(folder, llm_config__rope_scaling=None, llm_config__rope_parameters=None)
        edit(folder, **{f"llm_config__{name}": rope})
        with pytest.raises(ValueError, match="config.json"):
            weights.inspect_folder(folder)
