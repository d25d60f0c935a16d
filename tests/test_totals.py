"""How points become a score: worked-out cases, and tables of all small sizes."""

import itertools
import random

import pytest
from benchmark_rows import FORMULA, score_of

from evals import totals


def test_yes_no_details_take_yes_as_positive():
    pairs = (
        [("yes", "yes")] * 3
        + [("yes", "no")]
        + [("no", "yes")] * 2
        + [("no", "no")] * 3
        + [("perhaps", "no")]
    )
    value, d = score_of("toy_halluc", [{"answer": a, "prediction": p} for p, a in pairs])
    assert value == 60.0
    assert [d[k] for k in ("precision", "recall", "f1", "yes_ratio")] == [75.0, 60.0, 66.67, 40.0]
    assert score_of("toy_halluc", [{"answer": "no", "prediction": "no"}])[1]["f1"] == 0.0


def test_mmbench_counts_a_question_once_and_only_if_every_rotation_is_right():
    rows = []
    for question, right in ((3, "1111"), (4, "1101"), (5, "1"), (7, "00")):
        for k, bit in enumerate(right):
            rows.append(
                {
                    "index": str(question + k * 1_000_000),
                    "A": "a",
                    "B": "b",
                    "answer": "AB"[k % 2],
                    "prediction": "AB"[k % 2] if bit == "1" else "C",
                    "l2-category": "even" if question == 4 else "odd",
                }
            )
    rows.append(
        {
            "index": "2000009",
            "A": "a",
            "B": "b",
            "answer": "A",
            "prediction": "A",
            "l2-category": "odd",
        }
    )
    value, d = score_of("MMBench_DEV", rows)  # a rotation without its question does not count
    assert value == 50.0 and d["questions"] == 4 and d["n"] == 12
    assert d["l2_categories"] == {"even": 0.0, "odd": 66.67}
    assert score_of("MMBench_DEV", [row | {"g_index": "3"} for row in rows[:4]])[0] == 100.0


def mme_rows(predictions):
    """One image with two questions per category, all answered alike."""
    return [
        {
            "index": f"{c}{i}",
            "category": c,
            "image_path": f"{c}/1.png",
            "answer": answer,
            "prediction": p,
        }
        for c, pair in predictions.items()
        for i, (p, answer) in enumerate(zip(pair, ("Yes", "No"), strict=True))
    ]


def test_mme_adds_accuracy_and_accuracy_of_pairs_over_14_categories():
    every = totals.PERCEPTION + totals.REASONING
    assert len(totals.PERCEPTION) == 10 and len(totals.REASONING) == 4
    value, d = score_of("MME", mme_rows(dict.fromkeys(every, ("Yes", "No"))))
    assert (value, d["total"], d["perception"], d["reasoning"]) == (100.0, 2800, 2000, 800)
    assert "warning" not in d
    value, d = score_of(
        "MME", mme_rows(dict.fromkeys(every, ("Yes", "Yes.")))
    )  # half of them, no pair
    assert (value, d["total"]) == (25.0, 700) and d["categories"]["OCR"] == 50
    value, d = score_of(
        "MME", mme_rows({"OCR": ("yes", "no"), "count": ("maybe", "no"), "other": ("yes", "no")})
    )
    assert (
        d["perception"] == 250
        and value == round(250 / 28, 2)
        and "scene" in d["missing_categories"]
    )


@pytest.mark.parametrize(
    "images, points",
    [  # 1 right, 0 wrong; the questions of an image side by side
        ("11", 200),
        ("10", 50),
        ("01", 50),
        ("00", 0),
        ("11 11", 200),
        ("11 10", 125),
        ("11 00", 100),
        ("10 01", 50),
        ("10 00", 25),
        ("00 00", 0),
        ("11 11 11", 200),
        ("11 11 10", 150),
        ("11 11 00", 400 / 3),
        ("11 10 00", 250 / 3),
        ("10 10 10", 50),
        ("11 10 10", 100),
        ("00 00 10", 50 / 3),
        ("11 00 00", 200 / 3),
        ("1", 100),
        ("0", 0),
        ("11 1", 150),
        ("11 0", 350 / 3),
        ("111", 200),
        ("110", 500 / 3),
        ("101", 200 / 3),
        ("011", 200 / 3),
        ("11 11 11 11", 200),
        ("11 11 11 10", 162.5),
        ("11 11 10 00", 112.5),
        ("10 10 00 00", 25),
        ("11 01 00 00", 62.5),
    ],
)
def test_mme_of_a_category(images, points):
    rows = [
        {
            "category": "OCR",
            "image_path": str(i),
            "answer": "Yes",
            "prediction": "yes" if bit == "1" else "no",
        }
        for i, bits in enumerate(images.split())
        for bit in bits
    ]
    value, d = score_of("MME", rows)
    assert d["categories"] == {"OCR": pytest.approx(points)} and value == round(points / 28, 2)
    halves = sum(len(bits) < 2 for bits in images.split())
    assert f"13 of 14 categories are missing, {halves} images have one" in d["warning"]


def test_pope_of_every_small_table_equals_precision_and_recall_worked_out():
    for hit, false, missed, rest in itertools.product(range(3), repeat=4):
        kinds = (
            [("Yes", "Yes")] * hit
            + [("No", "yes")] * false
            + [("Yes", "perhaps")] * missed
            + [("No", "no.")] * rest
        )
        if not kinds:
            continue
        value, d = score_of(
            "POPE", [{"answer": a, "prediction": p, "category": "random"} for a, p in kinds]
        )
        precision, recall = hit / max(1, hit + false), hit / max(1, hit + missed)
        assert value == round(100 * 2 * precision * recall / (precision + recall or 1), 2), kinds
        assert (d["precision"], d["recall"]) == (round(100 * precision, 2), round(100 * recall, 2))
        assert (
            d["accuracy"] == round(100 * (hit + rest) / len(kinds), 2)
            and d["not_readable"] == missed
        )


def test_hallusionbench_and_mmbench_count_what_nothing_went_wrong_with():
    rng = random.Random(0)

    def share(every, wrong):
        return 1 - len({*wrong}) / len({*every})

    for _ in range(40):
        cells = [
            (s, f, q, rng.random() < 0.7)
            for s in range(2)
            for f in range(3)
            for q in range(3)
            if rng.random() < 0.8
        ]
        rows = [
            {
                "index": f"VD_x_1_{s}_{f}_{q}",
                "l2-category": "x",
                "category": "VD",
                "answer": "No",
                "prediction": "no" if right else "yes",
            }
            for s, f, q, right in cells
        ]
        parts = [share([c[:3] for c in cells], [c[:3] for c in cells if not c[3]])]
        parts += [
            share([(c[0], c[k]) for c in cells], [(c[0], c[k]) for c in cells if not c[3]])
            for k in (1, 2)
        ]
        value, d = score_of("HallusionBench", rows)
        assert value == pytest.approx(100 * sum(parts) / 3, abs=0.006)
        assert [d[k] for k in ("aAcc", "fAcc", "qAcc")] == [round(100 * part, 2) for part in parts]
        turns = [(q, k, rng.random() < 0.8) for q in range(8) for k in range(rng.randrange(1, 5))]
        rows = [
            {
                "index": q + 1_000_000 * k,
                "A": "x",
                "B": "y",
                "answer": "B",
                "prediction": "B" if right else "A",
            }
            for q, k, right in turns
        ]
        rng.shuffle(rows)
        value = score_of("MMBench_DEV", rows)[0]
        assert value == round(
            100 * share([q for q, *_ in turns], [q for q, _, right in turns if not right]), 2
        )


def test_pope_is_the_f1_of_rows_counted_once_per_category():
    rows = [
        {"answer": a, "prediction": p, "category": c}
        for a, p, c in (
            ("Yes", "Yes", "random,popular"),
            ("Yes", "No", "random"),
            ("No", "Yes", "popular"),
            ("No", "No", "random"),
            ("No", "perhaps", "adversarial"),
        )
    ]
    value, d = score_of("POPE", rows)  # 6 rows: hits 2, said yes 3, true 3
    assert (
        value == d["f1"] == 66.67
        and d["precision"] == 66.67
        and d["recall"] == 66.67
        and d["accuracy"] == 50.0
    )
    assert (
        d["categories"] == {"adversarial": 0.0, "popular": 66.67, "random": 66.67}
        and d["not_readable"] == 1
    )


def test_hallusionbench_is_the_mean_of_three_accuracies():
    cells = {"0_1_0": 1, "0_1_1": 1, "0_2_0": 1, "0_2_1": 0, "1_1_0": 1}  # set, figure, question
    rows = [
        {
            "index": f"VD_x_1_{key}",
            "l2-category": "x",
            "category": "VD",
            "answer": "Yes",
            "prediction": "Yes" if right else "No",
        }
        for key, right in cells.items()
    ]
    value, d = score_of("HallusionBench", rows)
    assert (d["aAcc"], d["fAcc"], d["qAcc"]) == (80.0, 66.67, 66.67) and value == 71.11
    with pytest.raises(ValueError, match="'7' does not name"):
        score_of("HallusionBench", [rows[0] | {"index": "7"}])


def test_ocrbench_counts_right_answers_by_tens():
    kinds = ("Regular Text Recognition", "Handwriting Recognition", FORMULA, "Doc-oriented VQA")
    rows = [{"answer": "['x']", "prediction": "x", "category": c} for c in kinds for _ in range(10)]
    rows += [{"answer": "['x']", "prediction": "y", "category": kinds[0]}] * 5
    value, d = score_of("OCRBench", rows)
    assert (
        value == 4.0
        and d["final_score"] == 40
        and d["Text Recognition"] == 20
        and d["categories"][FORMULA] == 10
    )
    assert (
        "45 of 1,000 questions, the others count as wrong; of these 88.89 % are right"
        in d["warning"]
    )
    value, d = score_of("OCRBench", (rows * 23)[:1000])
    assert "warning" not in d and value == d["final_score"] / 10


def test_fractional_points_and_splits():
    rows = [
        {"answer": "['abcd']", "prediction": p, "split": s}
        for p, s in (("abcd", "human"), ("abc", "augmented"))
    ]
    assert score_of("DocVQA_VAL", rows) == (
        87.5,
        {"n": 2, "correct": 1.75, "not_readable": 0, "splits": {"augmented": 75.0, "human": 100.0}},
    )
