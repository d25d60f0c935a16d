"""Data: records of any format -> token ids and labels in one pass -> packs -> batches, in an order that is arithmetic.

    # every row validated, line and field named; exit code 2 if any is bad
    python data.py check FILE...
    python data.py show FILE --n=8 --tokenizer=DIR     # exactly what the model sees, supervised tokens marked

Way of a sample: source row (json + image bytes) -> `render` (ids, labels) -> pack of documents (planned from lengths
and image headers alone) -> `Packs.__getitem__` in a worker (decode, tile) -> batch. Nothing is cut: what does not fit
gets fewer tiles, else it is dropped and counted; an unreadable one is quarantined and counted.

Shapes: T tokens of a pack, S samples in a pack, N tiles of a pack.
"""
import bisect, fcntl, glob, hashlib, itertools, json, os, re, shutil, sys, tarfile, unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from vision import count_tiles, image_size, load_image, make_tiles

# ---- tokenizer ----------------------------------------------------------------------------------------------------
# Special and added tokens of Qwen2.5 as InternVL and SAIL-VL extend it; their ids follow the BPE pieces in this order
SPECIAL_TOKENS = [f"<|{t}|>" for t in (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    "vision_end vision_pad image_pad video_pad").split()] + ["<tool_call>", "</tool_call>"] + [f"<|{t}|>" for t in (
        "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep").split()] + [
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
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
    """
    def __init__(self, folder):
        folder = Path(folder)
        if (folder / "vocab.json").exists():
            pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        elif (folder / "tokenizer.json").exists():
            pieces = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        else:
            raise FileNotFoundError(f"no tokenizer in {folder}: it needs vocab.json or tokenizer.json of a Qwen2 model")
        ranks = {bytes(CHAR_TO_BYTE[c] for c in piece): i for piece, i in pieces.items() if piece not in SPECIAL_TOKENS}
        added = folder / "added_tokens.json"
        self.special = {t: len(ranks) + k for k, t in enumerate(SPECIAL_TOKENS)}
        if added.exists():
            self.special |= json.loads(added.read_text(encoding="utf-8"))
        self.bpe = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.special)
        self.n_vocab = max(self.special.values()) + 1
        self.eos_id, self.image_id = self.special["<|im_end|>"], self.special["<IMG_CONTEXT>"]
        self.special_ids = set(self.special.values())
        self.hash = hashlib.sha256(json.dumps([sorted(pieces.items()), self.special]).encode()).hexdigest()[:12]

    def encode(self, text):
        return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))

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

    n_tiles: tiles of each image, in the order of the `<image>` placeholders; without placeholders the images go first.
    """
    images = [[tokenizer.image_id] * (n * tokens_per_tile) for n in n_tiles]
    return _render(tokenizer, template, place_images(turns, len(images)), images)[0]

def place_images(turns, n_images):
    """Turns whose `<image>` placeholders number n_images; if none is written, one per image heads the first turn."""
    written = sum(user.count("<image>") for user, _ in turns)
    if written == 0 and n_images:
        turns = [("<image>\n" * n_images + turns[0][0], turns[0][1]), *turns[1:]]
    elif written != n_images:
        raise ValueError(f"{written} <image> placeholders for {n_images} images: write one per image, or none at all")
    return turns

def _render(tokenizer, template, turns, images, system=None):
    """(ids, targets, image spans): targets[t] is ids[t] where supervised, else IGNORE. `images`: ids in <img></img>."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose from {', '.join(TEMPLATES)}")
    special, encode, sep = tokenizer.special, tokenizer.encode, TEMPLATES[template]["sep"]
    ids, supervised, spans, k = [], [], [], 0
    def add(new, target=False):
        ids.extend(new)
        supervised.extend([target] * len(new))
    start, end = [special["<|im_start|>"]], [special["<|im_end|>"]]
    add(start + encode("system\n" + (system or TEMPLATES[template]["system"])) + end)
    for user, assistant in turns:
        add((encode(sep) if sep else []) + start)
        for j, part in enumerate(("user\n" + user).split("<image>")):
            if j:
                add([special["<img>"]])
                spans.append((len(ids), len(ids) + len(images[k])))
                add(images[k])
                add([special["</img>"]])
                k += 1
            add(encode(part))
        add(end + (encode(sep) if sep else []) + start + encode("assistant\n"))
        if assistant is not None:
            add(encode(assistant) + end, True)
    return ids, [i if s else IGNORE for i, s in zip(ids, supervised)], spans

def render(row, tokenizer, template, n_tiles, tokens_per_tile, image_as="pixels"):
    """Token ids and labels of a record in one pass, so that they cannot disagree.

    n_tiles: tiles of each of the row's images. Returns (ids (T,), labels (T,)), int64; labels[t] is the token that
    position t must predict, IGNORE where nothing is supervised: only answers and their <|im_end|> are.
    image_as "words": the row's `cells` stand in the place of visual tokens (text-only base models);
    "dense": pixels, and the label of each visual token is its cell word (vision-only base models).
    """
    if image_as == "pixels":
        images = [[tokenizer.image_id] * (n * tokens_per_tile) for n in n_tiles]
    else:
        words = [[tokenizer.encode(w) for w in cells] for cells in row["cells"]]
        assert all(len(w) == 1 for cells in words for w in cells), f"{row['id']}: a cell word is not one token"
        words = [[w[0] for w in cells] for cells in words]
        images = words if image_as == "words" else [[tokenizer.image_id] * len(w) for w in words]
    system, turns = conversation(row)
    ids, targets, spans = _render(tokenizer, template, place_images(turns, len(images)), images, system)
    labels = np.full(len(ids), IGNORE, np.int64)
    if image_as == "dense":                                            # each visual token names what it sees
        for (a, b), cells in zip(spans, words):
            labels[a:b] = cells
    else:
        labels[:-1] = targets[1:]
    return np.array(ids, np.int64), labels

def conversation(row):
    """(system or None, [(user, assistant), ...]) of a row in any of the three forms; ValueError if it is broken."""
    if "conversations" in row or "messages" in row:
        name = "conversations" if "conversations" in row else "messages"
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
        talk = []
        for k, turn in enumerate(row[name]):
            role, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
            if role not in roles:
                raise ValueError(f"{name}[{k}]: unknown role {role!r}, use human/gpt/system or user/assistant/system")
            if isinstance(value, list):                                # message parts: text and images in place
                value = "".join("<image>\n" if part.get("type") == "image" else part.get("text", "") for part in value)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{name}[{k}]: empty {role} turn")
            talk.append((roles[role], value))
        system = talk.pop(0)[1] if talk and talk[0][0] == "system" else None
        if not talk or len(talk) % 2 or any(role != ("user", "assistant")[k % 2] for k, (role, _) in enumerate(talk)):
            raise ValueError(f"{name}: turns must alternate user, assistant and end with assistant")
        return system, [(talk[k][1], talk[k + 1][1]) for k in range(0, len(talk), 2)]
    text = row.get("caption", row.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no conversations, messages, caption or text in this row")
    return None, [(CAPTION_PROMPT, text.strip())]

def image_names(row):
    """Names of the row's images, in order."""
    names = row.get("image", row.get("images", []))
    names = [names] if isinstance(names, str) else list(names or [])
    for turn in row.get("messages", []):
        if isinstance(turn.get("content"), list):
            names += [p.get("image", p.get("path")) for p in turn["content"] if p.get("type") == "image"]
    return names

# ---- sources: one memory-mapped index each ------------------------------------------------------------------------
ROW = np.dtype([("offset", "i8"), ("size", "i4"), ("tokens", "i4"), ("first_image", "i8"), ("n_images", "i4"),
                # tokens: all but the visual ones; -1: quarantined
                ("supervised", "i4")])
IMAGE = np.dtype([("offset", "i8"), ("size", "i4"), ("width", "i4"), ("height", "i4"), ("words", "i4")])
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}

class Source:
    """One file or folder of records with an index beside it: row offsets, token counts and image sizes.

    The index is built once, by whichever process comes first, and again when the source or the tokenizer changed.
    Arrays are memory-mapped, files are opened per process, and only paths travel to workers.
    """
    def __init__(self, name, path, tokenizer, template, image_as="pixels", root=None, repeat=1.0, max_tiles=0):
        self.name, self.path, self.repeat, self.max_tiles = name, Path(path), repeat, max_tiles
        self.root = Path(root) if root else (self.path if self.path.is_dir() else self.path.parent)
        self.is_tar = self.path.suffix == ".tar"
        if not self.path.exists():
            raise FileNotFoundError(f"data source {path} does not exist")
        stat = self.path.stat()
        about = [stat.st_size, stat.st_mtime_ns, str(self.path.resolve()), tokenizer.hash, template, image_as]
        self.key = hashlib.sha256(json.dumps(about).encode()
                                  ).hexdigest()[:12]
        # read-only data
        beside = self.path.parent if os.access(self.path.parent, os.W_OK) else Path("shards") / "index"
        self.index = beside / f".{self.path.name}.index-{self.key}"
        if not (self.index / "meta.json").exists():
            beside.mkdir(parents=True, exist_ok=True)
            with open(beside / f".{self.path.name}.index.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (self.index / "meta.json").exists():
                    self._build(tokenizer, template, image_as)
        self.meta = json.loads((self.index / "meta.json").read_text())
        self._open()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("rows", "images", "file")}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._open()

    def _open(self):
        self.rows = np.load(self.index / "rows.npy", mmap_mode="r")
        self.images = np.load(self.index / "images.npy", mmap_mode="r")
        self.file = None

    def _read(self, offset, size):
        """Bytes of the row file, or of the tar."""
        if self.file is None or self.file[0] != os.getpid():           # a forked worker must not share a file position
            made = self.index / "rows.jsonl"
            self.file = (os.getpid(), os.open(made if made.exists() else self.path, os.O_RDONLY))
        return os.pread(self.file[1], size, offset)

    def row(self, i):
        data = self._read(int(self.rows[i]["offset"]), int(self.rows[i]["size"])).decode("utf-8")
        row = json.loads(data) if data.lstrip().startswith("{") else {"caption": data}
        row.setdefault("id", f"{self.name}:{i}")
        return row

    def image(self, i, k, row):
        """Bytes of image k of row i."""
        if self.is_tar:
            entry = self.images[int(self.rows[i]["first_image"]) + k]
            return self._read(int(entry["offset"]), int(entry["size"]))
        return (self.root / image_names(row)[k]).read_bytes()

    # -- building
    def _entries(self):
        """Yield (offset, size, raw row, image entries or None) of every record; a tar is never extracted."""
        if self.is_tar:
            with tarfile.open(self.path) as tar:
                members = [m for m in tar if m.isreg()]                # links and devices are not data
            key = lambda m: re.match(r"(?:.*/)?[^./]*", m.name)[0]     # path up to the first dot, as WebDataset has it
            with open(self.path, "rb") as file:
                for _, group in itertools.groupby(members, key):
                    group = list(group)
                    text = next((m for e in (".json", ".txt") for m in group if m.name.endswith(e)), None)
                    pictures = [m for m in group if Path(m.name).suffix.lower() in IMAGE_SUFFIXES]
                    if text is None:
                        yield 0, 0, None, []
                        continue
                    read = lambda m: (file.seek(m.offset_data), file.read(m.size))[1]
                    raw = read(text)
                    names = [os.path.basename(m.name) for m in pictures]
                    try:                                               # the row names the order of several images
                        wanted = image_names(json.loads(raw)) if text.name.endswith(".json") else []
                        pictures = [pictures[names.index(os.path.basename(w))] for w in wanted] or pictures
                    except ValueError:
                        pass
                    yield text.offset_data, text.size, raw, [(m.offset_data, m.size, read(m)) for m in pictures]
        else:
            path = self.index.with_suffix(".tmp") / "rows.jsonl"
            if self.path.is_dir():                                     # pictures with a caption file of the same stem
                with open(path, "w") as file:
                    for p in sorted(self.path.rglob("*")):
                        if p.suffix.lower() in IMAGE_SUFFIXES:
                            sides = (p.with_suffix(e) for e in (".json", ".txt"))
                            side = next((q for q in sides if q.exists()), None)
                            row = json.loads(side.read_text()) if side and side.suffix == ".json" else {
                                "caption": side.read_text() if side else ""}
                            file.write(json.dumps({"id": p.stem, **row, "image": str(p.relative_to(self.path))}) + "\n")
            elif self.path.suffix == ".json":                          # LLaVA's one array becomes lines once
                try:
                    rows = json.loads(self.path.read_text(encoding="utf-8"))
                except ValueError as e:
                    raise ValueError(f"{self.path} is not valid JSON: {e}") from None
                if not isinstance(rows, list):
                    raise ValueError(f"{self.path} must hold an array of records, or be a meta file")
                with open(path, "w") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                path = self.path
            offset = 0
            with open(path, "rb") as file:
                for line in file:
                    if line.strip():
                        yield offset, len(line), line, None
                    offset += len(line)

    def _build(self, tokenizer, template, image_as):
        work = self.index.with_suffix(".tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        rows, images, bad = [], [], []
        progress = tqdm(self._entries(), desc=f"index {self.path.name}", unit="row", leave=False)
        for offset, size, raw, pictures in progress:
            first, number = len(images), len(rows)
            try:
                if raw is None:
                    raise ValueError("no .json or .txt beside the image")
                data = raw.decode("utf-8")
                row = json.loads(data) if data.lstrip().startswith("{") else {"caption": data}
                row.setdefault("id", f"{self.name}:{number}")
                if pictures is None:
                    pictures = [] if image_as == "words" else [
                        (0, 0, (self.root / name).read_bytes()) for name in image_names(row)]
                cells = row.get("cells", [])
                if image_as != "pixels" and not cells:
                    raise ValueError(f"image_as={image_as} needs `cells`, which only toy data has")
                if image_as == "words":
                    entries = [(0, 0, 0, 0, len(c)) for c in cells]
                else:
                    entries = [(o, s, *image_size(data), 0) for o, s, data in pictures]
                ids, labels = render(row, tokenizer, template, [0] * len(entries), 0, image_as)
                supervised = int((labels != IGNORE).sum())
                if supervised == 0:
                    raise ValueError("no supervised token")
                images += entries
                plain = len(ids) - (sum(e[4] for e in entries) if image_as == "words" else
                                    sum(map(len, cells)) if image_as == "dense" else 0)
                rows.append((offset, size, plain, first, len(entries), supervised))
            except (ValueError, OSError, KeyError, TypeError, AttributeError) as e:
                bad.append({"source": self.name, "row": number, "reason": f"{type(e).__name__}: {e}"[:300]})
                rows.append((offset, size, -1, first, 0, 0))
        np.save(work / "rows.npy", np.array(rows, ROW))
        np.save(work / "images.npy", np.array(images, IMAGE))
        digest = hashlib.sha256(b"".join((work / name).read_bytes() for name in ("rows.npy", "images.npy"))).hexdigest()
        (work / "meta.json").write_text(json.dumps({"bad": bad, "digest": digest}))
        shutil.rmtree(self.index, ignore_errors=True)
        os.replace(work, self.index)

def open_sources(spec, tokenizer, template, image_as="pixels"):
    """Sources of `--data`: comma-separated `path` or `name=path`; a path may be .jsonl, .json (LLaVA array or InternVL
    meta), .tar, a folder of captioned images, or a pattern with `*` or `{000..012}`."""
    sources, common_ = [], (tokenizer, template, image_as)
    for entry in filter(None, (e.strip() for e in re.split(r",(?![^{]*\})", spec))):
        name, path = entry.split("=", 1) if "=" in entry else (None, entry)
        braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
        if braces:
            a, first, last, b = braces.groups()
            paths = [f"{a}{i:0{len(first)}d}{b}" for i in range(int(first), int(last) + 1)]
        else:
            paths = sorted(glob.glob(path)) or [path]
        for p in paths:
            name_p = name or Path(p).stem
            meta = p.endswith(".json") and Path(p).is_file() and json.loads(Path(p).read_text(encoding="utf-8"))
            if not isinstance(meta, dict):
                sources.append(Source(name_p, p, *common_))
                continue
            for key, item in meta.items():                             # InternVL meta: paths as written, else beside it
                here = lambda q: q if os.path.exists(q) else os.path.join(os.path.dirname(p), q)
                if "annotation" not in item:
                    raise ValueError(f"{p}: {key} has no `annotation`")
                sources.append(Source(key, here(item["annotation"]), *common_, root=here(item.get("root", "")),
                                      repeat=float(item.get("repeat_time", 1)),
                                      max_tiles=item.get("max_dynamic_patch", 0)))
    if not sources:
        raise ValueError("no data: give --data=PATH (.jsonl, .json, .tar, a folder, or a pattern)")
    return sources

# ---- order --------------------------------------------------------------------------------------------------------
def permute(i, n, seed, epoch):
    """Positions i (int64 array) under a seeded permutation of range(n), without storing it.

    Four Feistel rounds on the next even power of two, walked until inside n (cycle walking; Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). A pure function of (seed, epoch, i).
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    mask, keys = np.uint64(2 ** half - 1), np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(
        0, 2 ** 63, 4, dtype=np.uint64)
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
@dataclass(slots=True)
class Pack:
    samples: list                    # of (source, row, tiles per image)
    tokens: int                      # planned tokens, visual ones included
    tiles: int
    cost: float                      # relative FLOPs, for dealing packs of like cost to the ranks of a step
    position: tuple = ()             # (epoch, window, packs of the window consumed) after this pack: where to resume
    counts: dict = None              # samples so far: used and dropped, up to and including this pack

class Packs(torch.utils.data.Dataset):
    """Plans packs from lengths alone and turns a planned pack into a batch; stateless but for the paths of its sources.

    tokens_per_pack, tiles_per_pack: the two budgets. The global sequence of packs depends on (seed, sources, budgets,
    packs_per_step) only, never on the number of ranks or workers.
    """
    def __init__(self, sources, tokenizer, template, *, tile_size, tokens_per_tile, min_tiles=1, max_tiles=12,
                 thumbnail=True, tokens_per_pack=8192, tiles_per_pack=48, seed=0, image_as="pixels", packs_per_step=1,
                 window=2048, shuffle=True, loss_weight="token"):
        self.sources, self.tokenizer, self.template, self.image_as = sources, tokenizer, template, image_as
        self.tile_size, self.tokens_per_tile, self.thumbnail = tile_size, tokens_per_tile, thumbnail
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.shuffle = shuffle
        self.tokens_per_pack, self.tiles_per_pack, self.window = tokens_per_pack, tiles_per_pack, window
        self.seed, self.packs_per_step, self.loss_weight = seed, packs_per_step, loss_weight
        # repeat_time as InternVL has it: below 1 the first part of the source, above 1 whole repeats
        counts = [int(len(s.rows) * s.repeat) if s.repeat < 1 else len(s.rows) * int(s.repeat) for s in sources]
        self.ends = np.cumsum(counts)
        self.n = int(self.ends[-1])
        self.n_bad = sum(len(s.meta["bad"]) for s in sources)
        if self.n == 0 or all((s.rows["tokens"] < 0).all() for s in sources):
            raise ValueError(f"no usable sample in {', '.join(str(s.path) for s in sources)} ({self.n} rows, "
                             f"{self.n_bad} unreadable); try: python data.py check {sources[0].path}")
        about = [[s.name, s.meta["digest"], s.repeat, s.max_tiles] for s in sources]
        self.fingerprint = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    def __len__(self):
        return self.n

    def _tiles(self, source, row, limit):
        """Tiles of each image of a row when each image may have at most its share of `limit`."""
        if self.image_as != "pixels" and self.image_as != "dense":
            return []
        n = int(source.rows[row]["n_images"])
        first, limit = int(source.rows[row]["first_image"]), max(1, min(limit, source.max_tiles or limit) // max(n, 1))
        return [count_tiles(int(e["width"]), int(e["height"]), self.min_tiles, limit, self.tile_size, self.thumbnail)
                for e in source.images[first:first + n]]

    def plan_sample(self, source, row):
        """((source, row, tiles per image), tokens, tiles) of a sample, or the reason why it is dropped."""
        entry = source.rows[row]
        if entry["tokens"] < 0:
            return "unreadable"
        for limit in range(self.max_tiles, self.min_tiles - 1, -1):    # too long: fewer tiles, then dropped whole
            tiles = self._tiles(source, row, limit)
            visual = sum(tiles) * self.tokens_per_tile
            if self.image_as == "words":
                first = int(entry["first_image"])
                visual = int(source.images[first:first + int(entry["n_images"])]["words"].sum())
            tokens = int(entry["tokens"]) + visual
            if tokens <= self.tokens_per_pack and sum(tiles) <= self.tiles_per_pack:
                return (source, row, tiles), tokens, sum(tiles)
        return "too_long"

    def plan_window(self, epoch, w):
        """(packs, dropped by reason) of window w of an epoch: best fit in random order (sorted by length, a pack would
        hold samples of one kind), dealt in groups of like cost."""
        at = np.arange(w * self.window, min((w + 1) * self.window, self.n))
        if self.shuffle:
            at = permute(at, self.n, self.seed, epoch)
        planned, dropped = [], {}
        for i in at:
            s = int(np.searchsorted(self.ends, i, side="right"))
            row = int(i - (self.ends[s - 1] if s else 0)) % len(self.sources[s].rows)
            sample = self.plan_sample(self.sources[s], row)
            if isinstance(sample, str):
                dropped[sample] = dropped.get(sample, 0) + 1
            else:
                planned.append(((s, row, sample[0][2]), sample[1], sample[2]))
        packs, room = [], []                                           # room: sorted (tokens left, pack)
        for sample, tokens, tiles in planned:
            k = bisect.bisect_left(room, (tokens, -1))                 # the fullest pack that still has room for it
            while k < len(room) and packs[room[k][1]].tiles + tiles > self.tiles_per_pack:
                k += 1
            if k == len(room):
                packs.append(Pack([], 0, 0, 0.0))
                room.append((self.tokens_per_pack, len(packs) - 1))
            left, number = room.pop(k)
            pack = packs[number]
            pack.samples.append(sample)
            pack.tokens, pack.tiles = pack.tokens + tokens, pack.tiles + tiles
            pack.cost += tokens + tokens ** 2 / 2 ** 14 + 256 * tiles
            bisect.insort(room, (left - tokens, number))
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 1, epoch * 2 ** 32 + w]))
        packs.sort(key=lambda p: p.cost)
        groups = [packs[i:i + self.packs_per_step] for i in range(0, len(packs), self.packs_per_step)]
        rng.shuffle(groups)                                            # steps of like cost inside, random order outside
        return [p for group in groups for p in group], dropped

    def sequence(self, position=(0, 0, 0), counts=None):
        """Endless global sequence of packs from a position on; each pack says where to resume after it."""
        epoch, w, skip = position
        counts = {"used": 0, **(counts or {})}
        while True:
            packs, dropped = self.plan_window(epoch, w)
            for k, pack in enumerate(packs):
                if k < skip:
                    continue
                if k == 0:
                    for reason, n in dropped.items():
                        counts[reason] = counts.get(reason, 0) + n
                counts["used"] += len(pack.samples)
                pack.position, pack.counts = (epoch, w, k + 1), dict(counts)
                yield pack
            epoch, w, skip = (epoch, w + 1, 0) if (w + 1) * self.window < self.n else (epoch + 1, 0, 0)

    def __getitem__(self, pack):
        """The batch of a planned pack: decode and tile its images, render its text.

        tokens, labels, positions (T,) int64; weights (T,) fp32; cu_seqlens (S+1,) int32; tiles (N, 3, s, s) uint8;
        ids; bad: samples that failed to decode and are left out.
        """
        ids, labels, positions, weights, lengths, tiles, names, bad = [], [], [], [], [0], [], [], []
        for s, i, n_tiles in pack.samples:
            source = self.sources[s]
            row = {"id": f"{source.name}:{i}"}
            try:
                row = source.row(i)
                pictures = []
                for k, n in enumerate(n_tiles):
                    limit = n - 1 if n > 1 and self.thumbnail else n
                    new = make_tiles(load_image(source.image(i, k, row)), self.min_tiles if n > 1 else 1, max(limit, 1),
                                     self.tile_size, self.thumbnail)
                    if len(new) != n:
                        raise ValueError(f"image {k} gave {len(new)} tiles where {n} were planned")
                    pictures.append(new)
                x, y = render(row, self.tokenizer, self.template, n_tiles, self.tokens_per_tile, self.image_as)
            except (ValueError, OSError, KeyError) as e:
                bad.append({"source": source.name, "id": row["id"], "reason": f"{type(e).__name__}: {e}"[:300]})
                continue
            n = max(1, int((y != IGNORE).sum()))
            ids.append(x), labels.append(y), positions.append(np.arange(len(x)))
            weight = {"token": 1.0, "sample": 1 / n, "sqrt": n ** -0.5}[self.loss_weight]
            weights.append(np.full(len(x), weight, np.float32))
            lengths.append(len(x)), tiles.extend(pictures), names.append(row["id"])
        # nothing readable: one token that asks for nothing
        if not ids:
            ids, labels, positions = [np.array([self.tokenizer.eos_id])], [np.array([IGNORE])], [np.array([0])]
            weights, lengths = [np.ones(1, np.float32)], [0, 1]
        ids, labels, positions, weights = map(np.concatenate, (ids, labels, positions, weights))
        supervised, s = labels != IGNORE, self.tile_size
        tiles = torch.cat(tiles) if tiles else torch.zeros(0, 3, s, s, dtype=torch.uint8)
        size = {"tokens": len(ids), "tiles": len(tiles), "samples": len(names), "bad": len(bad),
                "supervised": int(supervised.sum()), "weight": float(weights[supervised].sum())}
        arrays = {"tokens": ids, "labels": labels, "positions": positions, "weights": weights,
                  "cu_seqlens": np.cumsum(lengths, dtype=np.int32)}
        return {k: torch.from_numpy(v) for k, v in arrays.items()} | {
            "tiles": tiles, "ids": names, "bad": bad, "size": size, "position": pack.position, "counts": pack.counts}

def make_loader(packs, rank=0, world=1, num_workers=0, position=(0, 0, 0), counts=None):
    """DataLoader over this rank's packs of the global sequence, from a position on, whatever the number of workers."""
    mine = (pack for k, pack in enumerate(packs.sequence(tuple(position), counts)) if k % world == rank)
    # a preempted job saves; its workers must live until then
    def ignore_signals(_):
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        torch.set_num_threads(1)
    return torch.utils.data.DataLoader(packs, sampler=mine, batch_size=None, num_workers=num_workers,
                                       prefetch_factor=4 if num_workers else None, worker_init_fn=ignore_signals,
                                       pin_memory=torch.cuda.is_available())

def stage_packs(cfg, stage, tokenizer, vision, packs_per_step):
    """The Packs of one stage of a run: the stage's own data and budgets where it sets them, else the run's."""
    sources = open_sources(cfg.data or stage.data, tokenizer, cfg.template, cfg.image_as)
    return Packs(sources, tokenizer, cfg.template, tile_size=vision.image_size, tokens_per_tile=vision.tokens_per_tile,
                 min_tiles=cfg.min_tiles, max_tiles=stage.max_tiles or cfg.max_tiles, thumbnail=cfg.thumbnail,
                 tokens_per_pack=stage.tokens_per_pack or cfg.tokens_per_pack, tiles_per_pack=cfg.max_tiles_per_pack,
                 seed=cfg.seed, image_as=cfg.image_as, packs_per_step=packs_per_step, window=cfg.shuffle_window,
                 shuffle=cfg.shuffle,
                 loss_weight=cfg.loss_weight)

def model_inputs(batch, device):
    """The arguments of VLM.forward; the document borders stay on the CPU, where they are read as integers."""
    names = ("tokens", "labels", "positions", "tiles", "weights")
    return {"cu_seqlens": batch["cu_seqlens"]} | {k: batch[k].to(device, non_blocking=True) for k in names}

# ---- command line: check, show ------------------------------------------------------------------------------------
def check(paths):
    """Validate every row of the files; print line, field and remedy of each bad one. Returns how many are bad."""
    total = n_bad = 0
    for path in paths:
        for source in open_sources(path, tokenizer=_plain_tokenizer(), template="sailvl-chat"):
            for bad in source.meta["bad"]:
                print(f"{source.path}: line {bad['row'] + 1}: {bad['reason']}")
            for i in range(len(source.rows)):
                if source.rows[i]["tokens"] < 0:
                    continue
                row = source.row(i)
                try:
                    for k in range(int(source.rows[i]["n_images"])):
                        load_image(source.image(i, k, row))
                    place_images(conversation(row)[1], int(source.rows[i]["n_images"]))
                except (ValueError, OSError) as e:
                    n_bad += 1
                    print(f"{source.path}: line {i + 1}: id {row['id']}: {type(e).__name__}: {e}")
            total, n_bad = total + len(source.rows), n_bad + len(source.meta["bad"])
    print(f"{total} rows, {total - n_bad} good, {n_bad} bad")
    return n_bad

def _plain_tokenizer():
    """The toy tokenizer of this repository: validation needs lengths, not a particular vocabulary."""
    return Tokenizer(Path(__file__).parent / "config" / "toy_tokenizer")

def show(path, n, tokenizer, template, tile_size, tokens_per_tile, max_tiles):
    """Print the exact string of the first n samples, supervised tokens in [[ ]], runs of visual tokens shortened."""
    for source in open_sources(path, tokenizer, template):
        for i in range(min(n, len(source.rows))):
            if source.rows[i]["tokens"] < 0:
                print(f"--- row {i}: unreadable, see: python data.py check {source.path}")
                continue
            row = source.row(i)
            first, k = int(source.rows[i]["first_image"]), int(source.rows[i]["n_images"])
            tiles = [count_tiles(int(e["width"]), int(e["height"]), 1, max(1, max_tiles // max(k, 1)), tile_size, True)
                     for e in source.images[first:first + k]]
            ids, labels = render(row, tokenizer, template, tiles, tokens_per_tile)
            out, marked = [], False
            for t, token in enumerate(ids):
                target = t > 0 and labels[t - 1] != IGNORE
                out.append(("[[" if target else "]]") if target != marked else "")
                marked = target
                out.append(tokenizer.decode([int(token)], skip_special=False))
            context = re.compile(r"(?:<IMG_CONTEXT>)+")
            text = context.sub(lambda m: f"<IMG_CONTEXT x {len(m[0]) // 13}>", "".join(out) + ("]]" if marked else ""))
            n = int((labels != IGNORE).sum())
            print(f"--- {row['id']}: {len(ids)} tokens, {n} supervised, tiles {tiles}\n{text}")

@dataclass(slots=True)
class Config:
    n: int = 8                       # show: samples to print
    tokenizer: str = str(Path(__file__).parent / "config" / "toy_tokenizer")  # show: tokenizer folder
    template: str = "sailvl-chat"    # show: chat template
    tile_size: int = 448             # show: pixels of a tile
    tokens_per_tile: int = 256       # show: visual tokens of a tile
    max_tiles: int = 12              # show: tile limit of a sample
    debug: bool = False              # show tracebacks

def main():
    from configurator import configure
    words = [a for a in sys.argv[1:] if not a.startswith("-")]
    cfg = Config()
    configure(cfg, [a for a in sys.argv[1:] if a.startswith("-")])
    if len(words) < 2 or words[0] not in ("check", "show"):
        raise ValueError("usage: python data.py check FILE... | show FILE --n=8 --tokenizer=DIR")
    if words[0] == "check":
        sys.exit(2 if check(words[1:]) else 0)
    for path in words[1:]:
        show(path, cfg.n, Tokenizer(cfg.tokenizer), cfg.template, cfg.tile_size, cfg.tokens_per_tile, cfg.max_tiles)

if __name__ == "__main__":
    from configurator import launch
    launch(main)
