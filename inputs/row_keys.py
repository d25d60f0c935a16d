"""Which keys a row, a turn and a part of a message may have, and what is done with each.

A key is used, or ignored by name, or its row is refused by name. Other keys are ignored too, but
named with their counts by `data.py check` and at the start of a run. docs/data.md has the table.
"""
import re

# Names of pictures. If several of them hold something, they have to agree.
PICTURE_KEYS = ("image", "images", "image_path", "file_name")
TURNS_KEYS = ("conversations", "messages")
# A row may have its dialogue as one of these questions and one of these answers.
QUESTION_WORDS = ("prompt", "question", "query", "instruction")
ANSWER_WORDS = ("completion", "answer", "response", "output")
PAIR_WORDS = (*QUESTION_WORDS, *ANSWER_WORDS)
CAPTION_KEYS = ("caption", "text")
ROW_USED = {"id", "system", *PICTURE_KEYS, *TURNS_KEYS, *CAPTION_KEYS}
# Facts about a row: of img2dataset, of LAION, of FineVision, of curation/, and of toy/.
ROW_IGNORED = set("""
    sha256 md5 hash width height original_width original_height exif url key status error_message
    similarity clip_similarity aesthetic aesthetic_score nsfw punsafe pwatermark watermark license
    language lang source source_id dataset category task split length dhash tone origin alt_text
    caption_before cluster mode scores by prompt_sha256 ocr cells duplicate_of unreadable
    width_list height_list relevance_ratings relevance_min visual_dependency_ratings
    visual_dependency_min image_correspondence_ratings image_correspondence_min formatting_ratings
    formatting_min
    """.split())
NO_VIDEO = "a video; there are only images here, write its frames as images or remove the row"
NO_AUDIO = "a sound; there are only images here, write it as text or remove the row"
NO_TOOLS = "the template has no tools; write them into the system turn"
NOT_A_PICTURE_KEY = "this key is not read; name the pictures of a row in its image"
ANOTHER_ANSWER = "a second answer, which is not trained on; remove it"
WANTED_OR_NOT = "whether the answer is wanted; keep the rows with wanted ones, without this key"
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
    "kto_tag": WANTED_OR_NOT,
}
# Words of a dialogue. They would be lost beside a caption; beside turns they are only notes.
DIALOGUE_KEYS = {*PAIR_WORDS, *"input conversation dialog dialogue turns chat qa".split()}
# They would be lost beside a question and an answer.
OPTION_KEYS = set("choices options hint context".split())
# Flags of a turn or row that say whether it is supervised.
LOSS_KEYS = ("loss", "weight")
TURN_USED = {"from", "role", "value", "content", *LOSS_KEYS}
TURN_IGNORED = {"id", "name", "timestamp"}
# Of a pair in texts.
PAIR_USED = {"user", "assistant"}
PAIR_IGNORED = {"source"}
NO_CALLS = "calls of tools are not rendered; write them into the text: <tool_call>...</tool_call>"
NO_THOUGHTS = "thoughts in a key of their own; write them into the text of the turn"
NOT_A_TEXT_KEY = "this key is not read; call it value or content"
TURN_REFUSED = {
    "text": NOT_A_TEXT_KEY,
    "refusal": NOT_A_TEXT_KEY,
    "tool_calls": NO_CALLS,
    "tool_call_id": NO_CALLS,
    "function_call": NO_CALLS,
    "reasoning_content": NO_THOUGHTS,
    "reasoning": NO_THOUGHTS,
    "thinking": NO_THOUGHTS,
}
# What is read of a part of a message, by its type. An image_url may hold an url.
PART_KEYS = {
    "text": ("text",),
    "image": ("image", "path", "url", "base64", "index"),
    "image_url": ("image_url", "index"),
}
PART_USED = {"type", "text", "image", "path", "url", "base64", "image_url", "index"}
# How another model would see the picture.
PART_IGNORED = set("""
    detail min_pixels max_pixels resized_height resized_width cache_control
    """.split())
# A key that sounds as if it said what is learned, whatever its spelling.
LEARN_KEY = re.compile(
    r"(do_?|no_?)?(train|trained|trainable|training|learn|supervised?|mask|masked|ignored?|skip|"
    r"exclude)|loss[_-]?\w+|(sample|token|turn|row)_?weights?", re.IGNORECASE)
# A key that sounds like a picture, a video or a sound, whatever its spelling.
WORD = r"(image|img|picture|pic|photo|video|audio)s?"
PLACE = r"(path|file|file_?name|name|bytes|base64|b64|data|list|\d+)s?"
MEDIA_KEY = re.compile(rf"{WORD}([_-]?{PLACE})?|{PLACE}[_-]{WORD}", re.IGNORECASE)
# Such keys may be a note where the pictures are named elsewhere.
NOTE_KEY = re.compile(rf"{WORD}[_-]?(url|uri|link|src)s?|{WORD}[_-]\w+|\w+[_-]{WORD}|thumbnail\w*|"
                      "file_?paths?|file_?names?|paths?|files?|media", re.IGNORECASE)
PICTURE_NAME = re.compile(r"[^\n]+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl)(\?.*)?"
                          "|data:image/.*", re.IGNORECASE | re.DOTALL)
# How base64 of a JPEG, PNG, GIF and WEBP begins.
PICTURE_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
# Ways to write a picture's place in a text that are not <image>.
WRONG_TAG = re.compile(
    r"(?!<(?-i:image)>)<\|?\s*image[ _-]?(\d+|here|placeholder|token|soft_token)?\s*[/|]?>"
    r"|<image>[^<>]{,20}</image>|<img>[^<>\s]+\.\w{3,4}</img>|<im_patch>"
    r"|<\|vision_start\|><\|image_pad\|>", re.IGNORECASE)
# The place of what is not read. HTML may name <video>; before a question it is the place of one.
OTHER_TAG = re.compile(r"<bbox>|<ref-object>|<\|vision_start\|><\|video_pad\|>"
                       r"|^(?:\s|<image>)*(<(video|audio|speech)>)", re.IGNORECASE)


def is_empty(value):
    """Whether a key holds nothing, as the columns of a table do that a row has no use for."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def dialogue_forms(row):
    """The keys in which a row has a dialogue, a tuple for each way in which it has one.

    None of them: it is a bare caption. Rows with several are refused when they are read.
    """
    forms = [(key,) for key in TURNS_KEYS if row.get(key) is not None]
    pairs = row.get("texts")
    if isinstance(pairs, list) and pairs and all(isinstance(pair, dict) for pair in pairs):
        forms.append(("texts",))
    if forms:
        return forms
    questions = [key for key in QUESTION_WORDS if not is_empty(row.get(key))]
    answers = [key for key in ANSWER_WORDS if not is_empty(row.get(key))]
    return [(question, answer) for question in questions for answer in answers]


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
        if reason is None and key not in LOSS_KEYS and LEARN_KEY.fullmatch(key):
            reason = "this key is not read; remove the row or the key, or write loss: 0 into a turn"
        if reason is None and key.lower() in ("system", *TURNS_KEYS):
            reason = f"this key is not read; call it {key.lower()}"
        if reason:
            raise ValueError(f"{short(key)}: {reason}")


def check_caption_keys(row):
    """ValueError if a row without turns has words of a dialogue beside its caption."""
    for key, value in row.items():
        if key.lower() not in DIALOGUE_KEYS or is_empty(value):
            continue
        reason = "this key is not read; write question and answer as conversations"
        if key in QUESTION_WORDS:
            reason = "a question without an answer; write it as answer"
        if key in ANSWER_WORDS:
            reason = "an answer without a question; write it as question"
        raise ValueError(f"{short(key)}: {reason}")


def check_beside_pair(row):
    """ValueError if a row of a question and an answer has words of either in another key."""
    for key, value in row.items():
        if is_empty(value) or key.lower() in PAIR_WORDS:
            continue
        if key.lower() in DIALOGUE_KEYS | OPTION_KEYS:
            raise ValueError(f"{short(key)}: not read beside a question and an answer; write it "
                             "into the question, or all as conversations")
        # In TRL's rows of preferences.
        if key == "label" and isinstance(value, bool):
            raise ValueError(f"label: {WANTED_OR_NOT}")


def check_no_picture_is_lost(row):
    """ValueError if a row in which no picture was found has a key that seems to name one."""
    used = ROW_USED.union(*dialogue_forms(row))
    for key, value in row.items():
        # A number of pictures may be 0.
        if key in used or is_empty(value) or value == 0:
            continue
        if NOTE_KEY.fullmatch(key) or holds_a_picture(value):
            raise ValueError(f"{short(key)}: {NOT_A_PICTURE_KEY}, or remove the key")


def holds_a_picture(value):
    """Whether a value looks like a picture or its name, or holds one at any depth."""
    if isinstance(value, str):
        return bool(PICTURE_NAME.fullmatch(value)) or (
            len(value) > 99 and value.startswith(PICTURE_BASE64))
    if isinstance(value, dict):
        return any(MEDIA_KEY.fullmatch(key) and not is_empty(part) or holds_a_picture(part)
                   for key, part in value.items())
    return isinstance(value, list) and any(map(holds_a_picture, value))


def check_turn_keys(turn, where):
    """ValueError if a key of a turn holds something that would be lost."""
    for key, value in turn.items():
        if key in TURN_USED or key in TURN_IGNORED or is_empty(value):
            continue
        reason = TURN_REFUSED.get(key.lower())
        if reason is None and MEDIA_KEY.fullmatch(key):
            reason = ROW_REFUSED.get(
                key.lower(), "a picture inside a turn; name it in the row's image")
        if reason is None and key.lower() in TURN_USED:
            reason = f"this key is not read; call it {key.lower()}"
        if reason is None and LEARN_KEY.fullmatch(key):
            reason = "this key is not read; a turn that is not learned has loss: 0"
        if reason:
            raise ValueError(f"{where}: {short(key)}: {reason}")


def check_part_keys(part, read, where):
    """ValueError if a key of a part of a message holds something that would be lost.

    read: the keys that are read of a part of its type.
    """
    for key, value in part.items():
        if key in ("type", *read) or key in PART_IGNORED or is_empty(value):
            continue
        reason = None
        if key.lower() in PART_USED or MEDIA_KEY.fullmatch(key):
            reason = f"not read in a part of type {part['type']!r}; write it as a part of its own"
        if key in LOSS_KEYS or LEARN_KEY.fullmatch(key):
            reason = "not read in a part; a turn is learned or not, write loss: 0 into the turn"
        if reason:
            raise ValueError(f"{where}: {short(key)}: {reason}")


def check_tags(text, where):
    """ValueError if a text marks the place of a picture in a way that is not read."""
    if "<" not in text:  # most texts, and the expressions are slow
        return
    found = WRONG_TAG.search(text)
    if found:
        raise ValueError(f"{where}: {short(found[0])} is not read; write <image> where the picture "
                         "stands, and name the pictures in the row's image in this order")
    found = OTHER_TAG.search(text)
    if found:
        raise ValueError(f"{where}: {short(found[1] or found[0])} is not read: there are no videos "
                         "or sounds, and a box is written <box>[[x, y, x, y]]</box>")


def unknown_keys(row):
    """The keys of a row, its turns and their parts that are ignored without being known, a set."""
    forms = dialogue_forms(row)
    known = ROW_USED.union(ROW_IGNORED, *forms)
    found = {short(key) for key in row if key not in known and not is_empty(row[key])}
    if ("texts",) in forms:
        for pair in row["texts"]:
            others = pair.keys() - PAIR_USED - PAIR_IGNORED
            found |= {short(f"texts[].{key}") for key in others if not is_empty(pair[key])}
    for field in TURNS_KEYS:
        turns = row.get(field)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                others = turn.keys() - TURN_USED - TURN_IGNORED
                found |= {short(f"{field}[].{key}") for key in others if not is_empty(turn[key])}
                found |= unknown_part_keys(turn)
    return found


def unknown_part_keys(turn):
    """The keys of the parts of a turn that are ignored without being known."""
    found = set()
    for field in ("content", "value"):
        parts = turn.get(field)
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                others = part.keys() - PART_USED - PART_IGNORED
                found |= {short(f"{field}[].{key}") for key in others if not is_empty(part[key])}
    return found


def short(text):
    """A text of a stranger for a message: not too long, on one line, without control codes."""
    return ascii(text)[1:-1][:60]
