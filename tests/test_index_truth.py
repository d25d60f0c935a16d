"""An index is believed only as long as it is true: pictures that changed, damage, other users."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rows import CHAT, ROOT, TOY, dataset_of, picture, some_rows, sources_of, talk, write_rows

import data
from inputs import building, index, locks, measure, records
from inputs.patience import DataGone


def forty(folder, width, height, only=range(40)):
    """A source of 40 pictures of this size; `only`: those that are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in only:
        (folder / f"{i}.png").write_bytes(picture(width, height, (i, 30, 30)))
    rows = [talk("<image>\nWhat?", "A board.", id=str(i), image=f"{i}.png") for i in range(40)]
    if not (folder / "rows.jsonl").exists():
        write_rows(folder, rows)
    return folder / "rows.jsonl"


def tiles_of_an_epoch(spec):
    """{tiles of each sample}, what could not be read."""
    records.forget_maps()
    dataset = dataset_of(spec)
    tiles = set()
    bad = []
    for pack in dataset.packs.plan_window(0, 0)[0]:
        tiles |= {sum(n_tiles) for _, _, n_tiles in pack.samples}
        bad += dataset[pack]["bad"]
    return tiles, bad


def test_pictures_written_again_in_another_size_are_measured_again_in_both_directions(
    tmp_path, capsys
):
    spec = forty(tmp_path, 84, 84)
    assert tiles_of_an_epoch(spec) == ({1}, [])
    forty(tmp_path, 168, 168)
    assert tiles_of_an_epoch(spec) == ({5}, [])
    assert "pictures changed since they were measured (0.png)" in capsys.readouterr().err
    forty(tmp_path, 84, 84)
    assert tiles_of_an_epoch(spec) == ({1}, [])


def test_one_picture_that_changed_or_went_among_forty_is_noticed_at_the_start(tmp_path):
    spec = forty(tmp_path, 84, 84)
    assert tiles_of_an_epoch(spec) == ({1}, [])
    forty(tmp_path, 168, 84, only=[23])
    assert tiles_of_an_epoch(spec) == ({1, 3}, [])
    (tmp_path / "7.png").unlink()
    assert [bad["row"] for bad in sources_of(spec)[0].meta["bad"]] == [7]


def test_a_picture_that_was_only_touched_is_measured_again_and_the_data_are_the_same(tmp_path):
    spec = forty(tmp_path, 84, 84)
    before = sources_of(spec)[0].meta["digest"]
    os.utime(tmp_path / "0.png", (1, 1))
    assert index.index_problem(sources_of(spec)[0], TOY, CHAT) == ""
    assert sources_of(spec)[0].meta["digest"] == before  # so that a run can be resumed


def test_a_picture_that_changes_under_a_run_is_a_bad_sample_with_both_sizes_never_fewer_tiles(
    tmp_path,
):
    spec = forty(tmp_path, 84, 84)
    dataset = dataset_of(spec)
    forty(tmp_path, 168, 168)
    batch = dataset[next(dataset.packs.sequence())]
    assert batch["ids"] == [] and batch["bad"]
    for bad in batch["bad"]:
        assert "has 168 x 168 pixels, its index has 84 x 84" in bad["reason"]
        assert f"python data.py check {spec}" in bad["reason"]


def test_check_finds_other_content_of_the_same_size_and_time_also_for_indexes_of_a_run(
    tmp_path, capsys
):
    spec = forty(tmp_path, 84, 84)
    for template in (CHAT, "internvl2_5"):  # two runs
        index.open_source(spec, TOY, template)
    about = os.stat(tmp_path / "9.png")
    # as many bytes and the same time: no look at the file system finds it
    small = picture(1, 1)
    (tmp_path / "9.png").write_bytes(small + bytes(about.st_size - len(small)))
    os.utime(tmp_path / "9.png", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert index.index_problem(sources_of(spec)[0], TOY, CHAT) == ""
    assert data.check_files([str(spec)]) == 0
    out = capsys.readouterr().out
    assert out.count("1 pictures changed since they were measured (9.png)") == 2
    records.forget_maps()
    for template in (CHAT, "internvl2_5"):
        source = index.open_source(spec, TOY, template)
        assert source.images[9]["width"] == 1


@pytest.mark.parametrize("name", ["rows.bin", "images.bin", "stats.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_index_is_noticed_at_the_start_and_made_again(tmp_path, capsys, name, damage):
    spec = forty(tmp_path, 84, 84)
    (source,) = sources_of(spec)
    want = source.rows.copy()
    content = bytearray((source.index / name).read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "cut":
        content = content[:-9]
    (source.index / name).write_bytes(content)
    records.forget_maps()
    (source,) = sources_of(spec)
    assert (source.rows == want).all()
    assert "its index is damaged" in capsys.readouterr().err


def test_rows_of_a_folder_that_were_damaged_in_its_index_are_written_again(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "a.txt").write_text("A red square.")
    (source,) = sources_of(folder)
    lines = source.index / "rows.jsonl"
    lines.write_text(lines.read_text().replace("red", "tar"))
    assert sources_of(folder)[0].row(0)["caption"] == "A red square."


CUT = """
import os, sys
sys.path.insert(0, "tests")
import configurator
from rows import dataset_of, sources_of

def main():
    dataset = dataset_of(sys.argv[1])
    (source,) = dataset.packs.sources
    len(source.rows), len(source.images)
    os.truncate(source.index / sys.argv[2], 0)
    next(iter(data_loader(dataset)))

def data_loader(dataset):
    import data
    return data.make_loader(dataset, num_workers=int(sys.argv[3]))

configurator.run_script(main)
"""


@pytest.mark.parametrize("name, workers", [("rows.bin", 0), ("images.bin", 1)])
def test_an_index_that_is_cut_off_under_a_run_ends_it_with_one_line(tmp_path, name, workers):
    spec = some_rows(tmp_path, 40)
    sources_of(spec)
    done = subprocess.run(
        [sys.executable, "-c", CUT, spec, name, str(workers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr  # SIGBUS would be -7
    assert told.startswith("error: ") and name in told and "was cut off while it was in use" in told
    assert "Traceback" not in done.stderr and len(told) < 400


def test_an_index_that_is_cut_off_is_no_fault_of_a_row_also_in_a_worker(tmp_path):
    dataset = dataset_of(some_rows(tmp_path, 40))
    (source,) = dataset.packs.sources
    pack = next(dataset.packs.sequence())
    os.truncate(source.index / "rows.bin", 32)
    with pytest.raises(DataGone, match="run the same command again"):
        dataset[pack]


# ---- other users --------------------------------------------------------------------------------


def refuse_writing(monkeypatch, *folders):
    """Nothing can be made in these folders, as another user or a read-only disk would have it."""
    real_mkdir = Path.mkdir
    real_lock = locks.take_lock

    def is_refused(path):
        return any(Path(folder) in Path(path).parents for folder in folders)

    def mkdir(path, *args, **kw):
        if is_refused(path.absolute()) and not path.exists():
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real_mkdir(path, *args, **kw)

    def take_lock(path, **kw):
        if is_refused(path.absolute()):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_lock(path, **kw)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(locks, "take_lock", take_lock)


def test_an_index_that_this_user_may_not_write_is_read_and_needs_no_lock(tmp_path, monkeypatch):
    spec = forty(tmp_path / "shared", 84, 84)
    before = sources_of(spec)[0].index
    monkeypatch.chdir(tmp_path)
    refuse_writing(monkeypatch, tmp_path)
    assert sources_of(spec)[0].index == before


def test_where_the_data_may_not_be_written_or_their_index_is_old_a_user_makes_his_own(
    tmp_path, monkeypatch, capsys
):
    spec = forty(tmp_path / "shared", 84, 84)
    theirs = sources_of(spec)[0].index
    forty(tmp_path / "shared", 168, 168)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    index.PLACES_TOLD.clear()
    refuse_writing(monkeypatch, tmp_path / "shared")
    (source,) = sources_of(spec)
    assert source.index == Path("shards/index", theirs.name)
    assert (source.images["width"] == 168).all()
    told = capsys.readouterr().err
    assert f"{tmp_path}/shared: Permission denied" in told
    assert f"they go to {tmp_path}/mine/shards/index" in told
    # and it is found again, silently
    assert sources_of(spec)[0].index == source.index
    assert capsys.readouterr().err == ""


def test_where_no_index_can_be_written_one_line_names_all_places_and_what_to_do(
    tmp_path, monkeypatch
):
    spec = forty(tmp_path / "shared", 84, 84)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    refuse_writing(monkeypatch, tmp_path)
    with pytest.raises(ValueError) as problem:
        sources_of(spec)
    told = str(problem.value)
    assert f"{tmp_path}/shared: Read-only file system" in told
    assert f"{tmp_path}/mine/shards/index: Read-only file system" in told
    assert "start the command in a folder in which you may write" in told


# ---- an indexing that is stopped ----------------------------------------------------------------


def stopped_after(monkeypatch, n):
    """Indexing that is stopped when n tasks are done."""
    real = building.Building.add

    def add(self, found):
        real(self, found)
        add.done += 1
        if add.done == n:
            raise KeyboardInterrupt

    add.done = 0
    monkeypatch.setattr(building.Building, "add", add)


def index_bytes(source):
    names = ("rows.bin", "images.bin", "stats.bin")
    return [(source.index / name).read_bytes() for name in names]


@pytest.mark.parametrize("damage", ["none", "a torn line", "lost bytes", "flipped bits"])
def test_an_indexing_that_was_stopped_goes_on_where_it_was_with_one_line(
    tmp_path, monkeypatch, capsys, damage
):
    spec = some_rows(tmp_path, 260)
    with open(spec, "a") as file:
        file.write("a stray line\n" + json.dumps(talk(image="gone.png", colour=1)) + "\n")
    (source,) = sources_of(spec)
    want = (source.meta, index_bytes(source))
    shutil.rmtree(source.index)
    records.forget_maps()
    capsys.readouterr()
    monkeypatch.setattr(measure, "RECORDS_PER_TASK", 60)
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda pid: {0})
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            sources_of(spec)
    draft = source.index / "building"
    if damage == "a torn line":
        with open(draft / "journal.jsonl", "ab") as file:
            file.write(b'{"lengths": [60,')
    elif damage == "lost bytes":
        os.truncate(draft / "images.bin", 20)
    elif damage == "flipped bits":
        content = np.fromfile(draft / "rows.bin", np.uint8)
        content[70 * 32] ^= 1
        content.tofile(draft / "rows.bin")
    (source,) = sources_of(spec)
    assert (source.meta, index_bytes(source)) == want
    told = [line for line in capsys.readouterr().err.splitlines() if "goes on behind row" in line]
    behind = {"none": ["180"], "a torn line": ["180"], "lost bytes": [], "flipped bits": ["60"]}
    assert [line.split("row ")[1].split(",")[0] for line in told] == behind[damage]
    assert not draft.exists()


STOPPED = """
import os, signal, sys
sys.path.insert(0, "tests")
from rows import sources_of
from inputs import building, measure
measure.RECORDS_PER_TASK = 60
measure.os.sched_getaffinity = lambda pid: {0}
real = building.Building.add
def add(self, found):
    real(self, found)
    os.kill(os.getpid(), int(sys.argv[2]))
building.Building.add = add
sources_of(sys.argv[1])
"""


def test_an_indexing_that_gets_sigterm_or_is_killed_goes_on_too(tmp_path, capsys):
    spec = some_rows(tmp_path, 260)
    for k, number in enumerate((15, 9), 1):
        done = subprocess.run(
            [sys.executable, "-c", STOPPED, spec, str(number)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -number
        assert ("goes on behind row 60" in done.stderr) == (k == 2)
    assert len(sources_of(spec)[0].rows) == 260
    assert "index rows.jsonl: goes on behind row 120" in capsys.readouterr().err
