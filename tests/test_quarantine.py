"""training/quarantine.py: different rows of what is used count, and nothing is lost at the stop."""

import errno
import io
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from rows import dataset_of, packs_of, picture, sources_of, talk, write_rows
from test_train import argv, log, run

import data
import train
from inputs import patience
from training import metrics
from training.checkpoint import find_checkpoint
from training.distributed import ALONE
from training.quarantine import Quarantine

FINE = {"samples": 4, "bad": 0}


def quarantine_of(tmp_path, n_bad, n_used):
    return Quarantine(types.SimpleNamespace(n_bad=n_bad, n_used=n_used), tmp_path, ALONE)


def step_of(rows):
    """The micro-batches of a step whose unreadable rows are these, and its totals."""
    bad = [{"file": "a.jsonl", "row": row, "reason": "cut"} for row in rows]
    return [{"bad": bad}], {"samples": 40, "bad": len(bad)}


def test_one_percent_of_a_large_source_may_be_unreadable(tmp_path):
    quarantine_of(tmp_path, 150, 20000)
    with pytest.raises(ValueError, match="150 unreadable samples of 14000"):
        quarantine_of(tmp_path, 150, 14000)


def test_the_same_bad_rows_count_once_however_many_epochs_meet_them(tmp_path):
    quarantine = quarantine_of(tmp_path, 0, 60)
    for _ in range(100):
        assert quarantine.add(*step_of([0, 12, 24, 36, 48])) == ""
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 5


def test_more_than_a_hundred_different_rows_stop_a_run(tmp_path):
    quarantine = quarantine_of(tmp_path, 0, 10**6)
    assert quarantine.add(*step_of(range(100))) == ""
    assert quarantine.add(*step_of([0])) == ""
    assert "101 unreadable samples of 222" in quarantine.add(*step_of([100]))


def test_three_steps_without_a_sample_that_could_be_read_stop_a_run(tmp_path):
    quarantine = quarantine_of(tmp_path, 0, 100)
    empty = [{"bad": [{"file": "a", "row": 1}]}], {"samples": 0, "bad": 1}
    for totals in (empty, empty, ([], FINE), empty, empty):
        assert quarantine.add(*totals) == ""
    assert "3 steps in a row without a sample" in quarantine.add(*empty)


@pytest.mark.parametrize(
    "entry, used, bad",
    [
        ({"repeat_time": 0.5}, 50, 2),
        ({"repeat_time": 0.01}, 1, 0),
        ({"repeat_time": 1}, 100, 12),
        ({"repeat_time": 3}, 100, 12),
        ({"repeat_time": 2.7}, 100, 12),
        ({"weight": 1, "repeat_time": 0.5}, 100, 12),
    ],
)
def test_bad_rows_of_the_part_that_is_used_are_compared_with_that_part(tmp_path, entry, used, bad):
    rows = [talk(answer="" if i in (20, 30) or i >= 90 else "Yes.") for i in range(100)]
    write_rows(tmp_path, rows)
    meta = {"a": {"annotation": "rows.jsonl", **entry}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    packs = packs_of(tmp_path / "meta.json")
    assert (packs.n_used, packs.n_bad) == (used, bad)
    assert {b["file"] for b in packs.unreadable()} <= {f"{tmp_path}/rows.jsonl"}


def test_a_source_whose_used_part_is_all_bad_is_refused_though_the_rest_is_good(tmp_path):
    write_rows(tmp_path, [talk(answer="Yes." if i > 9 else "") for i in range(100)])
    meta = {"a": {"annotation": "rows.jsonl", "repeat_time": 0.1}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="no usable sample"):
        packs_of(tmp_path / "meta.json")


# ---- a run --------------------------------------------------------------------------------------


def cut_pictures(folder, n, bad):
    """n rows with a JPEG each; those in `bad` are cut in the middle, behind their headers."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        file = io.BytesIO()
        pixels = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        content = file.getvalue()
        (folder / f"{i}.jpg").write_bytes(content[: len(content) // 2] if i in bad else content)
        rows.append(talk("<image>\nWhat?", "A board.", id=str(i), image=f"{i}.jpg"))
    return write_rows(folder, rows)


def test_a_run_goes_through_the_same_few_bad_pictures_for_many_epochs(tmp_path, monkeypatch):
    spec = cut_pictures(tmp_path / "d", 20, {0, 7})
    monkeypatch.setattr("training.quarantine.too_many", lambda bad, n, out: "x" if bad > 2 else "")
    flags = argv(tmp_path / "r", spec, stages=("alignment",), steps=6)
    run(train, flags, monkeypatch)
    assert log(tmp_path / "r")[-1]["quarantined"] > 2
    assert (tmp_path / "r/alignment/config.json").exists()


def test_a_run_with_too_many_bad_samples_saves_before_it_stops(tmp_path, monkeypatch):
    spec = cut_pictures(tmp_path / "d", 40, {3, 8, 13, 21, 34})
    monkeypatch.setattr("training.quarantine.too_many", lambda bad, n, out: "x" if bad > 2 else "")
    out = tmp_path / "r"
    with pytest.raises(ValueError, match="x; step . is saved"):
        run(train, argv(out, spec, stages=("alignment",), steps=9), monkeypatch)
    done = log(out)[-1]["step"]
    assert find_checkpoint(out).name == f"step_{done:08d}"


@pytest.mark.parametrize("steps", [1, 9])
def test_a_run_of_nothing_but_bad_samples_is_a_failure_and_writes_no_model(
    tmp_path, monkeypatch, steps
):
    spec = cut_pictures(tmp_path / "d", 8, range(8))
    out = tmp_path / "r"
    words = "without a sample that could be read" if steps > 3 else "has updated the weights"
    with pytest.raises(ValueError, match=words):
        run(train, argv(out, spec, stages=("alignment",), steps=steps), monkeypatch)
    assert not (out / "alignment").exists()
    assert {row["loss"] for row in log(out)} == {None}  # not 0.0


def test_a_validation_of_nothing_but_bad_samples_has_no_loss():
    model = torch.nn.Module()
    model.forward = lambda: torch.tensor(0.0)
    loss = metrics.validation_loss(model, [({}, 0.0)], ALONE)
    assert loss != loss  # not a number; log.jsonl has null


# ---- a file system that is away for a while -----------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made; no time passes."""
    made = []
    monkeypatch.setattr(patience.time, "sleep", made.append)
    patience.GIVEN_UP.clear()
    return made


def away(monkeypatch, number, times):
    """Pictures cannot be read so many times."""
    real = data.load_image
    left = [times]

    def load(source):
        if left[0]:
            left[0] -= 1
            raise OSError(number, "away", "p.png")
        return real(source)

    monkeypatch.setattr(data, "load_image", load)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_file_that_is_away_for_a_while_is_waited_for_told_and_read(
    tmp_path, monkeypatch, capsys, pauses, number
):
    (tmp_path / "p.png").write_bytes(picture())
    dataset = dataset_of(write_rows(tmp_path, [talk(image="p.png", id="a")]))
    away(monkeypatch, number, 3)
    batch = dataset[next(dataset.packs.sequence())]
    assert batch["ids"] == ["a"] and not batch["bad"] and pauses == [1, 2, 4]
    assert capsys.readouterr().err.count("WARNING: p.png: away; trying again in") == 3


def test_a_file_that_stays_away_is_left_out_and_the_second_in_a_row_ends_the_run(
    tmp_path, monkeypatch, pauses
):
    (tmp_path / "p.png").write_bytes(picture())
    dataset = dataset_of(write_rows(tmp_path, [talk(image="p.png", id="a")]))
    pack = next(dataset.packs.sequence())
    away(monkeypatch, errno.EIO, len(patience.PAUSES) + 1)
    assert "away" in dataset[pack]["bad"][0]["reason"]  # one bad sector
    assert dataset[pack]["ids"] == ["a"]  # and not for good
    away(monkeypatch, errno.EIO, 10**6)
    assert dataset[pack]["bad"]
    with pytest.raises(patience.DataGone, match="p.png: away, for .* run the same command again"):
        dataset[pack]


def test_another_fault_of_a_file_is_not_waited_for(tmp_path, monkeypatch, pauses):
    (tmp_path / "p.png").write_bytes(picture())
    dataset = dataset_of(write_rows(tmp_path, [talk(image="p.png", id="a")]))
    away(monkeypatch, errno.EACCES, 9)
    assert dataset[next(dataset.packs.sequence())]["bad"] and pauses == []


def test_a_picture_that_is_away_while_it_is_measured_is_waited_for_too(
    tmp_path, monkeypatch, pauses
):
    from inputs import measure

    real = measure.image_size
    left = [2]

    def size(path):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")  # the system names no file
        return real(path)

    monkeypatch.setattr(measure, "image_size", size)
    (tmp_path / "p.png").write_bytes(picture())
    (source,) = sources_of(write_rows(tmp_path, [talk(image="p.png")]))
    assert source.meta["bad"] == [] and pauses == [1, 2]
