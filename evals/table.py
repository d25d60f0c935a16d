"""The 18 benchmarks of the paper and the toy ones, one entry each, and the protocols they make.

A protocol is a table of benchmarks. Its hash stands beside every score, because 10-20 points can
hide in a prompt. Each protocol follows one state of VLMEvalKit (open-compass/VLMEvalKit), prompts
and tiles of its SAIL-VL adapter, vlmeval/vlm/sail_vl.py, and its scorers:

sailvl-2024-12: the paper's, commit 226212fe (22 December 2024), which added the adapter.
vlmevalkit-2026-08: commit e8e78f05 (August 2026). The adapter asks with more tiles, in two scales,
    and for shorter answers. A full stop after a digit stays (2025), ChartQA's 5 % are of the
    reference (September 2025), and fewer options are read (July 2025; "answer is": May 2026).
"""
import dataclasses
import hashlib
import json
from collections.abc import Callable

from evals.prompts import JUDGE_PROMPTS, MCQ, OPEN, TAIL
from evals.scorers import (
    REFUSALS,
    anls,
    any_reference,
    exact_match,
    exact_number,
    graded,
    last_exact,
    mathvista,
    mmmu,
    multiple_choice,
    ocrbench,
    relaxed_accuracy,
    swapped_relaxed_accuracy,
    vqa_score,
    yes_no,
)
from evals.totals import capabilities, circular, hallusion, mean, mme, ocrbench_total, pope

# Version of the scorers' code and of how pictures are read. It goes up when either changes.
RULES = 5
# The group of files of one's own.
OWN = "own"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    name: str
    # Averages are taken over groups: general, ocr, math, hallucination, toy, own.
    group: str
    # Kind of prompt: mcq, or a key of prompts.TAIL.
    prompt: str
    # Of evals/scorers.py: reads an answer and gives it points.
    scorer: Callable
    # Of evals/totals.py: makes the score of the points.
    total: Callable = mean
    # no: rules read every answer. optional: a judge reads what they cannot. required: no score
    # without a judge.
    judge: str = "no"
    # Columns that scorer or total look at, beside index, question and answer.
    columns: tuple = ()
    # The most tiles of one picture, thumbnail not counted; 64 over all pictures of a row. 0: as
    # many as the model folder says.
    tiles: int = 6
    max_new_tokens: int = 4096
    # One closing full stop of the answer is dropped.
    period: bool = False
    # The first picture is enlarged by this factor.
    upscale: int = 1
    # The only rows that count; "" = all.
    split: str = ""
    # Pictures are stored and read as VLMEvalKit does, rows without one are left out.
    jpeg: bool = True
    # The scorer reads as VLMEvalKit's of 2026.
    recent: bool = False
    # A single picture is cut in two scales (evals/tiling.py).
    two_scales: bool = False
    # Name of the .tsv, where it is not that of the benchmark, and its MD5.
    file: str = ""
    md5: str = ""
    # Where the file is below files.ADDRESS. It decides no score.
    folder: str = "VLMEval"
    # Of a file of one's own (evals/own.py); "": the file is in --data_dir.
    path: str = ""

    @property
    def file_name(self):
        return f"{self.file or self.name}.tsv"


def by_name(*benchmarks):
    return {b.name: b for b in benchmarks}


def later(b):
    """A benchmark of the paper under vlmevalkit-2026-08."""
    scorer = relaxed_accuracy if b.scorer is swapped_relaxed_accuracy else b.scorer
    return dataclasses.replace(
        b,
        scorer=scorer,
        tiles=max(10, b.tiles),
        max_new_tokens=1024,
        recent=scorer in (multiple_choice, mmmu, mathvista, vqa_score, yes_no),
        two_scales=True,
    )


PAPER = by_name(
    Benchmark(
        name="MMStar", group="general", prompt="mcq",
        scorer=multiple_choice, judge="optional",
        columns=("A", "B"),
        md5="e1ecd2140806c1b1bbf54b43372efb9e",
    ),
    Benchmark(
        name="MMBench_DEV", group="general", prompt="mcq",
        scorer=multiple_choice, total=circular, judge="optional",
        columns=("A", "B"),
        file="MMBench_DEV_EN", folder="benchmarks/MMBench",
        md5="b6caf1133a01c6bb705cf753bb527ed8",
    ),
    Benchmark(
        name="MMMU_VAL", group="general", prompt="mcq",
        scorer=mmmu, judge="optional",
        columns=("A", "B"),
        tiles=12, upscale=2, split="validation",
        file="MMMU_DEV_VAL",
        md5="585e8ad75e73f75dcad265dfd0417d64",
    ),
    Benchmark(
        name="MME", group="general", prompt="mme",
        scorer=yes_no, total=mme, judge="optional",
        columns=("category", "image_path"),
        md5="b36b43c3f09801f5d368627fb92187c3",
    ),
    Benchmark(
        name="SEEDBench_IMG", group="general", prompt="mcq",
        scorer=multiple_choice, judge="optional",
        columns=("A", "B"),
        folder="benchmarks/SEEDBench",
        md5="68017231464752261a2526d6ca3a10c0",
    ),
    Benchmark(
        name="RealWorldQA", group="general", prompt="mcq",
        scorer=multiple_choice, judge="optional",
        columns=("A", "B"),
        md5="4de008f55dc4fd008ca9e15321dc44b7",
    ),
    Benchmark(
        name="MMVet", group="general", prompt="plain",
        scorer=graded, total=capabilities, judge="required",
        columns=("category",),
        md5="748aa6d4aa9d4de798306a63718455e3",
    ),
    Benchmark(
        name="OCRBench", group="ocr", prompt="short",
        scorer=ocrbench, total=ocrbench_total,
        columns=("category",),
        tiles=24,
        md5="e953d98a987cc6e26ef717b61260b778",
    ),
    Benchmark(
        name="DocVQA_VAL", group="ocr", prompt="short",
        scorer=anls,
        tiles=18,
        md5="d5ee77e1926ff10690d469c56b73eabf",
    ),
    Benchmark(
        name="InfoVQA_VAL", group="ocr", prompt="short",
        scorer=anls,
        tiles=24,
        md5="2342e9c225222f0ef4dec545ebb126fe",
    ),
    Benchmark(
        name="ChartQA_TEST", group="ocr", prompt="short",
        scorer=swapped_relaxed_accuracy,
        tiles=12, period=True,
        md5="c902e0aa9be5582a7aad6dcf52734b42",
    ),
    Benchmark(
        name="TextVQA_VAL", group="ocr", prompt="short",
        scorer=vqa_score,
        md5="b233b31f551bbf4056f2f955da3a92cd",
    ),
    Benchmark(
        name="AI2D_TEST", group="ocr", prompt="mcq",
        scorer=multiple_choice, judge="optional",
        columns=("A", "B"),
        md5="0f593e0d1c7df9a3d69bf1f947e71975",
    ),
    Benchmark(
        name="OCRVQA_TESTCORE", group="ocr", prompt="short",
        scorer=any_reference,
        tiles=12, period=True,
        md5="c5239fe77db8bdc1f2ad8e55e0d1fe97",
    ),
    Benchmark(
        name="MathVista_MINI", group="math", prompt="plain",
        scorer=mathvista, judge="required",
        columns=("question_type", "answer_type", "choices", "answer_option"),
        md5="f199b98e178e5a2a20e7048f5dcb0464",
    ),
    Benchmark(
        name="ScienceQA", group="math", prompt="mcq",
        scorer=multiple_choice, judge="optional",
        columns=("A", "B"),
        file="ScienceQA_TEST", folder="benchmarks/ScienceQA",
        md5="e42e9e00f9c59a80d8a5db35bc32b71f",
    ),
    Benchmark(
        name="POPE", group="hallucination", prompt="plain",
        scorer=yes_no, total=pope, judge="optional",
        columns=("category",),
        md5="c12f5acb142f2ef1f85a26ba2fbe41d5",
    ),
    Benchmark(
        name="HallusionBench", group="hallucination", prompt="yes_no",
        scorer=yes_no, total=hallusion, judge="optional",
        columns=("l2-category",),
        md5="0c23ac0dc9ef46832d7a24504f2a0c7c",
    ),
)
TOY = by_name(
    Benchmark(
        name="toy_general", group="toy", prompt="mcq",
        scorer=multiple_choice,
        columns=("A", "B"),
        tiles=4, max_new_tokens=16, jpeg=False,
    ),
    Benchmark(
        name="toy_ocr", group="toy", prompt="plain",
        scorer=exact_match,
        tiles=4, max_new_tokens=48, jpeg=False,
    ),
    Benchmark(
        name="toy_chart", group="toy", prompt="short",
        scorer=relaxed_accuracy,
        tiles=4, max_new_tokens=16, period=True, jpeg=False,
    ),
    Benchmark(
        name="toy_count", group="toy", prompt="short",
        scorer=exact_number,
        tiles=4, max_new_tokens=16, jpeg=False,
    ),
    Benchmark(
        name="toy_halluc", group="toy", prompt="plain",
        scorer=yes_no,
        tiles=4, max_new_tokens=16, jpeg=False,
    ),
)
# Beside the five that `toy` stands for.
TOY_MORE = by_name(
    Benchmark(
        name="toy_steps", group="toy", prompt="plain",
        scorer=last_exact,
        tiles=4, max_new_tokens=48, jpeg=False,
    ),
)
KNOWN = PAPER | TOY | TOY_MORE
PROTOCOLS = {
    "sailvl-2024-12": KNOWN,
    "vlmevalkit-2026-08": KNOWN | by_name(*map(later, PAPER.values())),
}
PAPER_PROTOCOL = "sailvl-2024-12"
# Name of a protocol that there was -> what became of it.
FORMER_PROTOCOLS = {
    "vlmevalkit-2025-04": "it mixed rules of April 2025 and of 2026; use vlmevalkit-2026-08"}


def find_benchmark(name, protocol=PAPER_PROTOCOL):
    """A benchmark by its name here or that of its file. ValueError lists what there is."""
    if protocol not in PROTOCOLS:
        reason = FORMER_PROTOCOLS.get(protocol, "unknown")
        raise ValueError(f"--protocol={protocol}: {reason}; there are {', '.join(PROTOCOLS)}")
    for b in PROTOCOLS[protocol].values():
        if name in (b.name, b.file or b.name):
            return b
    known = ", ".join(PROTOCOLS[protocol])
    raise ValueError(f"unknown benchmark {name!r}; there are: toy, all, {known}; "
                     "or the path of a .tsv or .jsonl of your own")


def parse_benchmarks(text, protocol=PAPER_PROTOCOL):
    """Comma list -> benchmarks by name; `toy` is the five toy ones, `all` the 18 of the paper."""
    chosen = {}
    for word in text.split(","):
        word = word.strip()
        if word in ("toy", "all") and protocol in PROTOCOLS:
            names = TOY if word == "toy" else PAPER
        else:
            names = [find_benchmark(word, protocol).name]
        for name in names:
            chosen[name] = PROTOCOLS[protocol][name]
    return chosen


def protocol_hash(benchmarks, max_tiles=0, max_new_tokens=0):
    """sha256 over everything that decides the scores apart from the model and the rows.

    0 = the table's own value. Scorers and totals count by their names. The order of the values is
    part of the hash: a new field that decides scores goes behind the others.
    """
    rules = {}
    for b in benchmarks:
        rules[b.name] = [
            b.md5, b.group, b.prompt, b.scorer.__name__, b.total.__name__, b.judge,
            max_tiles or b.tiles, max_new_tokens or b.max_new_tokens, b.period, b.upscale, b.split,
            b.jpeg, b.recent, b.file or b.name, "", b.two_scales]
    wording = [TAIL, MCQ, OPEN, REFUSALS, list(JUDGE_PROMPTS.values())]
    fixed = ["pixels", "greedy", "thumbnail", RULES]
    text = json.dumps([rules, wording + fixed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
