"""curation/shards.py: what a shard may hold, what is refused, and that no row is lost."""
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from curation_helpers import make_small_collection, png, run, run_well, stage_files, write_tar
from rows import sources_of
from test_hostile import hostile_tar
from toy_endpoint import read_shards

from curation import shards


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small_collection(tmp_path_factory.mktemp("small"))


def test_r23_hostile_tars_are_refused_and_what_is_good_in_them_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    hostile_tar(tmp_path / "in" / "a.tar", png((1, 2, 3), (70, 70)))
    huge = tarfile.TarInfo("huge.txt")
    huge.size = 10**10
    (tmp_path / "in" / "b.tar").write_bytes(huge.tobuf() + bytes(2048))
    # 10 GB declared, and there, as a hole.
    with open(tmp_path / "in" / "c.tar", "wb") as file:
        file.write(huge.tobuf())
        file.seek(10**10, 1)
        file.write(bytes(1024))
    outside = [Path(name) for name in ("/tmp/out.txt", "/tmp/out.png", "/out.txt", "/out.png")]
    before = [path.exists() for path in outside]
    start = time.process_time()
    code, text = run("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    assert code == 2 and "b.tar" in text and "a.tar" not in text
    assert time.process_time() - start < 2
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["in"] == 10 and report["done"] == 2 and list(report["damaged"]) == ["b"]
    assert report["dropped"] == {
        "bad_row": 1,
        "link_or_device": 4,
        "too_big": 1,
        "unsafe_name": 3,
    }
    kept = list(read_shards(tmp_path / "c"))
    assert len(kept) == 1
    assert kept[0]["caption"] == "a red square" and kept[0]["source_id"] == "good"
    # Nothing was extracted.
    assert {path.name for path in tmp_path.iterdir()} == {"in", "c"}
    assert [path.exists() for path in outside] == before


def test_a_shard_that_ends_too_early_is_named_in_one_line_and_no_stage_takes_it_for_whole(
    small, tmp_path
):
    for path in (small[0] / "c").glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = sorted(tmp_path.glob("*.tar"))[-1]
    # Cut between two members: nothing but the missing end gives it away.
    with tarfile.open(last) as tar:
        end = tar.getmembers()[4].offset
    os.truncate(last, end)
    flags = {"filter": ["--max_ngram_share=0.5", "--min_words=0"]}
    for stage in ("collect", "dedup", "select", "filter"):
        out = tmp_path / stage
        code, text = run(stage, f"--in={tmp_path}", f"--out={out}", *flags.get(stage, []))
        assert code == 2 and text.splitlines()[-1].count(str(last)) == 1, text
        assert len(list(out.glob("*.tar"))) == (2 if stage == "collect" else 0)


def tar_header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def write_sparse_tar(path, members):
    """A tar of [(name, size, kind), ...] whose contents are holes."""
    with open(path, "wb") as file:
        for name, size, *kind in members:
            file.write(tar_header(name, size, *kind))
            file.seek(size, 1)
        file.write(bytes(1024))


def read_all(path):
    return list(shards.read_records(shards.InputShard("", path)))


def test_what_a_record_may_hold_is_bounded(tmp_path):
    write_sparse_tar(tmp_path / "pax.tar", [("x", 3 * 10**9, tarfile.XHDTYPE)])
    write_sparse_tar(tmp_path / "many.tar", [(f"a.{k}.jpg", 60 * 2**20) for k in range(9)])
    write_sparse_tar(tmp_path / "json.tar", [("a.json", 50 * 2**20)])
    with pytest.raises(shards.DamagedShard, match="3000000000 bytes"):
        read_all(tmp_path / "pax.tar")
    for name in ("many", "json"):
        assert read_all(tmp_path / f"{name}.tar") == [({"id": "a"}, {}, "too_big")]


def test_what_a_record_is_called_loses_no_row(tmp_path):
    members = []
    for name, caption in (("row-000001", b"a red cat"), ("b c", b"a red dog")):
        members += [(f"{name}.png", png((len(name), 0, 0), (70, 70))), (f"{name}.txt", caption)]
    write_tar(tmp_path / "in" / "0.tar", members)
    run_well("filter", f"--in={tmp_path}/in", f"--out={tmp_path}/f")
    assert [record.reason for record in read_all(tmp_path / "f" / "0.tar")] == [None, None]

    names = ("plain", "x.jfif", "/dev/zero")
    for name in names[:2]:
        (tmp_path / name).write_bytes(png((len(name), 0, 0), (70, 70)))
    rows = [{"id": name, "image": name, "caption": "a red cat"} for name in names]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_well("collect", f"--in=a/b={tmp_path}/r.jsonl", f"--out={tmp_path}/c")
    assert report["dropped"] == {"bad_row": 1}
    report = run_well("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d", "--by=text")
    assert report["in"] == 2
    (source,) = sources_of(f"{tmp_path}/c/*.tar")
    assert source.rows["n_images"].tolist() == [1, 1]


def test_a_missing_tokenizer_is_one_line_and_tars_need_none(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOY_TOKENIZER", str(tmp_path / "none"))
    shards.index_tokenizer.cache_clear()
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": 1, "caption": "a red cat"}) + "\n")
    code, text = run("filter", f"--in={tmp_path}/r.jsonl", f"--out={tmp_path}/f")
    assert code == 2 and text.count("\n") == 1 and "give --in= shards (.tar) alone" in text, text
    run_well("filter", f"--in={small[0]}/c", f"--out={tmp_path}/g", "--min_words=1")


@pytest.mark.parametrize("name", ["0.tar", "dropped/0.jsonl"])
@pytest.mark.parametrize("missing", [1, 512, None])
def test_an_output_that_was_cut_off_is_made_again_with_one_line(tmp_path, name, missing):
    for k in range(2):
        members = [("a.txt", b"a red cat"), ("b.txt", b"short"), ("c.txt", b"x " * 300)]
        write_tar(tmp_path / "in" / f"{k}.tar", members)
    argv = ["filter", f"--in={tmp_path}/in", f"--out={tmp_path}/f"]
    run_well(*argv)
    before = stage_files(tmp_path / "f")
    path = tmp_path / "f" / name
    size = path.stat().st_size
    left = 0 if missing is None else max(0, size - missing)
    os.truncate(path, left)
    code, text = run(*argv)
    assert code == 0 and text.count(f"{path} has {left} bytes of {size}; it is made again") == 1
    assert "nothing new to do" not in text and stage_files(tmp_path / "f") == before
    code, text = run(*argv)
    assert code == 0 and "nothing new to do" in text and "made again" not in text


def test_a_table_of_dedup_that_was_cut_off_is_made_again(small, tmp_path):
    argv = ["dedup", f"--in={small[0]}/c", f"--out={tmp_path}/d"]
    run_well(*argv)
    before = stage_files(tmp_path / "d")
    (tmp_path / "d" / "00000.tar").unlink()
    for size, path in enumerate(sorted((tmp_path / "d" / ".shards").glob("*.rows.npy"))):
        os.truncate(path, 100 * size)
    run_well(*argv)
    assert stage_files(tmp_path / "d") == before
