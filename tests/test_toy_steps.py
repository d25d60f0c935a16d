"""toy/steps.py, families.py and the variants of a world: what is asked, left out, and wrong."""
import random
import re

import pytest

from evals.scorers import last_exact
from toy import __main__ as toy
from toy.boards import draw_board
from toy.families import FAMILIES, family_of, form_of
from toy.records import Variant, steps_question, toy_question, toy_record
from toy.steps import STEP_BOARDS, STEP_FAMILIES, steps_ask

PARTS = ("pretrain", "knowledge", "instruction", "preference", "text", "drill")


def turns_of(row):
    said = [turn["value"] for turn in row["conversations"]]
    questions = [text.replace("<image>\n", "") for text in said[::2]]
    return list(zip(questions, said[1::2], strict=True))


def answer_by_hand(question, board):
    """The answer to a question of two steps, from the facts of the board alone."""
    shapes = [thing.shape for thing in board.things] if board.kind == "scene" else []
    values = dict(board.things) if board.kind != "scene" else {}
    named = re.findall(r"\w+", question)
    told = [name for name in named if name in (values or ("circle square triangle star cross"))]
    if question.startswith("Are there more"):
        return "Yes" if shapes.count(told[0]) > shapes.count(told[1]) else "No"
    if question.startswith("How many more"):
        return str(shapes.count(told[0]) - shapes.count(told[1]))
    if question.startswith("How many"):
        return str(shapes.count(told[0]) + shapes.count(told[1]))
    if question.startswith("What is the sum"):
        return str(values[told[0]] + values[told[1]])
    if question.startswith("Which is higher"):
        return max(told, key=values.get)
    ranked = sorted(values, key=values.get)
    if "second" in question:
        return ranked[-2]
    if question.startswith("How much"):
        return str(values[ranked[-1]] - values[ranked[0]])
    return ", ".join(ranked)


def test_questions_of_two_steps_have_the_answer_that_follows_from_the_board():
    asked = set()
    for i in range(600):
        row, board, _ = steps_question(3, i)
        question = row["question"].removesuffix(" Explain.")
        assert row["answer"] == answer_by_hand(question, board), row
        assert family_of(row["question"]) == "steps"
        assert board.held_out() and board.kind in STEP_BOARDS
        asked.add(row["category"])
    assert asked == set(STEP_FAMILIES)


def test_the_way_leads_to_the_answer_and_half_of_the_benchmark_asks_for_it():
    rows = [steps_question(3, i)[0] for i in range(100)]
    explained = [row for row in rows if row["question"].endswith(" Explain.")]
    assert len(explained) == 50
    assert {row["task"] for row in explained} == {"explained"}
    rng = random.Random(1)
    for _ in range(300):
        board = draw_board(rng, rng.choice(STEP_BOARDS), False)
        question, way, answer, _ = steps_ask(board, rng)
        assert ":" not in way + answer
        row = {"answer": answer}
        assert last_exact(f"{way}: {answer}", row)[1] and last_exact(answer, row)[1]
        assert not last_exact(way, row)[1], (way, answer)
        # The facts of the way are those of the board.
        for fact in way.split(", "):
            if board.kind == "scene":
                n, shape = fact.split()
                assert int(n) == sum(thing.shape == shape for thing in board.things)
            else:
                color, value = fact.split()
                assert (color, int(value)) in board.things


def test_the_answers_of_two_steps_cannot_be_guessed_from_the_question():
    by_form = {}
    for i in range(2000):
        row = steps_question(1, i)[0]
        by_form.setdefault(form_of(row["question"]), []).append(row["answer"])
    guessed = sum(max(map(answers.count, set(answers))) for answers in by_form.values())
    assert guessed / 2000 < 0.45


def test_preference_samples_ask_two_steps_on_demand_in_both_forms():
    plain = []
    hard = []
    for i in range(100):
        plain += turns_of(toy_record(1, "preference", i)[0])
        hard += turns_of(toy_record(1, "preference", i, variant=Variant(two_steps=True))[0])
    n_plain = sum(family_of(question) == "steps" for question, _ in plain)
    steps = [question for question, _ in hard if family_of(question) == "steps"]
    assert n_plain / len(plain) < 0.3 < 0.4 < len(steps) / len(hard)
    explained = sum(question.endswith("Explain.") for question in steps)
    assert 0.35 < explained / len(steps) < 0.65


# ---- families ------------------------------------------------------------------------------------

def test_every_question_of_the_world_has_a_family_and_every_family_has_questions():
    found = set()
    for part in PARTS:
        for i in range(250):
            found |= {family_of(question) for question, _ in turns_of(toy_record(2, part, i)[0])}
    assert found == set(FAMILIES)
    benchmarks = {
        "toy_ocr": {"reading"}, "toy_count": {"count"}, "toy_halluc": {"exists"},
        "toy_chart": {"value", "extreme", "steps"}}
    for name, families in benchmarks.items():
        rows = [toy_question(name, 2, i)[0] for i in range(150)]
        assert {family_of(row["question"]) for row in rows} == families
    with pytest.raises(ValueError, match="a question of no family: 'Why\\?'"):
        family_of("Why?")


def test_what_a_world_leaves_out_is_asked_nowhere():
    out = ("steps", "choice", "comparison", "count", "exists")
    kept = set()
    for part in ("text", "drill", "instruction"):
        for i in range(250):
            row, boards = toy_record(4, part, i, variant=Variant(without=out))
            kept |= {family_of(question) for question, _ in turns_of(row)}
            assert len(boards) == 1
    assert kept == set(FAMILIES) - set(out)


# ---- wrong answers -------------------------------------------------------------------------------

def test_so_many_percent_of_the_answers_belong_to_another_picture():
    for part in ("knowledge", "instruction", "preference"):
        wrong = 0
        n = 0
        for i in range(250):
            row, _ = toy_record(1, part, i)
            noisy, _ = toy_record(1, part, i, variant=Variant(wrong=0.25))
            assert row["cells"] == noisy["cells"]
            for (question, answer), (asked, told) in zip(turns_of(row), turns_of(noisy),
                                                         strict=True):
                assert question == asked
                n += 1
                wrong += answer != told
                # A wrong letter is one that is offered; a wrong count is a number; and so on.
                if "\nA. " in question:
                    assert f"\n{told}. " in question
                elif answer in ("Yes", "No"):
                    assert told in ("Yes", "No")
                elif answer.isdecimal():
                    assert told.isdecimal()
        assert abs(wrong / n - 0.25) < 3 * (0.25 * 0.75 / n) ** 0.5, (part, wrong, n)
    for i in range(20):
        assert toy_record(1, "knowledge", i, variant=Variant(wrong=1.0))[0] != toy_record(
            1, "knowledge", i)[0]


# ---- the command ---------------------------------------------------------------------------------

def test_sizes_and_wrong_answers_are_given_by_part(tmp_path):
    cfg = toy.Config(out=str(tmp_path), n="30,20,10", wrong="100,0,0", parts="x")
    parts = ["knowledge", "instruction", "preference"]
    assert toy.training_sizes(cfg, parts) == {"knowledge": 30, "instruction": 20, "preference": 10}
    variants = toy.training_variants(cfg, parts)
    assert [variants[part].wrong for part in parts] == [1.0, 0.0, 0.0]
    assert toy.training_sizes(toy.Config(n="7"), parts) == dict.fromkeys(parts, 7)


@pytest.mark.parametrize("flag, words", [
    ("--n=1,2", "--n=1,2: give one number, or 4: one for each of pretrain, knowledge"),
    ("--n=-3", "'-3' is not a whole number from 0 to 10,000,000"),
    ("--wrong=101", "'101' is not a whole number from 0 to 100"),
    ("--wrong=0.25", "'0.25' is not a whole number"),
    ("--without=step", "unknown family 'step': choose from choice, comparison, steps"),
])
def test_a_mistake_is_told_before_anything_is_written(tmp_path, monkeypatch, flag, words):
    monkeypatch.setattr("sys.argv", ["toy", f"--out={tmp_path}/x", flag])
    with pytest.raises(ValueError, match=re.escape(words)):
        toy.main()
    assert not (tmp_path / "x").exists()


def test_the_benchmark_of_two_steps_is_no_part_of_the_others(tmp_path, monkeypatch):
    flags = ["--n=0", "--n_bench=3", "--n_steps=5"]
    monkeypatch.setattr("sys.argv", ["toy", f"--out={tmp_path}", *flags])
    toy.main()
    assert not (tmp_path / "toy_steps.tsv").exists()
    monkeypatch.setattr("sys.argv", ["toy", f"--out={tmp_path}", *flags, "--parts=steps"])
    toy.main()
    assert len((tmp_path / "toy_steps.tsv").read_text().splitlines()) == 6
    assert (tmp_path / "toy_ocr.tsv").exists()
