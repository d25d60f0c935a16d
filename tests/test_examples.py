"""examples/: eight samples in each format go the whole way; check, show and preview."""

import base64
import json
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from rows import ROOT, dataset_of, packs_of, picture, sources_of, talk, write_rows
from test_train import argv, log, run

import data
import train
from inputs import chat, tars

FORMATS = [
    "internvl.jsonl",
    "meta.json",
    "llava.json",
    "messages.jsonl",
    "trl.jsonl",
    "sharegpt.json",
    "base64.jsonl",
    "texts.parquet",
    "question.parquet",
    "captions-{00000..00000}.tar",
    "folder",
]


@pytest.mark.parametrize("name", FORMATS)
def test_eight_samples_of_each_format_are_checked_shown_drawn_and_trained_on(
    name, tmp_path, monkeypatch, capsys
):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".*"))
    file = str(tmp_path / "examples" / name)
    assert data.check_files([file]) == 0 and "8 rows, 8 good, 0 bad" in capsys.readouterr().out
    size = ["--tile_size=84", "--max_tiles=4", "--tokens_per_pack=800"]
    for command in ("show", "preview"):
        monkeypatch.setattr(
            sys, "argv", ["data.py", command, file, *size, f"--out={tmp_path}/page.html"]
        )
        data.main()
    shown = capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert shown.count("--- ") == 8 and shown.count("[[") >= 8
    assert page.count("<mark>") >= 8 and page.count("<h3>") == 8
    assert "http" not in re.sub('src="data:[^"]*"', "", page)
    pictures = re.findall('base64,([^"]+)"', page)
    assert len(pictures) >= 7 and base64.b64decode(pictures[0])[:2] == b"\xff\xd8"
    budgets = ["--tokens_per_pack=800", "--max_tiles_per_pack=40"]
    flags = argv(tmp_path / "run", file, *budgets, stages=("advance",), steps=2)
    run(train, flags, monkeypatch)
    rows = log(tmp_path / "run")
    sums = rows[-1]["epoch"]
    assert len(rows) == 2 and sums["records"] == sums["used"] >= 8
    assert 0 < rows[0]["fill"] <= 1 <= rows[0]["straggler"]
    assert sums["quarantined"] == {"in the index": 0, "in training": 0} and sums["dropped"] == {}


def test_the_documentation_lists_each_format_with_its_example():
    table = re.findall(r"^\| `examples/(.*?)` \|", (ROOT / "docs/data.md").read_text(), re.M)
    assert sorted(table) == sorted(FORMATS)


def test_check_has_a_hint_where_most_rows_ask_much_about_one_picture(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture())
    turns = talk("Is it a circle?", "No.")["conversations"]
    many = talk(image="a.png") | {"conversations": turns * 3}
    two = talk(image="a.png") | {"conversations": turns * 2}
    hint = "2 of 3 rows with a picture have 3 or more questions about it"
    assert data.check_files([write_rows(tmp_path, [many, many, two], "a.jsonl")]) == 0
    assert hint in capsys.readouterr().out
    rows = [many, two, two | {"image": ["a.png", "a.png"]}, talk() | {"conversations": turns * 9}]
    assert data.check_files([write_rows(tmp_path, rows, "b.jsonl")]) == 0
    assert "questions about it" not in capsys.readouterr().out


def test_a_page_shows_markup_of_the_data_as_text(tmp_path):
    row = talk("<script>alert(1)</script>", "&", id="<b>")
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    done = subprocess.run(
        [sys.executable, "data.py", "preview", f"{tmp_path}/a.jsonl", f"--out={tmp_path}/a.html"],
        cwd=ROOT,
    )
    page = (tmp_path / "a.html").read_text()
    assert done.returncode == 0
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page


def test_check_names_line_field_and_what_to_do(tmp_path, capsys):
    good = talk("a", "b")
    empty = talk("a", " ")
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(map(json.dumps, [good, empty, good | {"image": "no.png"}])) + "\n"
    )
    assert data.check_files([f"{tmp_path}/a.jsonl"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "a.jsonl: line 3: conversations[1]: empty gpt turn; write its text or remove the turn"
    )
    assert "line 5: image no.png: No such file" in lines[1]
    assert lines[1].endswith("mend its path or remove the row")
    number = talk("a", 5)
    (tmp_path / "b.jsonl").write_text('{"caption": "a" "b"}\n' + json.dumps(number) + "\n")
    assert data.check_files([f"{tmp_path}/b.jsonl"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "line 1: not valid JSON (Expecting ',' delimiter at character 17); "
        "write one object {...} per row, in UTF-8"
    )
    assert lines[1].endswith(
        "line 2: conversations[1]: 5 instead of text in the gpt turn; "
        "write its text or remove the turn"
    )


def test_show_and_preview_take_tiles_and_template_from_a_model_folder_and_say_what_is_left_out(
    tmp_path, monkeypatch, capsys
):
    for file in (ROOT / "toy" / "tokenizer").iterdir():
        shutil.copy(file, tmp_path)
    about = dict(
        force_image_size=84,
        vision_config=dict(patch_size=14),
        downsample_ratio=0.5,
        template="internvl2_5",
    )
    (tmp_path / "config.json").write_text(json.dumps(about))
    shutil.copy(ROOT / "examples" / "folder" / "0.jpg", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"image": "0.jpg", "caption": "a"}\n{"caption": 5}\n')
    for command in ("show", "preview"):
        flags = [f"--tokenizer={tmp_path}", f"--out={tmp_path}/page.html"]
        monkeypatch.setattr(sys, "argv", ["data.py", command, f"{tmp_path}/a.jsonl", *flags])
        data.main()
    out = capsys.readouterr().out
    assert "<IMG_CONTEXT x 9>" in out and chat.TEMPLATES["internvl2_5"]["system"] in out
    assert "--- row 1, id a:0: " in out
    assert "--- row 2: unreadable; try: python data.py check" in out
    assert "1 packs, 1 samples; in no pack: {'unreadable': 1}" in out


def test_sources_are_mixed_by_weight_and_a_meta_file_is_checked(tmp_path):
    for name, n in (("a", 90), ("b", 10)):
        write_rows(tmp_path, [talk("a", "b")] * n, f"{name}.jsonl")

    def packs(**more):
        entries = {name: {"annotation": f"{name}.jsonl"} | more.get(name, {}) for name in "ab"}
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        return packs_of(f"{tmp_path}/meta.json")

    mixed = packs(a={"weight": 1}, b={"weight": 3})
    rows = {"a": [], "b": []}
    assert mixed.samples_per_epoch == [25, 75]
    for epoch in range(4):
        for s, i, _ in mixed.plan_samples(np.arange(mixed.n), epoch)[0]:
            rows["ab"[s]].append(i)
    # It goes round and on.
    assert sorted(rows["a"]) == sorted([*range(90), *range(10)]) and rows["b"].count(3) == 30
    assert packs(b={"repeat_time": 3}).samples_per_epoch == [90, 30]
    assert packs(a={"repeat_time": 0.5}).samples_per_epoch == [45, 10]
    for more, words in (
        (dict(a={"weight": 1}), "1 of 2 sources have a `weight`"),
        (dict(a={"wieght": 1}), "a: wieght is"),
        (dict(a={"repeat_time": "2"}), "repeat_time is"),
        (dict(a={"repeat_time": -1}), "a: repeat_time is"),
        (dict(b={"weight": float("nan")}), "b: weight is"),
        (dict(a={"weight": 1}, b={"weight": 0}), "give one above 0"),
        (dict(a={"sha256": "0" * 64}), "has sha256"),
    ):
        with pytest.raises(ValueError, match=words):
            packs(**more)
    twice = sources_of(f"{tmp_path}/a.jsonl,again={tmp_path}/a.jsonl")
    assert [len(source.rows) for source in twice] == [90, 90]


def test_check_names_the_line_and_show_prints_what_the_model_sees(tmp_path, capsys):
    (tmp_path / "p.png").write_bytes(picture())
    rows = [talk("<image>\nWhat?", "Red.", image="p.png", id="a"), {"id": "b", "conversations": []}]
    spec = write_rows(tmp_path, rows)
    assert data.check_files([spec]) == 1
    assert "line 2" in capsys.readouterr().out
    data.show_samples(dataset_of(spec), 1)
    seen = "<img><IMG_CONTEXT x 9></img>\nWhat?<|im_end|><|im_start|>assistant\n[[Red.<|im_end|>]]"
    assert seen in capsys.readouterr().out


def test_check_looks_at_the_pictures_of_a_tar_that_the_index_found(tmp_path, capsys):

    def row(*names):
        return json.dumps({"image": [*names], "caption": "Two."}).encode()

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("1.png", picture()),
            ("1.json", row("1.png")),
            ("2.a.png", picture()),
            ("2.b.png", picture()[:60]),
            ("2.json", json.dumps(talk("<image> or <image>?")).encode()),
            ("3.png", picture()),
            ("3.json", row("gone.png")),
        ):
            tars.add_member(tar, name, content)
    assert data.check_files([f"{tmp_path}/a.tar"]) == 2
    out = capsys.readouterr().out
    assert "row 2: image 2: " in out and "damaged picture" in out and "3 rows, 1 good, 2 bad" in out
    assert "row 3: image gone.png is not in this record" in out
