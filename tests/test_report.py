"""The page that a run leaves."""

import json
from pathlib import Path

from evals import report

ROOT = Path(report.__file__).parent.parent


def test_report_escapes_what_the_model_says():
    row = {
        "index": "1",
        "question": "<b>?",
        "answer": "&",
        "prediction": "</script><script>alert(1)</script><!--",
    }
    card = report.question_card("toy_ocr", row, [], ("x", 0.0))
    page = report.report_html({"overall": 0.0}, [card], [])
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["cards"] == [card] and "<" not in data and card["verdict"] == "wrong"
    # The page makes text of it, never markup.
    assert page.count("<script") == 2 and "innerHTML" not in page


def test_a_row_that_waits_for_a_judge_is_not_called_wrong():
    def verdict(*found):
        row = {"answer": "x", "index": "1"}
        return report.question_card("MMVet", row, [], *found)["verdict"]

    assert [
        verdict(("", 0.0), False),
        verdict(("", 0.0), True),
        verdict(("15", False), False),
        verdict(("14", True), False),
        verdict(("0.5", 0.5), True),
    ] == ["not scored", "wrong", "wrong", "right", "partly"]
    page = (ROOT / "evals" / "report.html").read_text()
    assert '"wrong", "not scored"]' in page
    assert ".card.not-scored" in (ROOT / "evals" / "style.css").read_text()


def test_of_a_thousand_rows_forty_are_shown_the_wrong_ones_first_and_from_all_of_the_file():
    b = report.KNOWN["toy_ocr"]
    rows = [
        {"index": str(i), "question": "?", "answer": "a", "prediction": "ab"[i % 100 == 7]}
        for i in range(1000)
    ]
    cards = report.question_cards(b, rows, [(row, []) for row in rows], True, 40)
    verdicts = [card["verdict"] for card in cards]
    assert verdicts == ["wrong"] * 10 + ["right"] * 30
    shown = [int(card["index"]) for card in cards[10:]]
    assert shown == sorted(shown) and shown[0] < 50 and shown[-1] > 950

    rows = [row | {"prediction": "b"} for row in rows]  # more wrong ones than have room
    cards = report.question_cards(b, rows, [(row, []) for row in rows], True, 40)
    shown = [int(card["index"]) for card in cards]
    assert shown == list(range(0, 1000, 25))
