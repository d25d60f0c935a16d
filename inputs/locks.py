"""Locks between processes: the system frees them when their process ends, however it ends."""
import errno
import fcntl
import os
import platform
import sys
from pathlib import Path

from inputs.files import check_file, naming

# What a file system without locks answers: NFS without lockd, Lustre without -o flock, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
# The file systems of which this process has said that they have no locks.
DEVICES_TOLD = set()


def take_lock(path, wait=False, inherited=True):
    """Hold a lock file, which is made if it is missing, until the returned file is closed.

    Returns (open file, whether there is a lock at all); None in place of the file if another
    process has the lock and wait is False. Where the file system has no locks a warning says so,
    and nobody is kept out. inherited: forked processes hold the lock as well.
    Raises OSError, with the path, if the file cannot be made; ValueError if a pipe is there.
    """
    check_file(path)
    file = open(path, "a+", encoding="utf-8")
    lock = fcntl.flock if inherited else fcntl.lockf
    try:
        lock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in NO_LOCKS:
            device = os.fstat(file.fileno()).st_dev
            warn_of_no_locks(os.path.abspath(path), device, e.strerror)
            return file, False
        file.close()
        if not isinstance(e, (BlockingIOError, PermissionError)):
            raise OSError(e.errno, f"cannot be locked: {e.strerror}", str(path)) from None
        return None, True
    return file, True


def lock_first(folders, what):
    """Make and lock the first of these folders (Path) that can be written.

    Returns (its number, open lock file, whether there is a lock at all, why those before it cannot
    be written); the lock is waited for. ValueError if none can; what: would stand there.
    """
    refused = []
    for number, folder in enumerate(folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock, locked = take_lock(folder / "lock", wait=True)
        except OSError as e:
            refused.append(f"{folder.parent.absolute()}: {e.strerror}")
            continue
        return number, lock, locked, refused
    raise ValueError(f"no {what} can be written ({'; '.join(refused)}); start the command in a "
                     "folder in which you may write")


def take_folder(folder, name, whose="", inherited=True):
    """Make a folder and take its lock file `name`, with the holder's name in it -> the open file.

    ValueError, naming the holder, if another process has it. whose: what holds it, for the message;
    inherited: as in take_lock.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    file, _ = take_lock(path, inherited=inherited)
    if file is None:
        holder = path.read_text(encoding="utf-8")[:200] or "another process"
        raise ValueError(f"{folder} is in use by {whose}{holder}; wait for it, stop it, or "
                         "choose another --out_dir")
    with naming(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file


def warn_of_no_locks(path, device, reason):
    """Say it once for each file system."""
    if device in DEVICES_TOLD:
        return
    DEVICES_TOLD.add(device)
    print(f"warning: {path}: this file system has no locks ({reason}); make sure that no other "
          "process works in this folder, or put it on another disk", file=sys.stderr, flush=True)
