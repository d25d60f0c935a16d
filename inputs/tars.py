"""WebDataset tars: read by offset, written with the same bytes every time."""
import contextlib
import io
import json
import os
import re
import tarfile

from inputs.files import check_file

# Limit of one row, one picture and one member of a tar.
MAX_BYTES = 64 * 2 ** 20


def check_size(size, what):
    """Return `size`; ValueError if it is more than a row or picture may have."""
    if size > MAX_BYTES:
        raise ValueError(f"{what} of {size} bytes; at most {MAX_BYTES} are read")
    return size


class SizeLimitedFile(io.BufferedReader):
    """A file that refuses reads above MAX_BYTES, whatever length a tar's header claims."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_BYTES:
            raise tarfile.ReadError(f"a header or member of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def open_tar(path):
    """Open an uncompressed tar for reading; ValueError if it is damaged, cut off or no file."""
    check_file(path)
    try:
        file = SizeLimitedFile(io.FileIO(path))
        with file, tarfile.open(fileobj=file, mode="r:") as tar:
            yield tar
            if tar.offset + tarfile.BLOCKSIZE > os.path.getsize(path):
                raise tarfile.ReadError("it ends too early")
    except tarfile.TarError as e:
        raise ValueError(f"{path} is no whole tar file ({e}); "
                         "copy it again or leave it out") from None


def tar_members(tar):
    """Yield all members of an open tar but its folders, in order."""
    for member in iter(tar.next, None):
        # tarfile keeps every member it has read, which in a large tar fills the memory.
        tar.members = []
        if not member.isdir():
            yield member


def tar_key(member):
    """What the files of one record share: the path up to the first dot, as WebDataset has it."""
    return re.match(r"(?:.*/)?[^./]*", member.name)[0]


def add_record(tar, key, row, pictures):
    """Add KEY.json and its pictures, [(suffix, bytes), ...]; the row's `image` names them.

    One picture is called KEY.jpg, several are called KEY.0.jpg, KEY.1.jpg and so on.
    """
    names = [key + suffix for suffix, _ in pictures]
    if len(pictures) > 1:
        names = [f"{key}.{k}{suffix}" for k, (suffix, _) in enumerate(pictures)]
    if names:
        row = row | {"image": names if len(names) > 1 else names[0]}
    add_member(tar, f"{key}.json", json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    for name, (_, content) in zip(names, pictures, strict=True):
        add_member(tar, name, content)


def add_member(tar, name, content):
    """Add a file of these bytes to an open tar, without owner or time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
