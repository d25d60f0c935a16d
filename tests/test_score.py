"""From rows with predictions to scores: judge, splits, chance, averages."""

import random
import time

import pytest
from benchmark_rows import FREE, OPTIONS, score_of

from evals import score, table


def test_missing_predictions_are_wrong():
    rows = [
        {"answer": "3", "prediction": "3", "category": "x"},
        {"answer": "3", "prediction": "4", "category": "x"},
        {"answer": "3", "prediction": "", "category": "y"},
        {"answer": "3", "category": "y"},
    ]
    assert score_of("toy_count", rows) == (
        25.0,
        {"n": 4, "correct": 1, "not_readable": 2, "categories": {"x": 50.0, "y": 0.0}},
    )


def test_mmmu_scores_the_validation_split_only():
    rows = [
        {
            "index": i,
            "A": "a",
            "B": "b",
            "answer": "A",
            "prediction": p,
            "split": s,
            "category": "Art",
        }
        for i, (p, s) in enumerate(
            (("A", "validation"), ("B", "validation"), ("A", "dev"), ("A", "dev"))
        )
    ]
    assert score_of("MMMU_VAL", rows) == (
        50.0,
        {
            "n": 2,
            "correct": 1,
            "not_readable": 0,
            "categories": {"Art": 50.0},
            "splits": {"validation": 50.0},
        },
    )
    with pytest.raises(ValueError, match="validation"):
        score_of("MMMU_VAL", rows[2:])


def test_files_that_lack_a_column_a_rotation_or_an_answer_are_refused():
    assert {"A", "B"} <= {*table.PAPER["MMStar"].columns} and "category" in table.PAPER[
        "POPE"
    ].columns
    row = {"index": "1000007", "question": "q", **OPTIONS, "answer": "A", "prediction": "A"}
    with pytest.raises(ValueError, match="whose rotations these are, are missing"):
        score_of("MMBench_DEV", [row])
    for bad in (
        {"index": "x"},
        {"index": "nan"},
        {"index": ""},
        {"index": "inf"},
        {"index": "7", "g_index": "z"},
    ):
        with pytest.raises(
            ValueError, match=f"row '{bad['index']}': index and g_index must be numbers"
        ):
            score_of("MMBench_DEV", [row | bad])
    with pytest.raises(ValueError, match="row 7: its answer is empty"):
        score_of("DocVQA_VAL", [{"index": "7", "answer": "[]", "prediction": "x"}])


def test_a_reference_that_vlmevalkit_holds_empty_counts_as_wrong():
    for empty in ("", "None", "N/A", "nan"):
        rows = [
            {"index": "1", "answer": "100", "prediction": "100"},
            {"index": "2", "answer": empty, "prediction": "None"},
            {"index": "3", "answer": empty, "prediction": empty},
        ]
        for name in ("ChartQA_TEST", "OCRVQA_TESTCORE", "DocVQA_VAL"):
            for protocol in table.PROTOCOLS:
                value, d = score_of(name, rows, protocol=protocol)
                assert value == 33.33 and d["never_right"] == ["2", "3"], (name, protocol)
    # The toy files are ours: there the word is a word, and nothing is a fault.
    assert score_of("toy_ocr", [rows[0] | {"answer": "None", "prediction": "None"}])[0] == 100.0
    with pytest.raises(ValueError, match="row 2: its answer is empty"):
        score_of("toy_ocr", [rows[1] | {"answer": ""}])


@pytest.mark.parametrize(
    "name, row",
    [
        ("MMStar", {**OPTIONS, "answer": "E"}),
        ("MMStar", {**OPTIONS, "answer": "D"}),  # an empty option
        ("MMStar", {**OPTIONS, "answer": "b"}),
        ("MMStar", {**OPTIONS, "answer": "blue circle"}),
        ("MMMU_VAL", {**OPTIONS, "answer": "E"}),
        ("MME", {"answer": "true", "category": "OCR", "image_path": "x"}),
        ("ChartQA_TEST", {"answer": "nan"}),
        ("ChartQA_TEST", {"answer": "inf"}),
        ("TextVQA_VAL", {"answer": "['cat']"}),  # it takes two that say the same
        ("MathVista_MINI", {**FREE, "answer_type": "integer", "answer": "14.5"}),
        ("MathVista_MINI", {**FREE, "answer_type": "list", "answer": "[1, 2]"}),
        ("toy_count", {"answer": "3 or 4"}),
        ("toy_general", {**OPTIONS, "answer": "(A)"}),
    ],
)
def test_a_reference_that_no_answer_matches_is_named_by_row(name, row):
    row = {"index": "7", "answer_option": "", "prediction": "A", **row}
    b = table.find_benchmark(name)
    assert score_of(name, [row])[1]["never_right"] == ["7"]
    warning = score.never_right_warning(b, [row] * 7)
    assert warning.startswith(f"{name}: 7 rows count as wrong whatever is answered")
    assert warning.count("row 7 (") == 5 and warning.endswith(" and 2 more")


def test_references_that_can_be_matched_are_not_warned_of():
    rows = {
        "MMStar": {**OPTIONS, "answer": "C"},
        "MMMU_VAL": {"A": "", "B": "", "answer": "Other Answers"},
        "MME": {"answer": "No", "category": "OCR", "image_path": "x"},
        "ChartQA_TEST": {"answer": "0"},
        "TextVQA_VAL": {"answer": "['cat', 'dog', 'cat']"},
        "OCRBench": {"answer": "['x']", "category": "x"},
        "MMVet": {"answer": "x", "category": "ocr"},
        "toy_count": {"answer": "3"},
    }
    for name, row in rows.items():
        row = {"index": "1", "prediction": "", **row}
        for protocol in table.PROTOCOLS:
            assert score.never_right_warning(table.find_benchmark(name, protocol), [row]) == ""


def test_judge_required_without_a_judge_has_no_score_but_a_reason():
    rows = [{"question": "q", "answer": "x", "prediction": "1.0", "category": "ocr,math"}]
    value, d = score_of("MMVet", rows)
    assert (
        value is None
        and d["reason"] == "1 of 1 answers need a judge: --judge=URL --judge_model=NAME"
    )
    math_rows = [
        FREE | {"question": "q", "answer_type": "integer", "answer": "14", "prediction": p}
        for p in ("14", "15")
    ]
    assert score_of("MathVista_MINI", math_rows)[0] == 50.0  # everything was read by rule
    value, d = score_of("MathVista_MINI", math_rows + [math_rows[0] | {"prediction": "It is 14"}])
    assert value is None and d["reason"].startswith("1 of 3 answers need a judge")


def test_a_judge_reads_only_what_no_rule_reads():
    asked = []

    def judge(prompts, valid):
        asked.extend(prompts)
        return [reply if test(reply := replies.pop(0)) else "" for test in valid]

    rows = [
        {"index": "1", "question": "Which?", **OPTIONS, "answer": "B", "prediction": p}
        for p in ("B", "the azure one", "hm")
    ]
    replies = ["B", "no idea"]
    value, d = score_of("MMStar", rows, judge)
    assert (
        value == 66.67
        and d["not_readable"] == 1
        and len(asked) == 2
        and "A. red circle" in asked[0]
    )
    assert "the azure one" in asked[0] and "Which?" in asked[0]
    replies = ["A"]
    open_question = {
        "question": "How long?",
        "answer": "5 m",
        "prediction": "five metres",
        "A": "",
        "B": "",
    }
    assert (
        score_of("MMMU_VAL", [open_question], judge)[0] == 100.0
        and "A. 5 m\nB. Other Answers" in asked[-1]
    )
    replies = ["0.4", "7"]
    rows = [{"question": "q", "answer": "x<AND>y", "prediction": "0.9", "category": "ocr,math"}] * 2
    assert score_of("MMVet", rows, judge)[0] is None  # one grade is not valid: never a guess
    replies = ["0.4", "1"]
    value, d = score_of("MMVet", rows, judge)
    assert value == 70.0 and d["capabilities"]["ocr"] == 70.0 and d["capabilities"]["rec"] == 0.0
    replies = ["14"]
    free = FREE | {
        "question": "q",
        "answer_type": "integer",
        "answer": "14",
        "prediction": "fourteen",
    }
    assert score_of("MathVista_MINI", [free], judge)[0] == 100.0 and "as an integer" in asked[-1]
    replies = ["no idea"]
    value, d = score_of("MathVista_MINI", [free, free | {"prediction": "14"}], judge)
    assert (
        value == 50.0 and d["not_readable"] == 1
    )  # asked and still unreadable: wrong, not without a score
    replies = ["Yes."]
    assert (
        score_of(
            "POPE",
            [{"question": "Dog?", "answer": "Yes", "prediction": "I see one", "category": "a"}],
            judge,
        )[0]
        == 100
    )
    assert (
        score_of("DocVQA_VAL", [{"answer": "x", "prediction": ""}], judge)[0] == 0.0
    )  # no judge where rules decide


def test_averages_weigh_7_7_2_2_and_leave_out_what_has_no_score():
    value = {"general": 60.4, "ocr": 75.9, "math": 79.0, "hallucination": 66.2}
    got = score.averages({name: value[b.group] for name, b in table.PAPER.items()})
    assert round(got["overall"], 1) == 69.1 and got["groups"] == value and got["left_out"] == []
    published = score.published_scores()
    for model, row in published.items():  # the published groups and averages agree in the same way
        assert row["source"] and all(
            0 < value <= 100 for key, value in row.items() if key != "source"
        ), model
        if "overall" in row:
            assert (
                7 * row["general"] + 7 * row["ocr"] + 2 * row["math"] + 2 * row["hallucination"]
            ) / 18 == pytest.approx(row["overall"], abs=0.08), model
        if "MathVista_MINI" in row:  # OpenCompass: the mean of eight
            eight = [
                "MMStar",
                "MMMU_VAL",
                "MathVista_MINI",
                "HallusionBench",
                "AI2D_TEST",
                "OCRBench",
                "MMVet",
            ]
            eight = [row[name] for name in eight] + [row.get("MMBench") or row["MMBench_DEV_V11"]]
            assert sum(eight) / 8 == pytest.approx(row["OpenCompass"], abs=0.06), model
    assert (
        published["SAIL-VL-2B, card"]["OpenCompass"] == 62.67
        and published["SAIL-VL-1.6-8B"]["OCRBench"] == 91.0
    )
    got = score.averages({"MMVet": None, "MME": 50.0, "POPE": 70.0})
    assert got == {
        "overall": 60.0,
        "groups": {"general": 50.0, "hallucination": 70.0},
        "left_out": ["MMVet"],
    }
    assert score.averages({"MMVet": None})["overall"] is None


def test_chance_level():
    def chance(name, rows):
        return score.chance_level(table.find_benchmark(name), rows)

    four = {**OPTIONS, "D": "d", "answer": "A"}
    two = {"A": "a", "B": "b", "answer": "B"}
    assert chance("toy_general", [four, two]) == 37.5
    assert chance("MMBench_DEV", [two | {"index": "1"}, two | {"index": "1000001"}]) == 25.0
    assert chance("toy_count", [{"answer": a} for a in "11123"]) == 60.0
    assert chance("toy_halluc", [{"answer": a} for a in ("Yes", "No")]) == 50.0
    assert chance("MMVet", [{"answer": "x", "category": "ocr"}]) is None


def test_fifty_thousand_rows_are_scored_in_seconds():
    rng = random.Random(1)
    words = [
        "".join(rng.choices("abcdefgh 0123456789", k=rng.randrange(3, 30))) for _ in range(5000)
    ]

    def word():
        return rng.choice(words)

    for name, answer in (("DocVQA_VAL", lambda: repr([word(), word()])), ("MMStar", lambda: "B")):
        rows = [{**OPTIONS, "answer": answer(), "prediction": word()} for _ in range(50_000)]
        start = time.process_time()
        assert score_of(name, rows)[0] >= 0
        assert time.process_time() - start < 20, name
