"""Validate sources: read every row and decode every image."""
import concurrent.futures
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from inputs.dialogue import conversation
from inputs.files import printable
from inputs.images import load_image
from inputs.index import indexes_of
from inputs.patience import read_patiently
from inputs.picture_names import image_names, is_inline
from inputs.records import UNREADABLE
from inputs.sources import source_notes

# From so many on a row has many questions about its picture.
MANY_QUESTIONS = 3


def check_sources(sources):
    """Read every row and image; print place, field and reason of each bad row.

    Returns the number of bad rows, 1 if there is no row at all.
    """
    n_rows = 0
    n_bad = 0
    for source in sources:
        reasons = {row["row"]: row["reason"] for row in source.meta["bad"]}
        questions = []
        reasons |= check_images(source, questions)
        bad = sorted(reasons)
        for i, where in zip(bad, row_places(source, bad), strict=True):
            print(f"{source.path}: {where}: {reasons[i]}")
        n_many = sum(n >= MANY_QUESTIONS for n in questions)
        if n_many > len(questions) / 2:
            print(f"{source.path}: {n_many:,} of {len(questions):,} rows with a picture have "
                  f"{MANY_QUESTIONS} or more questions about it; where later questions give away "
                  "the answers of earlier ones, write each as a row of its own")
        n_rows += len(source.rows)
        n_bad += len(bad)
    for line in source_notes(sources):
        print(line)
    print(f"{n_rows or 'no'} rows, {n_rows - n_bad} good, {n_bad} bad")
    if n_rows == 0:
        return 1
    return n_bad


def check_images(source, questions):
    """{row: reason} of rows with an image that cannot be decoded, read on all cores.

    questions: a list that gets the number of questions of each row with one picture.
    Indexes that have another size of an image are said, and removed: they are made again.
    """
    reasons = {}
    indexes = indexes_of(source)
    stale = {}
    rows = np.flatnonzero(source.rows["n_images"]).tolist()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        title = f"{source.path.name}, 500 rows a step"
        for start in tqdm(range(0, len(rows), 500), title, leave=False):
            some = rows[start:start + 500]
            found = pool.map(lambda i: image_problem(source, i, indexes, stale, questions), some)
            reasons |= {i: reason for i, reason in zip(some, found, strict=True) if reason}
    for folder, names in stale.items():
        print(f"{source.path}: {len(names)} pictures changed since they were measured "
              f"({printable(', '.join(sorted(names)[:4]))}); {forget_index(folder)}")
    return reasons


def image_problem(source, i, indexes, stale, questions):
    """What is wrong with the images of row i, or None.

    stale: {folder of an index: names of images} gets those that have another size there;
    questions: see check_images.
    """
    where = "its row"
    try:
        row = source.row(i)
        # In a tar those that were found in it count, whatever the row names.
        for k in range(source.rows[i]["n_images"]):
            name = str(k + 1)
            if not source.is_tar and not is_inline(image_names(row)[k]):
                name = image_names(row)[k]
            where = f"image {name}"
            size = read_patiently(lambda k=k: load_image(source.image(i, k, row)).size)
            for index in indexes:
                if not has_size(index, i, k, size):
                    stale.setdefault(index.index, set()).add(name)
        if source.rows[i]["n_images"] == 1:
            questions.append(len(conversation(row)[1]))
    except UNREADABLE as e:
        return f"{where}: {e}; mend the file or remove the row"
    return None


# ---- the indexes of a source ---------------------------------------------------------------------

def has_size(index, i, k, size):
    """Whether an index has this size of image k of row i, or none of it."""
    row = index.rows[i]
    if k >= row["n_images"]:
        return True
    image = index.images[row["first_image"] + k]
    return (image["width"], image["height"]) == size


def forget_index(folder):
    """Remove meta.json of an index, without which it is not believed. Returns what was done."""
    try:
        Path(folder, "meta.json").unlink(missing_ok=True)
    except OSError as e:
        return f"remove {folder}, which this user may not ({e.strerror})"
    return f"the next run measures them again ({folder})"


# ---- places -------------------------------------------------------------------------------------

def row_places(source, rows):
    """Where a user finds each of these rows, in order: a line, a file name or a number."""
    places = []
    line = 1
    counted = 0  # bytes whose lines are counted
    for i in rows:
        offset, size, *_ = source.rows[i].item()
        place = f"row {i + 1}"
        if source.path.is_dir():
            place = json.loads(source.read(offset, size))["image"]
        elif source.lines == source.path and not source.is_tar:
            for start in range(counted, offset, 2 ** 24):
                line += source.read(start, min(2 ** 24, offset - start)).count(b"\n")
            counted = offset
            place = f"line {line}"
        places.append(place)
    return places
