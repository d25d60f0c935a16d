"""The grids of the attention kernels fill a GPU, whatever is in a pack."""

import pytest

from bench.sm_busy import PACKS, busy_share, kernels_of
from kernels.attention_launch import whole_documents

CASES = [(name, kernel) for name, pack in PACKS.items() for kernel in kernels_of(pack)]


@pytest.mark.parametrize("name, kernel", CASES)
def test_the_processors_of_a_gpu_are_busy_nine_tenths_of_the_time(name, kernel):
    _, busy = busy_share(PACKS[name], kernel)
    assert 0.9 <= busy <= 1


def test_a_program_owns_a_whole_document_only_where_that_is_quicker():
    tiles = [1025] * 32
    assert whole_documents(tiles, False, 64, 32 * 16, 132)
    assert not whole_documents(tiles, True, 64, 32 * 16, 132)
    assert not whole_documents([1024] * 32, False, 64, 32 * 16, 132)
    # no registers for its sums
    assert not whole_documents(tiles, False, 128, 32 * 16, 132)
    # two thirds of the processors would have nothing to do
    assert not whole_documents(tiles[:3], False, 64, 3 * 16, 132)
