"""Families of questions: what a language base can be made without, and what its gate counts apart.

A question is of the first family whose pattern is found in it.
"""
import re

from toy.boards import COLORS, PLACES, SHAPES

FAMILIES = {
    # Multiple choice.
    "choice": r"\nA\. ",
    # Of two pictures.
    "comparison": r"the first image\?|the second image\?|^Do both images",
    # Several facts make one answer.
    "steps": (
        r"^How much higher|^How many more|^How many \w+ and |^Are there more|^Is \w+ higher"
        r"|^Which is higher|^What is the sum|second highest|from the lowest|backwards"),
    "caption": r"^Describe|^What does each cell show",
    "reading": r"^What is written|^What is the (first|last) row",
    "value": r"^What is the value of",
    "extreme": r"(highest|lowest)( value)?\?",
    "count": r"^How many",
    "exists": r"^Is there a",
    "attribute": r"^What colour is|^What shape is",
    # From a place to the thing, and from the thing to its place.
    "place": r"^What is (at|in the)",
    "where": r"^Where is",
    # Two look-ups: where a thing is, and what is beside that place.
    "neighbour": r"^What is just|^Which place is just",
}
# What stands for the names in the form of a question: colours, shapes and places, longest first.
NAME_WORDS = sorted([*COLORS, *SHAPES, *PLACES], key=len, reverse=True)
NAME = re.compile(rf"\b({'|'.join(NAME_WORDS)})(e?s)?\b")


def family_of(question):
    """The family of a question. ValueError for a question of none."""
    for family, pattern in FAMILIES.items():
        if re.search(pattern, question):
            return family
    raise ValueError(f"a question of no family: {question!r}; give it one in toy/families.py")


def form_of(question):
    """What kind of answer a question wants: the question without names.

    Multiple choice of n wants one of n letters, whatever it is about.
    """
    n_options = len(re.findall(r"^[A-D]\. ", question, re.MULTILINE))
    if n_options:
        return f"choice of {n_options}"
    return NAME.sub("_", question.split("\n")[0])


def without_families(turns, families):
    """The turns whose question is of none of these families."""
    return [turn for turn in turns if family_of(turn[0]) not in families]


def check_families(names):
    """ValueError unless each name is a family."""
    for name in names:
        if name not in FAMILIES:
            raise ValueError(f"unknown family {name!r}: choose from {', '.join(FAMILIES)}")
