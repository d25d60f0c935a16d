"""The grids of the attention kernels fill a GPU, whatever is in a pack."""

import pytest

from bench.sm_busy import KERNELS, PACKS, busy_share


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", PACKS)
def test_the_processors_of_a_gpu_are_busy_nine_tenths_of_the_time(name, kernel):
    _, busy = busy_share(PACKS[name], kernel)
    assert 0.9 <= busy <= 1
