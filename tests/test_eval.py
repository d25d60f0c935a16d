"""Scorers case by case, benchmark files, the run on one and two processes, resuming, the report."""
import base64, csv, hashlib, io, json, os, socket, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common, configurator
import eval as ev
from data import Tokenizer
from model import VLM, LLMConfig
from vision import VisionConfig
from weights import save_folder

torch.set_num_threads(1)

OPTIONS = {"A": "red circle", "B": "blue circle", "C": "red", "D": ""}


# ---- scorers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, read", [
    ("B", "B"), ("b", ""), ("B.", "B"), ("(B)", "B"), ("[B]", "B"), ("B: blue circle", "B"), ("**B**", "B"),
    ("#B", "B"), ("The answer is B.", "B"), ("Answer:B", "B"), ("B\n", "B"), (" B ", "B"), ("{B}", "B"), ("B!", "B"),
    ("B;", "B"), ("A or B", ""), ("A, B", ""), ("", ""), ("   ", ""), ("D", ""), ("E", ""), ("Z", ""), ("AB", ""),
    ("B-", ""), ("blue circle", "B"), ("It is a BLUE CIRCLE", "B"), ("red", "C"), ("a red circle", ""),
    ("nothing of these", ""), ("A blue circle", "A"), ("I can't process this file.", ""),
    ("Cannot determine the answer, so B", ""),
])
def test_multiple_choice(prediction, read):
    row = {**OPTIONS, "answer": "B"}
    assert ev.multiple_choice(prediction, row) == (read, read == "B")

def test_multiple_choice_options_with_one_letter_texts():
    row = {"A": "X", "B": "Y", "answer": "B"}
    assert ev.multiple_choice("Y", row) == ("B", True)
    assert ev.multiple_choice("A", row) == ("A", False)

@pytest.mark.parametrize("prediction, read", [
    ("Yes", "yes"), ("yes", "yes"), ("YES.", "yes"), ("Yes, there is.", "yes"), ("No", "no"), ("no!", "no"),
    ("**No**", "no"), ("No, there is no dog", "no"), ("Yes and no", ""), ("yes/no", ""), ("", ""), ("maybe", ""),
    ("nothing", ""), ("yesterday", ""), ("not", ""), ("know", ""), ("The answer is yes", "yes"), ("\tNo\n", "no"),
    ("Yes\nNo", ""), ("yes yes", "yes"), ("y", ""), ("true", ""), ("否", ""), ("no one", "no"), ("Yes,it is", "yes"),
    ("no.It is", "no"), ("Is it? Yes", "yes"), ("'yes'", "yes"), ("N o", ""), ("yes-", "yes"),
])
def test_yes_no(prediction, read):
    assert ev.yes_no(prediction, {"answer": "Yes"}) == (read, read == "yes")
    assert ev.yes_no(prediction, {"answer": "no"}) == (read, read == "no")

@pytest.mark.parametrize("prediction, answer, right", [
    ("ABC", "ABC", True), ("abc", "ABC", True), (" ABC ", "ABC", True), ("ABC.", "ABC", True), ("A B C", "ABC", False),
    ("A  B\nC", "A B C", True), ("A B C", "A  B  C ", True), ("ABCD", "ABC", False), ("AB", "ABC", False),
    ("", "ABC", False), ("ABC..", "ABC", False), ("ABC.", "ABC.", True), ("ABC", "ABC.", False),
    ("Abc. ", "ABC", True), ("'ABC'", "ABC", False), ("the word is ABC", "ABC", False), ("É", "é", True),
    ("K 12 M 30", "K 12 M 30", True), ("K 12, M 30", "K 12 M 30", False), ("12", "12", True), ("12.0", "12", False),
    (".", ".", True), (".", "", False), ("\t12", "12", True), ("ß", "SS", False), ("0", "O", False), ("１", "1", False),
    ("ABC\u00a0D", "ABC D", True), ("a.b", "A.B", True), ("!", "!", True),
])
def test_exact_match(prediction, answer, right):
    assert ev.exact_match(prediction, {"answer": answer})[1] is right

@pytest.mark.parametrize("prediction, answer, right", [
    ("100", "100", True), ("105", "100", True), ("95", "100", True), ("105.01", "100", False), ("94.9", "100", False),
    ("-95", "-100", True), ("95", "-100", False), ("0.12", "12%", True), ("12%", "0.12", True), ("12", "12%", False),
    ("12%", "12%", True), ("12.", "12", True), ("12..", "12", True), ("12...", "12", False), ("0", "0", True),
    ("0.0", "0", False), ("0.01", "0", False), ("5", "0", False), ("red", "Red", True), ("red.", "Red", True),
    ("reds", "red", False), ("", "red", False), ("", "3", False), ("1,000", "1000", False), ("1e2", "100", True),
    ("nan", "100", False), ("inf", "100", False), ("3 units", "3", False), ("Yes", "yes", True), (" 7 ", "7", True),
    ("%", "%", True), ("7%%", "7", False), ("2.09", "2", True), ("2.11", "2", False),
])
def test_relaxed_accuracy(prediction, answer, right):
    assert ev.relaxed_accuracy(prediction, {"answer": answer})[1] is right

@pytest.mark.parametrize("prediction, answer, right", [
    ("3", "3", True), ("3.", "3", True), ("three", "3", True), ("Three.", "3", True),
    ("There are 3 circles", "3", True), ("There are three circles", "3", True), ("3 or 4", "3", False),
    ("three (3)", "3", False), ("2-3", "3", False), ("", "0", False), ("zero", "0", True), ("None", "0", True),
    ("no", "0", False), ("13", "3", False), ("3.0", "3", True), ("3.5", "3", False), ("1,000", "1000", True),
    ("3,", "3", True), ("-3", "3", False), ("x3", "3", False), ("many", "3", False), ("ten", "10", True),
    ("twenty", "20", True), ("thirty", "30", False), ("3/4", "3", False), ("**3**", "3", True), ("nan", "3", False),
    ("3\n", "3", True), ("one", "1", True), ("someone", "1", False), ("4", "3", False), ("٣", "3", False),
])
def test_exact_number(prediction, answer, right):
    assert ev.exact_number(prediction, {"answer": answer})[1] is right

def test_score_rows_counts_missing_predictions_as_wrong():
    rows = [{"answer": "3", "prediction": "3", "category": "x"}, {"answer": "3", "prediction": "4", "category": "x"},
            {"answer": "3", "prediction": "", "category": "y"}, {"answer": "3", "category": "y"}]
    score, details = ev.score_rows("toy_count", rows)
    assert score == 25.0
    assert details == {"n": 4, "correct": 1, "not_readable": 2, "categories": {"x": 50.0, "y": 0.0}}

def test_yes_no_details_take_yes_as_positive():
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] + [("no", "yes")] * 2 + [("no", "no")] * 3 + [("perhaps", "no")]
    score, d = ev.score_rows("toy_halluc", [{"answer": a, "prediction": p} for p, a in pairs])
    assert score == 60.0
    assert [d[k] for k in ("precision", "recall", "f1", "yes_ratio")] == [75.0, 60.0, 66.67, 40.0]
    assert ev.score_rows("toy_halluc", [{"answer": "no", "prediction": "no"}])[1]["f1"] == 0.0

def test_chance_level():
    four, two = {**OPTIONS, "D": "d", "answer": "A"}, {"A": "a", "B": "b", "answer": "B"}
    assert ev.chance_level("toy_general", [four, two]) == 37.5
    assert ev.chance_level("toy_count", [{"answer": a} for a in "11123"]) == 60.0
    assert ev.chance_level("toy_halluc", [{"answer": a} for a in ("Yes", "No")]) == 50.0

# ---- prompts and the protocol ------------------------------------------------------------------------------------

def test_prompts():
    row = {"question": "What?", "hint": "", **OPTIONS}
    letter = "Answer with the option's letter from the given choices directly."
    assert ev.build_prompt("plain", row) == "What?"
    assert ev.build_prompt("short", row) == "What?\nAnswer the question using a single word or phrase."
    assert ev.build_prompt("mcq", row) == f"What?\nA. red circle\nB. blue circle\nC. red\n{letter}"
    assert ev.build_prompt("mcq", row | {"hint": "Look."}).startswith("Look.\nWhat?\nA. ")
    assert ev.build_prompt("mcq", {"question": "Q", "A": "红"}) == "Q\nA. 红\n请直接回答选项字母。"
    assert ev.build_prompt("mcq", {"question": "Q"}) == "Q\nAnswer the question directly."

def test_benchmark_names():
    assert ev.benchmark_names("toy") == ["toy_general", "toy_ocr", "toy_chart", "toy_count", "toy_halluc"]
    assert ev.benchmark_names("toy_ocr, toy_chart,toy_ocr") == ["toy_ocr", "toy_chart"]
    for bad in ("toy_orc", "", " , "):
        with pytest.raises(ValueError, match="there are: toy, all"):
            ev.benchmark_names(bad)

def test_protocol_hash_follows_the_rules():
    base = ev.protocol_hash(["toy_ocr"])
    assert base == ev.protocol_hash(["toy_ocr"]) and len(base) == 64
    assert base == ev.protocol_hash(["toy_ocr"], max_tiles=ev.BENCHMARKS["toy_ocr"].max_tiles)
    assert len({base, ev.protocol_hash(["toy_chart"]), ev.protocol_hash(["toy_ocr"], max_tiles=9),
                ev.protocol_hash(["toy_ocr"], max_new_tokens=1)}) == 4

# ---- benchmark files ---------------------------------------------------------------------------------------------

def picture(color=(200, 30, 30), size=(84, 84)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

def write_tsv(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path

def test_pictures_by_reference_and_by_path(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "p.png")
    rows = [{"index": "7", "image": "9", "image_path": "", "question": "a\tb\n\"c\"", "answer": "x"},
            {"index": "9", "image": picture(), "image_path": "", "question": "q", "answer": "x"},
            {"index": "8", "image": "", "image_path": "p.png", "question": "q", "answer": "x"},
            {"index": "6", "image": "", "image_path": "", "question": "q", "answer": "x"}]
    got = list(ev.read_rows(write_tsv(tmp_path / "t.tsv", rows)))
    assert [row["image"] for row, _ in got] == ["9", "9", "", ""]
    assert got[0][0]["question"] == "a\tb\n\"c\""
    assert got[0][1] == got[1][1] == rows[1]["image"] and got[2][1] == tmp_path / "p.png" and got[3][1] == ""
    assert [ev.open_picture(*pair).size for pair in got[:3]] == [(84, 84), (84, 84), (10, 10)]
    assert len(list(ev.read_rows(tmp_path / "t.tsv", 2))) == 2

@pytest.mark.parametrize("text, message", [
    ("index\tquestion\n1\tq\n", "no column 'answer'"), ("", "no column 'index'"),
    ("index\tquestion\tanswer\n", "no rows under"), ("index\tquestion\tanswer\n1\tq\n", "line 2: not 3 columns"),
    ("index\tquestion\tanswer\n1\tq\ta\tb\n", "line 2: not 3 columns"),
    ("index\tquestion\tanswer\n1\tq\ta\n1\tq\ta\n", "line 3: index '1' stands twice"),
    ("index\timage\tquestion\tanswer\n1\t77\tq\ta\n", "'77' is no row with a picture"),
    (b"index\tquestion\tanswer\n1\t\xff\xff\ta\n", "not a UTF-8"),
])
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        list(ev.read_rows(path))

def test_missing_file_and_bad_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        list(ev.read_tsv(tmp_path / "none.tsv"))
    with pytest.raises(ValueError, match="benchmark row 5"):
        ev.open_picture({"index": "5"}, base64.b64encode(b"no picture at all" * 9).decode())

# ---- the run, with a tiny random model ---------------------------------------------------------------------------

ROOT = Path(ev.__file__).parent

def make_model_folder(folder, seed=0):
    """A model folder of a tiny random model (28-pixel tiles, one token each) with the toy tokenizer."""
    vision = VisionConfig(image_size=28, dim=32, n_layers=1, n_heads=2, ffn_dim=64)
    llm = LLMConfig(vocab_size=1056, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64)
    tokenizer = ROOT / "config" / "toy_tokenizer"
    model = VLM(vision, llm, Tokenizer(tokenizer).image_id).init_weights(seed, std=0.3)
    save_folder(model.state_dict(), vision, llm, folder, tokenizer, dtype=torch.float32)
    return folder

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, benchmark folder): 5 x 12 rows about plain pictures, some of them with more than one tile."""
    folder = tmp_path_factory.mktemp("world")
    for k, name in enumerate(ev.benchmark_names("toy")):
        answers = {"toy_general": "AB", "toy_halluc": ("yes", "no")}.get(name, "12")
        write_tsv(folder / f"{name}.tsv", [
            {"index": i, "image": picture((20 * i, 40 * k, 99), (28 * (1 + i % 3), 28)), "question": f"What is {i}?",
             "A": "red" * (k == 0), "B": "blue" * (k == 0), "answer": answers[i % 2], "category": "x"}
            for i in range(12)])
    return make_model_folder(folder / "model"), folder

def command(argv, capsys):
    """Run eval.py's command line in this process -> (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        try:
            configurator.launch(ev.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, *capsys.readouterr()

def flags(world, out, *more):
    return [f"--model={world[0]}", f"--data_dir={world[1]}", f"--out_dir={out}", "--max_new_tokens=5", "--threads=1",
            "--device=cpu", *more]

def test_run_writes_predictions_results_and_report(world, tmp_path, capsys):
    out, untrained = tmp_path / "out", make_model_folder(tmp_path / "untrained", 1)
    code, text, errors = command(flags(world, out, "--controls=True", f"--untrained={untrained}", "--limit=8"), capsys)
    assert code == 0 and "toy_halluc" in text and str(out / "report.html") in text, errors
    results = json.loads((out / "results.json").read_text())
    names = ev.benchmark_names("toy")
    assert set(results) >= {"overall", *names, "untrained", "blind", "chance", "n", "details", "protocol"}
    for part in (results, results["untrained"], results["blind"], results["chance"]):
        assert all(0 <= part[name] <= 100 for name in names)
        assert part["overall"] == pytest.approx(sum(part[name] for name in names) / 5, abs=0.02)
    assert results["n"] == dict.fromkeys(names, 8) and results["chance"]["toy_general"] == 50.0
    assert results["protocol"] == ev.protocol_hash(names, max_new_tokens=5)
    assert results["model_sha256"] == hashlib.sha256((world[0] / "model.safetensors").read_bytes()).hexdigest()
    rows = list(ev.read_tsv(out / "toy_general.tsv"))
    assert list(rows[0]) == ["index", "image", "question", "A", "B", "answer", "category", "prediction"]
    assert [row["image"] for row in rows] == [str(i) for i in range(8)] and any(row["prediction"] for row in rows)
    score = ev.score_file(["--benchmark=toy_general", f"--predictions={out / 'toy_general.tsv'}"])
    assert score["score"] == results["toy_general"] and score["details"] == results["details"]["toy_general"]
    said = {v: (out / "predictions" / f"toy_ocr.{v}.rank0.jsonl").read_text() for v in ("model", "blind", "untrained")}
    assert len({json.dumps([json.loads(x)["prediction"] for x in text.split("\n")[1:]]) for text in said.values()}) == 3
    page = (out / "report.html").read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["cards"]) == 5 * 8 and len(data["free"]) == 2 and data["results"] == results and "http" not in page
    assert all(one["pictures"][0].startswith("data:image/jpeg;base64,") for one in data["cards"] + data["free"])
    assert sum(card["verdict"] == "right" for card in data["cards"][:8]) == results["details"]["toy_general"]["correct"]

def test_words_in_the_place_of_pictures(world, tmp_path, capsys):
    tokenizer, cells = Tokenizer(world[0]), "Empty TopLeft|LargeRedCircle Top|K TopRight"
    rows = [{"index": i, "image": picture(), "cells": cells, "question": "What?", "answer": "1"}
            for i in range(3)]
    write_tsv(tmp_path / "toy_ocr.tsv", rows)
    llm = LLMConfig(vocab_size=1056, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64)
    state = VLM(None, llm, tokenizer.image_id).init_weights(0, std=0.3).state_dict()
    save_folder(state, None, llm, tmp_path / "llm", ROOT / "config" / "toy_tokenizer", dtype=torch.float32)
    for folder in (tmp_path / "llm", world[0]):
        ask = ev.Assistant(folder, "cpu", torch.float32, vision=False)
        ids, tiles = ev.make_prompt(ask, rows[0], rows[0]["image"], "What?")
        assert tokenizer.decode(ids, skip_special=False).count(
            "<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?<|im_end|>") == 1
        assert [tokenizer.decode(cell) for cell in tiles] == [" " + cell for cell in cells.split("|")]
        _, tiles = ev.make_prompt(ask, rows[0], rows[0]["image"], "What?", blind=True)
        assert [tokenizer.decode(cell[:1]) for cell in tiles] == [" Empty"] * 3
        go = ["--image_as=words", "--benchmarks=toy_ocr", f"--data_dir={tmp_path}", f"--model={folder}"]
        code, _, errors = command(flags(world, tmp_path / f"{folder.name}-out", *go, "--controls=True"), capsys)
        assert code == 0, errors
        out = json.loads((tmp_path / f"{folder.name}-out" / "results.json").read_text())
        assert out["image_as"] == "words" and out["blind"]["toy_ocr"] >= 0 and out["n"] == {"toy_ocr": 3}
        assert out["protocol"] != ev.protocol_hash(["toy_ocr"], max_new_tokens=5)
    code, _, errors = command(flags(world, tmp_path / "none", "--image_as=words"), capsys)
    assert code == 2 and "no column 'cells'" in errors
    code, _, errors = command(flags(world, tmp_path / "none", f"--model={tmp_path / 'llm'}"), capsys)
    assert code == 2 and "without vision" in errors

def test_two_ranks_and_any_batch_give_the_same_predictions(world, tmp_path, capsys):
    names = "--benchmarks=toy_ocr,toy_general"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "eval.py", *flags(world, tmp_path / "two", names)], cwd=ROOT, text=True,
                              env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stderr=subprocess.PIPE) for r in range(2)]
    assert command(flags(world, tmp_path / "one", names, "--batch_size=5", "--batch_tokens=1"), capsys)[0] == 0
    for rank in ranks:
        errors = rank.communicate(timeout=300)[1]
        assert rank.returncode == 0, errors
    for name in ("toy_ocr", "toy_general"):
        assert (tmp_path / "one" / f"{name}.tsv").read_text() == (tmp_path / "two" / f"{name}.tsv").read_text()
    parts = (tmp_path / "two" / "predictions").glob("toy_ocr.model.rank*.jsonl")
    assert [path.read_text().count("\n") for path in parts] == [6, 6]

def local(world, out):
    """What main() prepares, in this process: (assistant, cfg, dist)."""
    cfg = ev.Config(model=str(world[0]), data_dir=str(world[1]), out_dir=str(out), max_new_tokens=4, batch_size=3)
    return ev.Assistant(cfg.model, "cpu", torch.float32), cfg, common.Dist()

def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    assistant, cfg, dist = local(world, tmp_path)
    asked, real = [], assistant.answers
    def answers(prompts, **settings):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(prompts, **settings)
    monkeypatch.setattr(assistant, "answers", answers)
    def predict(key):
        rows = ev.read_rows(world[1] / "toy_ocr.tsv")
        return ev.predict("toy_ocr", rows, assistant, key, cfg, dist)
    with pytest.raises(KeyboardInterrupt):
        predict("k")
    path, = (tmp_path / "predictions").glob("*.jsonl")
    assert path.read_text().count("\n") == 6
    path.write_text(path.read_text()[:-9])                              # as if killed in the middle of a line
    asked[:] = [0] * 3
    done = predict("k")
    assert sum(asked) == 7 and len(done) == 12                          # the six left and the torn one, nothing twice
    assert done == predict("k") and sum(asked) == 7                     # all there: nothing is asked again
    assert predict("other model") == done and sum(asked) == 7 + 12      # another key shares nothing

def test_batches_respect_both_limits():
    cfg = SimpleNamespace(batch_size=4, batch_tokens=10, num_workers=2)
    lengths = [3, 3, 3, 3, 50, 1, 1, 1, 1, 1]
    rows = [({"index": i}, "") for i in range(len(lengths))]
    batches = list(ev.prompt_batches(rows, lambda row, image: ([0] * lengths[row["index"]], None), cfg))
    assert [[row["index"] for row, _ in b] for b in batches] == [[0, 1, 2], [3], [4], [5, 6, 7, 8], [9]]

def test_blind_tiles_are_gray_and_as_many(world, tmp_path):
    assistant, *_ = local(world, tmp_path)
    row, image = list(ev.read_rows(world[1] / "toy_ocr.tsv"))[2]
    ids, tiles = ev.make_prompt(assistant, row, image, "q")
    gray_ids, gray = ev.make_prompt(assistant, row, image, "q", blind=True)
    assert ids == gray_ids and tiles.shape == gray.shape == (4, 3, 28, 28) and gray.dtype == torch.uint8
    assert ids.count(assistant.tokenizer.image_id) == 4
    assert (gray.flatten(2) == torch.tensor([124, 116, 104])[:, None]).all()
    assert ev.make_prompt(assistant, row, "", "q")[1] is None

@pytest.mark.parametrize("flag, message", [
    ("--model=nowhere", "nowhere"), ("--untrained=nowhere", "nowhere"),
    ("--data_dir=nowhere", "toy_general.tsv: no such file"),
    ("--model=", "--model=DIR"), ("--benchmarks=MME", "unknown benchmark 'MME'"),
    ("--limits=3", "did you mean 'limit'"),
])
def test_refusals(world, tmp_path, capsys, flag, message):
    code, text, errors = command(flags(world, tmp_path / "out", flag), capsys)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()

def test_report_escapes_what_the_model_says():
    row = {"index": "1", "question": "<b>?", "answer": "&", "prediction": "</script><script>alert(1)</script><!--"}
    card = ev.question_card("toy_ocr", row, "")
    page = ev.report_html({"overall": 0.0}, [card], [])
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["cards"] == [card] and "<" not in data and card["verdict"] == "wrong"
    assert page.count("<script") == 2 and "innerHTML" not in page     # the page makes text of it, never markup

# ---- score -------------------------------------------------------------------------------------------------------

def test_score_command(tmp_path, capsys):
    rows = [{"index": i, "image": i, "question": "q", "answer": "A", "category": "c", "prediction": "a" * (i % 2)}
            for i in range(4)]
    path = write_tsv(tmp_path / "p.tsv", rows)
    code, text, errors = command(["score", "--benchmark=toy_ocr", f"--predictions={path}"], capsys)
    assert code == 0 and json.loads(text.splitlines()[-1]) == {
        "benchmark": "toy_ocr", "score": 50.0, "protocol": ev.protocol_hash(["toy_ocr"]),
        "details": {"n": 4, "correct": 2, "not_readable": 2, "categories": {"c": 50.0}}}
    for argv, message in ((["--benchmark=toy_ocrr", f"--predictions={path}"], "toy_ocrr"),
                          (["--benchmark=toy_ocr", "--predictions=nowhere.tsv"], "nowhere.tsv"), ([], "--benchmark")):
        code, text, errors = command(["score", *argv], capsys)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1 and text == ""
