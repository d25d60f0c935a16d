"""The 18 benchmarks of the paper and the toy ones: what is asked, how an answer is read, how a score comes of it.

A protocol is a table with a row per benchmark; its hash stands with every score, because 10-20 points can hide in a
prompt. `sailvl-2024-12` is the paper's: VLMEvalKit (open-compass/VLMEvalKit) of December 2024 with its SAIL-VL adapter,
vlmeval/vlm/sail_vl.py; `vlmevalkit-2025-04` has that adapter's later tiles, answer length and option reading. The rules
are VLMEvalKit's and give its scores for the same predictions, but where it draws an option at random nothing is drawn:
what no rule can read goes to the judge; without one it is wrong or, where answers are free text, there is no score.
"""
import ast, collections, functools, hashlib, json, math, re, string

# ---- prompts (wording: build_prompt and build_multi_choice_prompt of sail_vl.py) -------------------------------------
SHORT = "Answer the question using a single word or phrase."
TAIL = {"plain": "", "short": "\n" + SHORT, "mme": " " + SHORT, "yes_no": " Please answer yes or no. " + SHORT}
MCQ = {"en": "Answer with the option's letter from the given choices directly.", "zh": "请直接回答选项字母。"}
OPEN = {"en": "Answer the question directly.", "zh": "请直接回答问题。"}

def options(row):
    """{"A": text, ...} of the filled option columns of a row."""
    return {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}

def build_prompt(kind, row, n_images=1):
    """Row -> text: the question and TAIL[kind]; mcq: hint, question, options, wants a letter. Several images come first
    and are counted (reorganize_prompt of sail_vl.py)."""
    lines = [f"Image-{i + 1}: <image>" for i in range(n_images if n_images > 1 else 0)]
    if kind != "mcq": return "\n".join([*lines, row["question"] + TAIL[kind]])
    text = [row.get("hint"), row["question"], *(f"{c}. {text}" for c, text in options(row).items())]
    text = text[not text[0]:]                                          # without an empty hint
    wanted = (MCQ if options(row) else OPEN)["zh" if re.search("[\u4e00-\u9fff]", "".join(text)) else "en"]
    return "\n".join([*lines, *text, wanted])

# ---- scorers: (prediction, row) -> (what was read from it, points 0 to 1); "" when no rule can read it ---------------
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NUMBER_WORDS = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split())} | {"none": 0}
# words with an apostrophe that people leave out: each is also written with any one of its apostrophes missing
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in """ain't aren't can't could've couldn't couldn't've didn't
    doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've
    'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've""".split() for i, c in enumerate(word) if c == "'"} | {"somebody'd": "somebodyd"}

def as_list(text):
    """A cell that holds a Python list, such as "['a', 'b']" -> its items as strings; any other -> [text]."""
    try:
        return [*map(str, ast.literal_eval(text))] if text.startswith("[") else [text]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [text]

def option_letter(prediction, choices, recent=False):
    """The only option letter among the words ("Z": a refusal), else the only option whose text occurs, else ""
    (can_infer of vlmeval/utils/matching_util.py). recent: only a letter of the last four words or after "answer is"
    counts, and no text in an answer of more than twice the options' length."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    letters = [letter for letter in choices if letter in words]
    if "Failed to obtain answer via API" not in prediction:
        if any(refusal in prediction for refusal in REFUSALS) or (not letters and "Z" in words): return "Z"
        if len(letters) == 1 and not (recent and words.index(letters[0]) <= len(words) - 5): return letters[0]
        said = recent and re.search(r"answer\s+is\s+\**([ABCD])", prediction, re.IGNORECASE)
        if said and said[1].upper() in choices: return said[1].upper()
    if recent and len(prediction) > 2 * sum(map(len, choices.values())): return ""
    found = [letter for letter, text in choices.items() if text.lower() in prediction.lower()]
    return found[0] if len(found) == 1 else ""

def multiple_choice(prediction, row, recent=False):
    """The right letter (eval_vanilla of vlmeval/dataset/utils/multiple_choice.py)."""
    read = option_letter(prediction.strip(), options(row), recent)
    return read, read == row["answer"].strip() != ""

def mmmu(prediction, row, recent=False):
    """As multiple choice; an open question becomes one: A the answer, B anything else (MMMU_preproc, same file)."""
    choices = row if row.get("A") else row | {"A": row["answer"], "B": "Other Answers"}
    answer = row["answer"] if row["answer"] in [*string.ascii_uppercase] else "A"
    return multiple_choice(prediction, choices | {"answer": answer}, recent)

def mathvista(prediction, row, recent=False):
    """A letter, or a number that Python can cast (post_check of vlmeval/dataset/utils/mathvista.py, where an answer of
    any other type, a list, is never right)."""
    if row["question_type"] == "multi_choice":
        read = option_letter(prediction, dict(zip(string.ascii_uppercase, as_list(row["choices"]))), recent)
        return read, read == row["answer_option"] != ""
    if (cast := {"integer": int, "float": float}.get(row["answer_type"])) is None: return prediction, False
    read = ""
    try:
        read = str(number := cast(prediction))
        return read, number == cast(row["answer"])
    except ValueError:                                                 # of the prediction, or of the reference
        return read, False

def punctuation(text):
    """process_punctuation of vlmeval/smp: a mark beside a space goes, any other becomes a space; all go if there is a
    comma between digits; then full stops that no digit follows, the first 32 of them."""
    commas, out = re.search(r"\d,\d", text), text
    for mark in {*text} & {*';/[]"{}()=+\\_-><@`,?!'}:
        out = out.replace(mark, "" if commas or mark + " " in text or " " + mark in text else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)

@functools.lru_cache(65536)
def vqa_normal(text):
    """Punctuation, number words, articles, contractions (process_answer of vlmeval/dataset/utils/vqa_eval.py)."""
    words = punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [str(NUMBER_WORDS[word]) if NUMBER_WORDS.get(word, 11) <= 10 else word for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))

def vqa_score(prediction, row):
    """Mean over the references of min(1, others that say the same / 3) (process_line, vqa_score, same file)."""
    references, read = [*map(vqa_normal, as_list(row["answer"]))], vqa_normal(prediction)
    same, n = references.count(read), len(references)
    return read, (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n if same else 0.0

def edit_distance(a, b):
    """Levenshtein distance, a column of the table at a time as the bits of a number (Myers 1999, Hyyrö 2001)."""
    if not a or not b: return len(a) + len(b)
    at, up, down, distance, last = collections.defaultdict(int), (1 << len(a)) - 1, 0, len(a), 1 << (len(a) - 1)
    for i, c in enumerate(a): at[c] |= 1 << i
    for c in b:                                                        # up, down: where the column grows and falls
        equal = at.get(c, 0) | down
        diagonal = ((up + (equal & up)) ^ up) | equal
        right, left = down | ~(up | diagonal), up & diagonal
        distance += bool(right & last) - bool(left & last)
        right = right << 1 | 1
        up, down = (left << 1 | ~(right | diagonal)) & (2 * last - 1), right & diagonal & (2 * last - 1)
    return distance

def anls(prediction, row):
    """Similarity to the nearest reference, 0 below one half (anls_compute and hit_calculate, same file)."""
    normal = lambda text: " ".join(text.lower().split())
    read = normal(prediction)
    near = min(edit_distance(*sorted((read, normal(text)), key=len)) / max(len(read), len(normal(text)), 1)
               for text in as_list(row["answer"]))
    return read, 1 - near if 1 - near >= 0.5 else 0.0

def to_float(text):
    """`12`, `-1.5`, `12%` (= 0.12) as a number, else None."""
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None

def relaxed_accuracy(prediction, row):
    """Numbers within 5 % of a reference, everything else equal but for case (relaxed_correctness, same file; ChartQA,
    arXiv 2203.10244). A reference of 0 has no relative error."""
    read, near = prediction.strip(), lambda number, target: abs(number - target) / abs(target) <= 0.05
    return read, any(near(to_float(read), to_float(text)) if to_float(read) is not None and to_float(text) else
                     read.lower() == text.lower() for text in as_list(row["answer"]))

def any_reference(prediction, row):
    """Equal to one of the references but for case and outer space (process_line, accuracy, same file)."""
    read = prediction.strip()
    return read, read.lower() in [text.strip().lower() for text in as_list(row["answer"])]

def ocrbench(prediction, row):
    """A reference occurs; formulas without spaces, case and all (OCRBench.evaluate, vlmeval/dataset/image_vqa.py)."""
    formula = row["category"] == "Handwritten Mathematical Expression Recognition"
    normal = lambda text: re.sub("[\n ]", "", text.strip()) if formula else text.lower().strip().replace("\n", " ")
    return prediction.strip(), any(normal(text) in normal(prediction) for text in as_list(row["answer"]))

def yes_no(prediction, row):
    """Exactly one of the words yes and no, whatever else is said (YOrN_Extraction of vlmeval/dataset/utils/yorn.py)."""
    found = {"yes", "no"} & set(punctuation(prediction.lower()).split())
    read = found.pop() if len(found) == 1 else ""
    return read, read == row["answer"].strip().lower() != ""

def graded(grade, row):
    """What the judge says, 0 to 1 (MMVet_auxeval of vlmeval/dataset/utils/mmvet.py); never the prediction itself."""
    points = to_float(grade.strip())
    return (grade.strip(), points) if points is not None and 0 <= points <= 1 and "%" not in grade else ("", 0.0)

def exact_match(prediction, row):
    """Toy: equal but for case, runs of white space and one closing full stop that the reference does not have."""
    read = " ".join(prediction.strip().removesuffix("" if row["answer"].strip().endswith(".") else ".").split())
    return read, read.lower() == " ".join(row["answer"].split()).lower() != ""

def exact_number(prediction, row):
    """Toy: the only number in the prediction, in digits or as an English word up to twenty, equals the reference."""
    words = re.findall(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?|[a-z]+", prediction.lower())
    numbers = [float(NUMBER_WORDS.get(word, word.replace(",", ""))) for word in words
               if word in NUMBER_WORDS or not word.isalpha()]
    read = f"{numbers[0]:g}" if len(numbers) == 1 else ""
    return read, read != "" and numbers[0] == to_float(row["answer"].strip())

# ---- totals: rows, what was read, points -> (score 0-100, details) ---------------------------------------------------
COLUMNS = dict(categories="category", l2_categories="l2-category", splits="split", tasks="task", skills="skills")
percent = lambda part, whole: round(100 * part / whole, 2) if whole else 0.0

def mean(rows, reads, points):
    """The mean, and by category, split, task and skill where there are such columns (report_acc, MathVista_acc)."""
    details = {}
    for name, column in COLUMNS.items():
        groups = collections.defaultdict(list)
        for row, p in zip(rows, points):
            for key in as_list(row.get(column, "")): groups[key].append(p)
        if {*groups} - {""}: details[name] = {key: percent(sum(v), len(v)) for key, v in sorted(groups.items())}
    return percent(sum(points), len(rows)), details

def capabilities(rows, reads, points):
    """The mean, and that of each capability over the rows whose category names it (MMVet_acc)."""
    score, details = mean(rows, reads, points)
    by = {c: [p for row, p in zip(rows, points) if c in row["category"]] for c in "rec ocr know gen spat math".split()}
    return score, details | {"capabilities": {c: percent(sum(v), len(v)) for c, v in by.items()}}

def circular(rows, reads, points):
    """A question counts if it is right in every rotation of its options: index + k * 1,000,000 (mcq_circular_eval)."""
    groups, number = collections.defaultdict(list), lambda row: int(float(row["index"]))
    try:
        for row, p in zip(rows, points): groups[int(float(row.get("g_index") or number(row) % 1_000_000))].append(p)
    except (ValueError, OverflowError):
        raise ValueError(f"row {row['index']!r}: index and g_index must be numbers, question + k * 1,000,000") from None
    if not (first := [row for row in rows if number(row) in groups]):
        raise ValueError("no row with an index below 1,000,000: the questions whose rotations these are, are missing")
    score, details = mean(first, reads, [math.prod(groups[number(row)]) for row in first])
    return score, {"questions": len(first), **details}

def rates(rows, reads):
    """Yes is the positive class; what cannot be read counts as no (cal_f1_score in POPE_rating of yorn.py)."""
    answers = [row["answer"].strip().lower() for row in rows]
    true, said, hit = answers.count("yes"), reads.count("yes"), [*zip(answers, reads)].count(("yes", "yes"))
    return {"precision": percent(hit, said), "recall": percent(hit, true), "f1": percent(2 * hit, said + true),
            "yes_ratio": percent(said, len(rows))}

def pope(rows, reads, points):
    """F1; a row counts once for each of its comma-separated categories (POPE_rating)."""
    every = [(row | {"category": c}, *rest) for row, *rest in zip(rows, reads, points)
             for c in row.get("category", "").split(",")]
    part = lambda c: rates(*map(list, zip(*[(row, read) for row, read, _ in every if c in (None, row["category"])])))
    by = {c: part(c)["f1"] for c in sorted({row["category"] for row, *_ in every})}
    accuracy = percent(sum(p for *_, p in every), len(every))
    return part(None)["f1"], {"accuracy": accuracy, **part(None), "categories": by}

PERCEPTION = "OCR artwork celebrity color count existence landmark position posters scene".split()
REASONING = "code_reasoning commonsense_reasoning numerical_calculation text_translation".split()

def mme(rows, reads, points):
    """100 * (accuracy + share of images with both questions right) of 14 categories, summed, / 28 (MME_rating)."""
    images = collections.defaultdict(lambda: collections.defaultdict(list))
    for row, p in zip(rows, points): images[row["category"]][row["image_path"]].append(p)
    by = {c: 100 * (sum(map(sum, v.values())) / sum(map(len, v.values()))
                    + sum(len(p) > 1 and all(p[:2]) for p in v.values()) / len(v)) for c, v in sorted(images.items())}
    sums = {"perception": sum(by.get(c, 0) for c in PERCEPTION), "reasoning": sum(by.get(c, 0) for c in REASONING)}
    missing, total = [c for c in PERCEPTION + REASONING if c not in by], sum(sums.values())
    halves = sum(len(p) < 2 for v in images.values() for p in v.values())
    part = {"warning": f"only a part of MME: {len(missing)} of 14 categories are missing, {halves} images have one of "
                       "their two questions; both count as 0"} if missing or halves else {}
    return round(total / 28, 2), {**sums, "total": total, "categories": by, "missing_categories": missing, **part}

def hallusion(rows, reads, points):
    """Mean of three accuracies: of answers, of figures with every question right, of questions right on every figure.
    The index holds set, figure and question in its 4th to 6th part (Hallusion_rating)."""
    figures, questions = collections.defaultdict(list), collections.defaultdict(list)
    for row, p in zip(rows, points):
        parts = row["index"].split("_")
        if len(parts) < 6: raise ValueError(f"index {row['index']!r} does not name set, figure and question")
        figures[row["l2-category"], parts[3], parts[4]].append(p)
        questions[row["l2-category"], parts[3], parts[5]].append(p)
    accuracy = [sum(points) / len(rows), *(sum(map(all, g.values())) / len(g) for g in (figures, questions))]
    three = {name: percent(x, 1) for name, x in zip(("aAcc", "fAcc", "qAcc"), accuracy)}
    return percent(sum(accuracy), 3), three | mean(rows, reads, points)[1]

def ocrbench_total(rows, reads, points):
    """Right answers of 1,000 / 10 (OCRBench.evaluate)."""
    by = collections.Counter(row["category"] for row, p in zip(rows, points) if p)
    text = sum(n for c, n in by.items() if c.endswith("Recognition") and "Mathematical" not in c)
    part = {"warning": f"only a part of OCRBench: {len(rows)} of 1,000 questions, the others count as wrong; of these "
                       f"{percent(by.total(), len(rows))} % are right"} if len(rows) < 1000 else {}
    return by.total() / 10, {"final_score": by.total(), "Text Recognition": text, "categories": {**by}, **part}

# ---- the protocols ---------------------------------------------------------------------------------------------------
# judge: no = rules read every answer, optional = it reads what they cannot, required = no score without it; tiles: the
# most of one picture, thumbnail not counted (64 over all pictures of a row); period: one closing full stop is dropped;
# upscale: of the first picture; split: the only rows that count; jpeg: pictures are stored and read as VLMEvalKit does,
# rows without one left out; file: name of the .tsv; folder: where it is under ADDRESS, which decides no score
Benchmark = collections.namedtuple("Benchmark", """md5 group prompt scorer total judge tiles max_new_tokens period
    upscale split jpeg recent file folder""", defaults=(mean, "no", 6, 4096, False, 1, "", True, False, "", "VLMEval"))
ADDRESS = "https://opencompass.openxlab.space/utils"        # DATASET_URL of vlmeval/dataset/image_mcq.py and its like
letter = functools.partial(Benchmark, prompt="mcq", scorer=multiple_choice, judge="optional")
words = functools.partial(Benchmark, prompt="short", group="ocr")
toy = functools.partial(Benchmark, "", "toy", tiles=4, max_new_tokens=16, jpeg=False)
PAPER = {
    "MMStar": letter("e1ecd2140806c1b1bbf54b43372efb9e", "general"),
    "MMBench_DEV": letter("b6caf1133a01c6bb705cf753bb527ed8", "general", total=circular, file="MMBench_DEV_EN",
                          folder="benchmarks/MMBench"),
    "MMMU_VAL": letter("585e8ad75e73f75dcad265dfd0417d64", "general", scorer=mmmu, tiles=12, upscale=2,
                       split="validation", file="MMMU_DEV_VAL"),
    "MME": Benchmark("b36b43c3f09801f5d368627fb92187c3", "general", "mme", yes_no, mme, "optional"),
    "SEEDBench_IMG": letter("68017231464752261a2526d6ca3a10c0", "general", folder="benchmarks/SEEDBench"),
    "RealWorldQA": letter("4de008f55dc4fd008ca9e15321dc44b7", "general"),
    "MMVet": Benchmark("748aa6d4aa9d4de798306a63718455e3", "general", "plain", graded, capabilities, "required"),
    "OCRBench": words("e953d98a987cc6e26ef717b61260b778", scorer=ocrbench, total=ocrbench_total, tiles=24),
    "DocVQA_VAL": words("d5ee77e1926ff10690d469c56b73eabf", scorer=anls, tiles=18),
    "InfoVQA_VAL": words("2342e9c225222f0ef4dec545ebb126fe", scorer=anls, tiles=24),
    "ChartQA_TEST": words("c902e0aa9be5582a7aad6dcf52734b42", scorer=relaxed_accuracy, tiles=12, period=True),
    "TextVQA_VAL": words("b233b31f551bbf4056f2f955da3a92cd", scorer=vqa_score),
    "AI2D_TEST": letter("0f593e0d1c7df9a3d69bf1f947e71975", "ocr"),
    "OCRVQA_TESTCORE": words("c5239fe77db8bdc1f2ad8e55e0d1fe97", scorer=any_reference, tiles=12, period=True),
    "MathVista_MINI": Benchmark("f199b98e178e5a2a20e7048f5dcb0464", "math", "plain", mathvista, judge="required"),
    "ScienceQA": letter("e42e9e00f9c59a80d8a5db35bc32b71f", "math", file="ScienceQA_TEST",
                        folder="benchmarks/ScienceQA"),
    "POPE": Benchmark("c12f5acb142f2ef1f85a26ba2fbe41d5", "hallucination", "plain", yes_no, pope, "optional"),
    "HallusionBench": words("0c23ac0dc9ef46832d7a24504f2a0c7c", group="hallucination", prompt="yes_no", scorer=yes_no,
                            total=hallusion, judge="optional"),
}
TOY = {
    "toy_general": toy("mcq", multiple_choice), "toy_ocr": toy("plain", exact_match, max_new_tokens=48),
    "toy_chart": toy("short", relaxed_accuracy, period=True), "toy_count": toy("short", exact_number),
    "toy_halluc": toy("plain", yes_no)}
PAPER, TOY = ({name: b._replace(file=b.file or name) for name, b in table.items()} for table in (PAPER, TOY))
LATER = {name: b._replace(tiles=max(10, b.tiles), max_new_tokens=1024, recent=b.scorer in (
    multiple_choice, mmmu, mathvista)) for name, b in PAPER.items()}
PROTOCOLS = {"sailvl-2024-12": PAPER | TOY, "vlmevalkit-2025-04": LATER | TOY}
JUDGE = {                           # what a judge is asked, in words of our own
    multiple_choice: "{question}\n{options}\n\nSomeone answered: {prediction}\n\nWhich option does that mean? Reply "
                     "with its letter alone, or with Z if it means none of them.",
    yes_no: "{question}\nThe answer was: {prediction}\n\nDoes that mean yes or no? Reply yes, no or unknown.",
    mathvista: "{question}\n\nSomeone answered: {prediction}\n\nReply with the final answer alone, as {form}",
    graded: "Question: {question}\nReference: {answer}\nAnswer: {prediction}\n\nHow right is the answer, 0.0 to 1.0 in "
            "steps of 0.1? <AND> joins parts that must all be there, <OR> parts of which one is enough. Reply with the "
            "number alone."}
JUDGE[mmmu] = JUDGE[multiple_choice]
RULES = 4                           # version of the scorers' code and of how pictures are read
# columns that scorer or total look at, `index`, `question` and `answer` apart
NEEDS = {mme: ["category", "image_path"], ocrbench: ["category"], hallusion: ["l2-category"], graded: ["category"],
         multiple_choice: ["A", "B"], mmmu: ["A", "B"], pope: ["category"],
         mathvista: ["question_type", "answer_type", "choices", "answer_option"]}
needs = lambda b: NEEDS.get(b.scorer, []) + NEEDS.get(b.total, [])

def find(name, protocol="sailvl-2024-12"):
    """-> (name, Benchmark), by its name here or that of its file."""
    if protocol not in PROTOCOLS: raise ValueError(f"--protocol={protocol}: unknown; there are {', '.join(PROTOCOLS)}")
    for key, b in PROTOCOLS[protocol].items():
        if name in (key, b.file): return key, b
    raise ValueError(f"unknown benchmark {name!r}; there are: toy, all, {', '.join(PROTOCOLS[protocol])}")

def benchmark_names(text, protocol="sailvl-2024-12"):
    """Comma list -> names; `toy` is the five toy ones, `all` the 18 of the paper."""
    sets = {"toy": [*TOY], "all": [*PAPER]} if protocol in PROTOCOLS else {}       # else find refuses it
    parts = [sets.get(word.strip()) or [find(word.strip(), protocol)[0]] for word in text.split(",")]
    return [*dict.fromkeys(name for part in parts for name in part)]

def protocol_hash(names, max_tiles=0, max_new_tokens=0, image_as="pixels", protocol="sailvl-2024-12"):
    """sha256 over everything that decides a score apart from the model and the rows (0 = the table's own value)."""
    rules = {name: [getattr(v, "__name__", v) for v in b._replace(
        tiles=max_tiles or b.tiles, max_new_tokens=max_new_tokens or b.max_new_tokens, folder="")]
        for name, b in PROTOCOLS[protocol].items() if name in names}
    words = [TAIL, MCQ, OPEN, REFUSALS, [*JUDGE.values()], image_as, "greedy", "thumbnail", RULES]
    return hashlib.sha256(json.dumps([rules, words], sort_keys=True).encode()).hexdigest()

# ---- scores ----------------------------------------------------------------------------------------------------------
def read_answers(b, rows, judge=None):
    """Rows with `prediction` -> [(what was read, points)]; judge: `ask` of a judge.Judge, for what no rule reads."""
    read = functools.partial(b.scorer, recent=True) if b.recent else b.scorer
    found = [("", 0.0) if b.scorer is graded else read(row.get("prediction", ""), row) for row in rows]
    unread = [i for i, (text, _) in enumerate(found) if not text] if judge and b.judge != "no" else []
    valid = [lambda reply, row=rows[i]: read(reply, row)[0] != "" for i in unread]
    forms, prompts = {"integer": "an integer", "float": "a number"}, []
    for row in (rows[i] for i in unread):
        choices = options(row) or {"A": row["answer"], "B": "Other Answers"}
        listed = "\n".join(f"{c}. {text}" for c, text in choices.items())
        form = forms.get(row.get("answer_type"), "the letter of the option")
        prompts.append(JUDGE[b.scorer].format_map({"prediction": "", **row, "options": listed, "form": form}))
    replies = judge(prompts, valid) if unread else []
    for i, reply in zip(unread, replies): found[i] = read(reply, rows[i]) if reply else ("", 0.0)
    return found

def score_rows(b, rows, judge=None):
    """Rows with `prediction` -> (score 0-100 or None, details). A row without prediction is wrong. None comes with
    details["reason"]: there are answers that only a judge could read. What it was asked and cannot read is wrong, as in
    VLMEvalKit; but where all is its grading, a reply without a grade leaves the score None."""
    rows = [row for row in rows if not b.split or row.get("split", b.split) == b.split]
    if not rows: raise ValueError(f"no rows of split {b.split!r}; only those count")
    for row in rows:
        if not "".join(as_list(row["answer"])).strip(): raise ValueError(f"row {row['index']}: its answer is empty")
    reads, points = map(list, zip(*read_answers(b, rows, judge)))
    unread = reads.count("")
    details = {"n": len(rows), "correct": round(sum(points), 2), "not_readable": unread}
    if b.judge == "required" and unread and (not judge or b.scorer is graded):
        why = "got no grade from the judge" if judge else "need a judge: --judge=URL --judge_model=NAME"
        return None, details | {"reason": f"{unread} of {len(rows)} answers {why}"}
    score, more = b.total(rows, reads, points)
    return score, details | (rates(rows, reads) if b.scorer is yes_no else {}) | more

def chance_level(b, rows):
    """0-100 without looking: a random option where there are options, else the most frequent answer every time."""
    if b.prompt == "mcq":
        return b.total(rows, [], [1 / len(options(row)) if options(row) else 0.0 for row in rows])[0]
    favourite = as_list(collections.Counter(row["answer"] for row in rows).most_common(1)[0][0])[0]
    return score_rows(b, [row | {"prediction": favourite} for row in rows])[0]

def averages(scores):
    """{name: score} -> {"overall", "groups", "left_out"}: plain means, in which the paper's groups weigh 7, 7, 2 and 2;
    a benchmark without a score is left out and named."""
    average = lambda values: round(sum(values) / len(values), 2) if values else None
    scored, groups = {name: s for name, s in scores.items() if s is not None}, collections.defaultdict(list)
    for name in scores: groups[(PAPER | TOY)[name].group] += [scored[name]] if name in scored else []
    return {"overall": average([*scored.values()]), "groups": {g: average(v) for g, v in groups.items()},
            "left_out": [name for name in scores if name not in scored]}

# Published, 0-100 (MME / 28, OCRBench / 10), row by row: model, where it stands, its values; names of benchmarks and
# averages that a run here does not have (MMBench_DEV_V11, OpenCompass, ...) are not comparable with any of its own
PUBLISHED = {name: {"source": source, **dict(zip(columns.split(), values))} for source, columns, rows in (
    ("arXiv 2501.05952; MMStar to MME: SAIL-VL-8B model card",
     "overall general ocr math hallucination MMStar MMBench_DEV MMMU_VAL MME", (
         ("SAIL-VL-2B", 69.1, 60.4, 75.9, 79.0, 66.2), ("InternVL2.5-MPO-2B", 67.7, 63.1, 71.1, 75.3, 64.5),
         ("Qwen2-VL-2B", 64.4, 58.3, 72.5, 59.0, 62.9), ("DeepSeekVL-2-Tiny", 67.0, 59.4, 74.4, 71.3, 63.6),
         ("SAIL-VL-8B", 74.5, 68.3, 79.8, 83.3, 68.7, 64.2, 79.5, 48.2, 80.14),     # MME 2244, 2321, 2321, 2149 / 28
         ("InternVL2.5-MPO-8B", 74.3, 71.2, 76.3, 83.2, 69.7, 65.3, 83.3, 52.8, 82.89),
         ("Qwen2-VL-7B", 73.0, 68.5, 79.6, 71.0, 67.5, 58.3, 79.5, 50.9, 82.89),
         ("DeepSeekVL-2-Small", 72.7, 66.8, 79.0, 79.0, 65.3, 57.7, 78.1, 47.6, 76.75))),
    ("OpenCompass, in the README of AIDC-AI/Ovis-U1",
     "OpenCompass MMBench MMStar MMMU_VAL MathVista_MINI HallusionBench AI2D_TEST OCRBench MMVet", (
         ("SAIL-VL-2B, OpenCompass", 61, 73.7, 56.5, 44.1, 62.8, 45.9, 77.4, 83.1, 44.2),
         ("InternVL2.5-2B, OpenCompass", 59.9, 70.9, 54.3, 43.2, 51.1, 42.3, 74.9, 80.2, 62.6),
         ("SAIL-VL-1.5-2B, OpenCompass", 67, 78.5, 62.6, 46.4, 67, 50, 83.7, 89.1, 58.8))),
    ("SAIL-VL-2B model card, January 2025, \"a VLMEvalKit variant\"",
     "OpenCompass Total GeneralQA OCR MMBench_DEV_CN_V11", (
        ("InternVL2-2B, card", 55.94, 60.93, 58.04, 74.5, 69.2), ("Qwen2-VL-2B, card", 57.36, 63.04, 59.75, 75.8, 69.5),
        ("Aquila-VL-2B, card", 60.35, 62.76, 62.39, 71.78, 73.61),
        ("InternVL2.5-2B, card", 61.42, 65.77, 62.96, 76.8, 71.44),
        ("SAIL-VL-2B, card", 62.67, 66.27, 63.79, 78.19, 72.06))),
    ("SAIL-VL-1.6-8B model card", """OpenCompass MMBench_DEV_V11 MathVista_MINI MMStar MMMU_VAL MMVet HallusionBench
     AI2D_TEST OCRBench RealWorldQA InfoVQA_VAL ChartQA_TEST MME DocVQA_VAL TextVQA_VAL""", (
         ("SAIL-VL-1.5-8B", 72.69, 87.43, 73.6, 69.4, 50.44, 69.77, 54.03,
          87.37, 89.5, 72.42, 79.68, 89.32, 83.52, 94.17, 83.13),
         ("SAIL-VL-1.6-8B", 74.26, 88.82, 74.5, 69.47, 53.11, 74.72, 54.96,
          87.5, 91.0, 75.42, 80.7, 89.08, 80.97, 94.86, 85.52))),
) for name, *values in rows}
