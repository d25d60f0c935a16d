"""Data: records of any format -> token ids and labels in one pass -> packs -> batches, in an order that is arithmetic.

    python data.py check FILE...                        # every row validated: line, field, what to do; exit code 2
    python data.py show FILE --n=8 --tokenizer=DIR      # exactly what the model sees, supervised tokens marked
    python data.py preview FILE --out=page.html         # tiles and packs as pictures

Source row (json + image bytes) -> `render` (ids, labels) -> pack of documents, planned from lengths and image headers
alone -> `Packs.__getitem__` in a worker (decode, tile) -> batch. Nothing is cut: what does not fit gets fewer tiles,
else it is dropped and counted; an unreadable row is quarantined and counted.
Shapes: T tokens of a pack, S samples in a pack, N tiles of a pack, s tile side in pixels.
"""
import atexit, bisect, collections, concurrent.futures, contextlib, fcntl, functools, gc, glob, hashlib, html
import io, itertools, json, math, multiprocessing, os, re, signal, sys, tarfile, threading, unicodedata, weakref
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

import numpy as np
import tiktoken
import torch
from PIL import Image
from tqdm import tqdm

from configurator import configure, launch
from vision import GRAY, count_tiles, image_size, load_image, make_tiles, picture_uri

def read_json(path, kind=object):
    """What a JSON file holds; ValueError if that is none, or not of this kind (dict for the files of a model)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:                          # a million brackets are no data
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; copy it again")
    return content

def json_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

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
    return join(segments(tokenizer, template, place_images(turns, len(images)), images))[0]

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

def join(segments):
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
    ids, targets = map(np.array, join(row_segments(row, tokenizer, template, n_tiles, tokens_per_tile, image_as)))
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

# ---- sources: one memory-mapped index each ------------------------------------------------------------------------
ROW = np.dtype([("offset", "i8"), ("size", "i4"), ("tokens", "i4"), ("first_image", "i8"), ("n_images", "i4"),
                ("is_text", "i4")])                                    # is_text: a bare caption, the .txt of a tar
IMAGE = np.dtype([("offset", "i8"), ("size", "i4"), ("width", "i4"), ("height", "i4")])    # offset, size: in a tar
UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError)  # what a bad row raises
MAX_BYTES = 64 * 2 ** 20                                               # of one row, picture or member of a tar

def bounded(size, what):
    """size; ValueError if it is more than what one row or picture may have."""
    if size > MAX_BYTES: raise ValueError(f"{what} of {size} bytes; it may have {MAX_BYTES}")
    return size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

@functools.lru_cache(None)
def mapped(path):
    """Rows of an index file, read as they are needed and never copied into this process; () if there are none. Unlike
    numpy's, the mapping keeps no file open: there may be more sources than files a process may have open."""
    kind, size = ROW if path.endswith("rows.bin") else IMAGE, os.path.getsize(path)
    return torch.from_file(path, size=size, dtype=torch.uint8).numpy().view(kind) if size else np.empty(0, kind)

class Sparing(io.BufferedReader):
    """A file of which nothing reads more than MAX_BYTES at once, whatever length a header of a tar claims to have."""
    def read(self, size=-1):
        if not 0 <= size <= MAX_BYTES: raise tarfile.ReadError(f"a header or member of {size} bytes")
        return super().read(size)

@contextlib.contextmanager
def open_tar(path):
    try:
        with Sparing(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
            if tar.offset + tarfile.BLOCKSIZE > os.path.getsize(path): raise tarfile.ReadError("it ends too early")
    except tarfile.TarError as e:
        raise ValueError(f"{path} is no whole tar file ({e}); copy it again or leave it out") from None

def tar_key(member):
    """What the files of one record share: the path up to the first dot, as WebDataset has it."""
    return re.match(r"(?:.*/)?[^./]*", member.name)[0]

def add_record(tar, key, row, pictures):
    """Add KEY.json and its pictures, [(suffix, bytes), ...]: KEY.jpg, or KEY.0.jpg, KEY.1.jpg; `image` names them."""
    names = [f"{key}.{k}{suffix}" if len(pictures) > 1 else key + suffix for k, (suffix, _) in enumerate(pictures)]
    row = row | ({"image": names if len(names) > 1 else names[0]} if names else {})
    add_member(tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    for name, (_, content) in zip(names, pictures): add_member(tar, name, content)

def add_member(tar, name, content):
    """Add a file of these bytes to an open tar; no owner, no time: the same bytes every time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))

class Source:
    """One file or folder of records with an index beside it: where each row is, how many tokens it has apart from the
    visual ones (-1: quarantined, see `meta`), and the sizes of its images. The index is built once, by whichever
    process comes first, and again when the source or the tokenizer changed. Each process maps it into memory for
    itself; only paths travel to workers."""
    rows = property(lambda self: mapped(f"{self.index}/rows.bin"))
    images = property(lambda self: mapped(f"{self.index}/images.bin"))

    def __init__(self, name, path, tokenizer, template, image_as="pixels", root=None, repeat=1.0, max_tiles=0,
                 weight=0.0, sha256_of_file=""):
        self.name, self.path, self.repeat, self.max_tiles, self.weight = name, Path(path), repeat, max_tiles, weight
        self.sha256 = sha256_of_file                                   # of the annotation, checked when it is indexed
        if not self.path.exists():
            raise FileNotFoundError(f"data source {path} does not exist")
        self.root = Path(root or (self.path if self.path.is_dir() else self.path.parent))
        if self.path.suffix.lower() in (".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet"):
            raise ValueError(f"{path} is compressed, and rows are read by their place in a file; unpack it")
        self.is_tar = self.path.suffix.lower() == ".tar"
        here = self.path.resolve()
        about, files = [str(here), str(self.root.resolve()), tokenizer.hash, template, image_as, self.sha256], [here]
        if here.is_dir():                                              # of itself, not of the indexes of others
            files = [file for file in sorted(here.rglob("*")) if "/." not in f"/{file.relative_to(here)}"]
        for file in files:
            with contextlib.suppress(OSError):                         # a dangling link, or gone meanwhile
                if S_ISREG((known := file.stat()).st_mode): about.append([str(file), known.st_size, known.st_mtime_ns])
        beside = self.path.parent if os.access(self.path.parent, os.W_OK) else Path("shards/index")  # read-only data
        self.index = beside / f".{self.path.name}.index-{json_hash([*about, ROW.descr, 2])[:12]}"
        self.index.mkdir(parents=True, exist_ok=True)
        with open(self.index / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.index / "meta.json").exists() or self._mended(tokenizer, template, image_as):
                self._build(tokenizer, template, image_as)
        self.meta = read_json(self.index / "meta.json")

    @property
    def lines(self):
        """The file that holds the rows; a folder, or LLaVA's one array, became lines when the index was built."""
        return self.index / "rows.jsonl" if self.path.is_dir() or self.path.suffix.lower() == ".json" else self.path

    def _read(self, offset, size):
        with open(self.lines, "rb") as file:
            file.seek(offset)
            return file.read(bounded(size, "a row or picture"))

    def _row(self, raw, i, is_text):
        try:
            row = {"caption": raw.decode("utf-8-sig")} if is_text else json.loads(raw)
        except ValueError as e:
            why = f"{e.msg} at character {e.pos + 1}" if isinstance(e, json.JSONDecodeError) else e
            raise ValueError(f"not valid JSON ({why}); write one object {{...}} per row, in UTF-8") from None
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}, where a row is one JSON object; write {{...}}")
        return {"id": f"{self.name}:{i}", **row}

    def row(self, i):
        return self._row(self._read(*self.rows[i].item()[:2]), i, self.rows[i]["is_text"])

    def image(self, i, k, row):
        """Bytes of image k of row i."""
        if self.is_tar:
            return self._read(*self.images[self.rows[i]["first_image"] + k].item()[:2])
        path = self.root / image_names(row)[k]
        if path.exists() and not (path.is_file() and path.stat().st_size <= MAX_BYTES):    # /dev/zero has no end
            raise ValueError(f"{path}: no file, or larger than {MAX_BYTES} bytes")
        return path.read_bytes()

    def _records(self):
        """Yield (offset, size, is_text) of every record and, of a tar, {name: (offset, size)} of its pictures."""
        if self.is_tar:                                                # never extracted
            with open_tar(self.path) as tar:
                for _, group in itertools.groupby((m for m in tar if m.isreg()), tar_key):  # links, devices: not data
                    group = {os.path.basename(m.name): (m.offset_data, m.size) for m in group}
                    texts = [(*at, end == ".txt") for end in (".json", ".txt") for name, at in group.items()
                             if name.lower().endswith(end)]
                    yield *(texts or [(0, 0, False)])[0], {name: at for name, at in group.items()
                                                           if name.lower().endswith(IMAGE_SUFFIXES)}
            return
        if self.lines != self.path:
            with open(self.lines, "w") as file:
                for row in folder_rows(self.path) if self.path.is_dir() else read_json(self.path, list):
                    file.write(json.dumps(row) + "\n")
        with open(self.lines, "rb") as file:
            while line := file.readline(MAX_BYTES):
                start, part = file.tell() - len(line), line
                while part and part[-1:] != b"\n":                     # too long, but its length is told
                    part = file.readline(MAX_BYTES)
                if line.strip():
                    yield start, file.tell() - start, False, None

    def _measure(self, raw, is_text, pictures, i, tokenizer, template, image_as, seen):
        """Tokens apart from visual ones, and (offset, size, width, height) of each image; raises one of UNREADABLE.
        seen: {path: size} of pictures looked at before."""
        row = self._row(raw, i, is_text)
        if image_as == "words":
            found = []
        elif pictures is None:
            names = image_names(row)
            for name in names:
                if name not in seen:
                    try:
                        seen[name] = image_size(self.root / name)
                    except OSError as e:
                        raise ValueError(f"image {name}: {e.strerror} ({self.root / name}); mend its path or remove "
                                         "the row") from None
            found = [(0, 0, *seen[name]) for name in names]
        else:                                                          # in the order of the row, if it names them
            names = [os.path.basename(name) for name in image_names(row)]
            places = [pictures[name] for name in names if name in pictures] or pictures.values()
            found = [(*place, *image_size(self._read(*place))) for place in places]
        parts = row_segments(row, tokenizer, template, [0] * len(found), 0, image_as)
        return sum([len(ids) for ids, _ in parts]), found

    def _measure_all(self, records, first, *reading):
        """(rows, images, bad) of some records in order; `first` is the number of the first of them."""
        rows, images, bad, seen = [], [], [], {}
        with open(self.lines, "rb") as file:
            for i, (offset, size, is_text, pictures) in enumerate(records, first):
                try:
                    raw = os.pread(file.fileno(), bounded(size, "a row"), offset)
                    tokens, found = self._measure(raw, is_text, pictures, i, *reading, seen)
                    rows.append((offset, size, tokens, len(images), len(found), is_text))
                    images += found
                except UNREADABLE as e:
                    name = "" if type(e) is ValueError else f"{type(e).__name__}: "
                    bad.append({"source": self.name, "row": i, "reason": f"{name}{e}"[:300]})
                    rows.append((offset, min(size, 2 ** 31 - 1), -1, len(images), 0, is_text))
        return np.array(rows, ROW), np.array(images, IMAGE), bad

    def _mended(self, *reading):
        """Whether a row that was unreadable can be read now: its picture is there. A tar changes only as a whole."""
        for bad in read_json(self.index / "meta.json")["bad"] if not self.is_tar else ():
            with contextlib.suppress(*UNREADABLE):
                self._measure(self._read(*self.rows[bad["row"]].item()[:2]), False, None, bad["row"], *reading, {})
                mapped.cache_clear()
                return True

    def _build(self, *reading):
        """Write the index, CHUNK records at a time; of a long source on all cores, with the same result."""
        if self.sha256:
            with open(self.path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256.lower():
                raise ValueError(f"{self.path} has sha256 {found}, its meta file says {self.sha256}; copy it again")
        records, n_rows, n_images, bad, hashes = self._records(), 0, 0, [], [hashlib.sha256(), hashlib.sha256()]
        bar = tqdm(desc=f"index {self.path.name}", unit=" rows", leave=False)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.index / f"new_{name}.bin", "wb")) for name in ("rows", "images")]
            for rows, images, unreadable in self._measured(records, reading, stack):
                rows["first_image"] += n_images
                n_rows, n_images, bad = n_rows + len(rows), n_images + len(images), bad + unreadable
                for file, digest, array in zip(files, hashes, (rows, images)):
                    file.write(array.tobytes())
                    digest.update(array.tobytes())
                bar.update(len(rows))
        bar.close()
        for name in ("rows", "images"):                                # renamed: a run may have the old ones mapped
            os.replace(self.index / f"new_{name}.bin", self.index / f"{name}.bin")
        meta = {"bad": bad, "digest": json_hash([digest.hexdigest() for digest in hashes])}
        (self.index / "meta.tmp").write_text(json.dumps(meta))
        os.replace(self.index / "meta.tmp", self.index / "meta.json")  # which says that the index is whole

    def _measured(self, records, reading, stack):
        """Yield what _measure_all gives for each chunk of records, in order."""
        chunks, first, waiting = iter(lambda: [*itertools.islice(records, CHUNK)], []), 0, collections.deque()
        pool, cores = None, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        for chunk in chunks:
            if pool is None and first and cores > 1:                   # it is a long one: fresh processes, no fork
                context = multiprocessing.get_context("spawn")
                pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(cores, context, _reading, (reading,)))
            if pool is None:
                yield self._measure_all(chunk, first, *reading)
            else:
                waiting.append(pool.submit(_measure_chunk, self, chunk, first))
            first += len(chunk)
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

CHUNK = 20_000                                      # records that one process measures at a time, about a second

def _reading(reading):
    """How a process of the pool reads rows, told once: a tokenizer is large. It ends where its parent was killed."""
    global READING
    READING, parent = reading, multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def _measure_chunk(source, chunk, first):
    return source._measure_all(chunk, first, *READING)

def folder_rows(folder):
    """A row for every picture of a folder, described by the .json or .txt of the same stem."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            row, beside = {"caption": ""}, [path.with_suffix(end) for end in (".json", ".txt")]
            try:
                for file in [*filter(Path.exists, beside)][:1]:
                    if file.stat().st_size > MAX_BYTES: raise ValueError(f"{file} has more than {MAX_BYTES} bytes")
                    row = read_json(file, dict) if file == beside[0] else {"caption": file.read_text("utf-8-sig")}
            except (ValueError, OSError) as e:                         # quarantined when the row is read
                row = {"unreadable": str(e)}
            yield {"id": path.stem, **row, "image": str(path.relative_to(folder))}

# InternVL's keys of a meta entry (facts of its documentation) and two of ours: weight, share of the samples; sha256
META = dict(annotation=(str,), root=(str,), repeat_time=(int, float), length=(int,), data_augment=(bool,),
            max_dynamic_patch=(int,), weight=(int, float), sha256=(str,))

def fill_in(path):
    """The paths of a pattern with `*` or `{000..012}`; what is there as it is written goes first (`[1].jsonl`)."""
    if os.path.exists(path): return [path]
    if braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path):
        before, first, last, after = braces.groups()
        return [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
    return sorted(glob.glob(path)) or [path]

def expand(spec):
    """Yield (name or "", path) of comma-separated `path` or `name=path`, patterns filled in; `year=2026/*.jsonl` is a
    path where there are such files."""
    for entry in filter(None, map(str.strip, spec.split(","))):
        name, paths = "", fill_in(entry)
        if "=" in entry and not any(map(os.path.exists, paths)):
            name, path = entry.split("=", 1)
            paths = fill_in(path)
        yield from ((name, Path(path)) for path in paths)

def open_sources(spec, tokenizer, template, image_as="pixels"):
    """Sources of `--data`: comma-separated `path` or `name=path`; a path may be .jsonl, .json (LLaVA array or InternVL
    meta), .tar, a folder of captioned images, or a pattern with `*` or `{000..012}`."""
    if template not in TEMPLATES:
        raise ValueError(f"--template={template}: unknown, choose from {', '.join(TEMPLATES)}")
    sources, reading = [], (tokenizer, template, image_as)
    for name, path in expand(spec):
        if path.suffix.lower() != ".json" or not path.is_file() or open(
                path, encoding="utf-8-sig").read(99).lstrip()[:1] != "{":
            sources.append(Source(name or path.stem, path, *reading))
            continue
        for key, item in read_json(path).items():                      # InternVL meta: paths as written, else beside it
            here = lambda p: p if os.path.exists(p) else path.parent / p
            entry = item if isinstance(item, dict) else {key: item}
            good = lambda k, v: type(v) in META.get(k, ()) and (type(v) is str or v >= 0)
            wrong = [k for k, v in entry.items() if not good(k, v)] or {"annotation"} - entry.keys()
            if wrong:
                raise ValueError(f"{path}: {key}: {[*wrong][0]} is missing, unknown, negative or of a wrong type; "
                                 f"there are {', '.join(META)}, annotation being the path of its rows")
            if item.get("data_augment"):
                print(f"{path}: {key}: data_augment is not done here, pictures stay as they are", file=sys.stderr)
            more = dict(repeat=float(item.get("repeat_time", 1)), max_tiles=item.get("max_dynamic_patch", 0),
                        weight=item.get("weight", 0), sha256_of_file=item.get("sha256", ""))
            sources.append(Source(key, here(item["annotation"]), *reading, here(item.get("root") or ""), **more))
            if item.get("length", n := len(sources[-1].rows)) != n:
                print(f"{path}: {key}: length says {item['length']} rows, there are {n}", file=sys.stderr)
    if not sources:
        raise ValueError("no data: give --data=PATH (.jsonl, .json, .tar, a folder, or a pattern)")
    return sources

# ---- order --------------------------------------------------------------------------------------------------------
def permute(i, n, seed, epoch):
    """Positions i (int64 array) under a permutation of range(n), a pure function of (seed, epoch, i).

    Four Feistel rounds on the next even power of two, walked until inside n (cycle walking; Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002)."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64(2 ** half - 1)
    keys = np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(0, 2 ** 63, 4, dtype=np.uint64)
    x = np.asarray(i).astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo = x >= n
    return x.astype(np.int64)

# ---- packs --------------------------------------------------------------------------------------------------------
WAITING = 64                                        # samples that may wait for a pack they fill up
# What a tile costs in tokens, and tokens**2 of a document over what in tokens: model.train_flops of the 2B, fine-tuning
TILE_COST, PAIR_COST = 276, 2 ** 15
REASON = {-1: "unreadable", -2: "too_long"}         # what stands for the tokens of a sample in no pack, and why it is

@contextlib.contextmanager
def uncollected():
    """Plans are many small objects, for which Python would look through all that is loaded, again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was: gc.enable()

def fill_packs(tokens, tiles, tokens_per_pack, tiles_per_pack):
    """Lists of indices of the samples in each pack, for samples in random order, none longer than a pack.

    A pack takes the oldest of the WAITING samples while more room stays than two samples need, then the one or two of
    them that fill it best. So packs are nearly in random order (sorted by length, a pack would hold samples of one
    kind), and each begins with the oldest sample: none waits for more than WAITING packs."""
    shift, n, packs = 32, len(tokens), []
    keys, low = [(t << shift) + i for i, t in enumerate(tokens)], (1 << shift - 1) - 1    # sort and add like tokens
    waiting, come = keys[:WAITING], WAITING
    keep, least = 2 * sum(tokens) // max(n, 1) << shift, min(keys, default=0)
    while waiting:
        pack, room, tile_room, k = [], (tokens_per_pack + 1 << shift) - 1, tiles_per_pack, 0
        while k < len(waiting) and (not pack or room - waiting[k] >= keep):
            if waiting[k] <= room and tiles[i := waiting[k] & low] <= tile_room:
                pack.append(i)
                room, tile_room = room - (tokens[i] << shift), tile_room - tiles[i]
                del waiting[k]
            else:
                k += 1
        while True:
            if (more := WAITING - len(waiting)) and come < n:
                waiting, come = waiting + keys[come:come + more], come + more
            if room < least or not waiting or (order := sorted(waiting))[0] > room: break
            best, chosen, i, j = 0, (), 0, bisect.bisect(order, room) - 1     # j: the longest that fits
            for a in order[j::-1]:
                if tiles[a & low] <= tile_room:
                    best, chosen = a, (a,)
                    break
            a, b, enough = order[0], order[j], room - (tokens_per_pack >> 12 << shift)
            while i < j and best < enough:                             # two that fit better, from both ends inward
                if a + b > room:
                    j -= 1
                    b = order[j]
                else:
                    if a + b > best and tiles[a & low] + tiles[b & low] <= tile_room:
                        best, chosen = a + b, (a, b)
                    i += 1
                    a = order[i]
            if not chosen: break
            for a in chosen:
                waiting.remove(a)
                pack.append(i := a & low)
                room, tile_room = room - (tokens[i] << shift), tile_room - tiles[i]
        packs.append(pack)
    return packs

@dataclass(slots=True)
class Pack:
    samples: list = field(default_factory=list)     # of (source, row, (tiles of each image))
    tokens: int = 0                                 # planned tokens, visual ones included
    tiles: int = 0
    cost: float = 0.0                               # relative FLOPs, for dealing packs of like cost to the ranks
    position: tuple = ()                            # where to resume after it: (epoch, window, packs of it consumed)
    counts: dict = None                             # samples used and dropped so far, those of this pack included
    number: int = 0                                 # among those of a loader: says where a worker puts its tiles
    together: tuple = ()                            # position and counts after, and costs of, what all ranks do at once

class Packs(torch.utils.data.Dataset):
    """Plans packs from lengths alone and turns a planned pack into a batch; stateless but for the paths of its sources
    and the shared memory that a Loader lends its workers.
    tokens_per_pack, tiles_per_pack: the two budgets. The global sequence of packs depends on (seed, sources, budgets,
    packs_per_step) only, never on the number of ranks or workers."""
    def __init__(self, sources, tokenizer, template, *, tile_size, tokens_per_tile, min_tiles=1, max_tiles=12,
                 thumbnail=True, tokens_per_pack=8192, tiles_per_pack=48, seed=0, image_as="pixels", cell_labels="none",
                 packs_per_step=1, window=16384, shuffle=True, pad=False, loss_weight="token"):
        self.sources, self.tokenizer, self.template, self.image_as = sources, tokenizer, template, image_as
        self.tile_size, self.tokens_per_tile, self.thumbnail = tile_size, tokens_per_tile, thumbnail
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.cell_labels, self.loss_weight = cell_labels, loss_weight
        self.tokens_per_pack, self.tiles_per_pack, self.packs_per_step = tokens_per_pack, tiles_per_pack, packs_per_step
        self.window, self.shuffle, self.pad, self.seed = window, shuffle, pad, seed
        # repeat_time as InternVL has it: below 1 the first part of the source, above 1 whole repeats. With weights, an
        # epoch is as long, and each source goes round as often as its share of it asks, from epoch to epoch
        self.counts = [int(len(s.rows) * (s.repeat if s.repeat < 1 else int(s.repeat))) for s in sources]
        if weights := [s.weight for s in sources if s.weight]:
            if len(weights) < len(sources):
                raise ValueError(f"{len(weights)} of {len(sources)} sources have a `weight`: give one above 0 to "
                                 "each, or none")
            if empty := [str(s.path) for s in sources if not len(s.rows)]:
                raise ValueError(f"no rows in {', '.join(empty)}, so it cannot have a share by `weight`; leave it out")
            self.counts = [round(sum(self.counts) * weight / sum(weights)) for weight in weights]
        self.starts = np.cumsum([0, *self.counts])
        self.n, self.n_bad = int(self.starts[-1]), sum(len(s.meta["bad"]) for s in sources)
        if self.n == 0 or self.n_bad == sum(len(s.rows) for s in sources):
            raise ValueError(f"no usable sample in {', '.join(str(s.path) for s in sources)} ({self.n} rows, "
                             f"{self.n_bad} unreadable); try: python data.py check {sources[0].path}")
        self.fingerprint = json_hash([[s.name, s.meta["digest"], s.repeat, s.weight, s.max_tiles] for s in sources] + [
            seed, shuffle, window, packs_per_step, tokens_per_pack, tiles_per_pack, min_tiles, max_tiles, thumbnail,
        ])[:16]

    def count_all_tiles(self, sizes, n, limit):
        """Tiles of each of the images `sizes` of samples that have n[k] of them and share `limit` tiles."""
        share = np.maximum(self.min_tiles, limit // np.maximum(n, 1)).repeat(n)
        least, side, thumbnail = map(itertools.repeat, (self.min_tiles, self.tile_size, self.thumbnail))
        columns = sizes["width"].tolist(), sizes["height"].tolist(), least, share.tolist(), side, thumbnail
        return [*map(count_tiles, *columns)]

    def plan_samples(self, at, epoch=0):
        """[(source, row, tiles per image)], tokens, tiles of the samples `at` of an epoch, the latter two as arrays;
        tokens are -1 where a row is unreadable, -2 where it is too long even with the fewest tiles (REASON)."""
        which, samples = np.searchsorted(self.starts, at, side="right") - 1, [None] * len(at)
        all_tokens, all_tiles = np.empty((2, len(at)), np.int64)
        room, tile_room = self.tokens_per_pack, self.tiles_per_pack
        fits = lambda tokens, tiles: (tokens + tiles * self.tokens_per_tile <= room) & (tiles <= tile_room)
        for s in np.unique(which).tolist():
            source, mine = self.sources[s], np.flatnonzero(which == s)
            row = (at[mine] - self.starts[s] + (epoch * self.counts[s] if source.weight else 0)) % len(source.rows)
            records, most = source.rows[row], min(self.max_tiles, source.max_tiles or self.max_tiles)
            n, tokens = records["n_images"], records["tokens"].astype(np.int64)
            border = np.append(0, np.cumsum(n))                        # of each sample's images among all of them
            sizes = source.images[(records["first_image"] - border[:-1]).repeat(n) + np.arange(border[-1])]
            counts = self.count_all_tiles(sizes, n, most)
            tiles, border = np.diff(np.append(0, np.cumsum(counts, dtype=np.int64))[border]), border.tolist()
            for k in np.flatnonzero(~fits(tokens, tiles)).tolist():    # too long: fewer tiles, then dropped whole
                a, b, tokens_now = border[k], border[k + 1], tokens[k]
                tokens[k] = -2
                for limit in range(most - 1, self.min_tiles - 1, -1):
                    fewer = self.count_all_tiles(sizes[a:b], n[k:k + 1], limit)
                    if fits(tokens_now, sum(fewer)):
                        counts[a:b], tiles[k], tokens[k] = fewer, sum(fewer), tokens_now
                        break
            for k, i, a, b in zip(mine.tolist(), row.tolist(), border, border[1:]):
                samples[k] = s, i, tuple(counts[a:b])
            all_tokens[mine] = np.where(tokens < 0, tokens, tokens + tiles * self.tokens_per_tile)
            all_tiles[mine] = tiles
        return samples, all_tokens, all_tiles

    @uncollected()
    def plan_window(self, epoch, w, taken=0):
        """(packs, dropped by reason) of window w of an epoch, dealt in steps of like cost: a rank waits for the others.
        taken: packs that the step which is open when the window begins has already."""
        at = np.arange(w * self.window, min((w + 1) * self.window, self.n))
        at = permute(at, self.n, self.seed, epoch) if self.shuffle else at
        samples, tokens, tiles = self.plan_samples(at, epoch)
        dropped = {why: n for code, why in REASON.items() if (n := int((tokens == code).sum()))}
        kept = np.flatnonzero(tokens >= 0)
        columns = tokens, tiles, tokens + TILE_COST * tiles + tokens * tokens / PAIR_COST
        (tokens, tiles, costs), samples = (x[kept].tolist() for x in columns), [samples[i] for i in kept.tolist()]
        packs = [Pack([samples[i] for i in p], *(sum([x[i] for i in p]) for x in (tokens, tiles, costs)))
                 for p in fill_packs(tokens, tiles, self.tokens_per_pack, self.tiles_per_pack)]
        packs.sort(key=lambda pack: pack.cost)
        first = min(-taken % self.packs_per_step, len(packs))          # the open step and one that stays open: middling
        last = (len(packs) - first) % self.packs_per_step              # packs, as other windows give them
        a = (len(packs) - first - last) // 2
        middle, packs[a:a + first + last] = packs[a:a + first + last], []
        steps = [packs[i:i + self.packs_per_step] for i in range(0, len(packs), self.packs_per_step)]
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 1, epoch * 2 ** 32 + w]))
        rng.shuffle(steps)                                             # alike inside a step, random order outside
        return [*middle[:first], *itertools.chain(*steps), *middle[first:]], dropped

    def sequence(self, position=(0, 0, 0), counts=()):
        """Endless global sequence of packs from a position on, which must be the end of a step; each pack says where to
        resume after it. Raises ValueError if an epoch ends with other samples than it has."""
        (epoch, w, skip), counts = position, collections.Counter(counts)
        taken = -skip % self.packs_per_step                            # a step ends behind `skip` packs of the window
        while True:
            packs, dropped = self.plan_window(epoch, w, taken)
            if skip == 0:
                counts.update(dropped)
            for k, pack in enumerate(packs[skip:], skip + 1):
                counts["used"] += len(pack.samples)
                pack.position, pack.counts = (epoch, w, k), dict(counts)
                yield pack
            taken, skip, w = (taken + len(packs)) % self.packs_per_step, 0, w + 1
            if w * self.window >= self.n:
                epoch, w = epoch + 1, 0
                if counts.total() != epoch * self.n:
                    raise ValueError(f"{counts.total()} samples are accounted for after {epoch} epochs of {self.n}: "
                                     f"{dict(counts)}")
                if not counts["used"]:
                    raise ValueError(f"no sample fits into a pack: {dict(counts)}; raise --tokens_per_pack (now "
                                     f"{self.tokens_per_pack}) or --max_tiles_per_pack (now {self.tiles_per_pack})")

    def __getitem__(self, pack):
        """The batch of a planned pack: its images decoded and tiled, its text rendered.
        tokens, labels, positions (T,) int64; weights (T,) fp32; cu_seqlens (S+1,) int32; tiles (N, 3, s, s) uint8,
        or int64 (visual tokens, W) of words;
        ids; bad: samples that failed to decode and are left out; size: how much of everything there is; lengths: tokens
        of each sample."""
        samples, answers, words, ids, bad, filled = [], [], [], [], [], 0
        n, side, slot = sum([sum(n_tiles) for *_, n_tiles in pack.samples]), self.tile_size, None
        if n and torch.utils.data.get_worker_info():                   # written where Loader finds them
            slot = pack.number % len(self.slots)
        tiles = torch.empty(n, 3, side, side, dtype=torch.uint8) if slot is None else self.slots[slot, :n]
        for k, i, n_tiles in pack.samples:
            source = self.sources[k]
            row, end = {"id": f"{source.name}:{i}"}, filled
            try:
                row = source.row(i)
                for at, n in enumerate(n_tiles):
                    image, into, end = load_image(source.image(i, at, row)), tiles[end:end + n], end + n
                    how = self.min_tiles, n - (n > 1 and self.thumbnail), self.tile_size, self.thumbnail
                    if (found := count_tiles(*image.size, *how)) != n:   # the file is no longer what the index saw
                        raise ValueError(f"image {at + 1} gives {found} tiles where {n} were planned")
                    into.copy_(GRAY) if self.image_as == "blank" else make_tiles(image, *how, into)
                if self.image_as == "words":
                    new = [torch.from_numpy(cell_words(cells, self.tokenizer)) for cells in row["cells"]]
                sample = render(row, self.tokenizer, self.template, n_tiles, self.tokens_per_tile, self.image_as,
                                self.cell_labels)
                cells = sum(map(len, row.get("cells") or ())) if self.cell_labels != "none" else 0
            except UNREADABLE as e:
                bad.append({"source": source.name, "id": row["id"], "reason": f"{type(e).__name__}: {e}"[:300]})
                continue
            samples.append(sample)
            answers.append(max(1, (sample[1] != IGNORE).sum() - cells))    # supervised tokens, labels of cells apart
            words, filled = words + new if self.image_as == "words" else [], end
            ids.append(str(row["id"]))
        if not samples:                                                # nothing readable: one token that asks nothing
            samples = [(np.array([self.tokenizer.eos_id]), np.array([IGNORE]))]
        real = [len(x) for x, _ in samples]
        if self.pad and (room := self.tokens_per_pack - sum(real)):        # a last document that asks nothing
            samples.append((np.full(room, self.tokenizer.eos_id), np.full(room, IGNORE)))
        tokens, labels = map(np.concatenate, zip(*samples))
        lengths = [len(x) for x, _ in samples]
        answers += [1] * (len(samples) - len(answers))                 # of documents that ask nothing
        weights = [{"token": 1.0, "sample": 1 / n, "sqrt": n ** -0.5}[self.loss_weight] for n in answers]
        weights = np.repeat(np.array(weights, np.float32), lengths)
        arrays = {"tokens": tokens, "labels": labels, "positions": np.concatenate([np.arange(n) for n in lengths]),
                  "weights": weights, "cu_seqlens": np.cumsum([0, *lengths], dtype=np.int32)}
        tiles, at = torch.cat(words) if words else tiles[:filled], labels != IGNORE
        tiles = tiles if slot is None else (slot, filled)
        size = {"tokens": sum(real), "tiles": filled, "samples": len(ids), "bad": len(bad),
                "token_room": self.tokens_per_pack, "tile_room": self.tiles_per_pack,
                "supervised": int(at.sum()), "weight": float(weights[at].sum())}
        position, counts, costs = pack.together or (pack.position, pack.counts, [pack.cost])
        return {k: torch.from_numpy(v) for k, v in arrays.items()} | {
            "tiles": tiles, "ids": ids, "bad": bad, "size": size, "lengths": real, "position": position,
            "counts": counts, "costs": costs}

def _start_worker(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)                      # a preempted job saves; its workers must live
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)                      # until then
    torch.set_num_threads(1)

class Loader(torch.utils.data.DataLoader):
    """A DataLoader whose workers end with the program also where it fails: at exit PyTorch asks them by SIGTERM, which
    they ignore, and Python waits for them for ever. Tiles come in shared memory whose slots are used again and again,
    for new pages cost a fifth of the time: batches come in order and prefetch_factor are under way for each worker, so
    that of one slot more than these the next is always free. OSError where there is no room for it."""
    def __iter__(self):
        packs = self.dataset
        if self.num_workers and any(len(source.images) for source in packs.sources):
            shape = self.num_workers * self.prefetch_factor + 1, packs.tiles_per_pack, 3, *2 * [packs.tile_size]
            try:
                memory = torch.UntypedStorage._new_shared(size := math.prod(shape))
            except RuntimeError as e:
                raise OSError(f"no room for {size / 1e6:.0f} MB of tiles in shared memory ({e}); enlarge /dev/shm "
                              "(docker: --shm-size) or take fewer --num_workers") from None
            packs.slots = slots = torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)
        ref = weakref.ref(batches := super().__iter__())               # alone: it is not kept until then
        if self.num_workers: atexit.register(lambda: (left := ref()) is None or left._shutdown_workers())
        try:
            for batch in batches:
                if type(batch["tiles"]) is list:                       # made of a tuple by DataLoader
                    slot, n = batch["tiles"]
                    tiles = slots[slot, :n]
                    batch["tiles"] = tiles.pin_memory() if self.pin_memory else tiles.clone()
                yield batch
        finally:
            packs.slots = None

def make_loader(packs, rank=0, world=1, num_workers=0, position=(0, 0, 0), counts=()):
    """DataLoader over this rank's packs of the global sequence, from a position on, whatever the number of workers."""
    def mine():
        sequence = packs.sequence(position, counts)
        for number in itertools.count():
            *_, last = together = [*itertools.islice(sequence, world)]     # the micro-batch of all ranks
            together[rank].together = last.position, last.counts, [pack.cost for pack in together]
            together[rank].number = number
            yield together[rank]
    return Loader(packs, sampler=mine(), batch_size=None, num_workers=num_workers, worker_init_fn=_start_worker,
                  prefetch_factor=4 if num_workers else None, pin_memory=torch.cuda.is_available())

def held_out(packs, n, dist):
    """Yield (arguments of VLM.forward, weight of what is supervised) of this rank's share of the first n packs. Each
    rank gets as many, as FSDP needs: what is left over is a repeat whose labels ask nothing."""
    if not (planned := packs.plan_window(0, 0)[0][:n]):
        raise ValueError("no sample of --val_data fits into a pack; raise --tokens_per_pack or --max_tiles_per_pack")
    for i in range(dist.rank, -(-len(planned) // dist.world) * dist.world, dist.world):
        batch, counts = packs[planned[i % len(planned)]], i < len(planned)
        if not counts: batch["labels"].fill_(IGNORE)
        for bad in batch["bad"]: print(f"WARNING: left out of the validation: {bad}", file=sys.stderr, flush=True)
        yield model_inputs(batch, dist.device), counts * batch["size"]["weight"]

def stage_packs(cfg, stage, tokenizer, vision, packs_per_step, data=""):
    """The Packs of one stage of a run: the stage's own data where it names some, else the run's."""
    sources = open_sources(data or stage.data or cfg.data, tokenizer, cfg.template, cfg.image_as)
    return Packs(sources, tokenizer, cfg.template, tile_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile,
                 min_tiles=cfg.min_tiles, max_tiles=cfg.max_tiles, thumbnail=cfg.thumbnail,
                 tokens_per_pack=cfg.tokens_per_pack, tiles_per_pack=cfg.max_tiles_per_pack,
                 seed=cfg.seed, image_as=cfg.image_as, cell_labels=cfg.cell_labels,
                 packs_per_step=packs_per_step, shuffle=cfg.shuffle, pad=cfg.pad_packs,
                 loss_weight=cfg.loss_weight)

def model_inputs(batch, device):
    """The arguments of VLM.forward; the document borders stay on the CPU, where they are read as integers."""
    names = ("tokens", "labels", "positions", "tiles", "weights")
    return {"cu_seqlens": batch["cu_seqlens"]} | {k: batch[k].to(device, non_blocking=True) for k in names}

# ---- command line: check, show, preview ---------------------------------------------------------------------------
TOY_TOKENIZER = str(Path(__file__).parent / "config" / "toy_tokenizer")   # to validate, any vocabulary does

def check(paths):
    """Validate every row, decode every image; print line, field, reason of bad ones. Their number; 1 if no rows."""
    total = n_bad = 0
    def damage(i):                                                     # of a picture of row i, or None
        where = "its row"
        try:
            row = source.row(i)
            for k in range(source.rows[i]["n_images"]):                # of a tar those that were found in it
                where = f"image {k + 1 if source.is_tar else image_names(row)[k]}"
                load_image(source.image(i, k, row))
        except UNREADABLE as e:
            return f"{where}: {e}; mend the file or remove the row"
    for source in open_sources(",".join(paths), Tokenizer(TOY_TOKENIZER), "sailvl-chat"):
        reasons, line, at = {bad["row"]: bad["reason"] for bad in source.meta["bad"]}, 1, 0
        rows = np.flatnonzero(source.rows["n_images"]).tolist()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for a in tqdm(range(0, len(rows), 500), f"{source.path.name}, 500 rows a step", leave=False):
                some = rows[a:a + 500]
                reasons |= {i: why for i, why in zip(some, pool.map(damage, some)) if why}
        for i in sorted(reasons):
            where, (offset, size, *_) = f"row {i + 1}", source.rows[i].item()
            if source.path.is_dir():
                where = json.loads(source._read(offset, size))["image"]
            elif source.lines == source.path and not source.is_tar:
                for k in range(at, offset, 2 ** 24):
                    line += source._read(k, min(2 ** 24, offset - k)).count(b"\n")
                where, at = f"line {line}", offset
            print(f"{source.path}: {where}: {reasons[i]}")
        total, n_bad = total + len(source.rows), n_bad + len(reasons)
    print(f"{total or 'no'} rows, {total - n_bad} good, {n_bad} bad")
    return n_bad or int(total == 0)

def spoken(row, tokenizer, template, tiles, tokens_per_tile):
    """[(text, whether it is supervised)] of what the model sees; runs of visual tokens are shortened."""
    ids, labels = render(row, tokenizer, template, tiles, tokens_per_tile)
    supervised, parts = np.roll(labels, 1) != IGNORE, []               # a label is about the token that follows
    for target, run in itertools.groupby(range(len(ids)), lambda t: supervised[t]):
        words = tokenizer.decode([ids[t] for t in run], skip_special=False)
        parts.append((re.sub("(<IMG_CONTEXT>)+", lambda m: f"<IMG_CONTEXT x {len(m[0]) // len(m[1])}>", words), target))
    return parts, len(ids), supervised.sum()

def show(packs, n):
    """Print the exact string of the first n samples, supervised tokens in [[ ]]."""
    for (s, k, tiles), tokens, _ in zip(*packs.plan_samples(np.arange(min(n, packs.n)))):
        if tokens < 0:
            print(f"--- row {k + 1}: {REASON[tokens]}; try: python data.py check {packs.sources[s].path}")
            continue
        row = packs.sources[s].row(k)
        parts, tokens, supervised = spoken(row, packs.tokenizer, packs.template, tiles, packs.tokens_per_tile)
        print(f"--- row {k + 1}, id {row['id']}: {tokens} tokens, {supervised} supervised, tiles {[*tiles]}")
        print("".join(f"[[{text}]]" if target else text for text, target in parts))

def preview(packs, n, out):
    """Write a page that needs nothing beside it: the first n packs as bars of their documents, then their samples:
    tiles in the order the model gets them, thumbnail last, and the text, supervised tokens marked."""
    (planned, dropped), body, shown = packs.plan_window(0, 0), [], []
    planned = planned[:n]
    for number, pack in enumerate(planned, 1):
        parts = []
        for k, (s, i, tiles) in enumerate(pack.samples):
            batch = packs[Pack([(s, i, tiles)])]
            share = 100 * batch["size"]["tokens"] / packs.tokens_per_pack
            title = html.escape(f"{batch['ids'] or batch['bad']}: {batch['size']['tokens']} tokens, {sum(tiles)} tiles")
            parts.append(f'<i style="width:{share:.2f}%;background:hsl({47 * k % 360} 60% 70%)" title="{title}"></i>')
            pictures = [f'<img src="{picture_uri(Image.fromarray(tile.permute(1, 2, 0).numpy()).resize((112, 112)))}">'
                        for tile in batch["tiles"]]
            text = ""
            if batch["ids"]:
                said = spoken(packs.sources[s].row(i), packs.tokenizer, packs.template, tiles, packs.tokens_per_tile)[0]
                text = "".join(f"<mark>{html.escape(t)}</mark>" if target else html.escape(t) for t, target in said)
            shown.append(f"<h3>pack {number}: {title}</h3>{''.join(pictures)}<pre>{text}</pre>")
        body.append(f"<p>pack {number}: {len(pack.samples)} documents, {pack.tokens} of {packs.tokens_per_pack} tokens "
                    f"({pack.tokens / packs.tokens_per_pack:.1%}), {pack.tiles} of {packs.tiles_per_pack} tiles</p>"
                    f"<div>{''.join(parts)}</div>")
    style = ("body{font:14px sans-serif;margin:2em}div{background:#eee;height:20px;display:flex}i{display:block}"
             "pre{white-space:pre-wrap}mark{background:#bfb}img{margin:1px}")
    Path(out).write_text(f'<!doctype html><meta charset="utf-8"><title>packs</title><style>{style}</style>'
                         + "\n".join(body + shown) + "\n", encoding="utf-8")
    print(f"{out}: {len(planned)} packs, {len(shown)} samples; in no pack: {dropped or 'none'}")

@dataclass(slots=True)
class Config:
    n: int = 8                       # show: samples to print; preview: packs to show
    out: str = "preview.html"        # preview: the page to write
    tokenizer: str = TOY_TOKENIZER   # tokenizer folder; of a model: with its template and tiles, unless these are given
    tile_size: int = 0               # pixels of a tile, else 448
    max_tiles: int = 0               # tile limit of an image, else 12
    tokens_per_pack: int = 8192      # tokens of a pack
    tiles_per_pack: int = 48         # tiles of a pack

def main():
    configure(cfg := Config(), [a for a in sys.argv[1:] if a.startswith("-")])
    command, *paths = [a for a in sys.argv[1:] if not a.startswith("-")] or [""]
    if command not in ("check", "show", "preview") or not paths:
        raise ValueError("usage: python data.py check FILE... | show FILE --n=8 --tokenizer=DIR | preview FILE --out=A")
    if command == "check":
        sys.exit(2 if check(paths) else 0)
    tokenizer, about = Tokenizer(cfg.tokenizer), Path(cfg.tokenizer, "config.json")
    about = read_json(about, dict) if about.exists() else {}
    side, template = cfg.tile_size or about.get("force_image_size", 448), about.get("template", "sailvl-chat")
    per_side = side // about.get("vision_config", {}).get("patch_size", 14) * about.get("downsample_ratio", 0.5)
    packs = Packs(open_sources(",".join(paths), tokenizer, template), tokenizer, template, tile_size=side,
                  tokens_per_tile=int(per_side ** 2), max_tiles=cfg.max_tiles or about.get("max_dynamic_patch", 12),
                  tokens_per_pack=cfg.tokens_per_pack, tiles_per_pack=cfg.tiles_per_pack)
    if cfg.tokenizer == TOY_TOKENIZER:
        print("tokens are those of the toy vocabulary; for a model's: --tokenizer=MODEL_FOLDER", file=sys.stderr)
    show(packs, cfg.n) if command == "show" else preview(packs, cfg.n, cfg.out)

if __name__ == "__main__":
    launch(main)
