"""runs/engines.py: what is compared with other engines, without an engine."""
import pytest
import torch

from runs import engines
from weights import load_folder

torch.set_num_threads(1)
TOY = "toy/tokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "model"
    engines.make_model(folder, TOY, tied=True)
    return folder


@pytest.fixture
def answers(model, monkeypatch):
    """Our answers to the two short prompts, which an engine would have to give."""
    short = {name: engines.PROMPTS[name] for name in ("text", "one picture")}
    monkeypatch.setattr(engines, "PROMPTS", short)
    return engines.our_answers(model)


def test_the_answers_are_long_and_no_two_are_alike(answers):
    assert all(len(ids) == engines.N_TOKENS for ids in answers.values())
    assert len({tuple(ids) for ids in answers.values()}) == len(answers)
    assert all(len(set(ids)) > 8 for ids in answers.values())


def test_equal_tokens_are_counted_up_to_the_first_other_one(model, answers, monkeypatch):
    said = dict(answers)
    monkeypatch.setattr(engines, "ask_engine", lambda name, served: said[name])
    assert engines.compare(model) == ["24 of 24", "24 of 24"]
    said["text"] = answers["text"][:7]
    said["one picture"] = [*answers["one picture"][:3], -1, *answers["one picture"][4:]]
    assert engines.compare(model) == ["7 of 24, then others", "3 of 24, then others"]


def test_the_adapter_changes_the_answers(model, answers, tmp_path):
    engines.make_adapter(model, tmp_path / "lora", tmp_path / "merged")
    assert engines.our_answers(tmp_path / "merged") != answers
    base, _ = load_folder(model)
    merged, _ = load_folder(tmp_path / "merged")
    same = [torch.equal(a, b) for a, b in
            zip(base.vision_model.parameters(), merged.vision_model.parameters(), strict=True)]
    assert all(same)


def test_an_engine_that_does_not_start_is_named_with_its_log(tmp_path):
    with pytest.raises(ValueError, match=f"false did not start; see {tmp_path}/log"):
        with engines.running(["false"], tmp_path / "log"):
            pass
