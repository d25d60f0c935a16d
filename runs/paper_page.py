"""The page of runs/paper_in_miniature.sh: three claims, their figures and intervals.

    python -m runs.paper_page --out_dir=out/paper

Writes results.jsonl, one line for each run and each comparison, and index.html, which shows nothing
that is not in a line of it.
"""
import base64
import html
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, run_script, setting
from inputs.files import read_json, read_jsonl, write_atomic
from runs.intervals import fit_line, mean_interval
from runs.scaling import growth

# The folder of a growth -> what grows, and its colour.
GROWTHS = {
    "growth": ("pretraining data", "tab:blue"),
    "sft_clean": ("fine-tuning data, all answers right", "tab:green"),
    "sft_noisy": ("fine-tuning data, some answers wrong", "tab:red"),
}
PAGE_CSS = "body{font:16px sans-serif;max-width:62em;margin:2em auto;padding:0 1em}" \
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}img{max-width:100%}"


@dataclass(slots=True)
class Config:
    out_dir: str = setting("out/paper", filled=True)  # what runs/paper_in_miniature.sh left
    left_out: int = setting(1, at_least=1, at_most=100)  # largest budgets a prediction ignores
    minutes: int = setting(0, at_most=10**6)  # that the whole took; 0: not told


# ---- what the runs left --------------------------------------------------------------------------


def caption_rows(folder):
    """A row for each model that was pretrained on either set, and their paired difference."""
    scores = {"unique": {}, "final": {}}
    rows = []
    for path in sorted(folder.glob("pretrained_*/eval/results.json")):
        _, captions, seed = path.parent.parent.name.split("_")
        results = read_json(path, dict)
        scores[captions][int(seed)] = results["overall"]
        names = {"unique": "alt-text", "final": "recaptions"}
        rows.append({"claim": "captions", "captions": names[captions], "seed": int(seed)}
                    | {name: results[name] for name in ("overall", *results["n"])})
    seeds = sorted(scores["unique"].keys() & scores["final"].keys())
    if not seeds:
        return rows
    single = [scores["final"][seed] - scores["unique"][seed] for seed in seeds]
    return [*rows, {"claim": "captions", "due_to": "recaptions instead of alt-text",
                    "metric": "overall", "seeds": seeds} | paired(single)]


def paired(single):
    """The mean of paired differences and its interval; None for one seed."""
    row = {"difference": round(float(np.mean(single)), 2), "single": np.round(single, 2).tolist(),
           "by_seed": None}
    if len(single) > 1:
        mean, half = mean_interval(single)
        row["by_seed"] = [round(mean - half, 2), round(mean + half, 2)]
    return row


def growth_rows(folder, n_left_out):
    """The points of a growth, and what they say about the overall score."""
    points = read_jsonl(folder / "points.jsonl")
    if not points:
        return []
    steps, tokens, y = (np.array([point[key] for point in points])
                        for key in ("steps", "tokens", "overall"))
    rows = [{"claim": folder.name} | point for point in points]
    return [*rows, {"claim": folder.name, "metric": "overall"}
            | growth(steps, tokens, y, n_left_out)]


def all_rows(cfg):
    out = Path(cfg.out_dir)
    rows = caption_rows(out / "captions")
    for name in GROWTHS:
        rows += growth_rows(out / name, cfg.left_out)
    for name in ("results", "contrasts"):
        found = read_jsonl(out / "curriculum" / f"{name}.jsonl")
        rows += [{"claim": "curriculum"} | row for row in found]
    if not rows:
        raise ValueError(f"{out} has no finished run: bash runs/paper_in_miniature.sh")
    return rows


# ---- the picture ---------------------------------------------------------------------------------


def draw_panels(rows):
    """Three panels: captions, growth, order and schedule. Returns a PNG as bytes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    captions, growths, orders = figure.subplots(1, 3)
    draw_captions(captions, [row for row in rows if "captions" in row])
    for name, (label, color) in GROWTHS.items():
        draw_growth(growths, [row for row in rows if row["claim"] == name and "seed" in row],
                    label, color)
    growths.set(xscale="log", xlabel="tokens", ylabel="overall", title="2. growth with data")
    growths.legend(frameon=False, fontsize=8)
    contrasts = [row for row in rows if row["claim"] == "curriculum" and "due_to" in row]
    draw_contrasts(orders, [row for row in contrasts if row["metric"] == "overall"])
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    return png.getvalue()


def draw_captions(axes, rows):
    """Each seed is a line from its model of alt-text to its model of recaptions."""
    by_seed = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["captions"]] = row["overall"]
    for scores in by_seed.values():
        axes.plot(list(scores), list(scores.values()), "o-", color="tab:blue", alpha=0.6)
    axes.set(ylim=(0, 100), ylabel="overall", title="1. captions")


def draw_growth(axes, points, label, color):
    """All points, and the line through them."""
    if not points:
        return
    tokens = np.array([point["tokens"] for point in points])
    scores = np.array([point["overall"] for point in points])
    line = fit_line(np.log10(tokens), scores)
    axes.plot(tokens, scores, "o", ms=4, color=color)
    ends = np.array([tokens.min(), tokens.max()])
    text = f"{label}: {line.b:+.1f} ± {line.half:.1f} per tenfold"
    axes.plot(ends, line.a + line.b * np.log10(ends), color=color, label=text)


def draw_contrasts(axes, rows):
    """The difference of each contrast: its seeds, its mean, its interval."""
    for y, row in enumerate(rows):
        axes.plot(row["single"], [y] * len(row["single"]), "o", ms=3, color="gray")
        low, high = row["by_seed"] or row["by_question"]
        axes.plot([low, high], [y, y], color="tab:blue")
        axes.plot(row["difference"], y, "D", color="tab:blue")
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(rows)), [row["due_to"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="difference of the overall score", title="3. order and schedule")


# ---- the page ------------------------------------------------------------------------------------


def as_table(header, lines):
    def row(cells, tag):
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    body = "\n".join(row(cells, "td") for cells in lines)
    return f"<table>\n{row(header, 'th')}\n{body}\n</table>"


def difference_table(rows):
    header = ["due to", "score", "difference", "95 % by seed", "95 % by question", "seeds"]
    lines = []
    for row in rows:
        lines.append([row["due_to"], row["metric"], f"{row['difference']:+.2f}",
                      row["by_seed"] or "one seed, no interval", row.get("by_question", "-"),
                      len(row["seeds"])])
    return as_table(header, lines)


def growth_table(rows):
    header = ["grows", "points per tenfold", "straight line: p", "largest measured",
              "log predicts", "linear predicts", "no growth predicts"]
    lines = []
    for row in rows:
        slope = f"{row['per_tenfold']:.1f} ± {row['per_tenfold_half']:.1f}"
        cells = [GROWTHS[row["claim"]][0], slope, row["bends_p"], row["largest_measured"]]
        for rival in ("log", "linear", "none"):
            cells.append(f"{row[f'{rival}_predicts']} ± {row[f'{rival}_half']}")
        lines.append(cells)
    return as_table(header, lines)


def page(rows, png, minutes):
    differences = [row for row in rows if "due_to" in row]
    captions = [row for row in differences if row["claim"] == "captions"]
    orders = [row for row in differences if row["claim"] == "curriculum"]
    growths = [row for row in rows if "per_tenfold" in row]
    took = f" It took {minutes} minutes." if minutes else ""
    picture = base64.b64encode(png).decode()
    return f"""<!doctype html><meta charset="utf-8"><title>The paper in miniature</title>
<style>{PAGE_CSS}</style>
<h1>The paper in miniature</h1>
<p>SAIL-VL's three claims (arXiv 2501.05952) on the toy world. All intervals are 95 %. Every number
is in a line of results.jsonl.{took}</p>
<img src="data:image/png;base64,{picture}" alt="captions, growth, order and schedule">
<h2>1. Better captions</h2>
{difference_table(captions)}
<h2>2. More data</h2>
<p>The smaller budgets predict the largest.</p>
{growth_table(growths)}
<h2>3. A curriculum: the order apart from the schedule</h2>
{difference_table(orders)}
"""


def main():
    cfg = Config()
    configure(cfg)
    rows = all_rows(cfg)
    out = Path(cfg.out_dir)
    write_atomic(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(out / "index.html", page(rows, draw_panels(rows), cfg.minutes))
    print(f"wrote {out / 'results.jsonl'} and {out / 'index.html'}")


if __name__ == "__main__":
    run_script(main)
