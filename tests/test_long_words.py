"""A text of any length or kind, wherever it stands, is split or refused in a short time."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from test_eval import command, flags, make_model_folder, picture

import sample
from data import Config, open_dataset
from evals.files import write_tsv
from inputs.chat import chat_ids
from inputs.preview import show_samples
from inputs.sources import open_sources
from inputs.tokenizer import MAX_ACCENTS, MAX_BLANKS, MAX_TEXT, Tokenizer

ROOT = Path(__file__).parent.parent
TOY = Tokenizer(ROOT / "toy" / "tokenizer")
N = 10**6
SECONDS = 5.0  # of one core, for a million characters of the slowest kind
ACCENTS = "\u0323\u0301"  # below and above: Unicode puts them in order

random.seed(5)
REFUSED = {
    "base64": "".join(random.choices("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789+/", k=N)) * 10,
    "blanks": "a" + " " * (N - 2) + "b",
    "blanks of all kinds": "a" + "\t \n\u3000" * (N // 4 - 1) + "b",
    "accents": "a" + ACCENTS * (N // 4),
    "accents of a text that is mostly plain": "plain " * 1000 + "e" + ACCENTS * 200,
    "one letter": "a" * (N + 1),
    "Chinese": "中" * (N + 1),
}
SPLIT = {
    "one letter": "a" * 900_000,
    "Chinese": "中" * 300_000,
    "digits": "7" * 900_000,
    "emojis": "😀" * 100_000,
    "line ends": "\n" * MAX_BLANKS + "x",
    "punctuation": "<" * 900_000,
    "markup": "<ref>" * 100_000,
    "words of 200 accents": ("a" + ACCENTS * 100) * 3000,
}


@pytest.fixture(autouse=True)
def no_stall():
    """Ends a test that stalls; the limits on its time are in the tests."""

    def stalls(number, frame):
        raise AssertionError("it stalls")

    signal.signal(signal.SIGALRM, stalls)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_text_that_would_take_long_is_refused_with_its_length_and_the_limit(kind):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"cannot be split into tokens: [\d,]+ .*at most [\d,]+"):
        TOY.encode(REFUSED[kind])
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", SPLIT)
def test_a_long_text_within_the_limits_is_split_in_a_short_time(kind):
    start = time.process_time()
    ids = TOY.encode(SPLIT[kind])
    assert time.process_time() - start < SECONDS
    assert len(ids) > 1000


def test_the_limits_themselves_are_allowed():
    assert TOY.decode(TOY.encode("b" * MAX_TEXT)) == "b" * MAX_TEXT
    assert TOY.encode(" " * MAX_BLANKS + "x")
    assert TOY.encode("a" * 999 + "\u0301" * MAX_ACCENTS)
    with pytest.raises(ValueError, match=f"at most {MAX_ACCENTS}"):
        TOY.encode("a" * 999 + "\u0301" * (MAX_ACCENTS + 1))


def rows_of(text):
    """The text in every place of a row."""
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    yield {"conversations": [talk[0] | {"value": text}, talk[1]]}
    yield {"conversations": [talk[0], talk[1] | {"value": text}]}
    yield {"conversations": talk, "system": text}
    yield {"messages": [{"role": "system", "content": text}, *talk_of_messages()]}
    yield {"conversations": [talk[0] | {"value": text[: N // 2]}, talk[1]] * 5}


def talk_of_messages():
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("kind", ["blanks", "accents", "one letter"])
def test_in_training_data_it_is_one_bad_row_that_check_and_show_pass_over(tmp_path, kind, capsys):
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "fine"}]}
    rows = list(rows_of(REFUSED[kind]))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, good]))
    start = time.process_time()
    (source,) = open_sources(str(path), TOY, "sailvl-chat")
    reasons = [bad["reason"] for bad in source.meta["bad"]]
    show_samples(open_dataset(Config(), [str(path)]), 8)
    assert time.process_time() - start < 2 * SECONDS
    assert "fine" in capsys.readouterr().out
    assert len(reasons) >= 4 and all("at most" in reason for reason in reasons)
    assert len(source.rows) - len(reasons) <= 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("long") / "model")


@pytest.mark.parametrize("text", [REFUSED["accents"], "word " * 50_000])
def test_sample_refuses_a_prompt_that_is_too_long_and_answers_the_others(
    model, tmp_path, text, capsys
):
    """The second text can be split, but has more tokens than the model has positions."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": text}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    cfg = sample.Config(
        model=str(model),
        image=(str(questions),),
        out=str(tmp_path / "a.jsonl"),
        device="cpu",
        max_new_tokens=2,
    )
    start = time.process_time()
    sample.answer_file(cfg)
    assert time.process_time() - start < SECONDS
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert "answer" in rows[1] and "answer" not in rows[0]
    assert "at most" in rows[0]["error"] or "32,768 positions" in rows[0]["error"]


@pytest.mark.parametrize("column", ["question", "A"])
def test_eval_names_benchmark_row_and_length_and_asks_the_other_benchmarks(
    model, tmp_path, column, capsys
):
    row = {"index": 7, "image": picture((9, 9, 9), (28, 28)), "question": "What?"}
    row |= {"A": "red", "B": "blue", "answer": "A", "category": "x"}
    write_tsv(tmp_path / "toy_general.tsv", [row | {column: "long " * 50_000}])
    write_tsv(tmp_path / "toy_ocr.tsv", [row])
    world = (model, tmp_path)
    start = time.process_time()
    names = "--benchmarks=toy_general,toy_ocr"
    code, _, errors = command(flags(world, tmp_path / "out", names), capsys)
    assert time.process_time() - start < 2 * SECONDS
    assert code == 2 and "Traceback" not in errors
    line = errors.strip().splitlines()[-1]
    assert "toy_general" in line and "row 7" in line and "32,768 positions" in line
    assert json.loads((tmp_path / "out" / "results.json").read_text())["toy_ocr"] is not None


def test_a_prompt_is_no_longer_than_the_positions_of_the_model():
    turns = [("Hi", None)]
    n = len(chat_ids(TOY, "sailvl-chat", turns, [], 1))
    assert len(chat_ids(TOY, "sailvl-chat", turns, [], 1, most=n)) == n
    with pytest.raises(ValueError, match=f"a prompt of {n} tokens, the model has {n - 1} pos"):
        chat_ids(TOY, "sailvl-chat", turns, [], 1, most=n - 1)
