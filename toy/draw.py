"""Pictures of boards.

Backgrounds, positions, font sizes, line styles, noise and picture size vary at random.
Shape letters: (x, y) in pixels, r a radius.
"""
import functools
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toy.boards import CELL, COLORS, NUMBERS, SIDE, UNIT

TABLE_LINE = (150, 150, 150)         # of a table
CHART_KINDS = ("bars", "line")


@functools.cache
def font_of(size):
    return ImageFont.load_default(size)


def draw_picture(board, rng):
    """PIL RGB picture of a board."""
    width = board.width * CELL
    height = board.height * CELL
    dark = board.kind in ("sign", "note") and rng.random() < 0.3
    paper = paper_color(dark, rng)
    ink = ink_color(dark, rng)
    font_size = rng.randint(16, 24)
    stroke_width = rng.randint(0, 1)
    # Drawn for every kind of board, so that the numbers that follow do not depend on the kind.
    bar_half = rng.randint(6, 10)

    image = Image.new("RGB", (width, height), paper)
    canvas = ImageDraw.Draw(image)
    if board.kind == "table":
        draw_table_lines(canvas, width, height)
    if board.kind in CHART_KINDS:
        draw_chart(canvas, board, paper, bar_half, rng)
    if board.kind == "scene":
        draw_scene(canvas, board, rng)
    else:
        draw_characters(canvas, board, ink, font_size, stroke_width, rng)

    # Pictures come in odd sizes too.
    if rng.random() < 0.2:
        odd_width = round(width * rng.uniform(0.96, 1.05))
        odd_height = round(height * rng.uniform(0.96, 1.05))
        image = image.resize((odd_width, odd_height))
    return add_pixel_noise(image, rng)


def paper_color(dark, rng):
    tone = rng.randint(15, 60) if dark else rng.randint(205, 250)
    values = [tone + rng.randint(-15, 15) for _ in range(3)]
    return tuple(min(255, max(0, value)) for value in values)


def ink_color(dark, rng):
    darkest, lightest = (200, 255) if dark else (0, 70)
    return tuple(rng.randint(darkest, lightest) for _ in range(3))


def cell_center(row, column):
    """(x, y) in pixels."""
    x = CELL * column + CELL // 2
    y = CELL * row + CELL // 2
    return x, y


def draw_table_lines(canvas, width, height):
    for y in range(0, height + 1, CELL):
        canvas.line((0, y, width, y), fill=TABLE_LINE)
    for column in range(SIDE + 1):
        x = column * CELL
        canvas.line((x, 0, x, height), fill=TABLE_LINE)


def draw_chart(canvas, board, paper, bar_half, rng):
    """Bars from the left edge; or markers on stems, with a faint line through them."""
    bottom = SIDE * CELL
    is_bars = board.kind == "bars"
    lanes = sorted({row if is_bars else column for row, column in board.cells})
    points = []
    for (color, value), lane in zip(board.things, lanes, strict=True):
        fill = COLORS[color]
        middle = CELL * lane + CELL // 2 + rng.randint(-2, 2)
        length = UNIT * value
        if is_bars:
            bar = (0, middle - bar_half, length, middle + bar_half)
            canvas.rectangle(bar, fill=fill)
        else:
            top = bottom - length
            stem = (middle - 3, top, middle + 3, bottom)
            canvas.rectangle(stem, fill=fill)
            canvas.ellipse(box_around(middle, top + 4, 6, 6), fill=fill)
            points.append((middle, top + 4))
    if points:
        faint = tuple(max(0, value - 25) for value in paper)
        canvas.line(points, fill=faint, width=1)


def draw_scene(canvas, board, rng):
    for thing in board.things:
        x, y = cell_center(thing.row, thing.column)
        radius = rng.uniform(10, 12) if thing.size == "large" else rng.uniform(5, 6.5)
        x += rng.randint(-2, 2)
        y += rng.randint(-2, 2)
        draw_shape(canvas, thing.shape, x, y, radius, COLORS[thing.color])


def box_around(x, y, half_width, half_height):
    """(left, top, right, bottom)"""
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def draw_shape(canvas, shape, x, y, r, fill):
    """A shape of radius r with its centre at (x, y)."""
    if shape == "circle":
        canvas.ellipse(box_around(x, y, r, r), fill=fill)
    elif shape == "square":
        canvas.rectangle(box_around(x, y, 0.88 * r, 0.88 * r), fill=fill)
    elif shape == "triangle":
        top = (x, y - r)
        right = (x + r, y + 0.8 * r)
        left = (x - r, y + 0.8 * r)
        canvas.polygon([top, right, left], fill=fill)
    elif shape == "cross":
        canvas.rectangle(box_around(x, y, r, 0.3 * r), fill=fill)
        canvas.rectangle(box_around(x, y, 0.3 * r, r), fill=fill)
    else:
        # A star of five points: outer and inner corners by turns.
        corner = np.arange(10)
        angle = corner * np.pi / 5 - np.pi / 2
        radius = np.where(corner % 2, 0.45 * r, 1.1 * r)
        xs = x + radius * np.cos(angle)
        ys = y + radius * np.sin(angle)
        canvas.polygon(list(zip(xs, ys, strict=True)), fill=fill)


def draw_characters(canvas, board, ink, font_size, stroke_width, rng):
    """The letters and digits of a board. Words of marks in a chart are not text."""
    for (row, column), word in board.cells.items():
        if word in NUMBERS:
            character = str(NUMBERS.index(word))
        elif len(word) == 1:
            character = word
        else:
            continue
        x, y = cell_center(row, column)
        place = (x + rng.randint(-2, 2), y + rng.randint(-2, 2))
        canvas.text(place, character, fill=ink, font=font_of(font_size), anchor="mm",
                    stroke_width=stroke_width)


def add_pixel_noise(image, rng):
    """Add -8 to 7 to every value."""
    pixels = np.asarray(image, np.int16)
    noise = np.frombuffer(rng.randbytes(pixels.size), np.uint8)
    noise = noise.reshape(pixels.shape) >> 4     # 0 to 15
    noisy = np.clip(pixels + noise - 8, 0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def jpeg_bytes(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()
