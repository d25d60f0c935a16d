"""A row in any dialect -> its dialogue: a system message, questions and answers."""
import json

from inputs.row_keys import (
    CAPTION_KEYS,
    LOSS_KEYS,
    NO_AUDIO,
    NO_CALLS,
    NO_VIDEO,
    PAIR_USED,
    PAIR_WORDS,
    PART_KEYS,
    check_beside_pair,
    check_caption_keys,
    check_no_picture_is_lost,
    check_part_keys,
    check_tags,
    check_turn_keys,
    dialogue_forms,
    is_empty,
    short,
)

# The question where a source has bare captions.
CAPTION_PROMPT = "Please describe the image."
# Who speaks, by the names that InternVL, LLaVA, ShareGPT, OpenAI and Google give them.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
}
CALL_ROLES = ("function", "function_call", "ipython", "observation", "tool", "tool_call",
              "tool_response")
# Why a part of a message is refused, by a word of its type: video_url, input_audio.
REFUSED_PARTS = {
    "video": NO_VIDEO,
    "audio": NO_AUDIO,
    "tool": NO_CALLS,
    "function": NO_CALLS,
}


def conversation(row):
    """(system or None, [(user, assistant), ...]) of a row; ValueError if it is broken.

    A row has one of the keys of a dialogue (see row_turns) or a bare `caption` or `text`.
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
    if field in PAIR_WORDS:
        check_beside_pair(row)
    roles = []
    texts = []
    supervised = []
    for where, turn in turns:
        check_turn_keys(turn, where)
        role = either(turn, ("from", "role"), where)
        if role in CALL_ROLES:
            raise ValueError(f"{where}: a turn of {role}: {NO_CALLS}")
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


# ---- the turns of each dialect ------------------------------------------------------------------

def row_turns(row):
    """(name of the key, [(place, turn), ...]) of a row; ("", []) if it is a bare caption.

    A row has `conversations` (InternVL, LLaVA, LLaMA-Factory), `messages` (OpenAI, TRL), `texts`
    (The Cauldron, FineVision), or a question and an answer in a key each.
    """
    forms = dialogue_forms(row)
    if not forms:
        return "", []
    if len(forms) > 1:
        names = dict.fromkeys(key for form in forms for key in form)
        raise ValueError(f"{' and '.join(names)} in one row; keep one")
    return forms[0][0], form_turns(row, forms[0])


def form_turns(row, form):
    """[(place, turn), ...] of one of the forms in which a row has a dialogue."""
    field = form[0]
    if field == "texts":
        return texts_turns(row["texts"])
    if field in PAIR_WORDS:
        return question_turns(row, *form)
    return list_turns(row[field], field)


def list_turns(turns, field):
    """The (place, turn) of a list of turns."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'{field}: not a list of turns; '
                         'write [{"from": "human", "value": "..."}, ...]')
    return [(f"{field}[{k}]", turn) for k, turn in enumerate(turns)]


def texts_turns(pairs):
    """The (place, turn) of The Cauldron's texts: [{"user": ..., "assistant": ...}, ...]."""
    turns = []
    for k, pair in enumerate(pairs):
        where = f"texts[{k}]"
        others = {key: value for key, value in pair.items() if key not in PAIR_USED}
        check_turn_keys(others, where)
        for role in ("user", "assistant"):
            turns.append((where, {"role": role, "content": pair.get(role)}))
    return turns


def question_turns(row, question_key, answer_key):
    """The (place, turn) of a question and an answer, each a text or, as TRL has it, turns.

    Answers within the question are not learned, as in TRL.
    """
    question = row[question_key]
    answer = row[answer_key]
    turns = [(question_key, {"role": "user", "content": question})]
    if isinstance(question, list):
        turns = []
        for where, turn in list_turns(question, question_key):
            is_marked = any(turn.get(key) is not None for key in LOSS_KEYS)
            turns.append((where, turn if is_marked else turn | {"loss": 0}))
    if isinstance(answer, list):
        return turns + list_turns(answer, answer_key)
    return [*turns, (answer_key, {"role": "assistant", "content": answer})]


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
    if row.get("texts"):
        raise ValueError('texts: not a list of pairs; '
                         'write [{"user": "...", "assistant": "..."}, ...]')
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


# ---- one turn -----------------------------------------------------------------------------------

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
    if kind not in PART_KEYS:
        words = str(kind).split("_")
        reason = next((REFUSED_PARTS[word] for word in words if word in REFUSED_PARTS),
                      "there are text, image and image_url; write it as one of these")
        raise ValueError(f"{where}: a part of type {short(str(kind))!r}: {reason}")
    check_part_keys(part, PART_KEYS[kind], where)
    if kind != "text":
        return "<image>\n"
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where}: {shown(part.get('text'))} instead of text; write text")
    return part["text"]


def shown(value):
    """The beginning of a value, for a message."""
    return short(json.dumps(value))[:40]
