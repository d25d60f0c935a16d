"""make gpu: what fails is named, what was measured is in the table, missing packages come first."""
import subprocess
import sys
from pathlib import Path

import torch

from bench import gpu, room
from bench.__main__ import bench_parts

ROOT = Path(__file__).parent.parent
GOOD = "print('noise'); print('[{\"row\": \"a\", \"value\": 1234.5, \"unit\": \"s\"}]')"


def run(tmp_path, capsys, *parts):
    """-> exit code, everything printed."""
    code = gpu.run_parts([(seconds, ["-c", script]) for seconds, script in parts], tmp_path)
    return code, capsys.readouterr().out


def test_one_table_has_the_rows_of_all_parts_and_their_columns(tmp_path, capsys):
    other = "print('[{\"row\": \"b\", \"gb\": 0.25}]')"
    code, text = run(tmp_path, capsys, (20, GOOD), (20, other))
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert code == 0 and lines[0] == "| row | value | unit | gb |"
    assert lines[2:] == ["| a | 1,234 | s |  |", "| b |  |  | 0.25 |"]
    assert "2 rows, 0 of 2 parts failed" in text


def test_a_part_that_fails_fails_the_whole_and_costs_no_row(tmp_path, capsys):
    code, text = run(tmp_path, capsys, (20, GOOD), (20, f"{GOOD}; raise SystemExit(3)"))
    assert code == 1 and "exit code 3" in text and "2 rows, 1 of 2 parts failed" in text


def test_a_part_that_is_cut_off_keeps_the_rows_that_it_prints_when_told_to_end(tmp_path, capsys):
    slow = ("import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "try:\n    time.sleep(60)\n"
            f"finally:\n    {GOOD}")
    code, text = run(tmp_path, capsys, (3, slow))
    assert code == 1 and "cut off after 3 s" in text and "| a | 1,234 | s |" in text


def test_missing_packages_are_named_before_anything_runs():
    script = ("from bench import gpu\n"
              "gpu.NEEDED = ('torch', 'no_such_package')\n"
              "gpu.run_parts = None\n"
              "gpu.main()")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "make gpu needs no_such_package:" in done.stderr
    assert "torch," not in done.stderr and "Traceback" not in done.stderr


def test_all_parts_together_end_within_ten_minutes():
    assert sum(seconds + gpu.GRACE_S for seconds, _ in gpu.PARTS) <= 600


# ---- rows that fit -------------------------------------------------------------------------------

H100_BYTES = 79.1 * 2**30  # what PyTorch says of a card of 80 GB
H200_BYTES = 139.8 * 2**30


def fitting(part, card_bytes):
    """-> names of the rows of a part that run on such a card, and of all rows of it."""
    table = bench_parts(torch.device("cuda"))[part][1]
    return set(room.fitting_rows(part, table, card_bytes)), set(table)


def test_rows_over_80_gb_are_named_and_run_only_on_a_larger_card(capsys):
    kept, rows = fitting("train", H100_BYTES)
    assert {"2b_alignment", "2b_advance", "2b_sft_selective", "8b_advance_selective"} <= kept
    assert rows - kept == {"2b_sft", "2b_16k_sft_selective"}
    assert "2b_sft: not run, it needs" in capsys.readouterr().out
    assert fitting("train", H200_BYTES)[0] == rows


def test_every_other_part_has_a_row_on_a_card_of_80_gb():
    assert fitting("stages", H100_BYTES)[0] == {"2b_4k"}
    assert fitting("warmup", H100_BYTES)[0] == {"2b_mix"}
    assert fitting("vs-hf", H100_BYTES)[0] == {"7m_fp32", "7m_bf16", "25m_bf16"}


def test_two_models_beside_one_another_need_the_room_of_transformers_row():
    table = bench_parts(torch.device("cuda"))["vs-hf"][1]
    one = room.step_plan("2b_4k", "sft")
    assert room.row_bytes("vs-hf", table["2b_4k_bf16"]) > 2 * one.state + one.activations
    assert fitting("vs-hf", H200_BYTES)[0] == set(table)
