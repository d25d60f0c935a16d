"""An index that is being made: its files so far, and a journal from which it goes on."""
import collections
import hashlib
import json
import os
import zlib

from inputs.files import json_hash, naming, read_jsonl
from inputs.records import INDEX_FILES

# The files that decide the order of the samples and the packs.
DECIDING = ("rows.bin", "images.bin")
# So many unknown keys of a source are named.
UNKNOWN_KEYS = 20


class Building:
    """The files of INDEX_FILES in a folder, to which every Measured is appended.

    journal.jsonl has a line for each of them: how long it is, its sha256 and what is in no file.
    What a process that was stopped has left is checked against it and taken up.
    """

    def __init__(self, folder, stack):
        """stack: an ExitStack that closes the files."""
        self.folder = folder
        self.n_images = 0
        self.n_rows = 0
        self.bad = []
        self.unknown = collections.Counter()
        self.hashes = {name: hashlib.sha256() for name in DECIDING}
        self.crcs = dict.fromkeys(INDEX_FILES, 0)
        self.files = {}
        for name in (*INDEX_FILES, "journal.jsonl"):
            self.files[name] = stack.enter_context(open(folder / name, "ab+"))
        self.take_up()

    def take_up(self):
        """Count what is there already, and cut off what is not whole."""
        for file in self.files.values():
            file.seek(0)
        entries = []
        for entry in read_jsonl(self.folder / "journal.jsonl"):
            sizes = [n * dtype.itemsize
                     for n, dtype in zip(entry["lengths"], INDEX_FILES.values(), strict=True)]
            blocks = [self.files[name].read(size)
                      for name, size in zip(INDEX_FILES, sizes, strict=True)]
            if entry["sha256"] != blocks_hash(blocks):
                break
            self.count(entry, blocks)
            entries.append(entry)
        for name, dtype in INDEX_FILES.items():
            n = self.n_rows if name == "rows.bin" else self.n_images
            self.files[name].truncate(n * dtype.itemsize)
        self.files["journal.jsonl"].truncate(0)
        for entry in entries:
            self.write("journal.jsonl", journal_line(entry))

    def count(self, entry, blocks):
        """Add what is now in the files to the sums."""
        n_rows, n_images, _ = entry["lengths"]
        self.n_rows += n_rows
        self.n_images += n_images
        self.bad += entry["bad"]
        self.unknown.update(entry["unknown"])
        for name, block in zip(INDEX_FILES, blocks, strict=True):
            if name in DECIDING:
                self.hashes[name].update(block)
            self.crcs[name] = zlib.crc32(block, self.crcs[name])

    def add(self, found):
        """Append a Measured."""
        found.rows["first_image"] += self.n_images
        arrays = (found.rows, found.images, found.stats)
        blocks = [array.tobytes() for array in arrays]
        entry = {
            "lengths": [len(array) for array in arrays],
            "sha256": blocks_hash(blocks),
            "bad": found.bad,
            "unknown": found.unknown,
        }
        for name, block in zip(INDEX_FILES, blocks, strict=True):
            self.write(name, block)
        self.write("journal.jsonl", journal_line(entry))
        self.count(entry, blocks)

    def write(self, name, content):
        with naming(self.folder / name):
            self.files[name].write(content)
            self.files[name].flush()

    def finish(self, folder):
        """Move the files to the folder of the index. Returns what its meta.json has to say."""
        for name in INDEX_FILES:
            os.fsync(self.files[name].fileno())
            os.replace(self.folder / name, folder / name)
        return {
            "bad": self.bad,
            "digest": json_hash([self.hashes[name].hexdigest() for name in DECIDING]),
            "unknown": dict(self.unknown.most_common(UNKNOWN_KEYS)),
            "files": self.crcs,
        }


def blocks_hash(blocks):
    """sha256 of several stretches of bytes, one behind the other."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def journal_line(entry):
    return json.dumps(entry).encode() + b"\n"
