"""inputs/index.py: built on all cores, read without memory of its own."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from rows import (
    CHAT,
    ROOT,
    TOY,
    some_rows,
    sources_of,
    talk,
)

from inputs import measure, records

MEMORY = """
import os
import sys
import types

sys.path.insert(0, "tests")
import numpy as np
from rows import dataset_of, packs_of

import data
from inputs.records import IMAGE, ROW, map_index

folder = sys.argv[1]
n_rows, n_batches, workers = map(int, sys.argv[2:5])


def megabytes(name):
    lines = open("/proc/self/smaps_rollup")
    return sum(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


dataset = dataset_of(f"{folder}/rows.jsonl")
with open(f"{folder}/rows.bin", "wb") as rows, open(f"{folder}/images.bin", "wb") as images:
    for start in range(0, n_rows, 100_000):
        part = np.zeros(min(100_000, n_rows - start), ROW)
        part["tokens"] = 50
        part["n_images"] = 1
        part["first_image"] = start + np.arange(len(part))
        rows.write(part.tobytes())
        sizes = np.zeros(len(part), IMAGE)
        sizes["width"] = 84
        sizes["height"] = 84
        images.write(sizes.tobytes())
    for file in (rows, images):  # what is not on the disk yet counts as dirty
        file.flush()
        os.fsync(file.fileno())
before = megabytes("Private_Dirty")
big = types.SimpleNamespace(
    name="big", path="", repeat=1, weight=0, max_tiles=0, meta={"bad": [], "digest": ""},
    rows=map_index(f"{folder}/rows.bin"), images=map_index(f"{folder}/images.bin"))
packs = packs_of([big])
planned = [len(packs.plan_window(0, w)[0]) for w in range(5)]
index = megabytes("Private_Dirty") - before
loader = iter(data.make_loader(dataset, num_workers=workers))
warm = n_batches // 4
for _ in range(warm):
    next(loader)
start = megabytes("Rss")
for _ in range(n_batches - warm):
    next(loader)
print(index, (megabytes("Rss") - start) / (n_batches - warm) * 1000, packs.n)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="this system does not count private pages"
)
@pytest.mark.parametrize(
    "n_batches, workers, slope",
    [
        pytest.param(800, 0, 3, id="short"),
        pytest.param(4000, 2, 1, id="long", marks=pytest.mark.nightly),
    ],
)
def test_an_index_of_two_million_rows_takes_no_memory_of_its_own_and_batches_leave_none_behind(
    tmp_path, n_batches, workers, slope
):
    some_rows(tmp_path, 300)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "2000000", str(n_batches), str(workers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    index, per_1000, n = map(float, done.stdout.split())
    assert n == 2_000_000 and index < 40, f"{index:.1f} MB"
    assert per_1000 <= slope, f"{per_1000:.2f} MB more after 1,000 batches"


def test_an_index_built_by_several_processes_is_the_one_of_one_process(tmp_path, monkeypatch):
    one = some_rows(tmp_path, 260)
    with open(one, "a") as file:
        file.write("a stray line\n" + json.dumps(talk(image="gone.png")) + "\n")
    want = sources_of(one)[0]
    names = ("rows.bin", "images.bin")
    for name in names:
        (want.index / name).rename(tmp_path / name)
    (want.index / "meta.json").unlink()
    records.forget_maps()
    monkeypatch.setattr(measure, "RECORDS_PER_TASK", 60)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda pid: {0, 1})
    got = sources_of(one)[0]
    for name in names:
        assert (got.index / name).read_bytes() == (tmp_path / name).read_bytes()
    assert got.meta == want.meta
    assert len(got.meta["bad"]) == 2 and len(got.rows) == 262


def killed_at_120(source, records, first):
    """measure_task in a process that is killed when it comes to a record."""
    if first == 120:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure.measure_records(source, records, first, TOY, CHAT)


def test_an_index_goes_on_where_a_process_that_helps_is_killed_and_says_so_once(
    tmp_path, monkeypatch, capfd
):
    one = some_rows(tmp_path, 260)
    want = sources_of(one)[0]
    rows = (want.index / "rows.bin").read_bytes()
    (want.index / "meta.json").unlink()
    records.forget_maps()
    monkeypatch.setattr(measure, "RECORDS_PER_TASK", 60)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda pid: {0, 1})
    # forked, so that they have what is patched here
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(measure.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(measure, "start_indexer", lambda *settings: None)
    monkeypatch.setattr(measure, "measure_task", killed_at_120)
    got = sources_of(one)[0]
    assert (got.index / "rows.bin").read_bytes() == rows and got.meta == want.meta
    told = capfd.readouterr().err
    assert told.count("was killed (out of memory?)") == 1


PARENT = """
import concurrent.futures
import multiprocessing
import os
import time

from inputs import measure

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context, measure.start_indexer, (None, ""))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


@pytest.mark.nightly
def test_processes_that_index_end_where_their_parent_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    child = int(parent.stdout.readline())
    parent.kill()
    end = time.time() + 20
    while os.path.exists(f"/proc/{child}/cwd") and time.time() < end:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{child}/cwd")
