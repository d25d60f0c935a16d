"""Every setting of every script: a number has a range, and what lies outside is refused by name."""

import dataclasses
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import ConfigError, configure, walk

ROOT = Path(__file__).parent.parent
# (module, class) of everything that a command line sets
CONFIGS = [
    ("train", "Config"),
    ("sft", "Config"),
    ("sample", "Config"),
    ("serve", "Config"),
    ("eval", "Config"),
    ("evals.score_file", "ScoreConfig"),
    ("curate", "Config"),
    ("data", "Config"),
    ("convert", "AssembleConfig"),
    ("convert", "ExportConfig"),
    ("toy.__main__", "Config"),
    ("toy.gate", "Config"),
    ("toy.bases", "Config"),
    ("bench.__main__", "Config"),
    ("runs.scaling", "Config"),
    ("runs.demo_picture", "Config"),
    ("runs.engines", "Config"),
    ("runs.curriculum", "Config"),
    ("runs.paper_page", "Config"),
]
# what a variable that is not set would leave empty, and something would be written or read wrongly
PATHS = ("out_dir", "out", "tokenizer", "prompts", "data_dir", "demo", "shards")


def fresh(module, name):
    return getattr(importlib.import_module(module), name)()


def numbers(cfg):
    """(name, type, range) of the numbers among all settings."""
    for name, slot in walk(cfg):
        if slot.field.type in (int, float):
            yield name, slot.field.type, slot.field.metadata.get("range", {})


def all_numbers():
    for module, name in CONFIGS:
        for setting, kind, ends in numbers(fresh(module, name)):
            yield pytest.param(module, name, setting, kind, ends, id=f"{module}:{setting}")


def test_no_script_that_reads_a_command_line_is_left_out():
    """Every dataclass called ...Config in a file that calls configure is among those above."""
    found = set()
    for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/*.py")):
        if path.parent.name in ("tests", "config") or "configure(" not in path.read_text():
            continue
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, value in vars(importlib.import_module(module)).items():
            ours = dataclasses.is_dataclass(value) and value.__module__ == module
            if ours and name.endswith("Config") and name != "RunConfig":
                found.add((module, name))
    assert found <= set(CONFIGS)


@pytest.mark.parametrize("module, name, setting, kind, ends", list(all_numbers()))
def test_a_number_outside_its_range_is_refused_by_its_name(module, name, setting, kind, ends):
    highest = [ends[word] for word in ("at most", "below") if ends.get(word) is not None]
    lowest = [ends[word] for word in ("at least", "above") if ends.get(word) is not None]
    assert len(highest) == len(lowest) == 1, "no range is declared"
    assert 0 <= lowest[0] < highest[0] <= 1e12
    outside = [-1, highest[0] + 1, 10**18, 2**64 - 1]
    if kind is float:
        outside += ["1e999", "-1e999", "float('nan')"]
    outside += [highest[0]] if ends.get("below") is not None else []
    outside += [lowest[0]] if ends.get("above") is not None else []
    for value in outside:
        with pytest.raises(ConfigError, match=f"{setting}(=| must be)") as refused:
            configure(fresh(module, name), [f"--{setting}={value}"])
        assert "\n" not in str(refused.value)
    if ends.get("below") is None:
        configure(fresh(module, name), [f"--{setting}={highest[0]}"])  # the end itself is allowed


@pytest.mark.parametrize("module, name", CONFIGS)
def test_every_default_and_preset_lies_in_its_range(module, name):
    cfg = fresh(module, name)
    configure(cfg, [])
    for part, slot in walk(cfg):
        for preset in getattr(slot.value, "PRESETS", {}) if slot.nested else {}:
            configure(fresh(module, name), [f"--{part}={preset}"])


def test_a_config_file_keeps_to_the_ranges_too(tmp_path):
    for text in ("advance.drop_path = float('inf')", "llm.vocab_size = 10**12", "beta2 = 1"):
        path = tmp_path / "recipe.py"
        path.write_text(text + "\n")
        setting = text.partition(" ")[0]
        with pytest.raises(ConfigError, match=f"recipe.py:1: {setting}=.* must be"):
            configure(fresh("train", "Config"), [str(path)])


@pytest.mark.parametrize("module, name", CONFIGS)
def test_a_path_that_has_a_default_cannot_be_emptied(module, name):
    for setting, slot in walk(fresh(module, name)):
        if setting in PATHS and slot.field.type is str and slot.value != "":
            with pytest.raises(ConfigError, match=f"{setting}= must not be empty"):
                configure(fresh(module, name), [f"--{setting}="])


@pytest.mark.parametrize(
    "module, flags, words",
    [
        ("train", ["--min_tiles=9", "--max_tiles=4"], "min_tiles=9 is more than max_tiles=4"),
        ("sft", ["--min_tiles=13"], "min_tiles=13 is more than max_tiles=12"),
        ("train", ["--advance.steps=5", "--advance.warmup_steps=6"], "advance.warmup_steps=6 is"),
        ("sft", ["--knowledge.warmup_steps=1001"], "is more than knowledge.steps=1000"),
        ("curate", ["filter", "--min_words=9", "--max_words=8"], "min_words=9 is more than"),
        ("train", ["--seed=" + "(" * 50_000], "seed must be a whole number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(module, flags, words, monkeypatch):
    if module in ("train", "sft"):
        flags = [*flags, "--dry_run=True"]
    else:
        flags = [*flags, "--in=x", "--out=y"]
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *flags])
    with pytest.raises(ValueError, match=words):
        importlib.import_module(module).main()


def test_a_refusal_is_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "train.py", "--advance.drop_path=5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    words = "command line: advance.drop_path=5.0 must be at least 0 and below 1"
    assert done.returncode == 2 and done.stderr == f"error: {words}\n"


def test_a_recipe_whose_steps_are_cut_on_the_command_line_still_runs():
    from train import all_stages
    from training import limits

    cfg = fresh("train", "Config")
    origins = configure(cfg, ["config/pretrain_2b.py", "--alignment.steps=3"])
    assert cfg.alignment.warmup_steps > cfg.alignment.steps
    limits.check_together(cfg, origins, limits.named_stages(cfg, all_stages(cfg)))


def test_the_tile_limits_of_all_scripts_are_one_number():
    from inputs.images import MAX_TILES, tile_grid

    for module, name in CONFIGS:
        for setting, _, ends in numbers(fresh(module, name)):
            if setting in ("max_tiles", "min_tiles"):
                assert ends["at most"] == MAX_TILES
    assert math.prod(tile_grid(3000, 3000, 1, MAX_TILES)) <= MAX_TILES
