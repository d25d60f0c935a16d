"""inputs/row_keys.py: what a row means is used or refused by name, never ignored."""

import base64
import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
from rows import CHAT, ROOT, TOY, picture, sources_of, talk, write_rows

import data
from inputs import row_keys
from inputs.chat import IGNORE, render
from inputs.picture_names import image_names
from inputs.tars import add_member
from training import metrics

BOARD = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A board."}]


def problems(folder, *rows):
    """What is wrong with each row, "" for a good one; a.png and b.png lie beside them."""
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(picture())
    (source,) = sources_of(write_rows(folder, rows))
    reasons = dict.fromkeys(range(len(rows)), "")
    reasons |= {bad["row"]: bad["reason"] for bad in source.meta["bad"]}
    return list(reasons.values())


def tar_problems(path, **files):
    """What is wrong with each record of a tar; `a_b_txt` is the file a.b.txt."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add_member(tar, name.replace("_", "."), content)
    (source,) = sources_of(path)
    return {bad["row"]: bad["reason"] for bad in source.meta["bad"]}


def supervised_text(row):
    _, labels = render(row, TOY, CHAT, [], 9)
    return TOY.decode([int(i) for i in labels if i != IGNORE], skip_special=False)


def test_the_table_of_keys_in_the_documentation_is_the_code():
    documented = {}
    table = re.findall(
        r"^\| (row|turn|pair|part) \| (.*?) \| (\w+) \|", (ROOT / "docs/data.md").read_text(), re.M
    )
    for level, keys, what in table:
        for key in re.findall("`(.*?)`", keys):
            assert (level, key) not in documented
            documented[level, key] = what
    kinds = [
        ("row", "used", row_keys.ROW_USED),
        ("row", "ignored", row_keys.ROW_IGNORED),
        ("row", "refused", row_keys.ROW_REFUSED),
        ("row", "used", ("texts", *row_keys.PAIR_WORDS)),
        ("row", "refused", row_keys.DIALOGUE_KEYS - set(row_keys.PAIR_WORDS)),
        ("row", "refused", row_keys.OPTION_KEYS),
        ("turn", "used", row_keys.TURN_USED),
        ("turn", "ignored", row_keys.TURN_IGNORED),
        ("turn", "refused", row_keys.TURN_REFUSED),
        ("pair", "used", row_keys.PAIR_USED),
        ("pair", "ignored", row_keys.PAIR_IGNORED),
        ("part", "used", row_keys.PART_USED),
        ("part", "ignored", row_keys.PART_IGNORED),
    ]
    assert documented == {(level, key): what for level, what, keys in kinds for key in keys}


@pytest.mark.parametrize("key", row_keys.ROW_REFUSED)
def test_a_key_that_would_be_lost_refuses_its_row_and_an_empty_one_does_not(tmp_path, key):
    full, other_case, empty = problems(
        tmp_path, talk(**{key: ["x"]}), talk(**{key.title(): "x"}), talk(**{key: None})
    )
    assert full.startswith(f"{key}: ") and other_case.startswith(f"{key.title()}: ")
    assert empty == ""


@pytest.mark.parametrize("key", [*row_keys.TURN_REFUSED, "image", "images", "videos", "Content"])
def test_a_key_of_a_turn_that_would_be_lost_refuses_its_row(tmp_path, key):
    row = {"conversations": [BOARD[0], BOARD[1] | {key: ["x"]}]}
    (reason,) = problems(tmp_path, row)
    assert reason.startswith(f"conversations[1]: {key}: ")


def test_pictures_are_read_from_each_of_their_keys_and_null_hides_nothing(tmp_path):
    for key in row_keys.PICTURE_KEYS:
        assert image_names({"image": None, "images": None, key: "a.png"}) == ["a.png"]
        assert image_names(talk(**{key: ["a.png", "b.png"]})) == ["a.png", "b.png"]
    assert image_names({"image": "a.png", "images": ["a.png"]}) == ["a.png"]
    with pytest.raises(ValueError, match="image and images name different"):
        image_names({"image": "a.png", "images": ["b.png"]})


def test_a_picture_under_another_name_is_never_trained_blind(tmp_path):
    rows = [talk(**{key: "a.png"}) for key in ("Images", "img", "img_path", "picture", "image2")]
    rows += [talk(**{key: "a.png"}) for key in ("media", "filepath", "screenshot", "url")]
    rows += [talk(pixels=["x.tif"]), talk(image_url="http://host/1"), talk(data="data:image/png,")]
    assert all("picture" in reason for reason in problems(tmp_path, *rows))
    beside = talk(image="a.png", url="http://host/a.jpg", image_url="http://host/a.jpg")
    assert problems(tmp_path, beside) == [""]


def test_what_is_no_name_of_a_picture_is_one_short_line(tmp_path):
    values = [
        5,
        [None],
        [""],
        {"path": "a.png"},
        "http://host/a.png",
        "data:image/png," + "A" * 900,
    ]
    for reason in problems(tmp_path, *(talk(image=value) for value in values)):
        assert reason.startswith("image: ") and len(reason) < 150
    assert "web address" in problems(tmp_path, talk(image="https://host/a.png"))[0]


def test_a_caption_without_a_picture_is_a_bad_row_and_a_dialogue_without_one_is_counted(
    tmp_path, capsys
):
    rows = [{"caption": "A dog."}, {"text": "A cat."}, talk(extra=1), talk(image="a.png", extra=2)]
    reasons = problems(tmp_path, *rows)
    assert ["without a picture" in reason for reason in reasons] == [True, True, False, False]
    assert data.check_files([f"{tmp_path}/rows.jsonl"]) == 2
    out = capsys.readouterr().out
    assert (
        "rows: 1 of 4 rows without a picture; keys that are not read, and their rows: extra (2)"
        in out
    )


def test_a_system_key_is_the_system_turn(tmp_path):
    ids, _ = render(talk(system="Be brief."), TOY, CHAT, [], 9)
    text = TOY.decode(ids, skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    both = {"system": "One.", "messages": [{"role": "system", "content": "Two."}]}
    both["messages"] += talk()["conversations"]
    reasons = problems(tmp_path, both, talk(system=5), talk(system="See <image>", image="a.png"))
    assert "two system messages" in reasons[0] and "instead of text" in reasons[1]
    assert "pictures stand in the questions only" in reasons[2]


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}, {"loss": 0.0, "weight": 0}])
def test_an_answer_marked_as_not_learned_is_not_supervised(tmp_path, flag):
    wrong = {"from": "gpt", "value": "WRONG"} | flag
    row = {"conversations": [BOARD[0], wrong, *BOARD]}
    assert supervised_text(row) == "A board.<|im_end|>"
    none, half, asked = problems(
        tmp_path,
        {"conversations": [BOARD[0], wrong]},
        {"conversations": [BOARD[0], BOARD[1] | {"weight": 0.5}]},
        {"conversations": [BOARD[0] | {"loss": True}, BOARD[1]]},
    )
    assert "no answer is supervised" in none and "neither 0 nor 1" in half
    assert "only answers are learned" in asked
    assert "weight: 0" in problems(tmp_path, talk(weight=0))[0]


@pytest.mark.parametrize(
    "tag",
    [
        "<Image>",
        "<IMAGE>",
        "<image1>",
        "<image_1>",
        "<image 2>",
        "<ImageHere>",
        "< image>",
        "<|image_1|>",
        "<image/>",
        "<img>a.jpg</img>",
    ],
)
def test_other_spellings_of_a_picture_are_refused_with_what_to_write(tmp_path, tag):
    for row in (talk(f"{tag} What?", image="a.png"), talk(answer=f"See {tag}", image="a.png")):
        (reason,) = problems(tmp_path, row)
        assert "write <image> where the picture stands" in reason


def test_pictures_stand_in_questions_only(tmp_path):
    part = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "This."}]
    rows = [
        talk("What?", "See <image>.", image="a.png"),
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": part}]},
        {"image": "a.png", "caption": "An <image>"},
    ]
    for reason in problems(tmp_path, *rows):
        assert "pictures stand in the questions only" in reason


def test_parts_of_a_message_are_read_in_every_published_form(tmp_path):
    def asked(part, **more):
        question = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        return {"messages": [question, {"role": "assistant", "content": "A."}], **more}

    good = [
        asked({"type": "image"}, images=["a.png"]),
        asked({"type": "image_url", "image_url": "a.png"}),
        asked({"type": "image", "path": "a.png"}, video=None),
    ]
    assert problems(tmp_path, *good) == ["", "", ""]
    assert [image_names(row) for row in good] == [["a.png"]] * 3
    bad = [
        asked({"type": "image", "image": "b.png"}, images=["a.png"]),
        asked({"type": "text", "text": "See", "image": "a.png"}),
        asked({"type": "image"}),
        asked({"type": "text", "text": None}),
    ]
    words = (
        "name different pictures",
        "a part of its own",
        "1 <image> placeholders for 0",
        "instead of text",
    )
    for reason, word in zip(problems(tmp_path, *bad), words, strict=True):
        assert word in reason


def test_a_record_of_a_tar_that_lost_a_picture_or_has_two_texts_is_named(tmp_path):
    good = {"a_png": picture(), "a_txt": b"A."}
    found = tar_problems(
        tmp_path / "t.tar",
        **good,
        lost_txt=b"Lost.",
        scan_tif=b"...",
        scan_json=json.dumps(talk()).encode(),
        fail_json=b'{"caption": "No download.", "status": "failed"}',
        b_png=picture(),
        b_json=b'{"caption": "B.", "image": ["b.png", "c.png"]}',
        two_1_txt=b"One.",
        two_2_txt=b"Two.",
        two_png=picture(),
    )
    words = {1: "without a picture", 2: "scan.tif", 3: "without a picture", 4: "c.png", 5: "2 .txt"}
    assert found.keys() == words.keys()
    assert all(words[row] in found[row] for row in words), found


def test_a_lone_surrogate_in_an_id_or_name_is_escaped_and_ends_nothing(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a\udcff.png").write_bytes(picture())
    (folder / "a\udcff.txt").write_text(" ")
    check = [sys.executable, "data.py", "check", str(folder)]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 2 and b"a\\udcff.png" in done.stdout, done.stderr
    for _ in range(2):
        metrics.log_bad(tmp_path, [{"source": "s", "id": "\ud800", "reason": "r"}])
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "\ud800"


def test_an_unset_variable_is_no_source():
    with pytest.raises(ValueError, match="no path behind the ="):
        sources_of("web=")


@pytest.mark.parametrize(
    "key", ["train", "trainable", "mask", "ignore", "loss_mask", "Loss_Scale", "supervise", "skip"]
)
def test_no_other_word_for_what_is_learned_is_ignored(tmp_path, key):
    """Others write {"train": false}: axolotl, ShareGPT's trainers, our own colleagues."""
    turn, part, row, empty = problems(
        tmp_path,
        {"conversations": [BOARD[0], BOARD[1] | {key: 0}]},
        {"messages": [{"role": "user", "content": "?"}, answer_of({"text": "A.", key: False})]},
        talk(**{key: True}),
        {"conversations": [BOARD[0], BOARD[1] | {key: None}]},
    )
    assert turn.startswith(f"conversations[1]: {key}: ") and turn.endswith("has loss: 0")
    assert "not read in a part" in part and row.startswith(f"{key}: ") and empty == ""


def answer_of(part):
    return {"role": "assistant", "content": [{"type": "text", **part}]}


def test_keys_of_parts_are_used_named_or_refused_too(tmp_path):
    def row(*parts, **more):
        question = {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}
        return {"messages": [question, answer_of({"text": "A."})], **more}

    first = {"type": "image", "image": "a.png"}
    second = {"type": "image", "image": "b.png"}
    reasons = problems(
        tmp_path,
        row(first | {"min_pixels": 9, "index": 0, "text": None}, second | {"index": 1}),
        row(first | {"index": 1}, second | {"index": 0}),
        row(first | {"video": "a.mp4"}),
        row({"type": "text", "text": "?", "weight": 0}),
        row(first | {"bbox": [0, 0, 9, 9]}),
    )
    words = ["", "index 1 of image part 1", "video: not read in a part", "weight: not read", ""]
    for reason, word in zip(reasons, words, strict=True):
        assert (word in reason) and bool(word) == bool(reason), reason
    (source,) = sources_of(tmp_path / "rows.jsonl")
    assert source.meta["unknown"] == {"content[].bbox": 1}


def test_a_picture_is_never_lost_at_any_depth_or_in_any_spelling(tmp_path):
    """A text row that says it had a picture, by a name, a number or the picture itself."""
    lost = [
        talk(meta={"image": "a.png"}),
        talk(frames=[{"path": "a.png"}]),
        talk(png="iVBORw0KGgo" + "A" * 200),
        talk(image_id=17),
        talk(num_images=1),
        talk(coco_image="000000000001"),
    ]
    assert all("name the pictures of a row in its image" in r for r in problems(tmp_path, *lost))
    fine = [row | {"image": "a.png"} for row in lost] + [talk(num_images=0, image_id=None)]
    assert problems(tmp_path, *fine) == [""] * len(fine)


def test_a_file_address_is_a_path_wherever_a_picture_is_named(tmp_path):
    """Qwen-VL writes {"type": "image", "image": "file:///..."}."""
    place = f"file://{tmp_path}/a.png"
    parts = [{"type": "image", "image": place}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}, answer_of({"text": "A."})]
    assert problems(tmp_path, {"messages": messages}, talk(images=[place])) == ["", ""]


@pytest.mark.parametrize(
    "text",
    [
        "<video>\nWhat?",
        "<image>\n<audio> What?",
        "The <bbox>",
        "<ref-object>",
        "<|vision_start|><|video_pad|>",
    ],
)
def test_the_place_of_what_is_not_read_is_no_plain_text(tmp_path, text):
    marked, html = problems(
        tmp_path, talk(text, image="a.png"), talk("What does the <video> tag of HTML do?")
    )
    assert "there are no videos or sounds" in marked and html == ""


@pytest.mark.parametrize(
    "text", ["<image>a.png</image>", "<im_patch>", "<|vision_start|><|image_pad|>"]
)
def test_a_place_that_is_prepared_for_another_model_is_refused(tmp_path, text):
    (reason,) = problems(tmp_path, talk(f"{text} What?", image="a.png"))
    assert "write <image> where the picture stands" in reason


# ---- dialects ------------------------------------------------------------------------------------


def test_trl_rows_are_read_and_answers_within_a_prompt_are_not_learned(tmp_path):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    known = [user, answer_of({"text": "KNOWN"}), {"role": "user", "content": "And?"}]
    row = {"images": ["a.png"], "prompt": known, "completion": [answer_of({"text": "A board."})]}
    assert problems(tmp_path, row, {"messages": [user, answer_of({"text": "A."})]})[0] == ""
    assert image_names(row) == ["a.png"]
    _, labels = render(row, TOY, CHAT, [1], 9)
    learned = TOY.decode([int(i) for i in labels if i != IGNORE], skip_special=False)
    assert learned == "A board.<|im_end|>"
    reasons = problems(
        tmp_path,
        row | {"completion": "A board."},
        row | {"completion": None},
        row | {"completion": known},
        row | {"images": ["a.png", "b.png"]},
        row | {"label": False},
        row | {"answer": "Another."},
    )
    words = (
        "",
        "prompt: a question without an answer",
        "must alternate",
        "1 <image> placeholders for 2 images",
        "label: whether the answer is wanted",
        "prompt and completion and answer in one row",
    )
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason and bool(word) == bool(reason), (word, reason)


def test_the_cauldrons_texts_are_turns_and_their_places_are_named(tmp_path):
    pair = {"user": "What?", "assistant": "A board.", "source": "x"}
    good = {"images": ["a.png"], "texts": [pair, pair | {"user": "And?"}]}
    reasons = problems(
        tmp_path,
        good,
        good | {"texts": [pair, {"user": "And?", "assistant": None}]},
        good | {"texts": [pair | {"loss_mask": 0}]},
        good | {"caption": "A note.", "texts": ["A second note."]},
        good | {"texts": [pair | {"rating": 5}]},
        good | {"texts": "What? A board."},
        good | {"texts": ["What?", "A board."]},
    )
    assert reasons[5] and reasons[5] == reasons[6] and "texts: not a list of pairs" in reasons[5]
    assert reasons[0] == reasons[3] == reasons[4] == ""
    assert "texts[1]: null instead of text" in reasons[1] and "texts[0]: loss_mask" in reasons[2]
    assert supervised_text({"texts": good["texts"]}) == "A board.<|im_end|>" * 2
    (source,) = sources_of(tmp_path / "rows.jsonl")
    assert source.meta["unknown"] == {"texts": 1, "texts[].rating": 1}


@pytest.mark.parametrize("asks", row_keys.QUESTION_WORDS)
@pytest.mark.parametrize("says", row_keys.ANSWER_WORDS)
def test_a_question_and_an_answer_in_a_key_each_are_a_dialogue(asks, says):
    row = {asks: "What?", says: "A board.", "caption": None}
    assert supervised_text(row) == "A board.<|im_end|>"


def test_what_a_question_would_lose_refuses_its_row(tmp_path):
    row = {"image": "a.png", "question": "Which?", "answer": "A"}
    reasons = problems(
        tmp_path,
        row,
        *(row | {key: ["x"]} for key in sorted(row_keys.OPTION_KEYS)),
        row | {"answer": 2},
        row | {"answer": None, "answers": ["A"]},
        row | {"output": "B"},
    )
    words = [*(f"{key}: not read" for key in sorted(row_keys.OPTION_KEYS))]
    words += ["answer: 2 instead of text", "question: a question without", "answer and output"]
    assert reasons[0] == ""
    for reason, word in zip(reasons[1:], words, strict=True):
        assert word in reason, (word, reason)


@pytest.mark.parametrize("role", ["function_call", "observation", "tool", "function"])
def test_turns_of_tools_are_refused_by_the_name_of_their_role(tmp_path, role):
    turn = {"from": role, "value": "{}"}
    (reason,) = problems(tmp_path, {"conversations": [BOARD[0], turn, *BOARD]})
    assert f"conversations[1]: a turn of {role}: calls of tools are not rendered" in reason


def test_roles_are_read_by_each_of_their_published_names(tmp_path):
    for human, gpt in (("user", "assistant"), ("human", "chatgpt"), ("user", "model")):
        turns = [{"role": human, "content": "?"}, {"role": gpt, "content": "A board."}]
        system = {"role": "developer", "content": "Be brief."}
        assert supervised_text({"messages": [system, *turns]}) == "A board.<|im_end|>"


@pytest.mark.parametrize(
    "kind, word",
    [
        ("video", "a video"),
        ("video_url", "a video"),
        ("input_audio", "a sound"),
        ("tool_use", "calls of tools"),
        ("file", "there are text, image and image_url"),
    ],
)
def test_parts_that_are_no_text_or_picture_are_refused_by_name(tmp_path, kind, word):
    question = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "?"}]}
    (reason,) = problems(tmp_path, {"messages": [question, answer_of({"text": "A."})]})
    assert reason.startswith(f"messages[0]: a part of type '{kind}': ") and word in reason


# ---- pictures inside a row -----------------------------------------------------------------------


def test_pictures_inside_a_row_are_read_in_every_form(tmp_path):
    code = base64.b64encode(picture(168, 84)).decode()
    uri = f"data:image/png;base64,{code}"
    folded = "\n".join(code[k : k + 76] for k in range(0, len(code), 76))

    def asked(part):
        question = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
        return {"messages": [question, answer_of({"text": "A."})]}

    rows = [
        talk(image=code),
        talk(images=[uri, "a.png"]),
        talk(image=folded),
        talk(image=uri.replace("+", "%2B").replace("/", "%2F").replace("image%2F", "image/")),
        asked({"type": "image_url", "image_url": {"url": uri}}),
        asked({"type": "image", "image": code}),
        asked({"type": "image", "base64": code}),
        asked({"type": "image", "url": "a.png"}),
    ]
    assert problems(tmp_path, *rows) == [""] * len(rows)
    (source,) = sources_of(tmp_path / "rows.jsonl")
    for i in (0, 1, 2, 3, 4, 5, 6):
        assert source.image(i, 0, source.row(i)) == picture(168, 84)
        first = source.images[source.rows[i]["first_image"]]
        assert (first["width"], first["height"]) == (168, 84)
    assert source.image(1, 1, source.row(1)) == picture()
    assert data.check_files([f"{tmp_path}/rows.jsonl"]) == 0


def test_a_broken_picture_inside_a_row_is_one_short_line_that_names_its_place(tmp_path, capsys):
    code = base64.b64encode(picture(168, 84)).decode()
    rows = [
        (talk(image=code[:-1]), "image 1: broken base64"),
        (talk(images=["a.png", code[:80] + "!" + code[80:]]), "image 2: broken base64"),
        (talk(image="data:image/png;base64,"), "image 1: image of 0 bytes: not a picture"),
        (talk(image="data:image/svg+xml,<svg/>"), "image: data:image/svg+xml is not base64"),
        (talk(image="data:video/mp4;base64,AAAA"), "image: data:video/mp4;base64: a video"),
        (talk(images=["data:audio/wav;base64,AA"]), "images: data:audio/wav;base64: a sound"),
        (talk(image="A" * 5000), "is no path, nor base64"),
        (talk(image="s3://bucket/a.png"), "image: s3://bucket/a.png is a web address"),
    ]
    reasons = problems(tmp_path, *(row for row, _ in rows))
    for reason, (_, word) in zip(reasons, rows, strict=True):
        assert word in reason and len(reason) < 200, reason
    # A picture that decodes only in part shows when all of it is read.
    half = base64.b64encode(picture(168, 84)[:90]).decode()
    write_rows(tmp_path, [talk(image=half)], "half.jsonl")
    assert data.check_files([f"{tmp_path}/half.jsonl"]) == 1
    (line, *_) = capsys.readouterr().out.splitlines()
    assert "line 1: image 1: " in line and len(line) < 300 and half[:20] not in line
