"""Which keys a row, a turn and a part of a message may have, and what is done with each.

A key is used, or ignored by name, or its row is refused by name. Other keys are ignored too, but
named with their counts by `data.py check` and at the start of a run. docs/data.md has the table.
"""
import re

# Names of pictures. If several of them hold something, they have to agree.
PICTURE_KEYS = ("image", "images", "image_path", "file_name")
TURNS_KEYS = ("conversations", "messages")
CAPTION_KEYS = ("caption", "text")
ROW_USED = {"id", "system", *PICTURE_KEYS, *TURNS_KEYS, *CAPTION_KEYS}
# Facts about a row: of img2dataset, of LAION, of curation/, and of toy/.
ROW_IGNORED = set("""
    sha256 md5 hash width height original_width original_height exif url key status error_message
    similarity clip_similarity aesthetic aesthetic_score nsfw punsafe pwatermark watermark license
    language lang source source_id dataset category task split length dhash tone origin alt_text
    caption_before cluster mode scores by prompt_sha256 ocr cells duplicate_of unreadable
    """.split())
NO_VIDEO = "a video; there are only images here"
NO_AUDIO = "a sound; there are only images here"
NO_TOOLS = "the template has no tools; write them into the system turn"
NOT_A_PICTURE_KEY = "this key is not read; name the pictures of a row in its image"
ANOTHER_ANSWER = "a second answer, which is not trained on; remove it"
# {key: what is wrong}. None, "", [] and {} are no content and pass.
ROW_REFUSED = {
    "video": NO_VIDEO,
    "videos": NO_VIDEO,
    "video_path": NO_VIDEO,
    "audio": NO_AUDIO,
    "audios": NO_AUDIO,
    "audio_path": NO_AUDIO,
    "tools": NO_TOOLS,
    "functions": NO_TOOLS,
    "history": "earlier turns in a key of their own; write them into conversations",
    "objects": "boxes in a key of their own; write them into the text: <box>[[x, y, x, y]]</box>",
    "system_prompt": "this key is not read; call it system",
    "rejected": ANOTHER_ANSWER,
    "rejected_response": ANOTHER_ANSWER,
    "rejected_messages": ANOTHER_ANSWER,
    "chosen": "this key is not read; write the answer into conversations",
}
# Words of a dialogue. They would be lost beside a caption; beside turns they are only notes.
DIALOGUE_KEYS = set("""
    question answer prompt completion instruction input output query response conversation
    dialog dialogue turns chat qa
    """.split())
# Flags of a turn or row that say whether it is supervised.
LOSS_KEYS = ("loss", "weight")
TURN_USED = {"from", "role", "value", "content", *LOSS_KEYS}
TURN_IGNORED = {"id", "name", "timestamp"}
NO_CALLS = "calls of tools are not rendered; write them into the text: <tool_call>...</tool_call>"
NO_THOUGHTS = "thoughts in a key of their own; write them into the text of the turn"
TURN_REFUSED = {
    "tool_calls": NO_CALLS,
    "tool_call_id": NO_CALLS,
    "function_call": NO_CALLS,
    "reasoning_content": NO_THOUGHTS,
    "reasoning": NO_THOUGHTS,
    "thinking": NO_THOUGHTS,
}
# A key that sounds like a picture, a video or a sound, whatever its spelling.
WORD = r"(image|img|picture|pic|photo|video|audio)s?"
PLACE = r"(path|file|file_?name|name|bytes|base64|b64|data|list|\d+)s?"
MEDIA_KEY = re.compile(rf"{WORD}([_-]?{PLACE})?|{PLACE}[_-]{WORD}", re.IGNORECASE)
# Such keys may be a note where the pictures are named elsewhere.
NOTE_KEY = re.compile(rf"{WORD}[_-]?(url|uri|link|src)s?|thumbnail\w*|file_?paths?|file_?names?|"
                      "paths?|files?|media", re.IGNORECASE)
PICTURE_NAME = re.compile(r"[^\n]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl)(\?.*)?"
                          "|data:image/.*", re.IGNORECASE | re.DOTALL)
# Ways to write a picture's place in a text that are not <image>.
WRONG_TAG = re.compile(r"(?!<(?-i:image)>)<\|?\s*image[ _-]?(\d+|here|placeholder|token)?\s*[/|]?>"
                       r"|<img>[^<>\s]+\.\w{3,4}</img>", re.IGNORECASE)


def is_empty(value):
    """Whether a key holds nothing, as the columns of a table do that a row has no use for."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def check_row_keys(row):
    """ValueError if a key of a row holds something that would be lost."""
    for key, value in row.items():
        if key in ROW_USED or key in ROW_IGNORED or is_empty(value):
            continue
        if key in LOSS_KEYS and value != 1:
            raise ValueError(f"{key}: {value!r}: rows have no weights of their own; remove the "
                             "row, or write the flag into its turns")
        reason = ROW_REFUSED.get(key.lower())
        if reason is None and MEDIA_KEY.fullmatch(key):
            reason = NOT_A_PICTURE_KEY
        if reason is None and key.lower() in ("system", *TURNS_KEYS):
            reason = f"this key is not read; call it {key.lower()}"
        if reason:
            raise ValueError(f"{short(key)}: {reason}")


def check_caption_keys(row):
    """ValueError if a row without turns has words of a dialogue beside its caption."""
    for key, value in row.items():
        if key.lower() in DIALOGUE_KEYS and not is_empty(value):
            raise ValueError(f"{short(key)}: this key is not read; write question and answer as "
                             "conversations")


def check_no_picture_is_lost(row):
    """ValueError if a row in which no picture was found has a key that seems to name one."""
    for key, value in row.items():
        if key in ROW_USED or is_empty(value):
            continue
        values = value if isinstance(value, list) else [value]
        named = any(isinstance(v, str) and PICTURE_NAME.fullmatch(v) for v in values)
        if named or NOTE_KEY.fullmatch(key):
            raise ValueError(f"{short(key)}: {NOT_A_PICTURE_KEY}, or remove the key")


def check_turn_keys(turn, where):
    """ValueError if a key of a turn holds something that would be lost."""
    for key, value in turn.items():
        if key in TURN_USED or key in TURN_IGNORED or is_empty(value):
            continue
        reason = TURN_REFUSED.get(key.lower())
        if reason is None and MEDIA_KEY.fullmatch(key):
            reason = "a picture inside a turn; name it in the row's image"
        if reason is None and key.lower() in TURN_USED:
            reason = f"this key is not read; call it {key.lower()}"
        if reason:
            raise ValueError(f"{where}: {short(key)}: {reason}")


def check_tags(text, where):
    """ValueError if a text marks the place of a picture in a way that is not read."""
    found = WRONG_TAG.search(text)
    if found:
        raise ValueError(f"{where}: {short(found[0])} is not read; write <image> where the picture "
                         "stands, and name the pictures in the row's image in this order")


def unknown_keys(row):
    """The keys of a row and of its turns that are ignored without being known, as a set."""
    known = ROW_USED | ROW_IGNORED
    found = {short(key) for key in row if key not in known and not is_empty(row[key])}
    for field in TURNS_KEYS:
        turns = row.get(field)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                others = turn.keys() - TURN_USED - TURN_IGNORED
                found |= {short(f"{field}[].{key}") for key in others if not is_empty(turn[key])}
    return found


def short(text):
    """A text of a stranger for a message: not too long, on one line, without control codes."""
    return ascii(text)[1:-1][:60]
