"""bench: what fails is named, what disagrees is refused, what was measured is never lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench import kernels, loading
from bench.measure import compare_sides
from inputs.tokenizer import Tokenizer
from kernels import cross_entropy

ROOT = Path(__file__).parent.parent


def run(monkeypatch, capsys, function, rows=("a", "b"), part="ce"):
    """bench.main with this function as a part.

    -> exit code, rows of the last line, everything printed."""
    monkeypatch.setattr(
        bench, "bench_parts", lambda device: {part: (function, {name: () for name in rows})}
    )
    monkeypatch.setattr(sys, "argv", ["bench.py", part, "--device=cpu"])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            bench.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    text = capsys.readouterr().out
    return end.value.code, json.loads(text.splitlines()[-1]), text


def test_a_row_that_fails_is_named_and_costs_no_other(monkeypatch, capsys):
    def part(cfg, device, name):
        if name == "a":
            raise RuntimeError("out of memory")
        yield dict(row=name, value=2.0, unit="s")

    code, rows, text = run(monkeypatch, capsys, part)
    assert code == 1 and [row["row"] for row in rows] == ["b"]
    assert "a FAILED: RuntimeError: out of memory" in text and "| b | 2 | s |" in text


def test_what_timeout_cuts_off_is_reported_up_to_there(tmp_path):
    script = tmp_path / "cut.py"
    script.write_text(
        "import sys, time\nfrom bench import __main__ as bench\n"
        "def part(cfg, device, name):\n"
        "    yield dict(row=name, value=1.0, unit='s')\n"
        "    time.sleep(60)\n"
        "bench.bench_parts = lambda device: {'ce': (part, {'first': [], 'second': []})}\n"
        "bench.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, script, "ce", "--device=cpu"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        while not process.stdout.readline().startswith("row first"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 143 and json.loads(rest.splitlines()[-1]) == [
        dict(row="first", value=1.0, unit="s")
    ]


def test_a_row_in_which_we_err_more_than_twice_as_much_is_refused(monkeypatch, capsys):
    plain = cross_entropy.linear_cross_entropy
    monkeypatch.setattr(
        cross_entropy, "linear_cross_entropy", lambda h, w, labels: plain(h, w, labels) * 1.001
    )
    code, rows, text = run(
        monkeypatch,
        capsys,
        lambda cfg, device, name: kernels.head_loss_rows(cfg, device, name, False),
        ["ce"],
    )
    assert code == 1 and rows == [] and "ce FAILED: AssertionError: ours errs by 0.001" in text


def test_the_ratio_is_ours_over_theirs_and_sides_take_turns():
    calls = []
    sides = {
        "ours": lambda: (calls.append("ours"), time.sleep(0.02)),
        "peer": lambda: (calls.append("peer"), time.sleep(0.06)),
    }
    (row,) = compare_sides("x", sides, 3, torch.device("cpu"), 6.0, "steps/s")
    assert row["peer"] == "peer" and row["ratio"] == row["value"] / row["peer_value"] > 1
    assert calls[4:] == [
        "peer",
        "ours",
        "ours",
        "peer",
        "peer",
        "ours",
    ]  # after the warm-up and the first clock


def test_full_packs_of_the_waiting_rows_are_full(tmp_path):
    """A row for packs of 32 tiles would say nothing if some had fewer."""
    dataset = loading.full_packs(str(tmp_path), Tokenizer(loading.TOKENIZER_FOLDER))
    planned, _ = dataset.packs.plan_window(0, 0)
    assert len(planned) == 16
    assert all(pack.tiles == 32 and len(pack.samples) == 4 for pack in planned)
    assert dataset[planned[0]]["tiles"].shape == (32, 3, 448, 448)
    rows = bench.bench_parts(torch.device("cpu"))["waiting"][1]
    assert rows["wait_full_accum_1"] == (1, loading.full_packs)
    assert rows["wait_full_accum_64"] == (64, loading.full_packs)
