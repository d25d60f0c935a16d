"""inputs/index.py: built on all cores, read without memory of its own."""

import json
import os
import subprocess
import sys

import pytest
from rows import (
    ROOT,
    some_rows,
    sources_of,
    talk,
)

MEMORY = """
import itertools, os, sys, types
import numpy as np
import data
from inputs import index as index_module, packing, sources, tokenizer
from training import metrics
folder, n_rows, n_batches, workers = sys.argv[1], *map(int, sys.argv[2:5])
def of(name, pid="self"):
    return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith(name)) / 1024
source = sources.open_sources(f"{folder}/rows.jsonl", tok := tokenizer.Tokenizer(data.TOY_TOKENIZER), CHAT)[0]
with open(f"{folder}/rows.bin", "wb") as rows, open(f"{folder}/images.bin", "wb") as images:
    for start in range(0, n_rows, 100_000):
        part = np.zeros(min(100_000, n_rows - start), index_module.ROW)
        part["tokens"], part["n_images"], part["first_image"] = 50, 1, start + np.arange(len(part))
        rows.write(part.tobytes())
        sizes = np.zeros(len(part), index_module.IMAGE)
        sizes["width"] = sizes["height"] = 84
        images.write(sizes.tobytes())
    for file in (rows, images):                                         # what is not on the disk yet counts as dirty
        file.flush()
        os.fsync(file.fileno())
kw = dict(tile_size=84, tokens_per_tile=9, max_tiles=4, tokens_per_pack=300, tiles_per_pack=20)
before = of("Private_Dirty")
big = types.SimpleNamespace(name="big", path="", rows=index_module.map_index(f"{folder}/rows.bin"), repeat=1, weight=0, max_tiles=0,
                            images=index_module.map_index(f"{folder}/images.bin"), meta=dict(bad=[], digest=""))
packs = packing.Packs([big], None, "", **kw)
planned = [len(packs.plan_window(0, w)[0]) for w in range(5)]
index = of("Private_Dirty") - before
loader = iter(data.make_loader(packing.Packs([source], tok, CHAT, **kw), num_workers=workers))
warm = n_batches // 4
for _ in range(warm): next(loader)
start = of("Rss")
for _ in range(n_batches - warm): next(loader)
print(index, (of("Rss") - start) / (n_batches - warm) * 1000, packs.n)
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
    read = lambda source: [
        (source.index / f"{name}.bin").read_bytes() for name in ("rows", "images")
    ]
    want = sources_of(one)[0]
    for name in ("rows.bin", "images.bin"):
        (want.index / name).rename(tmp_path / name)
    (want.index / "meta.json").unlink()
    index_module.map_index.cache_clear()
    monkeypatch.setattr(index_module, "RECORDS_PER_TASK", 60)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: {0, 1})
    got = sources_of(one)[0]
    assert (
        read(got) == [(tmp_path / name).read_bytes() for name in ("rows.bin", "images.bin")]
        and got.meta == want.meta
    )
    assert len(got.meta["bad"]) == 2 and len(got.rows) == 262
