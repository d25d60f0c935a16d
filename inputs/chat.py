"""The dialogue of a row -> token ids and labels, made together.

Shapes: T tokens of a sample.
"""
import functools
import math

import numpy as np

from inputs.dialogue import read_dialogue
from inputs.tokenizer import MAX_TEXT

# Facts of the released models' conversation files: the system message, and what follows the
# <|im_end|> that closes the system turn and each answer.
TEMPLATES = {
    "sailvl-chat": {
        "system": "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, "
                  "是一个有用无害的人工智能助手。",
        "sep": "",
    },
    "internvl2_5": {
        "system": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
                  "联合开发的多模态大语言模型。",
        "sep": "\n",
    },
}
# The label of a position that predicts nothing.
IGNORE = -100


def render(row, tokenizer, template, n_tiles, tokens_per_tile):
    """Token ids and labels of a row in one pass, so that they cannot disagree.

    n_tiles: tiles of each of the row's images.
    Returns (ids (T,), labels (T,)), int64. labels[t] is the token that position t must predict,
    IGNORE where nothing is supervised: only answers and their <|im_end|> are.
    """
    segments = row_segments(row, tokenizer, template, n_tiles, tokens_per_tile)
    ids, targets = join_segments(segments)
    # The position before a token predicts it.
    labels = np.append(targets[1:], IGNORE)
    return np.array(ids), labels


def row_segments(row, tokenizer, template, n_tiles, tokens_per_tile):
    """The segments of a row, see `segments`; n_tiles: tiles of each of its images."""
    system, turns, supervised = read_dialogue(row)
    images = image_ids(tokenizer, n_tiles, tokens_per_tile)
    turns = place_images(turns, len(images))
    return segments(tokenizer, template, turns, images, system, supervised)


def chat_ids(tokenizer, template, turns, n_tiles, tokens_per_tile, most=math.inf, system=None):
    """Prompt ids, up to and including `assistant\\n`, of turns [(user, assistant), ...].

    The last assistant is None. n_tiles: tiles of each image, in the order of the `<image>`
    placeholders. If no placeholder is written, the images go first. A user's turn may also be a
    list, of the texts before, between and behind its images; no placeholder is looked for then.
    system: a message in place of the template's. ValueError if there are more than `most` ids.
    """
    images = image_ids(tokenizer, n_tiles, tokens_per_tile)
    if not any(isinstance(user, list) for user, _ in turns):
        turns = place_images(turns, len(images))
    ids, _ = join_segments(segments(tokenizer, template, turns, images, system))
    if len(ids) > most:
        raise ValueError(f"a prompt of {len(ids):,} tokens, the model has {most:,} positions; "
                         "shorten it, or take fewer pictures or --max_tiles")
    return ids


def image_ids(tokenizer, n_tiles, tokens_per_tile):
    """The visual tokens of each image: a list of <IMG_CONTEXT> ids per image."""
    return [[tokenizer.image_id] * (n * tokens_per_tile) for n in n_tiles]


def place_images(turns, n_images):
    """Turns with n_images `<image>` placeholders; if none is written, all head the first turn."""
    n_written = sum(user.count("<image>") for user, _ in turns)
    if n_written == 0:
        (first_user, first_assistant), *others = turns
        return [("<image>\n" * n_images + first_user, first_assistant), *others]
    if n_written != n_images:
        raise ValueError(f"human turns: {n_written} <image> placeholders for {n_images} images; "
                         "write one each, or none")
    return turns


@functools.lru_cache(4)
def fixed_ids(tokenizer, template):
    """Ids that every prompt of a template has: {name: ids}."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose from {', '.join(TEMPLATES)}")
    start = [tokenizer.special["<|im_start|>"]]
    end = [tokenizer.special["<|im_end|>"]]
    system = tokenizer.encode("system\n" + TEMPLATES[template]["system"])
    separator = tokenizer.encode(TEMPLATES[template]["sep"])
    return {
        "start": start,
        "end": end,
        "img": [tokenizer.special["<img>"]],
        "img_end": [tokenizer.special["</img>"]],
        "system": start + system + end,
        "ask": separator + start,
        "answer": end + separator + start + tokenizer.encode("assistant\n"),
    }


def segments(tokenizer, template, turns, images, system=None, supervised=None):
    """Yield (ids, whether they are supervised) of a conversation, in order.

    images: the ids between <img> and </img> of each image in the turns, see chat_ids; system: a
    message in place of the template's; supervised: for each answer whether it is (None: all are).
    """
    n_characters = len(system or "")
    for user, assistant in turns:
        n_characters += len("".join(user)) + len(assistant or "")
    if n_characters > MAX_TEXT:
        raise ValueError(f"a dialogue that cannot be split into tokens: {n_characters:,} "
                         f"characters, at most {MAX_TEXT:,} are read; shorten it")
    fixed = fixed_ids(tokenizer, template)
    encode = tokenizer.encode
    images = iter(images)
    if system:
        yield fixed["start"] + encode("system\n" + system) + fixed["end"], False
    else:
        yield fixed["system"], False
    for k, (user, assistant) in enumerate(turns):
        before, *after = user if isinstance(user, list) else user.split("<image>")
        yield fixed["ask"] + encode("user\n" + before), False
        for text in after:
            yield fixed["img"] + next(images) + fixed["img_end"] + encode(text), False
        yield fixed["answer"], False
        if assistant is not None:
            yield encode(assistant) + fixed["end"], supervised is None or supervised[k]


def join_segments(segments):
    """Segments -> (ids, targets): targets[t] is ids[t] where supervised, else IGNORE."""
    ids = []
    targets = []
    for new, supervised in segments:
        ids += new
        targets += new if supervised else [IGNORE] * len(new)
    return ids, targets
