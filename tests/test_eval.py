"""Benchmark files, downloads, the run on one and several processes, kills, the report, the score command."""
import base64, csv, hashlib, http.server, io, json, os, signal, sys, threading, time, tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import configurator
from training import distributed
import eval as ev
from inputs.tokenizer import Tokenizer
from model import VLM, LLMConfig
from vision import VisionConfig
from weights import save_folder
from zygote import Zygote

torch.set_num_threads(1)

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

def test_pictures_by_reference_by_list_and_by_path(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "p.png")
    Image.new("RGB", (11, 11)).save(tmp_path / "q.png")
    row = {"image": "", "image_path": "", "question": "q", "answer": "x"}
    rows = [{"index": "7", **row, "image": "9", "question": "a\tb\n\"c\""}, {"index": "9", **row, "image": picture()},
            {"index": "8", **row, "image_path": "p.png"}, {"index": "6", **row},
            {"index": "5", **row, "image": repr([picture(size=(20, 20)), picture(size=(30, 30))])},
            {"index": "4", **row, "image_path": "['p.png', 'q.png']"}, {"index": "3", **row, "image": "5"},
            {"index": "2", **row, "image": "['9', '5']", "image_path": "not/there.png"}]
    got = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows))
    assert [row["image"] for row, _ in got] == ["9", "9", "", "", "5", "", "5", "['9', '5']"]
    assert got[0][0]["question"] == "a\tb\n\"c\""
    sizes = [[ev.open_picture(row, one).size[0] for one in pictures] for row, pictures in got]
    assert sizes == [[84], [84], [10], [], [20, 30], [10, 11], [20, 30], [84, 20, 30]]
    assert len(ev.read_rows(tmp_path / "t.tsv", 2)) == 2

def test_rows_are_read_without_their_pictures(tmp_path):
    big = "A" * 2_000_000                                               # 60 MB of pictures
    path = write_tsv(tmp_path / "t.tsv", [{"index": i, "image": big, "question": "q", "answer": "x"} for i in range(30)])
    tracemalloc.start()
    pairs = ev.read_rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 30 and peak < 25e6, peak

def test_pictures_go_through_jpeg_as_on_vlmevalkits_disk(tmp_path):
    image = Image.effect_noise((40, 40), 90).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 40)))
    image.save(file := io.BytesIO(), "PNG")
    cell = base64.b64encode(file.getvalue()).decode()
    row = {"index": "1", "image": cell, "image_path": "", "question": "q", "answer": "x"}
    rows = [row, row | {"index": "2", "image": repr([cell, cell]), "image_path": "['a.png', 'b.jpg']"}]
    (one, (place,)), (two, (png, jpg)) = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows))
    image.convert("RGB").save(file := io.BytesIO(), "JPEG")
    stored = Image.open(file).convert("RGB")
    assert ev.open_picture(one, place, True).tobytes() == ev.open_picture(two, jpg, True).tobytes() == stored.tobytes()
    assert image.convert("RGB").tobytes() == ev.open_picture(two, png, True).tobytes() != stored.tobytes()
    assert ev.open_picture(one, place).tobytes() not in (stored.tobytes(), image.convert("RGB").tobytes())  # on white

def test_pictures_of_vlmevalkits_protocols_stay_as_they_lie(tmp_path):
    image, exif = Image.effect_noise((20, 10), 90).convert("RGB"), Image.Exif()
    exif[0x0112] = 6                                                    # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    cell = base64.b64encode((tmp_path / "turned.jpg").read_bytes()).decode()
    row = {"index": "1", "image": cell, "image_path": "", "question": "q", "answer": "x"}
    rows = [row, row | {"index": "2", "image": "", "image_path": "['turned.jpg', 'clear.png']"}]
    (one, (place,)), (two, (turned, clear)) = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows))
    lying = Image.open(tmp_path / "turned.jpg").convert("RGB")
    assert ev.open_picture(two, turned, True).tobytes() == lying.tobytes() and ev.open_picture(two, turned).size == (10, 20)
    assert ev.open_picture(two, clear, True).tobytes() == image.convert("RGB").tobytes()
    assert ev.open_picture(two, clear).getextrema() == ((255, 255),) * 3
    lying.save(file := io.BytesIO(), "JPEG")
    assert ev.open_picture(one, place, True).tobytes() == Image.open(file).convert("RGB").tobytes()
    assert ev.open_picture(one, place).size == (10, 20)

def test_rows_without_a_picture_are_left_out_as_in_vlmevalkit_and_counted(tmp_path, capsys):
    row = {"image": picture(), "question": "q", "answer": "Yes", "l2-category": "x"}
    rows = [row | {"index": "1"}, row | {"index": "2", "image": ""}, row | {"index": "3", "image": "1"}]
    b = ev.find("HallusionBench")[1]
    got = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows), 0, b)
    assert [row["index"] for row, _ in got] == ["1", "3"] and "1 rows without a picture are left out" in capsys.readouterr().err
    assert len(ev.read_rows(tmp_path / "t.tsv")) == 3 and not capsys.readouterr().err
    assert [row["index"] for row, _ in ev.read_rows(tmp_path / "t.tsv", 2, b)] == ["1", "3"]
    with pytest.raises(ValueError, match="no rows with a picture"):
        ev.read_rows(write_tsv(tmp_path / "t.tsv", [rows[1]]), 0, b)
    write_tsv(tmp_path / "t.tsv", [{key: r[key] for key in r if key != "image"} for r in rows])
    assert len(ev.read_rows(tmp_path / "t.tsv", 0, b)) == 3             # a file without such a column asks without

@pytest.mark.parametrize("text, message", [
    ("index\tquestion\n1\tq\n", "no column 'answer'"), ("", "an empty file"),
    ("index\tquestion\tanswer\n", "no rows under"), ("index\tquestion\tanswer\n1\tq\n", "line 2: not 3 columns"),
    ("index\tquestion\tanswer\n1\tq\ta\tb\n", "line 2: not 3 columns"),
    ("index\tquestion\tanswer\n1\tq\ta\n1\tq\ta\n", "line 3: index '1' stands twice"),
    ("index\timage\tquestion\tanswer\n1\t77\tq\ta\n", "'77' is no row with a picture"),
    (b"index\tquestion\tanswer\n1\t\xff\xff\ta\n", "not a UTF-8"),
    ("index\tquestion\tanswer\tanswer\n1\tq\ta\tb\n", "more than 1 column 'answer'"),
    ('index\tquestion\tanswer\n1\tq\t"a\n2\tq\ta\n', "has no partner"), ('index\tquestion\tanswer\n1\tq\t"a', "has no partner"),
])
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ev.read_rows(path)

def test_quotation_marks_that_are_fine(tmp_path):
    (tmp_path / "t.tsv").write_text('index\tquestion\tanswer\n1\t5" tall\t"a\n\nb"\n\n2\t"q"\t"""a"""\n3\tq\t"a\n"')
    assert [(row["question"], row["answer"]) for row in ev.read_tsv(tmp_path / "t.tsv")[0]] == [
        ('5" tall', "a\n\nb"), ("q", '"a"'), ("q", "a\n")]

def test_missing_file_and_bad_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.tsv: no such file"):
        ev.read_tsv(tmp_path / "none.tsv")
    rows = [{"index": "5", "image": base64.b64encode(b"no picture at all" * 9).decode(), "question": "q", "answer": "x"}]
    (row, (place,)), = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows))
    with pytest.raises(ValueError, match="benchmark row 5"):
        ev.open_picture(row, place)

# ---- downloads ---------------------------------------------------------------------------------------------------

@pytest.fixture
def web():
    """A local server of the paths in `files`; `cut` ends a reply after so many bytes; `asked` are its requests."""
    files, asked, state = {}, [], SimpleNamespace(cut=None, ranges=True)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state.ranges else 0
            asked.append((self.path, start))
            data = files.get(self.path)
            if data is None or start >= len(data): return self.send_error(404 if data is None else 416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:state.cut])
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/x/", files=files, asked=asked, state=state)
    server.shutdown()

def test_a_download_goes_on_where_it_was_cut_and_is_checked(web, tmp_path, monkeypatch):
    data = os.urandom(100_000)
    web.files["/x/MME.tsv"], web.state.cut = data, 40_000
    b = ev.find("MME")[1]._replace(md5=hashlib.md5(data).hexdigest())
    with pytest.raises(ValueError, match="40000 of 100000 bytes.*run again.*MME.tsv .MD5 " + b.md5):
        ev.download(b, tmp_path / "LMUData", web.url)
    web.state.cut = None
    ev.download(b, tmp_path / "LMUData", web.url)
    assert (tmp_path / "LMUData" / "MME.tsv").read_bytes() == data and web.asked == [("/x/MME.tsv", 0), ("/x/MME.tsv", 40_000)]
    (tmp_path / "LMUData" / "MME.tsv").rename(tmp_path / "LMUData" / "MME.tsv.part")       # all there, but not named
    ev.download(b, tmp_path / "LMUData", web.url)
    web.state.ranges = False                                            # a server that knows no ranges sends all again
    (tmp_path / "LMUData" / "MME.tsv").rename(tmp_path / "LMUData" / "MME.tsv.part")
    ev.download(b, tmp_path / "LMUData", web.url)
    assert [p.name for p in (tmp_path / "LMUData").iterdir()] == ["MME.tsv"]
    with pytest.raises(ValueError, match="is not that of the protocol"):
        ev.download(ev.find("MME")[1], tmp_path, web.url)
    assert not (tmp_path / "MME.tsv").exists() and not (tmp_path / "MME.tsv.part").exists()
    with pytest.raises(ValueError, match="404.*POPE.tsv .MD5 c12f5acb"):
        ev.download(ev.find("POPE")[1], tmp_path, web.url)
    monkeypatch.setattr(ev, "ADDRESS", web.url.rstrip("/"))             # each file from its own folder
    web.files["/x/benchmarks/MMBench/MMBench_DEV_EN.tsv"] = web.files["/x/VLMEval/POPE.tsv"] = data
    for name in ("MMBench_DEV", "POPE"): ev.download(ev.find(name)[1]._replace(md5=b.md5), tmp_path, "")
    assert sorted(p.name for p in tmp_path.glob("*.tsv")) == ["MMBench_DEV_EN.tsv", "POPE.tsv"]
    with pytest.raises(ValueError, match="--download_from=URL or put .*POPE.tsv .MD5 c12f5acb.* by hand"):
        ev.download(ev.find("POPE")[1], tmp_path, "http://127.0.0.1:9")

# ---- the run, with a tiny random model ---------------------------------------------------------------------------

ROOT = Path(ev.__file__).parent

def make_model_folder(folder, seed=0):
    """A model folder of a tiny random model (28-pixel tiles, one token each) with the toy tokenizer."""
    vision = VisionConfig(image_size=28, dim=32, n_layers=1, n_heads=2, ffn_dim=64)
    llm = LLMConfig(vocab_size=1056, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=64)
    tokenizer = ROOT / "toy" / "tokenizer"
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

@pytest.fixture(scope="module")
def zygote():
    yield (z := Zygote())
    z.close()

def command(argv, capsys):
    """Run eval.py's command line in this process -> (exit code, stdout, stderr)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        try:
            configurator.run_script(ev.main)
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
    rows, _ = ev.read_tsv(out / "toy_general.tsv")
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
    save_folder(state, None, llm, tmp_path / "llm", ROOT / "toy" / "tokenizer", dtype=torch.float32)
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

def test_two_ranks_and_any_batch_give_the_same_predictions(world, tmp_path, capsys, zygote):
    names = "--benchmarks=toy_ocr,toy_general"
    pids = zygote.start("eval", flags(world, tmp_path / "two", names), 2, tmp_path / "said.txt")
    assert command(flags(world, tmp_path / "one", names, "--batch_size=5", "--batch_tokens=1"), capsys)[0] == 0
    assert zygote.wait(pids) == [0, 0], (tmp_path / "said.txt").read_text()
    for name in ("toy_ocr", "toy_general"):
        assert (tmp_path / "one" / f"{name}.tsv").read_text() == (tmp_path / "two" / f"{name}.tsv").read_text()
    parts = (tmp_path / "two" / "predictions").glob("toy_ocr.model.rank*.jsonl")
    assert [path.read_text().count("\n") for path in parts] == [6, 6]

def local(world, out):
    """What main() prepares, in this process: (assistant, cfg, dist)."""
    cfg = ev.Config(model=str(world[0]), data_dir=str(world[1]), out_dir=str(out), max_new_tokens=4, batch_size=3)
    return ev.Assistant(cfg.model, "cpu", torch.float32), cfg, distributed.Dist()

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
        rows = ev.read_rows(world[1] / "toy_ocr.tsv")
        return ev.predict("toy_ocr", rows, assistant, key, cfg, dist)
    with pytest.raises(KeyboardInterrupt):
        predict("k")
    path, = (tmp_path / "predictions").glob("*.jsonl")
    assert path.read_text().count("\n") == 6
    path.write_text(path.read_text()[:-9])                              # as if killed in the middle of a line
    limit[0] = None
    done = predict("k")
    assert len(asked) == 6 + 7 and len(done) == 12                      # the six left and the torn one, nothing twice
    assert done == predict("k") and len(asked) == 13                    # all there: nothing is asked again
    assert predict("other model") == done and len(asked) == 13 + 12     # another key shares nothing

def test_1001_rows_on_1_2_and_3_ranks_and_through_5_kills_give_the_same_file(world, tmp_path, zygote):
    rows = [{"index": 7 * i, "question": f"What is {i}?", "answer": i % 10} for i in range(1001)]
    write_tsv(tmp_path / "toy_ocr.tsv", rows)
    arguments = lambda out: flags((world[0], tmp_path), out, "--benchmarks=toy_ocr", "--max_new_tokens=3")
    start = lambda out, *how: zygote.start("eval", arguments(tmp_path / out), how[0], tmp_path / f"{out}.txt", *how[1:])
    # What is to be killed gets 130 prompts and then none: it cannot end before the kill, however late that comes.
    starve = """
def prompts_ahead(*arguments, all=eval.prompts_ahead):
    yield from itertools.islice(all(*arguments), 130)
    time.sleep(1000)
eval.prompts_ahead = prompts_ahead"""
    lines = lambda out: sum(p.read_text().count("\n") for p in (tmp_path / out / "predictions").glob("*.jsonl"))
    for kill in range(5):
        had, pids = lines("killed"), start("killed", 1 + kill % 2, starve)
        while lines("killed") < had + 50 and None in zygote.ask(poll=pids): time.sleep(0.005)
        zygote.kill(pids)
        assert {*zygote.wait(pids)} == {-signal.SIGKILL}, kill          # in the middle of its work, not after it
    assert 250 <= lines("killed") < 1001
    for out, ranks in (("killed", 2), ("one", 1), ("three", 3)):
        assert zygote.wait(start(out, ranks)) == [0] * ranks, (tmp_path / f"{out}.txt").read_text()[-2000:]
    assert len({(tmp_path / out / "toy_ocr.tsv").read_text() for out in ("killed", "one", "three")}) == 1
    assert [row["index"] for row in ev.read_tsv(tmp_path / "one" / "toy_ocr.tsv")[0]] == [str(7 * i) for i in range(1001)]
    assert lines("killed") <= 1001 + 5 * 2                              # of a kill only a line torn in the middle is lost
    scores = {json.loads((tmp_path / out / "results.json").read_text())["overall"] for out in ("killed", "one", "three")}
    assert len(scores) == 1

def test_prompts_come_in_order_and_only_a_few_ahead():
    made = []
    prompts = ev.prompts_ahead([(i, "") for i in range(30)], lambda row, _: made.append(row) or row, SimpleNamespace(num_workers=2))
    assert next(prompts) == 0 and len(made) <= 10 and [*prompts] == [*range(1, 30)]

def test_the_protocol_decides_tiles_upscaling_and_the_order_of_several_pictures(world, tmp_path):
    assistant, *_ = local(world, tmp_path)
    rows = [{"index": i, "image": repr([picture(size=(28 * k, 28)) for k in ks]), "question": "q", "answer": "x"}
            for i, ks in enumerate(((8,), (4, 2), [2] * 33))]
    one, several, many = ev.read_rows(write_tsv(tmp_path / "t.tsv", rows))
    b = ev.find("DocVQA_VAL")[1]
    count = lambda pair, b, **more: len(ev.make_prompt(assistant, *pair, ev.build_prompt("plain", pair[0], len(pair[1])), b=b, **more)[1])
    assert count(one, b) == 9 and count(one, b, max_tiles=4) == 5      # with the thumbnail
    assistant.thumbnail = False                                        # as the model folder may say
    assert count(one, b) == 8 and count(one, b, max_tiles=4) == 4
    assistant.thumbnail = True
    assert count(several, b) == 5 + 3 and count(many, b) == 33          # 64 over all pictures
    assert count(several, b._replace(upscale=2)) == 17 + 3              # of two equal shapes the larger one is taken
    text = assistant.tokenizer.decode(ev.make_prompt(assistant, *several, "Image-1: <image>\nImage-2: <image>\nq", b=b)[0], skip_special=False)
    assert text.count("<img>") == 2 and text.index("Image-1: <img>") < text.index("Image-2: <img>") < text.index("\nq<|im_end|>")

def test_blind_tiles_are_gray_and_as_many(world, tmp_path):
    assistant, *_ = local(world, tmp_path)
    row, image = ev.read_rows(world[1] / "toy_ocr.tsv")[2]
    ids, tiles = ev.make_prompt(assistant, row, image, "q", 3)
    gray_ids, gray = ev.make_prompt(assistant, row, image, "q", 3, blind=True)
    assert ids == gray_ids and tiles.shape == gray.shape == (4, 3, 28, 28) and gray.dtype == torch.uint8
    assert ids.count(assistant.tokenizer.image_id) == 4
    assert (gray.flatten(2) == torch.tensor([124, 116, 104])[:, None]).all()
    assert ev.make_prompt(assistant, row, "", "q")[1] is None

@pytest.mark.parametrize("flag, message", [
    ("--model=nowhere", "nowhere"), ("--untrained=nowhere", "nowhere"),
    ("--data_dir=nowhere", "toy_general.tsv: no such file"),
    ("--model=", "--model=DIR"), ("--benchmarks=MMMM", "unknown benchmark 'MMMM'"),
    ("--benchmarks=MME", "MME.tsv: no such file; --download=True fetches it, or put it there (MD5 b36b43c3f09801f5d36"),
    ("--protocol=today", "sailvl-2024-12, vlmevalkit-2025-04"), ("--judge=http://127.0.0.1:9/v1", "--judge_model=NAME"),
    ("--limits=3", "did you mean 'limit'"),
])
def test_refusals(world, tmp_path, capsys, flag, message):
    code, text, errors = command(flags(world, tmp_path / "out", flag), capsys)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()

def test_report_escapes_what_the_model_says():
    row = {"index": "1", "question": "<b>?", "answer": "&", "prediction": "</script><script>alert(1)</script><!--"}
    card = ev.question_card("toy_ocr", row, [], ("x", 0.0))
    page = ev.report_html({"overall": 0.0}, [card], [])
    data = page.split('id="data">')[1].split("</script>")[0]
    assert json.loads(data)["cards"] == [card] and "<" not in data and card["verdict"] == "wrong"
    assert page.count("<script") == 2 and "innerHTML" not in page     # the page makes text of it, never markup

def test_a_row_that_waits_for_a_judge_is_not_called_wrong():
    card = lambda *found: ev.question_card("MMVet", {"answer": "x", "index": "1"}, [], *found)["verdict"]
    assert [card(("", 0.0), False), card(("", 0.0), True), card(("15", False), False), card(("14", True), False),
            card(("0.5", 0.5), True)] == ["not scored", "wrong", "wrong", "right", "partly"]
    page = (ROOT / "evals" / "report.html").read_text()
    assert '"wrong", "not scored"]' in page
    assert ".card.not-scored" in (ROOT / "evals" / "style.css").read_text()

# ---- score -------------------------------------------------------------------------------------------------------

def test_score_command(tmp_path, capsys):
    rows = [{"index": i, "image": i, "question": "q", "answer": "A", "category": "c", "prediction": "a" * (i % 2)}
            for i in range(4)]
    path = write_tsv(tmp_path / "p.tsv", rows)
    code, text, errors = command(["score", "--benchmark=toy_ocr", f"--predictions={path}"], capsys)
    assert code == 0 and json.loads(text.splitlines()[-1]) == {
        "benchmark": "toy_ocr", "score": 50.0, "protocol": ev.protocol_hash(["toy_ocr"]),
        "protocol_name": "sailvl-2024-12", "judge": None,
        "details": {"n": 4, "correct": 2, "not_readable": 2, "categories": {"c": 50.0}}}
    for argv, message in ((["--benchmark=toy_ocrr", f"--predictions={path}"], "toy_ocrr"),
                          (["--benchmark=toy_ocr", "--predictions=nowhere.tsv"], "nowhere.tsv"), ([], "--benchmark")):
        code, text, errors = command(["score", *argv], capsys)
        assert code == 2 and message in errors and len(errors.splitlines()) == 1 and text == ""

def test_an_excel_file_is_refused_with_the_line_that_makes_a_tsv_of_it(tmp_path, capsys):
    (tmp_path / "its.xlsx").write_bytes(b"PK")
    code, text, errors = command(["score", "--benchmark=MME", f"--predictions={tmp_path / 'p.xlsx'}"], capsys)
    assert code == 2 and "no such file" in errors
    code, text, errors = command(["score", "--benchmark=MME", f"--predictions={tmp_path / 'its.xlsx'}"], capsys)
    assert code == 2 and text == "" and len(errors.splitlines()) == 1 and "python -c" in errors
    line = errors.split('python -c "')[1].split('"')[0]
    said, pandas = [], SimpleNamespace(read_excel=lambda path, **how: said.append((path, how)) or SimpleNamespace(
        to_csv=lambda path, **how: said.append((path, how))))
    exec(line.removeprefix("import pandas; "), {"pandas": pandas})
    assert said == [(str(tmp_path / "its.xlsx"), dict(dtype=str, keep_default_na=False)),
                    (str(tmp_path / "its.xlsx.tsv"), dict(sep="\t", index=False))]

def test_score_command_says_what_is_missing(tmp_path, capsys):
    rows = [{"index": i, "question": "q", "answer": "x", "prediction": "y"} for i in range(2)]
    path = write_tsv(tmp_path / "p.tsv", rows)
    code, text, errors = command(["score", "--benchmark=MMVet", f"--predictions={path}"], capsys)
    assert code == 2 and "no column 'category'" in errors
    path = write_tsv(tmp_path / "p.tsv", [row | {"category": "ocr"} for row in rows])
    code, text, errors = command(["score", "--benchmark=MMVet", f"--predictions={path}"], capsys)
    got = json.loads(text.splitlines()[-1])
    assert code == 0 and got["score"] is None and "--judge=URL" in got["reason"]

def test_a_run_of_paper_benchmarks_names_groups_what_was_left_out_and_published_scores(world, tmp_path, capsys):
    rows = [{"index": i, "image": picture(), "question": "q?", "answer": "Yes", "category": c, "image_path": "x.png"}
            for i, c in enumerate(("OCR", "count"))]
    write_tsv(tmp_path / "MME.tsv", rows)
    write_tsv(tmp_path / "MMVet.tsv", rows)
    code, text, errors = command(flags((world[0], tmp_path), tmp_path / "out", "--benchmarks=MME,MMVet"), capsys)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 0 and "n/a" in text and "MMVet is not in the averages: 2 of 2 answers need a judge" in text
    assert "warning: MME: only a part of MME: 12 of 14 categories are missing, 2 images have one" in text
    cards = json.loads((tmp_path / "out" / "report.html").read_text().split('id="data">')[1].split("</script>")[0])["cards"]
    assert {card["verdict"] for card in cards if card["name"] == "MMVet"} == {"not scored"}
    assert "not scored" not in {card["verdict"] for card in cards if card["name"] == "MME"}
    assert "the protocol's is b36b43c3" in errors and "SAIL-VL-2B" in text and results["published"]["SAIL-VL-8B"]["overall"] == 74.5
    assert results["MMVet"] is None and results["overall"] == results["groups"]["general"] == results["MME"]
    assert results["protocol_name"] == "sailvl-2024-12" and results["left_out"]["MMVet"].startswith("2 of 2")
    assert "prediction" in (tmp_path / "out" / "MMVet.tsv").read_text().splitlines()[0]
