"""Benchmarks: prompts, batched generation, rule scorers, results.json and report.html.

    python eval.py --model=out/demo/model --data_dir=out/demo/bench --benchmarks=toy --out_dir=out/demo
    torchrun --nproc_per_node=8 eval.py --model=DIR --data_dir=LMUData --benchmarks=toy_ocr,toy_chart --out_dir=DIR
    python eval.py score --benchmark=toy_ocr --predictions=out/demo/toy_ocr.tsv

BENCHMARKS below is the whole protocol; its hash is stored with every score, because 10-20 points can hide in a prompt.
An interrupted run goes on at the first row that has no prediction yet. Shapes: T tokens of a prompt, N tiles.
"""
import base64, collections, contextlib, csv, dataclasses, hashlib, io, itertools, json, math, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

import common, configurator
from assistant import Assistant
from data import _render, cell_words, place_images
from vision import GRAY, load_image, make_tiles

@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""                       # model folder
    data_dir: str = ""                    # folder of the benchmark files, <name>.tsv
    benchmarks: str = "toy"               # names joined by commas, or: toy | all
    out_dir: str = "out/eval"             # predictions, results.json and report.html go here
    controls: bool = False                # also score the same rows blind: gray tiles in place of the pictures
    untrained: str = ""                   # control: model folder whose projector was never trained, on the same rows
    trained_blind: str = ""               # control: model folder trained on gray tiles, asked with gray tiles
    image_as: Literal["pixels", "words"] = "pixels"  # words: the language model alone, toy pictures as cell words
    limit: int = 0                        # only the first rows of each benchmark; 0 = all
    max_tiles: int = 0                    # 0 = the protocol's number for each benchmark
    max_new_tokens: int = 0               # 0 = the protocol's number for each benchmark
    batch_size: int = 64                  # prompts generated together
    batch_tokens: int = 65536             # and at most so many prompt tokens
    report_rows: int = 40                 # pictures per benchmark in report.html
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # auto: bfloat16 on a GPU, else float32
    device: str = "auto"                  # auto | cpu | cuda
    threads: int = 0                      # CPU threads of torch; 0 = torch's default
    num_workers: int = 2                  # threads that decode pictures
    timeout_s: int = 1800                 # how long ranks wait for each other

@dataclasses.dataclass(slots=True)
class ScoreConfig:
    benchmark: str = ""                   # name in BENCHMARKS
    predictions: str = ""                 # .tsv with the benchmark's columns and `prediction`

# ---- prompts (wording: VLMEvalKit's SAIL-VL adapter of December 2024) ----------------------------------------------
SHORT = "Answer the question using a single word or phrase."
MCQ = {"en": "Answer with the option's letter from the given choices directly.", "zh": "请直接回答选项字母。"}
OPEN = {"en": "Answer the question directly.", "zh": "请直接回答问题。"}
DESCRIBE = "Describe the image."

def options(row):
    """{"A": text, ...} of the filled option columns of a row."""
    return {c: row[c].strip() for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if row.get(c, "").strip()}

def build_prompt(kind, row):
    """Row -> text. plain: the question; short: wants a word or phrase; mcq: hint, question, options, wants a letter."""
    if kind != "mcq": return row["question"] + {"plain": "", "short": "\n" + SHORT}[kind]
    hint, choices = row.get("hint", "").strip(), options(row)
    lines = [hint] * bool(hint) + [row["question"]] + [f"{letter}. {text}" for letter, text in choices.items()]
    language = "zh" if re.search("[\u4e00-\u9fff]", "".join(lines)) else "en"
    return "\n".join([*lines, (MCQ if choices else OPEN)[language]])

# ---- scorers: (prediction, row) -> (what was read from it, right or wrong); "" when nothing could be read ----------
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NUMBER_WORDS = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split())} | {"none": 0}

def multiple_choice(prediction, row):
    """The only option letter among the words, else the only option whose text occurs (VLMEvalKit, exact matching)."""
    choices, words = options(row), re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    letters = [letter for letter in choices if letter in words]
    if not letters and "Z" not in words:
        letters = [letter for letter, text in choices.items() if text.lower() in prediction.lower()]
    read = letters[0] if len(letters) == 1 and not any(refusal in prediction for refusal in REFUSALS) else ""
    return read, read == row["answer"].strip() != ""

def yes_no(prediction, row):
    """Exactly one of the words yes and no, whatever else is said (VLMEvalKit's rule for POPE)."""
    found = {"yes", "no"} & set(re.findall(r"[a-z0-9]+", prediction.lower()))
    read = found.pop() if len(found) == 1 else ""
    return read, read == row["answer"].strip().lower() != ""

def without_period(prediction, answer):
    """The prediction stripped, less one closing full stop that the reference does not have."""
    return prediction.strip() if answer.strip().endswith(".") else prediction.strip().removesuffix(".")

def exact_match(prediction, row):
    """Equal but for case, runs of white space and one closing full stop."""
    read = " ".join(without_period(prediction, row["answer"]).split())
    return read, read.lower() == " ".join(row["answer"].split()).lower() != ""

def to_float(text):
    """`12`, `-1.5`, `12%` (= 0.12) as a number, else nan."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return math.nan

def relaxed_accuracy(prediction, row):
    """Numbers within 5 % of the reference, everything else equal but for case (ChartQA, arXiv 2203.10244, 4.1)."""
    read, answer = without_period(prediction, row["answer"]), row["answer"].strip()
    number, target = to_float(read), to_float(answer)                  # a target of 0 has no relative error
    near = target != 0 and abs(number - target) / abs(target) <= 0.05
    return read, near or read.lower() == answer.lower() != ""

def exact_number(prediction, row):
    """The only number in the prediction, in digits or as an English word up to twenty, equals the reference."""
    words = re.findall(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?|[a-z]+", prediction.lower())
    numbers = [float(NUMBER_WORDS.get(word, word.replace(",", ""))) for word in words
               if word in NUMBER_WORDS or not word.isalpha()]
    read = f"{numbers[0]:g}" if len(numbers) == 1 else ""
    return read, read != "" and numbers[0] == to_float(row["answer"].strip())

# ---- the protocol --------------------------------------------------------------------------------------------------
# build_prompt's kind, scorer, most tiles of a picture (thumbnail not counted), longest answer; file: <name>.tsv
Benchmark = collections.namedtuple("Benchmark", "prompt scorer max_tiles max_new_tokens", defaults=(4, 16))
BENCHMARKS = {
    "toy_general": Benchmark("mcq", multiple_choice),
    "toy_ocr": Benchmark("plain", exact_match, max_new_tokens=48),
    "toy_chart": Benchmark("short", relaxed_accuracy),
    "toy_count": Benchmark("short", exact_number),
    "toy_halluc": Benchmark("plain", yes_no),
}

def benchmark_names(text):
    """Comma list -> names of BENCHMARKS; `toy` is the five toy ones, `all` every one."""
    groups = {"toy": [name for name in BENCHMARKS if name.startswith("toy_")], "all": [*BENCHMARKS],
              **{name: [name] for name in BENCHMARKS}}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in groups: raise ValueError(f"unknown benchmark {word!r}; there are: {', '.join(groups)}")
    return [*dict.fromkeys(name for word in words for name in groups[word])]

def protocol_hash(names, max_tiles=0, max_new_tokens=0, image_as="pixels"):
    """sha256 over everything that decides a score apart from the model and the rows (0 = the table's own value)."""
    rules = {name: (b.prompt, b.scorer.__name__, max_tiles or b.max_tiles, max_new_tokens or b.max_new_tokens)
             for name, b in BENCHMARKS.items() if name in names}
    words = [SHORT, MCQ, OPEN, REFUSALS, image_as, "greedy", "thumbnail", 1]    # the last: version of the scorers' code
    return hashlib.sha256(json.dumps([rules, words]).encode()).hexdigest()

def percent(part, whole):
    return round(100 * part / whole, 2) if whole else 0.0

def score_rows(name, rows):
    """Rows with `prediction` -> (score 0-100, details). A row without prediction is wrong."""
    scorer, by_category = BENCHMARKS[name].scorer, collections.defaultdict(list)
    reads, rights = zip(*(scorer(row.get("prediction", ""), row) for row in rows))
    for row, right in zip(rows, rights):
        by_category[row.get("category", "")].append(right)
    details = {"n": len(rows), "correct": sum(rights), "not_readable": reads.count("")}
    if scorer is yes_no:                                               # yes is the positive class, as in POPE
        said, hit = reads.count("yes"), sum(right and read == "yes" for read, right in zip(reads, rights))
        true = sum(row["answer"].strip().lower() == "yes" for row in rows)
        details |= {"precision": percent(hit, said), "recall": percent(hit, true), "f1": percent(2 * hit, said + true),
                    "yes_ratio": percent(said, len(rows))}
    if set(by_category) != {""}:
        details["categories"] = {c: percent(sum(v), len(v)) for c, v in sorted(by_category.items())}
    return percent(sum(rights), len(rows)), details

def chance_level(name, rows):
    """0-100 without looking: a random option where there are options, else the most frequent answer every time."""
    if BENCHMARKS[name].scorer is multiple_choice:
        return percent(sum(1 / max(1, len(options(row))) for row in rows), len(rows))
    favourite = collections.Counter(row["answer"] for row in rows).most_common(1)[0][0]
    return score_rows(name, [row | {"prediction": favourite} for row in rows])[0]

# ---- benchmark files -----------------------------------------------------------------------------------------------
def read_tsv(path, *needs):
    """The rows of a tab-separated file as dicts of strings. ValueError with the line number on a bad one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; toy.py writes --data_dir, a run writes --predictions")
    csv.field_size_limit(2**31 - 1)                                    # pictures are base64 columns
    rows = {}
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, delimiter="\t")
        try:
            columns = reader.fieldnames or ()
            for name in ("index", "question", "answer", *needs):
                if name not in columns: raise ValueError(f"{path}: no column {name!r} in its first line")
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values(): raise ValueError(f"{where}: not {len(columns)} columns")
                if row["index"] in rows: raise ValueError(f"{where}: index {row['index']!r} stands twice")
                rows[row["index"]] = row
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path} line {reader.line_num + 1}: not a UTF-8 tab-separated file: {e}") from e
    if not rows: raise ValueError(f"{path}: no rows under the line of column names")
    return [*rows.values()]

def read_rows(path, limit=0, *needs):
    """[(row, image)]: base64 text, a Path, or "". A short image column names the row that holds the picture, as in
    VLMEvalKit; in the rows that come out every one does."""
    rows, pairs = read_tsv(path, *needs), []
    pictures = {row["index"]: row["image"] for row in rows if len(row.get("image", "")) > 64}
    for row in rows[:limit or None]:
        image = Path(path).parent / row["image_path"] if row.get("image_path") else ""
        if row.get("image"):
            row["image"] = row["index"] if row["index"] in pictures else row["image"]
            if row["image"] not in pictures:
                raise ValueError(f"{path} row {row['index']}: image {row['image']!r} is no row with a picture")
            image = pictures[row["image"]]
        pairs.append((row, image))
    return pairs

def open_picture(row, image):
    """Pillow RGB image of a pair of read_rows."""
    try:
        return load_image(base64.b64decode(image) if isinstance(image, str) else image)
    except (ValueError, OSError) as e:
        raise ValueError(f"benchmark row {row['index']}: {e}") from e

# ---- generation ----------------------------------------------------------------------------------------------------
def make_prompt(assistant, row, image, text, max_tiles=4, blind=False):
    """-> (ids (T,), uint8 tiles (N, 3, s, s)); blind: as many tiles, all gray, or as many words, all `Empty`."""
    turns, tiles, vision = [(text, None)], [], assistant.model.vision
    if vision is None:                                                 # words in the place of the visual tokens
        cells = [re.sub("^[A-Za-z]+", "Empty", cell) if blind else cell for cell in row["cells"].split("|")]
        images = [[assistant.tokenizer.image_id] * len(cells)] * bool(image)
        ids, _ = _render(assistant.tokenizer, assistant.template, place_images(turns, len(images)), images)
        return ids, torch.from_numpy(cell_words(cells, assistant.tokenizer)) if image else None
    if image:
        tiles = make_tiles(open_picture(row, image), 1, max_tiles, vision.image_size, True)
        tiles = [GRAY.expand_as(tiles) if blind else tiles]
    return assistant.prompt(turns, tiles)

def prompt_batches(pairs, prepare, cfg):
    """(row, image) pairs -> lists of (row, (ids, tiles)) within batch_size and batch_tokens, pictures decoded ahead."""
    jobs, batch, tokens = [], [], 0
    with ThreadPoolExecutor(max(1, cfg.num_workers)) as pool:
        for i, (row, _) in enumerate(pairs):
            jobs += [pool.submit(prepare, *pair) for pair in pairs[len(jobs):i + 2 * cfg.batch_size]]
            prompt, jobs[i] = jobs[i].result(), None                   # None: pixels are not kept
            if batch and (len(batch) == cfg.batch_size or tokens + len(prompt[0]) > cfg.batch_tokens):
                yield batch
                batch, tokens = [], 0
            batch.append((row, prompt))
            tokens += len(prompt[0])
    if batch: yield batch

def predict(name, pairs, assistant, key, cfg, dist, variant="model"):
    """{index: answer} of all (row, image) pairs, on every rank. Rank r answers rows r, r + world, ... and adds them to
    predictions/<name>.<variant>.rank<r>.jsonl batch by batch, where the next run with the same key finds them."""
    bench, folder, done = BENCHMARKS[name], Path(cfg.out_dir) / "predictions", {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(f"{name}.{variant}.rank*.jsonl")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):                      # a torn line is passed over
                entry = json.loads(line)
                if entry["key"] == key: done[entry["index"]] = entry["prediction"]
    common.barrier()                                                   # nobody writes before everybody has read
    todo = [pair for pair in pairs[dist.rank::dist.world] if pair[0]["index"] not in done]
    prepare = lambda row, image: make_prompt(assistant, row, image, build_prompt(bench.prompt, row),
                                             cfg.max_tiles or bench.max_tiles, variant.endswith("blind"))
    mine = folder / f"{name}.{variant}.rank{dist.rank}.jsonl"
    with open(mine, "a", encoding="utf-8") as f, tqdm(total=len(todo), desc=mine.stem, disable=not dist.is_main) as bar:
        for batch in prompt_batches(todo, prepare, cfg):
            texts = assistant.answers([p for _, p in batch], max_new_tokens=cfg.max_new_tokens or bench.max_new_tokens)
            for (row, _), text in zip(batch, (text.replace("\r", " ") for text in texts), strict=True):    # csv's own
                done[row["index"]] = text
                f.write("\n" + json.dumps({"key": key, "index": row["index"], "prediction": text}))   # ends a torn line
            f.flush()
            bar.update(len(batch))
    return {index: text for part in common.gather(done, dist) for index, text in part.items()}

# ---- results and report --------------------------------------------------------------------------------------------
def picture_uri(image):
    """A Pillow image as a small JPEG data URI."""
    image.thumbnail((224, 224))
    image.save(file := io.BytesIO(), "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

def question_card(name, row, image):
    """What the report shows of a row with `prediction`."""
    read, right = BENCHMARKS[name].scorer(row["prediction"], row)
    return {**row, "name": name, "verdict": "right" if right else "wrong", "read": read, "options": options(row),
            "pictures": [picture_uri(open_picture(row, image))] if image else []}

def free_cards(pairs, assistant):
    """Descriptions of the pictures of (row, image) pairs, with the tiles that the model saw."""
    asked = [make_prompt(assistant, row, image, DESCRIBE) for row, image in pairs if image]
    shown = [[picture_uri(Image.fromarray(tile.permute(1, 2, 0).numpy())) for tile in tiles] for _, tiles in asked]
    return [{"question": DESCRIBE, "prediction": text, "pictures": pictures}
            for text, pictures in zip(assistant.answers(asked, max_new_tokens=128), shown)]

def report_html(results, cards, free):
    """report_page.html with its data in place: one self-contained file."""
    data = json.dumps({"results": results, "cards": cards, "free": free}, ensure_ascii=False).replace("<", "\\u003c")
    return Path(__file__).with_name("report_page.html").read_text(encoding="utf-8").replace("<!--data-->", data)

# ---- the run -------------------------------------------------------------------------------------------------------
def weights_hash(folder):
    """sha256 of a model folder's safetensors file; of the digests, one after the other, where there are several."""
    digests = [common.sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if not digests: raise FileNotFoundError(f"no *.safetensors in {folder!r}; give the model folder, --model=DIR")
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

def score_file(argv):
    """`eval.py score`: a predictions file -> {"benchmark", "score", "details", "protocol"}."""
    configurator.configure(cfg := ScoreConfig(), argv)
    if (name := cfg.benchmark) not in BENCHMARKS:
        raise ValueError(f"--benchmark={name}: unknown; there are {', '.join(BENCHMARKS)}")
    score, details = score_rows(name, read_tsv(cfg.predictions, "prediction"))
    return {"benchmark": name, "score": score, "details": details, "protocol": protocol_hash([name])}

def main():
    if sys.argv[1:2] == ["score"]: return print(json.dumps(score_file(sys.argv[2:]), ensure_ascii=False))
    configurator.configure(cfg := Config())
    start, changed = time.time(), (cfg.max_tiles, cfg.max_new_tokens, cfg.image_as)
    out, pixels = Path(cfg.out_dir), cfg.image_as == "pixels"
    paths = {name: Path(cfg.data_dir) / f"{name}.tsv" for name in benchmark_names(cfg.benchmarks)}
    for path in paths.values(): read_rows(path, cfg.limit, *["cells"] * (not pixels))   # a bad file is refused early
    jobs = [(folder, [name]) for name, folder in (("untrained", cfg.untrained), ("trained_blind", cfg.trained_blind))
            if folder] + [(cfg.model, ["blind"] * cfg.controls + ["model"])]
    weights = {folder: weights_hash(folder) for folder, _ in jobs}
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    dist = common.setup_distributed(cfg.device, cfg.timeout_s)
    dtype = common.compute_dtype(cfg.dtype, dist.device)
    scores, details, cards, first = collections.defaultdict(dict), {}, [], []
    for folder, variants in jobs:
        assistant = Assistant(folder, dist.device, dtype, vision=pixels)
        for variant, name in itertools.product(variants, paths):
            pairs = read_rows(paths[name], cfg.limit)
            facts = [weights[folder], protocol_hash([name], *changed), common.sha256(paths[name]), assistant.template]
            key = hashlib.sha256(repr([*facts, dtype]).encode()).hexdigest()[:16]    # other runs share nothing
            said = predict(name, pairs, assistant, key, cfg, dist, variant)
            rows = [row | {"prediction": said[row["index"]]} for row, _ in pairs]
            scores[variant][name], details[name] = score_rows(name, rows)       # the model's own details come last
            if variant == "model" and dist.is_main:
                scores["chance"][name] = chance_level(name, rows)
                writer = csv.DictWriter(text := io.StringIO(), rows[0], delimiter="\t", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                common.write_atomic(out / f"{name}.tsv", text.getvalue())
                cards += [question_card(name, row, image) for row, (_, image) in zip(rows[:cfg.report_rows], pairs)]
                first.append(pairs[0])
    if dist.is_main:
        scores = {v: {"overall": round(sum(s.values()) / len(s), 2), **s} for v, s in scores.items()}
        results = {**scores.pop("model"), **scores, "n": {name: d["n"] for name, d in details.items()},
                   "details": details, "model": cfg.model, "model_sha256": weights[cfg.model],
                   "protocol": protocol_hash(paths, *changed), "image_as": cfg.image_as, "dtype": str(dtype)[6:],
                   "seconds": round(time.time() - start, 1)}
        free = free_cards(first[:2], assistant) if pixels else []
        common.write_atomic(out / "report.html", report_html(results, cards, free))
        common.write_atomic(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        table = [[name, results["n"].get(name, ""), results[name], *(s[name] for s in scores.values())]
                 for name in (*paths, "overall")]
        for name, *cells in [["benchmark", "n", "score", *scores], *table]:
            print(f"{name:16s}", *(f"{cell:>9}" for cell in cells))
        print(f"wrote {out / 'results.json'} and {out / 'report.html'}")
    common.close_distributed()

if __name__ == "__main__":
    configurator.launch(main)
