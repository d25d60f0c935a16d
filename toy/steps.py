"""Questions of two steps: the answer is computed from two facts or more, not read from one cell.

An ask is (question, way, answer, family). Who asks for the way ("Explain.") wants "way: answer",
who does not wants the answer alone. The benchmark toy_steps asks for it in half of its questions.
"""
from toy.boards import SHAPES
from toy.questions import yes_or_no

STEP_FAMILIES = ("difference", "sum", "second", "more", "order")
# The kinds of board that such questions are about.
STEP_BOARDS = ("scene", "bars", "line")


def steps_ask(board, rng):
    """One ask of two steps about a scene or a chart."""
    if board.kind == "scene":
        return scene_ask(board, rng)
    return chart_ask(board, rng)


def scene_ask(board, rng):
    """The counts of two shapes: which is more, by how many, and how many together."""
    there = list(dict.fromkeys(thing.shape for thing in board.things))
    one = rng.choice(there)
    # Mostly both are in the picture: "0" would be guessed too often.
    pool = there if len(there) > 1 and rng.random() < 0.8 else SHAPES
    other = rng.choice([shape for shape in pool if shape != one])
    n_one = sum(thing.shape == one for thing in board.things)
    n_other = sum(thing.shape == other for thing in board.things)
    family = rng.choice(("difference", "sum", "more"))
    if family == "difference" and n_one < n_other:
        one, other = other, one
        n_one, n_other = n_other, n_one
    way = f"{n_one} {one}, {n_other} {other}"
    if family == "more":
        answer = yes_or_no(n_one > n_other)
        return f"Are there more {one} than {other} shapes?", way, answer, family
    if family == "sum":
        return f"How many {one} and {other} shapes are there?", way, str(n_one + n_other), family
    return f"How many more {one} than {other} shapes are there?", way, str(n_one - n_other), family


def chart_ask(board, rng):
    """Values of a chart added, subtracted, compared and sorted."""
    (one, one_value), (other, other_value) = rng.sample(board.things, 2)
    ranked = sorted(board.things, key=lambda thing: thing[1])
    (low, low_value), (high, high_value) = ranked[0], ranked[-1]
    second, second_value = ranked[-2]
    family = rng.choice(STEP_FAMILIES)
    if family == "difference":
        question = "How much higher is the highest than the lowest?"
        way = f"{high} {high_value}, {low} {low_value}"
        return question, way, str(high_value - low_value), family
    if family == "second":
        way = f"{high} {high_value}, {second} {second_value}"
        return "Which colour is the second highest?", way, second, family
    if family == "order":
        way = ", ".join(f"{color} {value}" for color, value in ranked)
        answer = ", ".join(color for color, _ in ranked)
        return "Which colours are there from the lowest to the highest?", way, answer, family
    way = f"{one} {one_value}, {other} {other_value}"
    if family == "sum":
        return f"What is the sum of {one} and {other}?", way, str(one_value + other_value), family
    higher = one if one_value > other_value else other
    return f"Which is higher, {one} or {other}?", way, higher, family


def steps_turn(board, rng):
    """(question, answer) of two steps; one in two asks for the way."""
    question, way, answer, _ = steps_ask(board, rng)
    if rng.random() < 0.5:
        return f"{question} Explain.", f"{way}: {answer}"
    return question, answer
