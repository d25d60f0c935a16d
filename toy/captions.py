"""Descriptions of a board: exact caption, listing of its cells, its text, alt-text."""
from toy.boards import SIDE, place_of

ALT_TEXTS = {"sign": "a sign", "note": "a note", "list": "prices", "table": "numbers"}
WRONG_ALT_TEXTS = [
    "a sunny day", "my favourite star", "a red square", "a table of prices", "holiday sale",
]


def board_caption(board):
    """The detailed, exact caption: every fact once, in reading order."""
    if board.kind == "scene":
        return scene_caption(board)
    if board.kind in ("sign", "note"):
        return f"A {board.kind} that says: {' '.join(board.things)}"
    if board.kind in ("list", "table"):
        return f"A {board.kind}: {', '.join(transcription(board).split())}."
    name = "bar" if board.kind == "bars" else "line"
    values = ", ".join(f"{color} {value}" for color, value in board.things)
    return f"A {name} chart: {values}."


def scene_caption(board):
    """The shapes and, on a single tile, their places."""
    described = []
    for thing in board.things:
        text = f"{thing.size} {thing.color} {thing.shape}"
        if board.grid == (1, 1):
            text += " " + place_of(thing.row, thing.column)
        described.append(text)
    plural = "s" if len(described) > 1 else ""
    return f"{len(described)} shape{plural}: {', '.join(described)}."


def cell_listing(board):
    """The most detailed description: the word of every cell, tile by tile, no thumbnail."""
    n_cells = SIDE ** 2 * board.grid[0] * board.grid[1]
    words = [words.split()[0] for words in board.token_words()[:n_cells]]
    return "Cells: " + " ".join(words)


def transcription(board):
    """All text of the picture in reading order. Empty for scenes and charts."""
    if board.kind in ("sign", "note"):
        return " ".join(board.things)
    if board.kind in ("list", "table"):
        return " ".join(f"{label}{first}{second}" for label, first, second in board.things)
    return ""


def alt_text(board, rng):
    """What the web would say: short, vague, and wrong one time in four."""
    if rng.random() < 0.25:
        return rng.choice(WRONG_ALT_TEXTS)
    if board.kind == "scene":
        shape = board.things[0].shape
        return rng.choice(["some shapes", f"a picture with a {shape}", "colourful shapes"])
    return ALT_TEXTS.get(board.kind, "a chart")
