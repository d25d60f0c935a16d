"""What a stranger may put in the place of a file or number: refused at once, by its path."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import edit, save
from PIL import Image
from small_model import tiny

import configurator
import data
import model_files
import weights
from evals.endpoint import Replies
from evals.files import lock_folder, read_tsv
from generate import Assistant
from inputs.images import load_image
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer
from model_files import find_change
from training import metrics
from training.checkpoint import find_checkpoint
from training.plot import plot_loss
from training.run_folder import lock_run_folder

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "toy" / "tokenizer"
SECONDS = 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A good tiny model folder with a tokenizer."""
    return save(tmp_path_factory.mktemp("strange") / "m", tiny(), tokenizer=TOKENIZER)


@pytest.fixture
def folder(model, tmp_path):
    """A copy of it that a test may change."""
    copy = tmp_path / "m"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def directory(path):
    path.mkdir()


def huge(path):
    path.touch()
    os.truncate(path, 100 * 2**30)


def hangs(number, frame):
    raise AssertionError("it hangs")


def refused(work, *words):
    """Call work(): it is to raise an error of one line with these words, at once. -> the line"""
    start = time.process_time()  # others may use the processor meanwhile
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(30)
    try:
        with pytest.raises((ValueError, OSError)) as e:
            work()
    finally:
        signal.alarm(0)
    assert time.process_time() - start < SECONDS
    line = configurator.error_line(e.value)
    assert all(word in line for word in words), line
    return line


@pytest.mark.parametrize("put", [pipe, device, directory, huge])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "vocab.json"])
def test_what_is_no_file_of_a_model_folder_is_refused_by_its_path(folder, name, put):
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    refused(lambda: Assistant(str(folder), "cpu", None), str(folder), name)


@pytest.mark.parametrize("put", [pipe, device, directory])
def test_weights_that_are_no_file_are_refused_by_their_path(folder, put):
    path = folder / "model.safetensors"
    path.unlink()
    put(path)
    refused(lambda: weights.load_folder(folder), str(path))
    if put is not directory:  # a folder cannot be read in any case
        refused(lambda: model_files.weights_hash(folder), str(path))
    assert str(path) in find_change(folder)


@pytest.mark.parametrize("put", [pipe, device])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.tar", "a"])
def test_data_that_are_no_file_are_refused_by_their_path(tmp_path, name, put):
    put(tmp_path / name)
    tokenizer = Tokenizer(TOKENIZER)
    refused(lambda: open_sources(str(tmp_path / name), tokenizer, "sailvl-chat"), name)


@pytest.mark.parametrize("put", [pipe, device])
def test_a_picture_or_description_that_is_no_file_is_one_bad_row(tmp_path, put):
    (tmp_path / "rows").mkdir()
    put(tmp_path / "rows" / "picture.jpg")
    row = {"image": "picture.jpg", "caption": "a"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "meta.json").write_text(
        json.dumps({"a": {"annotation": "rows.jsonl", "root": "rows"}})
    )
    source = open_sources(str(tmp_path / "meta.json"), Tokenizer(TOKENIZER), "sailvl-chat")[0]
    assert "no file" in source.meta["bad"][0]["reason"]
    refused(lambda: load_image(tmp_path / "rows" / "picture.jpg"), "picture.jpg")

    pictures = tmp_path / "folder"
    pictures.mkdir()
    Image.new("RGB", (20, 20)).save(pictures / "a.jpg")
    put(pictures / "a.txt")
    source = open_sources(str(pictures), Tokenizer(TOKENIZER), "sailvl-chat")[0]
    assert "no file" in source.meta["bad"][0]["reason"]


@pytest.mark.parametrize("put", [pipe, device])
def test_a_benchmark_file_that_is_no_file_is_refused_by_its_path(tmp_path, put):
    put(tmp_path / "toy_ocr.tsv")
    refused(lambda: read_tsv(tmp_path / "toy_ocr.tsv"), "toy_ocr.tsv")


APPENDED = {
    "judge.jsonl": Replies,
    "log.jsonl": lambda path: metrics.open_log(path.parent),
    "log.jsonl of the plot": lambda path: plot_loss(path, path.with_name("loss.png")),
    "bad_samples.jsonl": lambda path: metrics.log_bad(path.parent, [{"id": "a"}]),
    "lock": lambda path: lock_run_folder(path.parent),
    "eval.lock": lambda path: lock_folder(path.parent),
    "manifest.json": lambda path: find_checkpoint(path.parent.parent.parent, strict=True),
}


@pytest.mark.parametrize("put", [pipe, device, directory])
@pytest.mark.parametrize("what", APPENDED)
def test_what_is_no_file_of_an_output_folder_is_refused_by_its_path(tmp_path, what, put):
    path = tmp_path / "checkpoints" / "step_00000001" / what.split()[0]
    path.parent.mkdir(parents=True)
    put(path)
    refused(lambda: APPENDED[what](path), str(path))


def test_a_header_of_a_million_tensors_is_refused_at_once(folder):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"tensor{i:08d}": entry for i in range(200_000)}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refused(lambda: weights.inspect_folder(folder), str(path), "header")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/etc/passwd", "../m/model.safetensors", "a/b.safetensors", "x.bin"]
)
def test_an_index_names_safetensors_files_of_its_folder_only(folder, name):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: weights.inspect_folder(folder), str(index), "is not the name of")


NUMBERS = [True, "12", -1, 0, 10**13, float("nan"), float("inf"), [1], {"a": 1}, 1.5]
FIELDS = """
    max_dynamic_patch min_dynamic_patch downsample_ratio force_image_size vision_config__image_size
    vision_config__patch_size vision_config__hidden_size vision_config__num_hidden_layers
    vision_config__num_attention_heads vision_config__intermediate_size
    vision_config__layer_norm_eps vision_config__initializer_factor llm_config__vocab_size
    llm_config__hidden_size llm_config__num_hidden_layers llm_config__num_attention_heads
    llm_config__num_key_value_heads llm_config__head_dim llm_config__intermediate_size
    llm_config__rope_theta llm_config__rms_norm_eps llm_config__max_position_embeddings""".split()


@pytest.mark.parametrize("field", FIELDS)
def test_a_number_of_config_json_that_is_none_or_absurd_is_refused_by_its_name(folder, field):
    good = json.loads((folder / "config.json").read_text())
    section, _, name = field.rpartition("__")
    ours_is_float = type((good[section] if section else good)[name]) is float
    for value in NUMBERS:
        if value == 1.5 and (ours_is_float or "ratio" in name):
            continue  # such a value may be right
        edit(folder, **{field: value})
        refused(lambda: weights.inspect_folder(folder), "config.json", name)
    edit(folder, **{field: good[section][name] if section else good[name]})


def test_the_fewest_tiles_of_a_folder_are_not_more_than_the_most(folder):
    edit(folder, min_dynamic_patch=9, max_dynamic_patch=4)
    refused(lambda: weights.inspect_folder(folder), "min_dynamic_patch = 9 is more than")


@pytest.mark.parametrize("value", [10**6, -1, "12", float("nan"), True])
def test_data_py_takes_no_absurd_tiles_from_a_model_folder(folder, value):
    cfg = data.Config(tokenizer=str(folder))

    def open_examples():
        data.open_dataset(cfg, [str(ROOT / "examples" / "internvl.jsonl")])

    for change in (dict(max_dynamic_patch=value), dict(vision_config__patch_size=value)):
        edit(folder, **change)
        words = ("config.json", *(name.rpartition("__")[2] for name in change))
        refused(open_examples, *words)
        edit(folder, max_dynamic_patch=12)


@pytest.mark.parametrize(
    "key, value",
    [("max_dynamic_patch", 10**6), ("repeat_time", float("inf")), ("weight", float("nan"))],
)
def test_an_absurd_number_of_a_meta_file_is_refused_by_its_key(tmp_path, key, value):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"part": {"annotation": "a.jsonl", key: value}}))
    tokenizer = Tokenizer(TOKENIZER)
    refused(lambda: open_sources(str(path), tokenizer, "sailvl-chat"), "part", key)


@pytest.mark.parametrize(
    "change",
    [
        lambda vocab: {},
        lambda vocab: {piece: i for piece, i in vocab.items() if len(piece) > 1},
        lambda vocab: {piece: i for piece, i in vocab.items() if piece != "a"},
        lambda vocab: {"ab": 0},
    ],
)
def test_a_vocabulary_in_which_a_byte_is_missing_is_refused(folder, change):
    path = folder / "vocab.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    refused(lambda: Tokenizer(folder), str(folder), "single bytes")


def test_a_script_that_meets_a_pipe_ends_with_one_line_and_exit_code_2(folder):
    (folder / "config.json").unlink()
    pipe(folder / "config.json")
    done = subprocess.run(
        [sys.executable, "convert.py", "check", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{folder}/config.json" in done.stderr
