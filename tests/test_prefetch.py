"""training/prefetch.py: the packs of the next step are fetched while a step is trained."""

import itertools
import multiprocessing
import threading
import time

import pytest
import torch
from rows import dataset_of, some_rows

from data import make_loader
from training import prefetch
from training.prefetch import Prefetcher

CPU = torch.device("cpu")


class Packs:
    """An iterator of packs without end that counts what was taken of it; `fails` ends it."""

    def __init__(self, fails=None):
        self.taken = 0
        self.fails = fails

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.fails:
            raise OSError("the disk is gone")
        self.taken += 1
        return {"ids": [self.taken], "tiles": torch.zeros(2), "labels": torch.zeros(2)}

    def wait_for(self, taken):
        wait_until(lambda: self.taken == taken)


@pytest.fixture
def opened():
    """A function that makes a Prefetcher, which is closed when the test ends."""
    made = []

    def make(packs, accum, num_workers=1):
        made.append(Prefetcher(packs, accum, CPU, num_workers))
        return made[-1]

    yield make
    for prefetcher in made:
        prefetcher.close()


def left_over():
    """Threads and processes of ours, but those of other libraries such as tqdm's."""
    threads = [t for t in threading.enumerate() if t.name == "prefetch"]
    return threads + multiprocessing.active_children()


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    assert condition()


@pytest.mark.parametrize("accum", [1, 3, 64])
def test_a_step_that_begins_finds_all_its_packs_and_memory_holds_two_more(opened, accum):
    packs = Packs()
    batches = opened(packs, accum)
    trained = 0
    for _ in range(3):
        batches.next_step()
        for _ in batches.on_device():
            trained += 1
            # one at work, those of a step and one more
            packs.wait_for(trained + accum + 1)
    time.sleep(0.05)
    assert packs.taken == trained + accum + 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_packs_come_in_order_and_lose_their_tensors_when_they_are_trained(opened, num_workers):
    batches = opened(Packs(), 4, num_workers)
    numbers = itertools.count(1)
    for _ in range(5):
        micro = batches.next_step()
        for batch in batches.on_device():
            assert batch["ids"] == [next(numbers)] and "tiles" in batch and "labels" in batch
        assert [list(batch) for batch in micro] == [["ids"]] * 4
        assert micro[-1]["ids"] == [next(numbers) - 1]
        numbers = itertools.count(micro[-1]["ids"][0] + 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_loader_reaches_the_loop_after_the_steps_before_it(opened, num_workers):
    batches = opened(Packs(fails=7), 2, num_workers)
    for _ in range(3):
        batches.next_step()
        for _ in batches.on_device():
            pass
    for _ in range(2):  # it stays one
        with pytest.raises(OSError, match="the disk is gone"):
            batches.next_step()


def test_closing_ends_the_thread_and_the_workers_also_with_no_room_left(tmp_path):
    loader = make_loader(dataset_of(some_rows(tmp_path, 40)), num_workers=1)
    batches = Prefetcher(iter(loader), 2, CPU, 1)
    assert len(batches.next_step()) == 2 and len(left_over()) == 2
    wait_until(lambda: len(batches.packs) == 3)
    batches.close()
    assert left_over() == []


def test_a_loader_that_hangs_holds_up_the_end_of_a_stage_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(prefetch, "CLOSE_S", 0.1)
    go_on = threading.Event()

    def hang():
        go_on.wait(60)
        yield {}

    batches = Prefetcher(hang(), 1, CPU, 1)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 10
    go_on.set()
    batches.thread.join(10)
    assert not batches.thread.is_alive()
