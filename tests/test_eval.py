"""The run on one and several processes, kills, controls, the score command."""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_rows import picture, write_tsv
from safetensors.torch import load_file, save_file
from zygote import Zygote

import configurator
import eval as evaluation
from evals import files, prompts, table
from inputs.tokenizer import Tokenizer
from model import VLM, LLMConfig
from model_config import config_json
from training import distributed
from vision import VisionConfig
from weights import save_folder

torch.set_num_threads(1)

TOY_OCR = table.TOY["toy_ocr"]


ROOT = Path(evaluation.__file__).parent


def make_model_folder(folder, seed=0):
    """A model folder of a tiny random model: tiles of 28 pixels, one token each."""
    vision = VisionConfig(image_size=28, dim=32, n_layers=1, n_heads=2, ffn_dim=64)
    llm = LLMConfig(
        vocab_size=1056, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64
    )
    tokenizer = ROOT / "toy" / "tokenizer"
    model = VLM(vision, llm, Tokenizer(tokenizer).image_id).init_weights(seed, std=0.3)
    config = config_json(vision, llm, torch.float32)
    save_folder(model.state_dict(), config, folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, benchmark folder): 5 x 12 rows; some pictures have more than one tile."""
    folder = tmp_path_factory.mktemp("world")
    for k, name in enumerate(table.TOY):
        answers = {"toy_general": "AB", "toy_halluc": ("yes", "no")}.get(name, "12")
        write_tsv(
            folder / f"{name}.tsv",
            [
                {
                    "index": i,
                    "image": picture((20 * i, 40 * k, 99), (28 * (1 + i % 3), 28)),
                    "question": f"What is {i}?",
                    "A": "red" * (k == 0),
                    "B": "blue" * (k == 0),
                    "answer": answers[i % 2],
                    "category": "x",
                }
                for i in range(12)
            ],
        )
    return make_model_folder(folder / "model"), folder


@pytest.fixture(scope="module")
def zygote():
    yield (z := Zygote())
    z.close()


def command(argv, capsys):
    """Run eval.py's command line in this process -> (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        try:
            configurator.run_script(evaluation.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, *capsys.readouterr()


def flags(world, out, *more):
    return [
        f"--model={world[0]}",
        f"--data_dir={world[1]}",
        f"--out_dir={out}",
        "--max_new_tokens=5",
        "--threads=1",
        "--device=cpu",
        *more,
    ]


def test_run_writes_predictions_results_and_report(world, tmp_path, capsys):
    out, untrained = tmp_path / "out", make_model_folder(tmp_path / "untrained", 1)
    code, text, errors = command(
        flags(world, out, "--controls=True", f"--untrained={untrained}", "--limit=8"), capsys
    )
    assert code == 0 and "toy_halluc" in text and str(out / "report.html") in text, errors
    results = json.loads((out / "results.json").read_text())
    names = list(table.TOY)
    assert set(results) >= {
        "overall",
        *names,
        "untrained",
        "blind",
        "chance",
        "n",
        "details",
        "protocol",
    }
    for part in (results, results["untrained"], results["blind"], results["chance"]):
        assert all(0 <= part[name] <= 100 for name in names)
        assert part["overall"] == pytest.approx(sum(part[name] for name in names) / 5, abs=0.02)
    assert results["n"] == dict.fromkeys(names, 8) and results["chance"]["toy_general"] == 50.0
    assert results["protocol"] == table.protocol_hash(table.TOY.values(), max_new_tokens=5)
    weights = (world[0] / "model.safetensors").read_bytes()
    assert results["model_sha256"] == hashlib.sha256(weights).hexdigest()
    rows, _ = files.read_tsv(out / "toy_general.tsv")
    assert list(rows[0]) == [
        "index",
        "image",
        "question",
        "A",
        "B",
        "answer",
        "category",
        "prediction",
    ]
    asked = [row["image"] for row in rows]
    assert len(asked) == 8 and asked == sorted(asked, key=int) and int(asked[-1]) >= 10
    assert any(row["prediction"] for row in rows)
    assert "toy_general: 8 of 12 questions are asked, spread over the file" in text
    score = evaluation.score_file(
        ["--benchmark=toy_general", f"--predictions={out / 'toy_general.tsv'}"]
    )
    assert (
        score["score"] == results["toy_general"]
        and score["details"] == results["details"]["toy_general"]
    )
    said = {
        v: (out / "predictions" / f"toy_ocr.{v}.rank0.jsonl").read_text()
        for v in ("model", "blind", "untrained")
    }
    assert (
        len(
            {
                json.dumps([json.loads(x)["prediction"] for x in text.split("\n")[1:]])
                for text in said.values()
            }
        )
        == 3
    )
    page = (out / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert (
        len(data["cards"]) == 5 * 8
        and len(data["free"]) == 2
        and data["results"] == results
        and "http" not in page
    )
    assert all(
        one["pictures"][0].startswith("data:image/jpeg;base64,")
        for one in data["cards"] + data["free"]
    )
    assert (
        sum(card["verdict"] == "right" for card in data["cards"][:8])
        == results["details"]["toy_general"]["correct"]
    )


def test_two_ranks_and_any_batch_give_the_same_predictions(world, tmp_path, capsys, zygote):
    names = "--benchmarks=toy_ocr,toy_general"
    pids = zygote.start("eval", flags(world, tmp_path / "two", names), 2, tmp_path / "said.txt")
    assert (
        command(
            flags(world, tmp_path / "one", names, "--batch_size=5", "--batch_tokens=1"), capsys
        )[0]
        == 0
    )
    assert zygote.wait(pids) == [0, 0], (tmp_path / "said.txt").read_text()
    for name in ("toy_ocr", "toy_general"):
        assert (tmp_path / "one" / f"{name}.tsv").read_text() == (
            tmp_path / "two" / f"{name}.tsv"
        ).read_text()
    parts = (tmp_path / "two" / "predictions").glob("toy_ocr.model.rank*.jsonl")
    assert [path.read_text().count("\n") for path in parts] == [6, 6]


def local(world, out):
    """What main() prepares, in this process: (assistant, cfg, dist)."""
    cfg = evaluation.Config(
        model=str(world[0]),
        data_dir=str(world[1]),
        out_dir=str(out),
        max_new_tokens=4,
        batch_size=3,
    )
    return evaluation.Assistant(cfg.model, "cpu", torch.float32), cfg, distributed.Dist()


def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    assistant, cfg, dist = local(world, tmp_path)
    asked, real, limit = [], assistant.answer_each, [6]

    def answer_each(prompts, **settings):
        for number, text in real(prompts, **settings):
            if len(asked) == limit[0]:
                raise KeyboardInterrupt
            asked.append(number)
            yield number, text

    monkeypatch.setattr(assistant, "answer_each", answer_each)

    def predict(key):
        rows = files.read_rows(world[1] / "toy_ocr.tsv", TOY_OCR)
        return evaluation.predict(TOY_OCR, rows, assistant, key, cfg, dist)

    with pytest.raises(KeyboardInterrupt):
        predict("k")
    (path,) = (tmp_path / "predictions").glob("*.jsonl")
    assert path.read_text().count("\n") == 6
    path.write_text(path.read_text()[:-9])  # as if killed in the middle of a line
    limit[0] = None
    done = predict("k")
    assert len(asked) == 6 + 7 and len(done) == 12  # the six left and the torn one, nothing twice
    assert done == predict("k") and len(asked) == 13  # all there: nothing is asked again
    assert predict("other model") == done and len(asked) == 13 + 12  # another key shares nothing


def test_1001_rows_on_1_2_and_3_ranks_and_through_5_kills_give_the_same_file(
    world, tmp_path, zygote
):
    rows = [{"index": 7 * i, "question": f"What is {i}?", "answer": i % 10} for i in range(1001)]
    write_tsv(tmp_path / "toy_ocr.tsv", rows)

    def start(out, *how):
        more = ("--benchmarks=toy_ocr", "--max_new_tokens=3")
        arguments = flags((world[0], tmp_path), tmp_path / out, *more)
        return zygote.start("eval", arguments, how[0], tmp_path / f"{out}.txt", *how[1:])

    def lines(out):
        parts = (tmp_path / out / "predictions").glob("*.jsonl")
        return sum(path.read_text().count("\n") for path in parts)

    # What is to be killed gets 130 prompts and then none: it cannot end before the kill, however
    # late that comes.
    starve = """
def prompts_ahead(*arguments, all=eval.prompts_ahead):
    yield from itertools.islice(all(*arguments), 130)
    time.sleep(1000)
eval.prompts_ahead = prompts_ahead"""
    for kill in range(5):
        had, pids = lines("killed"), start("killed", 1 + kill % 2, starve)
        while lines("killed") < had + 50 and None in zygote.ask(poll=pids):
            time.sleep(0.005)
        zygote.kill(pids)
        assert {*zygote.wait(pids)} == {-signal.SIGKILL}, (
            kill
        )  # in the middle of its work, not after it
    assert 250 <= lines("killed") < 1001
    for out, ranks in (("killed", 2), ("one", 1), ("three", 3)):
        assert zygote.wait(start(out, ranks)) == [0] * ranks, (tmp_path / f"{out}.txt").read_text()[
            -2000:
        ]
    assert (
        len({(tmp_path / out / "toy_ocr.tsv").read_text() for out in ("killed", "one", "three")})
        == 1
    )
    assert [row["index"] for row in files.read_tsv(tmp_path / "one" / "toy_ocr.tsv")[0]] == [
        str(7 * i) for i in range(1001)
    ]
    assert lines("killed") <= 1001 + 5 * 2  # of a kill only a line torn in the middle is lost
    scores = {
        json.loads((tmp_path / out / "results.json").read_text())["overall"]
        for out in ("killed", "one", "three")
    }
    assert len(scores) == 1


def questions(**odd):
    """Three rows with pictures; the second one has other cells."""
    row = {"image": picture(), "image_path": "", "question": "What?", "answer": "1"}
    return [{"index": "1", **row}, {"index": "2", **row, **odd}, {"index": "3", **row}]


@pytest.mark.parametrize(
    "odd, message",
    [
        ({"question": "<image> or <image>?"}, "row 2, column 'question': <image> is written 2"),
        ({"image": "/a/" + "long/" * 20 + "path.png"}, "row 2, column 'image': '/a/long/"),
        ({"image": "short/path.png"}, "row 2, column 'image': 'short/path.png' is no row with"),
        ({"image": "", "question": "<image>?"}, "row 2, column 'question': <image> is written 1"),
        ({"image": "", "image_path": "no.png"}, "row 2, column 'image_path': "),
        ({"image": picture()[:200]}, "row 2, column 'image': "),
    ],
)
def test_a_row_that_cannot_be_asked_leaves_its_benchmark_out_and_the_others_go_on(
    world, tmp_path, capsys, odd, message
):
    write_tsv(tmp_path / "toy_ocr.tsv", questions(**odd))
    write_tsv(tmp_path / "toy_chart.tsv", questions())
    out = tmp_path / "out"
    data = (world[0], tmp_path)
    code, text, errors = command(flags(data, out, "--benchmarks=toy_ocr,toy_chart"), capsys)
    assert code == 2 and "Traceback" not in errors
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: 1 of 2 benchmarks could not be asked: toy_ocr: ")
    assert message in error
    results = json.loads((out / "results.json").read_text())
    assert results["toy_chart"] is not None and results["n"] == {"toy_chart": 3}
    assert results["toy_ocr"] is None and message in results["left_out"]["toy_ocr"]
    assert message in text and (out / "toy_chart.tsv").exists()
    # Alone it ends the run, with the same line.
    code, text, errors = command(flags(data, tmp_path / "2", "--benchmarks=toy_ocr"), capsys)
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and error.startswith("error: toy_ocr: ") and message in error
    assert not (tmp_path / "2" / "results.json").exists()


def test_one_rank_with_a_bad_row_stops_no_other(world, tmp_path, zygote):
    write_tsv(tmp_path / "toy_ocr.tsv", questions(image=picture()[:200]))
    write_tsv(tmp_path / "toy_chart.tsv", questions())
    arguments = flags((world[0], tmp_path), tmp_path / "out", "--benchmarks=toy_ocr,toy_chart")
    pids = zygote.start("eval", arguments, 2, tmp_path / "said.txt")
    assert sorted(zygote.wait(pids)) == [0, 2]
    said = (tmp_path / "said.txt").read_text()
    assert "error: 1 of 2 benchmarks could not be asked: toy_ocr: benchmark row 2, column" in said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["n"] == {"toy_chart": 3}


def test_answers_are_asked_again_when_what_they_depend_on_changed(world, tmp_path, capsys):
    """Its pictures, the configuration of the model and the tokenizer, not only its weights."""
    model = tmp_path / "model"
    shutil.copytree(world[0], model)
    (tmp_path / "a.png").write_bytes(base64.b64decode(picture((250, 0, 0))))
    rows = questions(image="", image_path="a.png")
    write_tsv(tmp_path / "toy_ocr.tsv", rows)

    def asked():
        """Indices of the rows that a run asks."""
        path = tmp_path / "out" / "predictions" / "toy_ocr.model.rank0.jsonl"
        before = len(path.read_text().splitlines()) if path.exists() else 1
        argv = flags((model, tmp_path), tmp_path / "out", "--benchmarks=toy_ocr")
        assert command(argv, capsys)[0] == 0
        return [json.loads(line)["index"] for line in path.read_text().splitlines()[before:]]

    def change(name, old, new):
        text = (model / name).read_text()
        assert old in text
        (model / name).write_text(text.replace(old, new))

    every = ["1", "2", "3"]
    assert sorted(asked()) == every and asked() == []
    # Same length and same time: the content counts.
    stat = (tmp_path / "a.png").stat()
    other = base64.b64decode(picture((0, 250, 0)))
    (tmp_path / "a.png").write_bytes(other.ljust(stat.st_size, b"\0"))
    os.utime(tmp_path / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert asked() == ["2"] and asked() == []
    config = json.loads((model / "config.json").read_text())
    config["llm_config"]["rms_norm_eps"] = 1e-3
    (model / "config.json").write_text(json.dumps(config))
    assert sorted(asked()) == every and asked() == []
    text = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(text + " ")
    assert sorted(asked()) == every and asked() == []


def test_a_second_evaluation_in_a_folder_is_refused(world, tmp_path, capsys):
    out = tmp_path / "out"
    with files.lock_folder(out):
        code, text, errors = command(flags(world, out, "--benchmarks=toy_ocr"), capsys)
        assert code == 2 and "error: " in errors and text == ""
        assert f"{out} is in use by an evaluation, process {os.getpid()} on " in errors
        assert [path.name for path in out.iterdir()] == ["eval.lock"]
    assert command(flags(world, out, "--benchmarks=toy_ocr"), capsys)[0] == 0
    # The folder of a finished evaluation is free again.
    assert command(flags(world, out, "--benchmarks=toy_ocr"), capsys)[0] == 0


def test_a_model_whose_logits_are_not_finite_is_an_error_that_names_its_folder(
    world, tmp_path, capsys
):
    model = tmp_path / "model"
    shutil.copytree(world[0], model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["mlp1.1.bias"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    argv = flags((model, world[1]), out, "--benchmarks=toy_ocr,toy_chart")
    code, text, errors = command(argv, capsys)
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and error.startswith(f"error: {model}: its logits are not finite")
    assert not (out / "results.json").exists() and not (out / "toy_ocr.tsv").exists()


def test_references_that_nothing_matches_are_told_before_the_model_is_asked(
    world, tmp_path, capsys
):
    write_tsv(tmp_path / "toy_count.tsv", questions(answer="many"))
    argv = flags((world[0], tmp_path), tmp_path / "out", "--benchmarks=toy_count")
    code, text, errors = command(argv, capsys)
    warning = "warning: toy_count: 1 rows count as wrong whatever is answered, "
    assert code == 0 and warning in errors and "row 2 ('many')" in errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["details"]["toy_count"]["never_right"] == ["2"]
    path = tmp_path / "out" / "toy_count.tsv"
    argv = ["score", "--benchmark=toy_count", f"--predictions={path}"]
    code, text, errors = command(argv, capsys)
    assert code == 0 and warning in errors and json.loads(text)["details"]["never_right"] == ["2"]


def test_prompts_come_in_order_and_only_a_few_ahead():
    made = []
    prompts = evaluation.prompts_ahead(
        [(i, "") for i in range(30)],
        lambda row, _: made.append(row) or row,
        SimpleNamespace(num_workers=2),
    )
    assert next(prompts) == 0 and len(made) <= 10 and [*prompts] == [*range(1, 30)]


def test_the_protocol_decides_tiles_upscaling_and_the_order_of_several_pictures(world, tmp_path):
    assistant, *_ = local(world, tmp_path)
    rows = [
        {
            "index": i,
            "image": repr([picture(size=(28 * k, 28)) for k in ks]),
            "question": "q",
            "answer": "x",
        }
        for i, ks in enumerate(((8,), (4, 2), [2] * 33))
    ]
    one, several, many = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR)
    b = table.find_benchmark("DocVQA_VAL")

    def count(pair, b, **more):
        text = prompts.build_prompt("plain", pair[0], len(pair[1]))
        return len(evaluation.make_prompt(assistant, b, *pair, text, **more)[1])

    assert count(one, b) == 9 and count(one, b, max_tiles=4) == 5  # with the thumbnail
    assistant.thumbnail = False  # as the model folder may say
    assert count(one, b) == 8 and count(one, b, max_tiles=4) == 4
    assistant.thumbnail = True
    assert count(several, b) == 5 + 3 and count(many, b) == 33  # 64 over all pictures
    assert (
        count(several, dataclasses.replace(b, upscale=2)) == 17 + 3
    )  # of two equal shapes the larger one is taken
    text = assistant.tokenizer.decode(
        evaluation.make_prompt(assistant, b, *several, "Image-1: <image>\nImage-2: <image>\nq")[0],
        skip_special=False,
    )
    assert text.count("<img>") == 2 and text.index("Image-1: <img>") < text.index(
        "Image-2: <img>"
    ) < text.index("\nq<|im_end|>")


def test_blind_tiles_are_gray_and_as_many(world, tmp_path):
    assistant, *_ = local(world, tmp_path)
    row, image = files.read_rows(world[1] / "toy_ocr.tsv", TOY_OCR)[2]
    ids, tiles = evaluation.make_prompt(assistant, TOY_OCR, row, image, "q", 3)
    gray_ids, gray = evaluation.make_prompt(assistant, TOY_OCR, row, image, "q", 3, blind=True)
    assert (
        ids == gray_ids
        and tiles.shape == gray.shape == (4, 3, 28, 28)
        and gray.dtype == torch.uint8
    )
    assert ids.count(assistant.tokenizer.image_id) == 4
    assert (gray.flatten(2) == torch.tensor([124, 116, 104])[:, None]).all()
    assert evaluation.make_prompt(assistant, TOY_OCR, row, "", "q")[1] is None


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--model=nowhere", "nowhere"),
        ("--untrained=nowhere", "nowhere"),
        ("--data_dir=nowhere", "toy_general.tsv: no such file"),
        ("--model=", "--model=DIR"),
        ("--benchmarks=MMMM", "unknown benchmark 'MMMM'"),
        (
            "--benchmarks=MME",
            "MME.tsv: no such file; --download=True fetches it, "
            "or put it there (MD5 b36b43c3f09801f5d36",
        ),
        ("--protocol=today", "sailvl-2024-12, vlmevalkit-2026-08"),
        ("--judge=http://127.0.0.1:9/v1", "--judge_model=NAME"),
        ("--limits=3", "did you mean 'limit'"),
    ],
)
def test_refusals(world, tmp_path, capsys, flag, message):
    code, text, errors = command(flags(world, tmp_path / "out", flag), capsys)
    assert (
        code == 2
        and message in errors
        and len(errors.splitlines()) == 1
        and not (tmp_path / "out").exists()
    )


def test_score_command(tmp_path, capsys):
    rows = [
        {
            "index": i,
            "image": i,
            "question": "q",
            "answer": "A",
            "category": "c",
            "prediction": "a" * (i % 2),
        }
        for i in range(4)
    ]
    path = write_tsv(tmp_path / "p.tsv", rows)
    code, text, errors = command(["score", "--benchmark=toy_ocr", f"--predictions={path}"], capsys)
    assert code == 0 and json.loads(text.splitlines()[-1]) == {
        "benchmark": "toy_ocr",
        "score": 50.0,
        "protocol": table.protocol_hash([TOY_OCR]),
        "protocol_name": "sailvl-2024-12",
        "judge": None,
        "details": {"n": 4, "correct": 2, "not_readable": 2, "categories": {"c": 50.0}},
    }
    for argv, message in (
        (["--benchmark=toy_ocrr", f"--predictions={path}"], "toy_ocrr"),
        (["--benchmark=toy_ocr", "--predictions=nowhere.tsv"], "nowhere.tsv"),
        ([], "--benchmark"),
    ):
        code, text, errors = command(["score", *argv], capsys)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1 and text == ""


def test_an_excel_file_is_refused_with_the_line_that_makes_a_tsv_of_it(tmp_path, capsys):
    (tmp_path / "its.xlsx").write_bytes(b"PK")
    code, text, errors = command(
        ["score", "--benchmark=MME", f"--predictions={tmp_path / 'p.xlsx'}"], capsys
    )
    assert code == 2 and "no such file" in errors
    code, text, errors = command(
        ["score", "--benchmark=MME", f"--predictions={tmp_path / 'its.xlsx'}"], capsys
    )
    assert code == 2 and text == "" and len(errors.splitlines()) == 1 and "python -c" in errors
    line = errors.split('python -c "')[1].split('"')[0]
    said, pandas = (
        [],
        SimpleNamespace(
            read_excel=lambda path, **how: (
                said.append((path, how))
                or SimpleNamespace(to_csv=lambda path, **how: said.append((path, how)))
            )
        ),
    )
    exec(line.removeprefix("import pandas; "), {"pandas": pandas})
    assert said == [
        (str(tmp_path / "its.xlsx"), dict(dtype=str, keep_default_na=False)),
        (str(tmp_path / "its.xlsx.tsv"), dict(sep="\t", index=False)),
    ]


def test_score_command_says_what_is_missing(tmp_path, capsys):
    rows = [{"index": i, "question": "q", "answer": "x", "prediction": "y"} for i in range(2)]
    path = write_tsv(tmp_path / "p.tsv", rows)
    code, text, errors = command(["score", "--benchmark=MMVet", f"--predictions={path}"], capsys)
    assert code == 2 and "no column 'category'" in errors
    path = write_tsv(tmp_path / "p.tsv", [row | {"category": "ocr"} for row in rows])
    code, text, errors = command(["score", "--benchmark=MMVet", f"--predictions={path}"], capsys)
    got = json.loads(text.splitlines()[-1])
    assert code == 0 and got["score"] is None and "--judge=URL" in got["reason"]


def test_a_run_of_paper_benchmarks_names_groups_what_was_left_out_and_published_scores(
    world, tmp_path, capsys
):
    rows = [
        {
            "index": i,
            "image": picture(),
            "question": "q?",
            "answer": "Yes",
            "category": c,
            "image_path": "x.png",
        }
        for i, c in enumerate(("OCR", "count"))
    ]
    write_tsv(tmp_path / "MME.tsv", rows)
    write_tsv(tmp_path / "MMVet.tsv", rows)
    code, text, errors = command(
        flags((world[0], tmp_path), tmp_path / "out", "--benchmarks=MME,MMVet"), capsys
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        code == 0
        and "n/a" in text
        and "MMVet is not in the averages: 2 of 2 answers need a judge" in text
    )
    assert (
        "warning: MME: only a part of MME: 12 of 14 categories are missing, 2 images have one"
        in text
    )
    cards = json.loads(
        (tmp_path / "out" / "report.html").read_text().split('id="data">')[1].split("</script>")[0]
    )["cards"]
    assert {card["verdict"] for card in cards if card["name"] == "MMVet"} == {"not scored"}
    assert "not scored" not in {card["verdict"] for card in cards if card["name"] == "MME"}
    assert (
        "the protocol's is b36b43c3" in errors
        and "SAIL-VL-2B" in text
        and results["published"]["SAIL-VL-8B"]["overall"] == 74.5
    )
    assert (
        results["MMVet"] is None
        and results["overall"] == results["groups"]["general"] == results["MME"]
    )
    assert results["protocol_name"] == "sailvl-2024-12" and results["left_out"]["MMVet"].startswith(
        "2 of 2"
    )
    assert "prediction" in (tmp_path / "out" / "MMVet.tsv").read_text().splitlines()[0]
