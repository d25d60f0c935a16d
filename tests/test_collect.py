"""curation/collect.py: any source, each file once, everything dropped is counted."""
import json
import os

from curation_helpers import png, run_well, stage_files, write_tar
from rows import dataset_of
from toy_endpoint import read_shards


def test_folders_jsonl_and_tars_are_collected_and_data_reads_what_collect_writes(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, content in (
        ("a", png((1, 1, 1), (70, 80))),
        ("b", png((2, 2, 2), (20, 80))),
        ("c", png((3, 3, 3), (70, 900))),
        ("d", b"no picture"),
        ("e", png((1, 1, 1), (70, 80))),
    ):
        (tmp_path / "photos" / f"{name}.png").write_bytes(content)
        (tmp_path / "photos" / f"{name}.txt").write_text(f"picture {name}")
    dialogue = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    rows = [
        {"id": 7, "image": "photos/a.png", "conversations": dialogue},
        {"id": 8, "image": "photos/none.png", "caption": "x"},
        {"id": 9, "caption": "no picture"},
        {"id": 10, "image": ["photos/a.png", "photos/b.png"], "caption": "two"},
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n{broken\n"
    (tmp_path / "rows.jsonl").write_text(text)
    both = f"--in={tmp_path}/photos,{tmp_path}/rows.jsonl"
    report = run_well("collect", both, f"--out={tmp_path}/c", "--shard_size=3")
    assert report["in"] == 10 and report["out"] == 1 and report["shards"] == 4
    assert report["dropped"] == {
        "too_small": 1,
        "too_narrow": 1,
        "unreadable_picture": 1,
        "same_file": 2,
        "no_such_file": 1,
        "no_picture": 1,
        "several_pictures": 1,
        "bad_row": 1,
    }
    (row,) = read_shards(tmp_path / "c")
    assert row["alt_text"] == row["caption"] == "picture a"
    assert (row["width"], row["height"]) == (70, 80)

    dataset = dataset_of(f"{tmp_path}/c/*.tar", tile_size=84, tokens_per_tile=9)
    packs = dataset.packs
    assert packs.n == 1 and dataset[next(packs.sequence())]["size"]["tiles"] == 1


def test_an_input_that_is_touched_or_grows_is_collected_again_and_loses_nothing(tmp_path):
    def write(name, n):
        members = []
        for i in range(n):
            members.append((f"{i}.png", png((i, 0, 0), (70, 70))))
            members.append((f"{i}.txt", b"a red cat"))
        write_tar(tmp_path / "in" / name, members)

    write("001.tar", 3)
    write("002.tar", 6)
    argv = ["collect", f"--in={tmp_path}/in/{{001..002}}.tar", f"--out={tmp_path}/c"]
    assert run_well(*argv)["dropped"] == {"same_file": 3}
    before = stage_files(tmp_path / "c")
    os.utime(tmp_path / "in" / "001.tar", (1, 1))
    assert run_well(*argv)["out"] == 6 and stage_files(tmp_path / "c") == before
    write("001.tar", 4)
    assert run_well(*argv)["in"] == 10
    assert {row["source_id"] for row in read_shards(tmp_path / "c")} >= set("0123")


def test_a_copy_is_kept_if_its_original_leaves_the_input(tmp_path):
    for name, colors in (("001.tar", (0, 1, 2)), ("002.tar", (0, 5))):
        write_tar(tmp_path / "in" / name, [(f"{i}.png", png((i, 0, 0), (70, 70))) for i in colors])
    argv = ["collect", f"--in={tmp_path}/in/{{001..002}}.tar", f"--out={tmp_path}/c"]
    assert run_well(*argv)["dropped"] == {"same_file": 1}
    write_tar(tmp_path / "in" / "001.tar", [(f"{i}.png", png((i, 0, 0), (70, 70))) for i in (1, 2)])
    totals = run_well(*argv)
    assert totals["out"] == 4 and not totals["dropped"]
