"""A caption that ends early is dropped and counted, whatever the model says of its end."""
import json

import pytest
from curation_helpers import dropped_rows, png, run, run_well, write_tar
from toy_endpoint import Endpoint, read_shards

from curation.text import ends_with_a_stop
from evals import endpoint as endpoint_client

WHOLE = [
    "A cat.", "A cat!", "Is it a cat?", "A cat…", "A cat...", "A cat. ", "A cat.\n",
    'The sign says "STOP."', "The sign says “STOP.”", "It says «Stop.»", "„Halt.“",
    "A cat (and a dog).", "A cat (and a dog.)", "A cat.*", "**A cat.**", "`A cat.`",
    "一只猫。", "一只猫！", "牌子上写着“停。”", "写着「停。」", "猫がいます．", "ﾈｺ｡",
    "고양이입니다.",
    "बिल्ली है।", "هل هذه قطة؟", "یہ بلی ہے۔", "ድመት ነው።",
    "A cat. 😀", "A cat. 👍🏽", "A cat.\u200d",
]
STUMPS = ["", " ", "A cat,", "The image shows a cat,", "A cat", "A cat and", "A cat;", "A cat:",
          "一只猫，", "一只猫", "一只猫、", "قطة،", '"A cat"', "A cat (", "A cat 😀", "A cat -",
          "It costs 3.50", "A. B", "The image shows:\n\n1. A cat"]


@pytest.mark.parametrize("text", WHOLE)
def test_a_stop_ends_a_caption_in_any_script_also_before_quotes_and_brackets(text):
    assert ends_with_a_stop(text)


@pytest.mark.parametrize("text", STUMPS)
def test_what_has_no_stop_at_its_end_is_a_stump(text):
    assert not ends_with_a_stop(text)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint_client, "WAIT_S", 0.001)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    found = Endpoint({}, 0, 0)
    yield found
    found.server.shutdown()


@pytest.fixture
def flags(tmp_path, server):
    """Twelve pictures, of which every third gets a stump."""
    members = []
    for i in range(12):
        members.append((f"{i}.png", png((i, 0, 0))))
        members.append((f"{i}.json", json.dumps({"id": str(i), "alt_text": "x"}).encode()))
    write_tar(tmp_path / "in" / "0.tar", members)
    numbers = {}

    def reply(sha256, prompt, temperature):
        number = numbers.setdefault(sha256, len(numbers))
        return ("In this picture," if number % 3 == 0 else "A red square."), "stop"

    server.reply = reply
    return [f"--in={tmp_path}/in", "--threads=1", f"--endpoint={server.url}", "--endpoint_model=m"]


@pytest.mark.parametrize("stage", ["annotate", "recaption"])
def test_stumps_are_counted_and_dropped_and_their_ends_are_told(tmp_path, flags, stage):
    report = run_well(stage, *flags, f"--out={tmp_path}/out")
    assert report["out"] == 8 and report["dropped"] == {"stump": 4}
    assert {row["caption"] for row in read_shards(tmp_path / "out")} == {"A red square."}
    lost = dropped_rows(tmp_path / "out")
    assert {row["why"] for row in lost} == {"it ends so: In this picture,"}
    assert all("caption" not in row for row in lost)


def test_they_are_kept_if_asked_for(tmp_path, flags):
    report = run_well("annotate", *flags, f"--out={tmp_path}/out", "--ending=any")
    assert report["out"] == 12 and report["dropped"] == {}


def test_an_engine_that_makes_nothing_but_stumps_is_found_out(tmp_path, flags, server):
    """Such as one that knows no end of an answer and takes a comma for it."""
    server.reply = lambda sha256, prompt, temperature: ("The image shows a red square,", "stop")
    code, text = run("annotate", *flags, f"--out={tmp_path}/out")
    assert code == 2
    assert "stump" in text and "it ends so: The image shows a red square," in text
    assert dropped_rows(tmp_path / "out") == []


def test_replies_of_a_judge_need_no_stop(tmp_path, flags, server):
    server.reply = lambda sha256, prompt, temperature: ("richness: 3\nalignment: 4", "stop")
    rows = tmp_path / "in"
    members = [("0.png", png((1, 2, 3))),
               ("0.json", json.dumps({"id": "0", "caption": "A red square."}).encode())]
    write_tar(rows / "0.tar", members)
    report = run_well("score", *flags, f"--out={tmp_path}/out")
    assert report["out"] == 1
