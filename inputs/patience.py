"""Files that cannot be read for a while: a network or file server that is away comes back."""
import collections
import errno
import os
import sys
import time

# A server or the network is away, or the system has no room at the moment. The file may be whole.
PASSING = tuple(getattr(errno, name) for name in """
    EIO ESTALE ETIMEDOUT EAGAIN ENOTCONN ECONNRESET ECONNABORTED ECONNREFUSED EHOSTDOWN EHOSTUNREACH
    ENETDOWN ENETUNREACH ENETRESET ENOLINK ECOMM EREMOTEIO ESHUTDOWN ENFILE EMFILE ENOMEM
    """.split() if hasattr(errno, name))
# Seconds between two attempts: 90 in all. A second file that fails in a row ends the run before
# --timeout_s does.
PAUSES = (1, 2, 4, 8, 15, 30, 30)
# {name of a reading function: files that it gave up in a row}
GIVEN_UP = collections.Counter()


def is_passing(error):
    """Whether an exception is one that may go away by itself."""
    return isinstance(error, OSError) and error.errno in PASSING


def read_patiently(read, *args):
    """read(*args); where the file system is away it is tried again, after pauses that are told.

    A file that stays away raises its OSError, as a damaged disk does for one file. If the next one
    stays away as well, the whole file system is away: DataGone.
    """
    for pause in (*PAUSES, None):
        try:
            result = read(*args)
        except OSError as e:
            if not is_passing(e):
                raise
            if pause is None:
                give_up(read.__name__, e)
                raise
            print(f"WARNING: {describe(e)}; trying again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
        else:
            del GIVEN_UP[read.__name__]
            return result


def give_up(reader, error):
    """DataGone if this is the second file in a row that stays away."""
    GIVEN_UP[reader] += 1
    if GIVEN_UP[reader] > 1:
        raise DataGone(f"{describe(error)}, for {GIVEN_UP[reader] * sum(PAUSES)} s; when the file "
                       "system is back, run the same command again") from None


def describe(error):
    """What is wrong with which file, on one line."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or os.strerror(error.errno)}"


class DataGone(RuntimeError):
    """Nothing can be read any more. It is no fault of a row."""
