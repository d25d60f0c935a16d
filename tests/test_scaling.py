"""scaling.py: commands of a plan, resuming it, the fit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from runs import plan, scaling

ROOT = Path(__file__).parent.parent


def finished(out, steps, seed, tokens, **scores):
    """A point as train.py and eval.py leave it."""
    folder = out / f"{steps}_steps_seed_{seed}"
    for part in ("pretrain", "eval"):
        (folder / part).mkdir(parents=True)
    lines = [
        {"stage": "alignment", "tokens_seen": tokens // 4},
        {"stage": "alignment", "tokens_seen": tokens // 2},
        {"stage": "advance", "tokens_seen": tokens - tokens // 2},
    ]
    (folder / "pretrain" / "log.jsonl").write_text(
        "\n".join(map(json.dumps, lines)) + '\n{"stage": "adv'
    )
    (folder / "eval" / "results.json").write_text(
        json.dumps({"n": {k: 9 for k in scores if k != "overall"}, **scores})
    )


def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, flags)])
    scaling.main()


def test_a_plan_is_whole_runs_of_each_budget_the_smallest_first_and_passes_over_what_is_finished(
    tmp_path, monkeypatch, capsys
):
    finished(tmp_path, 100, 2, 8000, overall=50.0)
    command(
        monkeypatch,
        "plan",
        f"--out_dir={tmp_path}",
        "--steps=400,100",
        "--seeds=1,2",
        "--sft=config/sft_2b.py",
        "--train=config/pretrain_2b.py --data='a b.json'",
        "--eval=--data_dir=x",
        "--processes=8",
    )
    assert not (tmp_path / "400_steps_seed_1").exists()  # printing leaves nothing behind
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 3 and all(
        line.startswith("torchrun --nproc_per_node=8 ") for line in lines
    )
    assert (
        "100_steps_seed_1" in lines[0]
        and "400_steps_seed_1" in lines[3]
        and "400_steps_seed_2" in lines[6]
    )
    train, sft, test = lines[3:6]
    for stage in ("alignment", "advance"):
        assert (
            f"--{stage}.steps=400 --{stage}.warmup_steps=12" in train
        )  # a schedule of its own, 3 % of it warm-up
    assert "'--data=a b.json'" in train and "--seed=1" in train
    assert f"--init_from={tmp_path}/400_steps_seed_1/pretrain/advance" in sft
    point = f"{tmp_path}/400_steps_seed_1"
    assert f"--model={point}/sft/preference --out_dir={point}/eval" in test
    import configurator
    import train as script

    configurator.configure(
        script.Config(),
        [
            word
            for word in train.split("train.py ")[1].split()
            if "a b" not in word and word != "b.json'" and not word.startswith("'--data")
        ],
    )


def test_a_plan_runs_what_is_missing_and_stops_where_something_fails(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        plan.subprocess,
        "run",
        lambda words: (
            ran.append(words)
            or type("", (), {"returncode": int("eval.py" in words and len(ran) > 3)})
        ),
    )
    flags = (
        "plan",
        f"--out_dir={tmp_path}",
        "--steps=10,20",
        "--train=config/toy.py",
        "--model=pretrain/advance",
        "--eval=--data_dir=x",
        "--run=True",
    )
    with pytest.raises(ValueError, match="20_steps_seed_1: eval.py failed.*run again to resume"):
        command(monkeypatch, *flags)
    assert [words[1] for words in ran] == ["train.py", "eval.py"] * 2
    (tmp_path / "10_steps_seed_1" / "eval").mkdir()
    (tmp_path / "10_steps_seed_1" / "eval" / "results.json").write_text("{}")
    ran.clear()
    command(monkeypatch, *flags)
    assert all("20_steps" in words[-1] for words in ran) and len(ran) == 2
    with pytest.raises(
        ValueError, match="10_steps_seed_1 was run with other data or flags"
    ):  # no line through both
        command(monkeypatch, *flags, "--seeds=1", "--eval=--data_dir=x --limit=10")


def test_the_fit_finds_slope_error_and_the_largest_budget_by_the_others(
    tmp_path, monkeypatch, capsys
):
    noise = np.random.default_rng(0).normal(0, 0.5, 10)
    for i, (steps, seed) in enumerate(
        (s, seed) for s in (10, 100, 1000, 10000, 100000) for seed in (1, 2)
    ):
        tokens = steps * 64 + 2 * seed  # packs are not all equally full
        finished(
            tmp_path,
            steps,
            seed,
            tokens,
            overall=20 + 8 * np.log10(tokens) + noise[i],
            MME=None,
            POPE=7.0,
        )
    command(monkeypatch, "fit", f"--out_dir={tmp_path}", "--left_out=2")
    text = capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in table] == ["benchmark", "---", "overall", "POPE"] and {
        *map(len, table)
    } == {7}
    overall, pope = json.loads(text.splitlines()[-1])  # MME has no score and no line
    assert overall["benchmark"] == "overall" and overall["points"] == 10
    assert pope["per_tenfold"] == pope["r2"] == pope["linear_r2"] == 0  # nothing to explain
    assert "left out, without a score in some point: MME" in text
    assert abs(overall["per_tenfold"] - 8) < overall["per_tenfold_half"] < 1
    assert overall["r2"] > 0.99 > 0.7 > overall["linear_r2"]
    assert 0 < overall["bends_p"] < 1
    assert overall["log_holds"] and not overall["linear_holds"] and not overall["none_holds"]
    x = np.log10(
        [steps * 64 + 2 * seed for steps in (10, 100, 1000, 10000, 100000) for seed in (1, 2)]
    )
    y = 20 + 8 * x + noise
    predicted = np.poly1d(np.polyfit(x[:6], y[:6], 1))(x[8:]).mean()
    assert overall["log_predicts"] == pytest.approx(predicted, abs=1e-3)
    assert overall["none_predicts"] == pytest.approx(y[4:6].mean(), abs=1e-3)
    assert overall["largest_measured"] == pytest.approx(y[8:].mean(), abs=1e-3)
    wanted, covariance = np.polyfit(x, y, 1, cov=True)  # numpy's own fit
    assert overall["per_tenfold"] == pytest.approx(wanted[0], abs=1e-3)
    assert overall["error"] == pytest.approx(covariance[0, 0] ** 0.5, abs=1e-3)
    # every point is kept
    points = [json.loads(line) for line in open(tmp_path / "points.jsonl")]
    assert [point["overall"] for point in points] == pytest.approx(y[np.argsort(
        [f"{steps}_steps_seed_{seed}" for steps in (10, 100, 1000, 10000, 100000)
         for seed in (1, 2)])])
    assert points[0] == {"steps": 100000, "seed": 1, "tokens": 6400002,
                         "overall": points[0]["overall"], "MME": None, "POPE": 7.0}
    pytest.importorskip("matplotlib")
    command(monkeypatch, "plot", f"--out_dir={tmp_path}")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_without_pretraining_the_budgets_are_those_of_fine_tuning_and_a_seed_has_its_own_data(
    tmp_path, monkeypatch, capsys
):
    command(
        monkeypatch, "plan", f"--out_dir={tmp_path}", "--steps=40,20,80,160", "--seeds=1,2",
        "--stages=knowledge", "--eval=--data_dir=x",
        "--sft=config/toy_sft.py --init_from=start_{seed} --knowledge.data=d{seed}.json",
    )
    sft, test = capsys.readouterr().out.splitlines()[2:4]
    assert "sft.py config/toy_sft.py --init_from=start_2 --knowledge.data=d2.json" in sft
    assert "--stages=knowledge --knowledge.steps=20 --knowledge.warmup_steps=1 --seed=2" in sft
    assert f"--model={tmp_path}/20_steps_seed_2/sft/knowledge" in test
    for steps in (20, 40, 80, 160):
        finished(tmp_path, steps, 1, steps * 100, overall=steps / 2)
        folder = tmp_path / f"{steps}_steps_seed_1"
        (folder / "pretrain").rename(folder / "sft")
    command(monkeypatch, "fit", f"--out_dir={tmp_path}")
    assert "4 points, 2,000 to 16,000 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "plan | fit | plot"),
        (["plan"], "--steps=1000,4000,16000"),
        (["plan", "--steps=1,,2", "--train=x", "--eval=y"], "--steps=1000,4000,16000"),
        (["fit", "--out_dir=nowhere"], "0 finished budgets"),
        (["fit", "--seed=1"], "did you mean 'seeds'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(monkeypatch, flags, words):
    with pytest.raises(ValueError) as e:
        command(monkeypatch, *flags)
    assert words in str(e.value) and "\n" not in str(e.value)
