"""toy/boards.py: the words of cells, and a clean split."""
from pathlib import Path

from inputs.tokenizer import Tokenizer
from toy.boards import CELL_WORDS, PLACE_WORDS
from toy.records import BENCHMARKS, toy_question, toy_record

TOY = Tokenizer(Path(__file__).parent.parent / "toy" / "tokenizer")


def test_training_and_benchmarks_share_no_board_and_no_sign_word():
    def truths(boards):
        return {(board.grid, tuple(sorted(board.cells.items()))) for board in boards}

    def sign_words(boards):
        return {board.things[0] for board in boards if board.kind == "sign"}

    train = [board for i in range(1500) for board, _ in toy_record(1, "knowledge", i)[1]]
    held = [toy_question(name, 1, i)[1] for name in BENCHMARKS for i in range(200)]
    assert not truths(train) & truths(held)
    assert not sign_words(train) & sign_words(held)
    assert sign_words(held)


def test_every_cell_word_is_one_token_and_no_unseen_word_is():
    assert all(len(TOY.encode(" " + word)) == 1 for word in CELL_WORDS + PLACE_WORDS)
    assert len(TOY.encode("MATEKU")) == 6
    for i in range(300):
        for cells in toy_record(3, "instruction", i)[0]["cells"]:
            what, where = zip(*(cell.split() for cell in cells), strict=True)
            assert set(what) <= set(CELL_WORDS)
            assert [*where] == PLACE_WORDS * (len(cells) // 9)
