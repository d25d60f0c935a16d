"""Boards of the toy world: the exact truth of a picture, before anything is drawn or asked.

A board is a grid of tiles, each of 3x3 cells. After 14-pixel patches and a 2x2 pixel shuffle, one
visual token sees one 28-pixel cell. What a cell shows is one word (`LargeRedCircle`, `K`, `Seven`,
`BlueBarSix`, `Empty`), and where it is in its tile is another (`TopLeft`).

A board is held out for the benchmarks when a checksum of its truth says so. Hence training and
benchmark boards are disjoint, in any number and under any seed.
"""
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

CELL = 28                            # pixels along a cell
SIDE = 3                             # cells along a tile
MAX_VALUE = 8                        # of a chart
UNIT = 10                            # pixels per unit of a chart: the longest bar fills three cells

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (215, 35, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 170),
    "black": (25, 25, 25),
}
SHAPE_SIZES = ("small", "large")
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # without I, O and Q, which look like 1, 0 and 0
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")

PLACES = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)
PLACE_WORDS = [place.title().replace(" ", "") for place in PLACES]
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

# The word that every cell of a thumbnail shows, by the (columns, rows) of its picture.
THUMBNAIL_WORDS = {
    (2, 1): "ThumbWide",
    (3, 1): "ThumbWider",
    (1, 2): "ThumbTall",
    (1, 3): "ThumbTaller",
    (2, 2): "ThumbSquare",
}
SHAPE_WORDS = [
    size.title() + color.title() + shape.title()
    for size in SHAPE_SIZES
    for color in COLORS
    for shape in SHAPES
]
CHART_WORDS = [
    color.title() + mark + number
    for color in COLORS
    for mark in ("Bar", "Point")
    for number in NUMBERS[1:MAX_VALUE + 1]
]
CELL_WORDS = [
    "Empty", "BarEnd", "PointTop",
    *LETTERS, *NUMBERS, *THUMBNAIL_WORDS.values(), *SHAPE_WORDS, *CHART_WORDS,
]

# The grids (columns, rows) of tiles of each kind of board. An entry counts as often as it is there.
GRIDS = {
    "scene": [(1, 1)] * 7 + [(2, 1), (1, 2), (2, 2)],
    "sign": [(1, 1), (2, 1), (2, 1), (3, 1)],
    "note": [(1, 1)],
    "list": [(1, 1), (1, 1), (1, 2), (1, 3)],
    "table": [(1, 1), (1, 1), (1, 2)],
    "bars": [(1, 1), (1, 1), (1, 2)],
    "line": [(1, 1), (1, 1), (2, 1)],
}


class Thing(NamedTuple):
    """One shape of a scene."""
    size: str
    color: str
    shape: str
    row: int                         # of the cell, counted over the whole board
    column: int


@dataclass(slots=True)
class Board:
    kind: str                        # scene, sign, note, list, table, bars, line
    grid: tuple                      # (columns, rows) of tiles
    cells: dict = field(default_factory=dict)   # (row, column) -> word; every other cell is Empty
    # The facts in reading order. Of a scene Things, of a sign or note words, of a list or table
    # (letter, digit, digit), of a chart (color, value).
    things: list = field(default_factory=list)

    @property
    def width(self):
        """Cells from left to right."""
        return SIDE * self.grid[0]

    @property
    def height(self):
        """Cells from top to bottom."""
        return SIDE * self.grid[1]

    def token_words(self):
        """The two words of every visual token, in the order of dynamic tiling.

        Tiles go row by row, and the thumbnail, where there is one, comes last.
        """
        columns, rows = self.grid
        shown = []
        for tile_row in range(rows):
            for tile_column in range(columns):
                for row in range(SIDE):
                    for column in range(SIDE):
                        cell = (SIDE * tile_row + row, SIDE * tile_column + column)
                        shown.append(self.cells.get(cell, "Empty"))
        if columns * rows > 1:
            shown += [THUMBNAIL_WORDS[self.grid]] * SIDE ** 2
        return [f"{word} {PLACE_WORDS[i % SIDE ** 2]}" for i, word in enumerate(shown)]

    def held_out(self):
        """Whether the board belongs to the benchmarks: one in eight, by a checksum of its truth.

        For a sign the word alone counts, so that the words of benchmark signs are unseen.
        """
        if self.kind == "sign":
            truth = self.things[0]
        else:
            truth = repr((self.grid, sorted(self.cells.items())))
        return zlib.crc32(truth.encode()) % 8 == 0


# ---- drawing boards at random --------------------------------------------------------------------

def draw_board(rng, kind, held_out, easy=False):
    """A random board of the wanted side of the split, by rejection. easy: one tile."""
    while True:
        board = make_board(rng, kind, easy)
        if board.held_out() == held_out:
            return board


def make_board(rng, kind, easy=False):
    """Draw the truth of one board of the given kind from `rng`. easy: one tile."""
    grid = (1, 1) if easy else rng.choice(GRIDS[kind])
    board = Board(kind, grid)
    if kind == "scene":
        fill_scene(board, rng)
    elif kind == "sign":
        fill_sign(board, rng)
    elif kind == "note":
        fill_note(board, rng)
    elif kind in ("list", "table"):
        fill_rows(board, rng)
    else:
        fill_chart(board, rng)
    return board


def fill_scene(board, rng):
    """Shapes of one to four colours and one to four forms."""
    n = rng.randint(1, 6) if board.grid == (1, 1) else rng.randint(3, 9)
    colors = rng.sample(list(COLORS), rng.randint(1, 4))
    shapes = rng.sample(SHAPES, rng.randint(1, 4))
    cells = [(row, column) for row in range(board.height) for column in range(board.width)]
    for row, column in sorted(rng.sample(cells, n)):
        size = rng.choice(SHAPE_SIZES)
        color = rng.choice(colors)
        shape = rng.choice(shapes)
        board.cells[row, column] = size.title() + color.title() + shape.title()
        board.things.append(Thing(size, color, shape, row, column))
    # Reading order is the order of the visual tokens: tile by tile, row by row inside a tile.
    board.things.sort(key=lambda t: (t.row // SIDE, t.column // SIDE, t.row, t.column))


def fill_sign(board, rng):
    """One word, long enough to need all tiles."""
    shortest = {1: 1, 2: 3, 3: 6}[board.grid[0]]
    word = make_word(rng, rng.randint(shortest, board.width))
    row = rng.randrange(board.height)
    start = rng.randint(0, board.width - len(word))
    board.cells = {(row, start + i): letter for i, letter in enumerate(word)}
    board.things = [word]


def fill_note(board, rng):
    """Two or three short words, one a row."""
    for row in sorted(rng.sample(range(board.height), rng.randint(2, 3))):
        word = make_word(rng, rng.randint(1, 3))
        board.cells |= {(row, i): letter for i, letter in enumerate(word)}
        board.things.append(word)


def fill_rows(board, rng):
    """Rows of a letter and two digits. The first digit of a row is not 0."""
    n = rng.randint(2, min(board.height, 6))
    rows = sorted(rng.sample(range(board.height), n))
    for row, label in zip(rows, rng.sample(LETTERS, n), strict=True):
        first = rng.randrange(1, 10)
        second = rng.randrange(0 if board.kind == "list" else 1, 10)
        board.cells |= {(row, 0): label, (row, 1): NUMBERS[first], (row, 2): NUMBERS[second]}
        board.things.append((label, first, second))


def fill_chart(board, rng):
    """Bars or points, each of a colour and a value of its own."""
    is_bars = board.kind == "bars"
    along = board.height if is_bars else board.width
    n = rng.randint(2, min(along, 6))
    lanes = sorted(rng.sample(range(along), n))
    values = rng.sample(range(1, MAX_VALUE + 1), n)
    colors = rng.sample(list(COLORS), n)
    for lane, color, value in zip(lanes, colors, values, strict=True):
        # The cell in which the mark ends, counted from where it begins.
        last = (UNIT * value - 1) // CELL
        if is_bars:
            # A bar goes from the left edge to the right.
            for column in range(1, last + 1):
                board.cells[lane, column] = "BarEnd"
            board.cells[lane, 0] = f"{color.title()}Bar{NUMBERS[value]}"
        else:
            # A point stands on a stem that goes from the bottom to the top.
            if last:
                board.cells[2 - last, lane] = "PointTop"
            board.cells[2, lane] = f"{color.title()}Point{NUMBERS[value]}"
        board.things.append((color, value))


def make_word(rng, length):
    """A random word of `length` letters, half of them pronounceable."""
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    vowels = "AEUY"
    consonants = "BCDFGHJKLMNPRSTVWXZ"
    start = rng.random() < 0.5
    letters = [vowels if (i + start) % 2 else consonants for i in range(length)]
    return "".join(rng.choice(choices) for choices in letters)


# ---- facts about the things of a scene -----------------------------------------------------------

def name_of(thing):
    return f"{thing.color} {thing.shape}"


def place_of(row, column):
    """Where a cell is in its tile, in words."""
    return PLACES[row % SIDE * SIDE + column % SIDE]


def unique_things(things, key):
    """The things whose key no other thing has."""
    keys = [key(thing) for thing in things]
    return [thing for thing, own in zip(things, keys, strict=True) if keys.count(own) == 1]


def neighbours(board, thing):
    """Yield (direction, place, what is there) of the cells beside a thing, inside its tile.

    What is there is the name of a thing or "nothing".
    """
    shown = {(t.row, t.column): name_of(t) for t in board.things}
    for direction, (down, right) in DIRECTIONS.items():
        row = thing.row + down
        column = thing.column + right
        if row // SIDE == thing.row // SIDE and column // SIDE == thing.column // SIDE:
            yield direction, place_of(row, column), shown.get((row, column), "nothing")
