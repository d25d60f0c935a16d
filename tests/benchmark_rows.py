"""Rows and files of benchmarks, made for tests."""

import base64
import csv
import io

from PIL import Image

from evals import score, table

OPTIONS = {"A": "red circle", "B": "blue circle", "C": "red", "D": ""}
FORMULA = "Handwritten Mathematical Expression Recognition"
FREE = {"question_type": "free_form", "choices": ""}


def score_of(name, rows, judge=None, protocol="sailvl-2024-12"):
    return score.score_rows(table.find_benchmark(name, protocol), rows, judge)


def picture(color=(200, 30, 30), size=(84, 84)):
    """A plain picture as a cell of a .tsv."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path, rows):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path
