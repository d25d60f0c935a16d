"""The toy world: pictures with exact truth, as many as you like, for models of 3 M parameters.

    python -m toy --out=shards/toy --n=4000                   # training shards and benchmarks
    python -m toy --out=shards/web --n=2000 --parts=web       # poor alt-text, and the truth beside
    python -m toy --out=shards/words --n=100000 --parts=text  # every picture given as words
    python -m toy --out=shards/hard --parts=knowledge,instruction,preference,steps \
        --n=1300,1000,320 --wrong=25,10,0 --two_steps=True    # sizes and wrong answers by part

boards.py has the truth of a picture, draw.py its pixels, captions.py and questions.py what is said
about it, steps.py the questions of two steps, families.py the kinds of questions, and records.py
makes samples of all this. Boards of 1x1 to 3x1 and 2x2 tiles go through the same dynamic tiling,
thumbnail included, as real photos. bases.py makes the small ViT and the language model that are in
toy/vit and toy/llm.
"""
import base64
import csv
import hashlib
import io
import json
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from configurator import configure, run_script, setting
from inputs.files import atomic_write, write_atomic
from inputs.tars import add_record
from toy.draw import draw_picture, jpeg_bytes
from toy.families import check_families
from toy.records import BENCHMARKS, LEVELS, Variant, steps_question, toy_question, toy_record

TAR_PARTS = (*LEVELS, "web", "drill")
TRAINING_PARTS = (*TAR_PARTS, "text")
SAMPLES_PER_SHARD = 500
# Where one of these changes, the world is another one.
WORLD_FILES = (
    "boards", "captions", "draw", "families", "questions", "records", "steps", "__main__")


@dataclass(slots=True)
class Config:
    out: str = setting("shards/toy", filled=True)  # folder to write
    n: str = "4000"  # samples of each training part; several numbers: by part, as --parts has them
    n_bench: int = setting(200, at_most=10**7)  # questions of each benchmark
    n_steps: int = setting(500, at_most=10**7)  # questions of toy_steps
    seed: int = setting(1, at_most=2**32 - 1)  # another seed: other samples, same world
    parts: str = "pretrain,knowledge,instruction,preference,bench"  # also: web, text, drill, steps
    wrong: str = "0"  # percent of the answers that belong to another picture; by part as n
    two_steps: bool = False  # preference samples ask questions of two steps, as toy_steps does
    without: str = ""  # families of questions that training parts leave out, see families.py


def main():
    cfg = Config()
    configure(cfg)
    parts = cfg.parts.split(",")
    known = (*TRAINING_PARTS, "bench", "steps")
    for part in parts:
        if part not in known:
            raise ValueError(f"unknown part {part!r}: choose from {', '.join(known)}")
    training = [part for part in parts if part in TRAINING_PARTS]
    # Both are checked before anything is written.
    training_sizes(cfg, training)
    training_variants(cfg, training)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    remove_outdated(cfg)
    write_parts(cfg, training)
    if "bench" in parts:
        write_benchmarks(cfg)
    if "steps" in parts:
        questions = (steps_question(cfg.seed, i) for i in range(cfg.n_steps))
        write_benchmark(cfg, "toy_steps", questions)


def training_sizes(cfg, parts):
    """{training part: number of its samples}."""
    return numbers_by_part("n", cfg.n, parts, 10**7)


def training_variants(cfg, parts):
    """{training part: what is unusual about its samples}."""
    without = tuple(cfg.without.split(",")) if cfg.without else ()
    check_families(without)
    wrong = numbers_by_part("wrong", cfg.wrong, parts, 100)
    return {part: Variant(cfg.two_steps, wrong[part] / 100, without) for part in parts}


def numbers_by_part(name, text, parts, most):
    """"25,10,0" -> {part: number} in the order of the parts; one number is for all of them."""
    words = text.split(",")
    for word in words:
        if not word.isdecimal() or int(word) > most:
            raise ValueError(f"--{name}={text}: {word!r} is not a whole number from 0 to {most:,}")
    if len(words) == 1:
        words *= len(parts)
    if len(words) != len(parts):
        raise ValueError(f"--{name}={text}: give one number, or {len(parts)}: one for each of "
                         f"{', '.join(parts)}")
    return {part: int(word) for part, word in zip(parts, words, strict=True)}


def remove_outdated(cfg):
    """Remove files of other settings or of an older world. toy.json says what a folder holds."""
    sources = [Path(__file__).with_name(f"{name}.py") for name in WORLD_FILES]
    world = zlib.crc32(b"".join(source.read_bytes() for source in sources))
    settings = {
        "n": cfg.n, "n_bench": cfg.n_bench, "n_steps": cfg.n_steps, "seed": cfg.seed,
        "wrong": cfg.wrong, "two_steps": cfg.two_steps, "without": cfg.without, "world": world}
    # Numbers by part say something together with the parts alone.
    if "," in cfg.n + cfg.wrong:
        settings["parts"] = cfg.parts
    path = Path(cfg.out) / "toy.json"
    if path.exists() and path.read_text() != json.dumps(settings):
        names = [f"{part}-*.tar" for part in TAR_PARTS]
        names += ["web-*.truth.jsonl", "toy_*.tsv", "text.jsonl"]
        for name in names:
            for old in path.parent.glob(name):
                old.unlink()
    write_atomic(path, json.dumps(settings))


# ---- training samples ----------------------------------------------------------------------------

def write_parts(cfg, parts):
    """Training data of all parts, in parallel. A shard that is there already stays as it is."""
    sizes = training_sizes(cfg, parts)
    variants = training_variants(cfg, parts)
    with ProcessPoolExecutor() as pool:
        jobs = []
        for part in parts:
            n = sizes[part]
            if part == "text":
                jobs.append(pool.submit(write_text, cfg, n, variants[part]))
                continue
            for start in range(0, n, SAMPLES_PER_SHARD):
                path = Path(cfg.out) / f"{part}-{start // SAMPLES_PER_SHARD:06d}.tar"
                if not path.exists():
                    samples = range(start, min(start + SAMPLES_PER_SHARD, n))
                    job = (write_toy_shard, cfg.seed, part, samples, path, variants[part])
                    jobs.append(pool.submit(*job))
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="toy shards"):
            job.result()


def write_toy_shard(seed, part, samples, path, variant):
    """Write the samples of these numbers as one WebDataset tar.

    A sample is KEY.json and KEY.jpg or, of two pictures, KEY.0.jpg and KEY.1.jpg. The part "web"
    has the alt-text alone, and the truth stands in PATH.truth.jsonl, by the hash of the picture.
    """
    truth = []
    with atomic_write(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i in samples:
                row, boards = toy_record(seed, part, i, variant=variant)
                pictures = [(".jpg", jpeg_bytes(draw_picture(*drawn))) for drawn in boards]
                if part == "web":
                    digest = hashlib.sha256(pictures[0][1]).hexdigest()
                    truth.append({"sha256": digest, "caption": row["caption"]})
                    row = {"id": row["id"], "caption": row["alt_text"]}
                add_record(tar, row["id"], row, pictures)
        # The shard gets its name last: whoever finds it finds the truth too.
        if truth:
            lines = [json.dumps(entry) + "\n" for entry in truth]
            write_atomic(path.with_suffix(".truth.jsonl"), "".join(lines))


def write_text(cfg, n, variant):
    """n samples with words in place of the pictures, for the toy language model."""
    with atomic_write(Path(cfg.out) / "text.jsonl") as file:
        for i in tqdm(range(n), desc="toy text"):
            row, _ = toy_record(cfg.seed, "text", i, i < n // 5, variant)
            text_row = {key: row[key] for key in ("id", "cells", "conversations")}
            file.write(json.dumps(text_row) + "\n")


# ---- benchmarks ----------------------------------------------------------------------------------

def write_benchmarks(cfg):
    """The benchmarks of the demo."""
    for name in BENCHMARKS:
        questions = (toy_question(name, cfg.seed, i) for i in range(cfg.n_bench))
        write_benchmark(cfg, name, questions)


def write_benchmark(cfg, name, questions):
    """Held-out questions in VLMEvalKit's tab-separated form, with the cells of each picture."""
    path = Path(cfg.out) / f"{name}.tsv"
    if path.exists():
        return
    options = "ABCD" if name == "toy_general" else ""
    task = ["task"] if name == "toy_steps" else []
    columns = ["index", "image", "cells", "question", *options, "answer", "category", *task]
    with atomic_write(path, "wb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        out = csv.DictWriter(text, columns, delimiter="\t", restval="")
        out.writeheader()
        for row, board, rng in tqdm(questions, desc=name):
            image = base64.b64encode(jpeg_bytes(draw_picture(board, rng))).decode()
            out.writerow(row | {"image": image, "cells": "|".join(board.token_words())})
        text.flush()
        text.detach()


if __name__ == "__main__":
    run_script(main)
