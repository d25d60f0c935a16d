"""inputs/locks.py: one holder at a time; a file system without locks is told of by its path."""

import errno
import multiprocessing

import pytest
from curation_helpers import run, write_tar
from rows import sources_of, talk, write_rows

from evals import files
from inputs import locks
from training import run_folder


def test_a_lock_has_one_holder_and_is_free_when_its_file_is_closed(tmp_path):
    first, locked = locks.take_lock(tmp_path / "lock")
    assert locked
    assert locks.take_lock(tmp_path / "lock") == (None, True)
    first.close()
    second, _ = locks.take_lock(tmp_path / "lock", wait=True)
    second.close()


def sleep_with_the_lock(pipe):
    pipe.recv()


def test_a_forked_process_does_not_keep_a_lock_that_is_not_inherited(tmp_path):
    file, _ = locks.take_lock(tmp_path / "lock", inherited=False)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=sleep_with_the_lock, args=(theirs,))
    child.start()
    file.close()
    again, locked = locks.take_lock(tmp_path / "lock")
    ours.send("end")
    child.join()
    assert again is not None and locked


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_with_the_path_and_the_work_goes_on(
    tmp_path, capsys, monkeypatch, number
):
    def no_locks(file, how):
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)

    def told(path):
        lines = [line for line in capsys.readouterr().err.splitlines() if "has no locks" in line]
        assert len(lines) == 1 and str(path) in lines[0]  # once, however many locks there are
        assert "make sure that no other process works in this folder" in lines[0]
        locks.DEVICES_TOLD.clear()

    locks.DEVICES_TOLD.clear()

    (source,) = sources_of(write_rows(tmp_path, [talk()]))
    assert len(source.rows) == 1
    told(source.index)
    run_folder.lock_run_folder(tmp_path / "run")
    told(tmp_path / "run" / "lock")
    files.lock_folder(tmp_path / "eval").close()
    told(tmp_path / "eval" / "eval.lock")
    write_tar(tmp_path / "in" / "a.tar", [("a.txt", b"a red cat on a mat")])
    code, text = run("filter", f"--in={tmp_path}/in", f"--out={tmp_path}/out")
    assert code == 0 and str(tmp_path / "out" / ".shards") in text and "has no locks" in text


def test_another_fault_of_a_lock_is_one_line_with_the_path(tmp_path, monkeypatch):
    def broken(file, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locks.fcntl, "flock", broken)
    with pytest.raises(OSError, match="cannot be locked: Input/output error: '.*/lock'"):
        locks.take_lock(tmp_path / "lock")
