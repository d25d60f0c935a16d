"""data.py: a planned pack becomes a batch, and the loader."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rows import (
    CHAT,
    ROOT,
    SHARED,
    dataset_of,
    image_spans,
    picture,
    some_rows,
    sources_of,
    talk,
    write_rows,
)

import configurator
import data
from data import make_loader, model_inputs
from inputs.chat import IGNORE
from inputs.images import GRAY
from inputs.packing import Packs, PackSettings
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer


def first_epoch(packs):
    return itertools.takewhile(lambda pack: pack.position[0] == 0, packs.sequence())


def test_no_image_span_is_cut_and_a_picture_that_changed_is_left_out_with_its_id(tmp_path):
    """With real pictures and tight packs."""
    rng = np.random.default_rng(5)
    rows = []
    for k in range(20):
        size = np.exp(rng.uniform(2, 6, 2)).astype(int).tolist() if k else (336, 84)
        (tmp_path / f"{k}.png").write_bytes(picture(*size))
    for i in range(100):
        rows.append(
            talk(
                "See: " * int(rng.integers(1, 9)),
                "Ok.",
                id=f"r{i}",
                image=[f"{k}.png" for k in rng.integers(0, 20, rng.integers(1, 5))],
            )
        )
    dataset = dataset_of(write_rows(tmp_path, rows))
    n_seen = 0
    for pack in first_epoch(dataset.packs):
        batch = dataset[pack]
        planned = [9 * n for _, _, tiles in pack.samples for n in tiles]
        assert image_spans(batch["tokens"].numpy()) == planned
        assert sum(planned) == 9 * len(batch["tiles"])
        n_seen += len(batch["ids"])
    assert n_seen > 80
    (tmp_path / "0.png").write_bytes(picture(84, 84))  # another shape than the index saw
    bad = {}
    for pack in first_epoch(dataset.packs):
        bad |= {b["id"]: b["reason"] for b in dataset[pack]["bad"]}
    assert bad and all("0.png" in rows[int(i[1:])]["image"] for i in bad)
    assert all("has 84 x 84 pixels, its index has 336 x 84" in why for why in bad.values())


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the real pictures are not part of this repository"
)
def test_real_photos_charts_and_receipts_go_through_in_their_own_formats(tmp_path):
    tok = Tokenizer(SHARED / "tokenizer" / "qwen2")
    for name, file in (("receipts", "receipts.jsonl"), ("charts", "charts.json")):
        shutil.copytree(SHARED / "data" / name, tmp_path / name, copy_function=shutil.copyfile)
        sources = open_sources(str(tmp_path / name / file), tok, CHAT)
        packs = Packs(sources, PackSettings(448, 256, max_tiles=6, tiles_per_pack=24))
        batch = data.PackedDataset(packs, tok, CHAT)[next(packs.sequence())]
        assert packs.n_bad <= 1  # one receipt has an empty answer
        assert not batch["bad"] and len(batch["tiles"]) > 1
        assert (batch["tokens"] == tok.image_id).sum() == 256 * len(batch["tiles"])


def test_a_blind_run_sees_gray_tiles_and_the_same_text(tmp_path):
    sources = sources_of(some_rows(tmp_path, 20))
    seen = dataset_of(sources)
    blind = dataset_of(sources, image_as="blank")
    a = seen[next(seen.packs.sequence())]
    b = blind[next(blind.packs.sequence())]
    assert (a["tokens"] == b["tokens"]).all()
    assert a["tiles"].shape == b["tiles"].shape and len(a["tiles"])
    assert (b["tiles"] == GRAY).all() and not (a["tiles"] == GRAY).all()


def test_documents_of_a_pack_are_the_documents_alone(tmp_path):
    dataset = dataset_of(some_rows(tmp_path, 12))
    batch = dataset[next(dataset.packs.sequence())]
    borders = [0, *itertools.accumulate(batch["lengths"])]
    for a, b in itertools.pairwise(borders):
        assert batch["positions"][a:b].tolist() == list(range(b - a))
        assert batch["labels"][b - 1] == IGNORE


def test_the_borders_of_documents_are_no_tensor_which_fsdp_would_move_to_the_gpu(tmp_path):
    dataset = dataset_of(some_rows(tmp_path, 12))
    batch = dataset[next(dataset.packs.sequence())]
    inputs = model_inputs(batch, "meta")
    borders = inputs.pop("cu_seqlens")
    assert all(tensor.is_meta for tensor in inputs.values())
    assert type(borders) is list and borders[0] == 0 and borders[-1] == len(batch["tokens"])
    starts = (batch["positions"] == 0).nonzero()[:, 0].tolist()
    assert borders[:-1] == starts


def test_unreadable_samples_are_left_out_named_and_counted(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    noise = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(noise, "JPEG")  # its header is whole
    (tmp_path / "half.png").write_bytes(noise.getvalue()[:20000])
    (tmp_path / "page.png").write_text("<html>not found</html>")
    rows = [
        talk(image="good.png", id="good"),
        talk(image="half.png", id="half"),
        talk(image="page.png", id="page"),
        talk(image="gone.png", id="gone"),
        talk("<image><image>?", image="good.png", id="two"),
        talk(answer=" ", image="good.png", id="empty"),
    ]
    spec = write_rows(tmp_path, rows)
    with open(spec, "a") as file:
        file.write("{broken json\na stray line\n")
    dataset = dataset_of(spec)
    batch = dataset[next(dataset.packs.sequence())]
    assert batch["ids"] == ["good"] and [b["id"] for b in batch["bad"]] == ["half"]
    reasons = " ".join(b["reason"] for b in dataset.packs.unreadable())
    assert dataset.packs.n_bad == 6
    assert "gone.png" in reasons and "placeholders" in reasons and "empty gpt turn" in reasons


def test_a_row_that_changes_while_a_run_reads_it_is_quarantined_not_fatal(tmp_path):
    row = json.dumps(talk("<image>\nWhat?", id="a", image=["p.png"]))
    (tmp_path / "p.png").write_bytes(picture())
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    sources = sources_of(f"{tmp_path}/rows.jsonl")
    dataset = dataset_of(sources)
    (tmp_path / "rows.jsonl").write_text(row.replace('["p.png"]', "[]       ") + "\n")
    batch = dataset[next(dataset.packs.sequence())]
    assert [bad["id"] for bad in batch["bad"]] == ["a"] and batch["ids"] == []


class Deadly(torch.utils.data.Dataset):
    packs = types.SimpleNamespace(sources=())

    def __len__(self):
        return 9

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_that_says_what_to_try(capsys):
    with pytest.raises(SystemExit):
        configurator.run_script(
            lambda: next(iter(data.Loader(Deadly(), num_workers=1, batch_size=None)))
        )
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: DataLoader worker") and told.endswith("Try fewer --num_workers")


def test_no_room_in_shared_memory_is_one_line(tmp_path, monkeypatch):
    dataset = dataset_of(some_rows(tmp_path, 9))
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", lambda size: torch.empty(0).expand(-7))
    words = "MB of tiles in shared memory.*--shm-size.*fewer --num_workers"
    with pytest.raises(OSError, match=words):
        next(iter(make_loader(dataset, num_workers=2)))


def test_tiles_that_come_from_workers_are_those_the_main_process_makes(tmp_path):
    dataset = dataset_of(some_rows(tmp_path, 60), seed=3)
    planned = dataset.packs.sequence()
    loaders = [iter(make_loader(dataset, num_workers=n)) for n in (1, 3)]
    kept = []
    for _ in range(30):  # more than there are slots, two loaders at once
        want = dataset[next(planned)]
        kept += [(want, next(loader)) for loader in loaders]
    for want, got in kept:  # all at the end: nothing was written over
        assert want["ids"] == got["ids"] and torch.equal(want["tiles"], got["tiles"])


FAILS = """
import multiprocessing
import sys
sys.path.insert(0, "tests")
import configurator
import data
from rows import dataset_of

def main():
    batches = iter(data.make_loader(dataset_of(sys.argv[1]), num_workers=2))
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    raise ValueError("stopped")

configurator.run_script(main)
"""


def test_a_program_that_fails_ends_and_so_do_its_workers_which_ignore_sigterm(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FAILS, some_rows(tmp_path, 20)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,  # it would wait for ever
    )
    assert done.returncode == 2 and done.stderr.endswith("error: stopped\n"), done.stderr
    workers = done.stdout.split()
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 1), (1, 4), (2, 4), (3, 1), (4, 0), (8, 0)])
def test_batches_come_in_one_order_whatever_the_ranks_and_workers(tmp_path, world, workers):
    dataset = dataset_of(some_rows(tmp_path, 150), packs_per_step=24)
    want = [dataset[pack]["ids"] for pack in itertools.islice(dataset.packs.sequence(), 48)]
    loaders = [iter(make_loader(dataset, rank, world, workers)) for rank in range(world)]
    got = [next(loaders[k % world]) for k in range(48)]
    assert [batch["ids"] for batch in got] == want
    ends = [[batch["position"], batch["counts"]] for batch in got]
    for a in range(0, 48, world):  # all ranks know where all of them stand
        assert ends[a : a + world] == [ends[a]] * world and len(got[a]["costs"]) == world
