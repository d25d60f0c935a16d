"""configurator.py: three layers, strict types, one-line refusals."""

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from configurator import (
    ConfigError,
    configure,
    error_line,
    resolved,
    run_script,
    setting,
    split_words,
    subcommand,
)


@dataclass(slots=True)
class Llm:
    PRESETS: ClassVar[dict[str, dict]] = {
        "toy": {"n_layers": 2},
        "big": {"n_layers": 28, "theta": 1e6},
    }
    n_layers: int = 1  # blocks
    theta: float = 1e4


@dataclass(slots=True)
class Stage:
    steps: int = 10
    lr: float = 0.0


@dataclass(slots=True)
class Shared:
    out_dir: str = "out"  # the run folder
    seed: int = 1  # of everything
    image: tuple[str, ...] = ()


@dataclass(slots=True)
class Config(Shared):
    debugging: bool = False
    dtype: Literal["auto", "float32"] = "auto"
    llm: Llm = field(default_factory=Llm)
    alignment: Stage = field(default_factory=lambda: Stage(steps=5))


def run(*argv):
    cfg = Config()
    return cfg, configure(cfg, list(argv))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_files_win_over_defaults_and_flags_over_files_wherever_they_stand(tmp_path):
    a = write(tmp_path / "a.py", "seed = 2\nalignment.steps = 20\nout_dir = 'a'\n")
    b = write(tmp_path / "b.py", "seed = 3\nalignment.lr = 1e-3\n")
    cfg, origins = run("--out_dir=flag", a, b)
    assert (cfg.seed, cfg.out_dir, cfg.alignment.steps, cfg.alignment.lr) == (3, "flag", 20, 1e-3)
    assert origins["seed"] == f"{b}:1" and origins["alignment.steps"] == f"{a}:2"
    assert origins["out_dir"] == "command line" and origins["llm.theta"] == "default"
    assert origins.keys() == resolved(cfg).keys()


def test_a_preset_sets_every_field_and_dots_change_single_ones(tmp_path):
    cfg, origins = run(
        write(tmp_path / "a.py", "llm = 'big'\nllm.theta = 5\n_n = llm.n_layers\nseed = _n\n")
    )
    assert (cfg.llm.n_layers, cfg.llm.theta, cfg.seed) == (28, 5.0, 28)
    assert origins["llm.n_layers"] == f"{tmp_path}/a.py:1 (llm = 'big')"
    for flags in (("--llm=toy", "--llm.theta=7"), ("--llm.theta=7", "--llm=toy")):  # in any order
        cfg, _ = run(f"{tmp_path}/a.py", *flags)
        assert (cfg.llm.n_layers, cfg.llm.theta) == (2, 7.0)
    cfg, _ = run(f"{tmp_path}/a.py", "--llm=toy")
    assert cfg.llm.theta == 1e4  # not left over from the other preset


def test_a_config_file_is_plain_python(tmp_path):
    cfg, _ = run(
        write(
            tmp_path / "a.py",
            """
import math
_base = 3
def _twice(x):
    return _base * 2 * x
seed = sum(_twice(i) for i in range(3))
seed += 1
for _i in range(2):
    alignment.steps += _i
alignment.lr = math.sqrt(seed + _base - 22) or 1e-4 * seed
image = (f"{_base}.png",)
""",
        )
    )
    assert (cfg.seed, cfg.alignment.steps, cfg.alignment.lr, cfg.image) == (
        19,
        6,
        1e-4 * 19,
        ("3.png",),
    )


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--seed=1e6", "seed", 1_000_000),
        ("--alignment.lr=2", "alignment.lr", 2.0),
        ("--alignment.lr=1e-5", "alignment.lr", 1e-5),
        ("--debugging=True", "debugging", True),
        ("--dtype=float32", "dtype", "float32"),
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--out_dir=2024", "out_dir", "2024"),
        ("--out_dir=", "out_dir", ""),
        ("--image=a.jpg, b.jpg", "image", ("a.jpg", "b.jpg")),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_field(flag, key, value):
    got = resolved(run(flag)[0])[key]
    assert got == value and type(got) is type(value)


def test_a_repeated_flag_adds_to_a_tuple_and_replaces_what_a_file_said(tmp_path):
    path = write(tmp_path / "a.py", "image = ('x',)\n")
    assert run(path)[0].image == ("x",)
    assert run(path, "--image=a", "--image=b,c")[0].image == ("a", "b", "c")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sede=1"], "--sede=1: unknown name 'sede', did you mean 'seed'?"),
        (["--llm.nlayers=1"], "did you mean 'llm.n_layers'?"),
        (["--n_layers=1"], "did you mean 'llm.n_layers'?"),
        (["--seed=1.5"], "seed must be a whole number, got 1.5"),
        (["--seed=x"], "seed must be a whole number, got 'x'"),
        (["--seed=True"], "whole number"),
        (["--seed="], "whole number"),
        (["--seed=None"], "whole number"),
        (["--alignment.lr=fast"], "a number"),
        (["--alignment.lr=True"], "a number"),
        (["--alignment.lr=[1]"], "a number"),
        (["--debugging=true"], "True or False"),
        (["--debugging=1"], "True or False"),
        (
            ["--dtype=float23"],
            "must be one of auto, float32, got 'float23', did you mean 'float32'?",
        ),
        (["--llm=tou"], "llm has no preset 'tou', did you mean 'toy'? (there are toy, big)"),
        (["--alignment=fast"], "set alignment field by field, alignment.steps = ..."),
        (["--seed", "3"], "--seed: not understood; write a flag as --seed=value"),
        (["-seed=3"], "write a flag as --seed=value"),
        (["--=3"], "write a flag as"),
        (["seed=3"], "seed=3: not understood"),
        (["toy"], "a config file as NAME.py"),
        (["--debug=yes"], "--debug=yes: unknown name 'debug'"),
    ],
)
def test_a_bad_command_line_is_refused_with_what_to_write(argv, message):
    with pytest.raises(ConfigError) as e:
        run(*argv)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nlearnin_rate = 1\n", ":2: unknown name 'learnin_rate'"),
        ("sead = 1\n", ":1: unknown name 'sead', did you mean 'seed'?"),
        ("seed = '64'\n", ":1: seed must be a whole number, got '64'"),
        ("debugging = 1\n", "True or False"),
        ("image = [1]\n", "tuple of strings"),
        ("alignment.lr = float('nan')\n", "a number"),
        (
            "\nalignment.stepz = 3\n",
            ":2: unknown name 'alignment.stepz', did you mean 'alignment.steps'?",
        ),
        ("alignment.steps = 1.5\n", ":1: alignment.steps must be a whole number"),
        ("llm = 'qwen'\n", ":1: llm has no preset 'qwen'"),
        ("alignment = 3\n", "field by field"),
        ("def helper(): pass\n", "unknown name 'helper'"),
        ("seed = 1\nseed = = 2\n", ":2: "),
        ("x = [\n", "x.py:1: "),
        ("_a = 1\n_b = _a / 0\n", ":2: ZeroDivisionError"),
        ("seed = sede\n", ":1: NameError"),
        ("_x = alignment.nothing\n", ":1: AttributeError"),
        ("seed = int('x')\n", ":1: ValueError"),
        ("seed = 1\0\n", "x.py:1: "),
    ],
)
def test_a_bad_config_file_is_refused_with_file_and_line(tmp_path, text, message):
    path = write(tmp_path / "x.py", text)
    with pytest.raises(ConfigError) as e:
        run(path)
    assert message in str(e.value) and str(e.value).startswith(path) and "\n" not in str(e.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.py"):
        run(f"{tmp_path}/none.py")


def test_help_shows_every_key_with_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        run("--help")
    shown = capsys.readouterr().out
    assert e.value.code == 0 and all(f"--{key}=" in shown for key in resolved(Config()))
    assert (
        "# " not in shown
        and "the run folder" in shown
        and "--llm=PRESET" in shown
        and "toy|big" in shown
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("seed: no\n  good"), 2, "error: seed: no good\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.jpg"),
            2,
            "error: a.jpg: No such file or directory\n",
        ),
        (OSError("disk full"), 2, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_users_error_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as e:
        run_script(main)
    assert e.value.code == code and capsys.readouterr().err == line
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug=True"])
    with pytest.raises(type(error)):
        run_script(main)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main():
        raise KeyError("x")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(KeyError):
        run_script(main)


def test_a_script_leaves_nothing_but_the_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from dataclasses import dataclass\nfrom configurator import configure, run_script\n"
        "@dataclass(slots=True)\nclass Config:\n    n: int = 1\n"
        "run_script(lambda: configure(Config()))\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--m=1"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --m=1: unknown name 'm' (--help lists all names)\n"


def test_a_dataclass_that_would_swallow_typing_errors_is_a_bug():
    @dataclass
    class Open:
        n: int = 1

    with pytest.raises(TypeError, match="slots=True"):
        configure(Open(), [])


@pytest.mark.parametrize(
    ("script", "flag"), [("train", "data"), ("sft", "knowledge.data"), ("curate", "in")]
)
def test_braces_without_quotes_which_bash_makes_flags_of_are_refused(script, flag):
    cfg = __import__(script).Config()
    with pytest.raises(
        ConfigError, match=f"more than one --{flag}: put it in quotes, --{flag}='A-"
    ):
        configure(cfg, [f"--{flag}=a-0.tar", f"--{flag}=a-1.tar"])


@dataclass(slots=True)
class Limited:
    data: str = setting("", files=True)  # sources
    rounds: int = setting(3, at_least=1)  # how often
    cap: int = 0
    llm: Llm = field(default_factory=Llm)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--rounds=0", "command line: rounds=0 must be at least 1"),
        ("--cap=-1", "command line: cap=-1 must be at least 0"),
        ("--llm.theta=-2", "command line: llm.theta=-2.0 must be at least 0"),
    ],
)
def test_a_limit_belongs_to_its_field_and_no_number_may_be_negative(flag, message):
    with pytest.raises(ConfigError) as e:
        configure(Limited(), [flag])
    assert str(e.value) == message


def test_a_field_with_rules_shows_its_comment_too(capsys):
    with pytest.raises(SystemExit):
        configure(Limited(), ["--help"])
    shown = capsys.readouterr().out
    assert "--rounds=3" in shown and "how often" in shown and "sources" in shown


def test_a_subcommand_is_the_first_word_that_is_no_flag(capsys):
    commands = {"check": 1, "show": 2}
    assert subcommand(commands, "U", argv=["check", "a", "--n=3"]) == (1, ["a", "--n=3"])
    assert subcommand(commands, "U", argv=["--n=3", "show", "a"]) == (2, ["--n=3", "a"])
    assert split_words(["--n=3", "a", "b"]) == (["a", "b"], ["--n=3"])
    with pytest.raises(ConfigError, match="unknown command 'chek', did you mean 'check'.* U"):
        subcommand(commands, "U", argv=["chek"])
    with pytest.raises(ConfigError, match="usage: U"):
        subcommand(commands, "U", argv=["--n=3"])
    with pytest.raises(SystemExit) as e:
        subcommand(commands, "U", Limited(), argv=["--help"])
    shown = capsys.readouterr().out
    assert e.value.code == 0 and "usage: U" in shown and "--rounds=3" in shown


def test_where_something_is_forbidden_the_whole_path_is_told(monkeypatch, tmp_path):
    """A relative one does not say in which folder; the folder of the run may be another."""
    monkeypatch.chdir(tmp_path)
    for number in (errno.EACCES, errno.EPERM, errno.EROFS):
        line = error_line(OSError(number, os.strerror(number), "shards"))
        assert line.startswith(f"{tmp_path}/shards: {os.strerror(number)}; give this user")
    line = error_line(OSError(errno.ENOENT, os.strerror(errno.ENOENT), "shards"))
    assert line == "shards: No such file or directory"
