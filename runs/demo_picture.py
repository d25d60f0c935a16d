"""The picture of the README: answers of the demo's model beside its loss curve.

    make demo
    python -m runs.demo_picture                  # out/demo, shards/toy -> assets/demo.png

The questions are the first of each kind in KINDS_SHOWN, taken as they come: right or wrong.
"""
import base64
import csv
import io
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configurator import configure, run_script, setting
from inputs.files import read_jsonl

# benchmark: beginnings of the questions that are shown, one picture each
KINDS_SHOWN = {
    "toy_general": ("What is just below", "What is in the"),
    "toy_ocr": ("What is written", "What is the word"),
    "toy_chart": ("What is the lowest", "How much higher"),
    "toy_count": ("How many",),
    "toy_halluc": ("Is there",),
}
GREEN = "#117733"
RED = "#bb3322"


@dataclass(slots=True)
class Config:
    # where `make demo` left its model, log and predictions
    demo: str = setting("out/demo", filled=True)
    shards: str = setting("shards/toy", filled=True)  # where it left its data
    out: str = setting("assets/demo.png", filled=True)  # the picture to write


def read_table(path):
    """Rows of a .tsv file as dictionaries."""
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def choose_examples(demo, shards):
    """Yield (picture, question, answer, whether it is right) for the README."""
    for benchmark, beginnings in KINDS_SHOWN.items():
        pictures = {row["index"]: row["image"] for row in read_table(shards / f"{benchmark}.tsv")}
        rows = read_table(demo / f"{benchmark}.tsv")
        chosen = []
        for beginning in beginnings:
            fitting = [row for row in rows if row["question"].startswith(beginning)]
            # a benchmark without such a question gives its next one
            rest = [row for row in (fitting or rows) if row not in chosen]
            chosen.append(rest[0])
        for row in chosen:
            picture = Image.open(io.BytesIO(base64.b64decode(pictures[row["index"]])))
            answer = row["prediction"].strip()
            right = answer.rstrip(".").lower() == row["answer"].strip().lower()
            # the letter of an option says nothing: show its text
            answer = row.get(answer) or answer
            yield picture, row["question"].split("\n")[0], answer, right


def draw_examples(figure, grid, examples):
    """Two rows of four pictures: the question above, the answer below."""
    for k, (picture, question, answer, right) in enumerate(examples):
        axes = figure.add_subplot(grid[k // 4, k % 4])
        axes.imshow(picture)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title("\n".join(textwrap.wrap(question, 22)), fontsize=8.5, loc="left")
        axes.set_xlabel(
            "\n".join(textwrap.wrap(answer, 22)),
            fontsize=10, fontweight="bold", color=GREEN if right else RED)


def draw_loss(axes, log):
    """Loss of each stage over the steps of all stages: raw thin, mean of nine steps thick."""
    losses = {}
    for row in read_jsonl(log):
        losses.setdefault(row["stage"], {})[row["step"]] = row["loss"]
    start = 0
    window = np.ones(9)
    for stage, by_step in losses.items():
        loss = [by_step[step] for step in sorted(by_step)]
        steps = start + np.arange(1, len(loss) + 1)
        smooth = np.convolve(loss, window, "same") / np.convolve(np.ones_like(loss), window, "same")
        line, = axes.plot(steps, smooth, lw=1.8, label=stage)
        axes.plot(steps, loss, lw=0.5, alpha=0.3, color=line.get_color())
        start = steps[-1]
    axes.set_title(f"training loss, five stages, {start} steps on a CPU", fontsize=9, loc="left")
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss (nats per supervised token)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(frameon=False, fontsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    cfg = Config()
    configure(cfg)
    demo = Path(cfg.demo)
    if not (demo / "results.json").exists():
        raise ValueError(f"{demo} holds no results.json; run: make demo")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    # so that an answer does not touch the question below it
    figure.get_layout_engine().set(h_pad=0.12)
    grid = figure.add_gridspec(2, 7)
    draw_examples(figure, grid, choose_examples(demo, Path(cfg.shards)))
    draw_loss(figure.add_subplot(grid[:, 4:]), demo / "log.jsonl")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.out, dpi=110)
    print(f"{cfg.out}: drawn from {demo}")


if __name__ == "__main__":
    run_script(main)
