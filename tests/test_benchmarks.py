"""Every scorer case by case (what VLMEvalKit's rule gives, worked out by hand), totals, prompts, protocols, averages."""
import itertools, random, time

import pytest

from evals import table as bm

OPTIONS = {"A": "red circle", "B": "blue circle", "C": "red", "D": ""}

# ---- scorers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, read", [
    ("B", "B"), ("b", ""), ("B.", "B"), ("(B)", "B"), ("[B]", "B"), ("B: blue circle", "B"), ("**B**", "B"),
    ("#B", "B"), ("The answer is B.", "B"), ("Answer:B", "B"), ("B\n", "B"), (" B ", "B"), ("{B}", "B"), ("B!", "B"),
    ("B;", "B"), ("A or B", ""), ("A, B", ""), ("", ""), ("   ", ""), ("D", ""), ("E", ""), ("Z", "Z"), ("AB", ""),
    ("B-", ""), ("blue circle", "B"), ("It is a BLUE CIRCLE", "B"), ("red", "C"), ("a red circle", ""),
    ("nothing of these", ""), ("A blue circle", "A"), ("I can't process this file.", "Z"),
    ("Cannot determine the answer, so B", "Z"), ("A and B, so blue circle", "B"), ("Z or B", "B"),
    ("Failed to obtain answer via API. B", ""), ("Failed to obtain answer via API: red", "C"), ("B B B", "B"),
])
def test_multiple_choice(prediction, read):
    assert bm.multiple_choice(prediction, {**OPTIONS, "answer": "B"}) == (read, read == "B")

@pytest.mark.parametrize("prediction, read", [
    ("B", "B"), ("B because it is", "B"), ("B because it is blue", ""), ("B because it is very blue", ""), ("B one two three four", ""),
    ("The answer is **B** since one two three four five six", "B"), ("one two three four five six B", "B"),
    ("the correct ANSWER IS b because of one two three four", "B"), ("answer is E, one two three four five", ""),
    ("blue circle", "B"), ("blue circle " + "x" * 40, ""), ("a blue circle, one two three", "B"), ("A or B", ""),
    ("(B)", "B"), ("one B two three four", "B"), ("one two three four B five six seven eight", ""),
    ("one two three four five B six seven eight", "B"), ("B is my answer because B", ""),        # its first place counts
    ("Answer is: B one two three four five", ""), ("answer is a matter of taste", "A"), ("the answer is Both", "B"),
    ("answer is D, one two three four five", ""), ("Z", "Z"), ("Z or not", "Z"), ("Z B", "B"),
    ("A or B, so the answer is B", "B"), ("I can't process this file.", "Z"), ("Cannot determine the answer is B", "Z"),
    ("Failed to obtain answer via API. answer is B", ""), ("Failed to obtain answer via API: red", "C"),
    ("BLUE CIRCLE!", "B"), ("red circle", ""), ("a red one", "C"), ("x" * 37 + "blue circle", "B"),
    ("x" * 38 + "blue circle", ""), ("  blue circle" + " " * 60, "B"), ("The answer isB", ""), ("", ""), ("b", ""),
    ("correct answer  is  **C**, one two three four five", "C"), ("answer\nis\nA because one two three four five", "A"),
    ("answer is A. Or the answer is B? one two three", "A"),
])
def test_multiple_choice_of_today(prediction, read):
    assert bm.multiple_choice(prediction, {**OPTIONS, "answer": "B"}, True) == (read, read == "B")

def test_multiple_choice_options_with_one_letter_texts():
    row = {"A": "X", "B": "Y", "answer": "B"}
    assert bm.multiple_choice("Y", row) == ("B", True)
    assert bm.multiple_choice("A", row) == ("A", False)

@pytest.mark.parametrize("prediction, answer, right", [
    ("5.2", "5.2", True), ("It is 5.2.", "5.2", True), ("5.3", "5.2", False), ("A", "5.2", True), ("B", "5.2", False),
    ("Other answers", "5.2", False), ("Other Answers or 5.2", "5.2", False), ("", "5.2", False),
    ("Paris", "paris", True), ("PARIS", "Paris", True), ("B", "B", True), ("A", "B", False), ("C", "C", False),
    ("a", "5.2", False), ("(A)", "5.2", True), ("15.20", "5.2", True), ("52", "5.2", False), ("A B", "x", False),
    ("A or B: 5.2", "5.2", True), ("B 5.2", "5.2", False), ("A mile", "5.2", True), ("Z", "5.2", False),
    ("5.2 or other answers", "5.2", False), ("I can't process this file.", "file", False), ("Z 5.2", "5.2", False),
    ("five", "['5', 'five']", False), ("['5', 'five']", "['5', 'five']", True), ("-3", "3", True), ("$5", "5", True),
    ("", "B", False), ("C", "5.2", False), ("D", "D", False), ("other answers", "answers", False), ("x = 3", "X = 3", True),
])
def test_mmmu_open_questions(prediction, answer, right):
    assert bm.mmmu(prediction, {"A": "", "B": "", "answer": answer})[1] is right
    assert bm.mmmu(prediction, {**OPTIONS, "answer": "B"}) == bm.multiple_choice(prediction, {**OPTIONS, "answer": "B"})

@pytest.mark.parametrize("prediction, read", [
    ("Yes", "yes"), ("yes", "yes"), ("YES.", "yes"), ("Yes, there is.", "yes"), ("No", "no"), ("no!", "no"),
    ("**No**", ""), ("No, there is no dog", "no"), ("Yes and no", ""), ("yes/no", ""), ("", ""), ("maybe", ""),
    ("nothing", ""), ("yesterday", ""), ("not", ""), ("know", ""), ("The answer is yes", "yes"), ("\tNo\n", "no"),
    ("Yes\nNo", ""), ("yes yes", "yes"), ("y", ""), ("true", ""), ("否", ""), ("no one", "no"), ("Yes,it is", "yes"),
    ("no.It is", ""), ("Is it? Yes", "yes"), ("'yes'", ""), ("N o", ""), ("yes-", "yes"), ("yes:", ""), ("(no)", "no"),
    ("yes.5", ""), ('"yes"', "yes"), ("no; it is not", "no"), ("1,000 yes!no", ""),
])
def test_yes_no(prediction, read):
    assert bm.yes_no(prediction, {"answer": "Yes"}) == (read, read == "yes")
    assert bm.yes_no(prediction, {"answer": "no"}) == (read, read == "no")

@pytest.mark.parametrize("text, normal", [
    ("Yes", "yes"), ("The dog", "dog"), ("a an the", ""), ("two dogs", "2 dogs"), ("None", "0"), ("ten", "10"),
    ("eleven", "eleven"), ("dont", "don't"), ("don't", "don't"), ("Dont", "don't"), ("its", "its"), ("itll", "it'll"),
    ("couldnt've", "couldn't've"), ("couldntve", "couldntve"), ("somebody'd", "somebodyd"), ("wont", "won't"),
    ("red,blue", "red blue"), ("red, blue", "red blue"), ("1,000", "1000"), ("1,000/2", "10002"), ("and/or", "and or"),
    ("and /or", "and or"), ("3.5", "3.5"), ("end.", "end"), ("U.S.A", "usa"), (".5", ".5"), ("$5", "$5"), ("5%", "5%"),
    ("what?", "what"), ("'twas", "'twas"), ("twas", "'twas"), ("a\nb\tc", "b c"), ("x" + "." * 33, "x."), ("well-known", "well known"),
    ("o'clock", "o'clock"), ("e-mail :)", "e mail :"), ("", ""), ("yall'd've", "y'all'd've"), ("ow's'at", "'ow's'at"),
])
def test_vqa_normal_form(text, normal):
    assert bm.vqa_normal(text) == normal

@pytest.mark.parametrize("prediction, references, points", [
    ("cat", ["cat"] * 10, 1), ("dog", ["cat"] * 10, 0), ("cat", ["cat"] + ["dog"] * 9, 0.3), ("cat", ["cat"], 0),
    ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10), ("The Cat.", ["cat"] * 10, 1),
    ("two", ["2"] * 10, 1), ("", ["cat"] * 10, 0), ("", [""] * 10, 1), ("cat", ["cat"] * 4 + ["dog"] * 6, 1),
    ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7) / 10), ("1,000", ["1000"] * 10, 1),
    ("cat", ["cat"] * 3, 2 / 3), ("cat", ["cat"] * 4, 1), ("cat", ["dog"] * 3 + ["cat"], 1 / 4), ("cat", ["cat", "dog"], 1 / 6),
    ("x", ["y", "x", "x", "x"], 3 / 4), ("no", ["no", "No", "NO."], 2 / 3), ("10", ["ten"] * 5, 1), ("eleven", ["11"] * 5, 0),
    ("a cat", ["the cat"] * 5, 1), ("cats", ["cat"] * 5, 0), ("dont", ["don't"] * 5, 1), ("blue, red", ["blue red"] * 5, 1),
    ("blue,red", ["blue red"] * 5, 1), ("1,5", ["15"] * 5, 1), ("3.0", ["3"] * 5, 0), ("3.", ["3"] * 5, 1),
    ("stop!", ["stop"] * 5, 1), ("the", [""] * 5, 1), ("(cat)", ["cat"] * 5, 1), ("cat\ndog", ["cat dog"] * 5, 1),
    ("None", ["0"] * 5, 1), ("cat", ["dog"] * 7 + ["cat"] * 3, (7 + 3 * 2 / 3) / 10),
])
def test_vqa_score(prediction, references, points):
    assert bm.vqa_score(prediction, {"answer": repr(references)})[1] == pytest.approx(points)

def levenshtein(a, b):
    """The table of the textbook, row by row."""
    row = [*range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1): row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]

def test_edit_distance_equals_the_textbook_table():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ("".join(rng.choices("abé中", k=rng.randrange(0, 90))) for _ in range(2))
        b = rng.choice([b, a[: len(a) // 2] + b[:5] + a[len(a) // 2:]])
        assert bm.edit_distance(a, b) == levenshtein(a, b) == bm.edit_distance(b, a), (a, b)

@pytest.mark.parametrize("prediction, answer, points", [
    ("abc", "['abc']", 1), ("ABC", "['abc']", 1), ("abd", "['abc']", 1 - 1 / 3), ("abcd", "['abc']", 0.75),
    ("ab", "['abcd']", 0.5), ("a", "['abc']", 0), ("", "['abc']", 0), ("", "['']", 1), ("x", "['']", 0),
    ("a  b", "['a b']", 1), (" a b\n", "['A B']", 1), ("abc", "['xyz', 'abd']", 1 - 1 / 3), ("abc", "abc", 1),
    ("the abc", "['abc']", 0), ("$12", "['12']", 1 - 1 / 3), ("12.0", "['12']", 0.5), ("12.00", "['12']", 0),
    ("café", "['cafe']", 0.75), ("中文", "['中文']", 1), ("中文", "['中国']", 0.5), ("ba", "['ab']", 0),
    ("abcdefghij", "['abcdefghij.']", 1 - 1 / 11), ("a" * 100, "['" + "a" * 51 + "']", 0.51),
    ("a" * 100, "['" + "a" * 49 + "']", 0), ("abc", "['abc', 'abcd']", 1), ("1/2", "['1 / 2']", 0.6),
    ("yes", "['no']", 0), ("no", "['not']", 1 - 1 / 3), ("a-b", "['a b']", 1 - 1 / 3), ("[1]", "[1]", 0),
    ("1", "[1]", 1), ("abc", "[abc", 0.75), ("'abc'", "['abc']", 0.6),
])
def test_anls(prediction, answer, points):
    assert bm.anls(prediction, {"answer": answer})[1] == pytest.approx(points)

@pytest.mark.parametrize("prediction, answer, right", [
    ("100", "100", True), ("105", "100", True), ("95", "100", True), ("105.01", "100", False), ("94.9", "100", False),
    ("-95", "-100", True), ("95", "-100", False), ("0.12", "12%", True), ("12%", "0.12", True), ("12", "12%", False),
    ("12%", "12%", True), ("12.", "12", True), ("12..", "12", False), ("0", "0", True), ("0.0", "0", False),
    ("0.01", "0", False), ("5", "0", False), ("red", "Red", True), ("red.", "Red", False), ("reds", "red", False),
    ("", "red", False), ("", "3", False), ("1,000", "1000", False), ("1e2", "100", True), ("nan", "100", False),
    ("nan", "nan", False), ("inf", "inf", False), ("3 units", "3", False), ("Yes", "yes", True), (" 7 ", "7", True),
    ("%", "%", True), ("7%%", "0.07", True), ("2.09", "2", True), ("2.11", "2", False), ("3", "['2', '3']", True),
    ("1_0", "10", True), ("$5", "5", False), ("2015", "2014", True),
])
def test_relaxed_accuracy(prediction, answer, right):
    assert bm.relaxed_accuracy(prediction, {"answer": answer})[1] is right

@pytest.mark.parametrize("prediction, answer, right", [
    ("Mark Twain", "Mark Twain", True), ("mark twain", "Mark Twain", True), (" Mark Twain ", "Mark Twain", True),
    ("Mark  Twain", "Mark Twain", False), ("Mark Twain.", "Mark Twain", False), ("Twain", "Mark Twain", False),
    ("", "Mark Twain", False), ("", "", True), ("yes", "Yes", True), ("Yes, it is", "Yes", False), ("no", "Yes", False),
    ("1,000", "1000", False), ("É", "é", True), ("ß", "SS", False), ("a", "['a', 'b']", True), ("b", "['a', 'b']", True),
    ("c", "['a', 'b']", False), ("['a', 'b']", "['a', 'b']", False), ("A", "['a ']", True), ("2", "[1, 2]", True),
    ("[x", "[x", True), ("Romance", "romance", True), ("Sci-Fi", "sci fi", False), ("\tx\n", "x", True), ("x", "\tx\n", True),
    ("0", "O", False), ("'x'", "x", False), ("the x", "x", False), ("x\ny", "x y", False), ("中", "中", True),
])
def test_any_reference(prediction, answer, right):
    assert bm.any_reference(prediction, {"answer": answer})[1] is right

FORMULA = "Handwritten Mathematical Expression Recognition"

@pytest.mark.parametrize("prediction, answer, category, right", [
    ("STOP", "['stop']", "x", True), ("The sign says stop.", "['STOP']", "x", True), ("ST OP", "['STOP']", "x", False),
    ("", "['STOP']", "x", False), ("anything", "['']", "x", True), ("a\nb", "['a b']", "x", True), ("b", "['a', 'B']", "x", True),
    ("ab", "['a b']", "x", False), ("stop", "stop", "x", True), ("12", "[12]", "x", True), ("112", "['12']", "x", True),
    ("stop", "[' stop ']", "x", True), ("sto", "['stop']", "x", False), ("a  b", "['a b']", "x", False), ("É", "['é']", "x", True),
    ("x ^ 2", "['x^2']", FORMULA, True), ("X^2", "['x^2']", FORMULA, False), ("x^{2}", "['x^2']", FORMULA, False),
    ("so x^2 + 1", "['x^2+1']", FORMULA, True), ("x^\n2", "['x ^ 2']", FORMULA, True), ("", "['x']", FORMULA, False),
    ("\\frac 1 2", "['\\\\frac{1}{2}']", FORMULA, False), ("\\alpha", "['\\\\alpha']", FORMULA, True),
    ("x\t^2", "['x^2']", FORMULA, False), ("x^2", "['y', 'x^2']", FORMULA, True), ("x^2", "x^2", FORMULA, True),
    ("X", "['x']", "Handwriting Recognition", True), ("2", "['x^2']", FORMULA, False), ("a b", "['ab']", FORMULA, True),
    ("a b", "['ab']", "x", False), ("[", "['[']", "x", True),
])
def test_ocrbench(prediction, answer, category, right):
    assert bm.ocrbench(prediction, {"answer": answer, "category": category})[1] is right

CHOICE = {"question_type": "multi_choice", "choices": "['3/11', '8/11', '6/11']", "answer_option": "B", "answer": "8/11"}
FREE = {"question_type": "free_form", "choices": ""}

@pytest.mark.parametrize("prediction, row, read, right", [
    ("B", CHOICE, "B", True), ("(B) 8/11", CHOICE, "B", True), ("8/11", CHOICE, "B", True), ("C", CHOICE, "C", False),
    ("D", CHOICE, "", False), ("", CHOICE, "", False), ("It is 6/11", CHOICE, "C", False), ("A or B", CHOICE, "", False),
    ("I can't process this file.", CHOICE, "Z", False), ("b", CHOICE, "", False),
    *[(p, FREE | {"answer_type": "integer", "answer": "14"}, *out) for p, *out in [
        ("14", "14", True), (" 14 ", "14", True), ("14.0", "", False), ("fourteen", "", False), ("15", "15", False),
        ("+14", "14", True), ("014", "14", True), ("14.", "", False), ("$14", "", False), ("The answer is 14", "", False),
        ("", "", False), ("1_4", "14", True), ("-14", "-14", False)]],
    ("0", FREE | {"answer_type": "integer", "answer": "0"}, "0", True),
    *[(p, FREE | {"answer_type": "float", "answer": "1.20"}, *out) for p, *out in [
        ("1.2", "1.2", True), ("1.200", "1.2", True), ("1.21", "1.21", False), ("1.2 cm", "", False), ("12e-1", "1.2", True),
        ("1,2", "", False), ("nan", "nan", False), ("1.2\n", "1.2", True)]],
    ("[1, 2]", FREE | {"answer_type": "list", "answer": "[1, 2]"}, "[1, 2]", False),
])
def test_mathvista(prediction, row, read, right):
    assert bm.mathvista(prediction, row) == (read, right)

@pytest.mark.parametrize("grade, points", [
    ("1.0", 1), ("0.5", 0.5), ("0", 0), (" 0.3\n", 0.3), ("1", 1), ("1.1", None), ("-0.1", None), ("", None), ("0.5.", None),
    ("half", None), ("nan", None), ("inf", None), ("0.5 ", 0.5), ("1e-1", 0.1), ("0.0", 0), ("1e0", 1), ("+0.5", 0.5),
    (".5", 0.5), ("1.", 1), ("0.55", 0.55), ("50%", None), ("1%", None), ("%", None), ("0,5", None), ("0.5/1", None),
    ("score: 0.5", None), ("1.0000001", None), ("-0", 0), ("2", None), ("10", None), ("0.5\n0.6", None), ("-1", None),
    ("None", None), ("**1.0**", None),
])
def test_grades(grade, points):
    read, got = bm.graded(grade, {})
    assert (read != "") == (points is not None) and got == (points or 0)

@pytest.mark.parametrize("prediction, answer, right", [
    ("ABC", "ABC", True), ("abc", "ABC", True), (" ABC ", "ABC", True), ("ABC.", "ABC", True), ("A B C", "ABC", False),
    ("A  B\nC", "A B C", True), ("A B C", "A  B  C ", True), ("ABCD", "ABC", False), ("AB", "ABC", False),
    ("", "ABC", False), ("ABC..", "ABC", False), ("ABC.", "ABC.", True), ("ABC", "ABC.", False),
    ("Abc. ", "ABC", True), ("'ABC'", "ABC", False), ("the word is ABC", "ABC", False), ("É", "é", True),
    ("K 12 M 30", "K 12 M 30", True), ("K 12, M 30", "K 12 M 30", False), ("12", "12", True), ("12.0", "12", False),
    (".", ".", True), (".", "", False), ("\t12", "12", True), ("ß", "SS", False), ("0", "O", False), ("１", "1", False),
    ("ABC\u00a0D", "ABC D", True), ("a.b", "A.B", True), ("!", "!", True),
])
def test_exact_match(prediction, answer, right):
    assert bm.exact_match(prediction, {"answer": answer})[1] is right

@pytest.mark.parametrize("prediction, answer, right", [
    ("3", "3", True), ("3.", "3", True), ("three", "3", True), ("Three.", "3", True),
    ("There are 3 circles", "3", True), ("There are three circles", "3", True), ("3 or 4", "3", False),
    ("three (3)", "3", False), ("2-3", "3", False), ("", "0", False), ("zero", "0", True), ("None", "0", True),
    ("no", "0", False), ("13", "3", False), ("3.0", "3", True), ("3.5", "3", False), ("1,000", "1000", True),
    ("3,", "3", True), ("-3", "3", False), ("x3", "3", False), ("many", "3", False), ("ten", "10", True),
    ("twenty", "20", True), ("thirty", "30", False), ("3/4", "3", False), ("**3**", "3", True), ("nan", "3", False),
    ("3\n", "3", True), ("one", "1", True), ("someone", "1", False), ("4", "3", False), ("٣", "3", False),
])
def test_exact_number(prediction, answer, right):
    assert bm.exact_number(prediction, {"answer": answer})[1] is right

# ---- totals ------------------------------------------------------------------------------------------------------

def score(name, rows, judge=None, protocol="sailvl-2024-12"):
    return bm.score_rows(bm.find(name, protocol)[1], rows, judge)

def test_missing_predictions_are_wrong():
    rows = [{"answer": "3", "prediction": "3", "category": "x"}, {"answer": "3", "prediction": "4", "category": "x"},
            {"answer": "3", "prediction": "", "category": "y"}, {"answer": "3", "category": "y"}]
    assert score("toy_count", rows) == (25.0, {"n": 4, "correct": 1, "not_readable": 2,
                                               "categories": {"x": 50.0, "y": 0.0}})

def test_yes_no_details_take_yes_as_positive():
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 3 + [("perhaps", "no")]
    value, d = score("toy_halluc", [{"answer": a, "prediction": p} for p, a in pairs])
    assert value == 60.0
    assert [d[k] for k in ("precision", "recall", "f1", "yes_ratio")] == [75.0, 60.0, 66.67, 40.0]
    assert score("toy_halluc", [{"answer": "no", "prediction": "no"}])[1]["f1"] == 0.0

def test_mmbench_counts_a_question_once_and_only_if_every_rotation_is_right():
    rows = []
    for question, right in ((3, "1111"), (4, "1101"), (5, "1"), (7, "00")):
        for k, bit in enumerate(right):
            rows.append({"index": str(question + k * 1_000_000), "A": "a", "B": "b", "answer": "AB"[k % 2],
                         "prediction": "AB"[k % 2] if bit == "1" else "C", "l2-category": "even" if question == 4 else "odd"})
    rows.append({"index": "2000009", "A": "a", "B": "b", "answer": "A", "prediction": "A", "l2-category": "odd"})
    value, d = score("MMBench_DEV", rows)                     # a rotation without its question does not count
    assert value == 50.0 and d["questions"] == 4 and d["n"] == 12
    assert d["l2_categories"] == {"even": 0.0, "odd": 66.67}
    assert score("MMBench_DEV", [row | {"g_index": "3"} for row in rows[:4]])[0] == 100.0

def test_mmmu_scores_the_validation_split_only():
    rows = [{"index": i, "A": "a", "B": "b", "answer": "A", "prediction": p, "split": s, "category": "Art"}
            for i, (p, s) in enumerate((("A", "validation"), ("B", "validation"), ("A", "dev"), ("A", "dev")))]
    assert score("MMMU_VAL", rows) == (50.0, {"n": 2, "correct": 1, "not_readable": 0, "categories": {"Art": 50.0},
                                              "splits": {"validation": 50.0}})
    with pytest.raises(ValueError, match="validation"):
        score("MMMU_VAL", rows[2:])

def mme_rows(predictions):
    """One image with two questions per category, all answered alike."""
    return [{"index": f"{c}{i}", "category": c, "image_path": f"{c}/1.png", "answer": answer, "prediction": p}
            for c, pair in predictions.items() for i, (p, answer) in enumerate(zip(pair, ("Yes", "No")))]

def test_mme_adds_accuracy_and_accuracy_of_pairs_over_14_categories():
    every = bm.PERCEPTION + bm.REASONING
    assert len(bm.PERCEPTION) == 10 and len(bm.REASONING) == 4
    value, d = score("MME", mme_rows(dict.fromkeys(every, ("Yes", "No"))))
    assert (value, d["total"], d["perception"], d["reasoning"]) == (100.0, 2800, 2000, 800)
    assert "warning" not in d
    value, d = score("MME", mme_rows(dict.fromkeys(every, ("Yes", "Yes."))))       # half of them, no pair
    assert (value, d["total"]) == (25.0, 700) and d["categories"]["OCR"] == 50
    value, d = score("MME", mme_rows({"OCR": ("yes", "no"), "count": ("maybe", "no"), "other": ("yes", "no")}))
    assert d["perception"] == 250 and value == round(250 / 28, 2) and "scene" in d["missing_categories"]

@pytest.mark.parametrize("images, points", [                 # 1 right, 0 wrong; the questions of an image side by side
    ("11", 200), ("10", 50), ("01", 50), ("00", 0), ("11 11", 200), ("11 10", 125), ("11 00", 100), ("10 01", 50),
    ("10 00", 25), ("00 00", 0), ("11 11 11", 200), ("11 11 10", 150), ("11 11 00", 400 / 3), ("11 10 00", 250 / 3),
    ("10 10 10", 50), ("11 10 10", 100), ("00 00 10", 50 / 3), ("11 00 00", 200 / 3), ("1", 100), ("0", 0), ("11 1", 150),
    ("11 0", 350 / 3), ("111", 200), ("110", 500 / 3), ("101", 200 / 3), ("011", 200 / 3), ("11 11 11 11", 200),
    ("11 11 11 10", 162.5), ("11 11 10 00", 112.5), ("10 10 00 00", 25), ("11 01 00 00", 62.5),
])
def test_mme_of_a_category(images, points):
    rows = [{"category": "OCR", "image_path": str(i), "answer": "Yes", "prediction": "yes" if bit == "1" else "no"}
            for i, bits in enumerate(images.split()) for bit in bits]
    value, d = score("MME", rows)
    assert d["categories"] == {"OCR": pytest.approx(points)} and value == round(points / 28, 2)
    halves = sum(len(bits) < 2 for bits in images.split())
    assert f"13 of 14 categories are missing, {halves} images have one" in d["warning"]

def test_pope_of_every_small_table_equals_precision_and_recall_worked_out():
    for hit, false, missed, rest in itertools.product(range(3), repeat=4):
        kinds = [("Yes", "Yes")] * hit + [("No", "yes")] * false + [("Yes", "perhaps")] * missed + [("No", "no.")] * rest
        if not kinds: continue
        value, d = score("POPE", [{"answer": a, "prediction": p, "category": "random"} for a, p in kinds])
        precision, recall = hit / max(1, hit + false), hit / max(1, hit + missed)
        assert value == round(100 * 2 * precision * recall / (precision + recall or 1), 2), kinds
        assert (d["precision"], d["recall"]) == (round(100 * precision, 2), round(100 * recall, 2))
        assert d["accuracy"] == round(100 * (hit + rest) / len(kinds), 2) and d["not_readable"] == missed

def test_hallusionbench_and_mmbench_count_what_nothing_went_wrong_with():
    rng = random.Random(0)
    share = lambda every, wrong: 1 - len({*wrong}) / len({*every})
    for _ in range(40):
        cells = [(s, f, q, rng.random() < 0.7) for s in range(2) for f in range(3) for q in range(3) if rng.random() < 0.8]
        rows = [{"index": f"VD_x_1_{s}_{f}_{q}", "l2-category": "x", "category": "VD", "answer": "No",
                 "prediction": "no" if right else "yes"} for s, f, q, right in cells]
        parts = [share([c[:3] for c in cells], [c[:3] for c in cells if not c[3]])]
        parts += [share([(c[0], c[k]) for c in cells], [(c[0], c[k]) for c in cells if not c[3]]) for k in (1, 2)]
        value, d = score("HallusionBench", rows)
        assert value == pytest.approx(100 * sum(parts) / 3, abs=0.006)
        assert [d[k] for k in ("aAcc", "fAcc", "qAcc")] == [round(100 * part, 2) for part in parts]
        turns = [(q, k, rng.random() < 0.8) for q in range(8) for k in range(rng.randrange(1, 5))]
        rows = [{"index": q + 1_000_000 * k, "A": "x", "B": "y", "answer": "B", "prediction": "B" if right else "A"}
                for q, k, right in turns]
        rng.shuffle(rows)
        value = score("MMBench_DEV", rows)[0]
        assert value == round(100 * share([q for q, *_ in turns], [q for q, _, right in turns if not right]), 2)

def test_pope_is_the_f1_of_rows_counted_once_per_category():
    rows = [{"answer": a, "prediction": p, "category": c} for a, p, c in (
        ("Yes", "Yes", "random,popular"), ("Yes", "No", "random"), ("No", "Yes", "popular"), ("No", "No", "random"),
        ("No", "perhaps", "adversarial"))]
    value, d = score("POPE", rows)                             # 6 rows: hits 2, said yes 3, true 3
    assert value == d["f1"] == 66.67 and d["precision"] == 66.67 and d["recall"] == 66.67 and d["accuracy"] == 50.0
    assert d["categories"] == {"adversarial": 0.0, "popular": 66.67, "random": 66.67} and d["not_readable"] == 1

def test_hallusionbench_is_the_mean_of_three_accuracies():
    cells = {"0_1_0": 1, "0_1_1": 1, "0_2_0": 1, "0_2_1": 0, "1_1_0": 1}           # set, figure, question
    rows = [{"index": f"VD_x_1_{key}", "l2-category": "x", "category": "VD", "answer": "Yes",
             "prediction": "Yes" if right else "No"} for key, right in cells.items()]
    value, d = score("HallusionBench", rows)
    assert (d["aAcc"], d["fAcc"], d["qAcc"]) == (80.0, 66.67, 66.67) and value == 71.11
    with pytest.raises(ValueError, match="'7' does not name"):
        score("HallusionBench", [rows[0] | {"index": "7"}])

def test_ocrbench_counts_right_answers_by_tens():
    kinds = ("Regular Text Recognition", "Handwriting Recognition", FORMULA, "Doc-oriented VQA")
    rows = [{"answer": "['x']", "prediction": "x", "category": c} for c in kinds for _ in range(10)]
    rows += [{"answer": "['x']", "prediction": "y", "category": kinds[0]}] * 5
    value, d = score("OCRBench", rows)
    assert value == 4.0 and d["final_score"] == 40 and d["Text Recognition"] == 20 and d["categories"][FORMULA] == 10
    assert "45 of 1,000 questions, the others count as wrong; of these 88.89 % are right" in d["warning"]
    value, d = score("OCRBench", (rows * 23)[:1000])
    assert "warning" not in d and value == d["final_score"] / 10

def test_fractional_points_and_splits():
    rows = [{"answer": "['abcd']", "prediction": p, "split": s} for p, s in (("abcd", "human"), ("abc", "augmented"))]
    assert score("DocVQA_VAL", rows) == (87.5, {"n": 2, "correct": 1.75, "not_readable": 0,
                                                "splits": {"augmented": 75.0, "human": 100.0}})

# ---- the judge ---------------------------------------------------------------------------------------------------

def test_files_that_lack_a_column_a_rotation_or_an_answer_are_refused():
    assert {"A", "B"} <= {*bm.needs(bm.PAPER["MMStar"])} and "category" in bm.needs(bm.PAPER["POPE"])
    row = {"index": "1000007", "question": "q", **OPTIONS, "answer": "A", "prediction": "A"}
    with pytest.raises(ValueError, match="whose rotations these are, are missing"): score("MMBench_DEV", [row])
    for bad in ({"index": "x"}, {"index": "nan"}, {"index": ""}, {"index": "inf"}, {"index": "7", "g_index": "z"}):
        with pytest.raises(ValueError, match=f"row '{bad['index']}': index and g_index must be numbers"):
            score("MMBench_DEV", [row | bad])
    with pytest.raises(ValueError, match="row 7: its answer is empty"):
        score("DocVQA_VAL", [{"index": "7", "answer": "[]", "prediction": "x"}])

def test_judge_required_without_a_judge_has_no_score_but_a_reason():
    rows = [{"question": "q", "answer": "x", "prediction": "1.0", "category": "ocr,math"}]
    value, d = score("MMVet", rows)
    assert value is None and d["reason"] == "1 of 1 answers need a judge: --judge=URL --judge_model=NAME"
    math_rows = [FREE | {"question": "q", "answer_type": "integer", "answer": "14", "prediction": p} for p in ("14", "15")]
    assert score("MathVista_MINI", math_rows)[0] == 50.0      # everything was read by rule
    value, d = score("MathVista_MINI", math_rows + [math_rows[0] | {"prediction": "It is 14"}])
    assert value is None and d["reason"].startswith("1 of 3 answers need a judge")

def test_a_judge_reads_only_what_no_rule_reads():
    asked = []
    def judge(prompts, valid):
        asked.extend(prompts)
        return [reply if test(reply := replies.pop(0)) else "" for test in valid]
    rows = [{"index": "1", "question": "Which?", **OPTIONS, "answer": "B", "prediction": p} for p in ("B", "the azure one", "hm")]
    replies = ["B", "no idea"]
    value, d = score("MMStar", rows, judge)
    assert value == 66.67 and d["not_readable"] == 1 and len(asked) == 2 and "A. red circle" in asked[0]
    assert "the azure one" in asked[0] and "Which?" in asked[0]
    replies = ["A"]
    open_question = {"question": "How long?", "answer": "5 m", "prediction": "five metres", "A": "", "B": ""}
    assert score("MMMU_VAL", [open_question], judge)[0] == 100.0 and "A. 5 m\nB. Other Answers" in asked[-1]
    replies = ["0.4", "7"]
    rows = [{"question": "q", "answer": "x<AND>y", "prediction": "0.9", "category": "ocr,math"}] * 2
    assert score("MMVet", rows, judge)[0] is None             # one grade is not valid: never a guess
    replies = ["0.4", "1"]
    value, d = score("MMVet", rows, judge)
    assert value == 70.0 and d["capabilities"]["ocr"] == 70.0 and d["capabilities"]["rec"] == 0.0
    replies = ["14"]
    free = FREE | {"question": "q", "answer_type": "integer", "answer": "14", "prediction": "fourteen"}
    assert score("MathVista_MINI", [free], judge)[0] == 100.0 and "as an integer" in asked[-1]
    replies = ["no idea"]
    value, d = score("MathVista_MINI", [free, free | {"prediction": "14"}], judge)
    assert value == 50.0 and d["not_readable"] == 1           # asked and still unreadable: wrong, not without a score
    replies = ["Yes."]
    assert score("POPE", [{"question": "Dog?", "answer": "Yes", "prediction": "I see one", "category": "a"}], judge)[0] == 100
    assert score("DocVQA_VAL", [{"answer": "x", "prediction": ""}], judge)[0] == 0.0      # no judge where rules decide

# ---- prompts and protocols ---------------------------------------------------------------------------------------

def test_prompts():
    row, short = {"question": "What?", "hint": "", **OPTIONS}, "Answer the question using a single word or phrase."
    letter = "Answer with the option's letter from the given choices directly."
    asked = {name: bm.build_prompt(b.prompt, row) for name, b in bm.PAPER.items()}
    for name in ("MathVista_MINI", "MMVet", "POPE"): assert asked[name] == "What?"
    for name in ("OCRBench", "DocVQA_VAL", "InfoVQA_VAL", "ChartQA_TEST", "TextVQA_VAL", "OCRVQA_TESTCORE"):
        assert asked[name] == f"What?\n{short}"
    for name in ("MMStar", "MMBench_DEV", "MMMU_VAL", "SEEDBench_IMG", "RealWorldQA", "AI2D_TEST", "ScienceQA"):
        assert asked[name] == f"What?\nA. red circle\nB. blue circle\nC. red\n{letter}"
    assert asked["MME"] == f"What? {short}" and asked["HallusionBench"] == f"What? Please answer yes or no. {short}"
    assert bm.build_prompt("mcq", row | {"hint": "Look."}).startswith("Look.\nWhat?\nA. ")
    assert bm.build_prompt("mcq", {"question": "Q", "A": "红"}) == "Q\nA. 红\n请直接回答选项字母。"
    assert bm.build_prompt("mcq", {"question": "Q"}) == "Q\nAnswer the question directly."
    assert bm.build_prompt("mcq", {"question": "问"}) == "问\n请直接回答问题。"
    assert bm.build_prompt("plain", row, 2) == "Image-1: <image>\nImage-2: <image>\nWhat?"

def test_the_table_is_the_papers():
    groups = [b.group for b in bm.PAPER.values()]
    assert [groups.count(g) for g in dict.fromkeys(groups)] == [7, 7, 2, 2] and len({b.md5 for b in bm.PAPER.values()}) == 18
    tiles = {name: b.tiles for name, b in bm.PAPER.items() if b.tiles != 6}
    assert tiles == {"MMMU_VAL": 12, "ChartQA_TEST": 12, "OCRVQA_TESTCORE": 12, "DocVQA_VAL": 18, "InfoVQA_VAL": 24,
                     "OCRBench": 24}
    assert [name for name, b in bm.PAPER.items() if b.judge == "required"] == ["MMVet", "MathVista_MINI"]
    assert [name for name, b in bm.PAPER.items() if b.period] == ["ChartQA_TEST", "OCRVQA_TESTCORE"]
    later = bm.PROTOCOLS["vlmevalkit-2025-04"]
    assert later["MMStar"].tiles == 10 and later["OCRBench"].tiles == 24 and later["MME"].max_new_tokens == 1024
    assert later["MMStar"].recent and not later["MME"].recent and later["toy_ocr"] == bm.TOY["toy_ocr"]

def test_addresses_are_where_vlmevalkit_has_the_files_and_decide_no_score(monkeypatch):
    moved = {"MMBench_DEV": "benchmarks/MMBench", "SEEDBench_IMG": "benchmarks/SEEDBench", "ScienceQA": "benchmarks/ScienceQA"}
    assert {name: b.folder for name, b in bm.PAPER.items()} == dict.fromkeys(bm.PAPER, "VLMEval") | moved
    before = bm.protocol_hash(["MME"])
    monkeypatch.setitem(bm.PROTOCOLS["sailvl-2024-12"], "MME", bm.PAPER["MME"]._replace(folder="elsewhere"))
    assert bm.protocol_hash(["MME"]) == before
    monkeypatch.setitem(bm.PROTOCOLS["sailvl-2024-12"], "MME", bm.PAPER["MME"]._replace(tiles=5))
    assert bm.protocol_hash(["MME"]) != before

def test_benchmark_names():
    assert bm.benchmark_names("toy") == ["toy_general", "toy_ocr", "toy_chart", "toy_count", "toy_halluc"]
    assert bm.benchmark_names("toy_ocr, toy_chart,toy_ocr") == ["toy_ocr", "toy_chart"]
    assert bm.benchmark_names("all") == [*bm.PAPER] and bm.benchmark_names("MMBench_DEV_EN,MME") == ["MMBench_DEV", "MME"]
    for bad in ("toy_orc", "", " , "):
        with pytest.raises(ValueError, match="there are: toy, all"):
            bm.benchmark_names(bad)
    with pytest.raises(ValueError, match="vlmevalkit-2025-04"):
        bm.benchmark_names("toy", "sailvl")

def test_protocol_hash_follows_the_rules():
    base = bm.protocol_hash(["toy_ocr"])
    assert base == bm.protocol_hash(["toy_ocr"]) == bm.protocol_hash(["toy_ocr"], max_tiles=4) and len(base) == 64
    assert len({base, bm.protocol_hash(["toy_chart"]), bm.protocol_hash(["toy_ocr"], max_tiles=9),
                bm.protocol_hash(["toy_ocr"], max_new_tokens=1), bm.protocol_hash(["MME"]),
                bm.protocol_hash(["MME"], protocol="vlmevalkit-2025-04")}) == 6

def test_averages_weigh_7_7_2_2_and_leave_out_what_has_no_score():
    value = {"general": 60.4, "ocr": 75.9, "math": 79.0, "hallucination": 66.2}
    got = bm.averages({name: value[b.group] for name, b in bm.PAPER.items()})
    assert round(got["overall"], 1) == 69.1 and got["groups"] == value and got["left_out"] == []
    for model, row in bm.PUBLISHED.items():                    # the published groups and averages agree in the same way
        assert row["source"] and all(0 < value <= 100 for key, value in row.items() if key != "source"), model
        if "overall" in row:
            assert (7 * row["general"] + 7 * row["ocr"] + 2 * row["math"] + 2 * row["hallucination"]) / 18 == pytest.approx(
                row["overall"], abs=0.08), model
        if "MathVista_MINI" in row:                            # OpenCompass: the mean of eight
            eight = ["MMStar", "MMMU_VAL", "MathVista_MINI", "HallusionBench", "AI2D_TEST", "OCRBench", "MMVet"]
            eight = [row[name] for name in eight] + [row.get("MMBench") or row["MMBench_DEV_V11"]]
            assert sum(eight) / 8 == pytest.approx(row["OpenCompass"], abs=0.06), model
    assert bm.PUBLISHED["SAIL-VL-2B, card"]["OpenCompass"] == 62.67 and bm.PUBLISHED["SAIL-VL-1.6-8B"]["OCRBench"] == 91.0
    got = bm.averages({"MMVet": None, "MME": 50.0, "POPE": 70.0})
    assert got == {"overall": 60.0, "groups": {"general": 50.0, "hallucination": 70.0}, "left_out": ["MMVet"]}
    assert bm.averages({"MMVet": None})["overall"] is None

def test_chance_level():
    chance = lambda name, rows: bm.chance_level(bm.find(name)[1], rows)
    four, two = {**OPTIONS, "D": "d", "answer": "A"}, {"A": "a", "B": "b", "answer": "B"}
    assert chance("toy_general", [four, two]) == 37.5
    assert chance("MMBench_DEV", [two | {"index": "1"}, two | {"index": "1000001"}]) == 25.0
    assert chance("toy_count", [{"answer": a} for a in "11123"]) == 60.0
    assert chance("toy_halluc", [{"answer": a} for a in ("Yes", "No")]) == 50.0
    assert chance("MMVet", [{"answer": "x", "category": "ocr"}]) is None

def test_fifty_thousand_rows_are_scored_in_seconds():
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh 0123456789", k=rng.randrange(3, 30))) for _ in range(5000)]
    word = lambda: rng.choice(words)
    for name, answer in (("DocVQA_VAL", lambda: repr([word(), word()])), ("MMStar", lambda: "B")):
        rows = [{**OPTIONS, "answer": answer(), "prediction": word()} for _ in range(50_000)]
        start = time.process_time()
        assert score(name, rows)[0] >= 0
        assert time.process_time() - start < 20, name
