"""runs/demo.sh: the demo as a whole, killed again and again. Minutes long, hence nightly."""
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import kill_tree

ROOT = Path(__file__).parent.parent


def demo(folder):
    """The demo in short form, as a running process."""
    steps = "--max_steps=12 --save_every=3 --tokens_per_pack=400"
    settings = {
        "BIN": Path(sys.executable).parent,
        "DEMO": folder / "demo",
        "SHARDS": folder / "shards",
        "N": 80,
        "N_BENCH": 4,
        "PRETRAIN": steps,
        "SFT": steps,
        "EVAL": "--limit=4",
    }
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    folder.mkdir(exist_ok=True)
    with open(folder / "output", "a") as output:
        return subprocess.Popen(["bash", "runs/demo.sh"], cwd=ROOT, env=environment, stdout=output,
                                stderr=subprocess.STDOUT)


def weights_digest(folder):
    path = folder / "demo" / "model" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def output_end(folder):
    return (folder / "output").read_text()[-3000:]


@pytest.mark.nightly
def test_a_demo_killed_at_random_moments_and_started_again_ends_with_the_same_weights(tmp_path):
    start = time.monotonic()
    whole = demo(tmp_path / "whole")
    assert whole.wait(900) == 0, output_end(tmp_path / "whole")
    seconds = time.monotonic() - start
    rng = random.Random(1)
    kills = 0
    while True:
        process = demo(tmp_path / "killed")
        try:
            code = process.wait(rng.uniform(0.05, 0.35) * seconds if kills < 8 else 900)
        except subprocess.TimeoutExpired:
            kills += 1
            kill_tree(process.pid)
            process.wait()
            continue
        assert code == 0, output_end(tmp_path / "killed")
        break
    assert kills >= 3, f"only {kills} kills in a run of {seconds:.0f} seconds"
    assert weights_digest(tmp_path / "killed") == weights_digest(tmp_path / "whole")
