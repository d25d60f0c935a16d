"""toy/questions.py: answers agree with the truth, and cannot be guessed."""
import random
import re

from toy.boards import PLACES, draw_board
from toy.questions import drill_turns, yes_or_no
from toy.records import toy_question

STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NEIGHBOUR = r"Wh(?:at|ich place) is just (.+) the (\w+ \w+)\?(?: Explain\.)?"


def test_answers_agree_with_the_truth():
    for i in range(300):
        row, board, _ = toy_question("toy_count", 4, i)
        word = row["question"].split()[2]
        shape = {"crosses": "cross"}.get(word, word[:-1])
        n = sum(word == "shapes" or t.color == word or t.shape == shape for t in board.things)
        assert row["answer"] == str(n), row

        row, board, _ = toy_question("toy_halluc", 4, i)
        color, shape = row["question"].split()[3:5]
        there = any(t.color == color and t.shape == shape for t in board.things)
        assert row["answer"] == yes_or_no(there)

        row, board, _ = toy_question("toy_ocr", 4, i)
        if board.kind == "sign":
            assert row["answer"] == board.things[0]

        row, board, _ = toy_question("toy_chart", 4, i)
        if row["question"].startswith("What is the value of"):
            color = row["question"][:-1].split()[-1]
            assert row["answer"] == str(dict(board.things)[color])

        row, board, _ = toy_question("toy_general", 4, i)
        options = [row[x] for x in "ABCD" if x in row]
        assert row["answer"] in row
        assert len(set(options)) == len(options)


def test_the_drill_names_the_way_to_a_neighbour_and_offers_what_is_in_the_picture():
    def place(row, column):
        return PLACES[row % 3 * 3 + column % 3]

    rng = random.Random(3)
    ways = 0
    hard = 0
    for _ in range(300):
        board = draw_board(rng, "scene", False)
        names = {(t.row, t.column): f"{t.color} {t.shape}" for t in board.things}
        for question, answer in drill_turns(board, rng):
            way = re.fullmatch(NEIGHBOUR, question)
            if way:
                (here,) = [cell for cell, name in names.items() if name == way[2]]
                down, right = STEPS[way[1]]
                there = (here[0] + down, here[1] + right)
                name = names.get(there, "nothing")
                if "Which" in question:
                    assert answer == place(*there)
                elif "Explain" in question:
                    assert answer == f"{place(*here)}, {place(*there)}: {name}"
                else:
                    assert answer == name
                ways += 1
            if "colour" in question and "A. " in question:
                options = set(re.findall(r"^[A-D]\. (.+)$", question, re.M))
                seen = {t.color for t in board.things}
                assert options <= seen or seen <= options
                hard += 1
    assert ways > 100 and hard > 50, (ways, hard)


def test_answers_cannot_be_guessed_from_the_question():
    answers = [toy_question("toy_halluc", 1, i)[0]["answer"] for i in range(400)]
    assert 0.4 < answers.count("Yes") / 400 < 0.6
    letters = [toy_question("toy_general", 1, i)[0]["answer"] for i in range(400)]
    assert all(letters.count(x) > 60 for x in "AB")
