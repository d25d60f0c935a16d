"""A folder of pictures as a source: the files in it, and a row for each picture."""
import os
from pathlib import Path

from inputs.files import check_file
from inputs.images import IMAGE_SUFFIXES
from inputs.picture_names import image_names
from inputs.records import add_caption, parse_row
from inputs.row_keys import short
from inputs.tars import check_size

BESIDE = (".json", ".txt")
LOOP = "linked folders that lead to one which is read anyway"
NO_PICTURE = ".json or .txt without a picture"
HIDDEN = "hidden pictures"


def folder_files(folder, unread):
    """Yield (path as text, its os.stat_result) of every file below a folder, in order of path.

    Hidden files and folders are passed over: indexes are among them. Linked folders are read as
    well, each folder once. unread: a Counter of links that lead back, and of hidden pictures.
    """
    # The folders above this one count as read: a link to one of them would be a loop.
    known = {identity(os.stat(above)) for above in Path(folder).resolve().parents}
    waiting = [str(folder)]
    links = []
    found = []
    while waiting or links:
        # A folder is read under its own name, if it has one here.
        path = waiting.pop() if waiting else links.pop(0)
        here = identity(os.stat(path))
        if here in known:
            unread[LOOP] += 1
            continue
        known.add(here)
        files, folders, linked = list_folder(path, unread)
        found += files
        waiting += folders
        links = sorted(links + linked)
    # As paths sort, part by part.
    yield from sorted(found, key=lambda file: file[0].split(os.sep))


def list_folder(path, unread):
    """([(path, os.stat_result) of each file], [folders], [linked folders]) of one folder."""
    files = []
    folders = []
    linked = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                unread[HIDDEN] += entry.name.lower().endswith(IMAGE_SUFFIXES)
            elif not entry.is_dir():
                # A dangling link has a place of its own, and will be listed as unreadable.
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                files.append((entry.path, entry.stat(follow_symlinks=not dangling)))
            elif entry.is_symlink():
                linked.append(entry.path)
            else:
                folders.append(entry.path)
    return files, folders, linked


def identity(about):
    """What two ways to the same folder have in common."""
    return about.st_dev, about.st_ino


def folder_rows(folder, unread):
    """Yield a row for every picture of a folder, described by the .json or .txt beside it.

    unread: a Counter of what else lies there, which is not read, by its suffix.
    """
    names = [Path(path) for path, _ in folder_files(folder, unread)]
    stems = {path.with_suffix("") for path in names if path.suffix.lower() in IMAGE_SUFFIXES}
    for path in names:
        suffix = path.suffix.lower()
        if suffix in BESIDE and path.with_suffix("") not in stems:
            unread[NO_PICTURE] += 1
        elif suffix not in BESIDE + IMAGE_SUFFIXES:
            unread[suffix or "no suffix"] += 1
        elif suffix in IMAGE_SUFFIXES:
            try:
                described = read_description(path)
            except (ValueError, OSError) as e:
                # The row is listed as unreadable when it is measured.
                described = {"unreadable": str(e)}
            yield {"id": path.stem, **described, "image": str(path.relative_to(folder))}


def read_description(path):
    """The row of a picture in the .json and the .txt of its stem, read as those of a tar are."""
    found = {}
    for suffix in BESIDE:
        file = path.with_suffix(suffix)
        if file.exists():
            check_file(file)
            check_size(file.stat().st_size, f"{file.name}, a row")
            found[suffix] = file.read_bytes()
    row = {"caption": ""}
    if ".json" in found:
        row = parse_row(found[".json"], False)
    if ".txt" in found:
        row = add_caption(row, found[".txt"])
    names = image_names(row)
    if any(os.path.basename(name) != path.name for name in names):
        raise ValueError(f"{path.stem}.json names {', '.join(map(short, names))}; in a folder a "
                         "picture is described by the files of its own stem, mend its name")
    return row
