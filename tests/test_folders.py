"""A folder of pictures: linked folders, files that are not read, odd names; notes about sources."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
from rows import ROOT, dataset_of, picture, sources_of, talk, write_rows
from test_train import argv

import data
from inputs import sources, tars
from inputs.preview import preview_packs


def pair(folder, stem, text="A red square.", suffix=".png"):
    """A picture and its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}{suffix}").write_bytes(picture())
    (folder / f"{stem}.txt").write_text(text)


def names_of(spec):
    """The pictures of a folder's rows, and what its notes say."""
    (source,) = sources_of(spec)
    assert not source.meta["bad"]
    names = [source.row(i)["image"] for i in range(len(source.rows))]
    return names, source.meta["unread"]


def test_linked_folders_are_read_once_under_their_own_name_if_they_have_one(tmp_path):
    folder = tmp_path / "d"
    pair(folder / "z", "1")
    pair(tmp_path / "elsewhere", "2")
    (folder / "a").symlink_to("z")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    names, unread = names_of(folder)
    assert names == ["b/2.png", "z/1.png"]
    assert unread == {"linked folders that lead to one which is read anyway": 1}


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_links_that_lead_back_are_no_endless_loop_and_are_named(tmp_path, target):
    folder = tmp_path / "d"
    pair(folder / "sub", "1")
    pair(tmp_path, "above")
    (folder / "sub" / "back").symlink_to(target)
    names, unread = names_of(folder)
    assert names == ["sub/1.png"] and sum(unread.values()) == 1


def test_two_folders_that_link_to_each_other_are_read_once(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        pair(tmp_path / "d" / name, name)
        (tmp_path / "d" / name / "other").symlink_to(f"../{other}")
    assert names_of(tmp_path / "d")[0] == ["a/a.png", "b/b.png"]


def test_a_picture_added_behind_a_linked_folder_is_seen(tmp_path):
    pair(tmp_path / "elsewhere", "1")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to("../elsewhere")
    assert names_of(tmp_path / "d")[0] == ["link/1.png"]
    pair(tmp_path / "elsewhere", "2")
    assert names_of(tmp_path / "d")[0] == ["link/1.png", "link/2.png"]


def test_a_dangling_link_to_a_picture_is_a_bad_row(tmp_path, capsys):
    pair(tmp_path / "d", "1")
    (tmp_path / "d" / "gone.png").symlink_to("/nowhere.png")
    assert data.check_files([str(tmp_path / "d")]) == 1
    assert "gone.png" in capsys.readouterr().out


def test_files_of_a_folder_that_are_not_read_are_counted_and_named_in_one_line(tmp_path, capsys):
    folder = tmp_path / "d"
    pair(folder, "1")
    for k, suffix in enumerate((".tif", ".TIF", ".heic", ".avif", ".webm", ""), 2):
        pair(folder, str(k), suffix=suffix)
    (folder / "lonely.json").write_text("{}")
    (folder / "._1.png").write_bytes(picture())
    assert data.check_files([str(folder)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "are not read" in x]
    assert line == (
        "d: files that are not read: .avif (1), .heic (1), .json or .txt without a picture (7), "
        ".tif (2), .webm (1), hidden pictures (1), no suffix (1)"
    )


def test_files_of_a_tar_that_are_not_read_are_counted_and_named_in_one_line(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(3):
            tars.add_member(tar, f"{k}.txt", b"A red square.")
            tars.add_member(tar, f"{k}.png", picture())
            tars.add_member(tar, f"{k}.npy", b"0")
        tars.add_member(tar, "4.heic", b"0")
        tars.add_member(tar, "LICENSE", b"0")
        link = tarfile.TarInfo("5.png")
        link.type = tarfile.SYMTYPE
        link.linkname = "1.png"
        tar.addfile(link)
    data.check_files([f"{tmp_path}/a.tar"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "are not read" in x]
    assert line == (
        "a: files that are not read: .heic (1), .npy (3), links and devices (1), no suffix (1)"
    )


def test_notes_of_thousands_of_sources_are_the_first_few_and_a_count(tmp_path, capsys):
    rows = [talk(colour="red")]
    meta = {}
    for k in range(25):
        write_rows(tmp_path, rows, f"{k}.jsonl")
        meta[f"s{k}"] = {"annotation": f"{k}.jsonl", "data_augment": True, "length": 9}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    opened = sources_of(tmp_path / "meta.json")
    assert "data_augment" not in capsys.readouterr().err
    lines = sources.source_notes(opened, most=10)
    assert len(lines) == 11 and lines[0].startswith("s0: data_augment is not done here")
    assert "length says 9 rows, there are 1" in lines[9] and "colour (1)" in lines[9]
    assert lines[10] == "and 15 other sources with such notes, which data.py check names"
    assert len(sources.source_notes(opened)) == 25


@pytest.mark.parametrize("spec", ["web=", "=web.jsonl", "web= ", "a.jsonl,", "a.jsonl,,b.jsonl"])
def test_a_data_flag_with_an_unset_variable_is_refused(spec):
    with pytest.raises(ValueError, match="is a variable unset?"):
        sources_of(spec)


# ---- names and ids without UTF-8 ----------------------------------------------------------------

NOT_UTF8 = os.fsdecode(b"caf\xe9")


def odd_sources(folder):
    """A jsonl, a folder and a tar with lone surrogates in ids, texts and names of files."""
    folder.mkdir()
    pair(folder / "pics", NOT_UTF8)
    (folder / "pics" / f"{NOT_UTF8}2.png").write_bytes(picture()[:60])  # its header is whole
    (folder / "pics" / f"{NOT_UTF8}2.txt").write_text("Cut.")
    rows = [
        talk("What\ud800?", "This \udfff.", id="a\ud83d"),
        talk(image=f"pics/{NOT_UTF8}.png", id=NOT_UTF8),
        talk(image=f"pics/{NOT_UTF8}2.png", id=f"{NOT_UTF8}2"),
        talk(image="\ud83d.png", id="\ud83d"),
        {**talk(), "key\udc80": 1},
    ]
    write_rows(folder, rows)
    with tarfile.open(folder / "a.tar", "w") as tar:
        tars.add_member(tar, f"{NOT_UTF8}.txt", b"A red square.")
        tars.add_member(tar, f"{NOT_UTF8}.png", picture())
        tars.add_member(tar, f"{NOT_UTF8}.tif\udcff", b"0")
    return f"{folder}/rows.jsonl,{folder}/pics,{folder}/a.tar"


def test_lone_surrogates_end_neither_batches_nor_a_preview(tmp_path, capsys):
    spec = odd_sources(tmp_path / NOT_UTF8)
    dataset = dataset_of(spec)
    ids = set()
    bad = set()
    for pack in dataset.packs.plan_window(0, 0)[0]:
        ids |= set(dataset[pack]["ids"])
        bad |= {b["id"] for b in dataset[pack]["bad"]}
    assert {"a\ud83d", NOT_UTF8, "a:0", "rows:4"} <= ids and bad == {f"{NOT_UTF8}2"}
    preview_packs(dataset, 8, str(tmp_path / "page.html"))
    assert "caf\\udce9" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["check", "show", "train"])
def test_lone_surrogates_end_no_command_also_with_a_narrow_output(tmp_path, command):
    spec = odd_sources(tmp_path / NOT_UTF8)
    if command == "train":
        flags = argv(
            tmp_path / f"r{NOT_UTF8}",
            spec,
            "--save_every=1",
            f"--val_data={spec}",
            stages=("alignment",),
            steps=2,
        )
        words = ["train.py", *flags]
    else:
        words = ["data.py", command, *spec.split(",")]
    done = subprocess.run(
        [sys.executable, *map(os.fsencode, words)],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"LANG": "C", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )
    errors = done.stderr.decode()
    assert "Traceback" not in errors and done.returncode == (2 if command == "check" else 0), errors
    if command == "check":
        assert "8 rows, 5 good, 3 bad" in done.stdout.decode()
        assert "caf\\udce9" in done.stdout.decode()
    if command == "train":
        folder = tmp_path / f"r{NOT_UTF8}"
        lines = (folder / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
        assert any(json.loads(line).get("id") == f"{NOT_UTF8}2" for line in lines)
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
