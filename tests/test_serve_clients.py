"""curate.py and eval.py as command lines that ask serve.py."""
import json

import command_line
import pytest
import torch
from curation_helpers import dropped_rows, png, run, run_well, write_tar
from serving_helpers import serving
from test_eval import make_model_folder, write_tsv
from toy_endpoint import read_shards

import eval as evaluation
from evals import endpoint

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("clients") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, batch_size=2, waiting=2, context=1024,
                 max_new_tokens=128) as running:
        yield running


@pytest.fixture
def asking(server, monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT_S", 0.05)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    return [f"--endpoint=http://127.0.0.1:{server.server_port}/v1", "--endpoint_model=model"]


@pytest.fixture
def says(server, monkeypatch):
    """Let the model say a text, in place of what its random weights say."""
    def change(text):
        def texts(tokens):
            for _ in zip(range(3), tokens, strict=False):
                pass
            yield text
        monkeypatch.setattr(server.assistant, "texts", texts)
    return change


@pytest.fixture
def rows(tmp_path):
    members = []
    for i in range(6):
        row = {"id": str(i), "alt_text": f"{i} shapes", "caption": "A red square."}
        members += [(f"{i}.png", png((40 * i, 9, 9), (56, 28))),
                    (f"{i}.json", json.dumps(row).encode())]
    write_tar(tmp_path / "in" / "0.tar", members)
    return f"--in={tmp_path}/in"


@pytest.mark.parametrize("stage", ["annotate", "recaption"])
def test_serve_is_asked_what_the_model_folder_is_asked_and_says_the_same(
    folder, rows, asking, tmp_path, stage
):
    flags = [rows, "--ending=any", "--max_new_tokens=40"]
    run(stage, *flags, *asking, f"--out={tmp_path}/served")
    run_well(stage, *flags, f"--model={folder}", "--dtype=float32", f"--out={tmp_path}/local")
    replies = {}
    for name in ("served", "local"):
        lines = (tmp_path / name / "replies" / "0.jsonl").read_text().split("\n")
        entries = [json.loads(line) for line in lines if line]
        replies[name] = {entry["reply"] for entry in entries if "reply" in entry}
    # The first one has the answer about the red square, too.
    assert len(replies["local"]) > 1 and replies["local"] <= replies["served"]


@pytest.mark.parametrize("stage", ["annotate", "recaption"])
def test_annotate_and_recaption_write_what_serve_says(rows, asking, says, tmp_path, stage):
    says("A red square on white.")
    report = run_well(stage, rows, *asking, f"--out={tmp_path}/out", "--max_new_tokens=48")
    assert report["out"] == 6 and report["replies"] == 6
    assert {row["caption"] for row in read_shards(tmp_path / "out")} == {"A red square on white."}


def test_score_reads_the_scores_that_serve_gives(rows, asking, says, tmp_path):
    says("richness: 4\nalignment: 5")
    report = run_well("score", rows, *asking, f"--out={tmp_path}/out", "--max_new_tokens=48")
    assert report["out"] == 6 and report["means"] == {"richness": 4.0, "alignment": 5.0}


def test_a_wrong_model_name_is_told_in_the_words_of_serve(rows, asking, tmp_path):
    code, text = run("annotate", rows, asking[0], "--endpoint_model=x", f"--out={tmp_path}/out")
    assert code == 2 and "HTTP 404 Not Found: the model 'x' is not here, only 'model'" in text
    assert dropped_rows(tmp_path / "out") == []


def test_eval_asks_serve_as_its_judge(server, says, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT_S", 0.05)
    says("0.5")
    row = {"question": "q", "answer": "x", "category": "ocr"}
    answers = [row | {"index": i, "prediction": f"y{i}"} for i in range(4)]
    path = write_tsv(tmp_path / "p.tsv", answers)
    code, out, err = command_line.run(evaluation.main, [
        "eval.py", "score", "--benchmark=MMVet", f"--predictions={path}", "--judge_model=model",
        f"--judge=http://127.0.0.1:{server.server_port}/v1"])
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["score"] == 50.0
