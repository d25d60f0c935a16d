"""easy-VQA (github.com/vzhou842/easy-VQA) as rows for training and as questions for eval.py.

    python -m runs.easy_vqa QUESTIONS.json IMAGES OUT [HELD_OUT]

QUESTIONS.json: rows of [question, answer, number of the picture]; IMAGES: the folder or the .tar of
NUMBER.png. Writes OUT/train.jsonl and, about HELD_OUT pictures (400) that are not in it,
OUT/test.jsonl. A question is a row of its own: "what is the blue shape?" would give away "what
color is the shape?" if it stood before it in one conversation.
"""
import json
import os
import random
import shutil
import sys
from pathlib import Path


def kind_of(question, answer):
    """The category under which eval.py scores a question."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "color" if "color" in question else "shape"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(questions, images, out, held_out=400):
    rows = json.loads(Path(questions).read_text())
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(images)
    if folder.is_file():
        folder = out / "images"
        shutil.unpack_archive(images, folder)
    pictures = sorted({number for _, _, number in rows})
    test = set(random.Random(0).sample(pictures, int(held_out)))

    train_rows = []
    test_rows = []
    for index, (question, answer, number) in enumerate(rows):
        image = os.path.relpath(folder / f"{number}.png", out)
        if number in test:
            test_rows.append({"index": index, "image": image, "question": question,
                              "answer": answer, "category": kind_of(question, answer)})
        else:
            turns = [{"from": "human", "value": f"<image>\n{question}"},
                     {"from": "gpt", "value": answer}]
            train_rows.append({"id": str(index), "image": image, "conversations": turns})
    write_lines(out / "train.jsonl", train_rows)
    write_lines(out / "test.jsonl", test_rows)
    print(f"{len(train_rows)} rows about {len(pictures) - len(test)} pictures, "
          f"{len(test_rows)} questions about {len(test)} others")


if __name__ == "__main__":
    main(*sys.argv[1:])
