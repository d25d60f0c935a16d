"""The toy world: pictures with exact truth, unlimited in number, that a 3 M parameter model can learn on two CPU cores.

    python -m toy --out=shards/toy --n=4000                    # training shards (tar) and benchmark files (tsv)
    python -m toy --out=shards/web --n=2000 --parts=web         # pictures with poor alt-text, and the truth beside
    python -m toy --out=shards/toy_text --n=100000 --parts=text  # the same questions with every picture given as words

Every picture is a board of 28-pixel cells, so that after 14-pixel patches and a 2x2 pixel shuffle one visual token sees
one cell; a tile is 3x3 cells. Boards of 1x1 to 3x1 and 2x2 tiles go through the same dynamic tiling, thumbnail
included, as real photos. What a cell shows is one word (`LargeRedCircle`, `K`, `Seven`, `BlueBarSix`, `Empty`), where
it is in its tile another (`TopLeft`); the two of every visual token of a picture, tile by tile, are its `cells`. They
are the exact truth: captions, alt-texts, transcriptions and question-answer turns of three levels are made from it.

A board is held out when a checksum of its truth says so, hence training and benchmark pictures are disjoint by
construction, in any number, under any seed; words on signs are split by the word itself: benchmark words are unseen.
"""
import base64, csv, functools, hashlib, io, json, os, random, tarfile, zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import configure, run_script
from inputs.tars import add_record

@dataclass(slots=True)
class Config:
    out: str = "shards/toy"          # folder to write
    n: int = 4000                    # samples of each training part
    n_bench: int = 200               # questions of each benchmark
    seed: int = 1                    # another seed: other samples, same world
    parts: str = "pretrain,knowledge,instruction,preference,bench"  # also: web, text, drill (with pictures)

CELL, SIDE = 28, 3                   # pixels of a cell, cells along a tile
KINDS = ("circle", "square", "triangle", "star", "cross")
COLORS = {"red": (215, 35, 40), "green": (30, 150, 60), "blue": (40, 80, 215), "yellow": (240, 200, 20),
          "purple": (150, 50, 170), "black": (25, 25, 25)}
SIZES = ("small", "large")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which look like 1, 0 and 0
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
MAX_VALUE, UNIT = 8, 10              # of a chart, and pixels per unit: the longest bar fills three cells
THUMBS = {(2, 1): "ThumbWide", (3, 1): "ThumbWider", (1, 2): "ThumbTall", (1, 3): "ThumbTaller", (2, 2): "ThumbSquare"}
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
PLACE_WORDS = [place.title().replace(" ", "") for place in PLACES]
CELL_WORDS = ["Empty", "BarEnd", "PointTop", *LETTERS, *NUMBERS, *THUMBS.values()] + [
    s.title() + c.title() + k.title() for s in SIZES for c in COLORS for k in KINDS] + [
    c.title() + mark + value for c in COLORS for mark in ("Bar", "Point") for value in NUMBERS[1:MAX_VALUE + 1]]
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

# ---- boards: what is in a picture --------------------------------------------------------------------------------
@dataclass(slots=True)
class Board:
    kind: str                        # scene, sign, note, list, table, bars, line
    grid: tuple                      # (columns, rows) of tiles
    cells: dict = field(default_factory=dict)   # (row, column) -> word; everything else is Empty
    # facts in reading order: (size, color, kind, row, col), lines, (label, ...)
    things: list = field(default_factory=list)

    def words(self):
        """The two words of every visual token, in the order of dynamic tiling: tiles row-major, thumbnail last."""
        columns, rows = self.grid
        out = [self.cells.get((SIDE * j + r, SIDE * i + c), "Empty")
               for j in range(rows) for i in range(columns) for r in range(SIDE) for c in range(SIDE)]
        out += [THUMBS[self.grid]] * SIDE ** 2 if columns * rows > 1 else []
        return [f"{word} {PLACE_WORDS[i % SIDE ** 2]}" for i, word in enumerate(out)]

    def held_out(self):
        """One board in eight belongs to the benchmarks, by a checksum of its truth; a sign goes by its word alone."""
        truth = self.things[0] if self.kind == "sign" else repr((self.grid, sorted(self.cells.items())))
        return zlib.crc32(truth.encode()) % 8 == 0

def make_word(rng, length):
    """A random word of `length` letters, half of them pronounceable."""
    if rng.random() < 0.5: return "".join(rng.choice(LETTERS) for _ in range(length))
    vowels, consonants = "AEUY", "BCDFGHJKLMNPRSTVWXZ"
    start = rng.random() < 0.5
    return "".join(rng.choice(vowels if (i + start) % 2 else consonants) for i in range(length))

def make_board(rng, kind, easy=False):
    """Draw the truth of one board of the given kind from `rng`. easy: one tile."""
    grids = {"scene": [(1, 1)] * 7 + [(2, 1), (1, 2), (2, 2)], "sign": [(1, 1), (2, 1), (2, 1), (3, 1)],
             "note": [(1, 1)], "list": [(1, 1), (1, 1), (1, 2), (1, 3)], "table": [(1, 1), (1, 1), (1, 2)],
             "bars": [(1, 1), (1, 1), (1, 2)], "line": [(1, 1), (1, 1), (2, 1)]}[kind]
    board = Board(kind, (1, 1) if easy else rng.choice(grids))
    wide, high = SIDE * board.grid[0], SIDE * board.grid[1]
    if kind == "scene":
        n = rng.randint(1, 6) if board.grid == (1, 1) else rng.randint(3, 9)
        colors, kinds = rng.sample(list(COLORS), rng.randint(1, 4)), rng.sample(KINDS, rng.randint(1, 4))
        for row, column in sorted(rng.sample([(r, c) for r in range(high) for c in range(wide)], n)):
            thing = (rng.choice(SIZES), rng.choice(colors), rng.choice(kinds))
            board.cells[row, column] = "".join(w.title() for w in thing)
            board.things.append((*thing, row, column))
        # reading order is the order of the visual tokens: tile by tile, row-major inside a tile
        board.things.sort(key=lambda t: (t[3] // SIDE, t[4] // SIDE, t[3], t[4]))
    elif kind == "sign":
        word = make_word(rng, rng.randint({1: 1, 2: 3, 3: 6}[board.grid[0]], wide))
        row, start = rng.randrange(high), rng.randint(0, wide - len(word))
        board.cells = {(row, start + i): letter for i, letter in enumerate(word)}
        board.things = [word]
    elif kind == "note":
        for row in sorted(rng.sample(range(high), rng.randint(2, 3))):
            word = make_word(rng, rng.randint(1, 3))
            board.cells |= {(row, i): letter for i, letter in enumerate(word)}
            board.things.append(word)
    elif kind in ("list", "table"):
        rows = sorted(rng.sample(range(high), rng.randint(2, min(high, 6))))
        for row, label in zip(rows, rng.sample(LETTERS, len(rows))):
            digits = rng.randrange(1, 10), rng.randrange(0 if kind == "list" else 1, 10)
            board.cells |= {(row, i): w for i, w in enumerate([label, *(NUMBERS[d] for d in digits)])}
            board.things.append((label, *digits))
    else:                                                              # one mark of each colour, of distinct values
        along = high if kind == "bars" else wide
        lanes = sorted(rng.sample(range(along), rng.randint(2, min(along, 6))))
        values = rng.sample(range(1, MAX_VALUE + 1), len(lanes))
        for lane, color, value in zip(lanes, rng.sample(list(COLORS), len(lanes)), values):
            last = (UNIT * value - 1) // CELL
            name = color.title() + ("Bar" if kind == "bars" else "Point") + NUMBERS[value]
            if kind == "bars":                                         # from the left edge to the right
                board.cells |= {(lane, k): "BarEnd" for k in range(1, last + 1)} | {(lane, 0): name}
            else:                                                      # from the bottom to the top
                board.cells |= ({(2 - last, lane): "PointTop"} if last else {}) | {(2, lane): name}
            board.things.append((color, value))
    return board

def draw_board(rng, kind, held_out, easy=False):
    """A board of the wanted side of the split, by rejection."""
    while True:
        board = make_board(rng, kind, easy)
        if board.held_out() == held_out: return board

# ---- pixels -------------------------------------------------------------------------------------------------------
font = functools.cache(ImageFont.load_default)                         # of a size

def shape(draw, kind, x, y, r, ink):
    if kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif kind == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=ink)
    elif kind == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=ink)
    elif kind == "cross":
        draw.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=ink)
        draw.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=ink)
    else:                                                              # a star of five points
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2, 0.45 * r, 1.1 * r)
        draw.polygon(list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles))), fill=ink)

def render(board, rng):
    """Picture of a board, PIL RGB. Backgrounds, jitter, font sizes, line styles, noise and size vary with `rng`."""
    wide, high = SIDE * board.grid[0] * CELL, SIDE * board.grid[1] * CELL
    dark = board.kind in ("sign", "note") and rng.random() < 0.3
    tone = rng.randint(15, 60) if dark else rng.randint(205, 250)
    paper = tuple(min(255, max(0, tone + rng.randint(-15, 15))) for _ in range(3))
    image = Image.new("RGB", (wide, high), paper)
    draw = ImageDraw.Draw(image)
    ink = tuple(rng.randint(200, 255) if dark else rng.randint(0, 70) for _ in range(3))
    size, bold = rng.randint(16, 24), rng.randint(0, 1)
    centre = lambda row, column: (CELL * column + CELL // 2, CELL * row + CELL // 2)
    if board.kind == "table":
        for row in range(high // CELL + 1):
            draw.line((0, row * CELL, wide, row * CELL), fill=(150, 150, 150))
        for column in range(SIDE + 1):
            draw.line((column * CELL, 0, column * CELL, high), fill=(150, 150, 150))
    faint, half = tuple(max(0, p - 25) for p in paper), rng.randint(6, 10)
    bottom, points = SIDE * CELL, []
    lanes = sorted({c if board.kind == "line" else r for r, c in board.cells})
    for (color, value), lane in zip(board.things, lanes) if board.kind in ("bars", "line") else ():
        middle = CELL * lane + CELL // 2 + rng.randint(-2, 2)
        if board.kind == "bars":
            draw.rectangle((0, middle - half, UNIT * value, middle + half), fill=COLORS[color])
        else:                                                          # a marker on a stem of its colour
            x, y = middle, bottom - UNIT * value
            draw.rectangle((x - 3, y, x + 3, bottom), fill=COLORS[color])
            draw.ellipse((x - 6, y - 2, x + 6, y + 10), fill=COLORS[color])
            points.append((x, y + 4))
    if points:
        draw.line(points, fill=faint, width=1)
    if board.kind == "scene":
        for s, color, kind, row, column in board.things:
            x, y = centre(row, column)
            r = rng.uniform(10, 12) if s == "large" else rng.uniform(5, 6.5)
            shape(draw, kind, x + rng.randint(-2, 2), y + rng.randint(-2, 2), r, COLORS[color])
    else:
        for (row, column), word in board.cells.items():
            if len(word) == 1 or word in NUMBERS:
                x, y = centre(row, column)
                mark = str(NUMBERS.index(word)) if word in NUMBERS else word
                at = x + rng.randint(-2, 2), y + rng.randint(-2, 2)
                draw.text(at, mark, fill=ink, font=font(size), anchor="mm", stroke_width=bold)
    if rng.random() < 0.2:                                             # pictures come in odd sizes too
        image = image.resize((round(wide * rng.uniform(0.96, 1.05)), round(high * rng.uniform(0.96, 1.05))))
    pixels = np.asarray(image, np.int16)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8).reshape(pixels.shape) >> 4   # 0..15
    return Image.fromarray(np.clip(pixels + noise - 8, 0, 255).astype(np.uint8))

# ---- captions -----------------------------------------------------------------------------------------------------
def caption(board):
    """The detailed, exact caption: every fact once, in reading order."""
    if board.kind == "scene":
        where = lambda row, column: " " + place(row, column) if board.grid == (1, 1) else ""
        listed = ", ".join(f"{s} {c} {k}{where(*at)}" for s, c, k, *at in board.things)
        return f"{len(board.things)} shape{'s' * (len(board.things) > 1)}: {listed}."
    if board.kind in ("sign", "note"):
        return f"A {board.kind} that says: {' '.join(board.things)}"
    if board.kind in ("list", "table"):
        return f"A {board.kind}: {', '.join(transcription(board).split())}."
    name = "bar" if board.kind == "bars" else "line"
    return f"A {name} chart: " + ", ".join(f"{color} {value}" for color, value in board.things) + "."

def listing(board):
    """The most detailed description: the word of every cell in the order of the tiles, the thumbnail left out."""
    return "Cells: " + " ".join(w.split()[0] for w in board.words()[:SIDE ** 2 * board.grid[0] * board.grid[1]])

def alt_text(board, rng):
    """What the web would say: short, vague, and wrong one time in four."""
    if rng.random() < 0.25:
        return rng.choice(["a sunny day", "my favourite star", "a red square", "a table of prices", "holiday sale"])
    if board.kind == "scene":
        return rng.choice(["some shapes", "a picture with a " + board.things[0][2], "colourful shapes"])
    return {"sign": "a sign", "note": "a note", "list": "prices", "table": "numbers"}.get(board.kind, "a chart")

def transcription(board):
    """All text of the picture in reading order; empty for scenes and charts."""
    if board.kind in ("sign", "note"): return " ".join(board.things)
    if board.kind in ("list", "table"):
        return " ".join(f"{label}{a}{b}" for label, a, b in board.things)
    return ""

# ---- questions ----------------------------------------------------------------------------------------------------
LETTER_HINT = "Answer with the option's letter from the given choices directly."
SHORT_HINT = "Answer the question using a single word or phrase."

def yes(flag): return "Yes" if flag else "No"
def named(thing): return f"{thing[1]} {thing[2]}"

def count_question(board, rng):
    """Number of things of one colour, of one kind, or of all."""
    test = rng.randrange(5)
    if test == 0: return "How many shapes are there?", str(len(board.things))
    if test < 3:
        color = rng.choice([t[1] for t in board.things] + [rng.choice(list(COLORS))])
        return f"How many {color} shapes are there?", str(sum(t[1] == color for t in board.things))
    kind = rng.choice([t[2] for t in board.things] + [rng.choice(KINDS)])
    return f"How many {kind if kind != 'cross' else 'crosse'}s are there?", str(sum(t[2] == kind for t in board.things))

def exists_question(board, rng):
    """Half yes; most of the noes name a colour and a kind that are there, but not together."""
    present = {(t[1], t[2]) for t in board.things}
    if rng.random() < 0.5:
        color, kind = rng.choice(sorted(present))
    else:
        near = [(c, k) for c, _ in present for _, k in present if (c, k) not in present]
        far = [(c, k) for c in COLORS for k in KINDS if (c, k) not in present]
        color, kind = rng.choice(sorted(near) if near and rng.random() < 0.6 else far)
    return f"Is there a {color} {kind} in the image?", yes((color, kind) in present)

def only(things, key):
    """The things that nothing else is like."""
    return [t for t in things if sum(key(u) == key(t) for u in things) == 1]

def place(row, column): return PLACES[row % SIDE * SIDE + column % SIDE]

def neighbours(board, thing):
    """Yield (direction, place, what is there or "nothing") of the cells beside a thing, inside its tile."""
    at, (row, column) = {(t[3], t[4]): named(t) for t in board.things}, thing[3:]
    for direction, (dr, dc) in DIRECTIONS.items():
        r, c = row + dr, column + dc
        if r // SIDE == row // SIDE and c // SIDE == column // SIDE:
            yield direction, place(r, c), at.get((r, c), "nothing")

def place_questions(board):
    """[(question, answer, pool)] about what is next to a thing and, in a single tile, in a corner; things come more
    than once, for most places hold nothing."""
    at, asks = {(t[3], t[4]): t for t in board.things}, []
    pool = [f"{c} {k}" for c in COLORS for k in KINDS] + ["nothing"]
    for t in only(board.things, lambda t: t[1:3]):
        for direction, _, there in neighbours(board, t):
            ask = (f"What is just {direction} the {named(t)}?", there, pool)
            asks += [ask] * (1 if there == "nothing" else 3)
    for corner in (0, 2, 6, 8) if board.grid == (1, 1) else ():
        cell = divmod(corner, SIDE)
        ask = (f"What is in the {PLACES[corner]} corner?", named(at[cell]) if cell in at else "nothing", pool)
        asks += [ask] * (2 if cell in at else 1)
    return asks

def attribute_questions(board):
    """[(question, answer, pool)] about the colour or the kind of the only thing that fits."""
    asks = [(f"What colour is the {t[2]}?", t[1], list(COLORS)) for t in only(board.things, lambda t: t[2])]
    return asks + [(f"What shape is {t[1]}?", t[2], list(KINDS)) for t in only(board.things, lambda t: t[1])]

def attribute_question(board, rng):
    """One of these, or of what is next to a thing or in a corner: (question, answer, pool)."""
    families = [family for family in (attribute_questions(board), place_questions(board)) if family]
    return rng.choice(rng.choice(families)) if families else None

def drill_turns(board, rng):
    """Turns about what a language base learns last (LOG.md): places, what is next to a thing, colours, counts."""
    places = place_questions(board)
    where, beside = ([ask for ask in places if word in ask[0]] for word in ("corner", "just"))
    for t in only(board.things, lambda t: t[1:3]):
        where.append((f"Where is the {named(t)}?", here := place(*t[3:]), list(PLACES)))
        for direction, spot, there in neighbours(board, t):            # the way to a neighbour, whole and in part
            asks = [(f"What is just {direction} the {named(t)}? Explain.", f"{here}, {spot}: {there}", None),
                    (f"Which place is just {direction} the {named(t)}?", spot, list(PLACES))]
            beside += asks * (1 if there == "nothing" else 2)
    if board.grid == (1, 1):
        where += [(f"What is at the {place(*t[3:])}?", named(t), None) for t in board.things]
    looks = [ask for ask in attribute_questions(board) for _ in range(3 if "colour" in ask[0] else 1)]
    families, out = [family for family in (where, beside, looks) if family], []
    for ask in [rng.choice(rng.choice(families)) for _ in range(6 if families else 0)]:
        if ask[2] and rng.random() < 0.5:
            question, options, letter = as_choice(ask, board, rng.randint(2, 4), rng, near=True)
            out.append((choice_text(question, options), letter))
        else:
            out.append(ask[:2])
    return unlike([*out, count_question(board, rng)])

def reading_question(board, rng):
    """All of the text, or the first or the last row of a list or a table."""
    rows = transcription(board).split()
    if board.kind in ("list", "table") and rng.random() < 0.4:
        return rng.choice([("What is the first row?", rows[0]), ("What is the last row?", rows[-1])])
    return "What is written in the image?", " ".join(rows)

def chart_question(board, rng, steps=None):
    """One fact of a chart, or (steps=True) several facts compared."""
    if not (rng.random() < 0.5 if steps is None else steps):
        color, value = rng.choice(board.things)
        return f"What is the value of {color}?", str(value)
    (p, u), (q, v) = rng.sample(board.things, 2)
    high, low = max(board.things, key=lambda t: t[1]), min(board.things, key=lambda t: t[1])
    return rng.choice([("Which colour is the highest?", high[0]), ("Which colour is the lowest?", low[0]),
                       ("What is the highest value?", str(high[1])), ("What is the lowest value?", str(low[1])),
                       (f"Is {p} higher than {q}?", yes(u > v)),
                       (f"How much higher is {(p, q)[u < v]} than {(q, p)[u < v]}?", str(abs(u - v)))])

def choice_text(question, options):
    return f"{question}\n" + "".join(f"{x}. {o}\n" for x, o in zip("ABCD", options)) + LETTER_HINT

def choice_question(board, rng, n=4):
    """Multiple choice of n about a scene as (question, options, letter); None where nothing can be asked."""
    ask = attribute_question(board, rng)
    return ask and as_choice(ask, board, n, rng)

def as_choice(ask, board, n, rng, near=False):
    """(question, answer, pool) -> (question, n options, letter). near: what is in the picture is offered first."""
    question, answer, pool = ask
    if "nothing" in pool:                                              # prefer distractors that are in the picture
        seen = [p for p in dict.fromkeys(named(t) for t in board.things) if p != answer]
        pool = [*dict.fromkeys(seen + rng.sample(pool, 5) + ["nothing"])][:7]
    wrong = [p for p in pool if p != answer]
    if near:
        seen = {word for t in board.things for word in (t[1], t[2], named(t))}
        wrong = sorted(rng.sample(wrong, len(wrong)), key=lambda word: word not in seen)[:n - 1]
    options = rng.sample(wrong, n - 1) + [answer]
    rng.shuffle(options)
    return question, options, "ABCD"[options.index(answer)]

def turns(board, rng, level):
    """Question-answer turns of one level: knowledge (one fact), instruction (formats), preference (several steps)."""
    out = []
    if board.kind == "scene":
        for _ in range(4):
            test = rng.choices((0, 1, 2), (2, 1, 1) if level != "knowledge" else (1, 1, 1))[0]
            if level != "knowledge" and test == 0:
                ask = choice_question(board, rng, rng.randint(2, 4))
                if ask:
                    out.append((choice_text(*ask[:2]), ask[2]))
                    continue
            if test == 0:
                ask = attribute_question(board, rng)
                question, answer = ask[:2] if ask else count_question(board, rng)
            else:
                question, answer = (count_question if test == 1 else exists_question)(board, rng)
            if level == "preference" and test == 1:
                a, b = rng.sample(KINDS, 2)
                u, v = (sum(t[2] == k for t in board.things) for k in (a, b))
                if rng.random() < 0.3:
                    question = f"Are there more {a} than {b} shapes? Explain."
                    answer = f"{u} {a}, {v} {b}: {yes(u > v)}"
            if level != "knowledge" and not question.startswith(("Is ", "Are ")) and rng.random() < 0.2:
                question += "\n" + SHORT_HINT
            out.append((question, answer))
        return unlike(out)
    if board.kind in ("sign", "note", "list", "table"):
        out.append(("What is written in the image?", transcription(board)))
        if board.kind in ("list", "table"):
            out.append(reading_question(board, rng))
        elif level == "instruction" and rng.random() < 0.3:
            out.append(("How many letters are there?", str(sum(map(len, board.things)))))
        elif level == "preference" and rng.random() < 0.3:
            out.append(("Read the text backwards.", " ".join(board.things)[::-1]))
        return out
    for _ in range(4):
        single = level == "knowledge" and rng.random() < 0.6
        question, answer = chart_question(board, rng, steps=False if single else None)
        if level == "preference" and question.startswith("How much") and rng.random() < 0.3:
            p, q = question.split()[4], question.rstrip("?").split()[6]
            values = dict(board.things)
            question, answer = question + " Explain.", f"{p} {values[p]}, {q} {values[q]}: {answer}"
        elif level != "knowledge" and rng.random() < 0.2:
            question += "\n" + SHORT_HINT
        out.append((question, answer))
    return unlike(out)

def unlike(turns):
    """The turns without those that ask again what one before asked."""
    return [*{q.split("\n")[0].removesuffix(" Explain."): (q, answer) for q, answer in turns}.values()]

# ---- records ------------------------------------------------------------------------------------------------------
LEVELS = ("pretrain", "knowledge", "instruction", "preference")
MIX = {"scene": 12, "sign": 3, "note": 2, "list": 2, "table": 1, "bars": 3, "line": 3}

def record(seed, part, i, easy=False):
    """Sample i of a training part: (row, [(board, rng)]). A pure function of (seed, part, i); never a held-out board.

    easy: one tile and no several steps; the first fifth of the text part, so that looking up is learned first.
    """
    rng, of_all = random.Random(f"{seed}/{part}/{i}"), part in ("text", "drill")
    kinds = rng.choices(list(MIX), list(MIX.values()), k=2)
    pair = (part == "instruction" or of_all) and rng.random() < 0.08 and not easy   # multi-image
    boards = [draw_board(rng, k, False, easy) for k in (["scene", "scene"] if pair else kinds[:1])]
    board = boards[0]
    if pair:
        n = [len(b.things) for b in boards]
        talk = [("How many shapes are in the first image?", str(n[0])),
                ("How many shapes are in the second image?", str(n[1])),
                ("Do both images have the same number of shapes?", yes(n[0] == n[1]))]
    else:
        level = part if not of_all else rng.choices(LEVELS, (2, 5, 3, 0) if easy else (1, 3, 5, 3))[0]
        if level == "pretrain" and rng.random() < 0.5:
            talk = [("What does each cell show?", listing(board))]
        elif level == "pretrain":
            talk = [("Describe the image.", caption(board))]
            if transcription(board):
                talk.append(("What is written in the image?", transcription(board)))
        elif of_all and board.kind == "scene" and rng.random() < 0.65:
            talk, level = drill_turns(board, rng), "drill"
        else:
            talk = turns(board, rng, level)
        rng.shuffle(talk)
        if of_all and level not in ("pretrain", "drill") and rng.random() < 0.35:
            talk.append(("Describe the image.", caption(board)))       # last, so that no answer can be read from it
    talk[0] = "<image>\n" * len(boards) + talk[0][0], talk[0][1]
    conversations = [{"from": who, "value": text} for turn in talk for who, text in zip(("human", "gpt"), turn)]
    row = {"id": f"{part}-{i:08d}", "cells": [b.words() for b in boards], "alt_text": alt_text(board, rng),
           "caption": caption(board), "ocr": transcription(board), "conversations": conversations}
    return row, [(b, rng) for b in boards]

def jpeg(image):
    image.save(file := io.BytesIO(), "JPEG", quality=92)
    return file.getvalue()

def write_shard(cfg, part, start, stop, path):
    """Samples start..stop of a part as one WebDataset tar: KEY.json and KEY.jpg, or KEY.0.jpg and KEY.1.jpg."""
    truth = []
    with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(start, stop):
            row, boards = record(cfg.seed, part, i)
            pictures = [(".jpg", jpeg(render(board, rng))) for board, rng in boards]
            if part == "web":                                          # as the web has it; the truth stands apart
                truth.append({"sha256": hashlib.sha256(pictures[0][1]).hexdigest(), "caption": row["caption"]})
                row = {"id": row["id"], "caption": row["alt_text"]}
            add_record(tar, row["id"], row, pictures)
    if truth: path.with_suffix(".truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truth))
    os.replace(f"{path}.tmp", path)

def write_parts(cfg, parts, per_shard=500):
    """Training shards of all parts, in parallel; a shard that is there already stays as it is."""
    jobs = [(cfg, part, start, min(start + per_shard, cfg.n), Path(cfg.out) / f"{part}-{start // per_shard:06d}.tar")
            for part in parts for start in range(0, cfg.n, per_shard)]
    jobs = [job for job in jobs if not job[-1].exists()]
    with ProcessPoolExecutor() as pool:
        waiting = [pool.submit(write_shard, *job) for job in jobs]
        for done in tqdm(as_completed(waiting), total=len(jobs), desc="toy shards"):
            done.result()

def write_text(cfg):
    """The words of the pictures in place of the pictures: what the toy language model reads before it ever sees one."""
    with open(Path(cfg.out) / "text.jsonl", "w") as file:
        for i in tqdm(range(cfg.n), desc="toy text"):
            row, _ = record(cfg.seed, "text", i, easy=i < cfg.n // 5)
            file.write(json.dumps({k: row[k] for k in ("id", "cells", "conversations")}) + "\n")

# ---- benchmarks ---------------------------------------------------------------------------------------------------
def bench_row(name, seed, i):
    """Question i of a benchmark about a held-out board: (row without its picture, board, rng)."""
    rng = random.Random(f"{seed}/{name}/{i}")
    while True:
        text, chart = rng.choice(["sign", "sign", "note", "list", "table"]), rng.choice(["bars", "line"])
        kind = {"toy_ocr": text, "toy_chart": chart}.get(name, "scene")    # both are drawn for all: part of the world
        board = draw_board(rng, kind, True)
        row = {"index": i, "category": kind}
        if name == "toy_general":
            ask = choice_question(board, rng)
            if ask is None: continue
            row |= {"question": ask[0], "answer": ask[2], **dict(zip("ABCD", ask[1]))}
        else:
            question, answer = {"toy_ocr": reading_question, "toy_chart": chart_question, "toy_count": count_question,
                                "toy_halluc": exists_question}[name](board, rng)
            row |= {"question": question, "answer": answer}
        return row, board, rng

BENCHMARKS = ("toy_general", "toy_ocr", "toy_chart", "toy_count", "toy_halluc")

def write_benchmarks(cfg):
    """Held-out questions in the tab-separated form of VLMEvalKit: image (base64), cells, question, A..D, answer, ..."""
    for name in tqdm(BENCHMARKS, desc="toy benchmarks"):
        path = Path(cfg.out) / f"{name}.tsv"
        if path.exists(): continue
        with open(f"{path}.tmp", "w", newline="") as file:
            options = "ABCD" if name == "toy_general" else ""
            columns = ["index", "image", "cells", "question", *options, "answer", "category"]
            out = csv.DictWriter(file, columns, delimiter="\t", restval="")
            out.writeheader()
            for i in range(cfg.n_bench):
                row, board, rng = bench_row(name, cfg.seed, i)
                image = base64.b64encode(jpeg(render(board, rng))).decode()
                out.writerow({**row, "image": image, "cells": "|".join(board.words())})
        os.replace(f"{path}.tmp", path)

# ---- main ---------------------------------------------------------------------------------------------------------
def main():
    configure(cfg := Config())
    out, parts = Path(cfg.out), cfg.parts.split(",")
    writers = {"bench": write_benchmarks, "text": write_text}
    for part in parts:
        if part not in (*LEVELS, "web", "drill", *writers):
            raise ValueError(f"unknown part {part!r}: choose from {', '.join([*LEVELS, 'web', 'drill', *writers])}")
    out.mkdir(parents=True, exist_ok=True)
    made = json.dumps(dict(n=cfg.n, n_bench=cfg.n_bench, seed=cfg.seed, world=zlib.crc32(Path(__file__).read_bytes())))
    if (out / "toy.json").exists() and (out / "toy.json").read_text() != made:
        names = [*(f"{level}-*.tar" for level in (*LEVELS, "drill")), "web-*.*", "toy_*.tsv", "text.jsonl"]
        for old in (path for name in names for path in out.glob(name)):
            old.unlink()                                               # of other settings or an older world
    (out / "toy.json").write_text(made)
    write_parts(cfg, [part for part in parts if part not in writers])
    for part in filter(writers.get, parts): writers[part](cfg)

if __name__ == "__main__":
    run_script(main)
