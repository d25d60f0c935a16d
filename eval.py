"""Benchmarks: reading their files, batched generation, results.json and report.html.

    python eval.py --model=out/demo/model --data_dir=shards/toy --benchmarks=toy --out_dir=out/demo
    torchrun --nproc_per_node=8 eval.py --model=DIR --data_dir=LMUData --benchmarks=all --out_dir=DIR \\
        [--download=True] [--judge=http://127.0.0.1:8000/v1 --judge_model=NAME]
    python eval.py score --benchmark=DocVQA_VAL --predictions=DIR/DocVQA_VAL.tsv

benchmarks.py holds the protocols and the scorers. An interrupted run goes on at the first row that has no prediction
yet. Shapes: T tokens of a prompt, N tiles.
"""
import base64
import collections
import contextlib
import csv
import dataclasses
import hashlib
import http.client
import io
import itertools
import json
import os
import shutil
import sys
import time
import torch
import urllib.request
import configurator
from evals.table import ADDRESS
from evals.table import PAPER
from evals.table import PROTOCOLS
from evals.table import PUBLISHED
from evals.table import TOY
from evals.table import as_list
from evals.table import averages
from evals.table import benchmark_names
from evals.table import build_prompt
from evals.table import chance_level
from evals.table import find
from evals.table import needs
from evals.table import options
from evals.table import protocol_hash
from evals.table import read_answers
from evals.table import score_rows
from concurrent.futures import ThreadPoolExecutor
from evals.endpoint import connect
from pathlib import Path
from tqdm import tqdm
from typing import Literal

from generate import Assistant
from inputs.chat import cell_words, join_segments, place_images, segments
from inputs.files import file_hash, write_atomic
from inputs.images import GRAY, Image, load_image, make_tiles, open_image, picture_uri
from training.distributed import (
    barrier,
    close_distributed,
    compute_dtype,
    gather,
    setup_distributed,
)
from weights import weights_hash

DESCRIBE = "Describe the image."

@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""                       # model folder
    data_dir: str = ""                    # folder of the benchmark files, such as VLMEvalKit's LMUData
    benchmarks: str = "toy"               # names joined by commas, or: toy | all (the 18 of the paper)
    protocol: str = "sailvl-2024-12"      # sailvl-2024-12 (the paper's settings) | vlmevalkit-2025-04
    out_dir: str = "out/eval"             # predictions, results.json and report.html go here
    download: bool = False                # fetch files that are not in data_dir, gigabytes of them
    download_from: str = ""               # web folder that has them all; "" = where VLMEvalKit has each of them
    judge: str = ""                       # OpenAI-compatible endpoint, http://.../v1; its key: JUDGE_API_KEY
    judge_model: str = ""                 # the judge's name there
    controls: bool = False                # also score the same rows blind: gray tiles in place of the pictures
    untrained: str = ""                   # control: model folder whose projector was never trained, on the same rows
    trained_blind: str = ""               # control: model folder trained on gray tiles, asked with gray tiles
    image_as: Literal["pixels", "words"] = "pixels"  # words: the language model alone, toy pictures as cell words
    limit: int = 0                        # only the first rows of each benchmark; 0 = all
    max_tiles: int = 0                    # 0 = the protocol's number for each benchmark
    max_new_tokens: int = 0               # 0 = the protocol's number for each benchmark
    batch_size: int = configurator.setting(64, at_least=1)  # prompts generated together
    batch_tokens: int = configurator.setting(2 ** 19, at_least=1)  # and their prompts and longest answers: 15 GB of cache (2B), 30 GB (8B)
    report_rows: int = 40                 # pictures per benchmark in report.html
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # auto: bfloat16 on a GPU, else float32
    device: Literal["auto", "cuda", "cpu"] = "auto"           # auto: cuda where there is one
    threads: int = 0                      # CPU threads of torch; 0 = torch's default
    num_workers: int = 2                  # threads that decode pictures
    timeout_s: int = configurator.setting(1800, at_least=1)  # how long ranks wait for each other

@dataclasses.dataclass(slots=True)
class ScoreConfig:
    benchmark: str = ""                   # name in benchmarks.py
    predictions: str = ""                 # .tsv with the benchmark's columns and `prediction`
    protocol: str = "sailvl-2024-12"      # as above
    judge: str = ""                       # as above
    judge_model: str = ""                 # as above

# ---- benchmark files -------------------------------------------------------------------------------------------------
def download(b, folder, base):
    """Fetch a benchmark's file, with progress, from where an earlier try stopped; refuse it if its MD5 is another."""
    url = f"{base.rstrip('/') or f'{ADDRESS}/{b.folder}'}/{b.file}.tsv"
    part = Path(folder) / f"{b.file}.tsv.part"
    by_hand = f"give another --download_from=URL or put {part.with_suffix('')} (MD5 {b.md5}) there by hand"
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        with urllib.request.urlopen(request, timeout=60) as web:
            have *= web.status == 206                                  # else the server sends all of it again
            total = have + int(web.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as f, tqdm.wrapattr(
                    f, "write", total=total, initial=have, desc=b.file, disable=None) as out:
                shutil.copyfileobj(web, out, 1 << 20)
        if part.stat().st_size < total: raise OSError(f"cut off at {part.stat().st_size} of {total} bytes")
    except (OSError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) != 416:                               # 416: nothing was left to send
            raise ValueError(f"{url}: {e}; run again to go on, or {by_hand}") from e
    if (found := file_hash(part, "md5")) != b.md5:
        part.unlink()
        raise ValueError(f"{url}: MD5 {found} is not that of the protocol, removed; run again, or {by_hand}")
    os.replace(part, part.with_suffix(''))

def records(path, start=0):
    """(offset in bytes, line, fields) of a tab-separated file's rows from an offset on. ValueError with the line."""
    def lines():
        while line := f.readline():
            yield line.decode("utf-8-sig" if f.tell() == len(line) else "utf-8")
        if start < f.tell():                                           # start: of the record that is being read
            raise csv.Error("a field's opening quotation mark has no partner; the rows after are in it")
    csv.field_size_limit(2**31 - 1)                                    # pictures are base64 columns
    with open(path, "rb") as f:
        f.seek(start)
        reader = csv.reader(lines(), delimiter="\t")
        try:
            for fields in reader:
                yield start, reader.line_num, fields
                start = f.tell()
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"{path} line {reader.line_num + 1}: not a UTF-8 tab-separated file: {e}") from e

def read_tsv(path, *columns_needed):
    """-> (rows as dicts of strings, {index: [(path, offset, k), ...]} of the pictures, which stay in the file: `image`
    of such a row becomes its index). ValueError with the line number on a bad row."""
    if not Path(path).is_file(): raise FileNotFoundError(f"{path}: no such file; eval.py and toy.py write such files")
    if Path(path).suffix.lower() in (".xlsx", ".xls"):
        code = f"read_excel(r'{path}', dtype=str, keep_default_na=False).to_csv(r'{path}.tsv', sep='\\t', index=False)"
        raise ValueError(f'{path}: an Excel file; make a .tsv of it: python -c "import pandas; pandas.{code}"')
    rows, places, columns = {}, {}, None
    for offset, line, fields in records(path):
        if columns is None:
            columns = fields
            for name in ("index", "question", "answer", *columns_needed):
                if columns.count(name) != 1:
                    raise ValueError(f"{path}: {'more than 1' if name in columns else 'no'} column {name!r} in line 1")
        elif fields:
            where = f"{path} line {line}"
            if len(fields) != len(columns): raise ValueError(f"{where}: not {len(columns)} columns")
            row = dict(zip(columns, fields))
            if row["index"] in rows: raise ValueError(f"{where}: index {row['index']!r} stands twice")
            if len(row.get("image", "")) > 64:
                places[row["index"]] = [(path, offset, k) for k, _ in enumerate(as_list(row["image"]))]
                row["image"] = row["index"]
            rows[row["index"]] = row
    if not rows: raise ValueError(f"{path}: {'no rows under the line of column names' if columns else 'an empty file'}")
    return [*rows.values()], places

def read_rows(path, limit=0, b=TOY["toy_ocr"], *columns_needed):
    """[(row, pictures)]: places in the file or Paths; the rows of b's split. An image cell of at most 64 characters
    names the row that holds the picture; under VLMEvalKit's protocols rows where it is empty are left out
    (ImageBaseDataset of vlmeval/dataset/image_base.py)."""
    (rows, places), pairs = read_tsv(path, *needs(b), *columns_needed), []
    rows = [row for row in rows if not b.split or row.get("split", b.split) == b.split]
    asked = [row for row in rows if not b.jpeg or row.get("image", True)]
    if blank := len(rows) - len(asked):
        print(f"warning: {path}: {blank} rows without a picture are left out, as in VLMEvalKit", file=sys.stderr)
    for row in asked[:limit or None]:
        for name in (names := as_list(row["image"]) if row.get("image") else []):
            if name not in places:
                raise ValueError(f"{path} row {row['index']}: image {name!r} is no row with a picture")
        files = [Path(path).parent / name for name in as_list(row.get("image_path", "")) if name]
        pairs.append((row, [place for name in names for place in places[name]] or files))
    if not pairs: raise ValueError(f"{path}: no rows " + ("with a picture" if rows else f"of split {b.split!r}"))
    return pairs

def read_rgb(source):
    """Pillow RGB image as VLMEvalKit reads it: not rotated, alpha dropped."""
    with open_image(source) as image:
        return image.convert("RGB")


def open_picture(row, place, jpeg=False):
    """Pillow RGB image of a place or path of read_rows. jpeg: as VLMEvalKit reads it, not rotated and alpha dropped
    (load_image of sail_vl.py); one from the file went through JPEG on its disk before (decode_base64_to_image_file of
    vlmeval/smp), unless its row has several names and that is of another type."""
    rgb = read_rgb if jpeg else load_image
    try:
        if isinstance(place, Path): return rgb(place)
        path, offset, k = place
        column = next(records(path))[2].index("image")
        image = rgb(base64.b64decode(as_list(next(records(path, offset))[2][column])[k]))
        names = as_list(row.get("image_path", ""))
        if not jpeg or len(names) > 1 and not "".join(names[k:k + 1]).lower().endswith((".jpg", ".jpeg")): return image
        image.save(file := io.BytesIO(), "JPEG")
        return rgb(file.getvalue())
    except (ValueError, OSError) as e:
        raise ValueError(f"benchmark row {row['index']}: {e}") from e

# ---- generation ----------------------------------------------------------------------------------------------------
def make_prompt(assistant, row, image, text, max_tiles=0, blind=False, b=TOY["toy_ocr"]):
    """-> (ids (T,), uint8 tiles (N, 3, s, s)); blind: as many tiles, all gray, or as many words, all `Empty`."""
    turns, tiles, vision = [(text, None)], [], assistant.model.vision
    if vision is None:                                                 # words in the place of the visual tokens
        cells = ["Empty " + cell.split()[1] if blind else cell for cell in row["cells"].split("|")]
        images = [[assistant.tokenizer.image_id] * len(cells)] * bool(image)
        ids, _ = join_segments(segments(assistant.tokenizer, assistant.template, place_images(turns, len(images)), images))
        return ids, torch.from_numpy(cell_words(cells, assistant.tokenizer)) if image else None
    if image:
        pictures = [open_picture(row, one, b.jpeg) for one in image]
        pictures[0] = pictures[0].resize([b.upscale * n for n in pictures[0].size], Image.Resampling.BILINEAR)
        most = max(1, min(max_tiles or b.tiles, 64 // len(pictures)))
        tiles = [make_tiles(picture, 1, most, vision.image_size, assistant.thumbnail) for picture in pictures]
        tiles = [GRAY.expand_as(t) for t in tiles] if blind else tiles
    return assistant.prompt(turns, tiles)

def prompts_ahead(pairs, prepare, cfg):
    """The prompts of (row, pictures) pairs in order, made by some threads a few ahead of their use."""
    jobs = collections.deque()
    with ThreadPoolExecutor(max(1, cfg.num_workers)) as pool:
        for pair in pairs:
            jobs.append(pool.submit(prepare, *pair))
            if len(jobs) > 4 * cfg.num_workers: yield jobs.popleft().result()
        while jobs: yield jobs.popleft().result()

def predict(name, pairs, assistant, key, cfg, dist, variant="model"):
    """{index: answer} of all (row, pictures) pairs, on every rank. Each rank answers its share of the rows that have no
    answer yet and adds them to predictions/<name>.<variant>.rank<r>.jsonl one by one; the next run with the same key
    finds them there, whatever its number of ranks."""
    b, folder, done = PROTOCOLS[cfg.protocol][name], Path(cfg.out_dir) / "predictions", {}
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(f"{name}.{variant}.rank*.jsonl")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line is passed over
                entry = json.loads(line)
                if entry["key"] == key: done[entry["index"]] = entry["prediction"]
    barrier()                                                   # nobody writes before everybody has read
    todo = [pair for pair in pairs if pair[0]["index"] not in done][dist.rank::dist.world]
    prepare = lambda row, pictures: make_prompt(assistant, row, pictures, build_prompt(b.prompt, row, len(pictures)),
                                                cfg.max_tiles, variant.endswith("blind"), b)
    mine = folder / f"{name}.{variant}.rank{dist.rank}.jsonl"
    with open(mine, "a", encoding="utf-8") as f, tqdm(total=len(todo), desc=mine.stem, disable=not dist.is_main) as bar:
        answers = assistant.answer_each(
            prompts_ahead(todo, prepare, cfg), max_new_tokens=cfg.max_new_tokens or b.max_new_tokens,
            batch_size=cfg.batch_size, batch_tokens=cfg.batch_tokens)
        for number, text in answers:
            text, index = text.replace("\r", " "), todo[number][0]["index"]     # \r: csv's own
            done[index] = text.removesuffix(".") if b.period else text
            f.write("\n" + json.dumps({"key": key, "index": index, "prediction": done[index]}))   # ends a torn line
            f.flush()
            bar.update()
    return {index: text for part in gather(done, dist) for index, text in part.items()}

# ---- results and report --------------------------------------------------------------------------------------------
def question_card(name, row, pictures, found, scored=True):
    """What the report shows of a row with `prediction`; found: (what was read, points); scored: whether the benchmark
    has a score, else what could not be read waits for a judge."""
    read, points = found
    verdict = "not scored" if not (scored or read) else ("right" if points >= 1 else "partly") if points else "wrong"
    return {**row, "name": name, "verdict": verdict, "read": read,
            "category": row.get("category") or row.get("l2-category", ""), "options": options(row),
            "pictures": [picture_uri(open_picture(row, picture)) for picture in pictures]}

def free_cards(pairs, assistant):
    """Descriptions of the pictures of (row, image) pairs, with the tiles that the model saw."""
    asked = [make_prompt(assistant, row, image, DESCRIBE) for row, image in pairs if image]
    shown = [[picture_uri(Image.fromarray(tile.permute(1, 2, 0).numpy())) for tile in tiles] for _, tiles in asked]
    return [{"question": DESCRIBE, "prediction": text, "pictures": pictures}
            for text, pictures in zip(assistant.answers(asked, max_new_tokens=128), shown)]

def report_html(results, cards, free):
    """report_page.html with its data in place: one self-contained file."""
    data = json.dumps({"results": results, "cards": cards, "free": free}, ensure_ascii=False).replace("<", "\\u003c")
    folder = Path(__file__).resolve().parent / "evals"
    style = (folder / "style.css").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page.replace("<!--style-->", style).replace("<!--data-->", data)

# ---- the run -------------------------------------------------------------------------------------------------------
def score_file(argv):
    """`eval.py score`: a predictions file -> {"benchmark", "score", "details", "protocol", ...}, a reason if None."""
    configurator.configure(cfg := ScoreConfig(), argv)
    if not (cfg.benchmark and cfg.predictions): raise ValueError("give --benchmark=NAME and --predictions=FILE.tsv")
    name, b = find(cfg.benchmark, cfg.protocol)
    rows, _ = read_tsv(cfg.predictions, "prediction", *needs(b))
    judge = connect(cfg.judge, cfg.judge_model, f"{cfg.predictions}.judge.jsonl")
    try:
        score, details = score_rows(b, rows, judge)
    except ValueError as e:
        raise ValueError(f"{cfg.predictions}: {e}") from None
    reason = {"reason": details["reason"]} if score is None else {}
    return {"benchmark": name, "score": score, **reason, "details": details, "judge": cfg.judge_model or None,
            "protocol": protocol_hash([name], protocol=cfg.protocol), "protocol_name": cfg.protocol}

def benchmark_files(cfg):
    """{name: path} of the files that a run needs; fetches what is missing with --download=True."""
    paths = {}
    for name in benchmark_names(cfg.benchmarks, cfg.protocol):
        b = find(name, cfg.protocol)[1]
        paths[name] = path = Path(cfg.data_dir) / f"{b.file}.tsv"
        while cfg.download and b.md5 and not path.exists():            # torchrun ends the ranks that wait
            time.sleep(1) if int(os.environ.get("RANK", 0)) else download(b, cfg.data_dir, cfg.download_from)
        if not path.exists():
            way = f"--download=True fetches it, or put it there (MD5 {b.md5})" if b.md5 else "toy.py writes --data_dir"
            raise FileNotFoundError(f"{path}: no such file; {way}")
    return paths

def main():
    if sys.argv[1:2] == ["score"]: return print(json.dumps(score_file(sys.argv[2:]), ensure_ascii=False))
    configurator.configure(cfg := Config())
    start, changed = time.time(), (cfg.max_tiles, cfg.max_new_tokens, cfg.image_as, cfg.protocol)
    out, pixels = Path(cfg.out_dir), cfg.image_as == "pixels"
    judge = connect(cfg.judge, cfg.judge_model, out / "judge.jsonl")
    paths, table = benchmark_files(cfg), PROTOCOLS.get(cfg.protocol)
    data = {name: read_rows(path, cfg.limit, table[name], *["cells"] * (not pixels)) for name, path in paths.items()}
    jobs = [(folder, [name]) for name, folder in (("untrained", cfg.untrained), ("trained_blind", cfg.trained_blind))
            if folder] + [(cfg.model, ["blind"] * cfg.controls + ["model"])]
    weights = {folder: weights_hash(folder) for folder, _ in jobs}
    files = {name: file_hash(path, "md5") for name, path in paths.items()}
    for name, found in files.items():
        if table[name].md5 not in ("", found):
            print(f"warning: {paths[name]} has MD5 {found}, the protocol's is {table[name].md5}", file=sys.stderr)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    dist = setup_distributed(cfg.device, cfg.timeout_s)
    dtype = compute_dtype(cfg.dtype, dist.device)
    answered = {}                                                      # (variant, name) -> rows with their prediction
    for folder, variants in jobs:
        assistant = Assistant(folder, dist.device, dtype, vision=pixels)
        for variant, name in itertools.product(variants, paths):
            facts = [weights[folder], files[name], protocol_hash([name], *changed), assistant.template, dtype]
            key = hashlib.sha256(repr([*facts, assistant.thumbnail]).encode()).hexdigest()[:16]  # others share nothing
            said = predict(name, data[name], assistant, key, cfg, dist, variant)
            answered[variant, name] = rows = [row | {"prediction": said[row["index"]]} for row, _ in data[name]]
            if variant == "model" and dist.is_main:
                writer = csv.DictWriter(text := io.StringIO(), rows[0], delimiter="\t", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                write_atomic(out / f"{name}.tsv", text.getvalue())
    close_distributed()                                         # a judge takes its time: only the first stays
    if not dist.is_main: return
    scores, details, cards, first = collections.defaultdict(dict), {}, [], []
    for (variant, name), rows in answered.items():
        scores[variant][name], details[name] = score_rows(table[name], rows, judge)  # the model's own details come last
        if variant == "model":
            scores["chance"][name] = chance_level(table[name], rows)
            some = range(0, len(rows), -(-len(rows) // max(1, cfg.report_rows)))[:cfg.report_rows]
            found = zip(some, read_answers(table[name], [rows[i] for i in some], judge))
            scored = scores[variant][name] is not None
            cards += [question_card(name, rows[i], data[name][i][1], one, scored) for i, one in found]
            first.append(data[name][0])
    means = averages(scores["model"])
    scores = {variant: {"overall": averages(s)["overall"], **s} for variant, s in scores.items()}
    results = {**scores.pop("model"), **scores, "groups": means["groups"], "left_out": {
                   name: details[name]["reason"] for name in means["left_out"]},
               "n": {name: d["n"] for name, d in details.items()}, "details": details, "model": cfg.model,
               "model_sha256": weights[cfg.model], "protocol": protocol_hash(paths, *changed),
               "protocol_name": cfg.protocol, "judge": cfg.judge_model or None, "files_md5": files,
               "published": PUBLISHED if {*paths} & {*PAPER} else {}, "limit": cfg.limit, "image_as": cfg.image_as,
               "dtype": str(dtype)[6:], "torch": torch.__version__, "seconds": round(time.time() - start, 1)}
    free = free_cards(first[:2], assistant) if pixels else []
    write_atomic(out / "report.html", report_html(results, cards, free))
    write_atomic(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    show = lambda *cells: print(f"{cells[0]:20s}", *(f"{'n/a' if c is None else c:>9}" for c in cells[1:]))
    show("benchmark", "n", "score", *scores)
    for name in (*paths, "overall"):
        show(name, results["n"].get(name, ""), results[name], *(s[name] for s in scores.values()))
    rows = {"this model": results | means["groups"], **results["published"]} if results["published"] else {}
    for name, row in rows.items():                                     # those with these averages; report.html has all
        if "overall" in row: show(name, *map(row.get, ("overall", *means["groups"])))
    absent = ", ".join(name for name in PAPER if results.get(name) is None) or "all rows" * bool(cfg.limit)
    if rows and absent: print(f"not comparable with the published averages: without {absent}")
    for name, reason in results["left_out"].items(): print(f"{name} is not in the averages: {reason}")
    for name, d in details.items():
        if "warning" in d: print(f"warning: {name}: {d['warning']}")
    print(f"wrote {out / 'results.json'} and {out / 'report.html'}")

if __name__ == "__main__":
    configurator.run_script(main)
