"""Validate sources: read every row and decode every image."""
import concurrent.futures
import json
import os

import numpy as np
from tqdm import tqdm

from inputs.chat import image_names
from inputs.images import load_image
from inputs.records import UNREADABLE
from inputs.sources import source_notes


def check_sources(sources):
    """Read every row and image; print place, field and reason of each bad row.

    Returns the number of bad rows, 1 if there is no row at all.
    """
    n_rows = 0
    n_bad = 0
    for source in sources:
        reasons = {row["row"]: row["reason"] for row in source.meta["bad"]}
        reasons |= check_images(source)
        bad = sorted(reasons)
        for i, where in zip(bad, row_places(source, bad), strict=True):
            print(f"{source.path}: {where}: {reasons[i]}")
        n_rows += len(source.rows)
        n_bad += len(bad)
    for line in source_notes(sources):
        print(line)
    print(f"{n_rows or 'no'} rows, {n_rows - n_bad} good, {n_bad} bad")
    if n_rows == 0:
        return 1
    return n_bad


def check_images(source):
    """{row: reason} of rows with an image that cannot be decoded, read on all cores."""
    reasons = {}
    rows = np.flatnonzero(source.rows["n_images"]).tolist()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        title = f"{source.path.name}, 500 rows a step"
        for start in tqdm(range(0, len(rows), 500), title, leave=False):
            some = rows[start:start + 500]
            found = pool.map(lambda i: image_problem(source, i), some)
            reasons |= {i: reason for i, reason in zip(some, found, strict=True) if reason}
    return reasons


def image_problem(source, i):
    """What is wrong with the images of row i, or None."""
    where = "its row"
    try:
        row = source.row(i)
        # In a tar those that were found in it count, whatever the row names.
        for k in range(source.rows[i]["n_images"]):
            where = f"image {k + 1 if source.is_tar else image_names(row)[k]}"
            load_image(source.image(i, k, row))
    except UNREADABLE as e:
        return f"{where}: {e}; mend the file or remove the row"
    return None


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
