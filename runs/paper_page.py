"""The tables and the picture of runs/paper_in_miniature.sh, and the page that they stand in.

    python -m runs.paper_page --out_dir=out/paper --page=docs/experiments.md

Writes page.jsonl beside the page, one line for each run and each comparison, and assets/paper.png
in the folder above. In the page, the lines between <!-- table NAME --> and <!-- end --> become that
table, which shows nothing that is not in a line of the .jsonl. --rows=True reads the .jsonl instead
of what the runs left.
"""
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, run_script, setting
from inputs.files import atomic_write, read_jsonl, write_atomic
from runs.intervals import fit_line
from runs.paper_rows import CANDIDATES, GROWTHS, NO_SCORES, all_rows

GROWTH_COLORS = dict(zip(GROWTHS, ("tab:blue", "tab:green", "tab:red"), strict=True))
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(slots=True)
class Config:
    out_dir: str = setting("out/paper", filled=True)  # what runs/paper_in_miniature.sh left
    page: str = setting("docs/experiments.md", filled=True)  # Markdown with marks for the tables
    llm: str = "toy/llm_basic"  # the language base, whose gate.jsonl says what it knows
    left_out: int = setting(1, at_least=1, at_most=100)  # largest budgets a prediction ignores
    rows: bool = False  # True: write tables and picture anew from the .jsonl


# ---- the picture ---------------------------------------------------------------------------------


def draw_panels(rows):
    """Three panels: captions, growth, order and schedule. Returns a PNG as bytes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    captions, growths, orders = figure.subplots(1, 3, width_ratios=(1, 1.6, 1.6))
    draw_captions(captions, [row for row in rows if "captions" in row and "seed" in row])
    for name, label in GROWTHS.items():
        own = [row for row in rows if row["claim"] == name]
        for row in own:
            if row.get("metric") == "overall":
                label += ": {:+.1f} ± {:.1f} per tenfold".format(*slope_of(row))
        draw_growth(growths, [row for row in own if "seed" in row], label, GROWTH_COLORS[name])
    growths.set(xscale="log", xlabel="tokens", ylabel="overall", title="2. growth with data")
    # room for the legend above the points
    low, high = growths.get_ylim()
    growths.set_ylim(low, high + 0.25 * (high - low))
    growths.legend(frameon=False, fontsize=8, loc="upper left")
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
        names = sorted(scores)
        axes.plot(names, [scores[name] for name in names], "o-", color="tab:blue", alpha=0.6)
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
    axes.plot(ends, line.a + line.b * np.log10(ends), color=color, label=label)


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


# ---- the tables ----------------------------------------------------------------------------------


def as_table(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def score_table(rows, keys):
    """Mean scores: a line for each value of `keys`, the overall score with its interval."""
    rows = [row for row in rows if "mean_of" in row]
    if not rows:
        return ""
    names = [name for name in rows[0]
             if name not in (*NO_SCORES, "mean_of", "overall", "overall_half")]
    lines = []
    for row in rows:
        half = row["overall_half"]
        overall = f"{row['overall']:.1f}" + (f" ± {half:.1f}" if half is not None else "")
        lines.append([*(row[key] for key in keys), row["mean_of"], overall,
                      *(f"{row[name]:.1f}" for name in names)])
    return as_table([*keys, "seeds", "overall", *names], lines)


def span(interval):
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}" if interval else "one seed, no interval"


def difference_table(rows, metrics=None):
    """Paired differences; metrics: of these scores alone."""
    rows = [row for row in rows if "due_to" in row
            and (metrics is None or row["metric"] in metrics)]
    lines = []
    asked = any("by_question" in row for row in rows)
    for row in rows:
        error = "-" if row["error"] is None else f"{row['error']:.2f}"
        line = [row["due_to"], row["metric"], f"**{row['difference']:+.1f}**", error,
                span(row["by_seed"])]
        if asked:
            line.append(span(row["by_question"]))
        lines.append([*line, ", ".join(f"{x:+.1f}" for x in row["single"])])
    header = ["due to", "score", "difference", "standard error", "by seed"]
    if asked:
        header.append("by question")
    return as_table([*header, "each seed"], lines) if lines else ""


def slope_of(row):
    """(points per tenfold, half of its interval): over seeds, or over all points of one seed."""
    if "slope" in row:
        return row["slope"], row["slope_half"]
    return row["per_tenfold"], row["per_tenfold_half"]


def growth_table(rows, metrics=("overall",)):
    """Slope, straightness, and the largest budget by three rivals."""
    lines = []
    for row in rows:
        if row.get("metric") not in metrics or "per_tenfold" not in row:
            continue
        slope = "**{:.1f}** ± {:.1f}".format(*slope_of(row))
        bends = "-" if row["bends_p"] is None else f"{row['bends_p']:.3f}"
        cells = [GROWTHS[row["claim"]], slope, bends, f"{row['largest_measured']:.1f}"]
        for rival in ("log", "linear", "none"):
            half = row[f"{rival}_half"]
            middle = f"{row[f'{rival}_predicts']:.1f}"
            if half is None:
                cells.append(middle)
            else:
                holds = "holds" if row[f"{rival}_holds"] else "fails"
                cells.append(f"{middle} ± {half:.1f}, {holds}")
        lines.append(cells)
    header = ["grows", "points per tenfold", "straight: p", "largest, measured",
              "by the logarithm", "by a line", "no growth"]
    return as_table(header, lines) if lines else ""


def base_table(rows):
    lines = [[row["family"], "no" if row["left_out"] else "yes", f"{row['score']:.1f}",
              f"{row['chance']:.1f}"] for row in rows]
    return as_table(["family", "taught", "score", "chance"], lines) if lines else ""


def validation_table(rows):
    """What settings were chosen by: a line for each training of one seed."""
    if not rows:
        return ""
    names = [name for name in rows[0] if name not in ("claim", "run")]
    lines = [[row["run"], *(f"{row[name]:.1f}" for name in names)] for row in rows]
    return as_table(["training", *names], lines)


def minutes_table(rows):
    lines = [[row["part"], f"{row['minutes']:.1f}", f"{row['cpu_minutes']:.1f}"] for row in rows]
    return as_table(["part", "minutes", "of processor time"], lines) if lines else ""


def tier_table(rows):
    lines = [[row["tier"], row["mean_of"], *(f"{row[name]:.1f}" for name in CANDIDATES)]
             for row in rows if "mean_of" in row]
    return as_table(["tier", "seeds", *CANDIDATES], lines) if lines else ""


def rank_table(rows):
    lines = []
    for row in rows:
        if "ranks" in row:
            n = len(row["seeds"])
            lines.append([row["among"], row["ranks"], row["as"],
                          f"{row['pairs_alike']} of {row['pairs']}",
                          f"{row['same_best']} of {n}", f"{row['same_order']} of {n}"])
    header = ["among", "the tier", "ranks as", "pairs", "the best", "the whole order"]
    return as_table(header, lines) if lines else ""


def mix_table(rows):
    """The mixes of the tiers composition and incremental, the best first."""
    lines = []
    for row in rows:
        if row.get("tier") in ("composition", "incremental"):
            lines += [[row["tier"], mix, f"{score:.1f}"] for mix, score in row.items()
                      if mix not in ("claim", "tier", "seed")]
    return as_table(["tier", "mix", "overall"], lines) if lines else ""


def tables(rows):
    """{name of a mark: its table}, "" where its part has not run."""
    def of(*claims):
        return [row for row in rows if row["claim"] in claims]

    return {
        "minutes": minutes_table(of("minutes")),
        "base": base_table(of("base")),
        "validation": validation_table(of("validation")),
        "start": score_table(of("start"), ()),
        "captions": score_table(of("captions"), ("captions",)),
        "caption_difference": difference_table(of("captions")),
        "growth": growth_table(of(*GROWTHS)),
        "growth_steps": growth_table(of(*GROWTHS), ("toy_steps",)),
        "quality": difference_table(of("quality")),
        "arms": score_table(of("curriculum"), ("order", "schedule")),
        "order": difference_table(of("curriculum"), ("overall", "toy_steps")),
        "tiers": tier_table(of("tiers")),
        "ranks": rank_table(of("tiers")),
        "mixes": mix_table(of("tiers")),
    }


def fill_page(text, rows):
    """The page with its tables. What has not run is said to be so."""
    made = tables(rows)

    def fill(match):
        if match[2] not in made:
            raise ValueError(f"the page has a mark for an unknown table {match[2]!r}: "
                             f"there are {', '.join(made)}")
        return match[1] + (made[match[2]] or "Not run.\n") + match[3]

    return MARKED.sub(fill, text)


def main():
    cfg = Config()
    configure(cfg)
    page = Path(cfg.page)
    kept = page.with_suffix(".jsonl")
    picture = page.absolute().parent.parent / "assets" / "paper.png"
    before = read_jsonl(kept)
    if cfg.rows:
        rows = before
    else:
        # Settings were chosen once, by trainings that the command does not repeat.
        chosen = [row for row in before if row["claim"] == "validation"]
        rows = chosen + all_rows(Path(cfg.out_dir), cfg.llm, cfg.left_out)
    text = fill_page(page.read_text(), rows)
    png = draw_panels(rows)
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, "".join(json.dumps(row) + "\n" for row in rows))
    with atomic_write(picture, "wb") as file:
        file.write(png)
    write_atomic(page, text)
    print(f"wrote {page}, {kept} and {picture}")


if __name__ == "__main__":
    run_script(main)
