"""Benchmarks: the model's answers to their questions, results.json and report.html.

    python eval.py --model=out/demo/model --data_dir=shards/toy --benchmarks=toy --out_dir=out/demo
    torchrun --nproc_per_node=8 eval.py --model=DIR --data_dir=LMUData --benchmarks=all \\
        --out_dir=DIR [--download=True] [--judge=http://127.0.0.1:8000/v1 --judge_model=NAME]
    python eval.py score --benchmark=DocVQA_VAL --predictions=DIR/DocVQA_VAL.tsv

evals/table.py holds the benchmarks and protocols, evals/scorers.py the rules. An interrupted run
goes on at the first row that has no prediction yet. Shapes: T tokens of a prompt, N tiles.
"""
import collections
import dataclasses
import hashlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import configurator
from configurator import setting
from evals.endpoint import connect_judge
from evals.files import find_file, open_picture, read_rows, read_tsv, write_tsv
from evals.prompts import build_prompt
from evals.report import print_results, question_cards, report_html
from evals.score import averages, chance_level, published_scores, score_rows
from evals.table import (
    PAPER,
    PAPER_PROTOCOL,
    TOY,
    Benchmark,
    find_benchmark,
    parse_benchmarks,
    protocol_hash,
)
from generate import Assistant
from inputs.files import file_hash, read_jsonl, write_atomic
from inputs.images import GRAY, Image, make_tiles, picture_uri
from training.distributed import (
    barrier,
    close_distributed,
    compute_dtype,
    gather,
    setup_distributed,
)
from weights import weights_hash

DESCRIBE = "Describe the image."
# The most tiles of all pictures of a row together.
MAX_ROW_TILES = 64


@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""  # model folder
    data_dir: str = ""  # folder of the benchmark files, such as VLMEvalKit's LMUData
    benchmarks: str = "toy"  # names joined by commas, or: toy | all (the 18 of the paper)
    protocol: str = PAPER_PROTOCOL  # sailvl-2024-12 (the paper's) | vlmevalkit-2025-04
    out_dir: str = "out/eval"  # predictions, results.json and report.html go here
    download: bool = False  # fetch files that are not in data_dir, gigabytes of them
    download_from: str = ""  # web folder that has them all; "" = where VLMEvalKit has each of them
    judge: str = ""  # OpenAI-compatible endpoint, http://.../v1; its key: JUDGE_API_KEY
    judge_model: str = ""  # the judge's name there
    controls: bool = False  # also score the same rows blind: gray tiles in place of the pictures
    untrained: str = ""  # control: model folder whose projector was never trained, same rows
    trained_blind: str = ""  # control: model folder trained on gray tiles, asked with gray tiles
    limit: int = 0  # only the first rows of each benchmark; 0 = all
    max_tiles: int = 0  # 0 = the protocol's number for each benchmark
    max_new_tokens: int = 0  # 0 = the protocol's number for each benchmark
    batch_size: int = setting(64, at_least=1)  # prompts generated together
    batch_tokens: int = setting(2**19, at_least=1)  # places of the cache: 15 GB (2B), 30 GB (8B)
    report_rows: int = 40  # pictures per benchmark in report.html
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one
    threads: int = 0  # CPU threads of torch; 0 = torch's default
    num_workers: int = 2  # threads that decode pictures
    timeout_s: int = setting(1800, at_least=1)  # how long ranks wait for each other


@dataclasses.dataclass(slots=True)
class ScoreConfig:
    benchmark: str = ""  # name in evals/table.py
    predictions: str = ""  # .tsv with the benchmark's columns and `prediction`
    protocol: str = PAPER_PROTOCOL  # as above
    judge: str = ""  # as above
    judge_model: str = ""  # as above


@dataclasses.dataclass(slots=True)
class Task:
    """A benchmark of this run."""
    b: Benchmark
    path: Path
    pairs: list  # [(row, its pictures), ...]
    md5: str  # of the file


# ---- prompts ------------------------------------------------------------------------------------

def make_prompt(assistant, b, row, pictures, text, max_tiles=0, blind=False):
    """-> (ids (T,), uint8 tiles (N, 3, s, s)). blind: as many tiles, all gray."""
    tiles = []
    if pictures:
        images = [open_picture(row, picture, b.jpeg) for picture in pictures]
        width, height = images[0].size
        size = (b.upscale * width, b.upscale * height)
        images[0] = images[0].resize(size, Image.Resampling.BILINEAR)
        side = assistant.model.vision.image_size
        most = max(1, min(max_tiles or b.tiles, MAX_ROW_TILES // len(images)))
        tiles = [make_tiles(image, 1, most, side, assistant.thumbnail) for image in images]
    if blind:
        tiles = [GRAY.expand_as(t) for t in tiles]
    return assistant.prompt([(text, None)], tiles)


def prompts_ahead(pairs, prepare, cfg):
    """The prompts of (row, pictures) pairs in order, made by threads a few ahead of their use."""
    jobs = collections.deque()
    with ThreadPoolExecutor(max(1, cfg.num_workers)) as pool:
        for pair in pairs:
            jobs.append(pool.submit(prepare, *pair))
            if len(jobs) > 4 * cfg.num_workers:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()


# ---- answers ------------------------------------------------------------------------------------

def predict(b, pairs, assistant, key, cfg, dist, variant="model"):
    """{index: answer} of all (row, pictures) pairs, on every rank.

    Each rank answers its share of the rows that have no answer yet, and adds the answers one by
    one to predictions/<name>.<variant>.rank<r>.jsonl. The next run with the same key finds them
    there, whatever its number of ranks.
    """
    folder = Path(cfg.out_dir) / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    done = {}
    for path in sorted(folder.glob(f"{b.name}.{variant}.rank*.jsonl")):
        for entry in read_jsonl(path):
            if entry.get("key") == key:
                done[entry["index"]] = entry["prediction"]
    # Nobody writes before everybody has read.
    barrier()
    todo = [pair for pair in pairs if pair[0]["index"] not in done]
    mine = todo[dist.rank::dist.world]

    def prepare(row, pictures):
        text = build_prompt(b.prompt, row, len(pictures))
        blind = variant.endswith("blind")
        return make_prompt(assistant, b, row, pictures, text, cfg.max_tiles, blind)

    answers = assistant.answer_each(
        prompts_ahead(mine, prepare, cfg),
        max_new_tokens=cfg.max_new_tokens or b.max_new_tokens,
        batch_size=cfg.batch_size,
        batch_tokens=cfg.batch_tokens,
    )
    path = folder / f"{b.name}.{variant}.rank{dist.rank}.jsonl"
    with (open(path, "a", encoding="utf-8") as f,
          tqdm(total=len(mine), desc=path.stem, disable=not dist.is_main) as bar):
        for number, text in answers:
            index = mine[number][0]["index"]
            # csv would take \r for the end of a row.
            text = text.replace("\r", " ")
            done[index] = text.removesuffix(".") if b.period else text
            entry = {"key": key, "index": index, "prediction": done[index]}
            # The newline comes first: it ends a line that a killed run left torn.
            f.write("\n" + json.dumps(entry))
            f.flush()
            bar.update()
    return {index: text for part in gather(done, dist) for index, text in part.items()}


def variants(cfg):
    """[(variant, model folder), ...] in the order they are asked; the model itself is last."""
    found = []
    if cfg.untrained:
        found.append(("untrained", cfg.untrained))
    if cfg.trained_blind:
        found.append(("trained_blind", cfg.trained_blind))
    if cfg.controls:
        found.append(("blind", cfg.model))
    return [*found, ("model", cfg.model)]


def answer_all(tasks, weights, cfg, dist, dtype):
    """-> ({variant: {benchmark: rows with `prediction`}}, the Assistant of the model itself)."""
    answered = {}
    assistant = None
    loaded = None
    for variant, folder in variants(cfg):
        if folder != loaded:
            assistant = Assistant(folder, dist.device, dtype)
            loaded = folder
        answered[variant] = {}
        for task in tasks:
            key = answer_key(task, assistant, weights[folder], dtype, cfg)
            said = predict(task.b, task.pairs, assistant, key, cfg, dist, variant)
            rows = [row | {"prediction": said[row["index"]]} for row, _ in task.pairs]
            answered[variant][task.b.name] = rows
            if variant == "model" and dist.is_main:
                write_tsv(Path(cfg.out_dir) / f"{task.b.name}.tsv", rows)
    return answered, assistant


def answer_key(task, assistant, weights, dtype, cfg):
    """A hash of all that decides an answer beside its row: only runs with the same share them."""
    protocol = run_protocol_hash([task.b.name], cfg)
    facts = [weights, task.md5, protocol, assistant.template, dtype, assistant.thumbnail]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def run_protocol_hash(names, cfg):
    return protocol_hash(names, cfg.max_tiles, cfg.max_new_tokens, cfg.protocol)


# ---- results ------------------------------------------------------------------------------------

def score_all(tasks, answered, judge):
    """-> ({variant: {benchmark: score}}, {benchmark: details of the model's own score})."""
    scores = {}
    details = {}
    # The model is the last variant, so that its details stay.
    for variant, rows in answered.items():
        scores[variant] = {}
        for task in tasks:
            name = task.b.name
            scores[variant][name], details[name] = score_rows(task.b, rows[name], judge)
    rows = answered["model"]
    scores["chance"] = {task.b.name: chance_level(task.b, rows[task.b.name]) for task in tasks}
    return scores, details


def build_results(tasks, scores, details, model_hash, cfg):
    """The scores, their averages and how they came about, as results.json has them."""
    names = [task.b.name for task in tasks]
    parts = {variant: {"overall": averages(s)["overall"], **s} for variant, s in scores.items()}
    model_scores = parts.pop("model")
    means = averages(scores["model"])
    asks_paper = any(name in PAPER for name in names)
    return {
        **model_scores,
        **parts,
        "groups": means["groups"],
        "left_out": {name: details[name]["reason"] for name in means["left_out"]},
        "n": {name: details[name]["n"] for name in names},
        "details": details,
        "model": cfg.model,
        "model_sha256": model_hash,
        "protocol": run_protocol_hash(names, cfg),
        "protocol_name": cfg.protocol,
        "judge": cfg.judge_model or None,
        "files_md5": {task.b.name: task.md5 for task in tasks},
        "published": published_scores() if asks_paper else {},
        "limit": cfg.limit,
    }


def free_cards(pairs, assistant):
    """Descriptions of the pictures of (row, pictures) pairs, with the tiles that the model saw."""
    # The toy benchmarks' way: up to four tiles, pictures upright.
    b = TOY["toy_ocr"]
    asked = [make_prompt(assistant, b, row, pictures, DESCRIBE)
             for row, pictures in pairs if pictures]
    answers = assistant.answers(asked, max_new_tokens=128)
    cards = []
    for (_, tiles), text in zip(asked, answers, strict=True):
        images = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in tiles]
        cards.append({"question": DESCRIBE, "prediction": text,
                      "pictures": [picture_uri(image) for image in images]})
    return cards


# ---- the run ------------------------------------------------------------------------------------

def read_tasks(cfg):
    """The benchmarks of a run with their rows."""
    benchmarks = parse_benchmarks(cfg.benchmarks, cfg.protocol)
    paths = {name: find_file(b, cfg.data_dir, cfg.download, cfg.download_from)
             for name, b in benchmarks.items()}
    tasks = []
    for name, b in benchmarks.items():
        pairs = read_rows(paths[name], b, cfg.limit)
        tasks.append(Task(b, paths[name], pairs, file_hash(paths[name], "md5")))
    return tasks


def score_file(argv):
    """`eval.py score`: a predictions file -> {"benchmark", "score", "details", "protocol", ...}.

    Where the score is None, "reason" says why.
    """
    cfg = ScoreConfig()
    configurator.configure(cfg, argv)
    if not (cfg.benchmark and cfg.predictions):
        raise ValueError("give --benchmark=NAME and --predictions=FILE.tsv")
    b = find_benchmark(cfg.benchmark, cfg.protocol)
    rows, _ = read_tsv(cfg.predictions, ("prediction", *b.columns))
    judge = connect_judge(cfg.judge, cfg.judge_model, f"{cfg.predictions}.judge.jsonl")
    try:
        score, details = score_rows(b, rows, judge)
    except ValueError as e:
        raise ValueError(f"{cfg.predictions}: {e}") from None
    result = {"benchmark": b.name, "score": score}
    if score is None:
        result["reason"] = details["reason"]
    return result | {
        "details": details,
        "judge": cfg.judge_model or None,
        "protocol": protocol_hash([b.name], protocol=cfg.protocol),
        "protocol_name": cfg.protocol,
    }


def main():
    if sys.argv[1:2] == ["score"]:
        print(json.dumps(score_file(sys.argv[2:]), ensure_ascii=False))
        return
    start = time.time()
    cfg = Config()
    configurator.configure(cfg)

    # What is missing or wrong shows here, before anything is written.
    out = Path(cfg.out_dir)
    judge = connect_judge(cfg.judge, cfg.judge_model, out / "judge.jsonl")
    tasks = read_tasks(cfg)
    weights = {folder: weights_hash(folder) for _, folder in variants(cfg)}
    for task in tasks:
        if task.b.md5 not in ("", task.md5):
            print(f"warning: {task.path} has MD5 {task.md5}, the protocol's is {task.b.md5}",
                  file=sys.stderr)

    # Answers, on all ranks.
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    dist = setup_distributed(cfg.device, cfg.timeout_s)
    dtype = compute_dtype(cfg.dtype, dist.device)
    answered, assistant = answer_all(tasks, weights, cfg, dist, dtype)
    # A judge takes its time: only the first process stays.
    close_distributed()
    if not dist.is_main:
        return

    # Scores, report, tables.
    scores, details = score_all(tasks, answered, judge)
    results = build_results(tasks, scores, details, weights[cfg.model], cfg)
    results["dtype"] = str(dtype).removeprefix("torch.")
    results["torch"] = torch.__version__
    results["seconds"] = round(time.time() - start, 1)
    cards = []
    for task in tasks:
        name = task.b.name
        rows = answered["model"][name]
        scored = results[name] is not None
        cards += question_cards(task.b, rows, task.pairs, scored, cfg.report_rows, judge)
    free = free_cards([task.pairs[0] for task in tasks[:2]], assistant)
    write_atomic(out / "report.html", report_html(results, cards, free))
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomic(out / "results.json", text + "\n")
    print_results(results, [variant for variant in scores if variant != "model"])
    print(f"wrote {out / 'results.json'} and {out / 'report.html'}")


if __name__ == "__main__":
    configurator.run_script(main)
