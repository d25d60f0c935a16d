"""Qwen2.5's and Qwen3's byte-level BPE with the special tokens of SAIL-VL."""
import functools
import re
import sys
import unicodedata
from pathlib import Path

import tiktoken

from inputs.files import json_hash, read_json

# Special and added tokens of Qwen2.5 as InternVL and SAIL-VL extend it. Their ids follow those of
# the BPE pieces, in this order.
SPECIAL_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|>
    <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <img> </img> <IMG_CONTEXT> <quad> </quad>
    <ref> </ref> <box> </box>""".split()
# Qwen3 has these between Qwen2.5's and those of SAIL-VL.
QWEN3_TOKENS = ["<tool_response>", "</tool_response>", "<think>", "</think>"]

# Those of them that a text may hold: marks of places and calls, which an answer shows. The others
# steer a conversation, so that nobody may type them.
MARKUP = """
    <tool_call> </tool_call> <quad> </quad> <ref> </ref> <box> </box>""".split()

# Qwen2's pre-tokenizer: where a text is split before BPE merges the bytes of each piece.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


# Longer texts are refused: no pack has room for their tokens, which take time and memory. Within
# this length the slowest text, a million emojis, takes a second.
MAX_TEXT = 1_000_000
# A run of blanks beyond this length overflows the stack of tiktoken's regular expression.
MAX_BLANKS = 100_000
# Unicode puts the accents behind a letter in order, in a time that grows with their square. Its own
# limit for streams is 30 (UAX 15).
MAX_ACCENTS = 256


@functools.cache
def accents_pattern():
    """Runs of what Unicode orders behind a letter."""
    characters = map(chr, range(0x300, sys.maxunicode + 1))
    accents = [character for character in characters if unicodedata.combining(character)]
    return re.compile(f"[{''.join(accents)}]+")


def check_length(text):
    """ValueError, with the length and the limit, for a text that would take long to split."""
    problem = ""
    if len(text) > MAX_TEXT:
        problem = f"{len(text):,} characters, at most {MAX_TEXT:,} are read"
    if not problem and len(text) > MAX_BLANKS:
        n = longest(r"\s+", text)
        if n > MAX_BLANKS:
            problem = f"{n:,} blanks in a row, at most {MAX_BLANKS:,} are read"
    if not problem and len(text) > MAX_ACCENTS and not text.isascii():
        n = longest(accents_pattern(), text)
        if n > MAX_ACCENTS:
            problem = f"{n:,} accents on one letter, at most {MAX_ACCENTS} are read"
    if problem:
        raise ValueError(f"a text that cannot be split into tokens: {problem}; shorten it")


def longest(pattern, text):
    """Length of the longest match of a pattern in a text, 0 if there is none."""
    return max((len(match[0]) for match in re.finditer(pattern, text)), default=0)


def byte_alphabet():
    """{byte: character}: GPT-2's printable spelling of the 256 bytes, used in vocab.json.

    Printable bytes stand for themselves; the others get the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


class Tokenizer:
    """Byte-level BPE of a Qwen folder with the 31 special tokens of SAIL-VL, 35 for Qwen3.

    Reads `vocab.json`, else `tokenizer.json`. In a text only MARKUP becomes special tokens. Another
    special token that a user typed stays a row of ordinary pieces.
    Raises FileNotFoundError without either file, ValueError if they are damaged.
    """

    def __init__(self, folder):
        ranks, self.special, self.hash = read_vocabulary(Path(folder))
        self.bpe = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks,
                                     special_tokens=self.special)
        self.special_ids = set(self.special.values())
        self.markup = MARKUP + [token for token in QWEN3_TOKENS if token in self.special]
        self.markup_pattern = re.compile("(" + "|".join(map(re.escape, self.markup)) + ")")
        self.hidden_ids = self.special_ids - {self.special[token] for token in self.markup}
        self.n_vocab = max(self.special_ids) + 1
        self.eos_id = self.special["<|im_end|>"]
        self.image_id = self.special["<IMG_CONTEXT>"]

    def encode(self, text):
        """Token ids of a text in NFC; ValueError for one that check_length refuses."""
        check_length(text)
        ids = []
        # As Hugging Face's tokenizer has it, NFC comes after the split.
        for part in self.markup_pattern.split(text):
            if part in self.markup:
                ids.append(self.special[part])
            elif part:
                ids += self.encode_plain(unicodedata.normalize("NFC", part))
        return ids

    def encode_plain(self, text):
        """Token ids of a text without special tokens."""
        try:
            return self.bpe.encode_ordinary(text)
        except BaseException as e:
            # At a million blanks tiktoken's regular expression panics in Rust. That panic is no
            # Exception in Python, and its class can only be recognized by name.
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"a text of {len(text)} characters that cannot be split into tokens; "
                             "shorten it") from None

    def decode(self, ids, skip_special=True):
        """The text of token ids; ids beyond the vocabulary are left out.

        skip_special: special tokens are left out too, all but MARKUP.
        """
        kept = []
        for token_id in ids:
            if token_id < self.n_vocab and not (skip_special and token_id in self.hidden_ids):
                kept.append(token_id)
        return self.bpe.decode(kept, errors="replace")


def read_vocabulary(folder):
    """({bytes of a piece: id}, {special token: id}, hash of both) of a tokenizer's folder."""
    vocab = folder / "vocab.json"
    whole = folder / "tokenizer.json"
    added = folder / "added_tokens.json"
    if not folder.exists():
        raise FileNotFoundError(f"no tokenizer in {folder}, which does not exist; give the folder "
                                "of a model (--tokenizer=DIR of data.py, --init_from=DIR)")
    if not vocab.exists() and not whole.exists():
        raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json or tokenizer.json "
                                "of a Qwen2 model")
    try:
        if vocab.exists():
            pieces = read_json(vocab, dict)
            listed = []
        else:
            both = read_json(whole, dict)
            pieces = both["model"]["vocab"]
            listed = both.get("added_tokens", [])
        ranks = {}
        for piece, token_id in pieces.items():
            if piece not in (*SPECIAL_TOKENS, *QWEN3_TOKENS):
                ranks[bytes(CHAR_TO_BYTE[char] for char in piece)] = token_id
        given = {token["content"]: token["id"] for token in listed}
        if added.exists():
            given |= read_json(added, dict)
        order = special_tokens(folder, given)
        special = {token: len(ranks) + k for k, token in enumerate(order)} | given
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder}: not the byte-level vocabulary of a Qwen2 tokenizer "
                         f"({e!r})") from None
    # tiktoken panics where ids are wrong.
    ids = [*ranks.values(), *special.values()]
    whole_numbers = all(type(i) is int for i in ids)
    if not whole_numbers or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= 2 ** 31:
        raise ValueError(f"{folder}: token ids must be whole numbers, each of one token; "
                         "copy the tokenizer again")
    lacking = sum(bytes([byte]) not in ranks for byte in range(256))
    if lacking:
        raise ValueError(f"{folder}: {lacking} of the 256 single bytes are not in the vocabulary, "
                         "so that not every text could be split; copy the tokenizer again")
    return ranks, special, json_hash([sorted(pieces.items()), special])[:12]


def special_tokens(folder, given):
    """The special tokens of a folder in the order of their ids: Qwen2.5's or Qwen3's, then ours.

    given: the tokens whose ids other files list; Qwen3's folders have tokenizer_config.json alone.
    """
    path = folder / "tokenizer_config.json"
    decoder = read_json(path, dict).get("added_tokens_decoder") if path.is_file() else None
    entries = decoder.values() if isinstance(decoder, dict) else []
    names = [entry.get("content") for entry in entries if isinstance(entry, dict)]
    if "<tool_response>" not in (*given, *names):
        return SPECIAL_TOKENS
    first = SPECIAL_TOKENS.index("<img>")
    return SPECIAL_TOKENS[:first] + QWEN3_TOKENS + SPECIAL_TOKENS[first:]
