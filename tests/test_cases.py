"""Inputs that public bug reports tell of, from ../shared/cases, give what is right there.

Their kinds are told by the tests of each concept; here the files stand as they were found.
"""

import csv
import re

import pytest
from rows import CHAT, SHARED, TOY, sources_of

from evals import score, table
from inputs.chat import IGNORE, render
from inputs.dialogue import conversation
from inputs.picture_names import image_names

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.exists(), reason="needs the files of ../shared/cases")


def read_case(name, tmp_path):
    """The source of a case's file, indexed in another folder, and why its rows are bad."""
    folder = tmp_path / "case"
    folder.mkdir()
    for file in (CASES / name).parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (source,) = sources_of(folder / (CASES / name).name)
    return source, {bad["row"]: bad["reason"] for bad in source.meta["bad"]}


# {file: for each row "" if it is good, else words of the reason}
READ = {
    "01-caption-without-picture/pairs.tar": [
        "",
        "a caption without a picture",
        "suffix .tif is not read",
        "a caption without a picture",
    ],
    "02-picture-key-not-read/rows.jsonl": ["", "", "", "images: ", "image: ", "Images: "],
    "03-row-keys-dropped/rows.jsonl": [
        "",
        "tools: ",
        "history: ",
        "videos: ",
        "audios: ",
        "objects: ",
    ],
    "04-turn-marked-no-loss/rows.jsonl": ["", ""],
    "08-tar-dots-in-names/dots.tar": ["2 .txt in one record"],
    "13-grounding-tokens/rows.jsonl": [""],
    "20-format-hints/parts_in_conversations.jsonl": [""],
    "20-format-hints/trl.jsonl": [""],
    "20-format-hints/url_string.jsonl": [""],
    "20-format-hints/video_null.jsonl": [""],
}


@pytest.mark.parametrize("name", READ)
def test_each_row_of_a_case_is_read_or_refused_by_name(tmp_path, name):
    source, bad = read_case(name, tmp_path)
    assert len(source.rows) == len(READ[name])
    for k, words in enumerate(READ[name]):
        assert words in bad.get(k, "") and bool(words) == (k in bad), (k, bad)


def test_a_picture_under_any_key_that_is_read_is_seen(tmp_path):
    source, _ = read_case("02-picture-key-not-read/rows.jsonl", tmp_path)
    assert source.rows["n_images"].tolist() == [1, 1, 1, 0, 0, 0]
    assert [image_names(source.row(k)) for k in range(3)] == [["0.jpg"]] * 3


def test_a_system_key_is_the_system_turn_of_its_row(tmp_path):
    source, _ = read_case("03-row-keys-dropped/rows.jsonl", tmp_path)
    assert conversation(source.row(0))[0] == "Answer in one word."


def test_a_wrong_answer_that_is_marked_so_is_not_learned(tmp_path):
    source, _ = read_case("04-turn-marked-no-loss/rows.jsonl", tmp_path)
    for k in range(2):
        _, labels = render(source.row(k), TOY, CHAT, [], 9)
        learned = TOY.decode([int(i) for i in labels if i != IGNORE], skip_special=False)
        assert learned == "Right.<|im_end|>"


def test_marks_of_places_are_one_token_each_in_questions_and_answers(tmp_path):
    source, _ = read_case("13-grounding-tokens/rows.jsonl", tmp_path)
    ids, labels = render(source.row(0), TOY, CHAT, [], 9)
    marks = [TOY.special[mark] for mark in ("<ref>", "</ref>", "<box>", "</box>")]
    assert [i for i in ids.tolist() if i in marks] == marks[:2] + marks
    answer = TOY.decode([int(i) for i in labels if i != IGNORE])
    assert answer == "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"


def test_one_row_in_a_json_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(ValueError, match=re.escape("write [...] around it")):
        read_case("20-format-hints/one_row.json", tmp_path)


@pytest.mark.parametrize(
    ("name", "benchmark", "protocol", "column"),
    [
        ("chartqa_argument_order_2024-12", "ChartQA_TEST", "sailvl-2024-12", "vlmevalkit_2024_12"),
        ("mcq_option_text_with_closing_space", "MMStar", "sailvl-2024-12", "vlmevalkit"),
    ],
)
def test_vlmevalkits_own_verdicts_are_given(name, benchmark, protocol, column):
    b = table.find_benchmark(benchmark, protocol)
    with open(CASES / "21-scores" / f"{name}.tsv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            points = score.read_answer(b, row["prediction"], row)[1]
            assert float(points) == float(row[column]), row
