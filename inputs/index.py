"""One memory-map_index index beside each source: where each row is, how long, how large its images."""
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import numpy as np
import os
import threading
import torch
from pathlib import Path
from stat import S_ISREG
from tqdm import tqdm

from inputs.chat import image_names, row_segments
from inputs.files import json_hash, read_json
from inputs.images import IMAGE_SUFFIXES, image_size
from inputs.tars import MAX_BYTES, check_size, open_tar, tar_key

# ---- sources: one memory-map_index index each ------------------------------------------------------------------------
ROW = np.dtype([("offset", "i8"), ("size", "i4"), ("tokens", "i4"), ("first_image", "i8"), ("n_images", "i4"),
                ("is_text", "i4")])                                    # is_text: a bare caption, the .txt of a tar
IMAGE = np.dtype([("offset", "i8"), ("size", "i4"), ("width", "i4"), ("height", "i4")])    # offset, size: in a tar
UNREADABLE = (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError)  # what a bad row raises

@functools.lru_cache(None)
def map_index(path):
    """Rows of an index file, read as they are needed and never copied into this process; () if there are none. Unlike
    numpy's, the mapping keeps no file open: there may be more sources than files a process may have open."""
    kind, size = ROW if path.endswith("rows.bin") else IMAGE, os.path.getsize(path)
    return torch.from_file(path, size=size, dtype=torch.uint8).numpy().view(kind) if size else np.empty(0, kind)

class Source:
    """One file or folder of records with an index beside it: where each row is, how many tokens it has apart from the
    visual ones (-1: quarantined, see `meta`), and the sizes of its images. The index is built once, by whichever
    process comes first, and again when the source or the tokenizer changed. Each process maps it into memory for
    itself; only paths travel to workers."""
    rows = property(lambda self: map_index(f"{self.index}/rows.bin"))
    images = property(lambda self: map_index(f"{self.index}/images.bin"))

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
            if not (self.index / "meta.json").exists() or self._can_be_read_now(tokenizer, template, image_as):
                self._build(tokenizer, template, image_as)
        self.meta = read_json(self.index / "meta.json")

    @property
    def lines(self):
        """The file that holds the rows; a folder, or LLaVA's one array, became lines when the index was built."""
        return self.index / "rows.jsonl" if self.path.is_dir() or self.path.suffix.lower() == ".json" else self.path

    def _read(self, offset, size):
        with open(self.lines, "rb") as file:
            file.seek(offset)
            return file.read(check_size(size, "a row or picture"))

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
                    raw = os.pread(file.fileno(), check_size(size, "a row"), offset)
                    tokens, found = self._measure(raw, is_text, pictures, i, *reading, seen)
                    rows.append((offset, size, tokens, len(images), len(found), is_text))
                    images += found
                except UNREADABLE as e:
                    name = "" if type(e) is ValueError else f"{type(e).__name__}: "
                    bad.append({"source": self.name, "row": i, "reason": f"{name}{e}"[:300]})
                    rows.append((offset, min(size, 2 ** 31 - 1), -1, len(images), 0, is_text))
        return np.array(rows, ROW), np.array(images, IMAGE), bad

    def _can_be_read_now(self, *reading):
        """Whether a row that was unreadable can be read now: its picture is there. A tar changes only as a whole."""
        for bad in read_json(self.index / "meta.json")["bad"] if not self.is_tar else ():
            with contextlib.suppress(*UNREADABLE):
                self._measure(self._read(*self.rows[bad["row"]].item()[:2]), False, None, bad["row"], *reading, {})
                map_index.cache_clear()
                return True

    def _build(self, *reading):
        """Write the index, RECORDS_PER_TASK records at a time; of a long source on all cores, with the same result."""
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
        for name in ("rows", "images"):                                # renamed: a run may have the old ones map_index
            os.replace(self.index / f"new_{name}.bin", self.index / f"{name}.bin")
        meta = {"bad": bad, "digest": json_hash([digest.hexdigest() for digest in hashes])}
        (self.index / "meta.tmp").write_text(json.dumps(meta))
        os.replace(self.index / "meta.tmp", self.index / "meta.json")  # which says that the index is whole

    def _measured(self, records, reading, stack):
        """Yield what _measure_all gives for each chunk of records, in order."""
        chunks, first, waiting = iter(lambda: [*itertools.islice(records, RECORDS_PER_TASK)], []), 0, collections.deque()
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

RECORDS_PER_TASK = 20_000                                      # records that one process measures at a time, about a second

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
