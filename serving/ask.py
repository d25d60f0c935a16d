"""A request of an OpenAI client -> a prompt. Whatever is not answered as asked is refused by name.

Pictures come as data URIs. No path and no URL is opened for a client, and no text of a client
becomes a placeholder or a token that steers the conversation.
"""
import itertools
import random
import threading
from dataclasses import dataclass

from generate import Decoding
from inputs.picture_names import data_uri_problem, inline_bytes

MAX_PICTURES = 8  # of a request
MAX_CHARACTERS = 32_000  # of the texts of a request
MAX_ESCAPES = 100  # of a data URI, such as %2B
MAX_STOPS = 4  # as in OpenAI's own service

# Decoded pictures are large: two at a time.
picture_work = threading.Semaphore(2)

# What is read, and what changes nothing here and may be there.
READ = {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "seed", "stop", "stream", "stream_options", "max_tiles"}
NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
             "parallel_tool_calls"}
# These are accepted only with the value that asks for nothing.
ONLY = {"n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logprobs": (False,),
        "top_logprobs": (0,), "logit_bias": ({},), "tools": ([],), "functions": ([],),
        "tool_choice": ("none", "auto"), "response_format": ({"type": "text"},),
        "modalities": (["text"],)}
# The same of a message, of its parts, and of the picture of a part. Clients send back what an
# answer holds.
OF_MESSAGE = {"role", "content", "name"}
OF_PART = {"type", "text", "image_url"}
OF_PICTURE = {"url", "detail"}
EMPTY_IN_MESSAGE = {"annotations", "tool_calls"}


class Refused(Exception):
    """A request that is answered with an error: HTTP status, message, and what is at fault."""

    def __init__(self, status, message, param=None):
        super().__init__(message)
        self.status = status
        self.param = param


@dataclass
class Ask:
    """A request that can be answered."""
    ids: list  # token ids of the prompt
    tiles: object  # uint8 (N, 3, s, s) or None
    decoding: Decoding
    stops: list  # texts that end the answer
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens


# ---- values --------------------------------------------------------------------------------------

def number(body, name, default, least, most, whole=False):
    """body[name], a number from least to most, or the default if it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise Refused(400, f"{name} must be {kind} from {least} to {most}", name)
    return value


def read_flag(body, name):
    value = body.get(name)
    if value not in (None, True, False):
        raise Refused(400, f"{name} must be true or false", name)
    return bool(value)


def check_keys(body):
    for name, value in body.items():
        if name in READ or name in NO_EFFECT or value is None:
            continue
        if name not in ONLY:
            raise Refused(400, f"{name[:50]} is not known here; leave it out", name[:50])
        if value not in ONLY[name]:
            raise Refused(400, f"{name} is not supported; leave it out", name)


def check_fields(value, known, where):
    """Refused if an object holds something that is not read."""
    for name, content in value.items():
        if name not in known and content is not None:
            raise Refused(400, f"{where}: {name[:50]} is not known here; leave it out", where)


def read_stops(body):
    stops = body.get("stop")
    if stops is None:
        stops = []
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(
            isinstance(stop, str) and 0 < len(stop) <= 100 for stop in stops):
        raise Refused(400, f"stop must be a text or up to {MAX_STOPS} texts of 1 to 100 characters",
                      "stop")
    return stops


# ---- messages ------------------------------------------------------------------------------------

def read_picture(part, where):
    """The bytes of the picture of a part {"type": "image_url", "image_url": {"url": DATA URI}}."""
    url = part.get("image_url")
    if isinstance(url, dict):
        check_fields(url, OF_PICTURE, where)
        url = url.get("url")
    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise Refused(400, f"{where}: a picture must be a data URI, data:image/png;base64,...; no "
                           "address and no file is opened here", where)
    if url.count("%") > MAX_ESCAPES:
        raise Refused(400, f"{where}: more than {MAX_ESCAPES} %; send base64 as it is", where)
    if data_uri_problem(url):
        raise Refused(400, f"{where}: {data_uri_problem(url)}", where)
    try:
        return inline_bytes(url)
    except ValueError as e:
        raise Refused(400, f"{where}: {e}", where) from None


def picture_tiles(assistant, picture, max_tiles, where):
    """Bytes of a picture -> its tiles. Raises Refused."""
    try:
        with picture_work:
            return assistant.tiles(picture, max_tiles)
    except ValueError as e:
        raise Refused(400, str(e), where) from None


def read_parts(content, where):
    """The parts of a message, in order: a text is str, a picture bytes."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list) or not content:
        raise Refused(400, f"{where}.content must be a text or a list of parts", f"{where}.content")
    parts = []
    for i, part in enumerate(content):
        place = f"{where}.content[{i}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind:
            check_fields(part, OF_PART, place)
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind == "image_url":
            parts.append(read_picture(part, place))
        else:
            raise Refused(400, f"{place}: only parts of type text and image_url are read", place)
    return parts


def user_turn(parts):
    """Parts of a user's message -> (texts before, between and behind its pictures, pictures).

    Pictures that all come together stand first, each on a line of its own, as in the rows that the
    model learned. Where texts stand between pictures, or on both sides of them, the order is kept.
    """
    pictures = [part for part in parts if isinstance(part, bytes)]
    texts = [part for part in parts if isinstance(part, str)]
    kinds = [type(part) for part in parts]
    switches = sum(a is not b for a, b in itertools.pairwise(kinds))
    if not pictures:
        return ["\n".join(texts)], []
    if switches < 2:
        between = ["\n"] * (len(pictures) - 1)
        return ["", *between, "\n" + "\n".join(texts)], pictures
    turn = [""]
    for part in parts:
        if isinstance(part, bytes):
            turn.append("")
        else:
            turn[-1] += part
    return turn, pictures


def read_messages(messages):
    """Messages -> (system text or None, turns, bytes of the pictures in order)."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message", "messages")
    system = None
    turns = []
    pictures = []
    n_characters = 0
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role:
            empty = {name for name in EMPTY_IN_MESSAGE if message.get(name) == []}
            check_fields(message, OF_MESSAGE | empty, where)
        expected = "assistant" if turns and turns[-1][1] is None else "user"
        parts = read_parts(message.get("content"), where) if role else []
        n_characters += sum(len(part) for part in parts if isinstance(part, str))
        if role in ("system", "developer") and i == 0:
            system = "\n".join(part for part in parts if isinstance(part, str))
            if len(parts) > 1 or not isinstance(parts[0], str):
                raise Refused(400, f"{where}: a system message is one text", where)
        elif role == expected == "user":
            turn, own = user_turn(parts)
            turns.append((turn, None))
            pictures += own
        elif role == expected:
            if any(isinstance(part, bytes) for part in parts):
                raise Refused(400, f"{where}: pictures stand in the user's messages only", where)
            turns[-1] = (turns[-1][0], "\n".join(parts))
        else:
            raise Refused(400, f"{where}: its role must be {expected}; a system message comes "
                               "first, then user and assistant take turns", where)
    if not turns or turns[-1][1] is not None:
        raise Refused(400, "the last message must be the user's", "messages")
    if n_characters > MAX_CHARACTERS:
        raise Refused(400, f"{n_characters:,} characters; at most {MAX_CHARACTERS:,} are read",
                      "messages")
    if len(pictures) > MAX_PICTURES:
        raise Refused(400, f"{len(pictures)} pictures; at most {MAX_PICTURES} are read", "messages")
    return system, turns, pictures


# ---- a request -----------------------------------------------------------------------------------

def read_ask(body, assistant, longest_answer, places):
    """The body of POST /v1/chat/completions, a dict -> Ask. Raises Refused.

    longest_answer: new tokens, at most; places: tokens of prompt and answer, at most.
    """
    check_keys(body)
    system, turns, pictures = read_messages(body.get("messages"))
    max_tiles = number(body, "max_tiles", 0, 1, assistant.max_tiles, whole=True)
    wanted = body.get("max_completion_tokens")
    name = "max_tokens" if wanted is None else "max_completion_tokens"
    most = number(body, name, longest_answer, 1, longest_answer, whole=True)
    options = body.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refused(400, "stream_options may have include_usage only", "stream_options")
    decoding = Decoding(
        max_new_tokens=most,
        stop_ids=assistant.settings["stop_ids"],
        temperature=number(body, "temperature", 0.0, 0, 100),
        top_p=number(body, "top_p", 1.0, 0, 1),
        top_k=number(body, "top_k", 0, 0, 2**20, whole=True),
        seed=number(body, "seed", random.getrandbits(32), -2**63, 2**63 - 1, whole=True),
    )
    stops = read_stops(body)
    tiles = [picture_tiles(assistant, picture, max_tiles, "messages") for picture in pictures]
    try:
        ids, tiles = assistant.prompt(turns, tiles, system)
    except ValueError as e:
        raise Refused(400, str(e), "messages") from None
    room = places - len(ids)
    if room < 1:
        raise Refused(400, f"a prompt of {len(ids):,} tokens; with its answer it may have "
                           f"{places:,}; shorten it, or set max_tiles", "messages")
    if wanted is not None or body.get("max_tokens") is not None:
        if most > room:
            raise Refused(400, f"{name}={most}, but a prompt of {len(ids):,} tokens leaves room "
                               f"for {room:,}", name)
    decoding.max_new_tokens = min(most, room)
    return Ask(ids, tiles, decoding, stops, read_flag(body, "stream"),
               read_flag(options, "include_usage"))
