"""inputs/files.py: files are written whole or not at all, and torn lines are passed over."""
import json

import pytest

from inputs.files import atomic_write, read_json, read_jsonl, write_atomic


@pytest.mark.parametrize("mode, half, whole", [("w", "ha", "whole"), ("wb", b"ha", b"whole")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, mode, half, whole):
    path = tmp_path / "a"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_write(path, mode) as file:
        file.write(half)
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    with atomic_write(path, mode) as file:
        file.write(whole)
        assert path.read_text() == "old"
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_lines_that_a_kill_or_a_full_disk_tore_are_passed_over(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []
    rows = [{"text": "one\u2028line"}, {"text": "two"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    deep = "[" * 100_000
    torn = f"{lines[0]}\n{lines[1][:5]}\n{deep}\n{lines[1]}\n" + lines[0][:7]
    (tmp_path / "a.jsonl").write_text(torn, encoding="utf-8")
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_json_of_another_kind_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="a.json holds a list, not a dict; copy it again"):
        read_json(tmp_path / "a.json", dict)
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(ValueError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
