"""Benchmarks: prompts, batched generation, rule scorers, results.json and report.html.

    python eval.py --model=out/demo/model --data_dir=out/demo/bench --benchmarks=toy --out_dir=out/demo
    torchrun --nproc_per_node=8 eval.py --model=DIR --data_dir=LMUData --benchmarks=toy_ocr,toy_chart --out_dir=DIR
    python eval.py score --benchmark=toy_ocr --predictions=out/demo/toy_ocr.tsv

BENCHMARKS below is the whole protocol: file, prompt, tiles, answer length and scorer of each benchmark. Its hash is
stored with every score, because 10-20 points can hide in a prompt. An interrupted run goes on at the first row that
has no prediction yet.

Shape letters: T tokens of a pack, S samples in a pack, N tiles, V vocabulary.
"""
import base64, collections, csv, dataclasses, hashlib, html, io, itertools, json, re, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

import common, configurator
from data import Tokenizer, chat_ids
from model import generate
from vision import load_image, make_tiles
from weights import load_folder


@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""                       # model folder
    data_dir: str = ""                    # folder of the benchmark files, <name>.tsv
    benchmarks: str = "toy"               # names joined by commas, or: toy | all
    out_dir: str = "out/eval"             # predictions, results.json and report.html go here
    controls: bool = False                # also score the same rows blind: gray tiles in place of the pictures
    untrained: str = ""                   # control: model folder whose projector was never trained, on the same rows
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
    debug: bool = False                   # show the traceback of an error


@dataclasses.dataclass(slots=True)
class ScoreConfig:
    benchmark: str = ""                   # name in BENCHMARKS
    predictions: str = ""                 # .tsv with the benchmark's columns and `prediction`
    debug: bool = False                   # show the traceback of an error


# ---- prompts -----------------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "Answer the question using a single word or phrase."
MCQ = {"en": "Answer with the option's letter from the given choices directly.", "zh": "请直接回答选项字母。"}
OPEN = {"en": "Answer the question directly.", "zh": "请直接回答问题。"}
DESCRIBE = "Describe the image."

def options(row):
    """{"A": text, ...} of the filled option columns of a row."""
    return {letter: row[letter].strip() for letter in LETTERS if (row.get(letter) or "").strip()}

def build_prompt(kind, row):
    """Question text of a row, without the image placeholder (wording: VLMEvalKit's SAIL-VL adapter of December 2024).

    plain: the question; short: asks for a word or phrase; mcq: hint, question, `X. text` lines, asks for the letter.
    """
    question = row["question"]
    if kind == "plain":
        return question
    if kind == "short":
        return f"{question}\n{SHORT}"
    assert kind == "mcq", kind
    hint = (row.get("hint") or "").strip()
    choices = options(row)
    prompt = "\n".join([hint] * bool(hint) + [question] + [f"{letter}. {text}" for letter, text in choices.items()])
    language = "zh" if re.search("[\u4e00-\u9fff]", prompt) else "en"
    return prompt + "\n" + (MCQ if choices else OPEN)[language]


# ---- scorers: (prediction, row) -> (what was read from it, right or wrong); "" when nothing could be read ---------

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
NUMBER_WORDS = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split())} | {"none": 0}

def multiple_choice(prediction, row):
    """The only option letter among the words, else the only option whose text occurs (VLMEvalKit, exact matching)."""
    choices = options(row)
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    letters = [letter for letter in choices if letter in words]
    refused = any(sentence in prediction for sentence in REFUSALS)
    if not letters and not refused and "Z" not in words:
        letters = [letter for letter, text in choices.items() if text.lower() in prediction.lower()]
    read = letters[0] if len(letters) == 1 and not refused else ""
    return read, read != "" and read == row["answer"].strip()

def yes_no(prediction, row):
    """Exactly one of the words yes and no, whatever else is said (VLMEvalKit's rule for POPE)."""
    found = {"yes", "no"} & set(re.findall(r"[a-z0-9]+", prediction.lower()))
    read = found.pop() if len(found) == 1 else ""
    return read, read != "" and read == row["answer"].strip().lower()

def without_period(prediction, answer):
    """The prediction stripped, less one closing full stop that the reference does not have."""
    prediction = prediction.strip()
    return prediction if answer.strip().endswith(".") else prediction.removesuffix(".")

def exact_match(prediction, row):
    """Equal but for case, runs of white space and one closing full stop."""
    read = " ".join(without_period(prediction, row["answer"]).split())
    return read, read != "" and read.lower() == " ".join(row["answer"].split()).lower()

def to_float(text):
    """`12`, `-1.5`, `12%` (= 0.12) as a number, else None."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None

def relaxed_accuracy(prediction, row):
    """Numbers within 5 % of the reference, everything else equal but for case (ChartQA, arXiv 2203.10244, 4.1)."""
    answer = row["answer"].strip()
    read = without_period(prediction, answer)
    number, target = to_float(read), to_float(answer)
    if number is not None and target:                                  # a reference of 0 has no relative error
        return read, abs(number - target) / abs(target) <= 0.05
    return read, read != "" and read.lower() == answer.lower()

def exact_number(prediction, row):
    """The only number in the prediction, in digits or as an English word up to twenty, equals the reference."""
    words = re.findall(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?|[a-z]+", prediction.lower())
    numbers = [NUMBER_WORDS[word] if word in NUMBER_WORDS else float(word.replace(",", ""))
               for word in words if word in NUMBER_WORDS or not word.isalpha()]
    read = f"{numbers[0]:g}" if len(numbers) == 1 else ""
    return read, read != "" and numbers[0] == to_float(row["answer"].strip())


# ---- the protocol ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, slots=True)
class Benchmark:
    file: str                             # under --data_dir
    prompt: str                           # plain | short | mcq, see build_prompt
    scorer: object                        # one of the functions above
    max_tiles: int = 4                    # per picture, thumbnail not counted
    max_new_tokens: int = 16

BENCHMARKS = {
    "toy_general": Benchmark("toy_general.tsv", "mcq", multiple_choice),
    "toy_ocr": Benchmark("toy_ocr.tsv", "plain", exact_match, max_new_tokens=48),
    "toy_chart": Benchmark("toy_chart.tsv", "short", relaxed_accuracy),
    "toy_count": Benchmark("toy_count.tsv", "short", exact_number),
    "toy_halluc": Benchmark("toy_halluc.tsv", "plain", yes_no),
}

def benchmark_names(text):
    """Comma list -> names of BENCHMARKS; `toy` is the five toy ones, `all` every one."""
    names = []
    for word in filter(None, map(str.strip, text.split(","))):
        found = [name for name in BENCHMARKS if word in (name, "all") or word == "toy" and name.startswith("toy_")]
        if not found:
            raise ValueError(f"unknown benchmark {word!r}; there are: toy, all, {', '.join(BENCHMARKS)}")
        names += [name for name in found if name not in names]
    if not names:
        raise ValueError(f"--benchmarks names none; there are: toy, all, {', '.join(BENCHMARKS)}")
    return names

def protocol_hash(names, max_tiles=0, max_new_tokens=0):
    """sha256 over everything that decides a score apart from the model and the rows (0 = the table's own value)."""
    rules = {name: {"prompt": b.prompt, "scorer": b.scorer.__name__, "max_tiles": max_tiles or b.max_tiles,
                    "max_new_tokens": max_new_tokens or b.max_new_tokens}
             for name, b in BENCHMARKS.items() if name in names}
    rules["words"] = [SHORT, MCQ, OPEN, REFUSALS, "greedy", "thumbnail", 1]    # the last: version of the scorers' code
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

def score_rows(name, rows):
    """Rows with `prediction` -> (score 0-100, details). A row without prediction is wrong."""
    scorer = BENCHMARKS[name].scorer
    judged = [(row, *scorer(row.get("prediction") or "", row)) for row in rows]
    by_category = collections.defaultdict(list)
    for row, _, right in judged:
        by_category[row.get("category") or ""].append(right)
    details = {"n": len(rows), "correct": sum(right for *_, right in judged),
               "not_readable": sum(read == "" for _, read, _ in judged)}
    if scorer is yes_no:                                      # yes is the positive class, as in POPE
        said = sum(read == "yes" for _, read, _ in judged)
        true = sum(row["answer"].strip().lower() == "yes" for row in rows)
        hit = sum(right and read == "yes" for _, read, right in judged)
        details |= {"precision": percent(hit, said), "recall": percent(hit, true), "f1": percent(2 * hit, said + true),
                    "yes_ratio": percent(said, len(rows))}
    if set(by_category) != {""}:
        details["categories"] = {c: percent(sum(v), len(v)) for c, v in sorted(by_category.items())}
    return percent(details["correct"], len(rows)), details

def chance_level(name, rows):
    """0-100 without looking: a random option where there are options, else the most frequent answer every time."""
    if BENCHMARKS[name].scorer is multiple_choice:
        return percent(sum(1 / max(1, len(options(row))) for row in rows), len(rows))
    favourite = collections.Counter(row["answer"] for row in rows).most_common(1)[0][0]
    return score_rows(name, [row | {"prediction": favourite} for row in rows])[0]

def percent(part, whole):
    return round(100 * part / whole, 2) if whole else 0.0


# ---- benchmark files ---------------------------------------------------------------------------------------------

def read_tsv(path, needs=("index", "question", "answer")):
    """Yield the rows of a tab-separated file as dicts of strings. ValueError with the line number on a bad one."""
    csv.field_size_limit(2**31 - 1)                                    # pictures are base64 columns
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give its folder with --data_dir (toy.py draws the toy ones)")
    seen = set()
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, delimiter="\t")
        try:
            for name in needs:
                if name not in (reader.fieldnames or ()):
                    raise ValueError(f"{path}: no column {name!r}; the first line must name the columns")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path} line {reader.line_num}: not {len(reader.fieldnames)} columns")
                if row["index"] in seen:
                    raise ValueError(f"{path} line {reader.line_num}: index {row['index']!r} stands twice")
                seen.add(row["index"])
                yield row
            if not seen:
                raise ValueError(f"{path}: no rows under the line of column names")
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path} line {reader.line_num + 1}: not a UTF-8 tab-separated file: {e}") from e

def read_rows(path, limit=0):
    """Yield (row, image) where image is base64 text, a Path, or "" without a picture.

    In the file a short `image` is the index of the row that holds the picture, as in VLMEvalKit; in the rows that come
    out every `image` is one, so that they can be kept and written without their pictures.
    """
    borrowed = {row["image"]: None for row in read_tsv(path) if 0 < len(row.get("image", "")) <= 64}
    if borrowed:                                                       # keep only the pictures that others point to
        borrowed |= {row["index"]: row["image"] for row in read_tsv(path)
                     if row["index"] in borrowed and len(row["image"]) > 64}
    for row in itertools.islice(read_tsv(path), limit or None):
        image = row.get("image", "")
        if len(image) > 64:
            row["image"] = row["index"]
        elif image:
            image = borrowed[row["image"]]
            if image is None:
                raise ValueError(f"{path} row {row['index']}: image {row['image']!r} is no row with a picture")
        elif row.get("image_path"):
            image = Path(path).parent / row["image_path"]
        yield row, image

def open_picture(row, image):
    """Pillow RGB image, None without one."""
    try:
        return load_image(base64.b64decode(image) if isinstance(image, str) else image) if image else None
    except (ValueError, OSError) as e:
        raise ValueError(f"benchmark row {row['index']}: {e}") from e

def write_predictions(path, rows):
    """The input columns, pictures as row indexes, and `prediction`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write_atomic(path, text.getvalue())


# ---- generation --------------------------------------------------------------------------------------------------

GRAY = torch.tensor([124, 116, 104], dtype=torch.uint8).view(3, 1, 1)  # ImageNet's mean colour: what a blind model sees

def prepare(row, image, prompt, max_tiles, model, tokenizer, template, blind=False):
    """A row's picture and a prompt -> (ids (T,), uint8 tiles (N, 3, s, s)); blind: as many tiles, all gray."""
    image, vision = open_picture(row, image), model.vision
    tiles = torch.zeros(0, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    if image is not None:
        tiles = make_tiles(image, 1, max_tiles, vision.image_size, True)
    ids = chat_ids(tokenizer, template, [(prompt, None)], [len(tiles)] * (image is not None), vision.tokens_per_tile)
    return ids, GRAY.expand_as(tiles).contiguous() if blind else tiles

def prompt_batches(rows, prepare_row, cfg):
    """(row, image) pairs -> lists of (row, ids, tiles) within batch_size and batch_tokens, pictures decoded ahead."""
    with ThreadPoolExecutor(max(1, cfg.num_workers)) as pool:
        def decoded():
            waiting = collections.deque()
            for row, image in rows:
                waiting.append((row, pool.submit(prepare_row, row, image)))
                if len(waiting) > 2 * cfg.batch_size:
                    row, job = waiting.popleft()
                    yield row, *job.result()
            for row, job in waiting:
                yield row, *job.result()

        batch, tokens = [], 0
        for row, ids, tiles in decoded():
            if batch and (len(batch) == cfg.batch_size or tokens + len(ids) > cfg.batch_tokens):
                yield batch
                batch, tokens = [], 0
            batch.append((row, ids, tiles))
            tokens += len(ids)
        if batch:
            yield batch

def read_done(folder, stem, key):
    """{index: prediction} of the earlier runs with the same key, from all their ranks; a torn line is passed over."""
    done = {}
    for path in sorted(folder.glob(f"{stem}.rank*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["key"] == key:
                done[entry["index"]] = entry["prediction"]
    return done

def predict(name, rows, model, tokenizer, template, key, cfg, dist, variant="model"):
    """{index: answer} of all `rows`, (row, image) pairs, on every rank; rank r answers rows r, r + world, ...

    Each batch is appended to predictions/<name>.<variant>.rank<r>.jsonl, where the next run with the same key finds it.
    """
    bench, folder, stem = BENCHMARKS[name], Path(cfg.out_dir) / "predictions", f"{name}.{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    done = read_done(folder, stem, key)
    gather(None, dist)                                                 # nobody writes before everybody has read
    path = folder / f"{stem}.rank{dist.rank}.jsonl"
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    todo = (pair for pair in itertools.islice(rows, dist.rank, None, dist.world) if pair[0]["index"] not in done)
    prepare_row = lambda row, image: prepare(row, image, build_prompt(bench.prompt, row),
                                             cfg.max_tiles or bench.max_tiles, model, tokenizer, template,
                                             blind=variant == "blind")
    with open(path, "a", encoding="utf-8") as f, tqdm(desc=stem, unit="row", disable=not dist.is_main) as bar:
        f.write("\n" * torn)
        for batch in prompt_batches(todo, prepare_row, cfg):
            texts = answer([ids for _, ids, _ in batch], [tiles for *_, tiles in batch], model, tokenizer,
                           cfg.max_new_tokens or bench.max_new_tokens)
            for (row, *_), text in zip(batch, texts, strict=True):
                done[row["index"]] = text
                f.write(json.dumps({"key": key, "index": row["index"], "prediction": text}) + "\n")
            f.flush()
            bar.update(len(batch))
    return {index: text for part in gather(done, dist) for index, text in part.items()}

def answer(prompts, tiles, model, tokenizer, max_new_tokens):
    """Greedy answers, as text, to prompts (lists of ids) with their tiles."""
    ids = generate(model, prompts, tiles, max_new_tokens, {tokenizer.eos_id})
    return [tokenizer.decode(one, skip_special=True).strip() for one in ids]

def gather(value, dist):
    """[value of rank 0, value of rank 1, ...] on every rank; also a barrier."""
    values = [value] * dist.world
    if dist.world > 1:
        torch.distributed.all_gather_object(values, value)
    return values

# ---- report ------------------------------------------------------------------------------------------------------

def picture_uri(image, side=224):
    """A Pillow image as a small JPEG data URI."""
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ --ink:#1d2733; --soft:#66717d; --line:#e3e6ea; --paper:#f6f7f9; --card:#fff; --good:#1a8754; --bad:#c8372d;
  --bar:#3c6fd6; color-scheme:light dark }}
@media (prefers-color-scheme:dark) {{ :root {{ --ink:#e6e9ee; --soft:#98a2ad; --line:#303841; --paper:#14181d;
  --card:#1d2329; --good:#4cc38a; --bad:#ff7b70; --bar:#6f9bff }} }}
* {{ box-sizing:border-box }}
body {{ margin:0 auto; max-width:1180px; padding:32px 24px 64px; background:var(--paper); color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }}
h1 {{ font-size:26px; margin:0 }} h2 {{ font-size:18px; margin:36px 0 12px }}
p, .soft {{ color:var(--soft) }} p {{ margin:4px 0 20px; overflow-wrap:anywhere }}
table {{ width:100%; border-spacing:0; background:var(--card); border:1px solid var(--line); border-radius:10px }}
th, td {{ padding:9px 14px; text-align:right; border-bottom:1px solid var(--line); font-variant-numeric:tabular-nums }}
tr:last-child td {{ border-bottom:0; font-weight:600 }}
th {{ color:var(--soft); font-weight:500; font-size:13px }} th:first-child, td:first-child {{ text-align:left }}
td.bar {{ width:36% }} .track {{ position:relative; height:12px; border-radius:6px; background:var(--line) }}
.fill {{ height:100%; border-radius:6px; background:var(--bar) }}
.track i {{ position:absolute; top:-4px; height:20px; width:2px; background:var(--ink) }}
nav {{ position:sticky; top:0; z-index:1; padding:10px 0; display:flex; flex-wrap:wrap; gap:6px;
  background:var(--paper) }}
button {{ font:inherit; font-size:13px; padding:4px 12px; border:1px solid var(--line); border-radius:99px;
  background:var(--card); color:var(--ink); cursor:pointer }}
button[aria-pressed=true] {{ background:var(--ink); color:var(--paper) }}
nav span {{ flex:1; text-align:right; color:var(--soft); font-size:13px; align-self:center }}
.cards {{ display:grid; grid-template-columns:repeat(auto-fill,minmax(232px,1fr)); gap:14px }}
.card {{ background:var(--card); border:1px solid var(--line); border-top:4px solid var(--bad); border-radius:10px;
  overflow:hidden; display:flex; flex-direction:column }} .card.right {{ border-top-color:var(--good) }}
.card.free {{ border-top-color:var(--bar) }} .card[hidden] {{ display:none }}
.shot {{ height:176px; padding:10px; display:flex; gap:4px; justify-content:center; align-items:center;
  background:var(--paper) }}
.shot img {{ height:100%; max-width:100%; min-width:0; object-fit:contain }}
.text {{ padding:10px 14px 12px; white-space:pre-wrap; overflow-wrap:anywhere; font-size:14px }}
.text div {{ margin-top:6px }} .text b {{ font-weight:600 }}
.right .said {{ color:var(--good) }} .wrong .said {{ color:var(--bad) }}
.tag {{ font-size:12px; color:var(--soft); display:flex; justify-content:space-between }}
.free-row {{ grid-template-columns:1fr 1fr }} @media (max-width:700px) {{ .free-row {{ grid-template-columns:1fr }} }}
</style><h1>{title}</h1><p>{subtitle}</p>{table}{free}
<h2>Questions</h2><nav>{buttons}<span id="count"></span></nav><div class="cards" id="cards">{cards}</div><script>
const want = {{}}, cards = [...document.querySelectorAll("#cards .card")];
function show() {{
  cards.forEach(c => c.hidden = Object.entries(want).some(([k, v]) => v && c.dataset[k] !== v));
  document.getElementById("count").textContent = cards.filter(c => !c.hidden).length + " of " + cards.length + " shown";
}}
document.querySelectorAll("nav button").forEach(b => b.onclick = () => {{
  want[b.dataset.key] = b.dataset.value;
  document.querySelectorAll(`nav button[data-key=${{b.dataset.key}}]`).forEach(o => o.ariaPressed = o === b);
  show();
}});
show();
</script></html>
"""

def report_html(results, cards, free):
    """Self-contained page: score table with controls, free answers with their tiles, and filterable question cards.

    cards: dicts of benchmark, row, image (data URI or ""), prediction, read, right; free: of tiles (data URIs), answer.
    """
    e = lambda value: html.escape(str(value), quote=True)
    names, others = [*results["n"]], [c for c in ("untrained", "blind", "chance") if c in results]
    table = "<table><tr><th>benchmark<th>questions<th>score<th>" + "".join(f"<th>{c}" for c in others)
    for name in [*names, "overall"]:
        n, low = results["n"].get(name, sum(results["n"].values())), {c: f"{results[c][name]:.1f}" for c in others}
        ticks = "".join(f'<i style="left:{value}%" title="{c} {value}"></i>' for c, value in low.items())
        table += (f'<tr><td>{e(name)}<td class="soft">{n}<td>{results[name]:.1f}<td class="bar"><div class="track">'
                  f'<div class="fill" style="width:{results[name]}%"></div>{ticks}</div>'
                  + "".join(f'<td class="soft">{value}' for value in low.values()))
    buttons = ""
    for key, every, values in (("verdict", "all answers", ["right", "wrong"]), ("name", "all benchmarks", names)):
        buttons += f'<button data-key="{key}" data-value="" aria-pressed="true">{every}</button>'
        buttons += "".join(f'<button data-key="{key}" data-value="{e(v)}">{e(v)}</button>' for v in values)
    page = ""
    for card in cards:
        row, choices, said = card["row"], options(card["row"]), card["prediction"]
        verdict, mark = ("right", "✓") if card["right"] else ("wrong", "✗")
        expected = row["answer"] + f" ({choices[row['answer']]})" if row["answer"] in choices else row["answer"]
        listed = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
        read = f'<span class="soft">, read as {e(card["read"] or "nothing")}</span>' * (card["read"] != said)
        page += (f'<div class="card {verdict}" data-verdict="{verdict}" data-name="{e(card["benchmark"])}">'
                 + f'<div class="shot"><img loading="lazy" src="{card["image"]}" alt=""></div>' * bool(card["image"])
                 + f'<div class="text"><span class="tag"><span>{e(card["benchmark"])} {e(row["index"])}</span>'
                 f'<span class="said">{mark} {verdict}</span></span><b>{e(row["question"])}</b>{e(listed)}'
                 f'<div><span class="soft">expected</span> {e(expected)}</div>'
                 '<div><span class="soft">answered</span> '
                 f'<span class="said">{e(said or "(nothing)")}</span>{read}</div></div></div>')
    shown = ""
    for one in free:
        tiles = "".join(f'<img src="{uri}" alt="">' for uri in one["tiles"])
        shown += (f'<div class="card free"><div class="shot">{tiles}</div><div class="text"><span class="tag">'
                  f'what the model gets: {len(one["tiles"])} tile{"s" * (len(one["tiles"]) > 1)}</span>'
                  f'<b>{DESCRIBE}</b><div>{e(one["answer"] or "(nothing)")}</div></div></div>')
    return PAGE.format(
        title=f"Benchmarks: {results['overall']:.1f} overall", table=table + "</table>", buttons=buttons, cards=page,
        subtitle=f"{e(results['model'])} · weights {results['model_sha256'][:12]} · protocol {results['protocol'][:12]}"
                 f" · ticks on the bars: {', '.join(others)}",
        free=f'<h2>Free answers</h2><div class="cards free-row">{shown}</div>' * bool(free))


# ---- the run -----------------------------------------------------------------------------------------------------

def weights_hash(folder):
    """sha256 of a model folder's safetensors file; of the digests, one after the other, where there are several."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.safetensors there; --model takes a folder of train.py or convert.py")
    digests = [common.sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

def summarize(names, rows, answers):
    """{name: {index: prediction}} -> {"overall": mean of the benchmarks, name: score, ...}, {name: details}."""
    scored = {name: score_rows(name, [row | {"prediction": answers[name][row["index"]]} for row in rows[name]])
              for name in names}
    scores = {name: score for name, (score, _) in scored.items()}
    return {"overall": round(sum(scores.values()) / len(names), 2), **scores}, {n: d for n, (_, d) in scored.items()}

def question_cards(names, cfg, answers):
    """What report.html shows of the first `report_rows` rows of each benchmark."""
    for name in names:
        for row, image in itertools.islice(read_rows(Path(cfg.data_dir) / BENCHMARKS[name].file, cfg.limit),
                                           cfg.report_rows):
            prediction, image = answers[name][row["index"]], open_picture(row, image)
            read, right = BENCHMARKS[name].scorer(prediction, row)
            yield {"benchmark": name, "row": row, "image": picture_uri(image) if image else "",
                   "prediction": prediction, "read": read, "right": right}

def describe(names, model, tokenizer, template, cfg, count=2):
    """Free answers to "Describe the image." about the first pictures of `count` benchmarks, with the tiles it saw."""
    rows = [next(read_rows(Path(cfg.data_dir) / BENCHMARKS[name].file)) for name in names]
    asked = [prepare(row, image, DESCRIBE, 4, model, tokenizer, template) for row, image in rows[:count] if image]
    texts = answer([ids for ids, _ in asked], [tiles for _, tiles in asked], model, tokenizer, 128) if asked else []
    return [{"tiles": [picture_uri(Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())) for tile in tiles],
             "answer": text} for (_, tiles), text in zip(asked, texts)]

def score_file(argv):
    """`eval.py score`: a predictions file -> {"benchmark", "score", "details", "protocol"}."""
    configurator.configure(cfg := ScoreConfig(), argv)
    name = cfg.benchmark
    if name not in BENCHMARKS:
        raise ValueError(f"--benchmark={name}: unknown; there are {', '.join(BENCHMARKS)}")
    if not Path(cfg.predictions).is_file():
        raise FileNotFoundError(f"--predictions={cfg.predictions}: no such file; a run writes {name}.tsv in --out_dir")
    rows = list(read_tsv(cfg.predictions, ("index", "question", "answer", "prediction")))
    score, details = score_rows(name, rows)
    return {"benchmark": name, "score": score, "details": details, "protocol": protocol_hash([name])}

def main():
    if sys.argv[1:2] == ["score"]:
        return print(json.dumps(score_file(sys.argv[2:]), ensure_ascii=False))
    configurator.configure(cfg := Config())
    names, start = benchmark_names(cfg.benchmarks), time.time()
    if not cfg.model:
        raise ValueError("give a model folder with --model=DIR")
    paths = {name: Path(cfg.data_dir) / BENCHMARKS[name].file for name in names}
    rows = {name: [row for row, _ in read_rows(path, cfg.limit)] for name, path in paths.items()}   # checks every file
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    dist = common.setup_distributed(cfg.device, cfg.timeout_s)
    dtype = common.compute_dtype(cfg.dtype, dist.device)
    jobs = [("model", cfg.model)] + [("blind", cfg.model)] * cfg.controls
    jobs += [("untrained", cfg.untrained)] * bool(cfg.untrained)
    weights = gather({folder: weights_hash(folder) for _, folder in jobs} if dist.is_main else None, dist)[0]
    loaded, answers, free = None, {}, []
    for variant, folder in jobs:
        if folder != loaded:
            model, about = load_folder(folder, dist.device, dtype)
            tokenizer, template, loaded = Tokenizer(folder), about.get("template", "sailvl-chat"), folder
            model.eval()
            if model.vision is None:
                raise ValueError(f"{folder}: a language model without vision; give a whole model folder")
        answers[variant] = {}
        for name in names:
            key = json.dumps([weights[folder], protocol_hash([name], cfg.max_tiles, cfg.max_new_tokens),
                              common.sha256(paths[name]), template, str(dtype)])
            answers[variant][name] = predict(name, read_rows(paths[name], cfg.limit), model, tokenizer, template,
                                             hashlib.sha256(key.encode()).hexdigest()[:16], cfg, dist, variant)
        if variant == "model" and dist.is_main:
            free = describe(names, model, tokenizer, template, cfg)
    if dist.is_main:
        about = {"model": cfg.model, "model_sha256": weights[cfg.model], "dtype": str(dtype).removeprefix("torch."),
                 "protocol": protocol_hash(names, cfg.max_tiles, cfg.max_new_tokens),
                 "seconds": round(time.time() - start, 1)}
        write_results(names, rows, answers, free, cfg, about)

def write_results(names, rows, answers, free, cfg, about):
    """<name>.tsv, results.json and report.html in the output folder, and the table on stdout."""
    out = Path(cfg.out_dir)
    results, details = summarize(names, rows, answers["model"])
    for control in ("untrained", "blind"):
        if control in answers:
            results[control] = summarize(names, rows, answers[control])[0]
    chance = {name: chance_level(name, rows[name]) for name in names}
    results["chance"] = {"overall": round(sum(chance.values()) / len(names), 2), **chance}
    results |= {"n": {name: len(rows[name]) for name in names}, "details": details, **about}
    for name in names:
        write_predictions(out / f"{name}.tsv", [row | {"prediction": answers["model"][name][row["index"]]}
                                                for row in rows[name]])
    cards = question_cards(names, cfg, answers["model"])
    common.write_atomic(out / "report.html", report_html(results, cards, free))
    common.write_atomic(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    columns = [c for c in ("untrained", "blind", "chance") if c in results]
    print(f"{'benchmark':16s} {'n':>6s} {'score':>7s} " + " ".join(f"{c:>9s}" for c in columns))
    for name in [*names, "overall"]:
        print(f"{name:16s} {results['n'].get(name, ''):>6} {results[name]:7.1f} "
              + " ".join(f"{results[c][name]:9.1f}" for c in columns))
    print(f"wrote {out / 'results.json'} and {out / 'report.html'}")

if __name__ == "__main__":
    configurator.launch(main)
