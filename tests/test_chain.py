"""The whole chain as `make demo` runs it, in a few steps: from making data to an answer."""

import json
import random
import sys
from pathlib import Path

import pytest

import convert
import eval as evaluation
import sample
import sft
import train
from toy import __main__ as toy
from toy.boards import make_board
from toy.draw import draw_picture, jpeg_bytes
from weights import load_folder

ROOT = Path(__file__).parent.parent


def call(script, monkeypatch, *argv):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
    script.main()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The toy world's shards and benchmarks, and its two bases with a fresh projector."""
    out, patch = tmp_path_factory.mktemp("world"), pytest.MonkeyPatch()
    call(toy, patch, f"--out={out}/toy", "--n=40", "--n_bench=24")
    call(convert, patch, "assemble", "--vision=toy/vit", "--llm=toy/llm", f"--out={out}/start")
    patch.undo()
    return out


def test_the_bases_fit_in_three_megabytes_each():
    for name in ("vit", "llm"):
        assert sum(f.stat().st_size for f in (ROOT / "toy" / name).iterdir()) <= 3e6


def test_five_stages_evaluation_and_an_answer_run_end_to_end(world, monkeypatch, capsys):
    data = [f"--{s}.data={world}/toy/{s}-*.tar" for s in ("knowledge", "instruction", "preference")]
    steps = [f"--max_steps={2}", "--save_every=1000"]
    call(
        train,
        monkeypatch,
        "config/toy.py",
        f"--init_from={world}/start",
        f"--data={world}/toy/pretrain-*.tar",
        f"--out_dir={world}/pretrain",
        *steps,
    )
    start = f"--init_from={world}/pretrain/advance"
    call(sft, monkeypatch, "config/toy_sft.py", start, f"--out_dir={world}/sft", *data, *steps)
    model = world / "sft" / "preference"
    assert load_folder(model)[1]["max_dynamic_patch"] == 4
    call(
        evaluation,
        monkeypatch,
        f"--model={model}",
        f"--untrained={world}/start",
        f"--trained_blind={world}/start",
        "--controls=True",
        "--limit=6",
        f"--data_dir={world}/toy",
        "--benchmarks=toy",
        f"--out_dir={world}/eval",
    )
    results = json.loads((world / "eval" / "results.json").read_text())
    names = {"overall", *toy.BENCHMARKS}
    controls = "untrained", "trained_blind", "blind", "chance"
    assert names <= results.keys() and all(results[c].keys() >= names for c in controls)
    assert all(0 <= results[name] <= 100 for name in names)
    page = (world / "eval" / "report.html").read_text()
    assert page.count("data:image") >= 6 and "toy_chart" in page
    board = make_board(random.Random(3), "sign")
    (world / "a.jpg").write_bytes(jpeg_bytes(draw_picture(board, random.Random(3))))
    capsys.readouterr()
    call(
        sample,
        monkeypatch,
        f"--model={model}",
        f"--image={world}/a.jpg",
        "--prompt=What is written in the image?",
        "--max_new_tokens=12",
    )
    assert capsys.readouterr().out.count("\n") == 1
