"""Records of the toy world: training samples and benchmark questions.

Each is a pure function of a seed and a number.
"""
import random
from dataclasses import dataclass

from toy.boards import draw_board
from toy.captions import alt_text, board_caption, cell_listing, transcription
from toy.families import form_of, without_families
from toy.questions import (
    OPTION_LETTERS,
    chart_question,
    choice_question,
    count_question,
    drill_turns,
    exists_question,
    level_turns,
    reading_question,
    without_repeats,
    yes_or_no,
)
from toy.steps import STEP_BOARDS, steps_ask, steps_turn

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


@dataclass(frozen=True)
class Variant:
    """What the samples of a world have beside or instead of the usual."""
    two_steps: bool = False          # preference samples ask three questions of two steps
    wrong: float = 0.0               # this share of the answers belongs to another picture
    without: tuple = ()              # families of questions that nobody asks


USUAL = Variant()


def toy_record(seed, part, i, easy=False, variant=USUAL):
    """Sample i of a training part: (row, [(board, rng), ...]). Never a held-out board.

    The rng of a board is the one to draw its picture with, after the row was made.
    easy: one tile and no several steps. The first fifth of the text part is easy, so that the
    language base learns first to look up a cell.
    """
    rng = random.Random(f"{seed}/{part}/{i}")
    boards, turns = ask_turns(rng, part, easy, variant)
    # An rng of its own, so that the other answers and the pictures stay what they are.
    slips = random.Random(f"{seed}/{part}/{i}/wrong")
    for k, (question, answer) in enumerate(turns):
        if slips.random() < variant.wrong:
            kind = "" if len(boards) > 1 else boards[0].kind
            answer = wrong_answer(question, answer, kind, slips, part, variant)
            turns[k] = (question, answer)

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


def ask_turns(rng, part, easy=False, variant=USUAL, kind=None, held_out=False):
    """(boards, turns) of a sample. kind: of its only board, "" for two; None: at random."""
    mixed = part in ("text", "drill")
    turns = []
    while not turns:
        kinds = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=2)
        pair = (part == "instruction" or mixed) and rng.random() < 0.08 and not easy
        if kind is not None:
            pair = kind == ""
            kinds = [kind]
        kinds = ["scene", "scene"] if pair else kinds[:1]
        boards = [draw_board(rng, one, held_out, easy) for one in kinds]
        if pair:
            turns = pair_turns(boards)
        else:
            turns = single_turns(boards[0], rng, part, easy)
            if variant.two_steps and part == "preference" and boards[0].kind in STEP_BOARDS:
                turns = turns[:1] + [steps_turn(boards[0], rng) for _ in range(3)]
                turns = without_repeats(turns)
        turns = without_families(turns, variant.without)
    return boards, turns


def wrong_answer(question, answer, kind, rng, part, variant):
    """The answer of another picture to a question of the same form, other than the right one."""
    form = form_of(question)
    while True:
        _, turns = ask_turns(rng, part, False, variant, kind)
        for other, other_answer in turns:
            if form_of(other) == form and other_answer != answer:
                return other_answer


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


def steps_question(seed, i):
    """Question i of toy_steps about a held-out board: (row without its picture, board, rng).

    Every second one asks for the way; its answer is what stands after the last colon.
    """
    rng = random.Random(f"{seed}/toy_steps/{i}")
    board = draw_board(rng, rng.choice(STEP_BOARDS), True)
    question, _, answer, family = steps_ask(board, rng)
    task = "silent"
    if i % 2:
        task = "explained"
        question += " Explain."
    row = {"index": i, "category": family, "task": task, "question": question, "answer": answer}
    return row, board, rng
