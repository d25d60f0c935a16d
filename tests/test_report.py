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
