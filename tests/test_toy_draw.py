"""toy/draw.py: pictures are tiled like real ones, and cost next to nothing."""
import time

from inputs.images import count_tiles, tile_grid
from toy.draw import draw_picture, jpeg_bytes
from toy.records import toy_record


def test_every_board_is_tiled_as_its_truth_says_whatever_the_size_of_the_picture():
    grids = set()
    for i in range(400):
        row, ((board, rng),) = toy_record(2, "pretrain", i)
        image = draw_picture(board, rng)
        assert tile_grid(*image.size, 1, 4, 84) == board.grid
        assert len(row["cells"][0]) == 9 * count_tiles(*image.size, 1, 4, 84)
        grids.add(board.grid)
    assert len(grids) >= 6


def test_drawing_is_fast_enough_to_be_free(capsys):
    start = time.perf_counter()
    for i in range(60):
        for board, rng in toy_record(1, "pretrain", i)[1]:
            jpeg_bytes(draw_picture(board, rng))
    rate = 60 / (time.perf_counter() - start)
    with capsys.disabled():
        print(f" [{rate:.0f} samples/s on this machine]", end="")
    assert rate > 0
