"""Benchmarks: the model's answers to their questions, results.json and report.html.

    python eval.py --model=out/demo/model --data_dir=shards/toy --benchmarks=toy --out_dir=out/demo
    torchrun --nproc_per_node=8 eval.py --model=DIR --data_dir=LMUData --benchmarks=all \\
        --out_dir=DIR [--download=True] [--judge=http://127.0.0.1:8000/v1 --judge_model=NAME]
    python eval.py score --benchmark=DocVQA_VAL --predictions=DIR/DocVQA_VAL.tsv

evals/table.py holds the benchmarks and protocols, evals/scorers.py the rules. An interrupted run
goes on at the first row that has no prediction yet. Shapes: T tokens of a prompt, N tiles.
"""
import collections
import contextlib
import dataclasses
import glob
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
from evals.files import RowError, find_file, lock_folder, open_picture, read_rows, write_tsv
from evals.own import OWN_SCORERS, choose_benchmarks
from evals.prompts import build_prompt, placeholder_problem
from evals.report import print_results, question_cards, report_html
from evals.results import build_results, run_protocol_hash, score_all
from evals.score import never_right_warning
from evals.score_file import score_file, warn
from evals.table import OWN, PAPER_PROTOCOL, TOY, Benchmark
from evals.tiling import gray, row_tiles
from generate import Assistant
from inputs.files import file_hash, json_hash, naming, read_jsonl, write_atomic
from inputs.images import MAX_TILES, Image, picture_uri
from model_files import find_change, joined_hash, small_file_hashes, weights_hashes
from training.checkpoint_folder import model_folder
from training.distributed import (
    barrier,
    close_distributed,
    compute_dtype,
    gather,
    is_compiled,
    setup_distributed,
)

DESCRIBE = "Describe the image."


@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""  # model folder, a run's checkpoint, or a run folder (its newest checkpoint)
    data_dir: str = ""  # folder of the benchmark files, such as VLMEvalKit's LMUData
    # names joined by commas, or: toy | all (the 18 of the paper) | a .tsv or .jsonl of your own
    benchmarks: str = "toy"
    # of files of your own: choice|yes_no|exact|contains|anls|relaxed|judge; auto: by what is there
    scorer: Literal["auto", *OWN_SCORERS] = "auto"
    # what they add to a question: nothing, "...a single word or phrase.", "... yes or no. ..."
    prompt: Literal["plain", "short", "yes_no"] = "plain"
    protocol: str = PAPER_PROTOCOL  # sailvl-2024-12 (the paper's) | vlmevalkit-2026-08
    # predictions, results.json and report.html go here
    out_dir: str = setting("out/eval", filled=True)
    download: bool = False  # fetch files that are not in data_dir, gigabytes of them
    download_from: str = ""  # web folder that has them all; "" = where VLMEvalKit has each of them
    judge: str = ""  # OpenAI-compatible endpoint, http://.../v1; its key: JUDGE_API_KEY
    judge_model: str = ""  # the judge's name there
    controls: bool = False  # also score the same rows blind: gray tiles in place of the pictures
    untrained: str = ""  # control: model folder whose projector was never trained, same rows
    trained_blind: str = ""  # control: model folder trained on gray tiles, asked with gray tiles
    # questions of each benchmark, a sample spread over its file; 0 = all
    limit: int = setting(0, at_most=10**9)
    max_tiles: int = setting(0, at_most=MAX_TILES)  # 0 = the protocol's number for each benchmark
    max_new_tokens: int = setting(0, at_most=2**17)  # 0 = the protocol's for each benchmark
    batch_size: int = setting(64, at_least=1, at_most=2**16)  # prompts generated together
    # places of the cache: 15 GB (2B), 30 GB (8B)
    batch_tokens: int = setting(2**19, at_least=1, at_most=2**30)
    # questions per benchmark in report.html, wrong answers first
    report_rows: int = setting(40, at_most=10**6)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the decoder; auto: on a GPU
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one
    threads: int = setting(0, at_most=1024)  # CPU threads of torch; 0 = torch's default
    num_workers: int = setting(2, at_most=256)  # threads that decode pictures
    timeout_s: int = setting(1800, at_least=1, at_most=10**7)  # ranks wait so long for each other


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
        side = assistant.model.vision.image_size
        most = max_tiles or b.tiles or assistant.max_tiles
        tiles = row_tiles(images, b, side, assistant.thumbnail, most)
    if blind:
        tiles = gray(tiles)
    try:
        return assistant.prompt([(text, None)], tiles)
    except ValueError as e:  # such as a question that is too long
        raise RowError(f"row {row['index']}: {e}") from None


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
    there, whatever its number of ranks. Raises RowError, on every rank, if a row cannot be asked.
    """
    folder = Path(cfg.out_dir) / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {row["index"]: row_key(key, pictures) for row, pictures in pairs}
    done = {}
    for path in sorted(folder.glob(f"{glob.escape(b.name)}.{variant}.rank*.jsonl")):
        for entry in read_jsonl(path):
            if entry.get("key", "") == keys.get(entry.get("index")):
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
    problem = None
    with (naming(path),
          open(path, "a", encoding="utf-8") as f,
          tqdm(total=len(mine), desc=path.stem, disable=not dist.is_main) as bar):
        try:
            for number, text in answers:
                index = mine[number][0]["index"]
                # csv would take \r for the end of a row.
                text = text.replace("\r", " ")
                done[index] = text.removesuffix(".") if b.period else text
                entry = {"key": keys[index], "index": index, "prediction": done[index]}
                # The newline comes first: it ends a line that a killed run left torn.
                f.write("\n" + json.dumps(entry))
                f.flush()
                bar.update()
        except RowError as e:
            problem = e
    every = {}
    for part, trouble in gather((done, problem), dist):
        if trouble:
            raise RowError(f"{b.name}: {trouble}")
        every |= part
    return every


def row_key(key, pictures):
    """The key of a row's answer: that of its benchmark and the content of its picture files."""
    digests = [file_hash(path) for path in pictures if isinstance(path, Path) and path.is_file()]
    return json_hash([key, *digests])[:16] if digests else key


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


def answer_all(tasks, failed, folder_hashes, cfg, dist):
    """-> ({variant: {benchmark: rows with `prediction`}}, the Assistant of the model itself).

    A benchmark with a row that cannot be asked moves from `tasks` to `failed`, {name: reason}.
    """
    dtype = compute_dtype(cfg.dtype, dist.device)
    answered = {}
    assistant = None
    loaded = None
    for variant, folder in variants(cfg):
        if folder != loaded:
            assistant = Assistant(folder, dist.device, dtype,
                                  compiled=is_compiled(cfg.compile, dist.device))
            loaded = folder
        answered[variant] = {}
        for task in list(tasks):
            key = answer_key(task, assistant, folder_hashes[folder], dtype, cfg)
            try:
                said = predict(task.b, task.pairs, assistant, key, cfg, dist, variant)
            except RowError as e:
                failed[task.b.name] = str(e)
                tasks.remove(task)
                continue
            rows = [row | {"prediction": said[row["index"]]} for row, _ in task.pairs]
            answered[variant][task.b.name] = rows
            if variant == "model" and dist.is_main:
                write_tsv(Path(cfg.out_dir) / f"{task.b.name}.tsv", rows)
    return answered, assistant


def answer_key(task, assistant, folder_hash, dtype, cfg):
    """A hash of all that decides an answer beside its row: only runs with the same share them."""
    protocol = run_protocol_hash([task.b], cfg)
    facts = [folder_hash, task.md5, protocol, assistant.template, dtype, assistant.thumbnail]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def hash_folder(folder):
    """All in a model folder that decides its answers: hashes of the weights and of the rest."""
    weights = weights_hashes(folder)
    others = small_file_hashes(folder)
    change = find_change(folder, known=others | weights)
    if change:
        warn(f"{change}; the scores are those of the folder as it is now")
    return joined_hash(weights), json_hash(others)


# ---- the run ------------------------------------------------------------------------------------

def free_cards(tasks, assistant):
    """Answers about the first picture of each task, with the tiles that the model saw.

    They are descriptions, but for a file of one's own the answer to its first question: a model
    that was trained on such rows may never have described anything.
    """
    questions = []
    asked = []
    for task in tasks:
        row, pictures = task.pairs[0]
        if not pictures:
            continue
        question = DESCRIBE
        if task.b.group == OWN:
            question = build_prompt(task.b.prompt, row, len(pictures))
        questions.append(question)
        # The toy benchmarks' way: up to four tiles, pictures upright.
        asked.append(make_prompt(assistant, TOY["toy_ocr"], row, pictures, question))
    answers = assistant.answers(asked, max_new_tokens=128)
    cards = []
    for question, (_, tiles), text in zip(questions, asked, answers, strict=True):
        images = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in tiles]
        cards.append({"question": question, "prediction": text,
                      "pictures": [picture_uri(image) for image in images]})
    return cards


def read_tasks(cfg):
    """-> (benchmarks of a run with their rows, {name of one whose rows cannot be asked: reason}).

    Raises ValueError if no benchmark can be asked.
    """
    benchmarks = choose_benchmarks(cfg.benchmarks, cfg.protocol, cfg.scorer, cfg.prompt)
    paths = {name: find_file(b, cfg.data_dir, cfg.download, cfg.download_from)
             for name, b in benchmarks.items()}
    for name, path in paths.items():
        if (Path(cfg.out_dir) / f"{name}.tsv").resolve() == path.resolve():
            raise ValueError(f"{path}: the predictions would be written over this file; choose "
                             "another --out_dir")
    tasks = []
    failed = {}
    for name, b in benchmarks.items():
        try:
            pairs = read_rows(paths[name], b, cfg.limit)
            for row, pictures in pairs:
                problem = placeholder_problem(b.prompt, row, len(pictures))
                if problem:
                    raise RowError(problem)
        except RowError as e:
            failed[name] = f"{name}: {e}"
            continue
        tasks.append(Task(b, paths[name], pairs, file_hash(paths[name], "md5")))
    if not tasks:
        raise ValueError("; ".join(failed.values()))
    return tasks, failed


def main():
    if sys.argv[1:2] == ["score"]:
        print(json.dumps(score_file(sys.argv[2:]), ensure_ascii=False))
        return
    cfg = Config()
    configurator.configure(cfg)

    # What is missing or wrong shows here, before anything is written.
    for name in ("model", "untrained", "trained_blind"):
        setattr(cfg, name, model_folder(getattr(cfg, name)))
    if cfg.scorer == "judge" and not cfg.judge:
        raise ValueError("--scorer=judge needs --judge=URL and --judge_model=NAME")
    judge = connect_judge(cfg.judge, cfg.judge_model, Path(cfg.out_dir) / "judge.jsonl")
    tasks, failed = read_tasks(cfg)
    folder_hashes = {folder: hash_folder(folder) for _, folder in variants(cfg)}
    for reason in failed.values():
        warn(f"left out: {reason}")
    for task in tasks:
        if task.b.md5 not in ("", task.md5):
            warn(f"{task.path} has MD5 {task.md5}, the protocol's is {task.b.md5}")
        text = never_right_warning(task.b, [row for row, _ in task.pairs])
        if text:
            warn(text)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    dist = setup_distributed(cfg.device, cfg.timeout_s)
    with hold_folder(cfg, dist):
        evaluate(cfg, tasks, failed, folder_hashes, judge, dist)


def hold_folder(cfg, dist):
    """Keep other evaluations out of the out_dir; every rank raises ValueError if one is there."""
    lock = contextlib.nullcontext()
    problem = None
    try:
        if dist.is_main:
            lock = lock_folder(cfg.out_dir)
    except (ValueError, OSError) as e:
        problem = e
    problem = gather(problem, dist)[0]
    if problem:
        raise problem
    return lock


def evaluate(cfg, tasks, failed, folder_hashes, judge, dist):
    """Ask, score, and write what --out_dir has. Raises ValueError if benchmarks failed."""
    start = time.time()
    n_failed = len(failed)
    answered, assistant = answer_all(tasks, failed, folder_hashes, cfg, dist)
    # A judge takes its time: only the first process stays.
    close_distributed()
    if not dist.is_main:
        return
    if not tasks:
        raise ValueError("; ".join(failed.values()))
    for reason in list(failed.values())[n_failed:]:
        warn(f"left out: {reason}")

    out = Path(cfg.out_dir)
    scores, details = score_all(tasks, answered, judge)
    results = build_results(tasks, failed, scores, details, cfg)
    results["model_sha256"], _ = folder_hashes[cfg.model]
    results["dtype"] = str(compute_dtype(cfg.dtype, dist.device)).removeprefix("torch.")
    results["torch"] = torch.__version__
    results["seconds"] = round(time.time() - start, 1)
    cards = []
    for task in tasks:
        name = task.b.name
        rows = answered["model"][name]
        scored = results[name] is not None
        cards += question_cards(task.b, rows, task.pairs, scored, cfg.report_rows, judge)
    free = free_cards(tasks[:2], assistant)
    write_atomic(out / "report.html", report_html(results, cards, free))
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomic(out / "results.json", text + "\n")
    print_results(results, [variant for variant in scores if variant != "model"])
    print(f"wrote {out / 'results.json'} and {out / 'report.html'}")
    if failed:
        raise ValueError(f"{len(failed)} of {len(tasks) + len(failed)} benchmarks could not be "
                         f"asked: {'; '.join(failed.values())}")


if __name__ == "__main__":
    configurator.run_script(main)
