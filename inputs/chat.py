"""A row in any dialect -> token ids and labels, made together.

Shapes: T tokens of a sample.
"""
import functools
import json

import numpy as np

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
    system, turns = conversation(row)
    images = image_ids(tokenizer, n_tiles, tokens_per_tile)
    return segments(tokenizer, template, place_images(turns, len(images)), images, system)


def chat_ids(tokenizer, template, turns, n_tiles, tokens_per_tile):
    """Prompt ids, up to and including `assistant\\n`, of turns [(user, assistant), ...].

    The last assistant is None. n_tiles: tiles of each image, in the order of the `<image>`
    placeholders. If no placeholder is written, the images go first.
    """
    images = image_ids(tokenizer, n_tiles, tokens_per_tile)
    turns = place_images(turns, len(images))
    ids, _ = join_segments(segments(tokenizer, template, turns, images))
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


def segments(tokenizer, template, turns, images, system=None):
    """Yield (ids, whether they are supervised) of a conversation, in order.

    images: the ids between <img> and </img> of each `<image>` in the turns; system: a message in
    place of the template's.
    """
    fixed = fixed_ids(tokenizer, template)
    encode = tokenizer.encode
    images = iter(images)
    if system:
        yield fixed["start"] + encode("system\n" + system) + fixed["end"], False
    else:
        yield fixed["system"], False
    for user, assistant in turns:
        before, *after = ("user\n" + user).split("<image>")
        yield fixed["ask"] + encode(before), False
        for text in after:
            yield fixed["img"] + next(images) + fixed["img_end"] + encode(text), False
        yield fixed["answer"], False
        if assistant is not None:
            yield encode(assistant) + fixed["end"], True


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
    if "conversations" in row:
        field = "conversations"
    elif "messages" in row:
        field = "messages"
    else:
        return None, [(CAPTION_PROMPT, bare_caption(row))]
    turns = row[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'{field}: not a list of turns; '
                         'write [{"from": "human", "value": "..."}, ...]')
    roles = []
    texts = []
    for k, turn in enumerate(turns):
        role = turn.get("from", turn.get("role"))
        texts.append(turn_text(turn, role, f"{field}[{k}]"))
        roles.append(ROLES.get(str(role), role))
    system = None
    if roles[:1] == ["system"]:
        system = texts.pop(0)
    if not texts or roles[-len(texts):] != ["user", "assistant"] * (len(texts) // 2):
        raise ValueError(f"{field}: turns must alternate human/user, gpt/assistant and end with "
                         f"the latter, not {roles}")
    return system, list(zip(texts[::2], texts[1::2], strict=True))


def bare_caption(row):
    """The caption of a row without turns; ValueError if it is missing or empty."""
    text = row.get("caption")
    if text is None:
        text = row.get("text")
    if isinstance(text, str) and text.strip():
        return text.strip()
    raise ValueError(row.get("unreadable") or
                     "no conversations, messages, caption or text in this row, or an empty one; "
                     "write it")


def turn_text(turn, role, where):
    """The text of a turn, with `<image>` in place of images; `where` names it in errors."""
    text = turn.get("value", turn.get("content"))
    # OpenAI's message parts have text and images in place.
    if isinstance(text, list):
        text = "".join(part_text(part, where) for part in text)
    if isinstance(text, str) and text.strip():
        return text
    problem = "empty"
    if not isinstance(text, str):
        problem = f"{json.dumps(text)[:40]} instead of text in the"
    raise ValueError(f"{where}: {problem} {role} turn; write its text or remove the turn")


def part_text(part, where):
    """The text of one part of an OpenAI message."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in PART_TYPES:
        raise ValueError(f"{where}: a part of type {kind!r}; there are text, image and image_url")
    return part["text"] if kind == "text" else "<image>\n"


def image_names(row):
    """Names of the row's images, in order."""
    if "video" in row:
        raise ValueError("a video; there are only images here")
    names = row.get("image", row.get("images", []))
    if isinstance(names, list):
        names = list(names)
    else:
        names = [names] if names else []
    for turn in row.get("messages") or []:
        if isinstance(turn, dict) and isinstance(turn.get("content"), list):
            names += [part_image(p) for p in turn["content"] if p.get("type") in PART_TYPES[1:]]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"image: {names} are no names of pictures; write one, or a list of them")
    return names


def part_image(part):
    """The name of the image of one part of an OpenAI message."""
    if part["type"] == "image_url":
        return part["image_url"]["url"].removeprefix("file://")
    return part.get("image", part.get("path"))
