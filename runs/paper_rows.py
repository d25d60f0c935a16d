"""What the runs of runs/paper_in_miniature.sh left, as rows: one for each run and comparison.

Every row has its `claim`; runs/paper_page.py draws from the rows alone. All intervals are 95 %.
"""
import itertools
from pathlib import Path

import numpy as np

from inputs.files import read_json, read_jsonl
from runs.intervals import fit_line, mean_interval, paired_difference
from runs.scaling import growth

# The folder of a growth -> what grows.
GROWTHS = {
    "growth": "pretraining data",
    "sft_clean": "fine-tuning data, all answers right",
    "sft_noisy": "fine-tuning data, some answers wrong",
}
# Candidates for fine-tuning, the best first, as runs/paper_in_miniature.sh makes them.
CANDIDATES = ("clean", "wrong_10", "wrong_25", "off_topic")
# What a row of scores has beside them.
NO_SCORES = ("claim", "seed", "captions", "order", "schedule", "steps", "tokens")


def all_rows(out, llm, left_out):
    """The rows of all parts that have run. ValueError where none has."""
    starts = [scores_of(path) | {"claim": "start", "seed": int(path.parts[-3].split("_")[1])}
              for path in sorted(out.glob("start_*/eval/results.json"))]
    rows = [*starts, *means(starts, ()), *caption_rows(out / "captions")]
    for name in GROWTHS:
        rows += growth_rows(out / name, left_out)
    rows += quality_rows(rows)
    runs = [{"claim": "curriculum"} | row
            for row in read_jsonl(out / "curriculum" / "results.jsonl")]
    rows += [*runs, *means(runs, ("order", "schedule"))]
    rows += [{"claim": "curriculum"} | row
             for row in read_jsonl(out / "curriculum" / "contrasts.jsonl")]
    rows += tier_rows(out / "tiers")
    if not rows:
        raise ValueError(f"{out} has no finished run: bash runs/paper_in_miniature.sh")
    base = [{"claim": "base"} | row for row in read_jsonl(Path(llm) / "gate.jsonl")]
    return [*minute_rows(out / "minutes.jsonl"), *base, *rows]


def scores_of(path):
    """{benchmark: score} of a results.json, the overall score first."""
    results = read_json(path, dict)
    return {name: results[name] for name in ("overall", *results["n"])}


def means(rows, keys):
    """The mean scores of the rows that agree in `keys`, with half the interval of the overall."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for group in groups.values():
        first = group[0]
        names = [name for name in first if name not in NO_SCORES]
        mean = {name: round(float(np.mean([row[name] for row in group])), 2) for name in names}
        half = None
        if len(group) > 1:
            half = round(mean_interval([row["overall"] for row in group])[1], 2)
        about = {"claim": first["claim"]} | {key: first[key] for key in keys}
        found.append(about | {"mean_of": len(group)} | mean | {"overall_half": half})
    return found


def minute_rows(path):
    """The minutes of each part, in all times that it ran; the last row is the sum."""
    parts = {}
    for line in read_jsonl(path):
        minutes, cpu = parts.get(line["part"], (0, 0))
        parts[line["part"]] = (minutes + line["seconds"] / 60, cpu + line["cpu_seconds"] / 60)
    if not parts:
        return []
    parts["all"] = tuple(map(sum, zip(*parts.values(), strict=True)))
    return [{"claim": "minutes", "part": part, "minutes": round(minutes, 1),
             "cpu_minutes": round(cpu, 1)} for part, (minutes, cpu) in parts.items()]


# ---- captions ------------------------------------------------------------------------------------


def caption_rows(folder):
    """A row for each model that was pretrained on either set, their means and differences."""
    names = {"unique": "alt-text", "final": "recaptions"}
    runs = []
    for path in sorted(folder.glob("pretrained_*/eval/results.json")):
        _, captions, seed = path.parent.parent.name.split("_")
        about = {"claim": "captions", "captions": names[captions], "seed": int(seed)}
        runs.append(about | scores_of(path))
    scores = {(row["captions"], row["seed"]): row for row in runs}
    seeds = sorted({row["seed"] for row in runs})
    seeds = [seed for seed in seeds if all((name, seed) in scores for name in names.values())]
    rows = [*runs, *means(runs, ("captions",))]
    if not seeds:
        return rows
    for metric in [name for name in runs[0] if name not in NO_SCORES]:
        single = [scores["recaptions", seed][metric] - scores["alt-text", seed][metric]
                  for seed in seeds]
        rows.append({"claim": "captions", "due_to": "recaptions instead of alt-text",
                     "metric": metric, "seeds": seeds} | paired_difference(single))
    return rows


# ---- growth --------------------------------------------------------------------------------------


def growth_rows(folder, n_left_out):
    """The points of a growth, and what they say about each score."""
    points = read_jsonl(folder / "points.jsonl")
    rows = [{"claim": folder.name} | point for point in points]
    if not points:
        return []
    steps = np.array([point["steps"] for point in points])
    tokens = np.array([point["tokens"] for point in points])
    for metric in [name for name in points[0] if name not in NO_SCORES]:
        y = np.array([point[metric] for point in points])
        rows.append({"claim": folder.name, "metric": metric}
                    | growth(steps, tokens, y, n_left_out) | slope_by_seed(points, metric))
    return rows


def tenfold_slope(points, metric):
    """Points per tenfold of the tokens."""
    x = np.log10([point["tokens"] for point in points])
    return fit_line(x, np.array([point[metric] for point in points])).b


def slope_by_seed(points, metric):
    """The slope of each seed and what other seeds would give; {} if fewer than two have a line.

    Runs of a seed share projector and data, so the interval of one line through all points would
    take for independent what is not.
    """
    slopes = []
    for seed in sorted({point["seed"] for point in points}):
        own = [point for point in points if point["seed"] == seed]
        if len(own) > 2:
            slopes.append(tenfold_slope(own, metric))
    if len(slopes) < 2:
        return {}
    mean, half = mean_interval(slopes)
    return {
        "slope": round(mean, 2),
        "slope_half": round(half, 2),
        "slopes": np.round(slopes, 2).tolist(),
    }


def quality_rows(rows):
    """What right answers are worth in fine-tuning data, over all budgets: score and slope."""
    score = {}
    slope = {}
    for claim in ("sft_clean", "sft_noisy"):
        points = [row for row in rows if row["claim"] == claim and "seed" in row]
        for seed in {row["seed"] for row in points}:
            own = [row for row in points if row["seed"] == seed]
            score[claim, seed] = float(np.mean([row["overall"] for row in own]))
            slope[claim, seed] = tenfold_slope(own, "overall")
    seeds = sorted(seed for claim, seed in score if claim == "sft_clean"
                   and ("sft_noisy", seed) in score)
    found = []
    for metric, of in (("overall, mean of the budgets", score), ("points per tenfold", slope)):
        if seeds:
            single = [of["sft_clean", seed] - of["sft_noisy", seed] for seed in seeds]
            found.append({"claim": "quality", "due_to": "right answers instead of some wrong ones",
                          "metric": metric, "seeds": seeds} | paired_difference(single))
    return found


# ---- tiers of the evaluation of data -------------------------------------------------------------


def tier_rows(folder):
    """The scores of the candidates in each tier, and how often quick ranks them as full does."""
    scores = {}
    rows = []
    for path in sorted(folder.glob("*_*/ranking.json")):
        tier, seed = path.parent.name.split("_")
        row = {"claim": "tiers", "tier": tier, "seed": int(seed)}
        ranking = read_json(path, list)
        rows.append(row | dict(ranking))
        scores[tier, int(seed)] = dict(ranking)
    seeds = sorted(seed for tier, seed in scores if tier == "quick" and ("full", seed) in scores)
    if not seeds:
        return rows
    for tier in ("quick", "full"):
        mean = {name: round(float(np.mean([scores[tier, seed][name] for seed in seeds])), 2)
                for name in CANDIDATES}
        rows.append({"claim": "tiers", "tier": tier, "mean_of": len(seeds)} | mean)
    truth = {name: -place for place, name in enumerate(CANDIDATES)}
    for among, names in (("all", CANDIDATES), ("questions", CANDIDATES[:-1])):
        for one, other in (("quick", "full"), ("quick", "truth"), ("full", "truth")):
            row = {
                "claim": "tiers",
                "among": among,
                "ranks": one,
                "as": other,
                "seeds": seeds,
                "pairs": len(seeds) * len(names) * (len(names) - 1) // 2,
                "pairs_alike": 0,
                "same_best": 0,
                "same_order": 0,
            }
            for seed in seeds:
                a = scores[one, seed]
                b = truth if other == "truth" else scores[other, seed]
                row["pairs_alike"] += pairs_alike(a, b, names)
                row["same_best"] += max(names, key=a.get) == max(names, key=b.get)
                row["same_order"] += sorted(names, key=a.get) == sorted(names, key=b.get)
            rows.append(row)
    return rows


def pairs_alike(a, b, names):
    """Of so many pairs of these candidates two rankings say that the same one is better."""
    return sum((a[one] - a[other]) * (b[one] - b[other]) > 0
               for one, other in itertools.combinations(names, 2))
