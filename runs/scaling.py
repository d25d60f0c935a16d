"""Does a score grow with the logarithm of the pretraining data? Plan the runs, fit a line, plot.

    python -m runs.scaling plan --steps=1000,4000,16000 \\
        --train="config/pretrain_2b.py --init_from=start_2b --data=c.json" \\
        --sft="config/sft_2b.py --knowledge.data=k.json --instruction.data=i.json \\
            --preference.data=p.json" \\
        --eval="--data_dir=LMUData --benchmarks=all" --processes=8
    python -m runs.scaling plan ... --run=True          # runs what is not finished
    python -m runs.scaling fit --out_dir=out/scaling    # score = a + b log10(tokens), with errors
    python -m runs.scaling plot --out_dir=out/scaling   # scaling.png, in out_dir

SAIL-VL's second claim (arXiv 2501.05952): scores rise by as much for each tenfold of the data,
from billions to 655B tokens, also after the same fine-tuning. Each point is a run of its own with a
whole learning-rate schedule: a cosine that is stopped before its end is worth less than one that
was meant to end there.
"""
import itertools
import json
import math
import re
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, run_script, setting, subcommand
from inputs.files import read_json, read_jsonl
from runs.plan import run_plan


@dataclass(slots=True)
class Config:
    out_dir: str = setting("out/scaling", filled=True)  # a folder for each point; scaling.png
    steps: str = ""  # budgets: steps of every stage of pretraining, separated by commas
    seeds: str = "1"  # each budget is run with each of them
    train: str = ""  # flags for train.py
    stages: str = "alignment,advance"  # stages of train.py; each gets a budget, 3 % of it warm-up
    sft: str = ""  # flags for sft.py; "": the pretrained model is evaluated
    model: str = ""  # which to evaluate: sft/STAGE or pretrain/STAGE; "": the last that is trained
    eval: str = ""  # flags for eval.py
    processes: int = setting(1, at_least=1, at_most=1024)  # of torchrun on this machine
    run: bool = False  # run the commands instead of printing them


# ---- plan ----------------------------------------------------------------------------------------


def point_commands(cfg, folder, steps, seed):
    """The command lines of a point: pretraining, fine-tuning where there is one, benchmarks."""
    stages = cfg.stages.split(",")
    pretrain = ["train.py", *shlex.split(cfg.train)]
    warmup = math.ceil(3 * steps / 100)
    for stage in stages:
        pretrain += [f"--{stage}.steps={steps}", f"--{stage}.warmup_steps={warmup}"]
    pretrain += [f"--stages={cfg.stages}", f"--seed={seed}", f"--out_dir={folder}/pretrain"]
    commands = [pretrain]

    last = f"pretrain/{stages[-1]}"
    if cfg.sft:
        start = f"--init_from={folder}/{last}"
        out = f"--out_dir={folder}/sft"
        commands.append(["sft.py", *shlex.split(cfg.sft), start, f"--seed={seed}", out])
        last = "sft/preference"

    model = f"--model={folder}/{cfg.model or last}"
    commands.append(["eval.py", *shlex.split(cfg.eval), model, f"--out_dir={folder}/eval"])
    return commands


def plan_points(cfg):
    """Print or run the commands of all points, the smallest budget first."""
    numbers = r"\d+(,\d+)*"
    complete = re.fullmatch(numbers, cfg.steps) and re.fullmatch(numbers, cfg.seeds)
    if not (complete and cfg.train and cfg.eval):
        raise ValueError(
            'give --steps=1000,4000,16000, --seeds=1,2, --train="CONFIG ..." and --eval="..."')
    budgets = sorted(int(steps) for steps in cfg.steps.split(","))
    for steps, seed in itertools.product(budgets, cfg.seeds.split(",")):
        folder = Path(cfg.out_dir) / f"{steps}_steps_seed_{seed}"
        run_plan(folder, point_commands(cfg, folder, steps, seed), cfg.run, cfg.processes)


# ---- fit, plot -----------------------------------------------------------------------------------


def read_points(cfg):
    """The finished points: steps (n,), tokens of all pretraining (n,), {benchmark: scores (n,)}."""
    steps = []
    tokens = []
    scores = defaultdict(list)
    for path in sorted(Path(cfg.out_dir).glob("*_steps_seed_*/eval/results.json")):
        point = path.parent.parent
        results = read_json(path, dict)
        # the last line of a stage has all tokens of that stage
        of_stage = {row["stage"]: row["tokens_seen"]
                    for row in read_jsonl(point / "pretrain" / "log.jsonl")}
        steps.append(int(point.name.split("_")[0]))
        tokens.append(sum(of_stage.values()))
        for name in ("overall", *results["n"]):
            scores[name].append(results[name])

    budgets = len(set(steps))
    if budgets < 3:
        raise ValueError(
            f"{cfg.out_dir} has {budgets} finished budgets, a line takes 3: plan --run=True")
    whole = {name: np.array(y) for name, y in scores.items()
             if len(y) == len(steps) and None not in y}
    left_out = sorted(scores.keys() - whole.keys())
    if left_out:
        print(f"left out, without a score in some point: {', '.join(left_out)}")
    if not whole:
        raise ValueError(f"{cfg.out_dir}: no benchmark has a score in every point")
    return np.array(steps), np.array(tokens), whole


def fit_line(x, y):
    """Least squares of y = a + b x.

    Returns (a, b, standard error of b, share of the variance that the line explains)."""
    x0 = x - x.mean()
    y0 = y - y.mean()
    b = (x0 * y0).sum() / (x0 ** 2).sum()
    a = y.mean() - b * x.mean()
    unexplained = ((y0 - b * x0) ** 2).sum()
    variance = (y0 ** 2).sum()
    freedom = max(1, len(x) - 2)
    error = (unexplained / freedom / (x0 ** 2).sum()) ** 0.5
    r2 = 1 - unexplained / variance if variance > 1e-9 else 0.0
    return a, b, error, r2


def fit_points(cfg):
    """Print a line for each benchmark and, on the last line, all of them as JSON.

    linear_r2 is that of a + b tokens: what the logarithm has to beat."""
    steps, tokens, scores = read_points(cfg)
    x = np.log10(tokens)
    largest = steps == steps.max()
    rows = []
    for name, y in scores.items():
        _, slope, error, r2 = fit_line(x, y)
        *_, linear_r2 = fit_line(tokens, y)
        # the line through all but the largest budget predicts the largest
        a, b, *_ = fit_line(x[~largest], y[~largest])
        row = dict(
            benchmark=name, points=len(y), per_tenfold=slope, error=error, r2=r2,
            linear_r2=linear_r2, largest_predicted=a + b * x[largest].mean(),
            largest_measured=y[largest].mean())
        rows.append({key: round(float(value), 3) if isinstance(value, float) else value
                     for key, value in row.items()})

    print(f"{len(tokens)} points, {tokens.min():,} to {tokens.max():,} tokens\n")
    print_cells(rows[0])
    print_cells(["---"] * len(rows[0]))
    for row in rows:
        print_cells(row.values())
    print(json.dumps(rows))


def print_cells(cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |")


def plot_points(cfg):
    """scaling.png: the scores of all points over their tokens, with the fitted lines."""
    from matplotlib.figure import Figure
    _, tokens, scores = read_points(cfg)
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    ends = np.array([tokens.min(), tokens.max()])
    for name, y in scores.items():
        a, b, *_ = fit_line(np.log10(tokens), y)
        dots, = axes.plot(tokens, y, "o", ms=4, label=f"{name}: {b:+.1f} per tenfold")
        width = 2.5 if name == "overall" else 1
        axes.plot(ends, a + b * np.log10(ends), lw=width, color=dots.get_color())
    axes.set(xscale="log", xlabel="tokens of pretraining", ylabel="score")
    axes.legend(frameon=False)
    path = Path(cfg.out_dir) / "scaling.png"
    axes.figure.savefig(path, dpi=120)
    print(f"wrote {path}")


SCALING_PARTS = {"plan": plan_points, "fit": fit_points, "plot": plot_points}


def main():
    cfg = Config()
    usage = "python -m runs.scaling plan | fit | plot [--out_dir=DIR ...]"
    part, flags = subcommand(SCALING_PARTS, usage, cfg)
    configure(cfg, flags)
    part(cfg)


if __name__ == "__main__":
    run_script(main)
