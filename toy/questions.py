"""Questions about a board with their exact answers.

An ask is (question, answer, pool). The pool holds the answers from which wrong options are taken.
A turn is (question, answer) as it goes into a conversation.
"""
from toy.boards import (
    COLORS,
    PLACES,
    SHAPES,
    SIDE,
    name_of,
    neighbours,
    place_of,
    unique_things,
)
from toy.captions import transcription

LETTER_HINT = "Answer with the option's letter from the given choices directly."
SHORT_HINT = "Answer the question using a single word or phrase."
OPTION_LETTERS = "ABCD"
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CORNERS = (0, 2, 6, 8)               # positions in PLACES


def yes_or_no(flag):
    return "Yes" if flag else "No"


# ---- one question --------------------------------------------------------------------------------

def count_question(board, rng):
    """Number of things of one colour, of one shape, or of all."""
    test = rng.randrange(5)
    if test == 0:
        return "How many shapes are there?", str(len(board.things))
    if test < 3:
        color = rng.choice([t.color for t in board.things] + [rng.choice(list(COLORS))])
        n = sum(t.color == color for t in board.things)
        return f"How many {color} shapes are there?", str(n)
    shape = rng.choice([t.shape for t in board.things] + [rng.choice(SHAPES)])
    n = sum(t.shape == shape for t in board.things)
    plural = "crosses" if shape == "cross" else f"{shape}s"
    return f"How many {plural} are there?", str(n)


def exists_question(board, rng):
    """Half of the answers are Yes. Most of the others mix the colour and shape of two things."""
    present = {(t.color, t.shape) for t in board.things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
    else:
        # With repeats: what can be mixed in several ways is asked more often.
        mixed = [(color, shape) for color, _ in present for _, shape in present]
        mixed = sorted(pair for pair in mixed if pair not in present)
        if mixed and rng.random() < 0.6:
            absent = mixed
        else:
            absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
        color, shape = rng.choice(absent)
    answer = yes_or_no((color, shape) in present)
    return f"Is there a {color} {shape} in the image?", answer


def reading_question(board, rng):
    """All of the text, or the first or the last row of a list or a table."""
    rows = transcription(board).split()
    if board.kind in ("list", "table") and rng.random() < 0.4:
        first = ("What is the first row?", rows[0])
        last = ("What is the last row?", rows[-1])
        return rng.choice([first, last])
    return "What is written in the image?", " ".join(rows)


def chart_question(board, rng, compare=None):
    """One fact of a chart, or several facts compared. compare=None: one or the other at random."""
    if compare is None:
        compare = rng.random() < 0.5
    if not compare:
        color, value = rng.choice(board.things)
        return f"What is the value of {color}?", str(value)
    (one, one_value), (other, other_value) = rng.sample(board.things, 2)
    higher, lower = (one, other) if one_value >= other_value else (other, one)
    high = max(board.things, key=lambda thing: thing[1])
    low = min(board.things, key=lambda thing: thing[1])
    difference = str(abs(one_value - other_value))
    return rng.choice([
        ("Which colour is the highest?", high[0]),
        ("Which colour is the lowest?", low[0]),
        ("What is the highest value?", str(high[1])),
        ("What is the lowest value?", str(low[1])),
        (f"Is {one} higher than {other}?", yes_or_no(one_value > other_value)),
        (f"How much higher is {higher} than {lower}?", difference),
    ])


# ---- questions about the attributes and places of shapes -----------------------------------------

def attribute_asks(board):
    """Asks for the colour or the shape of the only thing that fits."""
    asks = []
    for thing in unique_things(board.things, lambda t: t.shape):
        asks.append((f"What colour is the {thing.shape}?", thing.color, list(COLORS)))
    for thing in unique_things(board.things, lambda t: t.color):
        asks.append((f"What shape is {thing.color}?", thing.shape, list(SHAPES)))
    return asks


def place_asks(board):
    """Asks for what is next to a thing and, on a single tile, in a corner.

    What holds a thing is asked more often than what holds nothing, for most places are empty.
    """
    pool = [*NAMES, "nothing"]
    asks = []
    for thing in unique_things(board.things, name_of):
        for direction, _, there in neighbours(board, thing):
            ask = (f"What is just {direction} the {name_of(thing)}?", there, pool)
            asks += [ask] * (1 if there == "nothing" else 3)
    if board.grid == (1, 1):
        shown = {(t.row, t.column): name_of(t) for t in board.things}
        for corner in CORNERS:
            cell = divmod(corner, SIDE)
            ask = (f"What is in the {PLACES[corner]} corner?", shown.get(cell, "nothing"), pool)
            asks += [ask] * (2 if cell in shown else 1)
    return asks


def attribute_ask(board, rng):
    """One ask for an attribute or a place; None where nothing can be asked."""
    families = [family for family in (attribute_asks(board), place_asks(board)) if family]
    return rng.choice(rng.choice(families)) if families else None


# ---- multiple choice -----------------------------------------------------------------------------

def choice_text(question, options):
    lettered = [f"{x}. {o}\n" for x, o in zip(OPTION_LETTERS, options, strict=False)]
    return f"{question}\n{''.join(lettered)}{LETTER_HINT}"


def choice_question(board, rng, n=4):
    """Multiple choice of n about a scene as (question, options, letter); None without an ask."""
    ask = attribute_ask(board, rng)
    return as_choice(ask, board, n, rng) if ask else None


def as_choice(ask, board, n, rng, near=False):
    """An ask -> (question, n options, letter). near: what is in the picture is offered first."""
    question, answer, pool = ask
    if "nothing" in pool:
        # Prefer wrong options that are in the picture.
        shown = [name_of(t) for t in board.things]
        others = [name for name in dict.fromkeys(shown) if name != answer]
        pool = [*dict.fromkeys(others + rng.sample(pool, 5) + ["nothing"])][:7]
    wrong = [option for option in pool if option != answer]
    if near:
        seen = {word for t in board.things for word in (t.color, t.shape, name_of(t))}
        shuffled = rng.sample(wrong, len(wrong))
        wrong = sorted(shuffled, key=lambda option: option not in seen)[:n - 1]
    options = rng.sample(wrong, n - 1) + [answer]
    rng.shuffle(options)
    return question, options, OPTION_LETTERS[options.index(answer)]


# ---- the turns of a conversation -----------------------------------------------------------------

def level_turns(board, rng, level):
    """Turns of a level: knowledge (one fact), instruction (formats), preference (reasoning)."""
    if board.kind == "scene":
        return scene_turns(board, rng, level)
    if board.kind in ("bars", "line"):
        return chart_turns(board, rng, level)
    return text_turns(board, rng, level)


def scene_turns(board, rng, level):
    formats = level != "knowledge"
    turns = []
    for _ in range(4):
        weights = (2, 1, 1) if formats else (1, 1, 1)
        (test,) = rng.choices(("attribute", "count", "exists"), weights)
        if test == "attribute" and formats:
            choice = choice_question(board, rng, rng.randint(2, 4))
            if choice:
                question, options, letter = choice
                turns.append((choice_text(question, options), letter))
                continue
        question, answer = scene_turn(board, rng, test)
        if level == "preference" and test == "count":
            question, answer = explained_count(board, rng) or (question, answer)
        if formats and not question.startswith(("Is ", "Are ")) and rng.random() < 0.2:
            question += "\n" + SHORT_HINT
        turns.append((question, answer))
    return without_repeats(turns)


def scene_turn(board, rng, test):
    """A turn of the kind `test`. Where no attribute can be asked, a count."""
    if test == "exists":
        return exists_question(board, rng)
    ask = attribute_ask(board, rng) if test == "attribute" else None
    return ask[:2] if ask else count_question(board, rng)


def explained_count(board, rng):
    """A comparison of two counts, spelt out; None seven times in ten."""
    one, other = rng.sample(SHAPES, 2)
    if rng.random() >= 0.3:
        return None
    n_one = sum(t.shape == one for t in board.things)
    n_other = sum(t.shape == other for t in board.things)
    answer = f"{n_one} {one}, {n_other} {other}: {yes_or_no(n_one > n_other)}"
    return f"Are there more {one} than {other} shapes? Explain.", answer


def text_turns(board, rng, level):
    text = transcription(board)
    turns = [("What is written in the image?", text)]
    if board.kind in ("list", "table"):
        turns.append(reading_question(board, rng))
    elif level == "instruction" and rng.random() < 0.3:
        n_letters = sum(map(len, board.things))
        turns.append(("How many letters are there?", str(n_letters)))
    elif level == "preference" and rng.random() < 0.3:
        turns.append(("Read the text backwards.", text[::-1]))
    return turns


def chart_turns(board, rng, level):
    values = dict(board.things)
    turns = []
    for _ in range(4):
        single = level == "knowledge" and rng.random() < 0.6
        question, answer = chart_question(board, rng, compare=False if single else None)
        if level == "preference" and question.startswith("How much") and rng.random() < 0.3:
            # "How much higher is ONE than OTHER?"
            words = question.rstrip("?").split()
            one = words[4]
            other = words[6]
            question += " Explain."
            answer = f"{one} {values[one]}, {other} {values[other]}: {answer}"
        elif level != "knowledge" and rng.random() < 0.2:
            question += "\n" + SHORT_HINT
        turns.append((question, answer))
    return without_repeats(turns)


def drill_turns(board, rng):
    """Turns about what a language base learns last: places, neighbours, colours, counts.

    docs/log.md has the measurements that led to this mixture.
    """
    corners, neighbour_asks = drill_place_asks(board)
    looks = []
    for ask in attribute_asks(board):
        looks += [ask] * (3 if "colour" in ask[0] else 1)
    families = [family for family in (corners, neighbour_asks, looks) if family]
    asks = [rng.choice(rng.choice(families)) for _ in range(6 if families else 0)]
    turns = []
    for ask in asks:
        question, answer, pool = ask
        if pool and rng.random() < 0.5:
            n = rng.randint(2, 4)
            question, options, letter = as_choice(ask, board, n, rng, near=True)
            turns.append((choice_text(question, options), letter))
        else:
            turns.append((question, answer))
    return without_repeats([*turns, count_question(board, rng)])


def drill_place_asks(board):
    """(asks for a place, asks for what is next to a thing). A pool of None cannot be a choice."""
    asks = place_asks(board)
    where = [ask for ask in asks if "corner" in ask[0]]
    beside = [ask for ask in asks if "just" in ask[0]]
    for thing in unique_things(board.things, name_of):
        name = name_of(thing)
        here = place_of(thing.row, thing.column)
        where.append((f"Where is the {name}?", here, list(PLACES)))
        for direction, spot, there in neighbours(board, thing):
            # The way to a neighbour, whole and in part.
            whole = f"{here}, {spot}: {there}"
            way = [
                (f"What is just {direction} the {name}? Explain.", whole, None),
                (f"Which place is just {direction} the {name}?", spot, list(PLACES)),
            ]
            beside += way * (1 if there == "nothing" else 2)
    if board.grid == (1, 1):
        for thing in board.things:
            place = place_of(thing.row, thing.column)
            where.append((f"What is at the {place}?", name_of(thing), None))
    return where, beside


def without_repeats(turns):
    """The turns, but of those that ask the same the last one alone, in the place of the first."""
    by_question = {}
    for question, answer in turns:
        asked = question.split("\n")[0].removesuffix(" Explain.")
        by_question[asked] = (question, answer)
    return list(by_question.values())
