"""The scorers against the rules of VLMEvalKit, told here a second time from its text.

December 2024 is its commit 226212fe, August 2026 its commit e8e78f05. The files read for this were
vlmeval/dataset/utils/vqa_eval.py, multiple_choice.py, yorn.py, mathvista.py, mmvet.py,
vlmeval/utils/matching_util.py, vlmeval/smp/misc.py and vlmeval/dataset/image_vqa.py. Nothing here
uses evals/scorers.py: where both read a rule wrongly, it was read wrongly twice.
"""

import ast
import random
import re

import pytest

from evals import score, table

N_PREDICTIONS = 3000
DECEMBER_2024 = "sailvl-2024-12"
AUGUST_2026 = "vlmevalkit-2026-08"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FORMULA = "Handwritten Mathematical Expression Recognition"


# ---- the rules, told again -----------------------------------------------------------------------


def references(cell):
    """A cell that evaluates to a list is that list, every other cell is one reference."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return [cell]
    return value if isinstance(value, list) else [cell]


def chosen_letter(text, choices, protocol):
    """The letter said, or the only option whose words are said, or None."""
    words = text
    for mark in [".", "(", ")", "[", "]", ",", ":", ";", "!", "*", "#", "{", "}"]:
        words = " ".join(words.split(mark))
    words = words.split()
    said = [letter for letter in choices if letter in words]
    if text.find("Failed to obtain answer via API") == -1:
        for refusal in (
            "Sorry, I can't help with images of people yet.",
            "I can't process this file.",
            "I'm sorry, but without the image provided",
            "Cannot determine the answer",
        ):
            if refusal in text:
                return "Z"
        if len(said) == 1 and protocol == DECEMBER_2024:
            return said[0]
        # later the letter has to be one of the last four words, where it is said first
        if len(said) == 1 and said[0] not in words[:-4]:
            return said[0]
        if not said and words.count("Z") > 0:
            return "Z"
        if protocol == AUGUST_2026:
            for match in list(re.finditer(r"(?i)answer\s+is\s+\**([abcd])", text))[:1]:
                if match.group(1).upper() in choices:
                    return match.group(1).upper()
    lower = text.lower()
    total = 0
    for option in choices.values():
        total += len(option)
    if protocol == AUGUST_2026 and len(lower) > total + total:
        return None
    told = [letter for letter, option in choices.items() if lower.count(option.lower()) > 0]
    return told[0] if len(told) == 1 else None


def filled_options(row):
    return {letter: row[letter] for letter in LETTERS if letter in row and row[letter] != ""}


def mcq_points(text, row, protocol):
    """Nothing chosen is the letter Z."""
    letter = chosen_letter(text, filled_options(row), protocol)
    return 1 if (letter if letter is not None else "Z") == row["answer"] else 0


def mmmu_points(text, row, protocol):
    """A question without options gets two: A is its answer, B is any other."""
    if row["A"] == "":
        row = {**row, "A": row["answer"], "B": "Other Answers"}
    right = row["answer"] if row["answer"] in list(LETTERS) else "A"
    return mcq_points(text, {**row, "answer": right}, protocol)


def mathvista_points(text, row, protocol):
    """A number as Python's int or float reads it; a choice by its letter."""
    if row["question_type"] == "multi_choice":
        choices = dict(zip(LETTERS, ast.literal_eval(row["choices"]), strict=False))
        return 1 if chosen_letter(text, choices, protocol) == row["answer_option"] else 0
    kinds = {"integer": int, "float": float}
    if row["answer_type"] not in kinds:
        return 0
    try:
        return (
            1 if kinds[row["answer_type"]](text) == kinds[row["answer_type"]](row["answer"]) else 0
        )
    except ValueError:
        return 0


def cleaned(text, protocol):
    """Each mark goes if it stands beside a space or a comma stands between digits."""
    everywhere = re.search("[0-9],[0-9]", text) is not None
    out = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside = (mark + " ") in text or (" " + mark) in text
        out = "".join(out.split(mark)) if beside or everywhere else " ".join(out.split(mark))
    # the first 32 full stops that no digit follows; later, that stand beside no digit
    left = 32
    kept = []
    for i, character in enumerate(out):
        beside = out[i + 1 : i + 2]
        if protocol == AUGUST_2026:
            beside += out[:i][-1:]
        if character == "." and not any(map(str.isdecimal, beside)) and left:
            left -= 1
        else:
            kept.append(character)
    return "".join(kept)


def yes_no_points(text, row, protocol):
    words = set(cleaned(text.lower(), protocol).split())
    told = {"yes": "Yes", "no": "No"}
    said = [told[word] for word in words & {"yes", "no"}]
    return 1 if said == [row["answer"]] else 0


SHORT_FORMS = {  # those that the predictions below use
    "dont": "don't",
    "couldnt": "couldn't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "ow's'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall": "y'all",
    "yalld've": "yalld've",
    "yall'd've": "y'all'd've",
    "y'allll": "y'all'll",
    "twas": "'twas",
    "theyre": "they're",
    "wont": "won't",
    "hes": "he's",
    "itll": "it'll",
}
COUNTING = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def vqa_form(text, protocol):
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = []
    for word in cleaned(text, protocol).lower().split():
        if word == "none":
            word = "0"
        elif word in COUNTING:
            word = str(COUNTING.index(word))
        if word in {"a", "an", "the"}:
            continue
        out.append(SHORT_FORMS.get(word, word))
    return " ".join(out)


def textvqa_points(text, row, protocol):
    """Each reference in turn is left out; three of the others make a point."""
    told = [vqa_form(reference, protocol) for reference in references(row["answer"])]
    said = vqa_form(text, protocol)
    points = []
    for i in range(len(told)):
        others = told[:i] + told[i + 1 :]
        points.append(min(1.0, sum(1 for other in others if other == said) / 3))
    return sum(points) / len(points)


def distance(a, b):
    """Edits from a to b, by the whole table."""
    if a == b:
        return 0
    table = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            same = a[i - 1] == b[j - 1]
            table[i][j] = min(
                table[i - 1][j] + 1,
                table[i][j - 1] + 1,
                table[i - 1][j - 1] + (0 if same else 1),
            )
    return table[-1][-1]


def anls_points(text, row, protocol):
    """Edits between the folded texts by the longer length of the texts as they are, in capitals."""
    gaps = []
    for reference in references(row["answer"]):
        edits = distance(" ".join(reference.lower().split()), " ".join(text.lower().split()))
        length = max(len(reference.upper()), len(text.upper()))
        gaps.append(edits / length if length else 0.0)
    similar = 1 - min(gaps)
    return similar if similar >= 0.5 else 0.0


def as_number(text):
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def chartqa_points(text, row, protocol):
    """The 5 % were of what the model said; since September 2025 they are of the reference."""
    said = text.strip()
    for reference in references(row["answer"]):
        base, other = (reference, said) if protocol == AUGUST_2026 else (said, reference)
        number = as_number(other)
        measure = as_number(base)
        if number is None or measure is None or measure == 0:
            if base.lower() == other.lower():
                return 1
        elif abs(number - measure) / abs(measure) <= 0.05:
            return 1
    return 0


def ocrvqa_points(text, row, protocol):
    for reference in references(row["answer"]):
        if reference.strip().lower() == text.strip().lower():
            return 1
    return 0


def ocrbench_points(text, row, protocol):
    for reference in references(row["answer"]):
        if row["category"] == FORMULA:
            said = text.strip().replace("\n", "").replace(" ", "")
            wanted = reference.strip().replace("\n", "").replace(" ", "")
        else:
            said = text.lower().strip().replace("\n", " ")
            wanted = reference.lower().strip().replace("\n", " ")
        if said.find(wanted) >= 0:
            return 1
    return 0


def mmvet_points(text, row, protocol):
    """The judge's reply is a number from 0 to 1, or it is asked again."""
    try:
        grade = float(text)
    except ValueError:
        return 0
    return grade if 0 <= grade <= 1 else 0


# ---- predictions ---------------------------------------------------------------------------------

WORDS = (
    "a an the red blue circle two none zero ten eleven dont don't it's couldnt've 1,000 3.5 U.S. "
    "Yes No A B C Z and/or U.S.A 12% maybe x^2 somebody'd ow's'at y'allll twas wont İstanbul "
    "straße café 中文 Other Answers well-known e-mail (cat) 1,5 .5 5. hes itll"
).split()
ENDS = [".", " ", "\n", "%", "!", " .", "  ", "\t", "İ", "ß", "..", "'", ","]
STARTS = [
    " ",
    "  ",
    "(",
    "The answer is ",
    "answer is **",
    "correct Answer\nis ",
    "A ",
    "the ",
    "$",
]
TAILS = [
    " one two three four",
    " one two three four five",
    " Failed to obtain answer via API",
    " I can't process this file.",
    " x" * 20,
    "." * 40,
]


class Maker:
    """Makes texts that are near to right answers, and some that are not."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def phrase(self):
        return " ".join(self.rng.choices(WORDS, k=self.rng.randrange(1, 5)))

    def number(self):
        rng = self.rng
        kinds = [
            str(rng.randrange(-50, 50)),
            str(rng.randrange(9_000_000)),
            repr(round(rng.uniform(-10, 100), rng.randrange(4))),
            rng.choice(["0", "1990", "nan", "inf", "-inf", "1_0", "1e3", ".5", "5.", "0.0"]),
        ]
        return rng.choice(kinds) + rng.choice(["", "", "", "%"])

    def near(self, text):
        """A number 5 % away from that of a text, more or less."""
        number = as_number(text.rstrip("%"))
        if number is None:
            return text
        number *= self.rng.choice([0.95, 1.05, 1 / 0.95, 1 / 1.05, 0.9499, 1.0501, 1, 1.2])
        shown = self.rng.choice([repr(number), f"{number:.1f}", f"{number:.3f}"])
        return shown + "%" * text.endswith("%")

    def tweak(self, text):
        rng = self.rng
        for _ in range(rng.randrange(4)):
            i = rng.randrange(len(text) + 1)
            text = rng.choice(
                [
                    text.upper(),
                    text.lower(),
                    text.title(),
                    text + rng.choice(ENDS),
                    rng.choice(STARTS) + text,
                    text.replace(" ", "  "),
                    text[:i] + rng.choice("abé12 .,-_/İß\n") + text[i + 1 :],
                    text[:i] + text[i + 1 :],
                    f"{text} {rng.choice(WORDS)}",
                    f"{rng.choice(WORDS)} {text}",
                    text.replace(" ", rng.choice(["", "-", ", ", "\u3000", "\u00a0"])),
                    f"{text}. {rng.choice('ABCDEZ')}",
                    rng.choice("ABCDZ") + rng.choice([". ", ") ", ": ", " "]) + text,
                    text + rng.choice(TAILS),
                ]
            )
        return text

    def options(self):
        n = self.rng.randrange(2, 6)
        texts = [self.phrase() + self.rng.choice(["", "", " "]) for _ in range(n)]
        return dict(zip("ABCDE", texts, strict=False))

    def cell(self, texts):
        return self.rng.choice([repr(texts), texts[0]])

    def mcq(self):
        options = self.options()
        answer = self.rng.choice([*options])
        said = [answer, options[answer], self.phrase(), f"{answer}. {options[answer]}", ""]
        empty = dict.fromkeys("ABCDE", "")
        return self.tweak(self.rng.choice(said)), {**empty, **options, "answer": answer}

    def mmmu(self):
        if self.rng.random() < 0.3:
            return self.mcq()
        answer = self.rng.choice([self.phrase(), self.number(), self.rng.choice("ABCZ")])
        said = [answer, "A", "B", self.phrase(), "Other Answers"]
        return self.tweak(self.rng.choice(said)), {"A": "", "B": "", "answer": answer}

    def mathvista(self):
        options = self.options()
        letter = self.rng.choice([*options])
        kind = self.rng.choice(["integer", "float", "list", "text"])
        answer = "[1, 2]" if kind == "list" else self.number()
        row = {"question_type": "free_form", "choices": "", "answer_option": "", "answer": answer}
        said = self.rng.choice([answer, self.near(answer)])
        if self.rng.random() < 0.4:
            choices = repr([*options.values()])
            row |= {"question_type": "multi_choice", "choices": choices, "answer_option": letter}
            said = self.rng.choice([letter, options[letter], self.phrase()])
        return self.tweak(said), row | {"answer_type": kind}

    def yes_no(self):
        answer = self.rng.choice(["Yes", "No"])
        said = self.rng.choice([answer, "yes", "no", self.phrase(), f"{answer}, it is"])
        return self.tweak(said), {"answer": answer}

    def textvqa(self):
        texts = [self.tweak(self.phrase()) for _ in range(self.rng.randrange(1, 4))]
        texts *= self.rng.randrange(1, 5)
        return self.tweak(self.rng.choice(texts)), {"answer": repr(texts)}

    def anls(self):
        texts = [self.tweak(self.phrase()) for _ in range(self.rng.randrange(1, 4))]
        said = self.tweak(self.rng.choice([*texts, self.phrase()]))
        return said, {"answer": self.cell(texts)}

    def chartqa(self):
        answer = self.rng.choice([self.number(), self.number(), self.phrase()])
        said = self.near(answer)
        return self.rng.choice([said, self.tweak(said)]), {"answer": self.cell([answer])}

    def ocrvqa(self):
        answer = self.tweak(self.phrase())
        return self.tweak(answer), {"answer": self.cell([answer])}

    def ocrbench(self):
        said, row = self.anls()
        row["answer"] = repr(references(row["answer"]))
        return said, row | {"category": self.rng.choice([FORMULA, "Doc-oriented VQA"])}

    def mmvet(self):
        grade = repr(round(self.rng.uniform(-0.2, 1.2), self.rng.randrange(3)))
        said = self.rng.choice([grade, self.tweak(grade), self.phrase()])
        return said, {"answer": "x", "category": "ocr"}


RULES = {
    "MMStar": (Maker.mcq, mcq_points),
    "MMMU_VAL": (Maker.mmmu, mmmu_points),
    "MathVista_MINI": (Maker.mathvista, mathvista_points),
    "MME": (Maker.yes_no, yes_no_points),
    "TextVQA_VAL": (Maker.textvqa, textvqa_points),
    "DocVQA_VAL": (Maker.anls, anls_points),
    "ChartQA_TEST": (Maker.chartqa, chartqa_points),
    "OCRVQA_TESTCORE": (Maker.ocrvqa, ocrvqa_points),
    "OCRBench": (Maker.ocrbench, ocrbench_points),
    "MMVet": (Maker.mmvet, mmvet_points),
}


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of cells that look like Python, but are not
@pytest.mark.parametrize("protocol", [DECEMBER_2024, AUGUST_2026])
@pytest.mark.parametrize("name", RULES)
def test_3000_fuzzed_predictions_get_the_points_that_vlmevalkit_gives(name, protocol):
    make, rule = RULES[name]
    maker = Maker(f"{name} {protocol}")
    b = table.find_benchmark(name, protocol)
    different = []
    n_right = 0
    for _ in range(N_PREDICTIONS):
        prediction, row = make(maker)
        if row["answer"] in score.EMPTY_CELLS:
            continue  # no reference, told in tests/test_score.py
        points = score.read_answer(b, prediction, row)[1]
        wanted = rule(prediction, row, protocol)
        n_right += wanted > 0
        if points != pytest.approx(wanted, abs=1e-12):
            different.append((prediction, row, points, wanted))
    assert not different, (len(different), different[:3])
    assert 0.1 * N_PREDICTIONS < n_right < 0.95 * N_PREDICTIONS, n_right  # a fair share of each


def test_every_scorer_of_the_paper_is_told_again():
    told = {table.find_benchmark(name).scorer for name in RULES}
    assert told == {b.scorer for b in table.PAPER.values()}
