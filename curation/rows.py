"""What the fields of a row may be, checked once, when a record is read.

Rows come from anywhere. A stage says which fields it reads; a row in which one of them is missing
or of another kind is dropped with a reason that names it: no_sha256, bad_scores.
"""
import re

from inputs.chat import place_images
from inputs.dialogue import check_pictures, conversation
from inputs.images import MAX_PIXELS
from inputs.records import UNREADABLE, not_blank
from inputs.row_keys import CAPTION_KEYS, dialogue_forms

# Fields that only `collect` writes, in hexadecimal.
HEX_FIELDS = {
    "dhash": re.compile(r"[0-9a-f]{16}"),
    "tone": re.compile(r"[0-9a-f]{96}"),
    "sha256": re.compile(r"[0-9a-f]{64}"),
}
# A row without one of these cannot be compared with others.
REQUIRED_FIELDS = ("id", "dhash", "tone", "sha256", "source", "width", "height")
# What a judge gives points for, by prompt. SAIL-VL2 scores captions by richness and alignment.
SCORE_NAMES = {
    "score": ("richness", "alignment"),
    "sft_quality": ("difficulty", "complexity", "relevance"),
}
# Python's reader and writer of JSON nest up to about 1000 levels, depending on who calls them.
MAX_DEPTH = 100


def row_problem(row, fields, n_pictures):
    """Why a row with so many pictures is dropped, or None.

    fields: those that the stage reads, in order. "caption" stands for the text of a row without
    turns, "dialogue" for what is trained on, and "first_text" for what `collect` takes as alt-text.
    """
    if is_deeper(row, MAX_DEPTH):
        return "bad_row"
    for field in fields:
        if field == "first_text":
            field = first_text_field(row)
        if field == "dialogue":
            problem = dialogue_problem(row, n_pictures)
        elif field == "first_answer":
            problem = dialogue_problem(row)
        else:
            problem = field_problem(row, field)
        if problem:
            return problem
    return None


def first_text_field(row):
    """Which field of a source's row holds its alt-text."""
    if row.get("alt_text"):
        return "alt_text"
    return "first_answer" if dialogue_forms(row) or row.get("unreadable") else "caption"


def dialogue_problem(row, n_pictures=None):
    """Why training could not read a row. n_pictures: None if they do not matter."""
    if not dialogue_forms(row) and n_pictures and not not_blank(bare_text(row)):
        return "no_caption"
    try:
        _, turns = conversation(row)
        if n_pictures is not None:
            place_images(turns, n_pictures)
            check_pictures(row, n_pictures)
    except UNREADABLE:
        return "bad_row"
    return None


def field_problem(row, field):
    """Why a field is missing or not what it should be, or None."""
    if field == "caption" and two_captions(row):
        return "bad_caption"
    value = bare_text(row) if field == "caption" else row.get(field)
    if value is None:
        return f"no_{field}" if field in REQUIRED_FIELDS else None
    return None if is_good(field, value) else f"bad_{field}"


def is_deeper(value, levels):
    """Whether lists and objects are nested deeper than this."""
    if not isinstance(value, (dict, list)):
        return False
    if levels == 0:
        return True
    parts = value.values() if isinstance(value, dict) else value
    return any(is_deeper(part, levels - 1) for part in parts)


def is_good(field, value):
    """Whether a field may have this value, which is not None."""
    if field in HEX_FIELDS:
        return isinstance(value, str) and bool(HEX_FIELDS[field].fullmatch(value))
    if field in ("width", "height"):
        return type(value) is int and 1 <= value <= MAX_PIXELS
    if field == "id":
        return isinstance(value, str) or is_number(value)
    if field == "by":
        return isinstance(value, dict)
    if field == "scores":
        judged = {name for names in SCORE_NAMES.values() for name in names}
        return isinstance(value, dict) and all(
            is_number(value[name]) for name in judged & value.keys())
    return isinstance(value, str)


def is_number(value):
    """Whether this is an int or a float, and neither a bool nor NaN nor infinite."""
    return type(value) in (int, float) and -1e99 < value < 1e99


def bare_text(row):
    """The caption of a row, or its text where that says nothing; None without either."""
    caption = row.get("caption")
    if not_blank(caption) or row.get("text") is None:
        return caption
    return row["text"]


def two_captions(row):
    """Whether a row has a caption and another text beside it, which training refuses too."""
    texts = [row.get(key) for key in CAPTION_KEYS]
    return all(isinstance(text, str) and text.strip() for text in texts) and (
        texts[0].strip() != texts[1].strip())


def row_caption(row):
    """The caption of a checked row, "" without one."""
    return bare_text(row) or ""


def row_scores(row):
    """The scores of a checked row, {} without any."""
    return row.get("scores") or {}


def find_alt_text(row):
    """A checked row's alt-text, else the first answer of its dialogue or its caption, else ""."""
    field = first_text_field(row)
    if field == "alt_text":
        return row["alt_text"]
    if field == "first_answer":
        _, turns = conversation(row)
        return turns[0][1]
    return row_caption(row).strip()


def without_surrogates(text):
    """The text without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()
