"""WebDataset tars: read by offset, written byte for byte the same every time."""
import contextlib
import io
import json
import os
import re
import tarfile



MAX_BYTES = 64 * 2 ** 20                                               # of one row, picture or member of a tar

def check_size(size, what):
    """size; ValueError if it is more than what one row or picture may have."""
    if size > MAX_BYTES: raise ValueError(f"{what} of {size} bytes; it may have {MAX_BYTES}")
    return size

class SizeLimitedFile(io.BufferedReader):
    """A file of which nothing reads more than MAX_BYTES at once, whatever length a header of a tar claims to have."""
    def read(self, size=-1):
        if not 0 <= size <= MAX_BYTES: raise tarfile.ReadError(f"a header or member of {size} bytes")
        return super().read(size)

@contextlib.contextmanager
def open_tar(path):
    try:
        with SizeLimitedFile(io.FileIO(path)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
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
