"""curation/rows.py: no odd row ends a stage; each is read right or dropped with a reason."""
import hashlib
import json
import math

import pytest
from curation_helpers import dropped_rows, png, run, write_tar
from toy_endpoint import Endpoint, read_shards

NEST = []
for _ in range(300):
    NEST = [NEST]

# What a row has that went through collect, annotate and score.
GOOD = {
    "source": "web",
    "alt_text": "a red cat on a mat",
    "caption": "a red cat sits on a green mat",
    "scores": {"richness": 3, "alignment": 4, "clip": None},
    "by": {"annotate": "m"},
    "conversations": [
        {"from": "human", "value": "<image>\nDescribe it."},
        {"from": "gpt", "value": "a red cat sits on a green mat"},
    ],
    "width": 70,
    "height": 70,
    "dhash": "0123456789abcdef",
    "tone": "80" * 48,
}

# What a stage reads of a row.
COMPARED = {"sha256", "width", "height", "id", "caption"}
SELECTED = {"dhash", "tone", "sha256", "source", "id"}
STAGES = {
    "collect": {"id", "alt_text", "image"},
    "dedup": COMPARED,
    "dedup both": COMPARED,
    "select": SELECTED,
    "select vit": SELECTED,
    "annotate": {"id", "alt_text", "by"},
    "recaption": {"id", "alt_text", "by"},
    "score": {"id", "caption", "scores", "by"},
    "sft-quality": {"id", "conversations", "scores", "by"},
    "filter": {"id", "caption", "scores", "conversations"},
    "filter scores": {"id", "caption", "scores", "conversations"},
    "filter ngrams": {"id", "caption", "scores", "conversations"},
    "report": {"id", "caption", "scores"},
}

# {kind: (the change, the field it is of, the reason where that is read; None: it is read right)}
KINDS = {
    "id is a list": ({"id": ["a"]}, "id", "bad_id"),
    "id is an object": ({"id": {}}, "id", "bad_id"),
    "id is true": ({"id": True}, "id", "bad_id"),
    "id is infinite": ({"id": math.inf}, "id", "bad_id"),
    "id is null": ({"id": None}, "id", None),
    "id is a number": ({"id": 1.5}, "id", None),
    "id is half a character": ({"id": "\ud83d"}, "id", None),
    "caption is null": ({"caption": None}, "caption", None),
    "caption is missing": ({"caption": ...}, "caption", None),
    "caption is a number": ({"caption": 7}, "caption", "bad_caption"),
    "caption is a list": ({"caption": ["a cat"]}, "caption", "bad_caption"),
    "caption is half a character": ({"caption": "a cat \ud83d is here"}, "caption", None),
    "text is a list": ({"caption": ..., "text": ["a"]}, "caption", "bad_caption"),
    "text in place of a caption": ({"caption": None, "text": "a red cat"}, "caption", None),
    "alt_text is null": ({"alt_text": None}, "alt_text", None),
    "alt_text is a number": ({"alt_text": 5}, "alt_text", "bad_alt_text"),
    "alt_text is an object": ({"alt_text": {"a": 1}}, "alt_text", "bad_alt_text"),
    "alt_text is half a character": ({"alt_text": "a \ud83d"}, "alt_text", None),
    "scores is a word": ({"scores": "high"}, "scores", "bad_scores"),
    "scores is a list": ({"scores": [3, 4]}, "scores", "bad_scores"),
    "scores is null": ({"scores": None}, "scores", None),
    "a score is a word": ({"scores": {"richness": "4"}}, "scores", "bad_scores"),
    "a score is null": ({"scores": {"alignment": None}}, "scores", "bad_scores"),
    "a score is true": ({"scores": {"richness": True}}, "scores", "bad_scores"),
    "a score is no number": ({"scores": {"richness": math.nan}}, "scores", "bad_scores"),
    "a score is vast": ({"scores": {"relevance": 10**400}}, "scores", "bad_scores"),
    "another score is a list": ({"scores": {"x": [1], "y": True}}, "scores", None),
    "by is a list": ({"by": [1]}, "by", "bad_by"),
    "by is a word": ({"by": "me"}, "by", "bad_by"),
    "by is null": ({"by": None}, "by", None),
    "source is missing": ({"source": ...}, "source", "no_source"),
    "source is a number": ({"source": 5}, "source", "bad_source"),
    "source is half a character": ({"source": "\udcff"}, "source", None),
    "sha256 is missing": ({"sha256": ...}, "sha256", "no_sha256"),
    "sha256 is null": ({"sha256": None}, "sha256", "no_sha256"),
    "sha256 is a number": ({"sha256": 5}, "sha256", "bad_sha256"),
    "sha256 is no hash": ({"sha256": "ä" * 64}, "sha256", "bad_sha256"),
    "dhash is missing": ({"dhash": ...}, "dhash", "no_dhash"),
    "dhash is a number": ({"dhash": 5}, "dhash", "bad_dhash"),
    "dhash is negative": ({"dhash": "-1"}, "dhash", "bad_dhash"),
    "dhash is long": ({"dhash": "f" * 17}, "dhash", "bad_dhash"),
    "tone is short": ({"tone": "8080"}, "tone", "bad_tone"),
    "tone is no hexadecimal": ({"tone": "zz" * 48}, "tone", "bad_tone"),
    "width is missing": ({"width": ...}, "width", "no_width"),
    "width is a word": ({"width": "70"}, "width", "bad_width"),
    "width is negative": ({"width": -70}, "width", "bad_width"),
    "height is vast": ({"height": 10**30}, "height", "bad_height"),
    "height is a fraction": ({"height": 70.5}, "height", "bad_height"),
    "turns are a word": ({"conversations": "hi"}, "", "bad_row"),
    "turns are null": ({"conversations": None}, "conversations", None),
    "a turn is a number": ({"conversations": [5]}, "", "bad_row"),
    "a turn says nothing": ({"conversations": [{"from": "human"}]}, "conversations", "bad_row"),
    "a turn says two things": (
        {
            "conversations": [
                {"from": "human", "value": "a", "content": "b"},
                {"from": "gpt", "value": "c"},
            ],
            "alt_text": None,
        },
        "conversations",
        "bad_row",
    ),
    "tags without pictures": (
        {
            "conversations": [
                {"from": "human", "value": "<image> <image>"},
                {"from": "gpt", "value": "c"},
            ]
        },
        "conversations",
        "bad_row",
    ),
    "two captions": ({"text": "another"}, "caption", "bad_caption"),
    "turns are half a character": (
        {
            "conversations": [
                {"from": "human", "value": "\udfff?"},
                {"from": "gpt", "value": "\ud83d"},
            ]
        },
        "conversations",
        None,
    ),
    "messages are a number": ({"messages": 5}, "", "bad_row"),
    "image is a number": ({"image": 5}, "", "bad_row"),
    "a list nests deeply": ({"more": NEST}, "", "bad_row"),
}
# Reasons against a row that is not odd: what the small model says, and rows without scores.
OTHER_REASONS = ("cut_off", "not_scored", "low_richness", "low_alignment")
# Rows that are no object at all.
RAW = {
    "a list": b"[1, 2]",
    "a word": b'"hi"',
    "null": b"null",
    "nothing": b"",
    "a video": b'{"video": "a.mp4", "caption": "x"}',
    "half of it": b'{"caption": "a c',
    "no UTF-8": b'{"caption": "\xff"}',
    "brackets": b"[" * 100_000,
    "digits": b'{"width": ' + b"9" * 5000 + b"}",
}


def odd_row(k, change):
    """A good row with a change, and its picture."""
    picture = png((k % 256, k // 256, 99), (70, 70))
    row = GOOD | {"id": f"row{k}", "sha256": hashlib.sha256(picture).hexdigest()}
    # No near-duplicates.
    row["dhash"] = f"{k * 0x9E3779B97F4A7C15 % 2**64:016x}"
    row["caption"] = " ".join(f"w{k}-{i}" for i in range(6))
    row |= change
    return {key: value for key, value in row.items() if value is not ...}, picture


def write_odd_rows(path, changes):
    """A shard of GOOD rows with these changes, between two that are good."""
    members = []
    for k, change in enumerate([{}, *changes, {}]):
        row, picture = odd_row(k, {} if isinstance(change, bytes) else change)
        raw = change if isinstance(change, bytes) else json.dumps(row).encode()
        members += [(f"row{k}.json", raw), (f"row{k}.png", picture)]
    write_tar(path, members)
    return len(changes) + 2


def flags_of(stage, model, endpoint):
    """The command line of a stage, without input and output."""
    ask = [f"--endpoint={endpoint}", "--endpoint_model=m", "--threads=2"]
    name, *_ = stage.split()
    return [name] + {
        "collect": ["--min_side=8"],
        "dedup both": ["--by=both"],
        "select": ["--n=10000", "--clusters=4"],
        "select vit": ["--n=10000", "--clusters=4", f"--model={model}", "--dtype=float32"],
        "annotate": ask,
        "recaption": [f"--model={model}", "--max_new_tokens=2", "--dtype=float32"],
        "score": ask,
        "sft-quality": ask,
        "filter": ["--min_words=0"],
        "filter scores": ["--min_words=0", "--min_richness=1", "--min_alignment=1"],
        "filter ngrams": ["--min_words=0", "--max_ngram_share=1"],
    }.get(stage, [])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from test_eval import make_model_folder

    folder = tmp_path_factory.mktemp("model") / "model"
    make_model_folder(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint():
    """An endpoint that has an answer to everything."""
    found = Endpoint({}, 0, 0)

    def reply(sha256, prompt, temperature):
        lower = prompt.lower()
        if "richness" in lower:
            return "richness: 3\nalignment: 4", "stop"
        if "complexity" in lower:
            return "difficulty: 2\ncomplexity: 3\nrelevance: 5", "stop"
        return "A red cat.", "stop"

    found.reply = reply
    yield found.url
    found.server.shutdown()


@pytest.mark.parametrize("stage", STAGES)
def test_each_odd_row_is_read_right_or_dropped_with_a_reason(tmp_path, model, endpoint, stage):
    names = ["good", *KINDS, *RAW, "good too"]
    changes = [{**change, "name": name} for name, (change, _, _) in KINDS.items()]
    write_odd_rows(tmp_path / "in" / "0.tar", [*changes, *RAW.values()])
    flags = flags_of(stage, model, endpoint)
    code, text = run(*flags, f"--in={tmp_path}/in", f"--out={tmp_path}/out")
    assert code == 0, text

    want = {}
    for name, (_, field, reason) in KINDS.items():
        if reason and (not field or field in STAGES[stage]):
            want[name] = reason
    if stage == "collect":
        want["a turn says two things"] = "bad_row"  # there is no alt-text before it
    if stage == "report":
        lines = json.loads((tmp_path / "out" / "report.json").read_text())
        assert lines["Diversity"]["in"]["captions"] == len(names) - len(want) - len(RAW)
        assert "rows left out: " in lines["note"] and "'bad_scores': 7" in lines["note"]
        return
    dropped = dropped_rows(tmp_path / "out")
    n_dropped = len(dropped)
    dropped = [row for row in dropped if row["reason"] not in OTHER_REASONS]
    found = {row["name"]: row["reason"] for row in dropped if "name" in row}
    assert found == want
    broken = [row for row in dropped if "name" not in row]
    assert [row["reason"] for row in broken] == ["bad_row"] * len(RAW)
    kept = list(read_shards(tmp_path / "out"))
    assert len(kept) == len(names) - n_dropped


# Values that a stranger, or a tool of another kind, may put into any field.
ODD = [None, True, -1, 0, 1e300, math.nan, math.inf, 10**400, "", " ", "x", "\ud800", "\x1b[31m",
       "9" * 5000, [], [None], [[]], {}, {"": {}}, {"from": 5}, [{"from": "human"}], NEST]
FIELDS = [*GOOD, "id", "sha256", "text", "messages", "image", "images", "unreadable", "reason",
          "origin", "cluster", "duplicate_of", "caption_before", "prompt_sha256", "mode", "name"]


@pytest.mark.parametrize("stage", STAGES)
def test_no_odd_value_of_any_field_ends_a_stage(tmp_path, model, endpoint, stage):
    changes = []
    for field in FIELDS:
        changes += [{field: value} for value in ODD]
    if stage in ("recaption", "select vit"):
        changes = changes[::5]
    for name in GOOD["scores"]:
        changes += [{"scores": {name: value}} for value in ODD]
    n = write_odd_rows(tmp_path / "in" / "0.tar", changes)
    flags = flags_of(stage, model, endpoint)
    code, text = run(*flags, f"--in={tmp_path}/in", f"--out={tmp_path}/out")
    assert code == 0, text
    if stage == "report":
        return
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["in"] == n == report["out"] + len(dropped_rows(tmp_path / "out"))
    kept = list(read_shards(tmp_path / "out"))
    assert len(kept) == report["out"]
    # Most rows are still good.
    assert report["out"] + sum(report["dropped"].get(name, 0) for name in OTHER_REASONS) >= n / 2


@pytest.mark.parametrize("stage", ["dedup", "dedup both", "select", "select vit", "filter ngrams"])
def test_a_shard_of_nothing_but_odd_rows_is_none_that_ends_a_stage(
    tmp_path, model, endpoint, stage
):
    members = [("a.json", b"[]"), ("b.json", b"null"), ("c.txt", b"\xff")]
    write_tar(tmp_path / "in" / "0.tar", members)
    write_tar(tmp_path / "in" / "1.tar", [])
    flags = flags_of(stage, model, endpoint)
    code, text = run(*flags, f"--in={tmp_path}/in", f"--out={tmp_path}/out")
    assert code == 0 and "dropped {'bad_row': 3}" in text, text


def test_a_picture_that_the_vit_cannot_see_is_not_selected_and_says_why(tmp_path, model, endpoint):
    members = []
    for k, content in enumerate([None, b"no picture", b""]):
        row, picture = odd_row(k, {})
        members.append((f"row{k}.json", json.dumps(row).encode()))
        if content != b"":
            members.append((f"row{k}.png", content or picture))
    write_tar(tmp_path / "in" / "0.tar", members)
    flags = flags_of("select vit", model, endpoint)
    code, text = run(*flags, f"--in={tmp_path}/in", f"--out={tmp_path}/out")
    assert code == 0, text
    assert [row["id"] for row in read_shards(tmp_path / "out")] == ["row0"]
    dropped = [row["reason"] for row in dropped_rows(tmp_path / "out")]
    assert dropped == ["unreadable_picture"] * 2


@pytest.mark.parametrize("stage", ["collect", "sft-quality", "filter", "report"])
def test_odd_lines_of_a_jsonl_end_no_stage_either(tmp_path, model, endpoint, stage):
    lines = []
    for k, (field, value) in enumerate((field, value) for field in FIELDS for value in ODD):
        row, picture = odd_row(k, {})
        (tmp_path / f"{k}.png").write_bytes(picture)
        lines.append(json.dumps({"image": f"{k}.png", **row, field: value}).encode())
    lines += [raw for raw in RAW.values() if raw]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    flags = flags_of(stage, model, endpoint)
    code, text = run(*flags, f"--in={tmp_path}/rows.jsonl", f"--out={tmp_path}/out")
    assert code == 0, text
    if stage != "report":
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["in"] == len(lines) == report["out"] + len(dropped_rows(tmp_path / "out"))
        assert report["out"] >= len(lines) / 2
