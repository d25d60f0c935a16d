"""The house rules that a machine can check: sizes, style, who imports whom, what is optional."""

import ast
import collections
import importlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = ("evals", "curation", "toy", "bench", "runs")  # each can be deleted
ROOMS = ("kernels", "inputs", "training", "serving", *OPTIONAL)
PROGRAM = sorted(path for room in (".", *ROOMS) for path in ROOT.glob(f"{room}/*.py"))
CONFIGS = sorted(ROOT.glob("config/*.py"))
TESTS = sorted(ROOT.glob("tests/*.py"))
TRITON = ROOT / "kernels" / "attention_triton.py"

# A file imports only from lines above its own; the files of a line that ends in * may import one
# another.
ORDER = """
inputs/files
inputs/locks
inputs/patience
configurator
kernels/*
inputs/images
inputs/tokenizer
inputs/row_keys
inputs/dialogue
inputs/picture_names
inputs/chat
inputs/tars
inputs/records
inputs/parquet
inputs/folders
inputs/measure
inputs/building
inputs/index
inputs/sources
inputs/fill
inputs/packing
inputs/check
inputs/preview
inputs/pack_flags
data
vision
aimv2
model
model_config
training/lora
training/metadata
model_files
weights
decoding
generate
training/meeting
training/distributed
training/prefetch
training/compile
training/copies
training/fp8
training/flops
training/limits
training/optim
training/output
training/progress
training/state_check
training/host_memory
training/snapshot
training/checkpoint
training/checkpoint_folder
training/metrics
training/plot
training/validation
training/quarantine
training/signals
training/run_folder
training/adapter
training/result
training/memory
training/traffic
training/dry_run
serving/*
train
sft
sample
serve
convert
evals/*
eval
toy/*
runs/*
curation/*
curate
bench/*
""".split()
SCRIPTS = {"train", "sft", "sample", "serve", "convert", "eval", "curate"}
# {beginning of a name: the scripts whose settings or loop it uses}
MAY_IMPORT_SCRIPTS = {"sft": {"train"}, "bench/": {"train", "sft"}}

RUN_TIME = {"torch", "numpy", "PIL", "tiktoken", "safetensors", "tqdm"}
# imported only where they are used, with a message that says what to install
WHEN_INSTALLED = {"matplotlib", "pyarrow", "triton", "wandb"}
PEERS_OF_BENCH = {"transformers", "flash_attn", "flash_attn_interface"}


def name_of(path):
    """training/optim for ROOT/training/optim.py"""
    return path.relative_to(ROOT).with_suffix("").as_posix()


def imports(path):
    """Dotted names of all that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def our_imports(path):
    """Names, as of name_of, of the program's files that a file imports."""
    known = {name_of(other) for other in PROGRAM}
    found = {dotted.replace(".", "/") for dotted in imports(path)}
    return {name for name in found if name in known}


# ---- sizes and plainness -------------------------------------------------------------------------


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def docstring_lines(tree):
    found = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def tokens_and_lines(path):
    """How many tokens a file has and on how many lines, docstrings, comments and blanks apart."""
    text = path.read_text()
    skipped = docstring_lines(ast.parse(text))
    kinds = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
    lines = collections.Counter()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        in_fstring = token.type >= getattr(tokenize, "FSTRING_START", 999)  # Python 3.12
        if (token.type in kinds or in_fstring) and token.start[0] not in skipped:
            lines[token.start[0]] += 1
    return lines.total(), len(lines)


def test_no_file_is_longer_than_400_lines():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in PROGRAM}
    assert not {name: n for name, n in lengths.items() if n > 400}


def test_no_function_is_longer_than_60_lines_but_the_loop_and_the_triton_kernels():
    long = {}
    for path in PROGRAM:
        for f in functions(path):
            lines = f.end_lineno - f.lineno + 1
            if lines > 60 and f.name != "train_stage" and path != TRITON:
                long[f"{name_of(path)}.{f.name}"] = lines
    assert not long


def test_no_function_takes_more_than_8_arguments_but_kernels():
    many = {}
    for path in PROGRAM:
        for f in functions(path):
            n = len(f.args.posonlyargs) + len(f.args.args) + len(f.args.kwonlyargs)
            if n > 8 and path.parent.name != "kernels":
                many[f"{name_of(path)}.{f.name}"] = n
    assert not many


def test_a_code_line_has_12_tokens_at_most_in_every_file_and_11_over_all():
    sums = {name_of(path): tokens_and_lines(path) for path in [*PROGRAM, *CONFIGS]}
    means = {name: round(tokens / max(1, lines), 1) for name, (tokens, lines) in sums.items()}
    dense = {name: mean for name, mean in means.items() if mean > 12}
    dense.pop(name_of(TRITON), None)
    tokens = sum(tokens for tokens, _ in sums.values())
    lines = sum(lines for _, lines in sums.values())
    assert not dense and tokens / lines <= 11, (dense, tokens / lines)


def test_no_line_is_wider_than_100_columns():
    wide = {}
    for path in [*PROGRAM, *CONFIGS, *TESTS]:
        lines = path.read_text().splitlines()
        numbers = [i for i, line in enumerate(lines, 1) if len(line) > 100]
        if numbers:
            wide[path.name] = numbers
    assert not wide


def test_a_name_means_one_thing_in_the_whole_program():
    places = collections.defaultdict(set)
    for path in PROGRAM:
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [n.id for target in node.targets for n in ast.walk(target)
                         if isinstance(n, ast.Name)]
            for name in names:
                places[name].add(name_of(path))
    twice = {name: sorted(where) for name, where in places.items()
             if len(where) > 1 and name not in ("main", "Config") and not name.startswith("_")}
    assert not twice


def test_style_is_what_ruff_says():
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_check_of_the_program_goes_away_with_python_O():
    places = []
    for path in PROGRAM:
        if path.parent.name == "bench":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) or getattr(node, "id", "") == "__debug__":
                places.append(f"{name_of(path)}:{node.lineno}")
    assert not places, f"raise an error instead: {places}"


# ---- who imports whom ----------------------------------------------------------------------------


def line_of(name):
    """The number of a file's line in ORDER."""
    room = f"{name.rpartition('/')[0]}/*"
    for number, entry in enumerate(ORDER):
        if entry in (name, room):
            return number
    raise AssertionError(f"{name}.py has no line in ORDER, the order of imports")


def test_a_file_imports_only_from_the_lines_above_it():
    wrong = []
    for path in PROGRAM:
        name = name_of(path)
        if path.name == "__init__.py":
            assert not path.read_text().strip(), f"{name}: a room's __init__.py is empty"
            continue
        for other in our_imports(path) - {name}:
            same_room = line_of(other) == line_of(name) and ORDER[line_of(name)].endswith("*")
            if line_of(other) >= line_of(name) and not same_room:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_nothing_imports_a_script_but_sft_which_imports_train_and_bench_which_imports_both():
    for path in PROGRAM:
        scripts = our_imports(path) & SCRIPTS - {name_of(path)}
        for beginning, allowed in MAY_IMPORT_SCRIPTS.items():
            if name_of(path).startswith(beginning):
                scripts -= allowed
        assert not scripts, f"{name_of(path)} imports {scripts}"


def test_only_the_six_packages_are_imported_at_run_time():
    ours = {path.stem for path in ROOT.glob("*.py")} | set(ROOMS)
    for path in PROGRAM + CONFIGS:
        foreign = {dotted.split(".")[0] for dotted in imports(path)}
        foreign -= ours | RUN_TIME | WHEN_INSTALLED | set(sys.stdlib_module_names)
        if path.parent.name == "bench":
            foreign -= PEERS_OF_BENCH
        assert not foreign, f"{name_of(path)} imports {foreign}"


@pytest.mark.parametrize("room", OPTIONAL)
def test_each_optional_room_can_be_deleted(tmp_path, room):
    """The scripts that are not about the room still start."""
    scripts = ["train", "sft", "sample", "convert", "data", "generate", "model", "weights"]
    if room != "evals":
        scripts.append("eval")
    # curation asks models through evals/endpoint.py and runs its plans through runs/plan.py
    if room not in ("curation", "evals", "runs"):
        scripts.append("curate")
    for path in PROGRAM:
        if path.relative_to(ROOT).parts[0] != room:
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    command = [sys.executable, "-c", f"import {', '.join(scripts)}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- configs and README --------------------------------------------------------------------------


def test_every_config_is_accepted_by_its_script(monkeypatch):
    import configurator
    import sft
    import train

    monkeypatch.chdir(ROOT)
    below = {"ablation": "config/pretrain_2b.py", "ablation_sft": "config/sft_2b.py"}
    for path in CONFIGS:
        script = sft if "sft" in path.stem or path.stem == "captioner" else train
        first = [below[path.stem]] if path.stem in below else []
        configurator.configure(script.Config(), [*first, f"config/{path.name}"])


def test_the_readme_is_a_front_page_and_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250 and len(text.encode()) <= 12 * 1024
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|sh))`", text))
    linked = {link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link}
    missing = sorted(name for name in named | linked if not (ROOT / name).exists())
    assert not missing, f"README names {missing}"


def test_what_shell_scripts_import_exists():
    found = []
    for script in ROOT.glob("runs/*.sh"):
        found += re.findall(r"from ([\w.]+) import (\w+)", script.read_text())
    assert found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
