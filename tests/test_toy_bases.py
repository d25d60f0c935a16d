"""toy/bases.py, toy/words.py and toy/gate.py: the bases can be made again, and they read words."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import convert
from inputs.chat import IGNORE
from inputs.tokenizer import Tokenizer
from toy import __main__ as toy
from toy import bases, gate, words
from toy.boards import PLACE_WORDS
from toy.families import FAMILIES, family_of
from weights import inspect_folder

ROOT = Path(__file__).parent.parent
TOY = Tokenizer(ROOT / "toy" / "tokenizer")
TINY = {"steps": 2, "compile": False, "dtype": "float32", "print_every": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Samples with pictures and with words, and benchmarks."""
    folder = tmp_path_factory.mktemp("toy")
    cfg = toy.Config(out=str(folder), n="40", n_bench=24)
    toy.write_parts(cfg, ["pretrain", "text"])
    toy.write_benchmarks(cfg)
    return folder


def recipe(name, world, **changes):
    data = {"words": f"{world}/text.jsonl", "pictures": f"{world}/pretrain-*.tar"}
    cfg = bases.RECIPES[name]
    return replace(cfg, data=data[cfg.reads], **TINY | changes)


def first_batch(cfg):
    dataset = bases.open_packs(cfg, TOY, None, packs_per_step=1)
    return dataset[next(dataset.packs.sequence())]


# ---- words and labels ----------------------------------------------------------------------------

def test_words_stand_where_the_visual_tokens_stand(world):
    batch = first_batch(recipe("llm", world))
    visual = batch["tokens"] == TOY.image_id
    cells = batch["cells"]
    assert visual.any() and cells.shape == (visual.sum(), 2)
    assert {TOY.decode([i]) for i in cells[:, 1]} <= {f" {place}" for place in PLACE_WORDS}
    rows = [json.loads(line) for line in open(world / "text.jsonl")]
    by_id = {row["id"]: row for row in rows}
    used = [by_id[i] for i in batch["ids"] if i != "padding"]
    assert cells.tolist() == np.concatenate([words.cell_ids(r, TOY) for r in used]).tolist()


@pytest.mark.parametrize("name", ["llm", "vit"])
def test_labels_of_cells_stand_where_the_visual_tokens_stand(world, name):
    batches = {}
    for cell_labels in ("none", "also", "only"):
        cfg = recipe(name, world, cell_labels=cell_labels, loss_weight="token")
        batches[cell_labels] = first_batch(cfg)
    plain = batches["none"]
    visual = plain["tokens"] == TOY.image_id
    others = ~visual
    assert visual.any() and (plain["labels"][visual][:-1] == IGNORE).all()

    rows = rows_of(plain["ids"], world, name)
    cells = torch.from_numpy(np.concatenate([words.cell_ids(row, TOY) for row in rows]))
    also = batches["also"]["labels"]
    assert (also[visual] == cells[:, 0]).all()
    assert (also[others] == plain["labels"][others]).all()

    only = batches["only"]["labels"]
    assert (only[others] == IGNORE).all()
    is_name = only[visual] == cells[:, 0]
    is_place = only[visual] == cells[:, 1]
    assert (is_name | is_place).all()
    # By turns a name and a place.
    assert (is_name[1:] != is_name[:-1]).float().mean() > 0.8


def rows_of(ids, world, name):
    """The rows of a batch, in its order."""
    part = "text" if name == "llm" else "pretrain"
    rows = {}
    for i in range(40):
        row, _ = toy.toy_record(1, part, i, easy=part == "text" and i < 8)
        rows[row["id"]] = row
    return [rows[i] for i in ids if i != "padding"]


def test_answers_weigh_what_they_weigh_without_labels_of_cells(world):
    for name in ("llm", "vit"):
        plain = first_batch(recipe(name, world, cell_labels="none", loss_weight="sample"))
        also = first_batch(recipe(name, world, cell_labels="also", loss_weight="sample"))
        assert (plain["weights"] == also["weights"]).all()
        assert also["size"]["weight"] > plain["size"]["weight"]


def test_a_pack_of_words_is_filled_up_with_tokens_that_ask_nothing(world):
    dataset = bases.open_packs(recipe("llm", world), TOY, None, packs_per_step=1)
    packs, _ = dataset.packs.plan_window(0, 0)
    filled = 0
    for pack in packs:
        batch = dataset[pack]
        assert len(batch["tokens"]) == 800
        assert (batch["labels"][pack.tokens:] == IGNORE).all()
        assert (batch["tokens"][pack.tokens:] == TOY.eos_id).all()
        assert sum(batch["lengths"]) == 800
        filled += pack.tokens < 800
    assert filled > 0


def test_rows_without_cells_cannot_be_labelled_with_cells(tmp_path):
    row = {"id": "a", "caption": "a cat"}
    sample = {"ids": np.array([1, TOY.image_id]), "labels": np.array([5, IGNORE])}
    with pytest.raises(ValueError, match="a row without `cells`, which only data of the toy world"):
        words.label_cells(sample, row, TOY, "also")
    # Text alone has no cells and needs none.
    text = {"ids": np.array([1, 2]), "labels": np.array([5, IGNORE])}
    words.label_cells(text, row, TOY, "also")
    assert text["labels"].tolist() == [5, IGNORE]


# ---- the model and its noise ---------------------------------------------------------------------

def test_noise_is_of_the_given_size_and_each_row_has_a_level_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(20000, 64)
    noise = bases.add_noise(x, 0.5) - x
    size = noise.square().mean(-1).sqrt() / x.square().mean(-1).sqrt()
    # Uniform between 0 and 0.5.
    assert abs(size.mean() - 0.25) < 0.01
    assert 0.49 < size.quantile(0.99) < 0.6
    assert size.min() < 0.01
    assert abs(noise.mean()) < 0.01
    assert bases.add_noise(x, 0.0) is x


def test_noise_reaches_what_words_and_what_pictures_give(world):
    for name in ("llm", "vit"):
        cfg = recipe(name, world)
        model = bases.start_base(cfg, TOY)
        batch = first_batch(cfg)
        assert model(batch, 0.0) == model(batch, 0.0) != model(batch, 0.5)


def test_the_head_of_the_vit_asks_visual_tokens_alone(world):
    cfg = recipe("vit", world)
    model = bases.start_base(cfg, TOY)
    batch = first_batch(cfg)
    loss = model(batch, 0.0)
    n = batch["size"]["supervised"]
    assert n == (batch["tokens"] == TOY.image_id).sum() == 9 * len(batch["tiles"])
    # Untrained it knows nothing: about the log of the vocabulary.
    assert abs(loss.item() / n - math.log(1056)) < 1.5
    other = {**batch, "tokens": torch.where(batch["tokens"] == TOY.image_id, TOY.image_id, 7)}
    assert torch.equal(model(other, 0.0), loss)


# ---- making bases --------------------------------------------------------------------------------

def test_each_recipe_trains_what_it_says_and_writes_a_folder_that_can_be_read(world, tmp_path):
    llm = tmp_path / "llm"
    bases.train_base(recipe("llm", world, out_dir=str(llm)))
    about = inspect_folder(llm)
    assert about.vision is None and about.llm.n_layers == 6

    noisy = tmp_path / "llm_noise"
    bases.train_base(recipe("llm_noise", world, out_dir=str(noisy), init_from=str(llm)))
    before = load_file(llm / "model.safetensors")
    after = load_file(noisy / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    vit = tmp_path / "vit"
    bases.train_base(recipe("vit", world, out_dir=str(vit)))
    about = inspect_folder(vit)
    assert about.llm is None and about.vision.image_size == 84

    start = tmp_path / "start"
    convert.assemble(convert.AssembleConfig(vision=str(vit), llm=str(llm), out=str(start)))
    noisy = tmp_path / "vit_noise"
    bases.train_base(recipe("vit_noise", world, out_dir=str(noisy), init_from=str(start)))
    before = load_file(vit / "model.safetensors")
    after = load_file(noisy / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_recipe_gives_the_same_weights(world, tmp_path):
    for out in ("one", "two"):
        cfg = recipe("llm", world, out_dir=str(tmp_path / out), noise=0.5, steps=3)
        bases.train_base(cfg)
    one = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert one == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_a_base_learns(world, tmp_path, capsys):
    cfg = recipe("llm", world, out_dir=str(tmp_path / "llm"), steps=10, warmup_steps=2,
                 tokens_per_pack=400)
    bases.train_base(cfg)
    printed = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed]
    assert len(losses) == 10 and losses[-1] < 0.8 * losses[0], losses


# ---- the gate ------------------------------------------------------------------------------------

def test_the_language_base_answers_every_benchmark_from_words_alone(world, monkeypatch, capsys):
    argv = ["gate", f"--model={ROOT}/toy/llm", f"--data_dir={world}"]
    monkeypatch.setattr("sys.argv", argv)
    gate.main()
    lines = capsys.readouterr().out.splitlines()
    scores = {name: float(score) for name, score in map(str.split, lines)}
    assert len(scores) == 6
    assert scores["mean"] >= 90, scores  # 99 on 3,000 questions when it was made


def test_the_gate_tells_of_each_family_whether_the_base_knows_it(monkeypatch, capsys, tmp_path):
    argv = ["gate", f"--model={ROOT}/toy/llm", "--per_family=16", "--without=steps,exists"]
    kept = tmp_path / "gate.jsonl"
    monkeypatch.setattr("sys.argv", [*argv, f"--jsonl={kept}"])
    gate.main()
    told = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(told) == [family for family in FAMILIES if family != "caption"]
    assert "taught, learned" in told["reading"] and "taught, learned" in told["value"]
    # This base was made with yes-or-no questions, so they are no news to it.
    assert "LEFT OUT, YET KNOWN" in told["exists"]
    rows = {row["family"]: row for row in map(json.loads, open(kept))}
    assert list(rows) == list(told)
    assert rows["exists"]["left_out"] and not rows["reading"]["left_out"]
    assert f"{rows['value']['score']:5.1f}" in told["value"]


def test_the_base_of_the_paper_knows_what_it_was_taught_and_nothing_else(monkeypatch, tmp_path):
    shipped = ROOT / "toy" / "llm_basic"
    rows = {row["family"]: row for row in map(json.loads, open(shipped / "gate.jsonl"))}
    left_out = [family for family, row in rows.items() if row["left_out"]]
    assert left_out and all(
        row["verdict"] == ("left out, at chance" if row["left_out"] else "taught, learned")
        for row in rows.values())
    # As the command that made it says.
    script = (ROOT / "runs" / "paper_base.sh").read_text()
    without = re.search(r"WITHOUT:-([\w,]+)", script)[1]
    assert sorted(without.split(",")) == sorted(left_out)
    # And with a few other questions.
    kept = tmp_path / "gate.jsonl"
    argv = ["gate", f"--model={shipped}", "--per_family=24", f"--without={without}", "--seed=7"]
    monkeypatch.setattr("sys.argv", [*argv, f"--jsonl={kept}"])
    gate.main()
    for row in map(json.loads, open(kept)):
        assert row["left_out"] or row["score"] > 90, row



def test_what_can_be_guessed_is_no_knowledge_and_97_percent_is():
    assert gate.family_verdict(97.0, 50.0, 100, left_out=False) == "taught, learned"
    assert gate.family_verdict(96.9, 50.0, 100, left_out=False) == "TAUGHT, BELOW 97"
    assert gate.family_verdict(64.0, 50.0, 100, left_out=True) == "left out, at chance"
    assert gate.family_verdict(66.0, 50.0, 100, left_out=True) == "LEFT OUT, YET KNOWN"
    assert gate.family_verdict(1.0, 0.0, 100, left_out=True) == "left out, at chance"
    guesses = gate.best_guesses(1)
    assert guesses["Is there a _ _ in the image?"] in ("Yes", "No")
    assert guesses["choice of 2"] in ("A", "B")


def test_the_gate_asks_about_boards_that_no_training_sample_shows():
    for family, asked in gate.family_questions(2, 5).items():
        assert len(asked) == 5
        for boards, question, _ in asked:
            assert family_of(question) == family
            assert all(board.held_out() for board in boards)


def test_the_gate_refuses_what_sees_pictures(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gate", f"--model={ROOT}/toy/vit"])
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        gate.main()
    with pytest.raises(ValueError, match="has no language model"):
        bases.load_base(f"{ROOT}/toy/vit", TOY)
