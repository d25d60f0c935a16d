"""Records of the toy world: training samples and benchmark questions.

Each is a pure function of a seed and a number.
"""
import random

from toy.boards import draw_board
from toy.captions import alt_text, board_caption, cell_listing, transcription
from toy.questions import (
    OPTION_LETTERS,
    chart_question,
    choice_question,
    count_question,
    drill_turns,
    exists_question,
    level_turns,
    reading_question,
    yes_or_no,
)

LEVELS = ("pretrain", "knowledge", "instruction", "preference")
# How many of 26 boards are of each kind.
KIND_WEIGHTS = {"scene": 12, "sign": 3, "note": 2, "list": 2, "table": 1, "bars": 3, "line": 3}
QUESTIONS = {
    "toy_ocr": reading_question,
    "toy_chart": chart_question,
    "toy_count": count_question,
    "toy_halluc": exists_question,
}
BENCHMARKS = ("toy_general", *QUESTIONS)


def toy_record(seed, part, i, easy=False):
    """Sample i of a training part: (row, [(board, rng), ...]). Never a held-out board.

    The rng of a board is the one to draw its picture with, after the row was made.
    easy: one tile and no several steps. The first fifth of the text part is easy, so that the
    language base learns first to look up a cell.
    """
    rng = random.Random(f"{seed}/{part}/{i}")
    mixed = part in ("text", "drill")
    kinds = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=2)
    pair = (part == "instruction" or mixed) and rng.random() < 0.08 and not easy
    kinds = ["scene", "scene"] if pair else kinds[:1]
    boards = [draw_board(rng, kind, False, easy) for kind in kinds]
    if pair:
        turns = pair_turns(boards)
    else:
        turns = single_turns(boards[0], rng, part, easy)

    # The pictures head the first question.
    question, answer = turns[0]
    turns[0] = ("<image>\n" * len(boards) + question, answer)
    conversations = []
    for question, answer in turns:
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": answer})
    row = {
        "id": f"{part}-{i:08d}",
        "cells": [board.token_words() for board in boards],
        "alt_text": alt_text(boards[0], rng),
        "caption": board_caption(boards[0]),
        "ocr": transcription(boards[0]),
        "conversations": conversations,
    }
    return row, [(board, rng) for board in boards]


def pair_turns(boards):
    """Turns about two pictures."""
    first = len(boards[0].things)
    second = len(boards[1].things)
    return [
        ("How many shapes are in the first image?", str(first)),
        ("How many shapes are in the second image?", str(second)),
        ("Do both images have the same number of shapes?", yes_or_no(first == second)),
    ]


def single_turns(board, rng, part, easy):
    """Turns about one picture. The parts text and drill mix all levels."""
    mixed = part in ("text", "drill")
    level = part
    if mixed:
        (level,) = rng.choices(LEVELS, (2, 5, 3, 0) if easy else (1, 3, 5, 3))
    if level == "pretrain":
        turns = pretrain_turns(board, rng)
    elif mixed and board.kind == "scene" and rng.random() < 0.65:
        turns = drill_turns(board, rng)
        level = "drill"
    else:
        turns = level_turns(board, rng, level)
    rng.shuffle(turns)
    # A caption comes last, so that no answer can be read from it.
    if mixed and level not in ("pretrain", "drill") and rng.random() < 0.35:
        turns.append(("Describe the image.", board_caption(board)))
    return turns


def pretrain_turns(board, rng):
    """What each cell shows; or a caption and, where there is text, its transcription."""
    if rng.random() < 0.5:
        return [("What does each cell show?", cell_listing(board))]
    turns = [("Describe the image.", board_caption(board))]
    text = transcription(board)
    if text:
        turns.append(("What is written in the image?", text))
    return turns


def toy_question(name, seed, i):
    """Question i of a benchmark about a held-out board: (row without its picture, board, rng)."""
    rng = random.Random(f"{seed}/{name}/{i}")
    while True:
        # Both are drawn for every benchmark, so that the boards stay what they were.
        text_kind = rng.choice(["sign", "sign", "note", "list", "table"])
        chart_kind = rng.choice(["bars", "line"])
        kind = {"toy_ocr": text_kind, "toy_chart": chart_kind}.get(name, "scene")
        board = draw_board(rng, kind, True)
        row = {"index": i, "category": kind}
        if name in QUESTIONS:
            question, answer = QUESTIONS[name](board, rng)
            return row | {"question": question, "answer": answer}, board, rng
        choice = choice_question(board, rng)
        if choice:
            question, options, letter = choice
            row |= {"question": question, "answer": letter}
            row |= zip(OPTION_LETTERS, options, strict=True)
            return row, board, rng
