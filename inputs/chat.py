"""A row in any dialect -> token ids and labels, made together.

Shapes: T tokens of a sample.
"""
import functools
import json
import math

import numpy as np

from inputs.row_keys import (
    CAPTION_KEYS,
    LOSS_KEYS,
    PICTURE_KEYS,
    TURNS_KEYS,
    check_caption_keys,
    check_no_picture_is_lost,
    check_part_keys,
    check_tags,
    check_turn_keys,
    is_empty,
    short,
)
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
# The question where a source has bare captions.
CAPTION_PROMPT = "Please describe the image."
# The label of a position that predicts nothing.
IGNORE = -100


# ---- rendering ----------------------------------------------------------------------------------

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


def chat_ids(tokenizer, template, turns, n_tiles, tokens_per_tile, most=math.inf):
    """Prompt ids, up to and including `assistant\\n`, of turns [(user, assistant), ...].

    The last assistant is None. n_tiles: tiles of each image, in the order of the `<image>`
    placeholders. If no placeholder is written, the images go first. ValueError if there are more
    than `most` ids.
    """
    images = image_ids(tokenizer, n_tiles, tokens_per_tile)
    turns = place_images(turns, len(images))
    ids, _ = join_segments(segments(tokenizer, template, turns, images))
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

    images: the ids between <img> and </img> of each `<image>` in the turns; system: a message in
    place of the template's; supervised: for each answer whether it is (None: all are).
    """
    texts = [system or "", *(text or "" for turn in turns for text in turn)]
    n_characters = sum(len(text) for text in texts)
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
        before, *after = ("user\n" + user).split("<image>")
        yield fixed["ask"] + encode(before), False
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


# ---- dialects -----------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant"}
PART_TYPES = ("text", "image", "image_url")


def conversation(row):
    """(system or None, [(user, assistant), ...]) of a row; ValueError if it is broken.

    A row has `conversations` (InternVL, LLaVA), `messages` (OpenAI) or a bare `caption` or `text`.
    """
    system, turns, _ = read_dialogue(row)
    return system, turns


def read_dialogue(row):
    """What `conversation` gives, and for each answer whether it is supervised."""
    system = row.get("system")
    if is_empty(system):
        system = None
    elif not isinstance(system, str):
        raise ValueError(f"system: {shown(system)} instead of text; write text")
    else:
        check_text(system, "system", "system")
    field, turns = row_turns(row)
    if not field:
        return system, [(CAPTION_PROMPT, bare_caption(row))], [True]
    roles = []
    texts = []
    supervised = []
    for k, turn in enumerate(turns):
        where = f"{field}[{k}]"
        check_turn_keys(turn, where)
        role = either(turn, ("from", "role"), where)
        roles.append(ROLES.get(str(role), role))
        texts.append(turn_text(turn, role, roles[-1], where))
        supervised.append(is_supervised(turn, roles[-1], where))
    if roles[:1] == ["system"]:
        first = texts.pop(0)
        supervised.pop(0)
        if system not in (None, first):
            raise ValueError(f"two system messages, one in system and one in {field}; keep one")
        system = first
    if not texts or roles[-len(texts):] != ["user", "assistant"] * (len(texts) // 2):
        raise ValueError(f"{field}: turns must alternate human/user, gpt/assistant and end with "
                         f"the latter, not {roles}")
    if not any(supervised[1::2]):
        raise ValueError(f"{field}: no answer is supervised; remove the row")
    return system, list(zip(texts[::2], texts[1::2], strict=True)), supervised[1::2]


def row_turns(row):
    """(name of the key, list of turns) of a row; ("", []) if it is a bare caption."""
    fields = [field for field in TURNS_KEYS if row.get(field) is not None]
    if not fields:
        return "", []
    if len(fields) > 1:
        raise ValueError(f"{' and '.join(fields)} in one row; keep one")
    turns = row[fields[0]]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'{fields[0]}: not a list of turns; '
                         'write [{"from": "human", "value": "..."}, ...]')
    return fields[0], turns


def bare_caption(row):
    """The caption of a row without turns; ValueError if it is missing or empty."""
    check_caption_keys(row)
    texts = [row[key] for key in CAPTION_KEYS if isinstance(row.get(key), str)]
    texts = [text.strip() for text in texts if text.strip()]
    if len(set(texts)) > 1:
        raise ValueError("caption and text differ; keep one")
    if texts:
        check_text(texts[0], "assistant", "caption")
        return texts[0]
    raise ValueError(row.get("unreadable") or
                     "no conversations, messages, caption or text in this row, or an empty one; "
                     "write it")


def check_pictures(row, n_images):
    """ValueError if a row with so many pictures seems to have lost one, or its caption has none."""
    if n_images:
        return
    check_no_picture_is_lost(row)
    if not row_turns(row)[0]:
        bare_caption(row)
        raise ValueError("a caption without a picture; add the picture or remove the row")


def either(turn, keys, where):
    """The value of the key that a turn has of two; ValueError if they disagree."""
    first, second = (turn.get(key) for key in keys)
    if first is None or second is None or first == second:
        return second if first is None else first
    raise ValueError(f"{where}: {keys[0]} and {keys[1]} differ; keep one")


def turn_text(turn, role, speaker, where):
    """The text of a turn, with `<image>` in place of images; `where` names it in errors.

    speaker: the role as "user", "assistant" or "system".
    """
    text = either(turn, ("value", "content"), where)
    # OpenAI's message parts have text and images in place.
    if isinstance(text, list):
        text = "".join(part_text(part, where) for part in text)
    if isinstance(text, str) and text.strip():
        check_text(text, speaker, where)
        return text
    problem = "empty"
    if not isinstance(text, str):
        problem = f"{shown(text)} instead of text in the"
    raise ValueError(f"{where}: {problem} {role} turn; write its text or remove the turn")


def check_text(text, speaker, where):
    """ValueError if a text has a picture where there can be none, or a tag that is not read."""
    check_tags(text, where)
    if "<image>" in text and speaker in ("assistant", "system"):
        raise ValueError(f"{where}: an <image> in a turn of the {speaker}; pictures stand in the "
                         "questions only, move it or write it in other words")


def is_supervised(turn, speaker, where):
    """Whether a turn is an answer that is learned, and not marked with loss or weight 0."""
    flags = [turn[key] for key in LOSS_KEYS if turn.get(key) is not None]
    if any(flag not in (0, 1) for flag in flags) or len(set(flags)) > 1:
        raise ValueError(f"{where}: loss or weight is neither 0 nor 1, or they differ; a turn is "
                         "learned or not, write true or false")
    if speaker != "assistant":
        if flags[:1] == [1]:
            raise ValueError(f"{where}: loss or weight on a turn of the {speaker}; only answers "
                             "are learned, remove it")
        return False
    return flags[:1] != [0]


def part_text(part, where):
    """The text of one part of an OpenAI message."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in PART_TYPES:
        raise ValueError(f"{where}: a part of type {kind!r}; there are text, image and image_url")
    check_part_keys(part, PART_KEYS[kind], where)
    if kind != "text":
        return "<image>\n"
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: {shown(part.get('text'))} instead of text; write text")
    return part["text"]


# ---- names of pictures --------------------------------------------------------------------------

# What is read of a part of each type.
PART_KEYS = {
    "text": ("text",),
    "image": ("image", "path", "index"),
    "image_url": ("image_url", "index"),
}


def image_names(row):
    """Names of the row's images, in order.

    They stand in one of PICTURE_KEYS or in the parts of messages. ValueError if a value is no name,
    or if two places name different pictures.
    """
    found = {}
    for key in PICTURE_KEYS:
        value = row.get(key)
        if not is_empty(value):
            found[key] = value if isinstance(value, list) else [value]
    field, turns = row_turns(row)
    parts = [part for turn in turns for part in image_parts(turn)]
    check_part_order(parts)
    in_parts = [name for name in map(part_image, parts) if name is not None]
    if in_parts:
        found[field] = in_parts
    for key, names in found.items():
        found[key] = [checked_image_name(name, key) for name in names]
    names, *others = found.values() or [[]]
    if any(other != names for other in others):
        raise ValueError(f"{' and '.join(found)} name different pictures; keep one of them")
    return list(names)


def image_parts(turn):
    """The parts of a turn that stand for images, in order."""
    parts = turn.get("value") if turn.get("content") is None else turn["content"]
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("type") in PART_TYPES[1:]:
            yield part


def check_part_order(parts):
    """ValueError if the image parts of a row say, by `index`, that they come in another order."""
    for k, part in enumerate(parts):
        if part.get("index") not in (None, k):
            raise ValueError(f"index {shown(part['index'])} of image part {k + 1}; pictures are in "
                             "the order of their parts, sort them and remove index")


def part_image(part):
    """The name of the image of a part of a message; None if it stands elsewhere in the row."""
    if part["type"] == "image":
        return part.get("path") if part.get("image") is None else part["image"]
    place = part.get("image_url")
    return place.get("url") if isinstance(place, dict) else place


def checked_image_name(name, key):
    """The path in a value that names a picture; ValueError if it is no name of a file."""
    problem = ""
    if not isinstance(name, str) or not name or "\0" in name:
        problem = f"{shown(name)} is no name of a picture; write one, or a list of them"
    elif name.startswith(("http://", "https://")):
        problem = f"{short(name)} is a web address; download the picture and write its path"
    elif name.startswith("data:") or len(name) > 4096:
        problem = f"{shown(name)} is a picture itself; write it as a file and name that"
    if problem:
        raise ValueError(f"{key}: {problem}")
    return name.removeprefix("file://")


def shown(value):
    """The beginning of a value, for a message."""
    return short(json.dumps(value))[:40]
