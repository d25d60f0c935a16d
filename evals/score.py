"""From rows with predictions to scores: reading, judging, totals, chance and averages."""
import collections
from pathlib import Path

from evals.prompts import judge_prompt
from evals.scorers import as_list, graded, options, yes_no
from evals.table import KNOWN, OWN
from evals.totals import rates
from inputs.files import read_json

# Cells that VLMEvalKit takes for empty: pandas does when it reads a .tsv or .xlsx.
EMPTY_CELLS = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}


def read_answer(b, answer, row):
    """(what the scorer of a benchmark reads in an answer, points)."""
    if b.recent:
        read, points = b.scorer(answer, row, recent=True)
    else:
        read, points = b.scorer(answer, row)
    # VLMEvalKit has no reference there, so no answer is right.
    if b.jpeg and row["answer"] in EMPTY_CELLS:
        points = 0.0
    return read, points


def read_answers(b, rows, judge=None):
    """Rows with `prediction` -> [(what was read, points)].

    judge: `ask` of an endpoint.ChatClient, for what no rule reads.
    """
    if b.scorer is graded:
        found = [("", 0.0) for _ in rows]
    else:
        found = [read_answer(b, row.get("prediction", ""), row) for row in rows]
    unread = [i for i, (read, _) in enumerate(found) if not read]
    if not judge or b.judge == "no" or not unread:
        return found

    def is_valid(row):
        return lambda reply: read_answer(b, reply, row)[0] != ""

    prompts = [judge_prompt(b.scorer, rows[i]) for i in unread]
    replies = judge(prompts, [is_valid(rows[i]) for i in unread])
    for i, reply in zip(unread, replies, strict=True):
        found[i] = read_answer(b, reply, rows[i]) if reply else ("", 0.0)
    return found


def score_rows(b, rows, judge=None):
    """Rows with `prediction` -> (score 0-100 or None, details).

    A row without prediction is wrong. None comes with details["reason"]: there are answers that
    only a judge could read. What a judge was asked and cannot read is wrong, as in VLMEvalKit. But
    where all is its grading, a reply without a grade leaves the score None.
    """
    rows = [row for row in rows if not b.split or row.get("split", b.split) == b.split]
    if not rows:
        raise ValueError(f"no rows of split {b.split!r}; only those count")
    for row in rows:
        counts_as_wrong = b.jpeg and row["answer"] in EMPTY_CELLS
        if not counts_as_wrong and not "".join(as_list(row["answer"])).strip():
            raise ValueError(f"row {row['index']}: its answer is empty")
    found = read_answers(b, rows, judge)
    reads = [read for read, _ in found]
    points = [p for _, p in found]
    n_unread = reads.count("")
    details = {"n": len(rows), "correct": round(sum(points), 2), "not_readable": n_unread}
    hopeless = never_right(b, rows)
    if hopeless:
        details["never_right"] = [row.get("index") for row in hopeless]
    if b.judge == "required" and n_unread and (not judge or b.scorer is graded):
        why = "need a judge: --judge=URL --judge_model=NAME"
        if judge:
            why = "got no grade from the judge"
        details["reason"] = f"{n_unread} of {len(rows)} answers {why}"
        return None, details
    score, more = b.total(rows, reads, points)
    if b.scorer is yes_no:
        details |= rates(rows, reads)
    return score, details | more


def never_right(b, rows):
    """The rows that count as wrong whatever is answered: no answer matches their reference."""
    if b.scorer is graded:
        return []
    return [row for row in rows if not _can_be_right(b, row)]


def _can_be_right(b, row):
    """Whether the reference itself, or the letter of an option, would be a right answer."""
    answers = [*as_list(row["answer"]), row.get("answer_option", ""), *options(row), "A"]
    return any(read_answer(b, answer, row)[1] for answer in answers)


def never_right_warning(b, rows):
    """What to tell a user of such rows, "" if there are none."""
    rows = never_right(b, rows)
    if not rows:
        return ""
    named = ", ".join(f"row {row['index']} ({row['answer'][:40]!r})" for row in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return (f"{b.name}: {len(rows)} rows count as wrong whatever is answered, for nothing matches "
            f"their column 'answer': {named}{more}")


def chance_level(b, rows):
    """The score, 0-100, of answers given without looking.

    They are a random option where there are options, else the most frequent answer every time.
    """
    if b.prompt == "mcq":
        points = []
        for row in rows:
            n_options = len(options(row))
            points.append(1 / n_options if n_options else 0.0)
        return b.total(rows, [""] * len(rows), points)[0]
    counts = collections.Counter(row["answer"] for row in rows)
    favourite = as_list(counts.most_common(1)[0][0])[0]
    return score_rows(b, [row | {"prediction": favourite} for row in rows])[0]


def averages(scores):
    """{name: score} -> {"overall", "groups", "left_out"}.

    Plain means, in which the paper's groups weigh 7, 7, 2 and 2. A benchmark without a score is
    left out and named.
    """
    groups = collections.defaultdict(list)
    for name, score in scores.items():
        group = groups[KNOWN[name].group if name in KNOWN else OWN]
        if score is not None:
            group.append(score)
    return {
        "overall": _average([score for score in scores.values() if score is not None]),
        "groups": {group: _average(values) for group, values in groups.items()},
        "left_out": [name for name, score in scores.items() if score is None],
    }


def _average(values):
    return round(sum(values) / len(values), 2) if values else None


def published_scores():
    """{model: {"source": where it stands, benchmark or average: score 0-100}}.

    published.json has MME as its sum / 28 (2244, 2321, 2321 and 2149 in the first source, 2.24e3
    in the second) and OCRBench / 10. Names that a run here does not have (MMBench_DEV_V11,
    OpenCompass, ...) are not comparable with any of its own. The second source lists
    HallusionBench without a number.
    """
    found = {}
    for part in read_json(Path(__file__).with_name("published.json"), list):
        for model, scores in part["scores"].items():
            found[model] = {"source": part["source"], **scores}
    return found
