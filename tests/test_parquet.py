"""inputs/parquet.py: parquet becomes a tar once, and no row or picture is lost on the way."""

import base64
import os
import sys

import pytest
from rows import picture, sources_of, talk

import data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RED = picture()
BLUE = picture(168, 84, (30, 30, 200))


def stored(content, path=None):
    """A picture as the datasets hub has it."""
    return {"bytes": content, "path": path}


def write_parquet(folder, rows, name="rows.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key) for key in columns} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def read(path):
    """(source, {row: reason} of the bad ones)."""
    (source,) = sources_of(path)
    return source, {bad["row"]: bad["reason"] for bad in source.meta["bad"]}


def test_pictures_of_every_form_keep_their_bytes_and_their_order(tmp_path):
    (tmp_path / "a.png").write_bytes(BLUE)
    pair = [{"user": "What?", "assistant": "This."}]
    code = base64.b64encode(BLUE).decode()
    forms = {
        "structs": [{"images": [stored(RED), stored(BLUE), stored(RED)], "texts": pair}],
        "bytes": [{"image": RED, "question": "What?", "answer": "This."}],
        "paths": [{"image": stored(None, "a.png"), **talk()}],
        "names": [{"images": ["a.png", code], **talk()}],
        "caption": [{"image": stored(RED, "x.png"), "image_path": "gone/x.png", "text": "Red."}],
        "absent": [{"image": stored(None), **talk()}],
    }
    wanted = {
        "structs": [RED, BLUE, RED],
        "bytes": [RED],
        "paths": [BLUE],
        "names": [BLUE, BLUE],
        "caption": [RED],
        "absent": [],
    }
    for name, rows in forms.items():
        source, bad = read(write_parquet(tmp_path, rows, f"{name}.parquet"))
        assert not bad and source.rows["n_images"].tolist() == [len(wanted[name])], (name, bad)
        row = source.row(0)
        found = [source.image(0, k, row) for k in range(len(wanted[name]))]
        assert found == wanted[name], name


def test_pictures_in_the_parts_of_messages_are_taken_from_there(tmp_path):
    parts = [
        {"type": "image", "image": stored(BLUE), "text": None},
        {"type": "text", "image": None, "text": "What?"},
    ]
    answer = [{"type": "text", "image": None, "text": "This."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    row = {"prompt": messages[:1], "completion": messages[1:]}
    openai = write_parquet(tmp_path, [{"messages": messages}])
    trl = write_parquet(tmp_path, [row], "trl.parquet")
    for path in (openai, trl):
        source, bad = read(path)
        assert not bad and source.image(0, 0, source.row(0)) == BLUE


def test_bad_rows_are_named_by_row_and_field_and_the_others_are_read(tmp_path, capsys):
    image = [stored(RED)]
    rows = [
        {"images": image, **talk()},
        {"images": [stored(None, "gone.png")], **talk()},
        {"images": [stored(None, "https://host/a.png")], **talk()},
        {"images": image, "video": b"mp4", **talk()},
        {"images": [stored(b"no picture")], **talk()},
        {"images": [stored(None)], **talk()},
        {"scan": stored(RED), **talk()},
        {"images": image, "scan": stored(RED), **talk()},
    ]
    path = write_parquet(tmp_path, rows)
    assert data.check_files([str(path)]) == 6
    lines = capsys.readouterr().out.splitlines()
    words = [
        "rows.parquet: row 2: images: No such file or directory",
        "rows.parquet: row 3: images: https://host/a.png is a web address",
        "rows.parquet: row 4: video: a video",
        "rows.parquet: row 5: ",
        "rows.parquet: row 6: images: null is no name of a picture",
        "rows.parquet: row 7: scan: this key is not read; name the pictures",
    ]
    for line, word in zip(lines, words, strict=False):
        assert word in line, line
    assert lines[-1] == "8 rows, 2 good, 6 bad"
    assert "scan (1)" in lines[-2]


def test_it_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch, capsys):
    path = write_parquet(tmp_path, [{"image": stored(RED), **talk()}])
    first, _ = read(path)
    written = first.converted.stat()
    # From here on the tar does without pyarrow.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        second, _ = read(path)
    assert second.converted == first.converted and second.converted.stat() == written
    write_parquet(tmp_path, [{"image": stored(BLUE), **talk()}] * 2)
    third, _ = read(path)
    assert third.converted != first.converted and len(third.rows) == 2
    assert third.image(1, 0, third.row(1)) == BLUE
    assert "can be removed" in capsys.readouterr().err and first.converted.exists()


def test_a_missing_pyarrow_and_a_damaged_file_are_one_line_and_leave_no_tar(tmp_path, monkeypatch):
    path = write_parquet(tmp_path, [{"image": stored(RED), **talk()}])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match="pip install pyarrow"):
            read(path)
    for content in (path.read_bytes()[:-20], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no whole parquet file .*copy it again") as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".*/rows.tar*"))


def test_where_the_folder_cannot_be_written_the_tar_goes_to_the_working_folder(
    tmp_path, monkeypatch
):
    path = write_parquet(tmp_path / "data", [{"image": stored(RED), **talk()}])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    make = os.mkdir

    def forbidden(folder, *args, **more):
        if str(folder).startswith(str(tmp_path / "data")):
            raise PermissionError(13, "Permission denied", str(folder))
        return make(folder, *args, **more)

    monkeypatch.setattr(os, "mkdir", forbidden)
    source, bad = read(path)
    assert not bad and source.converted.parts[:2] == ("shards", "index")
    assert source.image(0, 0, source.row(0)) == RED
