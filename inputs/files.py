"""Read JSON with an error that says what to do, and write files whole or not at all."""
import contextlib
import errno
import hashlib
import json
import os
import unicodedata
import zlib
from pathlib import Path

# They join letters and emojis; they are no control characters of a terminal.
JOINERS = "\u200c\u200d"


MAX_JSON = 64 * 2**20  # bytes of a configuration or tokenizer; the largest known have 33 MB


def check_file(path, most=None):
    """ValueError if there is something else than a file here, or one of more than `most` bytes.

    Whoever reads a pipe waits for a writer, and a device may have no end.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path} is no file but a directory, pipe or device; put the file there")
    if most and path.stat().st_size > most:
        raise ValueError(f"{path} has more than {most:,} bytes; copy it again")


def read_json(path, kind=object, most=MAX_JSON):
    """The content of a JSON file; ValueError if it is broken or not a `kind` (dict, list).

    most: the largest size that is read, None: any.
    """
    check_file(path, most)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:  # a file of a million brackets recurses too deep
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, kind):
        found = type(content).__name__
        raise ValueError(f"{path} holds a {found}, not a {kind.__name__}; copy it again")
    return content


def read_jsonl(path):
    """The rows of an append-only .jsonl file, [] if there is none.

    A process that is killed, or a full disk, leaves half a line; the run goes on behind it. Lines
    that are no JSON are therefore skipped: each row stands for itself.
    """
    path = Path(path)
    check_file(path)
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return rows


def json_hash(value):
    """sha256 of a value written as JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_hash(path, kind="sha256"):
    """Digest of a file's bytes, in hexadecimal. ValueError if it is a pipe or a device."""
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def file_crc(path):
    """CRC-32 of a file's bytes. It finds damage, three times as fast as a sha256 does."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            crc = zlib.crc32(block, crc)
    return crc


FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def file_problem(error):
    """What an OSError says of a file, "" for an error that names none.

    Where something is forbidden the path is absolute: a relative one does not say in which folder.
    """
    file = getattr(error, "filename", None)
    if not file:
        return ""
    if error.errno in FORBIDDEN:
        return (f"{os.path.abspath(os.fsdecode(file))}: {error.strerror}; give this user the "
                "permission, or choose another place")
    return f"{file}: {error.strerror}"


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file too large


@contextlib.contextmanager
def naming(path):
    """An OSError of the block names `path`, where it names no file or there is no room to write.

    The system names no file when a read or write fails, and copying names the source.
    """
    try:
        yield
    except OSError as e:
        if e.errno is None or (e.filename and e.errno not in NO_ROOM):
            raise
        raise OSError(e.errno, os.strerror(e.errno), str(path)) from None


@contextlib.contextmanager
def open_long(path, mode, **how):
    """Open a file around a long block, whose own errors stay as they are.

    Closing writes what is left in memory. After a failed write it fails again, without a name.
    """
    file = open(path, mode, **how)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        raise
    with naming(path):
        file.close()


@contextlib.contextmanager
def atomic_write(path, mode="w"):
    """Open a file that appears under its name only when all of it is on the disk.

    It is written as PATH.tmp in the same folder, flushed to the disk, and renamed; then the folder
    is flushed too, so that the new name survives a power cut. If the block fails, the old file
    stays and PATH.tmp goes. Text is UTF-8; a lone surrogate, which has none, becomes \\udc80.
    """
    tmp = f"{path}.tmp"
    how = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with naming(path), open(tmp, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        raise
    os.replace(tmp, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_atomic(path, text):
    """Write a small text file whole or not at all (see atomic_write)."""
    with atomic_write(path) as file:
        file.write(text)


def printable(text, keep=""):
    """A text from data as a terminal may show it: what would steer the terminal is escaped.

    Escape sequences can rename a window, move the cursor and so fake lines; marks of direction
    reorder what is read. keep: characters, such as "\n", that are shown as they are.
    """
    if str(text).isprintable():
        return str(text)
    shown = []
    for character in str(text):
        good = character.isprintable() or character in keep + JOINERS
        # All spaces but the plain one count as not printable.
        if not good and unicodedata.category(character) != "Zs":
            character = character.encode("unicode_escape").decode()
        shown.append(character)
    return "".join(shown)
