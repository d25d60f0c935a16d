"""The pictures of a row: their names in order, or the pictures themselves as base64."""
import base64
import re
import urllib.parse

from inputs.dialogue import form_turns, shown
from inputs.row_keys import (
    NO_AUDIO,
    NO_VIDEO,
    PICTURE_BASE64,
    PICTURE_KEYS,
    dialogue_forms,
    is_empty,
    short,
)

# s3://, gs://, hf://, ftp:// and others. file:// is a path.
WEB_ADDRESS = re.compile(r"(?!file://)[A-Za-z][A-Za-z0-9+.-]*://")


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
    for form in dialogue_forms(row):
        parts = [part for _, turn in form_turns(row, form) for part in image_parts(turn)]
        check_part_order(parts)
        in_parts = [name for name in map(part_image, parts) if name is not None]
        if in_parts:
            found[form[0]] = in_parts
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
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
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
        keys = [key for key in ("image", "path", "url", "base64") if not is_empty(part.get(key))]
        if len(keys) > 1:
            raise ValueError(f"{' and '.join(keys)} in one part of a message; keep one")
        return part[keys[0]] if keys else None
    place = part.get("image_url")
    return place.get("url") if isinstance(place, dict) else place


def checked_image_name(name, key):
    """The path or inline picture that a value names; ValueError if it is neither."""
    problem = ""
    if not isinstance(name, str) or not name or "\0" in name:
        problem = f"{shown(name)} is no name of a picture; write one, or a list of them"
    elif is_inline(name):
        problem = data_uri_problem(name)
    elif WEB_ADDRESS.match(name):
        problem = f"{short(name)} is a web address; download the picture and write its path"
    elif len(name) > 4096:
        problem = (f"{shown(name)} is no path, nor base64 of a JPEG, PNG, GIF or WEBP; write "
                   "data:image/...;base64,... or a path")
    if problem:
        raise ValueError(f"{key}: {problem}")
    return name.removeprefix("file://")


# ---- pictures inside a row ----------------------------------------------------------------------

def is_inline(name):
    """Whether the value of a picture's key is the picture itself: a data URI or base64."""
    return name.startswith("data:") or (name.startswith(PICTURE_BASE64) and "." not in name)


def picture_source(folder, name):
    """What a name stands for, as load_image takes it: the bytes of an inline picture, or a path."""
    return inline_bytes(name) if is_inline(name) else folder / name


def data_uri_problem(name):
    """Why an inline picture is no data URI of a picture, or ""."""
    head, _, _ = name[:100].partition(",")
    if head.startswith("data:video/"):
        return f"{short(head)}: {NO_VIDEO}"
    if head.startswith("data:audio/"):
        return f"{short(head)}: {NO_AUDIO}"
    if head.startswith("data:") and not head.endswith(";base64"):
        return f"{short(head)} is not base64; write data:image/...;base64,..."
    return ""


def inline_bytes(name):
    """Bytes of a picture inside a row; ValueError if its base64 is broken."""
    content = name
    if name.startswith("data:"):
        content = urllib.parse.unquote(name.partition(",")[2])
    try:
        # Some writers break it into lines.
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as e:
        raise ValueError(f"broken base64 of {len(content):,} characters ({e}); "
                         "write the picture again") from None
