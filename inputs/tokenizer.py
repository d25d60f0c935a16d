"""Qwen2.5's byte-level BPE with the special tokens of SAIL-VL."""
import tiktoken
import unicodedata
from pathlib import Path

from inputs.files import json_hash, read_json

# ---- tokenizer ----------------------------------------------------------------------------------------------------
# Special and added tokens of Qwen2.5 as InternVL and SAIL-VL extend it; their ids follow the BPE pieces in this order
SPECIAL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <img>
    </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>""".split()
# GPT-2's printable alphabet of the 256 bytes, in which vocab.json spells its pieces
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = _printable + [b for b in range(256) if b not in _printable]
BYTE_TO_CHAR = {b: chr(b if b in _printable else 256 + BYTE_ORDER.index(b) - len(_printable)) for b in BYTE_ORDER}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")                                            # Qwen2's pre-tokenizer

class Tokenizer:
    """Byte-level BPE of a Qwen folder (`vocab.json`, else `tokenizer.json`) with the 31 special tokens of SAIL-VL.
    `encode` treats its text as plain text: a special token typed by a user stays a row of ordinary pieces.
    FileNotFoundError without either file, ValueError if they are damaged."""
    def __init__(self, folder):
        vocab, whole, added = (Path(folder) / f"{name}.json" for name in ("vocab", "tokenizer", "added_tokens"))
        if not vocab.exists() and not whole.exists():
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json or tokenizer.json of a Qwen2 model")
        try:
            both = read_json(whole, dict) if not vocab.exists() else dict(model=dict(vocab=read_json(vocab, dict)))
            pieces = both["model"]["vocab"]
            ranks = {bytes(CHAR_TO_BYTE[c] for c in p): i for p, i in pieces.items() if p not in SPECIAL_TOKENS}
            self.special = {t: len(ranks) + k for k, t in enumerate(SPECIAL_TOKENS)}
            self.special |= {token["content"]: token["id"] for token in both.get("added_tokens", [])}
            self.special |= read_json(added, dict) if added.exists() else {}
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{folder}: not the byte-level vocabulary of a Qwen2 tokenizer ({e!r})") from None
        ids = [*ranks.values(), *self.special.values()]                # tiktoken panics where these are wrong
        if {*map(type, ids)} != {int} or len({*ids}) < len(ids) or not 0 <= min(ids) <= max(ids) < 2 ** 31:
            raise ValueError(f"{folder}: token ids must be whole numbers, each of one token; copy the tokenizer again")
        self.bpe = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.special_ids = set(self.special.values())
        self.n_vocab = max(self.special_ids) + 1
        self.eos_id, self.image_id = self.special["<|im_end|>"], self.special["<IMG_CONTEXT>"]
        self.hash = json_hash([sorted(pieces.items()), self.special])[:12]

    def encode(self, text):
        try:
            return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))
        except BaseException as e:                                     # a panic of Rust is no Exception: its regular
            if type(e).__name__ != "PanicException": raise             # expressions give up at a million blanks
            raise ValueError(f"a text of {len(text)} characters that cannot be split into tokens; shorten it") from None

    def decode(self, ids, skip_special=True):
        ids = [i for i in ids if i < self.n_vocab and not (skip_special and i in self.special_ids)]
        return self.bpe.decode(ids, errors="replace")
