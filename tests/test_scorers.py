"""Every scorer case by case: what VLMEvalKit's rule gives, worked out by hand."""

import random

import pytest
from benchmark_rows import FORMULA, FREE, OPTIONS

from evals import scorers


@pytest.mark.parametrize(
    "prediction, read",
    [
        ("B", "B"),
        ("b", ""),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B: blue circle", "B"),
        ("**B**", "B"),
        ("#B", "B"),
        ("The answer is B.", "B"),
        ("Answer:B", "B"),
        ("B\n", "B"),
        (" B ", "B"),
        ("{B}", "B"),
        ("B!", "B"),
        ("B;", "B"),
        ("A or B", ""),
        ("A, B", ""),
        ("", ""),
        ("   ", ""),
        ("D", ""),
        ("E", ""),
        ("Z", "Z"),
        ("AB", ""),
        ("B-", ""),
        ("blue circle", "B"),
        ("It is a BLUE CIRCLE", "B"),
        ("red", "C"),
        ("a red circle", ""),
        ("nothing of these", ""),
        ("A blue circle", "A"),
        ("I can't process this file.", "Z"),
        ("Cannot determine the answer, so B", "Z"),
        ("A and B, so blue circle", "B"),
        ("Z or B", "B"),
        ("Failed to obtain answer via API. B", ""),
        ("Failed to obtain answer via API: red", "C"),
        ("B B B", "B"),
    ],
)
def test_multiple_choice(prediction, read):
    assert scorers.multiple_choice(prediction, {**OPTIONS, "answer": "B"}) == (read, read == "B")


@pytest.mark.parametrize(
    "prediction, read",
    [
        ("B", "B"),
        ("B because it is", "B"),
        ("B because it is blue", ""),
        ("B because it is very blue", ""),
        ("B one two three four", ""),
        ("The answer is **B** since one two three four five six", "B"),
        ("one two three four five six B", "B"),
        ("the correct ANSWER IS b because of one two three four", "B"),
        ("answer is E, one two three four five", ""),
        ("blue circle", "B"),
        ("blue circle " + "x" * 40, ""),
        ("a blue circle, one two three", "B"),
        ("A or B", ""),
        ("(B)", "B"),
        ("one B two three four", "B"),
        ("one two three four B five six seven eight", ""),
        ("one two three four five B six seven eight", "B"),
        ("B is my answer because B", ""),  # its first place counts
        ("Answer is: B one two three four five", ""),
        ("answer is a matter of taste", "A"),
        ("the answer is Both", "B"),
        ("answer is D, one two three four five", ""),
        ("Z", "Z"),
        ("Z or not", "Z"),
        ("Z B", "B"),
        ("A or B, so the answer is B", "B"),
        ("I can't process this file.", "Z"),
        ("Cannot determine the answer is B", "Z"),
        ("Failed to obtain answer via API. answer is B", ""),
        ("Failed to obtain answer via API: red", "C"),
        ("BLUE CIRCLE!", "B"),
        ("red circle", ""),
        ("a red one", "C"),
        ("x" * 37 + "blue circle", "B"),
        ("x" * 38 + "blue circle", ""),
        ("  blue circle" + " " * 60, ""),  # 73 characters; VLMEvalKit counts outer spaces too
        ("The answer isB", ""),
        ("", ""),
        ("b", ""),
        ("correct answer  is  **C**, one two three four five", "C"),
        ("answer\nis\nA because one two three four five", "A"),
        ("answer is A. Or the answer is B? one two three", "A"),
    ],
)
def test_multiple_choice_of_today(prediction, read):
    assert scorers.multiple_choice(prediction, {**OPTIONS, "answer": "B"}, True) == (
        read,
        read == "B",
    )


def test_multiple_choice_reads_texts_as_they_stand_with_their_outer_spaces():
    row = {"A": "The leftmost C atom lies in it. ", "B": "Both C atoms lie in it.", "answer": "A"}
    for recent in (False, True):
        # the closing space is a part of the option, so only the first answer has its text
        said = [f"A or B: {row['A']}", f"A or B: {row['A'].strip()}"]
        assert [scorers.multiple_choice(x, row, recent)[0] for x in said] == ["A", ""]
    # What nothing is read in is the letter Z, which is the answer of a question on letters.
    assert scorers.mmmu("nothing", {"A": "", "B": "", "answer": "Z"}) == ("", True)


def test_a_full_stop_after_a_digit_stays_since_2025():
    assert scorers.vqa_normal("3.") == "3" and scorers.vqa_normal("3.", True) == "3."
    assert scorers.vqa_normal("end. .5 U.S.", True) == "end .5 us"
    assert scorers.vqa_score("3.", {"answer": "['3', '3', '3', '3']"})[1] == 1
    assert scorers.vqa_score("3.", {"answer": "['3', '3', '3', '3']"}, True)[1] == 0
    assert scorers.yes_no("1.yes", {"answer": "Yes"}) == ("", False)
    assert scorers.yes_no("Yes. 1.", {"answer": "Yes"}, True) == ("yes", True)


def test_multiple_choice_options_with_one_letter_texts():
    row = {"A": "X", "B": "Y", "answer": "B"}
    assert scorers.multiple_choice("Y", row) == ("B", True)
    assert scorers.multiple_choice("A", row) == ("A", False)


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("5.2", "5.2", True),
        ("It is 5.2.", "5.2", True),
        ("5.3", "5.2", False),
        ("A", "5.2", True),
        ("B", "5.2", False),
        ("Other answers", "5.2", False),
        ("Other Answers or 5.2", "5.2", False),
        ("", "5.2", False),
        ("Paris", "paris", True),
        ("PARIS", "Paris", True),
        ("B", "B", True),
        ("A", "B", False),
        ("C", "C", False),
        ("a", "5.2", False),
        ("(A)", "5.2", True),
        ("15.20", "5.2", True),
        ("52", "5.2", False),
        ("A B", "x", False),
        ("A or B: 5.2", "5.2", True),
        ("B 5.2", "5.2", False),
        ("A mile", "5.2", True),
        ("Z", "5.2", False),
        ("5.2 or other answers", "5.2", False),
        ("I can't process this file.", "file", False),
        ("Z 5.2", "5.2", False),
        ("five", "['5', 'five']", False),
        ("['5', 'five']", "['5', 'five']", True),
        ("-3", "3", True),
        ("$5", "5", True),
        ("", "B", False),
        ("C", "5.2", False),
        ("D", "D", False),
        ("other answers", "answers", False),
        ("x = 3", "X = 3", True),
    ],
)
def test_mmmu_open_questions(prediction, answer, right):
    assert scorers.mmmu(prediction, {"A": "", "B": "", "answer": answer})[1] is right
    assert scorers.mmmu(prediction, {**OPTIONS, "answer": "B"}) == scorers.multiple_choice(
        prediction, {**OPTIONS, "answer": "B"}
    )


@pytest.mark.parametrize(
    "prediction, read",
    [
        ("Yes", "yes"),
        ("yes", "yes"),
        ("YES.", "yes"),
        ("Yes, there is.", "yes"),
        ("No", "no"),
        ("no!", "no"),
        ("**No**", ""),
        ("No, there is no dog", "no"),
        ("Yes and no", ""),
        ("yes/no", ""),
        ("", ""),
        ("maybe", ""),
        ("nothing", ""),
        ("yesterday", ""),
        ("not", ""),
        ("know", ""),
        ("The answer is yes", "yes"),
        ("\tNo\n", "no"),
        ("Yes\nNo", ""),
        ("yes yes", "yes"),
        ("y", ""),
        ("true", ""),
        ("否", ""),
        ("no one", "no"),
        ("Yes,it is", "yes"),
        ("no.It is", ""),
        ("Is it? Yes", "yes"),
        ("'yes'", ""),
        ("N o", ""),
        ("yes-", "yes"),
        ("yes:", ""),
        ("(no)", "no"),
        ("yes.5", ""),
        ('"yes"', "yes"),
        ("no; it is not", "no"),
        ("1,000 yes!no", ""),
    ],
)
def test_yes_no(prediction, read):
    assert scorers.yes_no(prediction, {"answer": "Yes"}) == (read, read == "yes")
    assert scorers.yes_no(prediction, {"answer": "no"}) == (read, read == "no")


@pytest.mark.parametrize(
    "text, normal",
    [
        ("Yes", "yes"),
        ("The dog", "dog"),
        ("a an the", ""),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Dont", "don't"),
        ("its", "its"),
        ("itll", "it'll"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("wont", "won't"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("1,000/2", "10002"),
        ("and/or", "and or"),
        ("and /or", "and or"),
        ("3.5", "3.5"),
        ("end.", "end"),
        ("U.S.A", "usa"),
        (".5", ".5"),
        ("$5", "$5"),
        ("5%", "5%"),
        ("what?", "what"),
        ("'twas", "'twas"),
        ("twas", "'twas"),
        ("a\nb\tc", "b c"),
        ("x" + "." * 33, "x."),
        ("well-known", "well known"),
        ("o'clock", "o'clock"),
        ("e-mail :)", "e mail :"),
        ("", ""),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
    ],
)
def test_vqa_normal_form(text, normal):
    assert scorers.vqa_normal(text) == normal


@pytest.mark.parametrize(
    "prediction, references, points",
    [
        ("cat", ["cat"] * 10, 1),
        ("dog", ["cat"] * 10, 0),
        ("cat", ["cat"] + ["dog"] * 9, 0.3),
        ("cat", ["cat"], 0),
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("The Cat.", ["cat"] * 10, 1),
        ("two", ["2"] * 10, 1),
        ("", ["cat"] * 10, 0),
        ("", [""] * 10, 1),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1),
        ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7) / 10),
        ("1,000", ["1000"] * 10, 1),
        ("cat", ["cat"] * 3, 2 / 3),
        ("cat", ["cat"] * 4, 1),
        ("cat", ["dog"] * 3 + ["cat"], 1 / 4),
        ("cat", ["cat", "dog"], 1 / 6),
        ("x", ["y", "x", "x", "x"], 3 / 4),
        ("no", ["no", "No", "NO."], 2 / 3),
        ("10", ["ten"] * 5, 1),
        ("eleven", ["11"] * 5, 0),
        ("a cat", ["the cat"] * 5, 1),
        ("cats", ["cat"] * 5, 0),
        ("dont", ["don't"] * 5, 1),
        ("blue, red", ["blue red"] * 5, 1),
        ("blue,red", ["blue red"] * 5, 1),
        ("1,5", ["15"] * 5, 1),
        ("3.0", ["3"] * 5, 0),
        ("3.", ["3"] * 5, 1),
        ("stop!", ["stop"] * 5, 1),
        ("the", [""] * 5, 1),
        ("(cat)", ["cat"] * 5, 1),
        ("cat\ndog", ["cat dog"] * 5, 1),
        ("None", ["0"] * 5, 1),
        ("cat", ["dog"] * 7 + ["cat"] * 3, (7 + 3 * 2 / 3) / 10),
    ],
)
def test_vqa_score(prediction, references, points):
    assert scorers.vqa_score(prediction, {"answer": repr(references)})[1] == pytest.approx(points)


def levenshtein(a, b):
    """The table of the textbook, row by row."""
    row = [*range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        last, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def test_edit_distance_equals_the_textbook_table():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ("".join(rng.choices("abé中", k=rng.randrange(0, 90))) for _ in range(2))
        b = rng.choice([b, a[: len(a) // 2] + b[:5] + a[len(a) // 2 :]])
        assert scorers.edit_distance(a, b) == levenshtein(a, b) == scorers.edit_distance(b, a), (
            a,
            b,
        )


@pytest.mark.parametrize(
    "prediction, answer, points",
    [
        ("abc", "['abc']", 1),
        ("ABC", "['abc']", 1),
        ("abd", "['abc']", 1 - 1 / 3),
        ("abcd", "['abc']", 0.75),
        ("ab", "['abcd']", 0.5),
        ("a", "['abc']", 0),
        ("", "['abc']", 0),
        ("", "['']", 1),
        ("x", "['']", 0),
        ("a  b", "['a b']", 1),
        (" a b\n", "['A B']", 1),
        ("abc", "['xyz', 'abd']", 1 - 1 / 3),
        ("abc", "abc", 1),
        ("the abc", "['abc']", 0),
        ("$12", "['12']", 1 - 1 / 3),
        ("12.0", "['12']", 0.5),
        ("12.00", "['12']", 0),
        ("café", "['cafe']", 0.75),
        ("中文", "['中文']", 1),
        ("中文", "['中国']", 0.5),
        ("ba", "['ab']", 0),
        ("abcdefghij", "['abcdefghij.']", 1 - 1 / 11),
        ("a" * 100, "['" + "a" * 51 + "']", 0.51),
        ("a" * 100, "['" + "a" * 49 + "']", 0),
        ("abc", "['abc', 'abcd']", 1),
        ("1/2", "['1 / 2']", 0.6),
        ("yes", "['no']", 0),
        ("no", "['not']", 1 - 1 / 3),
        ("a-b", "['a b']", 1 - 1 / 3),
        ("[1]", "[1]", 0),
        ("1", "[1]", 1),
        ("abc", "[abc", 0.75),
        ("'abc'", "['abc']", 0.6),
    ],
)
def test_anls(prediction, answer, points):
    assert scorers.anls(prediction, {"answer": answer})[1] == pytest.approx(points)


@pytest.mark.parametrize(
    "prediction, answer, points",
    [  # the distance is that of the folded texts, the length that of the texts as written
        ("12 May", "['12  May']", 1),
        ("13 May", "['12  May']", 1 - 1 / 7),
        (" 13 May ", "['12 May']", 1 - 1 / 8),
        ("a" + " " * 9 + "c", "['a b']", 1 - 1 / 11),
        ("abc" + " " * 7, "['x']", 1 - 3 / 10),
        ("abcdefgh" + "\n" * 8, "['a']", 1 - 7 / 16),
        ("abcdefghij" + "\n" * 7, "['a']", 0),
        ("strasse", "['straße']", 1 - 2 / 7),
        ("STRASSE", "['straße']", 1 - 2 / 7),
        ("\u0130", "['i']", 0),  # two characters in lower case, one in upper case
    ],
)
def test_anls_divides_by_the_lengths_of_the_texts_as_they_were_written(prediction, answer, points):
    assert scorers.anls(prediction, {"answer": answer})[1] == pytest.approx(points)


@pytest.mark.parametrize(
    "prediction, answer, right",
    [  # VLMEvalKit's own verdicts of December 2024
        ("1895.2380952380952", "['1990']", False),
        ("53.33333333333333", "['56.0']", False),
        ("2731.5", "2595", True),
        ("0.9452348", "['0.898']", True),
        ("210542209.86%", "2000211", True),
        (" 5283632 ", "5032030", True),
        (" 1447 ", "1523", False),
        ("-950.00%", "-10", False),
        ("105.26315789473684", "100", True),
        ("17.1_0", "18", False),
        ("0", "0", True),
        ("0", "0.0", False),
        ("0.0", "100", False),
        ("inf", "100", False),
        ("100", "inf", False),
        ("Red", "red", True),
        ("12", "twelve", False),
    ],
)
def test_until_september_2025_the_5_percent_were_of_the_prediction(prediction, answer, right):
    assert scorers.swapped_relaxed_accuracy(prediction, {"answer": answer})[1] is right


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("100", "100", True),
        ("105", "100", True),
        ("95", "100", True),
        ("105.01", "100", False),
        ("94.9", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0.12", "12%", True),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("12%", "12%", True),
        ("12.", "12", True),
        ("12..", "12", False),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("5", "0", False),
        ("red", "Red", True),
        ("red.", "Red", False),
        ("reds", "red", False),
        ("", "red", False),
        ("", "3", False),
        ("1,000", "1000", False),
        ("1e2", "100", True),
        ("nan", "100", False),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("3 units", "3", False),
        ("Yes", "yes", True),
        (" 7 ", "7", True),
        ("%", "%", True),
        ("7%%", "0.07", True),
        ("2.09", "2", True),
        ("2.11", "2", False),
        ("3", "['2', '3']", True),
        ("1_0", "10", True),
        ("$5", "5", False),
        ("2015", "2014", True),
    ],
)
def test_relaxed_accuracy(prediction, answer, right):
    assert scorers.relaxed_accuracy(prediction, {"answer": answer})[1] is right


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("Mark Twain", "Mark Twain", True),
        ("mark twain", "Mark Twain", True),
        (" Mark Twain ", "Mark Twain", True),
        ("Mark  Twain", "Mark Twain", False),
        ("Mark Twain.", "Mark Twain", False),
        ("Twain", "Mark Twain", False),
        ("", "Mark Twain", False),
        ("", "", True),
        ("yes", "Yes", True),
        ("Yes, it is", "Yes", False),
        ("no", "Yes", False),
        ("1,000", "1000", False),
        ("É", "é", True),
        ("ß", "SS", False),
        ("a", "['a', 'b']", True),
        ("b", "['a', 'b']", True),
        ("c", "['a', 'b']", False),
        ("['a', 'b']", "['a', 'b']", False),
        ("A", "['a ']", True),
        ("2", "[1, 2]", True),
        ("[x", "[x", True),
        ("Romance", "romance", True),
        ("Sci-Fi", "sci fi", False),
        ("\tx\n", "x", True),
        ("x", "\tx\n", True),
        ("0", "O", False),
        ("'x'", "x", False),
        ("the x", "x", False),
        ("x\ny", "x y", False),
        ("中", "中", True),
    ],
)
def test_any_reference(prediction, answer, right):
    assert scorers.any_reference(prediction, {"answer": answer})[1] is right


@pytest.mark.parametrize(
    "prediction, answer, category, right",
    [
        ("STOP", "['stop']", "x", True),
        ("The sign says stop.", "['STOP']", "x", True),
        ("ST OP", "['STOP']", "x", False),
        ("", "['STOP']", "x", False),
        ("anything", "['']", "x", True),
        ("a\nb", "['a b']", "x", True),
        ("b", "['a', 'B']", "x", True),
        ("ab", "['a b']", "x", False),
        ("stop", "stop", "x", True),
        ("12", "[12]", "x", True),
        ("112", "['12']", "x", True),
        ("stop", "[' stop ']", "x", True),
        ("sto", "['stop']", "x", False),
        ("a  b", "['a b']", "x", False),
        ("É", "['é']", "x", True),
        ("x ^ 2", "['x^2']", FORMULA, True),
        ("X^2", "['x^2']", FORMULA, False),
        ("x^{2}", "['x^2']", FORMULA, False),
        ("so x^2 + 1", "['x^2+1']", FORMULA, True),
        ("x^\n2", "['x ^ 2']", FORMULA, True),
        ("", "['x']", FORMULA, False),
        ("\\frac 1 2", "['\\\\frac{1}{2}']", FORMULA, False),
        ("\\alpha", "['\\\\alpha']", FORMULA, True),
        ("x\t^2", "['x^2']", FORMULA, False),
        ("x^2", "['y', 'x^2']", FORMULA, True),
        ("x^2", "x^2", FORMULA, True),
        ("X", "['x']", "Handwriting Recognition", True),
        ("2", "['x^2']", FORMULA, False),
        ("a b", "['ab']", FORMULA, True),
        ("a b", "['ab']", "x", False),
        ("[", "['[']", "x", True),
    ],
)
def test_ocrbench(prediction, answer, category, right):
    assert scorers.ocrbench(prediction, {"answer": answer, "category": category})[1] is right


CHOICE = {
    "question_type": "multi_choice",
    "choices": "['3/11', '8/11', '6/11']",
    "answer_option": "B",
    "answer": "8/11",
}


@pytest.mark.parametrize(
    "prediction, row, read, right",
    [
        ("B", CHOICE, "B", True),
        ("(B) 8/11", CHOICE, "B", True),
        ("8/11", CHOICE, "B", True),
        ("C", CHOICE, "C", False),
        ("D", CHOICE, "", False),
        ("", CHOICE, "", False),
        ("It is 6/11", CHOICE, "C", False),
        ("A or B", CHOICE, "", False),
        ("I can't process this file.", CHOICE, "Z", False),
        ("b", CHOICE, "", False),
        *[
            (p, FREE | {"answer_type": "integer", "answer": "14"}, *out)
            for p, *out in [
                ("14", "14", True),
                (" 14 ", "14", True),
                ("14.0", "", False),
                ("fourteen", "", False),
                ("15", "15", False),
                ("+14", "14", True),
                ("014", "14", True),
                ("14.", "", False),
                ("$14", "", False),
                ("The answer is 14", "", False),
                ("", "", False),
                ("1_4", "14", True),
                ("-14", "-14", False),
            ]
        ],
        ("0", FREE | {"answer_type": "integer", "answer": "0"}, "0", True),
        *[
            (p, FREE | {"answer_type": "float", "answer": "1.20"}, *out)
            for p, *out in [
                ("1.2", "1.2", True),
                ("1.200", "1.2", True),
                ("1.21", "1.21", False),
                ("1.2 cm", "", False),
                ("12e-1", "1.2", True),
                ("1,2", "", False),
                ("nan", "nan", False),
                ("1.2\n", "1.2", True),
            ]
        ],
        ("[1, 2]", FREE | {"answer_type": "list", "answer": "[1, 2]"}, "[1, 2]", False),
    ],
)
def test_mathvista(prediction, row, read, right):
    assert scorers.mathvista(prediction, row) == (read, right)


@pytest.mark.parametrize(
    "grade, points",
    [
        ("1.0", 1),
        ("0.5", 0.5),
        ("0", 0),
        (" 0.3\n", 0.3),
        ("1", 1),
        ("1.1", None),
        ("-0.1", None),
        ("", None),
        ("0.5.", None),
        ("half", None),
        ("nan", None),
        ("inf", None),
        ("0.5 ", 0.5),
        ("1e-1", 0.1),
        ("0.0", 0),
        ("1e0", 1),
        ("+0.5", 0.5),
        (".5", 0.5),
        ("1.", 1),
        ("0.55", 0.55),
        ("50%", None),
        ("1%", None),
        ("%", None),
        ("0,5", None),
        ("0.5/1", None),
        ("score: 0.5", None),
        ("1.0000001", None),
        ("-0", 0),
        ("2", None),
        ("10", None),
        ("0.5\n0.6", None),
        ("-1", None),
        ("None", None),
        ("**1.0**", None),
    ],
)
def test_grades(grade, points):
    read, got = scorers.graded(grade, {})
    assert (read != "") == (points is not None) and got == (points or 0)


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("ABC", "ABC", True),
        ("abc", "ABC", True),
        (" ABC ", "ABC", True),
        ("ABC.", "ABC", True),
        ("A B C", "ABC", False),
        ("A  B\nC", "A B C", True),
        ("A B C", "A  B  C ", True),
        ("ABCD", "ABC", False),
        ("AB", "ABC", False),
        ("", "ABC", False),
        ("ABC..", "ABC", False),
        ("ABC.", "ABC.", True),
        ("ABC", "ABC.", False),
        ("Abc. ", "ABC", True),
        ("'ABC'", "ABC", False),
        ("the word is ABC", "ABC", False),
        ("É", "é", True),
        ("K 12 M 30", "K 12 M 30", True),
        ("K 12, M 30", "K 12 M 30", False),
        ("12", "12", True),
        ("12.0", "12", False),
        (".", ".", True),
        (".", "", False),
        ("\t12", "12", True),
        ("ß", "SS", False),
        ("0", "O", False),
        ("１", "1", False),
        ("ABC\u00a0D", "ABC D", True),
        ("a.b", "A.B", True),
        ("!", "!", True),
    ],
)
def test_exact_match(prediction, answer, right):
    assert scorers.exact_match(prediction, {"answer": answer})[1] is right


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("3", "3", True),
        ("3.", "3", True),
        ("three", "3", True),
        ("Three.", "3", True),
        ("There are 3 circles", "3", True),
        ("There are three circles", "3", True),
        ("3 or 4", "3", False),
        ("three (3)", "3", False),
        ("2-3", "3", False),
        ("", "0", False),
        ("zero", "0", True),
        ("None", "0", True),
        ("no", "0", False),
        ("13", "3", False),
        ("3.0", "3", True),
        ("3.5", "3", False),
        ("1,000", "1000", True),
        ("3,", "3", True),
        ("-3", "3", False),
        ("x3", "3", False),
        ("many", "3", False),
        ("ten", "10", True),
        ("twenty", "20", True),
        ("thirty", "30", False),
        ("3/4", "3", False),
        ("**3**", "3", True),
        ("nan", "3", False),
        ("3\n", "3", True),
        ("one", "1", True),
        ("someone", "1", False),
        ("4", "3", False),
        ("٣", "3", False),
    ],
)
def test_exact_number(prediction, answer, right):
    assert scorers.exact_number(prediction, {"answer": answer})[1] is right
