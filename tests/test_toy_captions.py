"""toy/captions.py: exact descriptions, and alt-text that says less."""
from toy.captions import cell_listing
from toy.records import toy_record


def test_the_listing_names_every_cell_in_the_order_of_the_visual_tokens():
    for i in range(100):
        row, ((board, _),) = toy_record(3, "pretrain", i)
        words = cell_listing(board).split()[1:]
        assert words == [cell.split()[0] for cell in row["cells"][0]][:len(words)]
        assert len(words) == 9 * board.grid[0] * board.grid[1]


def test_alt_text_says_less_than_the_caption():
    rows = [toy_record(1, "pretrain", i)[0] for i in range(200)]
    alt_texts = sum(len(row["alt_text"]) for row in rows)
    captions = sum(len(row["caption"]) for row in rows)
    assert alt_texts < 0.7 * captions
