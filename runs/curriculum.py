"""Does the order of the fine-tuning data matter, and is it the order or the schedule?

    python -m runs.curriculum plan --start=out/start_{seed} --data=shards/sft_{seed} --seeds=1,2 \\
        --eval="--data_dir=shards/bench --benchmarks=toy,toy_steps" --run=True
    python -m runs.curriculum compare

SAIL-VL's third claim (arXiv 2501.05952): stages of rising quality and complexity surpass one stage
of the same data mixed. Its comparison changes two things: the order of the samples, and the
schedule, which three stages begin three times. Here each order runs under both schedules, on the
same samples, each seen once and packed as they come. Rates are the same in all arms and stages.

--data holds the tars of `python -m toy --parts=knowledge,instruction,preference`; {seed} in a path
or flag stands for the seed, so that each has samples, wrong answers and a projector of its own.
"""
import itertools
import json
import random
import re
import shlex
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, run_script, setting, subcommand
from evals.files import read_benchmark
from evals.score import read_answers
from evals.table import KNOWN
from inputs.files import atomic_write, read_json, write_atomic
from inputs.packing import Packs, PackSettings
from inputs.sources import open_sources
from inputs.tars import add_member, open_tar, tar_key, tar_members
from inputs.tokenizer import Tokenizer
from runs.intervals import bootstrap_interval, paired_difference
from runs.plan import run_plan
from weights import inspect_folder

LEVELS_OF_SFT = ("knowledge", "instruction", "preference")
ORDERS = ("curriculum", "mixed", "reversed")
# three: a warm-up and a cosine for each third, with a fresh optimizer. one: one for all.
SCHEDULES = ("three", "one")
ARMS = tuple(itertools.product(ORDERS, SCHEDULES))
# What is compared: (what the difference is due to, arm, arm it is compared with).
CONTRASTS = (
    ("order, under three schedules", ("curriculum", "three"), ("mixed", "three")),
    ("order, under one schedule", ("curriculum", "one"), ("mixed", "one")),
    ("reversed order, under three schedules", ("reversed", "three"), ("mixed", "three")),
    ("reversed order, under one schedule", ("reversed", "one"), ("mixed", "one")),
    ("schedule, mixed data", ("mixed", "three"), ("mixed", "one")),
    ("schedule, curriculum", ("curriculum", "three"), ("curriculum", "one")),
    ("order and schedule together", ("curriculum", "three"), ("mixed", "one")),
)
# Peak rates at --rate=1: those of config/toy_sft.py's first stage.
PEAK_RATES = {"lr_vision": 6e-4, "lr_projector": 2.5e-3, "lr_llm": 2.5e-4}


@dataclass(slots=True)
class Config:
    out_dir: str = setting("out/curriculum", filled=True)  # a folder for each run; results.jsonl
    start: str = ""  # model folder that fine-tuning starts from, may name {seed}
    data: str = ""  # folder of knowledge-*.tar and so on, may name {seed}
    seeds: str = "1"  # of the order of the samples; each arm is run with each of them
    schedules: str = setting("three,one", filled=True)  # which of them to plan
    rate: float = setting(0.5, above=0, at_most=100)  # times the peak rates of config/toy_sft.py
    tokens_per_pack: int = setting(400, at_least=1, at_most=2**22)  # a step is one pack
    sft: str = "config/toy_sft.py --num_workers=0 --save_every=100000"  # more flags for sft.py
    eval: str = ""  # flags for eval.py
    run: bool = False  # run the commands instead of printing them


# ---- the data of an order ------------------------------------------------------------------------


def read_samples(paths):
    """The samples of tars, in order: [[(file name, bytes), ...], ...]."""
    samples = {}
    for path in paths:
        with open_tar(path) as tar:
            for member in tar_members(tar):
                key = tar_key(member)
                content = tar.extractfile(member).read()
                samples.setdefault(key, []).append((member.name, content))
    return list(samples.values())


def write_samples(samples, path):
    with atomic_write(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in itertools.chain(*samples):
                add_member(tar, name, content)


def write_orders(data, folder, seed, count):
    """Write the samples of `data` in each order, as folder/ORDER_1.tar to ORDER_3.tar.

    The thirds of the mixed order are as long in steps as those of the curriculum, by `count`, which
    says how many packs the samples of some tars fill.
    """
    if (folder / "reversed_3.tar").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    levels = []
    steps = []
    for level in LEVELS_OF_SFT:
        paths = sorted(Path(data).glob(f"{level}-*.tar"))
        if not paths:
            raise ValueError(f"{data} has no {level}-*.tar: python -m toy --out={data} "
                             f"--parts={','.join(LEVELS_OF_SFT)}")
        levels.append(read_samples(paths))
        steps.append(count(f"{data}/{level}-*.tar"))
    mixed = list(itertools.chain(*levels))
    random.Random(f"{seed}/mixed").shuffle(mixed)
    ends = [round(len(mixed) * share / sum(steps)) for share in itertools.accumulate(steps)]
    thirds = [mixed[a:b] for a, b in itertools.pairwise([0, *ends])]
    for order, parts in (("curriculum", levels), ("mixed", thirds), ("reversed", levels[::-1])):
        for k, samples in enumerate(parts, 1):
            write_samples(samples, folder / f"{order}_{k}.tar")


def pack_counter(model, tokens_per_pack):
    """A function: data -> number of packs that its samples fill in order, for this model folder."""
    tokenizer = Tokenizer(model)
    about = inspect_folder(model)
    template = about.config.get("template", "sailvl-chat")
    settings = PackSettings(
        tile_size=about.vision.image_size,
        tokens_per_tile=about.vision.tokens_per_tile,
        max_tiles=4,
        tokens_per_pack=tokens_per_pack,
        tiles_per_pack=40,
        shuffle=False,
    )

    def count(data):
        packs = Packs(open_sources(data, tokenizer, template), settings)
        windows = range(0, packs.n, settings.window)
        return sum(len(packs.plan_window(0, w)[0]) for w in range(len(windows)))

    return count


# ---- plan ----------------------------------------------------------------------------------------


def arm_commands(cfg, folder, arm, seed, count):
    """The command lines of a run: fine-tuning of an arm, then the benchmarks."""
    order, schedule = arm
    data = folder.parent / f"data_seed_{seed}"
    parts = [str(data / f"{order}_{k}.tar") for k in (1, 2, 3)]
    stages = dict(zip(LEVELS_OF_SFT, parts, strict=True))
    if schedule == "one":
        stages = {"knowledge": ",".join(parts)}

    train = ["sft.py", *shlex.split(cfg.sft.replace("{seed}", seed)), "--shuffle=False"]
    train += [f"--init_from={cfg.start.replace('{seed}', seed)}", f"--stages={','.join(stages)}"]
    for stage, spec in stages.items():
        steps = count(spec)
        train += [f"--{stage}.data={spec}", f"--{stage}.steps={steps}"]
        train += [f"--{stage}.warmup_steps={max(1, round(0.04 * steps))}"]
        train += [f"--{stage}.{name}={rate * cfg.rate:.6g}" for name, rate in PEAK_RATES.items()]
    train += [f"--tokens_per_pack={cfg.tokens_per_pack}", f"--seed={seed}", "--threads=1"]
    train += [f"--out_dir={folder}/sft"]
    model = f"--model={folder}/sft/{list(stages)[-1]}"
    test = ["eval.py", *shlex.split(cfg.eval.replace("{seed}", seed)), model]
    return [train, [*test, f"--out_dir={folder}/eval"]]


def plan_arms(cfg):
    """Print or run the commands of all arms, seed by seed. What is finished is passed over."""
    if not (cfg.start and cfg.data and cfg.eval and re.fullmatch(r"\d+(,\d+)*", cfg.seeds)):
        raise ValueError('give --start=MODEL_FOLDER, --data=DIR, --seeds=1,2 and --eval="..."')
    schedules = cfg.schedules.split(",")
    if not set(schedules) <= set(SCHEDULES):
        raise ValueError(f"--schedules={cfg.schedules}: give three, one, or three,one")
    for seed in cfg.seeds.split(","):
        count = pack_counter(cfg.start.replace("{seed}", seed), cfg.tokens_per_pack)
        out = Path(cfg.out_dir)
        write_orders(cfg.data.replace("{seed}", seed), out / f"data_seed_{seed}", seed, count)
        for order, schedule in itertools.product(ORDERS, schedules):
            folder = out / f"{order}_{schedule}_seed_{seed}"
            run_plan(folder, arm_commands(cfg, folder, (order, schedule), seed, count), cfg.run)


# ---- compare -------------------------------------------------------------------------------------


def read_runs(out_dir):
    """{(order, schedule): {seed: folder of its evaluation}} of what is finished."""
    runs = {}
    for path in sorted(Path(out_dir).glob("*_seed_*/eval/results.json")):
        order, schedule, _, seed = path.parent.parent.name.split("_")
        runs.setdefault((order, schedule), {})[int(seed)] = path.parent
    return runs


def points_of_questions(folder, name):
    """The points, 0 to 100, of each question of a benchmark, (questions,)."""
    rows, _ = read_benchmark(folder / f"{name}.tsv", KNOWN[name].columns)
    return 100 * np.array([float(points) for _, points in read_answers(KNOWN[name], rows)])


def contrast(one, other, names):
    """The difference of two arms over some benchmarks.

    one, other: {seed: folder}. Returns a row over the seeds that both have: paired_difference, as
    if with other seeds, and by_question: a bootstrap's 95 % interval, as if with other questions
    and the same seeds.
    """
    seeds = sorted(one.keys() & other.keys())
    per_question = []
    per_seed = np.zeros(len(seeds))
    for name in names:
        differences = [points_of_questions(one[seed], name)
                       - points_of_questions(other[seed], name) for seed in seeds]
        per_question.append(np.mean(differences, 0))
        per_seed += [difference.mean() / len(names) for difference in differences]
    low, high = bootstrap_interval(per_question)
    asked = {"by_question": [round(low, 2), round(high, 2)]}
    return {"seeds": seeds} | paired_difference(per_seed) | asked


def compare_arms(cfg):
    """Print every arm's scores and the contrasts; results.jsonl and contrasts.jsonl keep them."""
    runs = read_runs(cfg.out_dir)
    if not runs:
        raise ValueError(f"{cfg.out_dir} has no finished run: plan --run=True")
    results = []
    for (order, schedule), folders in runs.items():
        for seed, folder in folders.items():
            found = read_json(folder / "results.json", dict)
            scores = {name: found[name] for name in ("overall", *found["n"])}
            results.append({"order": order, "schedule": schedule, "seed": seed} | scores)
    names = [name for name in results[0] if name in KNOWN]
    print(f"| order | schedule | seeds | overall | {' | '.join(names)} |")
    print("|---" * (4 + len(names)) + "|")
    for order, schedule in ARMS:
        rows = [row for row in results if (row["order"], row["schedule"]) == (order, schedule)]
        if rows:
            means = [f"{np.mean([row[name] for row in rows]):.1f}" for name in ("overall", *names)]
            print(f"| {order} | {schedule} | {len(rows)} | {' | '.join(means)} |")

    rows = []
    for due_to, one, other in CONTRASTS:
        if runs.get(one, {}).keys() & runs.get(other, {}).keys():
            for metric in ("overall", *names):
                chosen = names if metric == "overall" else [metric]
                row = contrast(runs[one], runs[other], chosen)
                rows.append({"due_to": due_to, "metric": metric} | row)
    print("\n| due to | score | difference | 95 % by seed | 95 % by question |")
    print("|---" * 5 + "|")
    for row in rows:
        print(f"| {row['due_to']} | {row['metric']} | {row['difference']:+.2f} | "
              f"{row['by_seed'] or 'one seed'} | {row['by_question']} |")
    for name, lines in (("results", results), ("contrasts", rows)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(Path(cfg.out_dir) / f"{name}.jsonl", text)


CURRICULUM_PARTS = {"plan": plan_arms, "compare": compare_arms}


def main():
    cfg = Config()
    usage = "python -m runs.curriculum plan | compare [--out_dir=DIR ...]"
    part, flags = subcommand(CURRICULUM_PARTS, usage, cfg)
    configure(cfg, flags)
    part(cfg)


if __name__ == "__main__":
    run_script(main)
