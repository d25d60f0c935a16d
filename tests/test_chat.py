"""inputs/chat.py: the template, what is supervised, where images stand."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import CHAT, TOY, image_spans, talk

from inputs.chat import IGNORE, chat_ids, render
from inputs.images import count_tiles


def test_the_prompt_is_the_released_template_character_by_character():
    ids = chat_ids(TOY, CHAT, [("What is it?", None)], [2], 9)
    text = TOY.decode(ids, skip_special=False)
    assert text == (
        "<|im_start|>system\n你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, "
        "是一个有用无害的人工智能助手。<|im_end|>"
        "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 18 + "</img>\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n"
    )
    text = TOY.decode(
        chat_ids(TOY, "internvl2_5", [("a", "b"), ("c", None)], [], 9), skip_special=False
    )
    assert text.endswith(
        "<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=100, deadline=None)
def test_supervised_tokens_are_the_answers_and_their_end_and_nothing_else(turns):
    turns = [(q.replace("<image>", ""), a) for q, a in turns]
    turns = [(q if q.strip() else "q", a if a.strip() else "a") for q, a in turns]
    conversations = [
        {"from": f, "value": v} for q, a in turns for f, v in (("human", q), ("gpt", a))
    ]
    row = {"id": "x", "conversations": conversations}
    ids, labels = render(row, TOY, CHAT, [], 9)
    said = TOY.decode([int(i) for i in labels if i != IGNORE], skip_special=False)
    assert said == "".join(unicodedata.normalize("NFC", a) + "<|im_end|>" for _, a in turns)
    assert all(labels[t] in (IGNORE, ids[t + 1]) for t in range(len(ids) - 1))
    assert labels[-1] == IGNORE


def test_a_wrong_number_of_image_placeholders_is_refused():
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        render(talk("<image><image> what?", id="x"), TOY, CHAT, [1], 9)


def test_context_tokens_are_256_a_tile_for_1000_random_images_and_prompts():
    """The arithmetic at full size: one to four images of any size, placeholders anywhere."""
    rng = np.random.default_rng(16)
    for i in range(1000):
        sizes = np.exp(rng.uniform(0, np.log(5000), (rng.integers(1, 5), 2))).astype(int).tolist()
        n_tiles = [count_tiles(w, h, 1, int(rng.integers(1, 13))) for w, h in sizes]
        words = [" ".join(["word"] * int(rng.integers(0, 9))) for _ in range(len(sizes) + 1)]
        text = "What are they?"  # no placeholder at all
        if rng.random() < 0.5:
            text = "?" + "<image>".join(words)
        ids, _ = render(talk(text, "Ok.", id=str(i)), TOY, CHAT, n_tiles, 256)
        assert image_spans(ids) == [256 * n for n in n_tiles]
