"""curation/filter.py: one reason against a caption, and stock phrases thinned out."""
import json
import random

from curation_helpers import png, run_well, write_tar
from rows import sources_of
from toy_endpoint import read_shards

import curate
from curation.filter import caption_problem


def problem(text, scores=(), **settings):
    return caption_problem(curate.Config(**settings), {"caption": text, "scores": dict(scores)})


def test_a_caption_is_filtered_for_the_first_reason_and_passes_without_one():
    long = "a red ball lies on a green table next to two cups"
    assert problem(long) is None
    assert problem(long, {"richness": 3}, min_richness=3.0) is None
    assert problem(long, {"richness": 2}, min_richness=3.0) == "low_richness"
    assert problem(long, min_alignment=1.0) == "not_scored"
    assert problem("a ball") == "too_short"
    assert problem(long, max_words=5) == "too_long"
    assert problem("the cat sat and the cat sat and the cat sat and") == "repetitive"
    chinese = "一个红色的球在绿色的桌子上"
    assert problem(chinese) == "other_script"
    assert problem(chinese, script="cjk") is None


def test_common_openings_are_thinned_out_to_their_share(tmp_path):
    rng = random.Random(4)
    members = []
    for i in range(300):
        start = "the image shows a" if i < 225 else f"w{i} x{i} y{i} z{i}"
        words = [f"v{rng.randrange(10**6)}" for _ in range(5)]
        text = " ".join([start, *words])
        members.append((f"{i}.png", png((i % 256, i // 256, 9))))
        members.append((f"{i}.txt", text.encode()))
    write_tar(tmp_path / "in" / "0.tar", members)
    run_well("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c", "--min_side=8")
    flags = [f"--in={tmp_path}/c", f"--out={tmp_path}/f", "--max_ngram_share=0.25"]
    report = run_well("filter", *flags)
    assert list(report["dropped"]) == ["homogeneous"]
    rows = list(read_shards(tmp_path / "f"))
    common = sum(row["caption"].startswith("the image shows a") for row in rows)
    assert len(rows) - common == 75 and 55 <= common <= 95


def test_what_passes_the_filter_is_what_training_reads(tmp_path):
    """Whatever the thresholds are: none of these rows can be trained on but the first two."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A board."}]
    rows = [
        {"caption": "A red board"},
        {"conversations": turns},
        {"caption": ""},
        {"caption": None},
        {"caption": "An <image> of a board"},
        {"caption": "A board", "text": "A boat"},
        {"conversations": turns[:1]},
        {"conversations": [turns[0] | {"value": "<image> <image>"}, turns[1]]},
        {"caption": "A board", "question": "What?"},
        {"messages": []},
    ]
    members = []
    for k, row in enumerate(rows):
        members.append((f"{k}.png", png((k, 0, 0))))
        members.append((f"{k}.json", json.dumps({"id": f"r{k}", **row}).encode()))
    members.append(("10.json", b'{"id": "r10", "caption": "A board without a picture"}'))
    path = write_tar(tmp_path / "in" / "0.tar", members)
    for ngrams in (0, 0.5):
        flags = ["--min_words=0", "--min_script=0", f"--max_ngram_share={ngrams}"]
        out = tmp_path / f"out{ngrams}"
        report = run_well("filter", f"--in={tmp_path}/in", f"--out={out}", *flags)
        assert [row["id"] for row in read_shards(out)] == ["r0", "r1"]
        assert report["dropped"] == {"no_caption": 2, "bad_caption": 1, "bad_row": 6}
    (source,) = sources_of(path)
    assert len(source.meta["bad"]) == 9
    (passed,) = sources_of(out / "0.tar")
    assert passed.meta["bad"] == []
