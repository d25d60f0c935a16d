"""Measure the records of a source: the tokens of each row, the sizes of its pictures.

A long source is measured on all cores, with the same result.
"""
import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import stat
import sys
import threading

import numpy as np

from inputs.chat import row_segments
from inputs.dialogue import check_pictures
from inputs.files import naming
from inputs.images import image_size
from inputs.patience import is_passing, read_patiently
from inputs.picture_names import image_names, inline_bytes, is_inline
from inputs.records import (
    IMAGE,
    ROW,
    STAT,
    UNREADABLE,
    read_record,
    record_pictures,
)
from inputs.row_keys import unknown_keys
from inputs.tars import MAX_BYTES

# Records that one process measures at a time: about a second of work.
RECORDS_PER_TASK = 20_000


class Measured:
    """What was found of some records, in order.

    rows, images, stats: arrays of ROW, IMAGE and STAT; a row's `first_image` counts from the first
    of these. bad: a dict for each row that cannot be read. unknown: how many rows have each key
    that is not known.
    """

    def __init__(self):
        self.rows = []
        self.images = []
        self.stats = []
        self.bad = []
        self.unknown = collections.Counter()

    def to_arrays(self):
        self.rows = np.array(self.rows, ROW)
        self.images = np.array(self.images, IMAGE)
        self.stats = np.array(self.stats, STAT)
        return self


# ---- on all cores -------------------------------------------------------------------------------

def measure_all(source, records, first, tokenizer, template, stack):
    """Yield a Measured for every RECORDS_PER_TASK of `records`, an iterator, in order.

    first: the number of the first of them. The first task is done in this process. If there are
    more, a pool of processes takes them; `stack` ends it.
    """
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    pool = None
    waiting = collections.deque()
    told = []  # whether a killed process has been told of
    for number in itertools.count():
        task = list(itertools.islice(records, RECORDS_PER_TASK))
        if not task:
            break
        if pool is None and number > 0 and cores > 1:
            # Fresh processes: a fork would copy the threads' locks.
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                cores, context, start_indexer, (tokenizer, template)))
        if pool is None:
            yield measure_records(source, task, first, tokenizer, template)
        else:
            waiting.append((submit(pool, source, task, first), task, first))
        first += len(task)
        if len(waiting) > 2 * cores:
            yield result_of(*waiting.popleft(), source, tokenizer, template, told)
    for future, task, start in waiting:
        yield result_of(future, task, start, source, tokenizer, template, told)


def submit(pool, source, task, first):
    """A Future of measure_task, or None if a process of the pool was killed."""
    try:
        return pool.submit(measure_task, source, task, first)
    except concurrent.futures.BrokenExecutor:
        return None


def result_of(future, task, first, source, tokenizer, template, told):
    """What a Future brings. If its process was killed, this one measures the records itself."""
    with contextlib.suppress(concurrent.futures.BrokenExecutor):
        if future:
            return future.result()
    if not told:
        print(f"WARNING: {source.path}: a process that measured records was killed (out of "
              f"memory?); from record {first} on this one does", file=sys.stderr, flush=True)
        told.append(True)
    return measure_records(source, task, first, tokenizer, template)


# (tokenizer, template) of this process, if it is one of the pool
INDEXER = None


def start_indexer(tokenizer, template):
    """Set a process of the pool up. It gets the tokenizer once, which is large."""
    global INDEXER
    INDEXER = (tokenizer, template)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    # Where the parent is killed, nobody would end the pool.
    threading.Thread(target=end_with_parent, daemon=True).start()


def measure_task(source, records, first):
    """measure_records in a process of the pool."""
    return measure_records(source, records, first, *INDEXER)


# ---- in this process ----------------------------------------------------------------------------

def measure_records(source, records, first, tokenizer, template):
    """The Measured of some records in order; first: the number of the first of them."""
    found = Measured()
    known_sizes = {}
    with open(source.lines, "rb") as file:
        for i, record in enumerate(records, first):
            place = (record.offset, record.size)
            is_text = record.is_text
            images = []
            try:
                row, is_text = read_patiently(read_record, file, record)
                tokens, images = read_patiently(measure_row, source, row, record, tokenizer,
                                                template, known_sizes)
                found.unknown.update(unknown_keys(row))
                if is_text and record.caption:
                    place = record.caption
            except UNREADABLE as e:
                found.bad.append({"source": source.name, "row": i, "reason": reason_of(e)})
                place = (record.offset, min(record.size, 2 ** 31 - 1))
                tokens = -1
            found.rows.append((*place, tokens, len(found.images), len(images), is_text))
            found.images += [image for image, _ in images]
            found.stats += [about for _, about in images]
    return found.to_arrays()


def reason_of(error):
    """Why a row cannot be read, for a list of such rows."""
    reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return reason[:300]


def measure_row(source, row, record, tokenizer, template, known_sizes):
    """(tokens apart from visual ones, [(IMAGE, STAT) of each image as tuples]) of a row.

    known_sizes: {name: the two of it} of pictures measured before. Raises one of UNREADABLE.
    """
    images = []
    if record.pictures is None:
        for k, name in enumerate(image_names(row), 1):
            if is_inline(name):
                images.append(measure_inline(name, k))
                continue
            if name not in known_sizes:
                known_sizes[name] = measure_file(source.root / name, name)
            images.append(known_sizes[name])
    else:
        for _, place in record_pictures(record, row):
            images.append(((*place, *image_size(source.read(*place))), (0, 0)))
    check_pictures(row, len(images))
    parts = row_segments(row, tokenizer, template, [0] * len(images), 0)
    return sum(len(ids) for ids, _ in parts), images


def measure_inline(name, k):
    """(IMAGE, STAT) of picture k of a row, which the row holds itself."""
    try:
        return (0, 0, *image_size(inline_bytes(name))), (0, 0)
    except ValueError as e:
        raise ValueError(f"image {k}: {e}") from None


def measure_file(path, name):
    """(IMAGE, STAT) of a picture's file, as tuples; ValueError that names it as the row does."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_BYTES:
            raise ValueError(f"image {name}: no file, or larger than {MAX_BYTES} bytes ({path})")
        with naming(path):
            return (0, 0, *image_size(path)), (about.st_size, about.st_mtime_ns)
    except OSError as e:
        if is_passing(e):
            raise
        raise ValueError(f"image {name}: {e.strerror} ({path}); mend its path or remove "
                         "the row") from None
