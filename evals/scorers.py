"""The rules that read an answer: (prediction, row) -> (what was read, points from 0 to 1).

What was read is "" where no rule can read the prediction. The rules are VLMEvalKit's
(open-compass/VLMEvalKit, at the commits that evals/table.py names) and give its scores for the
same predictions. Where it draws an option at random, nothing is drawn here: the answer counts as
not read.
"""
import ast
import functools
import re
import string

REFUSALS = (
    "Sorry, I can't help with images of people yet.", "I can't process this file.",
    "I'm sorry, but without the image provided", "Cannot determine the answer")
API_FAILURE = "Failed to obtain answer via API"
NUMBER_WORDS = {
    "zero": 0, "none": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13,
    "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18, "nineteen": 19,
    "twenty": 20}
# The punctuation marks of process_punctuation in vlmeval/smp.
MARKS = ';/[]"{}()=+\\_-><@`,?!'
APOSTROPHE_WORDS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()


def _contractions():
    """{a word with one of its apostrophes left out: the word}."""
    found = {}
    for word in APOSTROPHE_WORDS:
        for i, character in enumerate(word):
            if character == "'":
                found[word[:i] + word[i + 1:]] = word
    # VLMEvalKit's list has this one the other way round.
    found["somebody'd"] = "somebodyd"
    return found


CONTRACTIONS = _contractions()


# ---- cells of a row -----------------------------------------------------------------------------

def as_list(text):
    """A cell that holds a Python list, such as "['a', 'b']" -> its items as strings.

    Any other cell -> [text].
    """
    if not text.lstrip(" \t").startswith("["):
        return [text]
    try:
        return [str(item) for item in ast.literal_eval(text)]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [text]


def options(row):
    """{"A": text, ...} of the filled option columns of a row."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}


def to_float(text):
    """`12`, `-1.5`, `12%` (= 0.12) as a number, else None."""
    try:
        number = float(text.rstrip("%"))
    except ValueError:
        return None
    return number / 100 if text.endswith("%") else number


# ---- multiple choice ----------------------------------------------------------------------------

def option_letter(prediction, choices, recent=False):
    """The option that a prediction names: its letter, "Z" for a refusal, "" if unclear.

    It is the only option letter among the words, else the only option whose text occurs
    (can_infer of vlmeval/utils/matching_util.py). recent: as VLMEvalKit reads in 2026, only a
    letter of the last four words or after "answer is" counts, and no text in an answer of more
    than twice the options' length.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    letters = [letter for letter in choices if letter in words]
    if API_FAILURE not in prediction:
        if any(refusal in prediction for refusal in REFUSALS):
            return "Z"
        if "Z" in words and not letters:
            return "Z"
        if len(letters) == 1:
            words_after = len(words) - 1 - words.index(letters[0])
            if not recent or words_after < 4:
                return letters[0]
        if recent:
            stated = re.search(r"answer\s+is\s+\**([ABCD])", prediction, re.IGNORECASE)
            if stated and stated[1].upper() in choices:
                return stated[1].upper()
    said = prediction.lower()
    if recent and len(said) > 2 * sum(map(len, choices.values())):
        return ""
    found = [letter for letter, text in choices.items() if text.lower() in said]
    return found[0] if len(found) == 1 else ""


def multiple_choice(prediction, row, recent=False):
    """The right letter (eval_vanilla of vlmeval/dataset/utils/multiple_choice.py).

    As there, what cannot be read counts as the letter Z.
    """
    read = option_letter(prediction, options(row), recent)
    return read, (read or "Z") == row["answer"]


def mmmu(prediction, row, recent=False):
    """As multiple choice. An open question becomes one (MMMU_preproc, same file as above).

    Its option A is the answer, B is anything else.
    """
    answer = row["answer"]
    if not row.get("A"):
        row = row | {"A": answer, "B": "Other Answers"}
    is_letter = len(answer) == 1 and answer in string.ascii_uppercase
    return multiple_choice(prediction, row | {"answer": answer if is_letter else "A"}, recent)


def mathvista(prediction, row, recent=False):
    """A letter, or a number that Python can cast (post_check of dataset/utils/mathvista.py).

    As there, an answer of another type (a list) is never right.
    """
    if row["question_type"] == "multi_choice":
        choices = dict(zip(string.ascii_uppercase, as_list(row["choices"]), strict=False))
        read = option_letter(prediction, choices, recent)
        return read, read != "" and read == row["answer_option"]
    if row["answer_type"] not in ("integer", "float"):
        return prediction, False
    cast = int if row["answer_type"] == "integer" else float
    try:
        number = cast(prediction)
    except ValueError:
        return "", False
    try:
        return str(number), number == cast(row["answer"])
    except ValueError:
        return str(number), False


# ---- yes or no, one or several references -------------------------------------------------------

def without_punctuation(text, recent=False):
    """process_punctuation of vlmeval/smp.

    A mark beside a space goes, any other becomes a space. All of them go if there is a comma
    between digits. Then the full stops go that no digit follows, the first 32 of them. recent: a
    full stop after a digit stays too, as in VLMEvalKit since 2025.
    """
    comma_in_number = re.search(r"\d,\d", text)
    out = text
    for mark in MARKS:
        if comma_in_number or f"{mark} " in text or f" {mark}" in text:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    stop = r"(?<!\d)\.(?!\d)" if recent else r"\.(?!\d)"
    return re.sub(stop, "", out, count=32)


def yes_no(prediction, row, recent=False):
    """Exactly one of the words yes and no, whatever else is said.

    YOrN_Extraction of vlmeval/dataset/utils/yorn.py.
    """
    words = without_punctuation(prediction.lower(), recent).split()
    found = [word for word in ("yes", "no") if word in words]
    read = found[0] if len(found) == 1 else ""
    return read, read != "" and read == row["answer"].strip().lower()


@functools.lru_cache(65536)
def vqa_normal(text, recent=False):
    """A text without punctuation and articles, numbers as digits, contractions written out.

    process_answer of vlmeval/dataset/utils/vqa_eval.py.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = []
    for word in without_punctuation(text, recent).lower().split():
        # Only numbers up to ten, as there.
        if NUMBER_WORDS.get(word, 11) <= 10:
            word = str(NUMBER_WORDS[word])
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def vqa_score(prediction, row, recent=False):
    """Mean over the references of min(1, others that say the same / 3).

    process_line and vqa_score of vlmeval/dataset/utils/vqa_eval.py.
    """
    read = vqa_normal(prediction, recent)
    references = [vqa_normal(text, recent) for text in as_list(row["answer"])]
    same = references.count(read)
    if not same:
        return read, 0.0
    # Left out is one that says the same, or one that says something else.
    points = same * min(1, (same - 1) / 3) + (len(references) - same) * min(1, same / 3)
    return read, points / len(references)


def edit_distance(a, b):
    """Levenshtein distance of two texts, row by row of the textbook's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, y in enumerate(b, 1):
            replaced = diagonal + (x != y)
            diagonal = row[j]
            row[j] = min(replaced, diagonal + 1, row[j - 1] + 1)
    return row[-1]


def anls(prediction, row):
    """Similarity to the nearest reference, 0 below one half.

    anls_compute and hit_calculate of vlmeval/dataset/utils/vqa_eval.py. As there, the distance is
    that of the texts in lower case with single spaces. But it is divided by the length of the
    longer text as it was written, in upper case.
    """
    read = " ".join(prediction.lower().split())
    best = 0.0
    for text in as_list(row["answer"]):
        reference = " ".join(text.lower().split())
        longer = max(len(prediction.upper()), len(text.upper()))
        # So far apart are the texts at least. This keeps long answers fast.
        distance = abs(len(read) - len(reference))
        if read != reference and 2 * distance <= longer:
            distance = edit_distance(read, reference)
        best = max(best, 1 - distance / max(longer, 1))
    return read, best if best >= 0.5 else 0.0


def relaxed_accuracy(prediction, row):
    """Numbers within 5 % of a reference, everything else equal but for case.

    relaxed_correctness of vlmeval/dataset/utils/vqa_eval.py; ChartQA, arXiv 2203.10244.
    """
    read = prediction.strip()
    return read, any(relaxed_match(read, text) for text in as_list(row["answer"]))


def swapped_relaxed_accuracy(prediction, row):
    """As relaxed_accuracy, but within 5 % of the prediction.

    process_line of vqa_eval.py gave the two in this order until September 2025.
    """
    read = prediction.strip()
    return read, any(relaxed_match(text, read) for text in as_list(row["answer"]))


def relaxed_match(text, target):
    """Whether a text is a number within 5 % of the target, or equal to it but for case."""
    number = to_float(text)
    wanted = to_float(target)
    # A target of 0 has no relative error and is compared as text.
    if number is None or not wanted:
        return text.lower() == target.lower()
    return abs(number - wanted) / abs(wanted) <= 0.05


def any_reference(prediction, row):
    """Equal to one of the references but for case and outer space.

    process_line with method accuracy, of vlmeval/dataset/utils/vqa_eval.py.
    """
    read = prediction.strip()
    return read, read.lower() in [text.strip().lower() for text in as_list(row["answer"])]


def ocrbench(prediction, row):
    """A reference occurs in the prediction (OCRBench.evaluate, vlmeval/dataset/image_vqa.py)."""
    normal = ocr_text
    if row["category"] == "Handwritten Mathematical Expression Recognition":
        normal = ocr_formula
    said = normal(prediction)
    return prediction.strip(), any(normal(text) in said for text in as_list(row["answer"]))


def contains(prediction, row):
    """A reference occurs in the prediction, in any case and in whole words.

    Letters beside it that are not Latin make no word: Chinese is written without spaces.
    """
    read = " ".join(prediction.split())
    for text in as_list(row["answer"]):
        words = re.escape(" ".join(text.split()))
        if words and re.search(rf"(?<!\w){words}(?!\w)", read, re.ASCII | re.IGNORECASE):
            return read, True
    return read, False


def ocr_text(text):
    return text.lower().strip().replace("\n", " ")


def ocr_formula(text):
    return re.sub("[\n ]", "", text.strip())


# ---- read by a judge ----------------------------------------------------------------------------

def graded(grade, row):
    """What the judge says, 0 to 1 (MMVet_auxeval of vlmeval/dataset/utils/mmvet.py).

    It reads the judge's reply, never the prediction itself.
    """
    grade = grade.strip()
    points = to_float(grade)
    if points is None or "%" in grade or not 0 <= points <= 1:
        return "", 0.0
    return grade, points


# ---- toy ----------------------------------------------------------------------------------------

def exact_match(prediction, row):
    """Equal to one of the references but for case, runs of white space and a closing full stop.

    One full stop is dropped where no reference has one.
    """
    references = [" ".join(text.split()) for text in as_list(row["answer"])]
    said = prediction.strip()
    if not any(text.endswith(".") for text in references):
        said = said.removesuffix(".")
    read = " ".join(said.split())
    return read, read != "" and read.lower() in [text.lower() for text in references]


def last_exact(prediction, row):
    """What stands after the last colon, or all where there is none, as in exact_match."""
    return exact_match(prediction.rpartition(":")[2], row)


def exact_number(prediction, row):
    """The only number in the prediction, in digits or a word up to twenty, is the reference."""
    words = re.findall(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?|[a-z]+", prediction.lower())
    numbers = []
    for word in words:
        if word in NUMBER_WORDS:
            numbers.append(float(NUMBER_WORDS[word]))
        elif not word.isalpha():
            numbers.append(float(word.replace(",", "")))
    if len(numbers) != 1:
        return "", False
    return f"{numbers[0]:g}", numbers[0] == to_float(row["answer"].strip())
