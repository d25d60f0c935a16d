"""The golden curve: the losses of fifty steps on the CPU, which a GPU has to meet.

    python tests/golden.py      # write tests/golden_curve.json again

Whoever changes the arithmetic, the data or the order of samples on purpose runs it. Until then
tests/test_survival.py fails, for it compares the file with what this command gives.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script
import torch  # noqa: E402
from test_train import argv, log  # noqa: E402

from toy.__main__ import Config, write_parts  # noqa: E402

FILE = ROOT / "tests" / "golden_curve.json"
STEPS = 50
# How far another kind of processor may be: sums in another order. The same kind gives the same.
TOLERANCE = 1e-3
SAME = 1e-6


def write_data(folder):
    """Samples with pictures and without any -> the value of --data."""
    write_parts(Config(out=str(folder), n="60"), ["pretrain"])
    rows = []
    for i in range(40):
        asked = "What is it? " * (i % 5 + 1)
        said = "A red star. " * (i % 7 + 1)
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        rows.append(json.dumps({"id": f"t{i}", "conversations": turns}) + "\n")
    Path(folder, "text.jsonl").write_text("".join(rows))
    return f"{folder}/pretrain-*.tar"


def flags(out, data, *more, ranks=1):
    """Of train.py: one stage in which all trains, two micro-batches a step on all ranks."""
    steps = [f"--grad_accum_steps={2 // ranks}", "--compile=off"]
    return argv(out, data, *steps, *more, stages=("alignment",), steps=STEPS, everything=True)


def losses(out):
    return [row["loss"] for row in log(out)]


def here():
    """What the numbers depend on beside the program."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def make(folder):
    """Train on the CPU, with everything in this folder -> what the file should have."""
    data = write_data(folder)
    out = Path(folder, "run")
    command = [sys.executable, "train.py", *flags(out, data, "--device=cpu")]
    subprocess.run(command, cwd=ROOT, check=True)
    return {"command": "python tests/golden.py"} | here() | {"loss": losses(out)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        FILE.write_text(json.dumps(make(folder)) + "\n")
