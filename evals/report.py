"""What a run shows: report.html, one self-contained page, and the tables on the terminal."""
import json
from pathlib import Path

from evals.files import open_picture
from evals.score import read_answers
from evals.scorers import options
from evals.table import KNOWN, PAPER
from inputs.images import picture_uri

FOLDER = Path(__file__).resolve().parent


def question_cards(b, rows, pairs, scored, report_rows, judge=None):
    """Cards of `report_rows` rows of a benchmark: wrong answers first, then others.

    If there are more of a kind than have room, they are evenly spread over the file. rows: those of
    the (row, pictures) pairs with `prediction`. scored: as for question_card.
    """
    found = read_answers(b, rows, judge)
    wrong = [i for i, (_, points) in enumerate(found) if points < 1]
    right = [i for i, (_, points) in enumerate(found) if points >= 1]
    chosen = spread(wrong, report_rows)
    chosen += spread(right, report_rows - len(chosen))
    cards = []
    for i in chosen:
        _, pictures = pairs[i]
        cards.append(question_card(b.name, rows[i], pictures, found[i], scored))
    return cards


def spread(items, n):
    """At most n of a list, evenly spread over it."""
    n = min(n, len(items))
    return [items[len(items) * k // n] for k in range(n)]


def question_card(name, row, pictures, found, scored=True):
    """What the page shows of a row with `prediction`.

    found: (what was read, points). scored: whether the benchmark has a score; if not, what could
    not be read waits for a judge.
    """
    read, points = found
    category = row.get("category") or row.get("l2-category", "")
    return {
        **row,
        "name": name,
        "verdict": verdict(read, points, scored),
        "read": read,
        "category": category,
        "options": options(row),
        "pictures": [picture_uri(open_picture(row, picture)) for picture in pictures],
    }


def verdict(read, points, scored):
    if not read and not scored:
        return "not scored"
    if points >= 1:
        return "right"
    return "partly" if points else "wrong"


def report_html(results, cards, free):
    """report.html with its style and data in place."""
    data = json.dumps({"results": results, "cards": cards, "free": free}, ensure_ascii=False)
    # What a model says may hold markup. No tag can begin inside of the data.
    data = data.replace("<", "\\u003c")
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    page = (FOLDER / "report.html").read_text(encoding="utf-8")
    return page.replace("<!--style-->", style).replace("<!--data-->", data)


# ---- the terminal -------------------------------------------------------------------------------

def print_results(results, controls):
    """The scores beside those of the controls, the published ones below, then the warnings.

    controls: names of parts of the results in the same form, such as blind and chance.
    """
    names = list(results["n"])
    print_row("benchmark", "n", "score", *controls)
    for name in (*names, "overall"):
        others = [results[control][name] for control in controls]
        print_row(name, results["n"].get(name, ""), results[name], *others)
        if name in results["scorers"] and name not in KNOWN:
            print_own(results, name)
    if results["published"]:
        print_published(results)
    for name, reason in results["left_out"].items():
        print(f"{name} is not in the averages: {reason}")
    for name, details in results["details"].items():
        if "warning" in details:
            print(f"warning: {name}: {details['warning']}")


def print_own(results, name):
    """How a file of one's own was scored, and the score of each of its categories."""
    print(f"  scorer {results['scorers'][name]}")
    for category, score in results["details"][name].get("categories", {}).items():
        print_row(f"  {category or '(no category)'}", "", score)


def print_published(results):
    """The averages of this model and of the published ones that have these averages."""
    groups = results["groups"]
    models = {"this model": results | groups, **results["published"]}
    for name, row in models.items():
        if "overall" in row:
            print_row(name, row["overall"], *(row.get(group) for group in groups))
    absent = ", ".join(name for name in PAPER if results.get(name) is None)
    if not absent and results["limit"]:
        absent = "all rows"
    added = ", ".join(name for name in results["n"] if name not in PAPER)
    if absent:
        print(f"not comparable with the published averages: without {absent}")
    elif added:
        print(f"not comparable with the published averages: with {added}")


def print_row(name, *cells):
    print(f"{name:20s}", *(f"{'n/a' if cell is None else cell:>9}" for cell in cells))
