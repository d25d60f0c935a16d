"""Does a score grow with the logarithm of the pretraining data? Plan the runs, fit a line, plot.

    python -m runs.scaling plan --steps=1000,4000,16000 \\
        --train="config/pretrain_2b.py --init_from=start_2b --data=c.json" \\
        --sft="config/sft_2b.py --knowledge.data=k.json --instruction.data=i.json \\
            --preference.data=p.json" \\
        --eval="--data_dir=LMUData --benchmarks=all" --processes=8
    python -m runs.scaling plan ... --run=True          # runs what is not finished
    python -m runs.scaling fit --out_dir=out/scaling    # score = a + b log10(tokens), intervals
    python -m runs.scaling plot --out_dir=out/scaling   # scaling.png, in out_dir

Without --train the budgets are those of the stages of --sft: growth with fine-tuning data. {seed}
in the flags stands for the seed, so that a seed can have data and a projector of its own.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, run_script, setting, subcommand
from inputs.files import read_json, read_jsonl, write_atomic
from runs.intervals import fit_line, lack_of_fit, predict_largest
from runs.plan import run_plan


@dataclass(slots=True)
class Config:
    # a folder for each point; points.jsonl, scaling.png
    out_dir: str = setting("out/scaling", filled=True)
    steps: str = ""  # budgets: steps of every one of --stages, separated by commas
    seeds: str = "1"  # each budget is run with each of them
    train: str = ""  # flags for train.py; "": no pretraining, --stages are those of sft.py
    stages: str = "alignment,advance"  # each gets a budget, 3 % of it warm-up
    sft: str = ""  # flags for sft.py; "": the pretrained model is evaluated
    model: str = ""  # which to evaluate: sft/STAGE or pretrain/STAGE; "": the last that is trained
    eval: str = ""  # flags for eval.py
    processes: int = setting(1, at_least=1, at_most=1024)  # of torchrun on this machine
    left_out: int = setting(1, at_least=1, at_most=100)  # largest budgets a prediction ignores
    run: bool = False  # run the commands instead of printing them


# ---- plan ----------------------------------------------------------------------------------------


def point_commands(cfg, folder, steps, seed):
    """The command lines of a point: pretraining, fine-tuning where there is one, benchmarks."""
    def flags(text):
        return shlex.split(text.replace("{seed}", seed))

    stages = cfg.stages.split(",")
    warmup = math.ceil(3 * steps / 100)
    budget = [f"--stages={cfg.stages}"]
    for stage in stages:
        budget += [f"--{stage}.steps={steps}", f"--{stage}.warmup_steps={warmup}"]
    commands = []
    start = []
    if cfg.train:
        own = [*budget, f"--seed={seed}", f"--out_dir={folder}/pretrain"]
        commands.append(["train.py", *flags(cfg.train), *own])
        last = f"pretrain/{stages[-1]}"
        start = [f"--init_from={folder}/{last}"]
        budget = []
    if cfg.sft:
        own = [*budget, *start, f"--seed={seed}", f"--out_dir={folder}/sft"]
        commands.append(["sft.py", *flags(cfg.sft), *own])
        last = "sft/preference" if cfg.train else f"sft/{stages[-1]}"

    model = f"--model={folder}/{cfg.model or last}"
    commands.append(["eval.py", *flags(cfg.eval), model, f"--out_dir={folder}/eval"])
    return commands


def plan_points(cfg):
    """Print or run the commands of all points, the smallest budget first."""
    numbers = r"\d+(,\d+)*"
    complete = re.fullmatch(numbers, cfg.steps) and re.fullmatch(numbers, cfg.seeds)
    if not (complete and (cfg.train or cfg.sft) and cfg.eval):
        raise ValueError('give --steps=1000,4000,16000, --seeds=1,2, --eval="..." and '
                         '--train="CONFIG ..." or --sft="CONFIG ..."')
    budgets = sorted(int(steps) for steps in cfg.steps.split(","))
    for steps, seed in itertools.product(budgets, cfg.seeds.split(",")):
        folder = Path(cfg.out_dir) / f"{steps}_steps_seed_{seed}"
        run_plan(folder, point_commands(cfg, folder, steps, seed), cfg.run, cfg.processes)


# ---- fit, plot -----------------------------------------------------------------------------------


def read_points(cfg):
    """The finished points, and points.jsonl of them.

    Returns steps (n,), tokens of all stages with a budget (n,), {benchmark: scores (n,)}.
    """
    points = []
    for path in sorted(Path(cfg.out_dir).glob("*_steps_seed_*/eval/results.json")):
        folder = path.parent.parent
        results = read_json(path, dict)
        log = folder / "pretrain" / "log.jsonl"
        if not log.exists():
            log = folder / "sft" / "log.jsonl"
        # the last line of a stage has all tokens of that stage
        of_stage = {row["stage"]: row["tokens_seen"] for row in read_jsonl(log)}
        steps, seed = folder.name.split("_steps_seed_")
        point = {"steps": int(steps), "seed": int(seed), "tokens": sum(of_stage.values())}
        points.append(point | {name: results[name] for name in ("overall", *results["n"])})

    budgets = len({point["steps"] for point in points})
    needed = 3 + cfg.left_out
    if budgets < needed:
        raise ValueError(f"{cfg.out_dir} has {budgets} finished budgets, a line and what it "
                         f"predicts take {needed}: plan --run=True")
    lines = [json.dumps(point) + "\n" for point in points]
    write_atomic(Path(cfg.out_dir) / "points.jsonl", "".join(lines))
    names = list(dict.fromkeys(itertools.chain(*points)))[3:]
    left_out = [name for name in names if None in [point.get(name) for point in points]]
    if left_out:
        print(f"left out, without a score in some point: {', '.join(sorted(left_out))}")
    whole = {name: np.array([point[name] for point in points])
             for name in names if name not in left_out}
    if not whole:
        raise ValueError(f"{cfg.out_dir}: no benchmark has a score in every point")
    steps = np.array([point["steps"] for point in points])
    return steps, np.array([point["tokens"] for point in points]), whole


def growth(steps, tokens, y, n_left_out):
    """What the points of a benchmark say of its growth, as numbers; half: of a 95 % interval.

    bends_p: a straight line lacks fit so often by chance. NAME_predicts: the largest budget, by the
    budgets that are not left out, see predict_largest.
    """
    line = fit_line(np.log10(tokens), y)
    f, p = lack_of_fit(np.log10(tokens), y, steps)
    measured, rivals = predict_largest(tokens, y, steps, n_left_out)
    row = {
        "points": len(y), "per_tenfold": line.b, "per_tenfold_half": line.half, "error": line.error,
        "r2": line.r2, "linear_r2": fit_line(tokens, y).r2, "bends_f": f, "bends_p": p,
        "largest_measured": measured}
    for rival, (middle, half) in rivals.items():
        row |= {f"{rival}_predicts": middle, f"{rival}_half": half}
        holds = None
        if half is not None:
            holds = bool(abs(measured - middle) <= half)
        row[f"{rival}_holds"] = holds
    return {key: round(value, 3) if isinstance(value, float) else value
            for key, value in row.items()}


def fit_points(cfg):
    """Print a line for each benchmark and, on the last line, all of them as JSON."""
    steps, tokens, scores = read_points(cfg)
    rows = [{"benchmark": name} | growth(steps, tokens, y, cfg.left_out)
            for name, y in scores.items()]
    print(f"{len(tokens)} points, {tokens.min():,} to {tokens.max():,} tokens; "
          f"the {cfg.left_out} largest of {len(set(steps.tolist()))} budgets are predicted from "
          "the others; all intervals 95 %\n")
    header = ["benchmark", "points per tenfold of the data", "straight line: p",
              "largest budget measured", "log predicts", "linear predicts", "no growth predicts"]
    print_cells(header)
    print_cells(["---"] * len(header))
    for row in rows:
        slope = f"{row['per_tenfold']:.1f} ± {row['per_tenfold_half']:.1f}"
        bends = "-" if row["bends_p"] is None else f"{row['bends_p']:.3f}"
        cells = [row["benchmark"], slope, bends, f"{row['largest_measured']:.1f}"]
        print_cells(cells + [told(row, rival) for rival in ("log", "linear", "none")])
    print(json.dumps(rows))


def told(row, rival):
    """The prediction of a rival, its interval, and whether the measured mean is in it."""
    middle = f"{row[f'{rival}_predicts']:.1f}"
    if row[f"{rival}_half"] is None:
        return middle
    holds = "holds" if row[f"{rival}_holds"] else "fails"
    return f"{middle} ± {row[f'{rival}_half']:.1f}, {holds}"


def print_cells(cells):
    print(f"| {' | '.join(str(cell) for cell in cells)} |")


def plot_points(cfg):
    """scaling.png: the scores of all points over their tokens, with the fitted lines."""
    from matplotlib.figure import Figure
    _, tokens, scores = read_points(cfg)
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    ends = np.array([tokens.min(), tokens.max()])
    for name, y in scores.items():
        line = fit_line(np.log10(tokens), y)
        label = f"{name}: {line.b:+.1f} ± {line.half:.1f} per tenfold"
        dots, = axes.plot(tokens, y, "o", ms=4, label=label)
        width = 2.5 if name == "overall" else 1
        axes.plot(ends, line.a + line.b * np.log10(ends), lw=width, color=dots.get_color())
    axes.set(xscale="log", xlabel="tokens of the stages with a budget", ylabel="score")
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
