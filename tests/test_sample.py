"""sample.py: one question, a batch, streaming, a chat, and what it refuses."""

import io
import json
import shutil
import sys

import command_line
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_eval import make_model_folder

import generate
import sample

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny random model and two pictures."""
    folder = tmp_path_factory.mktemp("sample")
    make_model_folder(folder / "model")
    (folder / "photos").mkdir()
    Image.new("RGB", (56, 28), (200, 10, 10)).save(folder / "photos" / "a.png")
    Image.new("RGB", (28, 28), (10, 10, 200)).save(folder / "photos" / "b.JPG")
    return folder


def run(world, *flags, stdin=""):
    """-> (exit code, stdout, stderr) of the command line, in this process."""
    return command_line.run(
        sample.main,
        ["sample.py", f"--model={world / 'model'}", "--device=cpu", "--max_new_tokens=8", *flags],
        stdin,
    )


def test_one_question_prints_the_answer_only(world):
    photo = f"--image={world / 'photos' / 'a.png'}"
    code, text, errors = run(world, photo, "--prompt=What is it?")
    assert code == 0 and errors == "" and text.strip() and text.endswith("\n")
    assert run(world, photo, "--prompt=What is it?")[1] == text
    assert run(world, "--prompt=What is it?")[1] != text
    both = run(
        world,
        photo,
        f"--image={world / 'photos' / 'b.JPG'}",
        "--prompt=Compare <image> with <image>.",
    )
    assert both[0] == 0 and both[1] != text
    drawn = {
        run(world, photo, "--prompt=What is it?", "--temperature=5", f"--seed={seed}")[1]
        for seed in (1, 2, 1)
    }
    assert len(drawn) == 2


def test_max_tiles_and_the_model_folder(world):
    cfg = sample.Config(model=str(world / "model"), device="cpu")
    one = sample.load(cfg)
    assert one.template == "sailvl-chat" and one.max_tiles == 12 and one.thumbnail is True
    photo = world / "photos" / "a.png"
    assert len(one.tiles(photo)) == 3  # two tiles and the thumbnail
    cfg.max_tiles = 1
    assert len(sample.load(cfg).tiles(photo)) == 1


def test_streaming_gives_the_same_text_and_whole_characters(world, monkeypatch):
    cfg = sample.Config(model=str(world / "model"), device="cpu", max_new_tokens=12)
    one = sample.load(cfg)
    prompt = one.prompt([("Hello", None)], [])
    assert "".join(one.stream(*prompt)) == one.answers([prompt])[0]
    ids = one.tokenizer.encode("  naïve 图片 😀 ok\n")
    monkeypatch.setattr(generate, "generate_stream", lambda *args, **kw: iter(ids))
    pieces = list(one.stream(*prompt))
    assert (
        "".join(pieces) == "naïve 图片 😀 ok"
        and len(pieces) > 5
        and not any("\ufffd" in p for p in pieces)
    )
    monkeypatch.setattr(generate, "generate_stream", lambda *args, **kw: iter(ids[:-7]))
    assert (
        "".join(one.stream(*prompt)) == one.tokenizer.decode(ids[:-7]).strip()
    )  # a broken end is shown as such
    monkeypatch.setattr(generate, "generate_stream", lambda *args, **kw: iter([]))
    assert list(one.stream(*prompt)) == []


def test_a_folder_of_pictures(world, tmp_path):
    code, text, errors = run(
        world,
        f"--image={world / 'photos'}",
        "--prompt=Describe the image.",
        f"--out={tmp_path / 'a.jsonl'}",
    )
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert code == 0 and text == "" and [row["image"][-5:] for row in rows] == ["a.png", "b.JPG"]
    single = run(world, f"--image={world / 'photos' / 'a.png'}", "--prompt=Describe the image.")[1]
    assert rows[0]["answer"] + "\n" == single and set(rows[0]) == {"image", "prompt", "answer"}


def test_a_jsonl_goes_on_after_an_unreadable_picture(world, tmp_path):
    source = world / "questions.jsonl"
    (world / "photos" / "broken.png").write_bytes(b"no picture")
    rows = [
        {"image": "photos/a.png", "prompt": "One?", "id": 7},
        {"image": "photos/broken.png"},
        {"prompt": "Text only?"},
        {"image": ["photos/a.png", "photos/b.JPG"], "prompt": "Two?"},
        {"image": "photos/none.png"},
    ]
    source.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    code, text, errors = run(
        world,
        f"--image={source}",
        "--prompt=Else?",
        f"--out={tmp_path / 'a.jsonl'}",
        "--batch_size=2",
    )
    out = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (world / "photos" / "broken.png").unlink()
    assert code == 0 and text == "" and "3 answers" in errors and "2 failed" in errors
    assert ["answer" in row for row in out] == [True, False, True, True, False] and out[0][
        "id"
    ] == 7
    assert (
        "broken.png" in out[1]["error"]
        and out[4]["prompt"] == "Else?"
        and not list(tmp_path.glob("*.partial"))
    )


def test_chat(world):
    photos = world / "photos"
    code, text, errors = run(
        world,
        stdin=f"Hello\n/image {photos / 'a.png'}\nWhat is it?\nAnd?\n/tiles 1\n"
        f"/image {photos / 'a.png'}\n/tiles 0\n"
        f"/image {photos / 'a.png'}\n/image nowhere.png\n/nonsense\n\n/reset\nHello\n",
    )
    answers = text.splitlines()
    assert (
        code == 0
        and errors.count("a.png: 3 tiles, 3 tokens") == 2
        and "a.png: 1 tile," in errors
        and "nowhere.png" in errors
    )
    assert (
        errors.count("/image PATH") == 2
        and text.startswith(answers[0])
        and text.rstrip().endswith(answers[0])
    )
    photo = f"--image={photos / 'a.png'}"
    assert run(world, photo, stdin="Hi\n")[1] == run(world, photo, "--prompt=Hi")[1]


def test_chat_replays_the_dialogue(world, monkeypatch):
    cfg = sample.Config(model=str(world / "model"), device="cpu")
    one, asked = sample.load(cfg), []
    monkeypatch.setattr(
        one.__class__,
        "stream",
        lambda self, ids, tiles: asked.append((ids, tiles)) or iter(["fine"]),
    )
    photo = world / "photos" / "a.png"
    lines = [
        "Q1",
        f"/image {photo}",
        f"/image {photo}",
        "Look at <image>",
        "Then <image> and <image>",
        "Q2",
        "",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    sample.chat(one, cfg)
    assert len(asked) == 3  # the wrong number of placeholders was refused
    turns = [("Q1", "fine"), ("Then <image> and <image>", "fine"), ("Q2", None)]
    ids = generate.chat_ids(one.tokenizer, one.template, turns, [3, 3], 1)
    assert asked[-1][0] == ids and asked[-1][1].shape == (6, 3, 28, 28)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model="], "--model=DIR"),
        (["--model=nowhere", "--prompt=x"], "nowhere"),
        (["--dtype=float16"], "float32"),
        (["--image=none.png", "--prompt=x"], "none.png: no such picture"),
        (["--prompt=What is <image>?"], "<image>"),
        (["--out=x.jsonl", "--prompt=x"], "--image"),
        (["--out=x.jsonl", "--image=."], "nothing to ask"),
        (["--image=.", "--prompt=x"], "folder"),
        (["--promt=x"], "did you mean 'prompt'"),
        (["--out=/no/such/x.jsonl", "--image=PHOTOS", "--prompt=x"], "/no/such"),
        (["--out=x.jsonl", "--image=PHOTOS"], "--prompt"),
    ],
)
def test_refusals(world, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, text, errors = run(
        world, *(flag.replace("PHOTOS", str(world / "photos")) for flag in flags)
    )
    assert code == 2 and message in errors and len(errors.splitlines()) == 1 and text == ""
    assert not any(tmp_path.iterdir())


def test_one_odd_row_of_a_batch_costs_that_row_only(world, tmp_path):
    rows = [
        {"images": ["photos/a.png"], "prompt": "What?", "extra": 1},
        {"image_path": "photos/a.png", "prompt": "What?"},
        {"image": 5},
        {"image": [None], "prompt": "What?"},
        {"image": "photos/a.png", "prompt": 5},
        {"image": "photos/a.png", "question": "What?"},
        {"img": "photos/a.png", "prompt": "What?"},
        {"prompt": "A lone \ud800 surrogate?"},
    ]
    source = world / "odd.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{torn\n")
    out = tmp_path / "a.jsonl"
    code, _, errors = run(world, f"--image={source}", "--prompt=Else?", f"--out={out}")
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and "Traceback" not in errors and "extra: this key of 1 rows" in errors
    assert [k for k, row in enumerate(answers) if "answer" in row] == [0, 1, 7]
    assert all(row["error"] for k, row in enumerate(answers) if k not in (0, 1, 7))
    assert "call it prompt" in answers[5]["error"]


def test_answers_are_written_as_they_come(world, tmp_path, monkeypatch):
    source = world / "two.jsonl"
    source.write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')

    def killed(self, prompts, **settings):
        next(prompts)
        yield 0, "First."
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.Assistant, "answer_each", killed)
    out = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={world / 'model'}",
                                          "--device=cpu", f"--image={source}", f"--out={out}"])
        sample.main()
    assert json.loads(out.read_text())["answer"] == "First."

    # Another command does not write over them.
    with pytest.raises(ValueError, match="interrupted run with another model or other settings"):
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed=1"])
        sample.main()
    # A kill in the middle of a line, then the same command: only what is missing is asked.
    out.write_text(out.read_text() + '{"image": "torn')
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])

    def second(self, prompts, **settings):
        yield from ((number, "Second.") for number, _ in enumerate(prompts))

    monkeypatch.setattr(generate.Assistant, "answer_each", second)
    sample.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["First.", "Second."]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    # A run that has ended is not gone on with.
    sample.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["Second.", "Second."]


def test_a_model_of_nan_prints_no_answer_and_names_its_folder(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["mlp1.1.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    photo = f"--image={world / 'photos' / 'a.png'}"
    told = f"error: {tmp_path / 'model'}: its logits are not finite"
    code, text, errors = run(tmp_path, photo, "--prompt=What is it?")
    assert code == 2 and text == "" and errors.startswith(told), errors
    out = tmp_path / "answers.jsonl"
    code, text, errors = run(
        tmp_path, f"--image={world / 'photos'}", "--prompt=What is it?", f"--out={out}"
    )
    assert code == 2 and errors.splitlines()[-1].startswith(told) and not out.exists()
