"""From raw pictures to a scored, deduplicated caption set: stages that read shards and write shards (SAIL-Caption).

    python curate.py collect   --in='web=laion/*.tar,photos.jsonl' --out=shards/collected
    python curate.py dedup     --in=shards/collected --out=shards/unique
    python curate.py select    --in=shards/unique --out=shards/picked --n=100000
    python curate.py annotate  --in=shards/picked --out=shards/reference --endpoint=http://HOST/v1 --endpoint_model=NAME
    python sft.py config/captioner.py --init_from=MODEL_FOLDER --data='shards/reference/*.tar'
    python curate.py recaption --in=shards/unique --out=shards/captions --model=out/captioner/instruction
    python curate.py score     --in=shards/captions --out=shards/scored --endpoint=http://HOST/v1 --endpoint_model=NAME
    python curate.py filter    --in=shards/scored --out=shards/final --min_richness=3 --min_alignment=3
    python curate.py report    --in=before=shards/unique,after=shards/final --out=out/captions
    python curate.py sft-quality --in=train.jsonl ...      # as score; quick | composition | incremental: see `tiers`

A shard of the input becomes one of the output: KEY.jpg as it came and KEY.json with id, alt_text, caption, scores and
more, which data.py reads as training data. What is dropped is a line with its reason in OUT/dropped/. A shard is there
whole or not at all; start a command again and it goes on; several processes, on any machines that see the folder, share
the work.
Shapes: n rows of all shards, C width of a feature.
"""
import collections, contextlib, fcntl, functools, hashlib, itertools, json, os, re, shlex, tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from curation import text as captions
import weights
from inputs import files
from training import distributed
from generate import Assistant
from configurator import configure, run_script, setting, subcommand
from data import TOY_TOKENIZER
from inputs.chat import conversation
from inputs.images import IMAGE_SUFFIXES
from inputs.index import UNREADABLE
from inputs.sources import expand_paths
from inputs.tars import MAX_BYTES, add_record
from inputs.tokenizer import Tokenizer
from inputs.chat import image_names
from inputs.files import read_json
from inputs.sources import open_sources
from inputs.tars import open_tar, tar_key
from evals.endpoint import ATTEMPTS, IMAGE_TYPES, ChatClient, Replies, reply_key
from runs.plan import run_plan
from inputs.images import load_image, make_tiles, normalize, picture_uri

@dataclass(slots=True)
class Config:
    in_: str = setting("", files=True)  # shards (tars), folders of them or of pictures, .jsonl, .json; name=path,...
    out: str = ""                 # folder to write
    seed: int = 0                 # of everything that is drawn
    workers: int = setting(4, at_least=1)  # threads that decode pictures
    shard_size: int = setting(1000, at_least=1)  # rows of a shard, where the input is no shard
    min_side: int = 64            # collect: pixels of the shorter side, at least
    max_aspect: float = 8.0       # collect: longer side over shorter side, at most
    by: Literal["image", "text", "both"] = "image"    # dedup: near-duplicate pictures, captions, or either
    distance: int = 3             # dedup: bits of 64 in which perceptual hashes of near-duplicates differ, at most
    jaccard: float = 0.8          # dedup: share of common word 3-grams of captions that are near-duplicates, at least
    n: int = 1000                 # select: rows to take; quick, composition, incremental: samples of a mix (0: all)
    clusters: int = setting(64, at_least=1)  # select: clusters of features, of --model's ViT, else of the hashes
    endpoint: str = ""            # OpenAI-compatible, http://.../v1, or several, with commas; key: JUDGE_API_KEY
    endpoint_model: str = ""      # the model's name there
    model: str = ""               # or a model folder of ours
    mode: Literal["caption", "recaption"] = "recaption"   # ask with the picture alone, or with its alt-text too
    prompts: str = "prompts"      # folder of the prompts, whose sha256 goes into every row
    threads: int = 8              # requests at a time
    max_new_tokens: int = 512     # longest reply; one that is cut off there is dropped
    batch_size: int = setting(64, at_least=1)  # pictures answered together by a model folder
    max_tiles: int = 0            # tiles of a picture for a model folder; 0: as it says
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # of a model folder
    price_in: float = 0.0         # dollars for a million tokens asked
    price_out: float = 0.0        # and answered
    min_richness: float = 0.0     # filter: judge score, at least; 0: not asked for
    min_alignment: float = 0.0    # filter: the same
    min_words: int = 3            # filter: words of a caption, at least
    max_words: int = 400          # filter: at most
    max_repetition: float = 0.3   # filter: share of word 3-grams that were there before, at most
    script: Literal["latin", "cjk", "cyrillic", "arabic", "devanagari"] = "latin"   # filter: writing that is wanted
    min_script: float = 0.5       # filter: its share of the letters, at least
    max_ngram_share: float = 0.0  # filter: a 4-gram that more captions have is left to this share of them; 0: to all
    references: str = setting("", files=True)  # report: shards whose captions are taken for right
    pictures: int = 60            # report: pictures on the page
    stage: str = "instruction"    # quick, composition, incremental: the stage of sft.py that is trained
    sft: str = "config/sft_2b.py"     # and its configuration and flags
    eval: str = "--benchmarks=all --data_dir=LMUData"  # and eval.py's flags
    run: bool = False             # and whether to run the commands or only to print them

# ---- shards: reading ------------------------------------------------------------------------------------------------
MAX_TEXT = 4 * 2 ** 20             # bytes of the .json of a record, of which Python makes up to 25 times as many
class Damaged(ValueError): """An input that cannot be read to its end; the other shards go on."""
@dataclass(slots=True)
class Unit:
    """What becomes one shard: a tar, or rows start..stop of a source of data.py."""
    name: str
    path: Path
    origin: str = ""              # name of the data set
    source: object = None
    start: int = 0
    stop: int = 0

def find_units(cfg, spec=None):
    """Everything that --in names, in order. ValueError if that is nothing or two shards would get one name."""
    units, tokenizer = [], functools.cache(lambda: Tokenizer(TOY_TOKENIZER))
    for name, path in expand_paths(spec or cfg.in_):
        tars = sorted(path.glob("*.tar")) if path.is_dir() else [path] * (path.suffix == ".tar" and path.exists())
        units += [Unit(f"{name}-{p.stem}" if name else p.stem, p, name or p.parent.name) for p in tars]
        for s in () if tars else open_sources(f"{name}={path}" if name else str(path), tokenizer(), "sailvl-chat"):
            units += [Unit(s.name, s.path, s.name)] if s.is_tar else [
                Unit(f"{s.name}-{k:06d}", s.path, s.name, s, start, min(start + cfg.shard_size, len(s.rows)))
                for k, start in enumerate(range(0, len(s.rows), cfg.shard_size))]
    for unit in units: unit.name = unit.name.replace("/", "_")
    twice = [name for name, k in collections.Counter(u.name for u in units).items() if k > 1]
    if twice or not units:
        raise ValueError(f"two inputs are called {twice[0]}: write --in=NAME=path,OTHER=path" if twice else
                         "nothing to read: give --in=PATTERN of shards (.tar), a folder, .jsonl or .json")
    return units

def read_unit(unit, pictures=True):
    """Yield (row, {name: picture bytes}, None) of every record, or (what there is, {}, why it cannot be taken). Members
    of a tar are read in place, never extracted: their names are words, links and devices are refused."""
    if unit.source:
        for i in range(unit.start, unit.stop):
            row = {"id": f"{unit.source.name}:{i}"}
            try:
                row = unit.source.row(i)
                names = enumerate(image_names(row) if pictures else ())
                yield row, {f"{k}/{name}": unit.source.image(i, k, row) for k, name in names}, None
            except UNREADABLE as e:
                yield row, {}, "no_such_file" if isinstance(e, OSError) else "bad_row"
        return
    try:
        with open_tar(unit.path) as tar:
            for name, members in itertools.groupby((m for m in iter(tar.next, None) if not m.isdir()), tar_key):
                row, found, texts, reason, size = {"id": os.path.basename(name)}, {}, {}, None, 0
                for m in members:
                    tar.members, size = [], size + m.size              # tarfile would remember all it has seen
                    if not m.isreg(): reason = "link_or_device"
                    elif m.name.startswith("/") or ".." in m.name.split("/"): reason = "unsafe_name"
                    elif size > MAX_BYTES: reason = "too_big"
                    elif m.name.lower().endswith(IMAGE_SUFFIXES):
                        found[m.name] = tar.extractfile(m).read() if pictures else b""
                    elif m.name.endswith((".json", ".txt")):
                        if m.size > MAX_TEXT: reason = "too_big"
                        else: texts[m.name[-4:]] = tar.extractfile(m).read()
                try:
                    if ".txt" in texts: row["caption"] = texts[".txt"].decode()
                    if "json" in texts: row |= json.loads(texts["json"])
                except (ValueError, TypeError, RecursionError):
                    reason = reason or "bad_row"
                yield row, {} if reason else found, reason
    except (ValueError, OSError, EOFError) as e:
        raise Damaged(f"{unit.path}: {e}" if str(unit.path) not in str(e) else str(e)) from None

# ---- shards: writing ------------------------------------------------------------------------------------------------
def add(tar, row, pictures, keys):
    """One record; its key is its id, where that can be a name and is new among the `keys` so far, else its number."""
    fits = re.fullmatch(r"(?!row-)[\w-]{1,80}", str(row["id"]), re.ASCII) and str(row["id"]) not in keys
    keys.add(key := str(row["id"]) if fits else f"row-{len(keys):06d}")
    suffixes = [s if (s := os.path.splitext(name)[1].lower()) in IMAGE_SUFFIXES else f".{IMAGE_TYPES.get(data[:2], 'jpeg')}"
                for name, data in pictures.items()]                    # else no stage would see that it is a picture
    add_record(tar, key, row, [*zip(suffixes, pictures.values())])

def write_shard(out, unit, work):
    """Everything `work` yields for a unit, kept or dropped: then fsync, then rename, the shard itself last."""
    counts, began, keys = collections.Counter({"in": 0, "out": 0}), time.time(), set()
    tmp, bad = out / ".shards" / f"{unit.name}.tar", out / "dropped" / f"{unit.name}.tmp"
    with open(tmp, "wb") as file, open(bad, "w", encoding="utf-8", errors="replace") as dropped:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, pictures, reason in work(unit, counts):
                if reason: dropped.write(json.dumps({**row, "reason": reason}, ensure_ascii=False) + "\n")
                else: add(tar, row, pictures, keys)
                counts.update(["in", f"dropped {reason}" if reason else "out"])
        for f in (file, dropped):
            f.flush()
            os.fsync(f.fileno())
    (out / f"{unit.name}.tar").unlink(missing_ok=True)                 # of an input that is no longer so
    os.replace(bad, out / "dropped" / f"{unit.name}.jsonl")
    facts = {**counts, "seconds": time.time() - began, "input": state_of(unit)}
    files.write_atomic(out / ".shards" / f"{unit.name}.json", json.dumps(facts))
    os.replace(tmp, out / f"{unit.name}.tar")

def run_stage(cfg, stage, work, alone=False, **settings):
    """work(unit, counts) yields (row, pictures, reason or None) for every record of a unit, in order. Shards that are
    there stay; one that another process is at is passed over. alone: one process for the whole stage. Prints and writes
    report.json. settings: whatever decides what comes out; a folder made with others is refused."""
    if not cfg.out: raise ValueError("give a folder to write, --out=DIR")
    out, units, fresh, broken = Path(cfg.out), find_units(cfg), 0, {}
    if out.resolve() in {path.resolve() for u in units for path in (u.path, u.path.parent)}:
        raise ValueError(f"--out={out} holds the input; write into another folder")
    for folder in (".shards", "dropped", "replies"): (out / folder).mkdir(parents=True, exist_ok=True)
    settings, made = json.loads(json.dumps({"stage": stage, **settings})), out / "stage.json"
    with taken(out / ".shards" / "settings"):
        if made.exists() and (old := read_json(made, dict)) != settings:
            changed = ", ".join(k for k in {**old, **settings} if old.get(k) != settings.get(k))
            raise ValueError(f"{out} was made with another {changed}: write into another folder, or remove this one")
        files.write_atomic(made, json.dumps(settings, indent=1) + "\n")
    with taken(out / ".shards" / "stage", True) if alone else contextlib.nullcontext(True) as mine:
        if not mine: raise ValueError(f"another process is at {out}; {stage} is the work of one")
        for unit in tqdm(units, desc=stage, unit="shard", disable=None):
            if finished(out, unit): continue
            with taken(out / ".shards" / unit.name, True) as mine:
                if not mine or finished(out, unit): continue
                try:
                    write_shard(out, unit, work)
                    fresh += 1
                except Damaged as e:
                    if str(unit.path) not in str(e): raise             # another shard, without which nothing works
                    broken[unit.name] = str(e)
    with taken(out / ".shards" / "settings"):                          # so that the last one has the last word
        report = stage_report(cfg, out, stage, units)
        files.write_atomic(out / "report.json", json.dumps(report | {"damaged": broken}, indent=1) + "\n")
    print(f"{stage}: {report['done']} of {len(units)} shards{'' if fresh else ', nothing new to do'}; "
          f"in {report['in']}, out {report['out']}, dropped {report['dropped'] or 'none'}; " + ", ".join(
              f"{v} {k}" for k, v in report.items() if k not in ("stage", "shards", "done", "in", "out", "dropped"))
          + ", others are at work elsewhere" * (report["done"] + len(broken) < len(units)))
    if broken: raise ValueError(f"left out: {'; '.join(broken.values())}; {report['done']} shards are whole")

@contextlib.contextmanager
def taken(path, once=False):
    """A lock that goes with its process, however that ends; yields True, with once=True False where another has it."""
    with open(f"{path}.lock", "w") as lock:
        mine = False
        with contextlib.suppress(BlockingIOError): mine = not fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB * once)
        yield mine

def state_of(unit): return [unit.path.stat().st_size, unit.path.stat().st_mtime_ns]
def state_of_all(cfg): return reply_key("inputs", [[unit.name, *state_of(unit)] for unit in find_units(cfg)], None)

def finished(out, unit):
    """Whether the shard is there and its input is still the one it was made of."""
    facts = out / ".shards" / f"{unit.name}.json"
    return (out / f"{unit.name}.tar").exists() and facts.exists() and read_json(facts, dict)["input"] == state_of(unit)

def dollars(cfg, usage):
    """What tokens cost: usage {"prompt_tokens", "completion_tokens"} -> dollars."""
    return (usage.get("prompt_tokens", 0) * cfg.price_in + usage.get("completion_tokens", 0) * cfg.price_out) / 1e6

def stage_report(cfg, out, stage, units):
    """What all finished shards come to: rows in, out and dropped by reason, rates, tokens, spend, time to go."""
    done = [read_json(out / ".shards" / f"{u.name}.json", dict) for u in units if finished(out, u)]
    total = collections.Counter()
    for facts in done: total.update({k: v for k, v in facts.items() if k != "input"})
    seconds, dropped = total.pop("seconds", 0), {k[8:]: v for k, v in sorted(total.items()) if k.startswith("dropped ")}
    means = {k[4:]: round(v / total["out"], 3) for k, v in total.items() if k.startswith("sum ") and total["out"]}
    shown = {k: total[k] for k in ("replies", "calls", "retries", "prompt_tokens", "completion_tokens") if total[k]}
    return {"stage": stage, "shards": len(units), "done": len(done), "in": total["in"], "out": total["out"],
            "dropped": dropped, "seconds": round(seconds, 2), "rows/s": round(total["in"] / max(seconds, 1e-9), 1),
            "seconds to go": round(seconds / max(1, len(done)) * (len(units) - len(done))), **shown,
            **({"dollars": round(spend, 4)} if (spend := dollars(cfg, total)) else {}),
            **({"means": means} if means else {})}

# ---- collect --------------------------------------------------------------------------------------------------------
def perceptual(image):
    """(64-bit difference hash, mean colours (4, 4, 3) uint8) of a PIL picture. A bit: is the right neighbour of a 9x8
    picture lighter by more than 2 levels, so that noise in flat areas is no bit."""
    gray = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), np.int16)       # (8, 9)
    bits = np.packbits(gray[:, 1:] - gray[:, :-1] > 2).tobytes()
    return bits.hex(), np.asarray(image.resize((4, 4), Image.Resampling.BOX)).tobytes().hex()

def examine(cfg, unit, row, pictures, reason):
    """Decode a record's picture once -> (row of the new shard, picture, reason or None)."""
    if reason or len(pictures) != 1:
        return row, pictures, reason or ("no_picture" if not pictures else "several_pictures")
    content, = pictures.values()
    try:
        image = load_image(content)
    except (ValueError, OSError):
        return row, pictures, "unreadable_picture"
    text = row["alt_text"] if isinstance(row.get("alt_text"), str) else None
    with contextlib.suppress(*UNREADABLE): text = text or conversation(row)[1][0][1]
    sha, (bits, tone) = hashlib.sha256(content).hexdigest(), perceptual(image)
    rest = {k: v for k, v in row.items() if isinstance(v, (str, int, float)) and k not in (
        "id", "alt_text", "caption", "text", "image", "sha256")}
    new = {"id": sha[:20], "source": unit.origin, "source_id": row["id"], "alt_text": text or "", "caption": text or "",
           "width": image.width, "height": image.height, "sha256": sha, "dhash": bits, "tone": tone, "origin": rest}
    small, narrow = min(image.size) < cfg.min_side, max(image.size) > cfg.max_aspect * min(image.size)
    return new, pictures, "too_small" if small else "too_narrow" if narrow else None

def collect(cfg):
    """Any source -> shards of pictures that decode, each file once, with its alt-text. Seen files: 100 bytes each."""
    seen, folder = set(), Path(cfg.out) / ".shards"
    again = {unit.name for unit in find_units(cfg) if not finished(folder.parent, unit)}   # their files are new
    for path in folder.glob("*.npy"):
        if path.stem not in again and (folder.parent / f"{path.stem}.tar").exists(): seen.update(np.load(path).tolist())
    def work(unit, counts):
        records, new = read_unit(unit), set()                          # new: not in seen before the shard is whole
        with ThreadPoolExecutor(cfg.workers) as pool:
            for some in iter(lambda: [*itertools.islice(records, 16 * cfg.workers)], []):
                for row, pictures, reason in pool.map(lambda record: examine(cfg, unit, *record), some):
                    if not reason:
                        hash = int(row["sha256"][:16], 16)
                        if hash in new or hash in seen: reason = "same_file"
                        else: new.add(hash)
                    yield row, pictures, reason
        np.save(folder / f"{unit.name}.npy", np.array([*new], np.uint64))
        seen.update(new)
    run_stage(cfg, "collect", work, alone=True, min_side=cfg.min_side, max_aspect=cfg.max_aspect, rows=cfg.shard_size)

# ---- dedup ----------------------------------------------------------------------------------------------------------
MINHASHES, BANDS, REACH, MAX_TONE = 32, 8, 256, 12
INDEX = np.dtype([("id", "S20"), ("source", "u4"), ("hash", "u8"), ("tone", "u1", 48), ("pixels", "i8"),
                  ("words", "i4"), ("minhash", "u4", MINHASHES)])

def minhash(text):
    """(MINHASHES,) uint32: the smallest value of each of so many hash functions over the word 3-grams of a text."""
    keys = captions.ngram_keys([captions.words(text)], 3)
    if not len(keys): return np.zeros(MINHASHES, np.uint32)
    salt = np.random.default_rng(1).integers(1, 2 ** 63, (MINHASHES, 1), dtype=np.uint64) | np.uint64(1)
    return ((keys * salt) >> np.uint64(32)).min(1).astype(np.uint32)   # multiply-shift (Dietzfelbinger et al., 1997)

def make_index(cfg, units):
    """What dedup and select know of each row, on disk beside the shards: INDEX array (n,), mapped into memory."""
    folder = Path(cfg.out) / ".shards"
    for unit in tqdm(units, desc="index", unit="shard", disable=None):
        if (path := folder / f"{unit.name}.rows.npy").exists(): continue
        rows = [row for row, _, _ in read_unit(unit, pictures=False)]
        table = np.zeros(len(rows), INDEX)
        for at, row in zip(table, rows):
            if "dhash" not in row: raise ValueError(f"{unit.path} has no dhash: run `curate.py collect` first")
            at["id"], at["source"] = row["sha256"][:20], int(hashlib.sha256(row["source"].encode()).hexdigest()[:8], 16)
            at["hash"], at["tone"] = int(row["dhash"], 16), np.frombuffer(bytes.fromhex(row["tone"]), np.uint8)
            at["pixels"], at["words"] = row["width"] * row["height"], len(captions.words(row["caption"]))
            if cfg.by != "image": at["minhash"] = minhash(row["caption"])
        np.save(folder / "new.npy", table)
        os.replace(folder / "new.npy", path)
    part = lambda unit: np.load(folder / f"{unit.name}.rows.npy", mmap_mode="r")   # one at a time: Linux maps 65,530
    *starts, n = itertools.accumulate((len(part(unit)) for unit in units), initial=0)
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX, (n,))
    for unit, start, stop in zip(units, starts, [*starts[1:], n]): index[start:stop] = part(unit)
    return index, dict(zip((unit.name for unit in units), starts))

def near_pairs(keys, same):
    """Yield arrays (i, j) of pairs of equal key (n,) for which same(i, j). Each is compared with the REACH that follow
    among those of its key, sorted alike: bounded work where thousands are equal, which chain up all the same."""
    order = np.argsort(keys, kind="stable")
    keys, at = keys[order], np.arange(len(keys))
    for step in range(1, REACH + 1):
        at = at[at + step < len(keys)]
        at = at[keys[at] == keys[at + step]]
        if not len(at): return
        i, j = order[at], order[at + step]
        yield i[good := same(i, j)], j[good]

def join(root, i, j):
    """Union-find on an int array: root (n,) names the smallest member of everybody's cluster; changed in place."""
    while len(i):
        i, j = root[i], root[j]
        np.minimum.at(root, np.maximum(i, j), np.minimum(i, j))
        while ((up := root[root]) != root).any(): root[:] = up
        differ = root[i] != root[j]
        i, j = i[differ], j[differ]

def near_duplicates(hash, tone, distance):
    """hash (n,) uint64, tone (n, 48) uint8 -> root (n,) int64 of each row's cluster. Hashes that differ in at most d
    bits agree in k of d + k blocks of bits (pigeonhole; Manku et al., WWW 2007): sorted once for each choice of k."""
    order = np.argsort(hash, kind="stable")
    hash, root, k = hash[order], np.arange(len(hash)), 2 if distance <= 4 else 3
    edges = np.linspace(0, 64, distance + k + 1).astype(int).tolist()
    blocks = [(1 << b) - (1 << a) for a, b in itertools.pairwise(edges)]
    def same(i, j):
        near = (np.bitwise_count(hash[i] ^ hash[j]) <= distance) & (root[i] != root[j])
        a, b = tone[order[i[near]]].astype(np.int16), tone[order[j[near]]]
        near[near] = (np.abs(a - b) <= MAX_TONE).all(1)                # equal shapes in other colours are no duplicates
        return near
    for some in tqdm([*itertools.combinations(blocks, k)], desc="near pictures", leave=False, disable=None):
        for i, j in near_pairs(hash & np.uint64(sum(some)), same): join(root, i, j)
    out = np.empty_like(root)
    out[order] = order[root]
    return out

def near_texts(signatures, jaccard, root):
    """Join in root (n,) the rows whose MinHash signatures (n, MINHASHES) agree in this share. A pair is looked at if
    one of the bands agrees: 98 % of the pairs that have 0.8 in common, 89 % at 0.7, 67 % at 0.6 (1 - (1 - s^4)^8)."""
    spoken = np.flatnonzero(signatures.any(1))                         # too short for a 3-gram: nobody's duplicate
    for band in np.split(np.arange(MINHASHES), BANDS):
        keys = np.zeros(len(root), np.uint64)
        for k in band: keys = (keys ^ signatures[:, k]) * np.uint64(0x9E3779B97F4A7C15)
        def same(i, j):
            i, j = spoken[i], spoken[j]
            return ((signatures[i] == signatures[j]).mean(1) >= jaccard) & (root[i] != root[j])
        for i, j in near_pairs(keys[spoken], same): join(root, spoken[i], spoken[j])
    return root

def dedup(cfg):
    """Of each cluster of near-duplicates the best stays: most pixels, then most words, then the first."""
    if cfg.distance > 8: raise ValueError(f"--distance={cfg.distance} of 64 bits: pictures that differ; give 0 to 8")
    @functools.cache
    def clusters():
        index, starts = make_index(cfg, find_units(cfg))
        root = np.arange(len(index))
        if cfg.by != "text": root = near_duplicates(np.array(index["hash"]), index["tone"], cfg.distance)
        if cfg.by != "image": near_texts(np.array(index["minhash"]), cfg.jaccard, root)
        order = np.lexsort((-np.arange(len(root)), index["words"], index["pixels"], root))
        last = order[np.append(root[order][1:] != root[order][:-1], True)] if len(order) else order
        best = np.empty_like(root)
        best[root[last]] = last
        return index["id"], best[root], starts
    def work(unit, counts):
        ids, best, starts = clusters()
        for i, (row, pictures, reason) in enumerate(read_unit(unit), starts[unit.name]):
            copy = {} if best[i] == i else {"duplicate_of": ids[best[i]].decode()}
            yield {**row, **copy}, pictures, reason or ("near_duplicate" if copy else None)
    run_stage(cfg, "dedup", work, alone=True, by=cfg.by, distance=cfg.distance, jaccard=cfg.jaccard,
              inputs=state_of_all(cfg))

# ---- select ---------------------------------------------------------------------------------------------------------
def kmeans(x, k, seed, steps=10, sample=100_000):
    """x (n, C) -> cluster (n,) int64 of each row; centres are fitted on a sample."""
    x, draw = torch.from_numpy(x), lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    some = x[draw(len(x))[:sample].sort()[0]]
    centres = some[draw(len(some))[:k]].clone()                                                # (k, C)
    nearest = lambda rows: torch.cat([torch.cdist(part, centres).argmin(1) for part in rows.split(8192)])
    for _ in range(steps):
        one_hot = torch.nn.functional.one_hot(nearest(some), len(centres)).float()             # (sample, k)
        full = (size := one_hot.sum(0)) > 0
        centres[full] = (one_hot.T @ some)[full] / size[full, None]
    return nearest(x).numpy()

def fair_shares(sizes, n):
    """How many to take of each cell (cells,) so that n are taken and no cell gives more than another that could."""
    take, n = np.zeros_like(sizes), min(n, int(sizes.sum()))
    while left := n - int(take.sum()):
        room = np.flatnonzero(take < sizes)[:left]
        take[room] = np.minimum(sizes[room], take[room] + max(1, left // len(room)))
    return take

def lot(seed, name):
    """A number in [0, 1) that depends on seed and name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode("utf-8", "replace")).digest()[:7], "little") / 2 ** 56

@torch.inference_mode()
def vit_features(assistant, unit):
    """(rows, C) float32: mean patch vector of each picture of a shard, seen as one tile."""
    out, records = [], read_unit(unit)
    for some in iter(lambda: [*itertools.islice(records, 32)], []):
        tiles = torch.cat([make_tiles(load_image(next(iter(p.values()))), 1, 1, assistant.model.vision.image_size)
                           for _, p, _ in some])
        weight = assistant.model.vision_model.embeddings.patch_embedding.weight
        out.append(assistant.model.vision_model(normalize(tiles.to(weight.device), weight.dtype)).mean(1).float().cpu())
    return torch.cat(out).numpy()

def select(cfg):
    """A balanced subset: as many from each cluster of each source as there are, up to a common level."""
    @functools.cache
    def chosen():
        index, starts = make_index(cfg, units := find_units(cfg))
        bits = np.unpackbits(index["hash"].astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
        x = np.concatenate([index["tone"] / np.float32(255), bits / np.float32(8)], 1)         # (n, 48 + 64)
        if cfg.model:
            assistant = load_model(cfg)
            x = np.concatenate([vit_features(assistant, unit) for unit in units])
        pairs = np.stack([index["source"], kmeans(x, cfg.clusters, cfg.seed)])                 # (2, n)
        cells = np.unique(pairs, axis=1, return_inverse=True)[1]
        order = np.lexsort(([lot(cfg.seed, i.decode()) for i in index["id"]], cells))
        sizes = np.bincount(cells)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)              # inside its cell
        (keep := np.zeros(len(order), bool))[order] = rank < fair_shares(sizes, cfg.n)[cells[order]]
        return keep, cells, starts
    def work(unit, counts):
        keep, cells, starts = chosen()
        for i, (row, pictures, reason) in enumerate(read_unit(unit), starts[unit.name]):
            yield {**row, "cluster": int(cells[i])}, pictures, reason or (None if keep[i] else "not_selected")
    run_stage(cfg, "select", work, alone=True, n=cfg.n, clusters=cfg.clusters, seed=cfg.seed, inputs=state_of_all(cfg),
              model=weights.weights_hash(cfg.model)[:16] if cfg.model else "hashes")

# ---- asking: annotate, recaption, score, sft-quality ----------------------------------------------------------------
REFUSAL = re.compile(r"\W*((i['’]?m|i am) (sorry|unable|not able)|sorry|i (can['’]?t|cannot|won['’]?t)\b|很?抱歉|对不起)",
                     re.I)

def load_model(cfg):
    """The Assistant of --model on this process' GPU, or the CPU; processes share nothing but the folder they write."""
    device = distributed.own_device()
    return Assistant(cfg.model, device, distributed.compute_dtype(cfg.dtype, device), max_tiles=cfg.max_tiles)

class Local:
    """A model folder that is asked like ChatClient: the same jobs, the same log, batches instead of threads."""
    def __init__(self, cfg, assistant, name, cache):
        self.cfg, self.assistant, self.name = cfg, assistant, name
        self.replies, self.counts = Replies(cache), collections.Counter()

    def each(self, jobs):
        left, known = dict(enumerate(jobs)), self.replies.known
        for temperature in ATTEMPTS:
            keys = {i: reply_key(self.name, prompt, temperature, pictures) for i, (prompt, _, pictures) in left.items()}
            todo = [i for i in left if keys[i] not in known]
            # drawn answers come one by one, each from a seed of its own: the same whatever was killed before
            for some in [todo] if temperature == 0 else [[i] for i in todo]: self.answer(left, some, keys, temperature)
            for i in [i for i in left if left[i][1](known[keys[i]]["reply"])]:
                left.pop(i)
                yield i, known[keys[i]]
        yield from ((i, None) for i in left)

    def answer(self, jobs, some, keys, temperature):
        """Answer these jobs together and write the replies down as they come."""
        asked, most = [], self.cfg.max_new_tokens
        def prompts():                                                 # made when a place among the rows is free
            for i in some:
                try:
                    tiles = [self.assistant.tiles(content) for content in jobs[i][2]]
                except (ValueError, OSError):
                    self.replies.add(keys[i], reply="", finish="unreadable", usage={})
                    continue
                asked.append(i)
                yield self.assistant.prompt([("<image>\n" * len(tiles) + jobs[i][0], None)], tiles)
        seed = int(keys[some[0]][:8], 16) if some else 0
        for number, ids in self.assistant.ids_each(prompts(), batch_size=self.cfg.batch_size, max_new_tokens=most,
                                                   temperature=temperature, seed=seed):
            self.counts["calls"] += 1
            self.replies.add(keys[asked[number]], reply=self.assistant.tokenizer.decode(ids).strip(),
                             finish="length" if len(ids) >= most else "stop", usage={"completion_tokens": len(ids)})

def ask_rows(cfg, stage, question, valid, take, names):
    """question(row, prompts) -> (name of the prompt, text); take(row, reply, name, text) puts a valid one into the
    row and returns a reason to drop it, or None. names: of the prompts in --prompts."""
    texts = {name: (Path(cfg.prompts) / f"{name}.txt").read_text("utf-8").strip() for name in names}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}
    if bool(cfg.model) == bool(cfg.endpoint):
        raise ValueError(f"{stage} asks a model: give --model=FOLDER, or --endpoint=URL and --endpoint_model=NAME")
    name = weights.weights_hash(cfg.model)[:16] if cfg.model else cfg.endpoint_model
    assistant, replies = functools.cache(lambda: load_model(cfg)), Path(cfg.out) / "replies"
    def work(unit, counts):
        records, cache = [*read_unit(unit)], replies / f"{unit.name}.jsonl"
        backend = Local(cfg, assistant(), name, cache) if cfg.model else ChatClient(
            cfg.endpoint, name, cache, cfg.threads, cfg.max_new_tokens)
        jobs, same, asked = [], collections.defaultdict(list), {}
        for i, (row, pictures, reason) in enumerate(records):
            if not (reason or pictures or stage == "sft-quality"): reason = "no_picture"
            try:
                if not reason: asked[i] = question(row, texts)
            except UNREADABLE:                                         # no dialogue, a caption that is a number
                reason = "bad_row"
            records[i] = row, pictures, reason
            if reason: continue
            alike = same[reply_key(name, asked[i][1], 0, pictures.values())]      # equal questions are asked once
            alike.append(i)
            if len(alike) == 1: jobs.append((asked[i][1], valid, [*pictures.values()]))
        same, spent = [*same.values()], 0.0
        with tqdm(total=len(asked), desc=unit.name, leave=False, disable=None) as bar:
            for i, entry in ((i, entry) for k, entry in backend.each(jobs) for i in same[k]):
                row, pictures, _ = records[i]
                finish = "" if not entry else str(entry["finish"])
                if not entry: reason = "no_valid_reply"
                elif finish.startswith("http_"): reason = finish
                elif finish == "content_filter" or REFUSAL.match(entry["reply"]): reason = "refused"
                elif finish == "length": reason = "cut_off"
                else: reason = take(row, entry["reply"], *asked[i])
                row["by"], row["prompt_sha256"] = {**row.get("by", {}), stage: name}, hashes[asked[i][0]]
                records[i] = row, pictures, reason
                counts["http"] += reason is not None and reason.startswith("http_")
                if counts["http"] > max(20, len(asked) // 2):
                    raise ValueError(f"{cfg.endpoint} refuses most pictures ({reason}): see its log, then run again")
                spent += dollars(cfg, entry["usage"]) if entry else 0
                bar.set_postfix({**backend.counts, "dollars": round(spent, 2)}, refresh=False)
                bar.update()
        del counts["http"]
        entries = backend.replies.known.values()                       # also those that a killed process has paid for
        for kind in ("prompt_tokens", "completion_tokens"): counts[kind] = sum(e["usage"].get(kind, 0) for e in entries)
        counts.update(replies=len(entries), **backend.counts)
        for row, _, reason in records if names[0] in SCORES else ():
            if not reason: counts.update({f"sum {k}": row["scores"][k] for k in SCORES[names[0]]})
        yield from records
    run_stage(cfg, stage, work, model=name, prompts=hashes, max_new_tokens=cfg.max_new_tokens, mode=cfg.mode,
              max_tiles=cfg.max_tiles)

def plain(text): return text.replace("<image>", "< image >")           # typed by a user it is no picture

def caption(cfg, stage):
    """Captions by an endpoint or a model folder; annotate adds the dialogue on which a captioner is trained."""
    def question(row, prompts):
        name = "recaption" if cfg.mode == "recaption" and row.get("alt_text") else "caption"
        return name, prompts[name].replace("{alt_text}", plain(row.get("alt_text") or ""))
    def take(row, reply, name, text):
        if row.get("caption") not in (None, "", row.get("alt_text")): row["caption_before"] = row["caption"]
        row["caption"], row["mode"] = reply.strip(), name
        for stale in ("scores", "conversations"): row.pop(stale, None)
        if stage == "annotate":
            row["conversations"] = [{"from": "human", "value": "<image>\n" + text},
                                    {"from": "gpt", "value": row["caption"]}]
    ask_rows(cfg, stage, question, lambda reply: bool(reply.strip()), take, ("caption", "recaption"))

SCORES = {"score": ("richness", "alignment"), "sft_quality": ("difficulty", "complexity", "relevance")}

def read_scores(text, names):
    """{name: 1 to 5} of a reply that is one line `name: N` for each name and nothing else; None for any other."""
    lines = [re.fullmatch(r"(\w+): ([1-5])", line.strip().lower()) for line in text.strip().splitlines()]
    found = [(line[1], int(line[2])) for line in lines if line]
    return dict(found) if len(found) == len(lines) and sorted(n for n, _ in found) == sorted(names) else None

def score(cfg, stage, name):
    """Judge scores, 1 to 5 each: of a caption (SAIL-VL2's richness and alignment), or of a row of training data."""
    def question(row, prompts):
        talk = conversation(row)[1] if name == "sft_quality" else []
        talk = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in talk)
        text = prompts[name].replace("{caption}", row.get("caption") or "").replace("{conversation}", talk)
        return name, plain(text)
    def take(row, reply, *_): row["scores"] = {**row.get("scores", {}), **read_scores(reply, SCORES[name])}
    ask_rows(cfg, stage, question, lambda reply: read_scores(reply, SCORES[name]) is not None, take, (name,))

# ---- filter ---------------------------------------------------------------------------------------------------------
def told(row):
    """(caption, scores) of a row, whoever wrote it; "" and {} where they are of another type."""
    text, scores = row.get("caption"), row.get("scores")
    return text if isinstance(text, str) else "", scores if isinstance(scores, dict) else {}

def fault(cfg, row):
    """The first reason against a caption, or None."""
    text, scores = told(row)
    for name, least in (("richness", cfg.min_richness), ("alignment", cfg.min_alignment)):
        if least and scores.get(name, 0) < least: return f"low_{name}" if name in scores else "not_scored"
    if (n := len(captions.words(text))) < cfg.min_words: return "too_short"
    if n > cfg.max_words: return "too_long"
    if captions.repetition(text) > cfg.max_repetition: return "repetitive"
    return "other_script" if captions.script_share(text, cfg.script) < cfg.min_script else None

def filter_rows(cfg):
    """Thresholds; then, against homogenisation, captions with a very common 4-gram are thinned out by lot, which is not
    the lot of `select`, for that has kept low ones."""
    mask = np.uint64(2 ** 22 - 1)                                      # counters; few collide where n-grams are common
    grams = lambda row: np.unique(captions.ngram_keys([captions.words(told(row)[0])], 4) & mask)
    @functools.cache
    def common_grams():
        counts, n = np.zeros(int(mask) + 1, np.int64), 0
        for unit in find_units(cfg):
            for row, _, reason in read_unit(unit, pictures=False):
                if not reason and not fault(cfg, row):
                    counts[grams(row)] += 1
                    n += 1
        return counts / max(1, n)                                      # share of the captions that have it
    def work(unit, counts):
        for row, pictures, reason in read_unit(unit):
            reason = reason or fault(cfg, row)
            if not reason and cfg.max_ngram_share:
                most = common_grams()[grams(row)].max(initial=0)
                if lot(f"filter {cfg.seed}", row["id"]) * most > cfg.max_ngram_share: reason = "homogeneous"
            yield row, pictures, reason
    names = "min_richness min_alignment min_words max_words max_repetition script min_script max_ngram_share seed"
    run_stage(cfg, "filter", work, alone=bool(cfg.max_ngram_share), **{k: getattr(cfg, k) for k in names.split()},
              inputs=state_of_all(cfg) if cfg.max_ngram_share else None)

# ---- report ---------------------------------------------------------------------------------------------------------
def report(cfg):
    """Sets of captions side by side, name=shards,...: diversity, scores, agreement with references; page, numbers."""
    sets, scores, shown, (tag, note) = collections.defaultdict(dict), {}, {}, captions.tagger()
    right = {row["id"]: told(row)[0] for unit in find_units(cfg, cfg.references) for row, _, _ in read_unit(
        unit, pictures=False)} if cfg.references else {}
    units = find_units(cfg)
    for unit in tqdm(units, desc="report", unit="shard", disable=None):
        for row, pictures, reason in read_unit(unit):
            if reason: continue
            if (key := row["id"]) in sets[unit.origin]: key = f"{unit.name}/{key}"      # of a set that is not ours
            sets[unit.origin][key], judged = told(row)
            for name, value in judged.items():
                if value not in range(1, 6): continue
                scores.setdefault(f"{unit.origin}, {name}", dict.fromkeys(range(1, 6), 0))[value] += 1
            if len(shown) < cfg.pictures and pictures and unit.origin == units[0].origin:
                with contextlib.suppress(ValueError):
                    shown[key] = picture_uri(load_image(next(iter(pictures.values()))))
    numbers = {name: captions.statistics([*texts.values()], tag) for name, texts in sets.items()}
    agree = {}
    for name, texts in sets.items():
        ids = [i for i in texts if i in right]
        found = captions.agreement([texts[i] for i in ids], [right[i] for i in ids], tag)
        agree |= {f"{name}, {what}": {"captions": len(ids), **values} for what, values in found.items()}
    tables = {"Diversity": numbers, **({"Scores": scores} if scores else {}), **({"Agreement": agree} if agree else {})}
    out = Path(cfg.out or "out/captions")
    out.mkdir(parents=True, exist_ok=True)
    files.write_atomic(out / "report.html", captions.page(sets, tables, shown, note))
    files.write_atomic(out / "report.json", json.dumps({"note": note, **tables}, indent=1) + "\n")
    for title, rows in tables.items():
        for name, row in rows.items(): print(f"{title} {name}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
    if right and not agree: note += "; no caption has an id of the references"
    print(f"{note}\nwrote {out / 'report.html'} and {out / 'report.json'}")

# ---- three tiers of choosing fine-tuning data -----------------------------------------------------------------------
def tiers(cfg, tier):
    """SAIL-VL's evaluation of data, --in=name=source,...: quick ranks the sources as candidates, each cut to --n rows;
    composition halves one at a time of all together; incremental adds one at a time and keeps it when the score does
    not fall. Writes InternVL meta files, prints the commands of training and evaluation, runs them with --run=True. A
    share is the first part of a source, so shuffle it once."""
    out, groups, results = Path(cfg.out or f"out/{tier}"), collections.defaultdict(list), {}
    for source in open_sources(cfg.in_, Tokenizer(TOY_TOKENIZER), "sailvl-chat"): groups[source.name].append(source)
    size = {name: sum(len(s.rows) for s in sources) for name, sources in groups.items()}
    def measure(mix, shares):
        """overall score of the shares {group: 0 to 1}, cut to --n samples in all; None if nothing is run."""
        total = sum(size[g] * share for g, share in shares.items())
        cut = min(1.0, cfg.n / total) if cfg.n else 1.0
        meta = {f"{g}-{k}": {"root": f"{s.root.resolve()}", "annotation": f"{s.path.resolve()}",
                             "length": len(s.rows), "repeat_time": share * cut}
                for g, share in shares.items() for k, s in enumerate(groups[g])}
        folder = out / mix
        train = ["sft.py", *shlex.split(cfg.sft), f"--stages={cfg.stage}", f"--{cfg.stage}.data={folder / 'mix.json'}",
                 f"--out_dir={folder / 'sft'}"]
        test = ["eval.py", *shlex.split(cfg.eval), f"--model={folder}/sft/{cfg.stage}", f"--out_dir={folder / 'eval'}"]
        run_plan(folder, [train, test], cfg.run, **{"mix.json": json.dumps(meta, indent=1) + "\n"})
        results[mix] = read_json(folder / "eval" / "results.json", dict)["overall"] if cfg.run else None
        return results[mix]
    if tier == "quick":
        for g in groups: measure(g, {g: 1.0})
    elif tier == "composition":
        measure("all", everything := dict.fromkeys(groups, 1.0))
        for g in groups: measure(f"half_{g}", everything | {g: 0.5})
    else:
        first, *others = groups
        kept, best = [first], measure(first, {first: 1.0}) or 0.0
        for g in others:                                               # printed only: as if every one were kept
            now = measure("+".join([*kept, g]), dict.fromkeys([*kept, g], 1.0))
            if not cfg.run or (now or 0.0) >= best: kept, best = [*kept, g], now or 0.0
        print(f"kept: {', '.join(kept)}" if cfg.run else "with --run=True a set stays only if the score does not fall")
    ranked = sorted(results.items(), key=lambda item: -(item[1] or 0))
    files.write_atomic(out / "ranking.json", json.dumps(ranked, indent=1) + "\n")
    for mix, value in ranked if cfg.run else (): print(f"{value or 0:8.2f}  {mix}")

STAGES = {"collect": collect, "dedup": dedup, "select": select, "annotate": lambda cfg: caption(cfg, "annotate"),
          "recaption": lambda cfg: caption(cfg, "recaption"), "score": lambda cfg: score(cfg, "score", "score"),
          "filter": filter_rows, "report": report, "sft-quality": lambda cfg: score(cfg, "sft-quality", "sft_quality"),
          **{tier: functools.partial(tiers, tier=tier) for tier in ("quick", "composition", "incremental")}}

def main():
    cfg = Config()
    usage = f"python curate.py {'|'.join(STAGES)} --in=... --out=...; --help lists all settings"
    stage, flags = subcommand(STAGES, usage, cfg)
    configure(cfg, flags or ["--help"])
    stage(cfg)

if __name__ == "__main__":
    run_script(main)
