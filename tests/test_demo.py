"""Makefile: the demo as a whole, killed again and again. Minutes long, hence nightly."""
import hashlib, random, subprocess, sys, time
from pathlib import Path

import pytest

from test_train import kill_tree

ROOT = Path(__file__).parent.parent


def demo(folder):
    """`make five-stages` in short form, as a running process."""
    steps, tools = "--max_steps=12 --save_every=3 --tokens_per_pack=400", Path(sys.executable).parent
    settings = dict(BIN=tools, DEMO=folder / "demo", SHARDS=folder / "shards", N=80, PRETRAIN=steps, SFT=steps,
                    EVAL="--limit=4")
    folder.mkdir(exist_ok=True)
    with open(folder / "output", "a") as output:
        return subprocess.Popen(["make", "five-stages", *(f"{k}={v}" for k, v in settings.items())], cwd=ROOT,
                                stdout=output, stderr=subprocess.STDOUT)


def weights(folder):
    return hashlib.sha256((folder / "demo" / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.nightly
def test_a_demo_killed_at_random_moments_and_started_again_ends_with_the_same_weights(tmp_path):
    start = time.monotonic()
    whole = demo(tmp_path / "whole")
    assert whole.wait(900) == 0, (tmp_path / "whole" / "output").read_text()[-3000:]
    seconds, rng, kills = time.monotonic() - start, random.Random(1), 0
    while True:
        process = demo(tmp_path / "killed")
        try:
            code = process.wait(rng.uniform(0.05, 0.35) * seconds if kills < 8 else 900)
        except subprocess.TimeoutExpired:
            kills += 1
            kill_tree(process.pid)
            process.wait()
            continue
        assert code == 0, (tmp_path / "killed" / "output").read_text()[-3000:]
        break
    assert kills >= 3, f"only {kills} kills in a run of {seconds:.0f} seconds"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
