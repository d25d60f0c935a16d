"""A file that cannot grow, as on a full disk, is named by its path."""

import contextlib
import dataclasses
import json
import os
import resource
import types

import pytest
from test_benchmark_files import web  # noqa: F401
from test_eval import make_model_folder

import configurator
import eval as evaluation
import sample
from curation import shards
from evals import files, table
from evals.endpoint import Replies
from training.distributed import Dist


@contextlib.contextmanager
def room_for(n_bytes):
    """No file of this process can have more bytes than this."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def line_of(work, n_bytes=0):
    """The line that a user sees when work() finds no room."""
    with pytest.raises(OSError) as e, room_for(n_bytes):
        work()
    return configurator.error_line(e.value)


def test_of_a_log_of_replies(tmp_path):
    replies = Replies(tmp_path / "judge.jsonl")
    line = line_of(lambda: replies.add("k", reply="A" * 10_000))
    assert line == f"{tmp_path}/judge.jsonl: File too large"


def test_of_the_lock_of_an_evaluation(tmp_path):
    line = line_of(lambda: files.lock_folder(tmp_path))
    assert line == f"{tmp_path}/eval.lock: File too large"


def test_of_a_download(web, tmp_path):  # noqa: F811
    web.files["/x/MME.tsv"] = os.urandom(10_000)
    b = dataclasses.replace(table.find_benchmark("MME"), md5="0")
    line = line_of(lambda: files.download(b, tmp_path, web.url))
    assert line == f"{tmp_path}/MME.tsv.part: File too large"


def long_answers(prompts, **settings):
    yield 0, "A" * 100_000


def test_of_the_predictions_of_an_evaluation(tmp_path):
    assistant = types.SimpleNamespace(answer_each=long_answers)
    cfg = evaluation.Config(out_dir=str(tmp_path))
    b = table.TOY["toy_ocr"]
    pairs = [({"index": "1", "question": "q"}, [])]
    line = line_of(lambda: evaluation.predict(b, pairs, assistant, "k", cfg, Dist()), 2000)
    assert line == f"{tmp_path}/predictions/toy_ocr.model.rank0.jsonl: File too large"


def test_of_the_answers_to_a_file_of_questions(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "Hi"}))
    model = make_model_folder(tmp_path / "model")
    image = (str(tmp_path / "q.jsonl"),)
    out = str(tmp_path / "a.jsonl")
    cfg = sample.Config(model=str(model), image=image, out=out, device="cpu")

    def answer_each(prompts, **settings):
        list(prompts)
        yield 0, "A" * 100_000

    assistant = sample.load(cfg)
    monkeypatch.setattr(assistant, "answer_each", answer_each)
    monkeypatch.setattr(sample, "load", lambda cfg: assistant)
    assert line_of(lambda: sample.answer_file(cfg), 2000) == f"{out}: File too large"


@pytest.mark.parametrize("name", [".shards/a.tar", "dropped/a.tmp", "replies/a.jsonl"])
@pytest.mark.parametrize("size", [10, 100_000])
def test_of_a_shard_each_of_its_files(tmp_path, name, size):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").touch()
    for folder in (".shards", "dropped", "replies"):
        (tmp_path / folder).mkdir()

    def process(shard, counts):
        if name.startswith("replies"):
            Replies(tmp_path / name).add("k", reply="A" * size)
        reason = "bad" if name.startswith("dropped") else None
        yield shards.ShardRecord({"id": "a", "caption": "A" * size}, {}, reason)

    shard = shards.InputShard("a", tmp_path / "in" / "a.tar")
    line = line_of(lambda: shards.write_output_shard(tmp_path, shard, process))
    # A small row waits in memory until the tar, which comes first, is flushed.
    waits = name.startswith("dropped") and size == 10
    assert line == f"{tmp_path}/{'.shards/a.tar' if waits else name}: File too large"
