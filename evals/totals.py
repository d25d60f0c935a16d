"""How points become the score of a benchmark: (rows, reads, points) -> (score 0-100, details).

The three lists run side by side: a row, what was read of its prediction, its points from 0 to 1.
The names in brackets are VLMEvalKit's functions that do the same.
"""
import collections
import math

from evals.scorers import as_list

# Name of a part of the details -> the column whose values it tells apart.
DETAIL_COLUMNS = {
    "categories": "category", "l2_categories": "l2-category", "splits": "split", "tasks": "task",
    "skills": "skills"}
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
PERCEPTION = (
    "OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position",
    "posters", "scene")
REASONING = (
    "code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


def together(total, row):
    """What a row shares with those that `total` counts with it; the index of one that is alone."""
    if total is circular:
        return row.get("g_index") or _index_number(row, row["index"]) % 1_000_000
    if total is mme:
        return row["category"], row["image_path"]
    if total is hallusion:
        return row["l2-category"], _figure_names(row)[0]
    return row["index"]


def percent(part, whole):
    return round(100 * part / whole, 2) if whole else 0.0


def mean(rows, reads, points):
    """The mean, and the means by category, split, task and skill where there are such columns.

    report_acc, MathVista_acc.
    """
    details = {}
    for name, column in DETAIL_COLUMNS.items():
        groups = collections.defaultdict(list)
        for row, p in zip(rows, points, strict=True):
            for key in as_list(row.get(column, "")):
                groups[key].append(p)
        if set(groups) - {""}:
            details[name] = {key: percent(sum(group), len(group))
                             for key, group in sorted(groups.items())}
    return percent(sum(points), len(rows)), details


def capabilities(rows, reads, points):
    """The mean, and that of each capability over the rows whose category names it (MMVet_acc)."""
    score, details = mean(rows, reads, points)
    details["capabilities"] = {}
    for name in CAPABILITIES:
        group = [p for row, p in zip(rows, points, strict=True) if name in row["category"]]
        details["capabilities"][name] = percent(sum(group), len(group))
    return score, details


# ---- MMBench ------------------------------------------------------------------------------------

def circular(rows, reads, points):
    """A question counts if it is right in every rotation of its options (mcq_circular_eval).

    The index of a rotation is that of the question + k * 1,000,000.
    """
    rotations = collections.defaultdict(list)
    for row, p in zip(rows, points, strict=True):
        question = row.get("g_index") or _index_number(row, row["index"]) % 1_000_000
        rotations[_index_number(row, question)].append(p)
    questions = []
    all_right = []
    for row in rows:
        number = _index_number(row, row["index"])
        if number in rotations:
            questions.append(row)
            all_right.append(math.prod(rotations[number]))
    if not questions:
        raise ValueError("no row with an index below 1,000,000: the questions whose rotations "
                         "these are, are missing")
    score, details = mean(questions, reads, all_right)
    return score, {"questions": len(questions), **details}


def _index_number(row, cell):
    try:
        return int(float(cell))
    except (ValueError, OverflowError):
        raise ValueError(f"row {row['index']!r}: index and g_index must be numbers, "
                         "question + k * 1,000,000") from None


# ---- yes or no ----------------------------------------------------------------------------------

def rates(rows, reads):
    """Precision, recall, F1 and share of yes, in percent (cal_f1_score in POPE_rating).

    Yes is the positive class. What cannot be read counts as no.
    """
    answers = [row["answer"].strip().lower() for row in rows]
    n_true = answers.count("yes")
    n_said = reads.count("yes")
    n_hits = sum(answer == read == "yes" for answer, read in zip(answers, reads, strict=True))
    return {"precision": percent(n_hits, n_said), "recall": percent(n_hits, n_true),
            "f1": percent(2 * n_hits, n_said + n_true), "yes_ratio": percent(n_said, len(rows))}


def pope(rows, reads, points):
    """F1. A row counts once for each of its comma-separated categories (POPE_rating)."""
    every = []
    groups = collections.defaultdict(list)
    for one in zip(rows, reads, points, strict=True):
        for category in one[0].get("category", "").split(","):
            every.append(one)
            groups[category].append(one)
    f1 = {}
    for category, group in sorted(groups.items()):
        f1[category] = rates([row for row, _, _ in group], [read for _, read, _ in group])["f1"]
    total = rates([row for row, _, _ in every], [read for _, read, _ in every])
    accuracy = percent(sum(p for _, _, p in every), len(every))
    return total["f1"], {"accuracy": accuracy, **total, "categories": f1}


def mme(rows, reads, points):
    """Sum over 14 categories of 100 * (accuracy + share of images all right), / 28 (MME_rating).

    An image is right where both of its questions are.
    """
    # Category -> image -> points of its questions.
    images = collections.defaultdict(lambda: collections.defaultdict(list))
    for row, p in zip(rows, points, strict=True):
        images[row["category"]][row["image_path"]].append(p)
    by_category = {category: _mme_category(list(group.values()))
                   for category, group in sorted(images.items())}
    perception = sum(by_category.get(name, 0) for name in PERCEPTION)
    reasoning = sum(by_category.get(name, 0) for name in REASONING)
    total = perception + reasoning
    missing = [name for name in PERCEPTION + REASONING if name not in by_category]
    details = {"perception": perception, "reasoning": reasoning, "total": total,
               "categories": by_category, "missing_categories": missing}
    halves = sum(len(p) < 2 for group in images.values() for p in group.values())
    if missing or halves:
        details["warning"] = (
            f"only a part of MME: {len(missing)} of 14 categories are missing, {halves} images "
            "have one of their two questions; both count as 0")
    return round(total / 28, 2), details


def _mme_category(images):
    """The points of each image's questions -> 0 to 200."""
    n_questions = sum(len(p) for p in images)
    n_right = sum(sum(p) for p in images)
    n_images_right = sum(len(p) > 1 and all(p[:2]) for p in images)
    return 100 * (n_right / n_questions + n_images_right / len(images))


def hallusion(rows, reads, points):
    """The mean of three accuracies (Hallusion_rating).

    They are those of answers (aAcc), of figures with every question right (fAcc) and of questions
    right on every figure (qAcc). Part 4 to 6 of the index name set, figure and question.
    """
    figures = collections.defaultdict(list)
    questions = collections.defaultdict(list)
    for row, p in zip(rows, points, strict=True):
        names = _figure_names(row)
        subject = (row["l2-category"], names[0])
        figures[subject, names[1]].append(p)
        questions[subject, names[2]].append(p)
    answers_right = sum(points) / len(rows)
    figures_right = sum(map(all, figures.values())) / len(figures)
    questions_right = sum(map(all, questions.values())) / len(questions)
    _, details = mean(rows, reads, points)
    three = {"aAcc": percent(answers_right, 1), "fAcc": percent(figures_right, 1),
             "qAcc": percent(questions_right, 1)}
    return percent(answers_right + figures_right + questions_right, 3), three | details


def _figure_names(row):
    """[set, figure, question] of an index of HallusionBench."""
    parts = row["index"].split("_")
    if len(parts) < 6:
        raise ValueError(f"index {row['index']!r} does not name set, figure and question")
    return parts[3:6]


# ---- OCRBench -----------------------------------------------------------------------------------

def ocrbench_total(rows, reads, points):
    """Right answers of 1,000 / 10 (OCRBench.evaluate)."""
    right = collections.Counter(row["category"] for row, p in zip(rows, points, strict=True) if p)
    n_right = right.total()
    text = sum(n for category, n in right.items()
               if category.endswith("Recognition") and "Mathematical" not in category)
    details = {"final_score": n_right, "Text Recognition": text, "categories": dict(right)}
    if len(rows) < 1000:
        details["warning"] = (
            f"only a part of OCRBench: {len(rows)} of 1,000 questions, the others count as wrong; "
            f"of these {percent(n_right, len(rows))} % are right")
    return n_right / 10, details
