"""runs/curriculum.py, paper_rows.py, paper_page.py: arms of the same samples, intervals, a page."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import convert
from inputs.tars import open_tar, tar_key, tar_members
from runs import curriculum, paper_page, paper_rows
from toy import __main__ as toy

ROOT = Path(__file__).parent.parent
SIZES = {"knowledge": 30, "instruction": 20, "preference": 10}


def command(script, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
    script.main()


def keys_of(path):
    with open_tar(path) as tar:
        return list(dict.fromkeys(tar_key(member) for member in tar_members(tar)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The three levels of fine-tuning data, in sizes of their own."""
    folder = tmp_path_factory.mktemp("sft")
    cfg = toy.Config(out=str(folder), n=",".join(map(str, SIZES.values())))
    toy.write_parts(cfg, list(SIZES))
    return folder


def no_of_files(spec):
    """Stands for a pack counter: five packs for each level."""
    return 5


def test_every_order_has_the_same_samples_once(data, tmp_path):
    curriculum.write_orders(data, tmp_path / "seed", 1, no_of_files)
    orders = {}
    for order in curriculum.ORDERS:
        parts = [keys_of(tmp_path / "seed" / f"{order}_{k}.tar") for k in (1, 2, 3)]
        orders[order] = parts
    levels = [[f"{level}-{i:08d}" for i in range(n)] for level, n in SIZES.items()]
    assert orders["curriculum"] == levels
    assert orders["reversed"] == levels[::-1]
    mixed = sum(orders["mixed"], [])
    assert sorted(mixed) == sorted(sum(levels, []))
    # Thirds as long in steps as those of the curriculum, each with samples of all levels.
    assert [len(part) for part in orders["mixed"]] == [20, 20, 20]
    for part in orders["mixed"]:
        assert len({key.split("-")[0] for key in part}) == 3


def test_another_seed_mixes_otherwise_and_the_same_seed_alike(data, tmp_path):
    orders = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        curriculum.write_orders(data, tmp_path / name, seed, no_of_files)
        orders.append(keys_of(tmp_path / name / "mixed_1.tar"))
    assert orders[0] == orders[1] != orders[2]


@pytest.fixture
def planned(data, tmp_path, monkeypatch, capsys):
    """The command lines of all arms as they are printed, {arm: (training, evaluation)}."""
    monkeypatch.setattr(curriculum, "pack_counter", lambda model, tokens: counted)
    command(curriculum, monkeypatch, "plan", f"--out_dir={tmp_path}/runs", "--start=start_{seed}",
            f"--data={data}", "--seeds=1,2", "--eval=--data_dir=b --benchmarks=toy,toy_steps")
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for train, test in zip(lines[::2], lines[1::2], strict=True):
        order, schedule, seed = re.search(r"runs/(\w+)_(\w+)_seed_(\d)/sft", train).groups()
        found[order, schedule, seed] = (train, test)
    return found


def counted(spec):
    """Ten packs for each file."""
    return 10 * len(spec.split(","))


def test_each_order_runs_under_both_schedules_for_as_many_steps_at_the_same_rates(planned):
    assert set(planned) == {(*arm, seed) for arm in curriculum.ARMS for seed in "12"}
    assert len(curriculum.ARMS) == 6
    rates = set()
    for (order, schedule, seed), (train, test) in planned.items():
        steps = [int(n) for n in re.findall(r"\.steps=(\d+)", train)]
        assert steps == ([10, 10, 10] if schedule == "three" else [30])
        assert "--shuffle=False" in train and f"--seed={seed}" in train
        assert f"--init_from=start_{seed}" in train
        files = re.findall(r"(\w+)_(\d)\.tar", train)
        assert files == [(order, "1"), (order, "2"), (order, "3")]
        rates |= set(re.findall(r"lr_\w+=\S+", train))
        last = "preference" if schedule == "three" else "knowledge"
        assert f"sft/{last} " in test and "--benchmarks=toy,toy_steps" in test
    assert len(rates) == 3


def test_the_flags_of_an_arm_are_those_that_sft_py_takes(planned):
    import configurator
    import sft

    train, _ = planned["mixed", "three", "1"]
    words = [word for word in train.split("sft.py ", 1)[1].split() if ".data=" not in word]
    cfg = sft.Config()
    configurator.configure(cfg, words)
    assert cfg.knowledge.steps == 10 and not cfg.shuffle
    assert cfg.preference.lr_llm == cfg.knowledge.lr_llm == pytest.approx(1.25e-4)


def test_packs_are_counted_as_training_fills_them(data, tmp_path):
    start = tmp_path / "start"
    parts = {"vision": str(ROOT / "toy" / "vit"), "llm": str(ROOT / "toy" / "llm")}
    convert.assemble(convert.AssembleConfig(**parts, out=str(start)))
    count = curriculum.pack_counter(start, 400)
    one = count(f"{data}/knowledge-*.tar")
    assert 5 <= one <= 12
    both = count(f"{data}/knowledge-*.tar,{data}/instruction-*.tar")
    assert 0 <= one + count(f"{data}/instruction-*.tar") - both <= 1


# ---- comparisons ---------------------------------------------------------------------------------

NAMES = ("toy_ocr", "toy_steps")


def finished(folder, rights):
    """A run that has been evaluated. rights: {benchmark: whether each question was answered}."""
    folder = folder / "eval"
    folder.mkdir(parents=True)
    scores = {name: 100 * float(np.mean(right)) for name, right in rights.items()}
    for name, right in rights.items():
        with open(folder / f"{name}.tsv", "w", newline="") as file:
            out = csv.writer(file, delimiter="\t")
            out.writerow(["index", "question", "answer", "prediction"])
            for i, ok in enumerate(right):
                right_answer = "so: A" if name == "toy_steps" else "A"
                out.writerow([i, "Q?", "A", right_answer if ok else "B"])
    overall = float(np.mean(list(scores.values())))
    (folder / "results.json").write_text(json.dumps(
        {"overall": overall, "n": {name: len(right) for name, right in rights.items()}} | scores))


@pytest.fixture
def compared(tmp_path):
    """Three seeds of all arms; three schedules cost 20 of 100 questions of each benchmark."""
    rng = np.random.default_rng(0)
    for seed in (1, 2, 3):
        base = {name: (rng.random(100) < 0.8).astype(int) for name in NAMES}
        for order, schedule in curriculum.ARMS:
            rights = {name: right.copy() for name, right in base.items()}
            if schedule == "three":
                for right in rights.values():
                    right[rng.permutation(np.flatnonzero(right))[:20]] = 0
            finished(tmp_path / "curriculum" / f"{order}_{schedule}_seed_{seed}", rights)
    return tmp_path


def test_differences_are_paired_by_seed_and_by_question(compared, monkeypatch, capsys):
    command(curriculum, monkeypatch, "compare", f"--out_dir={compared}/curriculum")
    assert "| mixed | three | 3 |" in capsys.readouterr().out
    rows = [json.loads(line) for line in open(compared / "curriculum" / "contrasts.jsonl")]
    by_name = {(row["due_to"], row["metric"]): row for row in rows}
    assert len(by_name) == len(curriculum.CONTRASTS) * 3
    row = by_name["schedule, mixed data", "overall"]
    assert row["difference"] == -20 and row["single"] == [-20, -20, -20]
    assert row["by_seed"] == [-20, -20]
    low, high = row["by_question"]
    assert -26 < low < -20 < high < -14
    same = by_name["order, under one schedule", "toy_steps"]
    assert same["difference"] == 0 and same["by_seed"] == [0, 0]
    order = by_name["order, under three schedules", "overall"]
    assert order["by_question"][0] < 0 < order["by_question"][1]
    results = [json.loads(line) for line in open(compared / "curriculum" / "results.jsonl")]
    assert len(results) == 18 and {row["seed"] for row in results} == {1, 2, 3}


PAGE = """# Experiments
It took 7 minutes of my time.
<!-- table captions -->
an old table
<!-- end -->
<!-- table growth -->
<!-- end -->
<!-- table arms -->
<!-- end -->
<!-- table order -->
<!-- end -->
<!-- table ranks -->
<!-- end -->
<!-- table base -->
<!-- end -->
<!-- table minutes -->
<!-- end -->
The end.
"""


@pytest.fixture
def left(compared, monkeypatch):
    """What the whole command leaves, but a base that was never gated: (folder, page)."""
    for seed, captions in ((s, c) for s in (1, 2) for c in ("unique", "final")):
        right = np.arange(10) < (8 if captions == "final" else 2 + seed)
        finished(compared / "captions" / f"pretrained_{captions}_{seed}",
                 {"toy_ocr": right.astype(int)})
    for name in paper_page.GROWTHS:
        folder = compared / name
        folder.mkdir()
        worth = 10 if name == "sft_noisy" else 20
        points = [{"steps": n, "seed": s, "tokens": 100 * n, "overall": worth * np.log10(n) + s}
                  for n in (10, 20, 40, 80) for s in (1, 2)]
        (folder / "points.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    orders = {"quick_1": [60, 50, 55, 10], "full_1": [80, 70, 60, 10],
              "quick_2": [60, 50, 40, 10], "full_2": [70, 60, 50, 20]}
    for name, scores in orders.items():
        folder = compared / "tiers" / name
        folder.mkdir(parents=True)
        ranking = list(zip(paper_page.CANDIDATES, scores, strict=True))
        (folder / "ranking.json").write_text(json.dumps(ranking))
    parts = [("start", 60, 90), ("captions", 120, 240), ("start", 30, 30)]
    (compared / "minutes.jsonl").write_text("".join(
        json.dumps({"part": part, "seconds": seconds, "cpu_seconds": cpu}) + "\n"
        for part, seconds, cpu in parts))
    command(curriculum, monkeypatch, "compare", f"--out_dir={compared}/curriculum")
    page = compared / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(PAGE)
    return compared, page


def tables_of(text):
    """The lines between the marks of a page."""
    return "\n".join(match[0] for match in paper_page.MARKED.finditer(text))


def test_the_tables_of_the_page_show_nothing_that_is_not_in_a_line_beside_it(left, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, page = left
    command(paper_page, monkeypatch, f"--out_dir={folder}", f"--page={page}", "--llm=nowhere")
    text = page.with_suffix(".jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    (difference,) = [row for row in rows if row.get("due_to") == "recaptions instead of alt-text"
                     and row["metric"] == "overall"]
    assert difference["single"] == [50, 40] and difference["difference"] == 45
    written = page.read_text()
    assert "It took 7 minutes of my time." in written and "an old table" not in written
    assert written.endswith("The end.\n")
    assert_traceable(written, text)
    # A table whose part has not run says so.
    assert "<!-- table base -->\nNot run.\n<!-- end -->" in written
    assert "| start | 1.5 | 2.0 |" in written and "| all | 3.5 | 6.0 |" in written
    assert (folder / "assets" / "paper.png").read_bytes()[:4] == b"\x89PNG"
    # The rows alone make the same page.
    page.write_text(PAGE)
    command(paper_page, monkeypatch, f"--page={page}", "--rows=True")
    assert page.read_text() == written


def assert_traceable(page, text):
    """Each number in the tables of a page is one of its .jsonl, rounded."""
    numbers = set(re.findall(r"\d+\.\d+", tables_of(page)))
    known = {f"{abs(float(n)):.{k}f}" for n in re.findall(r"-?\d+\.?\d*", text)
             for k in (1, 2, 3)}
    assert numbers and numbers <= known, numbers - known


def test_quick_and_full_tiers_are_compared_pair_by_pair(left):
    folder, _ = left
    rows = {(row["ranks"], row["as"], row["among"]): row
            for row in paper_rows.tier_rows(folder / "tiers") if "ranks" in row}
    quick = rows["quick", "full", "all"]
    # In one of two seeds the quick tier exchanges two candidates.
    assert (quick["pairs_alike"], quick["pairs"]) == (11, 12)
    assert (quick["same_best"], quick["same_order"]) == (2, 1)
    assert rows["full", "truth", "all"]["same_order"] == 2
    questions = rows["quick", "full", "questions"]
    assert (questions["pairs_alike"], questions["pairs"]) == (5, 6)


def test_the_interval_of_a_slope_is_that_of_the_seeds():
    points = [{"seed": seed, "tokens": tokens, "overall": slope * np.log10(tokens) + seed}
              for seed, slope in ((1, 8), (2, 10), (3, 12)) for tokens in (10, 100, 1000)]
    found = paper_rows.slope_by_seed(points, "overall")
    assert found["slopes"] == [8, 10, 12] and found["slope"] == 10
    # Student's t of two degrees of freedom, 4.303, times 2 / sqrt(3)
    assert found["slope_half"] == pytest.approx(4.97, abs=0.01)
    assert paper_rows.slope_by_seed(points[:3], "overall") == {}


def test_right_answers_are_worth_a_difference_by_seed(left):
    folder, _ = left
    points = [row for name in ("sft_clean", "sft_noisy")
              for row in paper_rows.growth_rows(folder / name, 1)]
    score, slope = paper_rows.quality_rows(points)
    assert slope["single"] == [10, 10] and slope["metric"] == "points per tenfold"
    # The mean of log10 of 10, 20, 40 and 80 is 1.4515.
    assert score["difference"] == pytest.approx(14.52, abs=0.01)


def test_a_mark_of_an_unknown_table_is_told(left, monkeypatch):
    folder, page = left
    page.write_text("<!-- table capitons -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="unknown table 'capitons': there are minutes, base"):
        command(paper_page, monkeypatch, f"--out_dir={folder}", f"--page={page}")


def test_the_tables_of_the_shipped_page_are_made_from_its_rows():
    page = (ROOT / "docs" / "experiments.md").read_text()
    text = (ROOT / "docs" / "experiments.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert paper_page.fill_page(page, rows) == page
    assert_traceable(page, text)


@pytest.mark.parametrize("script, flags, words", [
    (curriculum, [], "plan | compare"),
    (curriculum, ["plan", "--start=x"], "give --start=MODEL_FOLDER, --data=DIR"),
    (curriculum, ["plan", "--start=x", "--data=x", "--eval=x", "--schedules=two"], "give three"),
    (curriculum, ["compare", "--out_dir=nowhere"], "nowhere has no finished run: plan --run=True"),
    (paper_page, ["--out_dir=nowhere", "--llm=nowhere"], "nowhere has no finished run: bash runs/"),
])
def test_a_mistake_is_one_line_that_says_what_to_do(monkeypatch, script, flags, words):
    with pytest.raises(ValueError) as e:
        command(script, monkeypatch, *flags)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_data_that_is_not_there_is_told_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match="has no knowledge-.*tar: python -m toy --out="):
        curriculum.write_orders(tmp_path, tmp_path / "x", 1, no_of_files)


# ---- the whole command ---------------------------------------------------------------------------

@pytest.mark.nightly
def test_the_paper_in_miniature_is_killed_and_goes_on_to_its_page_and_again_without_work(tmp_path):
    paper = tmp_path / "paper"
    settings = {
        "BIN": Path(sys.executable).parent, "PAPER": paper, "SEEDS": 1, "STEPS": 12,
        "BUDGETS": "3,4,5,6", "SFT_BUDGETS": "3,4,5,6", "N": 40, "N_SFT": "24,16,8", "N_BENCH": 4,
        "N_STEPS": 6, "N_WEB": 40, "STEPS_SHARE": 12, "N_TIER": "12,8,4", "QUICK": 8,
        "TIER_STEPS": "2,4", "PARTS": "captions growth sft curriculum tiers"}
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    script = ["bash", "runs/paper_in_miniature.sh"]
    first = subprocess.Popen(script, cwd=ROOT, env=environment, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finished_point = paper / "growth" / "4_steps_seed_1" / "eval" / "results.json"
    deadline = time.monotonic() + 1800
    while not finished_point.exists() and time.monotonic() < deadline:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    written = finished_point.stat().st_mtime_ns
    for _ in range(2):
        done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=1800)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert "planned: about" in done.stdout.splitlines()[0]
    # What was finished was not done again.
    assert finished_point.stat().st_mtime_ns == written
    page = paper / "docs" / "experiments.md"
    rows = [json.loads(line) for line in open(page.with_suffix(".jsonl"))]
    assert {row["claim"] for row in rows} == {
        "minutes", "base", "start", "captions", "curriculum", "tiers", *paper_page.GROWTHS,
        "quality", "validation"}
    assert "one seed, no interval" in page.read_text() and "Not run." not in page.read_text()
