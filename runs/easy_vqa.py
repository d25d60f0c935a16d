"""easy-VQA (github.com/vzhou842/easy-VQA) as rows for training and as questions for eval.py.

    python -m runs.easy_vqa QUESTIONS.json IMAGES OUT [HELD_OUT]

QUESTIONS.json: rows of [question, answer, number of the picture]; IMAGES: the folder or the .tar of
NUMBER.png. Writes OUT/train.jsonl, its rows that ask for a shape and a few others once more as
OUT/shapes.jsonl, and OUT/test.jsonl about HELD_OUT other pictures (400). A row holds one question:
"what is the blue shape?" would give away the color that the next one asks for.
"""
import json
import os
import random
import shutil
import sys
from pathlib import Path


def kind_of(answer):
    """The category under which eval.py scores a question."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(questions, images, out, held_out=400):
    rows = json.loads(Path(questions).read_text())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if images.endswith(".tar"):
        shutil.unpack_archive(images, out / "images")
        images = out / "images"
    test = set(random.Random(0).sample(sorted({row[2] for row in rows}), int(held_out)))

    train_rows = []
    shape_rows = []
    test_rows = []
    for index, (question, answer, number) in enumerate(rows):
        image = os.path.relpath(Path(images, f"{number}.png"), out)
        if number in test:
            test_rows.append({"index": index, "image": image, "question": question,
                              "answer": answer, "category": kind_of(answer)})
        else:
            turns = [{"from": "human", "value": f"<image>\n{question}"},
                     {"from": "gpt", "value": answer}]
            train_rows.append({"id": str(index), "image": image, "conversations": turns})
            if kind_of(answer) == "shape" or index % 20 == 0:
                shape_rows.append(train_rows[-1])
    write_lines(out / "train.jsonl", train_rows)
    write_lines(out / "shapes.jsonl", shape_rows)
    write_lines(out / "test.jsonl", test_rows)
    print(f"{len(train_rows)} rows for training, {len(test_rows)} questions about other pictures")


if __name__ == "__main__":
    main(*sys.argv[1:])
