"""Questions in a .jsonl of one's own, read into the rows that a .tsv of VLMEvalKit's gives.

A line is {"question": "...", "answer": "...", "image": "a.jpg"}. `answer` may be a list of texts
of which each is right, `image` a list of pictures, or left out. A picture is a path, as seen from
the file, or a data URI. More texts and numbers (index, category, A, B, ...) become columns.
"""
import dataclasses
import json
from pathlib import Path

from inputs.files import check_file


@dataclasses.dataclass(frozen=True)
class PictureCell:
    """Where a picture is: picture `number` of the row that begins at this byte of a file."""
    path: Path
    offset: int
    number: int


def read_json_rows(path):
    """A .jsonl -> (rows as dicts of texts, all with the same keys, {index: [PictureCell, ...]}).

    A row without index or id gets the number of its line. Raises ValueError with line and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_file(path)
    rows = {}
    cells = {}
    for offset, line, entry in json_lines(path):
        row = json_row(f"{path} line {line}", entry)
        index = row.pop("id", "") if "index" not in row else row["index"]
        row = {"index": index.strip() or str(line)} | row
        index = row["index"]
        if index in rows:
            raise ValueError(f"{path} line {line}: index {index!r} stands twice")
        pictures = listed(entry.get("image"))
        if pictures and all(is_data_uri(picture) for picture in pictures):
            cells[index] = [PictureCell(path, offset, k) for k in range(len(pictures))]
            row["image"] = index
        elif pictures:
            row["image_path"] = repr(pictures)
        rows[index] = row
    if not rows:
        raise ValueError(f"{path}: no rows")
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return [dict.fromkeys(names, "") | row for row in rows.values()], cells


def json_lines(path):
    """Yield (byte offset, line number, object) of the lines of a .jsonl that are not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path} line {number}: not valid JSON: {e}") from None
                yield offset, number, entry
            offset += len(line)


def json_row(where, entry):
    """The cells of a row but those of its pictures. where: for error messages."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: no object; write {{\"question\": ..., \"answer\": ...}}")
    for name in ("question", "answer"):
        if name not in entry:
            raise ValueError(f"{where} has no field {name!r}; a line is {{\"question\": ..., "
                             "\"answer\": ..., \"image\": PATH}")
    for picture in listed(entry.get("image")):
        if not isinstance(picture, str) or not picture:
            raise ValueError(f"{where}, field 'image': {picture!r} is no path and no data URI")
    row = {}
    for name, value in entry.items():
        if name == "answer" and isinstance(value, list):
            row[name] = repr([cell_text(where, name, one) for one in value])
        elif name != "image":
            row[name] = cell_text(where, name, value)
    # A text that looks like a list is one reference all the same.
    if isinstance(entry["answer"], str) and entry["answer"].lstrip().startswith("["):
        row["answer"] = repr([entry["answer"]])
    return row


def cell_text(where, name, value):
    """A text or number as a cell."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}, field {name!r}: {json.dumps(value)[:60]} is no text or number; "
                         "lists are for 'answer' and 'image', options stand in 'A', 'B', ...")
    return str(value)


def listed(value):
    """The pictures of a row, in a list."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def is_data_uri(picture):
    return picture[:5].lower() == "data:"


def json_pictures(place):
    """The data URIs of the row that a PictureCell lies in."""
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        line = file.readline()
    return listed(json.loads(line.decode("utf-8-sig"))["image"])
