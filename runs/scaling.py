"""Does a score grow with the logarithm of the pretraining data? Plan the runs, fit score = a + b log10(tokens), plot.

    python -m runs.scaling plan --steps=1000,4000,16000 --train="config/pretrain_2b.py --init_from=start_2b --data=c.json" \
        --sft="config/sft_2b.py --knowledge.data=k.json --instruction.data=i.json --preference.data=p.json" \
        --eval="--data_dir=LMUData --benchmarks=all" --processes=8
    python -m runs.scaling plan ... --run=True            # runs what is not finished; the same command goes on
    python -m runs.scaling fit --out_dir=out/scaling      # lines with errors, and the largest budget predicted by the others
    python -m runs.scaling plot --out_dir=out/scaling     # scaling.png, in out_dir

SAIL-VL's second claim (arXiv 2501.05952): scores rise by as much for each tenfold of the data, from billions to 655B
tokens, also after the same fine-tuning. Each point is a run of its own with a whole schedule, for what a cosine is
stopped in before its end is worth less than a run that was meant to end there.
"""
import itertools, json, re, shlex, sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.metrics import read_log
from configurator import configure, run_script
from inputs.files import read_json
from runs.plan import run_plan

@dataclass(slots=True)
class Config:
    out_dir: str = "out/scaling"  # a folder for each point; scaling.png
    steps: str = ""  # budgets: steps of every stage of pretraining, separated by commas
    seeds: str = "1"  # each budget is run with each of them
    train: str = ""  # words for train.py
    stages: str = "alignment,advance"  # of train.py, each of so many steps, 3 % of them warm-up
    sft: str = ""  # words for sft.py, after each pretraining; "": the pretrained model is evaluated
    model: str = ""  # which is evaluated: sft/STAGE or pretrain/STAGE; "": sft/preference, or the last of pretraining
    eval: str = ""  # words for eval.py
    processes: int = 1  # of torchrun on this machine
    run: bool = False  # run the commands instead of printing them

# ---- plan ------------------------------------------------------------------------------------------------------------
def commands(cfg, folder, steps, seed):
    """The command lines of a point: pretraining, fine-tuning where there is one, benchmarks."""
    stages, warmup, out = cfg.stages.split(","), -(-3 * steps // 100), f"--out_dir={folder}"
    budget = [f"--{stage}.{key}={n}" for stage in stages for key, n in (("steps", steps), ("warmup_steps", warmup))]
    budget += [f"--stages={cfg.stages}", f"--seed={seed}"]
    train = ["train.py", *shlex.split(cfg.train), *budget, f"{out}/pretrain"]
    start = f"--init_from={folder}/pretrain/{stages[-1]}"
    sft = [["sft.py", *shlex.split(cfg.sft), start, f"--seed={seed}", f"{out}/sft"]] * bool(cfg.sft)
    model = f"{folder}/{cfg.model or ('sft/preference' if cfg.sft else f'pretrain/{stages[-1]}')}"
    return [train, *sft, ["eval.py", *shlex.split(cfg.eval), f"--model={model}", f"{out}/eval"]]

def plan(cfg):
    """Print or run the commands of all points, the smallest budget first; a finished point is passed over."""
    if not (cfg.train and cfg.eval and re.fullmatch(r"\d+(,\d+)* \d+(,\d+)*", f"{cfg.steps} {cfg.seeds}")):
        raise ValueError('give --steps=1000,4000,16000, --seeds=1,2, --train="CONFIG ..." and --eval="..."')
    for steps, seed in itertools.product(sorted(map(int, cfg.steps.split(","))), cfg.seeds.split(",")):
        folder = Path(cfg.out_dir) / f"{steps}_steps_seed_{seed}"
        run_plan(folder, commands(cfg, folder, steps, seed), cfg.run, cfg.processes)

# ---- fit, plot -------------------------------------------------------------------------------------------------------
def points(cfg):
    """-> (steps, tokens of all pretraining, {benchmark: scores}), arrays (n,) of the points that are finished."""
    steps, tokens, scores = [], [], defaultdict(list)
    for path in sorted(Path(cfg.out_dir).glob("*_steps_seed_*/eval/results.json")):
        steps.append(int(path.parts[-3].split("_")[0]))
        results, log = read_json(path, dict), read_log(path.parent.parent / "pretrain" / "log.jsonl")
        tokens.append(sum({row["stage"]: row["tokens_seen"] for row in log}.values()))     # of each stage's last line
        for name in ("overall", *results["n"]): scores[name].append(results[name])
    if len({*steps}) < 3:
        raise ValueError(f"{cfg.out_dir} has {len({*steps})} finished budgets, a line takes 3: plan --run=True")
    whole = {name: np.array(y) for name, y in scores.items() if len(y) == len(steps) and None not in y}
    if left := scores.keys() - whole: print(f"left out, without a score in some point: {', '.join(sorted(left))}")
    if not whole: raise ValueError(f"{cfg.out_dir}: no benchmark has a score in every point")
    return np.array(steps), np.array(tokens), whole

def line(x, y):
    """Least squares of y = a + b x -> (a, b, standard error of b, share of the variance that the line explains)."""
    x0, y0 = x - x.mean(), y - y.mean()
    b = (x0 * y0).sum() / (x0 ** 2).sum()
    left, whole = ((y0 - b * x0) ** 2).sum(), (y0 ** 2).sum()
    error = (left / max(1, len(x) - 2) / (x0 ** 2).sum()) ** 0.5
    return y.mean() - b * x.mean(), b, error, 1 - left / whole if whole > 1e-9 else 0.0

def fit(cfg):
    """Print a line for each benchmark, at last as JSON. linear_r2: of a + b tokens, what the logarithm must beat."""
    steps, tokens, scores = points(cfg)
    x, largest, rows = np.log10(tokens), steps == steps.max(), []
    for name, y in scores.items():
        _, b, error, r2 = line(x, y)
        row = dict(benchmark=name, points=len(y), per_tenfold=b, error=error, r2=r2, linear_r2=line(tokens, y)[3])
        low, rise, *_ = line(x[~largest], y[~largest])
        row |= dict(largest_predicted=low + rise * x[largest].mean(), largest_measured=y[largest].mean())
        rows.append({k: round(float(v), 3) if isinstance(v, float) else v for k, v in row.items()})
    print(f"{len(tokens)} points, {tokens.min():,} to {tokens.max():,} tokens", "", sep="\n")
    for cells in rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows):
        print(f"| {' | '.join(map(str, cells))} |")
    print(json.dumps(rows))

def plot(cfg):
    """scaling.png: the scores of all points over their tokens, with the fitted lines."""
    from matplotlib.figure import Figure
    _, tokens, scores = points(cfg)
    ax, ends = Figure(figsize=(7, 4.5), layout="constrained").subplots(), np.array([tokens.min(), tokens.max()])
    for name, y in scores.items():
        a, b, *_ = line(np.log10(tokens), y)
        dots, = ax.plot(tokens, y, "o", ms=4, label=f"{name}: {b:+.1f} per tenfold")
        ax.plot(ends, a + b * np.log10(ends), lw=2.5 if name == "overall" else 1, color=dots.get_color())
    ax.set(xscale="log", xlabel="tokens of pretraining", ylabel="score")
    ax.legend(frameon=False)
    ax.figure.savefig(path := Path(cfg.out_dir) / "scaling.png", dpi=120)
    print(f"wrote {path}")

PARTS = dict(plan=plan, fit=fit, plot=plot)

def main():
    part, *flags = sys.argv[1:] or [""]
    if part not in PARTS: raise ValueError(f"write scaling.py {'|'.join(PARTS)} [--out_dir=DIR ...]; or plan --help")
    configure(cfg := Config(), flags)
    PARTS[part](cfg)

if __name__ == "__main__":
    run_script(main)
