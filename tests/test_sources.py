"""inputs/sources.py and records.py: every format is read, and what goes wrong is named."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from rows import (
    dataset_of,
    picture,
    sources_of,
    talk,
    write_rows,
)

import data
from inputs import dialogue, index, sources, tars


def test_every_source_format_gives_the_same_documents(tmp_path):
    picture_file = picture(168, 84)
    llava = [talk("<image>\nWhat?", "Red.", id="a", image="p.png")]
    parts = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What?"}]
    messages = [
        {
            "id": "a",
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": "Red."},
            ],
        }
    ]
    for name in ("jsonl", "json", "messages", "folder", "tar"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(picture_file)
    write_rows(tmp_path / "jsonl", llava)
    (tmp_path / "json" / "rows.json").write_text(json.dumps(llava))
    write_rows(tmp_path / "messages", messages)
    (tmp_path / "folder" / "p.json").write_text(json.dumps(talk("<image>\nWhat?", "Red.")))
    with tarfile.open(tmp_path / "tar" / "s.tar", "w") as tar:
        for name, content in (("p.json", json.dumps(llava[0]).encode()), ("p.png", picture_file)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    meta = {"m": {"root": "jsonl", "annotation": "jsonl/rows.jsonl"}}
    # with a byte-order mark, as editors write it
    (tmp_path / "meta.json").write_text("\ufeff" + json.dumps(meta))
    batches = []
    for spec in (
        "jsonl/rows.jsonl",
        "json/rows.json",
        "messages/rows.jsonl",
        "folder",
        "tar/s.tar",
        "meta.json",
    ):
        dataset = dataset_of(tmp_path / spec)
        batches.append(dataset[next(dataset.packs.sequence())])
    first = batches[0]
    for batch in batches[1:]:
        assert torch.equal(batch["tokens"], first["tokens"])
        assert torch.equal(batch["labels"], first["labels"])
        assert torch.equal(batch["tiles"], first["tiles"])
        assert batch["tiles"].shape == (3, 3, 84, 84)


def test_a_folder_of_captioned_pictures_and_a_brace_pattern_of_tars_are_read(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jpg").write_bytes(picture())
    (tmp_path / "f" / "a.txt").write_text("a red square")
    for k in range(3):
        with tarfile.open(tmp_path / f"s-{k:03d}.tar", "w") as tar:
            for name, content in ((f"{k}.txt", b"red"), (f"{k}.jpg", picture())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    opened = sources_of(f"{tmp_path}/f,{tmp_path}/s-{{000..002}}.tar")
    assert len(opened) == 4 and sum(len(s.rows) for s in opened) == 4
    assert dialogue.conversation(opened[0].row(0))[1] == [(dialogue.CAPTION_PROMPT, "a red square")]


def test_the_index_is_rebuilt_when_the_file_changes(tmp_path):
    spec = write_rows(tmp_path, [talk()])
    assert len(sources_of(spec)[0].rows) == 1
    write_rows(tmp_path, [talk(), talk()])
    assert len(sources_of(spec)[0].rows) == 2


def test_a_row_that_was_mended_is_read_without_touching_its_file(tmp_path):
    spec = write_rows(tmp_path, [talk(image="late.png"), talk()])
    assert len(sources_of(spec)[0].meta["bad"]) == 1
    (tmp_path / "late.png").write_bytes(picture())
    assert sources_of(spec)[0].meta["bad"] == []


def test_openai_image_urls_are_read_and_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())

    def part(**more):
        question = {"role": "user", "content": [{"type": "text", "text": "What?"}, more]}
        return {"messages": [question, {"role": "assistant", "content": "This."}]}

    rows = [
        part(type="image_url", image_url={"url": "a.png"}),
        part(type="video_url", video_url={"url": "a.mp4"}),
        talk(video="a.mp4"),
    ]
    (source,) = sources_of(write_rows(tmp_path, rows))
    assert source.rows["n_images"].tolist() == [1, 0, 0]
    reasons = [bad["reason"] for bad in source.meta["bad"]]
    assert len(reasons) == 2 and "video_url" in reasons[0] and "a video" in reasons[1]


def test_a_damaged_tar_is_named(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"not a tar at all" * 99)
    with pytest.raises(ValueError, match="cut.tar is no whole tar file"):
        sources_of(f"{tmp_path}/cut.tar")


def open_files(folder):
    """The files under `folder` that this process has open."""
    links = Path("/proc/self/fd").iterdir()
    # The listing's own descriptor is gone by the time it is looked at.
    paths = [os.readlink(link) for link in links if link.is_symlink()]
    return [path for path in paths if path.startswith(f"{folder}/")]


def test_sources_keep_no_file_open_and_one_spelt_otherwise_is_one_index(tmp_path, monkeypatch):
    for k in range(40):
        write_rows(tmp_path, [talk(id=f"{k}")], f"{k}.jsonl")
    with open(tmp_path / "0.jsonl"):
        assert open_files(tmp_path) == [f"{tmp_path}/0.jsonl"]
    opened = sources_of(f"{tmp_path}/*.jsonl")
    assert sum(len(s.rows) + len(s.images) for s in opened) == 40
    assert open_files(tmp_path) == []
    monkeypatch.chdir(tmp_path)
    sources_of("7.jsonl,./7.jsonl")
    assert len([*tmp_path.glob(".7.jsonl.index-*")]) == 1


def test_a_row_that_no_tokenizer_or_memory_can_take_is_quarantined(tmp_path, monkeypatch):
    for module in (index, tars):
        monkeypatch.setattr(module, "MAX_BYTES", 1_500_000)
    rows = [talk("blanks" + " " * 1_000_000, id="a"), talk("long" * 400_000, id="b"), talk(id="c")]
    (source,) = sources_of(write_rows(tmp_path, rows))
    blanks, long = [bad["reason"] for bad in source.meta["bad"]]
    assert source.rows["size"].sum() == os.path.getsize(tmp_path / "rows.jsonl")
    assert "cannot be split into tokens" in blanks and "a row of 1600098 bytes" in long
    assert source.row(2)["id"] == "c"


def test_a_caption_file_or_array_of_another_kind_is_named(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in (("a.json", "[1]"), ("b.txt", "\ufeffA cat."), ("c.txt", "[sic] {a} cat")):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name[0]}.png").write_bytes(picture())
    (folder / "d.png").write_bytes(picture())
    (folder / "d.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert data.check_files([str(folder)]) == 2
    out = capsys.readouterr().out
    for words in ("a.png: a list, where a row is", "d.png: a .txt that is not UTF-8", "2 bad"):
        assert words in out
    (source,) = sources_of(str(folder))
    assert [source.row(k)["caption"] for k in (1, 2)] == ["A cat.", "[sic] {a} cat"]
    (folder / "a.json").write_text('{"caption": "A dog."}')
    (folder / "a.txt").write_text("A dog.\n")
    (folder / "d.txt").unlink()
    (folder / "d.txt").mkdir()
    (folder / "e.png").write_bytes(picture())
    (folder / "e.txt").write_text("far too long " * 9_000_000)
    assert data.check_files([str(folder)]) == 2
    out = capsys.readouterr().out
    for words in ("d.png", "directory", "e.txt, a row of 117000000 bytes", "5 rows, 3 good, 2 bad"):
        assert words in out
    (folder / "e.txt").unlink()
    (tmp_path / "number.json").write_text("7")
    with pytest.raises(ValueError, match="number.json holds a int, not a list"):
        sources_of(f"{tmp_path}/number.json")
    (tmp_path / "none.jsonl").write_text("")
    assert data.check_files([f"{tmp_path}/none.jsonl"]) == 1
    (tmp_path / "rows.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack it"):
        sources_of(f"{tmp_path}/rows.jsonl.gz")


def test_a_bare_caption_in_a_tar_is_text_whatever_it_begins_with(tmp_path):
    with tarfile.open(tmp_path / "a.TAR", "w") as tar:
        for name, content in (
            ("1.jpg", picture()),
            ("1.txt", b"{a} cat"),
            ("2.png", picture()),
            ("2.TXT", b"[sic]"),
            ("3.png", picture()),
            ("3.json", b'{"caption": "A dog."}'),
        ):
            tars.add_member(tar, name, content)
    (source,) = sources_of(f"{tmp_path}/a.TAR")
    assert [source.row(k)["caption"] for k in range(3)] == ["{a} cat", "[sic]", "A dog."]
    assert not source.meta["bad"]


def test_a_folder_that_changed_below_its_top_is_indexed_again(tmp_path):
    below = tmp_path / "folder" / "b"
    below.mkdir(parents=True)
    for name, text in (("p", "Old."), ("q", "Other.")):
        (below / f"{name}.png").write_bytes(picture())
        (below / f"{name}.txt").write_text(text)

    def captions():
        (source,) = sources_of(f"{tmp_path}/folder")
        return [source.row(k)["caption"] for k in range(len(source.rows))]

    assert captions() == ["Old.", "Other."]
    (below / "p.txt").write_text("New and longer.")
    assert captions() == ["New and longer.", "Other."]
    (below / "dangling").symlink_to("/nowhere")
    n = len([*tmp_path.glob(".folder.index-*")])
    for _ in range(3):  # the index of a part of it is no change
        assert captions() == ["New and longer.", "Other."]
        sources_of(str(below))
    assert len([*tmp_path.glob(".folder.index-*")]) == n
    (below / "q.png").unlink()
    assert captions() == ["New and longer."]


def test_what_is_there_as_it_is_written_goes_before_patterns_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "[1].jsonl",
        "1.jsonl",
        "a{0..1}.jsonl",
        "year=2026/x.jsonl",
        "year=2026/x8.jsonl",
        "k/year=2026/x.jsonl",
    ):
        write_rows(Path(name).parent, [talk()], Path(name).name)
    spec = "[1].jsonl,a{0..1}.jsonl,year=2026/*.jsonl,year=2026/x{7..8}.jsonl,"
    spec += "k/year=2026/x.jsonl,mine=[1].jsonl,theirs=b=c{0..1}.jsonl"
    assert [(name, str(path)) for name, path in sources.expand_paths(spec)] == [
        ("", "[1].jsonl"),
        ("", "a{0..1}.jsonl"),
        ("", "year=2026/x.jsonl"),
        ("", "year=2026/x8.jsonl"),
        ("", "year=2026/x7.jsonl"),
        ("", "year=2026/x8.jsonl"),
        ("", "k/year=2026/x.jsonl"),
        ("mine", "[1].jsonl"),
        ("theirs", "b=c0.jsonl"),
        ("theirs", "b=c1.jsonl"),
    ]
