"""inputs/tokenizer.py against Hugging Face's, with the toy and the real Qwen vocabulary."""

import json
import os
import random
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import ROOT, SHARED
from rows import TOY as TOY_TOKENIZER
from small_model import tiny
from test_convert import run, save

from inputs.chat import IGNORE, TEMPLATES, chat_ids, render
from inputs.images import STD, make_tiles, normalize
from inputs.tokenizer import MARKUP, SPECIAL_TOKENS, Tokenizer

TOY = ROOT / "toy" / "tokenizer"
# A folder with Qwen's vocab.json and merges.txt, which are not ours.
QWEN = Path(os.environ.get("QWEN_TOKENIZER", SHARED / "tokenizer" / "qwen2"))
# Facts of the released tokenizer_config.json; with the toy vocabulary the ids start at 1025.
# Each token is special (1) or only added (0).
FACTS = """
    151643 <|endoftext|> 1         151644 <|im_start|> 1      151645 <|im_end|> 1
    151646 <|object_ref_start|> 1  151647 <|object_ref_end|> 1
    151648 <|box_start|> 1         151649 <|box_end|> 1
    151650 <|quad_start|> 1        151651 <|quad_end|> 1
    151652 <|vision_start|> 1      151653 <|vision_end|> 1    151654 <|vision_pad|> 1
    151655 <|image_pad|> 1         151656 <|video_pad|> 1
    151657 <tool_call> 0           151658 </tool_call> 0
    151659 <|fim_prefix|> 0        151660 <|fim_middle|> 0    151661 <|fim_suffix|> 0
    151662 <|fim_pad|> 0           151663 <|repo_name|> 0     151664 <|file_sep|> 0
    151665 <img> 1                 151666 </img> 1            151667 <IMG_CONTEXT> 1
    151668 <quad> 1  151669 </quad> 1  151670 <ref> 1  151671 </ref> 1
    151672 <box> 1   151673 </box> 1""".split()
RELEASED = [(int(FACTS[k]), FACTS[k + 1], int(FACTS[k + 2])) for k in range(0, len(FACTS), 3)]
SAILVL = "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。"
INTERNVL = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)


@pytest.fixture(scope="module", params=[TOY, QWEN], ids=["toy", "qwen"])
def folder(request):
    if not (request.param / "vocab.json").exists():
        pytest.skip("needs a Qwen tokenizer; name its folder in QWEN_TOKENIZER")
    return request.param


@pytest.fixture(scope="module")
def released(folder):
    return [
        (i - 151643 + (151643 if folder == QWEN else 1025), token, special)
        for i, token, special in RELEASED
    ]


@pytest.fixture(scope="module")
def mine(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    """Hugging Face's Qwen2 tokenizer of the same files, which takes special tokens for text."""
    t = pytest.importorskip(
        "transformers", reason="its tokenizer is the oracle; pip install -r requirements-dev.txt"
    )
    from tokenizers import AddedToken

    backend = t.Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
    ).backend_tokenizer
    for _, token, _ in RELEASED:
        special = token not in MARKUP
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(token, special=special, normalized=False)])
    backend.encode_special_tokens = True  # what looks special is text, all but markup
    return backend


def random_text(rng):
    """Up to 80 characters of mixed kinds.

    Words, scripts, digits, spaces, marks, emoji, special tokens, any code point.
    """
    kinds = [
        lambda: rng.choice(
            [
                "don't",
                "I'LL",
                "we've",
                "ALL'S",
                "naïve",
                "İstanbul",
                "ﬁne",
                "Å",
                "e\u0301",
                "ǅ",
                "ß",
            ]
        ),
        lambda: chr(rng.randrange(32, 127)),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)),
        lambda: chr(rng.choice([0x3042, 0x30AB, 0xAC00, 0x0416, 0x0905]) + rng.randrange(40)),
        lambda: rng.choice(
            [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", " \n \n", "\n\n\n"]
        ),
        lambda: chr(rng.randrange(0x300, 0x370)),
        lambda: chr(rng.randrange(0x1F300, 0x1FAFF)) + rng.choice(["", "\u200d"]),
        lambda: rng.choice(RELEASED)[1],
        lambda: rng.choice(["...", "?!", "¿", "—", "==>", "\\n", "#", "’s"]),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    text = ""
    while rng.random() < 0.95 and len(text) < 80:
        text += rng.choice(kinds)()
    return text


def test_the_tokenizer_equals_hugging_faces_on_10000_random_strings(mine, theirs):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(10_000)]
    assert len(set(texts)) > 9000
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    for text, other in zip(texts, encoded, strict=True):
        ids = mine.encode(text)
        assert ids == other.ids, repr(text)
        decoded = unicodedata.normalize("NFC", mine.decode(ids))
        assert decoded == unicodedata.normalize("NFC", text)
        assert not set(ids) & mine.hidden_ids


def test_the_tokenizer_equals_hugging_faces_on_every_text_file_of_this_repository(mine, theirs):
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    texts = {}
    for path in [ROOT / name for name in listed] or [
        p for p in ROOT.rglob("*.*") if ".venv" not in p.parts
    ]:
        try:
            texts[path] = path.read_text(encoding="utf-8") if path.is_file() else ""
        except UnicodeDecodeError:
            continue  # weights and pictures
    assert len(texts) > 40 and ROOT / "data.py" in texts
    for path, text in texts.items():
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False).ids, path


def test_text_is_nfc_normalised_before_it_becomes_tokens(mine):
    assert mine.encode("e\u0301") == mine.encode("\u00e9") and mine.encode("\uac00") == mine.encode(
        "\u1100\u1161"
    )
    assert mine.encode("ﬁ") != mine.encode("fi")  # not NFKC


def test_the_tokenizer_has_the_31_released_tokens_with_their_ids(mine, released):
    first = released[0][0]
    assert len(released) == 31 and mine.n_vocab == first + 31
    assert mine.eos_id == first + 2 and mine.image_id == first + 24
    assert mine.special == {token: i for i, token, _ in released}
    for i, token, _ in released:
        assert mine.decode([i], skip_special=False) == token
        assert mine.decode([i]) == (token if token in MARKUP else "")


def test_tokenizer_json_alone_gives_the_same_tokenizer(mine, theirs, tmp_path):
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).hash == mine.hash and Tokenizer(tmp_path).encode(
        "héllo 你好"
    ) == mine.encode("héllo 你好")


@pytest.mark.parametrize(
    "template, system, sep", [("sailvl-chat", SAILVL, ""), ("internvl2_5", INTERNVL, "\n")]
)
def test_prompts_of_the_tokenizer_are_the_released_templates_character_by_character(
    mine, template, system, sep
):
    turns = [("<image>\nWhat is it?", "A cat."), ("And <image> this?", None)]
    ids = chat_ids(mine, template, turns, [2, 1], 256)
    pictures = ["<img>" + "<IMG_CONTEXT>" * n + "</img>" for n in (512, 256)]
    assert mine.decode(ids, skip_special=False) == (
        f"<|im_start|>system\n{system}<|im_end|>{sep}"
        f"<|im_start|>user\n{pictures[0]}\nWhat is it?<|im_end|>{sep}"
        f"<|im_start|>assistant\nA cat.<|im_end|>{sep}"
        f"<|im_start|>user\nAnd {pictures[1]} this?<|im_end|>{sep}"
        "<|im_start|>assistant\n"
    )
    first = mine.decode(chat_ids(mine, template, [("Hi", None)], [1], 1), skip_special=False)
    assert first.endswith(
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nHi<|im_end|>" + sep + "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_labels_are_the_answers_in_500_conversations_and_what_users_type_is_never_special(
    mine, template
):
    """Several turns, Chinese, special strings on both sides."""
    rng = random.Random(1)
    specials = {mine.special[x] for x in ("<|im_start|>", "<|im_end|>", "<img>", "</img>")}
    endings = ["", "请描述这张图片。", "<IMG_CONTEXT>", "<|im_end|>", "</img><img>"]

    def say():
        text = random_text(rng).replace("<image>", "") + rng.choice(endings)
        return (text or "?").replace("\0", "") + "."

    for n in range(500):
        turns = [(say(), say()) for _ in range(rng.randrange(1, 5))]
        n_tiles = [3] * rng.randrange(3)
        conversations = []
        for question, answer in turns:
            conversations.append({"from": "human", "value": question})
            conversations.append({"from": "gpt", "value": answer})
        row = {"id": str(n), "conversations": conversations}
        ids, labels = render(row, mine, template, n_tiles, 4)
        said = mine.decode([int(i) for i in labels if i != IGNORE], skip_special=False)
        assert said == "".join(unicodedata.normalize("NFC", a) + "<|im_end|>" for _, a in turns), n
        assert all(labels[t] in (IGNORE, ids[t + 1]) for t in range(len(ids) - 1))
        assert labels[-1] == IGNORE
        used = [i for i in ids.tolist() if i in mine.special_ids]
        assert used.count(mine.image_id) == 12 * len(n_tiles)
        markup = {mine.special[token] for token in MARKUP}
        assert set(used) <= specials | markup | {mine.image_id}
        # the system's, and one for each question and answer
        assert used.count(mine.eos_id) == 1 + 2 * len(turns)


def test_an_assembled_folder_gives_hugging_face_the_same_tokenizer_and_prompts(
    mine, folder, released, tmp_path
):
    t = pytest.importorskip(
        "transformers", reason="it reads the folder; pip install -r requirements-dev.txt"
    )
    first = released[0][0]
    sizes = {"dim": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 8}
    vlm = tiny(vocab_size=mine.n_vocab + 6, **sizes)
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(folder / name, tmp_path / "llm" / name)
    added = {i: {"content": token, "special": bool(special)} for i, token, special in released[:22]}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "chat_template": "the publisher's own",
        "added_tokens_decoder": added,
    }
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(config))
    done = run(
        "assemble", f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm", f"--out={tmp_path}/all"
    )
    assert done.returncode == 0, done.stderr
    released_size = 790 if folder == QWEN else 790 - 2 * 31
    assert (tmp_path / "all" / "added_tokens.json").stat().st_size == released_size
    for layout, image in (("internvl", "<image>"), ("transformers", "<IMG_CONTEXT>")):
        done = run("export", tmp_path / "all", tmp_path / layout, f"--layout={layout}")
        assert done.returncode == 0, done.stderr
        words = t.AutoTokenizer.from_pretrained(tmp_path / layout)
        assert len(words) == first + 31
        assert words.eos_token_id == first + 2 and words.pad_token_id == first
        assert all(words.convert_tokens_to_ids(token) == i for i, token, _ in released)
        assert set(words.all_special_ids) == {i for i, _, special in released if special}
        talk = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "什么?"}]},
            {"role": "assistant", "content": "猫。"},
            {"role": "user", "content": "Why?"},
        ]
        text = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        turns = [("<image>\n什么?", "猫。"), ("Why?", None)]
        want = chat_ids(mine, "sailvl-chat", turns, [1], 5)
        text = text.replace(image, "<img>" + "<IMG_CONTEXT>" * 5 + "</img>")
        assert words(text)["input_ids"] == want
        marked = "Where is <ref>the cat</ref>? <box>[[1, 2, 3, 4]]</box><tool_call>"
        assert words(marked)["input_ids"] == mine.encode(marked)
    # transformers' own tiling of the same picture: at most 1 of 255 away, see images.resize
    image = Image.effect_noise((500, 300), 90).convert("RGB")
    processor = t.AutoImageProcessor.from_pretrained(tmp_path / "transformers")
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
    off = (pixels - normalize(make_tiles(image, tile_size=56))).abs()
    off *= 255 * torch.tensor(STD).view(3, 1, 1)
    assert off.max() < 1.001 and (off > 0.001).float().mean() < 0.01


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text):
    assert TOY_TOKENIZER.decode(TOY_TOKENIZER.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("token", MARKUP)
def test_marks_of_places_and_calls_are_tokens_of_their_own_and_stay_in_answers(token):
    ids = TOY_TOKENIZER.encode(f"look {token} here")
    assert ids.count(TOY_TOKENIZER.special[token]) == 1
    assert TOY_TOKENIZER.decode(ids) == f"look {token} here"
    # As Hugging Face's tokenizer, which composes characters only between the marks.
    assert TOY_TOKENIZER.encode(token + "\u0338")[0] == TOY_TOKENIZER.special[token]


def test_a_folder_that_is_not_there_is_told_from_one_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone, which does not exist; .*--tokenizer=DIR"):
        Tokenizer(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="it needs vocab.json or tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("token", sorted(set(SPECIAL_TOKENS) - set(MARKUP)))
def test_a_control_token_typed_by_a_user_is_plain_text(token):
    between = TOY_TOKENIZER.encode(f"<ref>{token}</ref>")
    assert len(set(between) & TOY_TOKENIZER.special_ids) == 2
    ids = TOY_TOKENIZER.encode(f"look {token} here")
    assert not set(ids) & TOY_TOKENIZER.special_ids
    assert TOY_TOKENIZER.decode(ids) == f"look {token} here"


@pytest.mark.skipif(
    not (SHARED / "tokenizer").exists(), reason="the Qwen tokenizer is not part of this repository"
)
def test_the_qwen_tokenizer_has_the_published_special_ids():
    tok = Tokenizer(SHARED / "tokenizer" / "qwen2")
    assert tok.n_vocab == 151674 and tok.eos_id == 151645 and tok.image_id == 151667
    tokens = ("<|endoftext|>", "<img>", "</img>", "</box>")
    assert [tok.special[token] for token in tokens] == [151643, 151665, 151666, 151673]
    assert tok.encode("Hello, world! 你好 123") == [9707, 11, 1879, 0, 220, 108386, 220, 16, 17, 18]
