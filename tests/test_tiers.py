"""curation/tiers.py: mixes of training data, their commands and their ranking."""
import json
import re
from pathlib import Path

import pytest
from curation_helpers import run

from runs import plan

# What each mix scores, in the tests.
SCORES = {"a": 50, "a+b": 49, "a+c": 50, "all": 60, "half_a": 61, "half_b": 40, "half_c": 50}


@pytest.fixture
def sources(tmp_path):
    """The flag that names three sources of 10, 20 and 30 rows."""
    for name, n in (("a", 10), ("b", 20), ("c", 30)):
        rows = [json.dumps({"id": i, "text": "hello there"}) + "\n" for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return "--in=" + ",".join(f"{name}={tmp_path}/{name}.jsonl" for name in "abc")


class Done:
    returncode = 0


def fake_run(command):
    """Stands for a training or an evaluation; the latter writes the score of its mix."""
    out = Path(next(flag[10:] for flag in command if flag.startswith("--out_dir=")))
    if command[1] == "eval.py":
        out.mkdir(parents=True)
        score = SCORES[out.parent.name]
        (out / "results.json").write_text(json.dumps({"overall": score}))
    return Done


def test_quick_prints_the_commands_of_each_source_cut_to_n_rows(tmp_path, sources):
    flags = ["--n=5", "--sft=config/toy_sft.py", "--eval=--benchmarks=toy"]
    code, text = run("quick", sources, f"--out={tmp_path}/q", *flags)
    command = "python sft.py config/toy_sft.py --stages=instruction --instruction.data="
    assert code == 0 and text.count(command) == 3
    mix = json.loads((tmp_path / "q" / "c" / "mix.json").read_text())
    assert mix["c-0"]["repeat_time"] == pytest.approx(5 / 30)


def test_composition_ranks_halves_and_takes_no_score_of_another_mix(
    tmp_path, sources, monkeypatch
):
    monkeypatch.setattr(plan.subprocess, "run", fake_run)
    code, text = run("composition", sources, f"--out={tmp_path}/m", "--n=0", "--run=True")
    ranking = re.findall(r"^ *[\d.]+  (\w+)$", text, re.MULTILINE)
    assert code == 0 and ranking == ["half_a", "all", "half_c", "half_b"]
    mix = json.loads((tmp_path / "m" / "half_b" / "mix.json").read_text())
    shares = {name: entry["repeat_time"] for name, entry in mix.items()}
    assert shares == {"a-0": 1.0, "b-0": 0.5, "c-0": 1.0}
    code, text = run("composition", sources, f"--out={tmp_path}/m", "--n=7", "--run=True")
    assert code == 2 and "was run with other data or flags" in text


def test_incremental_keeps_a_source_only_if_the_score_does_not_fall(
    tmp_path, sources, monkeypatch
):
    monkeypatch.setattr(plan.subprocess, "run", fake_run)
    code, text = run("incremental", sources, f"--out={tmp_path}/i", "--n=0", "--run=True")
    assert code == 0 and "kept: a, c" in text
