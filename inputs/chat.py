"""A row in any dialect -> token ids and labels, made together."""
import functools
import json
import numpy as np



# ---- templates and rendering --------------------------------------------------------------------------------------
# facts of the released models' conversation files
TEMPLATES = {
    "sailvl-chat": {"system": "你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。", "sep": ""},
    "internvl2_5": {"system": "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
                    "sep": "\n"}}
CAPTION_PROMPT = "Please describe the image."                          # asked where a source has bare captions
IGNORE = -100                                                          # label of a position that predicts nothing

def chat_ids(tokenizer, template, turns, n_tiles, tokens_per_tile):
    """Prompt ids up to and including `assistant\\n` for turns [(user, assistant), ..., (user, None)].
    n_tiles: tiles of each image, in the order of the `<image>` placeholders; without any, the images go first."""
    images = [[tokenizer.image_id] * (n * tokens_per_tile) for n in n_tiles]
    return join_segments(segments(tokenizer, template, place_images(turns, len(images)), images))[0]

def place_images(turns, n_images):
    """Turns whose `<image>` placeholders number n_images; if none is written, one per image heads the first turn."""
    written = sum(user.count("<image>") for user, _ in turns)
    if written == 0: return [("<image>\n" * n_images + turns[0][0], turns[0][1]), *turns[1:]]
    if written != n_images:
        raise ValueError(f"human turns: {written} <image> placeholders for {n_images} images; write one each, or none")
    return turns

@functools.lru_cache(4)
def _fixed(tokenizer, template):
    """Ids that every prompt of a template has: the system turn; what opens a question, an answer; marks."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose from {', '.join(TEMPLATES)}")
    facts = TEMPLATES[template]
    system, sep, head = map(tokenizer.encode, ("system\n" + facts["system"], facts["sep"], "assistant\n"))
    marks = start, end, *_ = [[tokenizer.special[t]] for t in ("<|im_start|>", "<|im_end|>", "<img>", "</img>")]
    return start + system + end, sep + start, end + sep + start + head, *marks

def segments(tokenizer, template, turns, images, system=None):
    """Yield (ids, whether they are supervised) in order. images: the ids between <img> and </img>."""
    intro, ask, answer, start, end, img, img_end = _fixed(tokenizer, template)
    images, encode = iter(images), tokenizer.encode
    yield start + encode("system\n" + system) + end if system else intro, False
    for user, assistant in turns:
        before, *after = ("user\n" + user).split("<image>")
        yield ask + encode(before), False
        for text in after:
            yield img + next(images) + img_end + encode(text), False
        yield answer, False
        if assistant is not None:
            yield encode(assistant) + end, True

def join_segments(segments):
    """(ids, targets) of segments: targets[t] is ids[t] where supervised, else IGNORE."""
    ids, targets = [], []
    for new, supervised in segments:
        ids += new
        targets += new if supervised else [IGNORE] * len(new)
    return ids, targets

def need_cells(row):
    if not row.get("cells"):
        raise ValueError("--image_as=words and --cell_labels need `cells`, which only toy data has")

def row_segments(row, tokenizer, template, n_tiles, tokens_per_tile, image_as):
    """The segments of a record. image_as "words": one visual token for each of its cells."""
    if image_as == "words": need_cells(row)
    counts = map(len, row["cells"]) if image_as == "words" else (n * tokens_per_tile for n in n_tiles)
    images, (system, turns) = [[tokenizer.image_id] * n for n in counts], conversation(row)
    return segments(tokenizer, template, place_images(turns, len(images)), images, system)

def render(row, tokenizer, template, n_tiles, tokens_per_tile, image_as="pixels", cell_labels="none"):
    """Token ids and labels of a record in one pass, so that they cannot disagree.
    n_tiles: tiles of each of the row's images. Returns (ids (T,), labels (T,)), int64; labels[t] is the token that
    position t must predict, IGNORE where nothing is supervised: only answers and their <|im_end|> are.
    image_as "words": a visual token for each of the row's `cells`, see cell_words (text-only base models).
    cell_labels "also": the label of each visual token is its cell's first word; "only": nothing else is supervised, and
    of every second visual token, the first or the second by the row's id, it is the last word."""
    if cell_labels != "none" and n_tiles: need_cells(row)
    ids, targets = map(np.array, join_segments(row_segments(row, tokenizer, template, n_tiles, tokens_per_tile, image_as)))
    labels, visual = np.append(targets[1:], IGNORE), ids == tokenizer.image_id
    if cell_labels == "only":
        labels[:] = IGNORE
    if cell_labels != "none" and visual.any():                         # not while an index is made, without tiles
        words = np.concatenate([cell_words(cells, tokenizer) for cells in row["cells"]])               # (tokens, W)
        last = (np.arange(len(words)) + sum(row["id"].encode())) % 2 * (cell_labels == "only") == 1
        labels[visual] = np.where(last, words[:, -1], words[:, 0])
    return ids, labels

def cell_words(cells, tokenizer):
    """Cells of one toy picture, such as "LargeRedCircle TopLeft" -> ids of their words (cells, W), int64. A model that
    is shown words sees the sum of their embeddings where a visual token would be: what is there, and where."""
    return np.array([[tokenizer.encode(" " + word)[0] for word in cell.split()] for cell in cells])

def conversation(row):
    """(system or None, [(user, assistant), ...]) of a row in any of the three forms; ValueError if it is broken."""
    name = "conversations" if "conversations" in row else "messages" if "messages" in row else None
    if name is None:
        text = row.get("caption", row.get("text"))
        if not isinstance(text, str) or not text.strip():
            raise ValueError(row.get("unreadable") or "no conversations, messages, caption or text in this row, or an "
                             "empty one; write it")
        return None, [(CAPTION_PROMPT, text.strip())]
    roles, texts = [], []
    if not isinstance(row[name], list) or not all([isinstance(turn, dict) for turn in row[name]]):
        raise ValueError(f'{name}: not a list of turns; write [{{"from": "human", "value": "..."}}, ...]')
    for k, turn in enumerate(row[name]):
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(text, list):                                     # message parts: text and images in place
            kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in text}
            if strange := kinds - {"text", "image", "image_url"}:
                raise ValueError(f"{name}[{k}]: a part of type {strange.pop()!r}; there are text, image and image_url")
            text = "".join(part["text"] if part["type"] == "text" else "<image>\n" for part in text)
        if not isinstance(text, str) or not text.strip():
            kind = "empty" if isinstance(text, str) else f"{json.dumps(text)[:40]} instead of text in the"
            raise ValueError(f"{name}[{k}]: {kind} {role} turn; write its text or remove the turn")
        roles.append({"human": "user", "gpt": "assistant"}.get(str(role), role))
        texts.append(text)
    system = texts.pop(0) if roles[:1] == ["system"] else None
    if not texts or roles[-len(texts):] != ["user", "assistant"] * (len(texts) // 2):
        raise ValueError(f"{name}: turns must alternate human/user, gpt/assistant and end with the latter, not {roles}")
    return system, [*zip(texts[::2], texts[1::2])]

def image_names(row):
    """Names of the row's images, in order."""
    if "video" in row:
        raise ValueError("a video; there are only images here")
    names = row.get("image", row.get("images", []))
    names = names[:] if isinstance(names, list) else [names] if names else []
    for turn in row.get("messages") or []:
        if isinstance(turn, dict) and isinstance(turn.get("content"), list):
            names += [p["image_url"]["url"].removeprefix("file://") if p["type"] == "image_url" else
                      p.get("image", p.get("path")) for p in turn["content"] if p.get("type") in ("image", "image_url")]
    if not all([isinstance(name, str) for name in names]):
        raise ValueError(f"image: {names} are no names of pictures; write one, or a list of them")
    return names
