"""The run folder: lock, signals, the record of a run, a stage that cannot go on."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import torch
from stand_in import ALONE, ROOT

from train import RunConfig
from training import run_folder, signals
from training.progress import Progress


def test_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks):
    assert (two_ranks[1]["stop_before"], two_ranks[1]["stop_after"]) == (False, True)


def test_a_stage_that_is_to_end_before_where_its_run_stands_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(
        json.dumps(dataclasses.asdict(Progress(stage="base", fingerprint="f", step=5)))
    )
    with pytest.raises(
        ValueError,
        match="stage base is to have 3 steps, but .* is 5 steps into it; raise --max_steps or "
        "base.steps, or start anew in another --out_dir",
    ):
        run_folder.resume(tmp_path, Progress(stage="base", fingerprint="f"), 3, None, None)


def test_a_second_job_in_the_run_folder_is_refused_by_pid_and_a_dead_holder_is_not_in_the_way(
    tmp_path,
):
    code = (
        "import time; from training import run_folder; "
        f"run_folder.lock_run_folder({str(tmp_path)!r}); "
        "print('locked', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on "):
        run_folder.lock_run_folder(tmp_path)
    holder.kill()
    holder.wait()
    leftover = tmp_path / "checkpoints" / ".tmp_step_00000001"
    leftover.mkdir(parents=True)
    run_folder.lock_run_folder(tmp_path)
    assert not leftover.exists()


def test_the_run_record_says_what_ran(tmp_path):
    run_folder.write_run_config(tmp_path, {"seed": 7}, {"seed": "command line"}, 2)
    record = run_folder.read_run_config(tmp_path)
    assert (
        record["config"] == {"seed": 7}
        and record["origins"] == {"seed": "command line"}
        and record["world"] == 2
    )
    assert (
        record["versions"]["torch"] == torch.__version__
        and record["argv"] == sys.argv
        and "commit" in record
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"format": 1, "config"', "is not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "format None, this one reads 1"),
        ('{"format": 7, "config": {}}', "format 7, this one reads 1"),
        ('{"format": 1}', "has no 'config'"),
        ('{"format": 1, "config": {}, "origins": {}, "versions": []}', "has no 'versions'"),
        ('{"format": 1, "config": {}, "origins": {}, "versions": {}}', "has no 'world'"),
        ('{"architectures": ["InternVLChatModel"]}', "of another program or version"),
    ],
)
def test_a_record_that_is_torn_or_of_another_version_is_one_line_with_its_path(
    tmp_path, text, words
):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json .*{words}"):
        run_folder.read_run_config(tmp_path)
    (tmp_path / "finished.json").write_text('{"format": 1, "stages": "all"}')
    with pytest.raises(ValueError, match=f"{tmp_path}/finished.json has no 'stages'"):
        run_folder.read_finished(tmp_path)


def test_another_torch_or_commit_than_at_the_start_is_told_in_one_line(tmp_path, capsys):
    run_folder.write_run_config(tmp_path, {}, {}, 1)
    record = run_folder.read_run_config(tmp_path)
    run_folder.say_what_changed(record, ALONE)
    run_folder.say_what_changed({}, ALONE)
    assert capsys.readouterr().out == ""
    record["versions"]["torch"] = "2.5.0"
    record["commit"] = "0123"
    run_folder.say_what_changed(record, ALONE)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "commit 0123 -> " in told
    assert f"torch 2.5.0 -> {torch.__version__}" in told


def test_a_note_that_the_disk_has_no_room_for_ends_nothing_and_is_told_once(tmp_path, capsys):
    (tmp_path / "last_step").symlink_to("/proc/self")  # no file can be made there
    watchdog = signals.Watchdog(tmp_path, ALONE, 60)
    for step in range(3):
        watchdog.note(f"step {step}")
    watchdog.stop()
    told = capsys.readouterr().err
    assert told.count("WARNING") == 1 and f"{tmp_path}/last_step/rank_0.txt cannot be" in told
    (tmp_path / "last_step").unlink()
    (tmp_path / "last_step").mkdir()
    (tmp_path / "last_step/rank_0.txt").symlink_to("/dev/full")
    watchdog = signals.Watchdog(tmp_path, ALONE, 60)
    watchdog.note("step 4")
    watchdog.stop()
    assert "No space left on device" in capsys.readouterr().err


def test_a_resized_run_keeps_the_packs_of_a_step_by_itself_or_by_hand_in_every_stage(tmp_path):
    state = Progress(stage="alignment", packs_per_step=4, world=2)
    (tmp_path / "state.json").write_text(json.dumps(dataclasses.asdict(state)))

    def started(accum, checkpoint, planned_world):
        """A run on one process of what two ranks had begun."""
        return types.SimpleNamespace(
            cfg=RunConfig(grad_accum_steps=accum),
            dist=ALONE,
            checkpoint=checkpoint,
            planned_world=planned_world,
        )

    assert run_folder.micro_batches(started(2, tmp_path, 2), "alignment") == (4, 2)
    accum, world = run_folder.micro_batches(started(4, tmp_path, 2), "alignment")
    assert (accum, world) == (4, 1)
    assert run_folder.micro_batches(started(4, None, world), "advance") == (4, 1)


def test_a_stage_that_ended_before_its_mark_is_marked_at_the_next_start(tmp_path):
    """Else "remove that folder to train it again" would export the old weights again."""
    run = types.SimpleNamespace(out=tmp_path, dist=ALONE)
    assert not run_folder.is_there_already(run, "advance")
    (tmp_path / "advance").mkdir()
    (tmp_path / "advance" / "config.json").write_text("{}")
    assert run_folder.is_there_already(run, "advance")
    assert run_folder.read_finished(tmp_path) == ["advance"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_signal_while_data_are_indexed_ends_the_process_at_once(when):
    code = (
        "import os, signal, time; from training.signals import Preemption; p = Preemption()\n"
        "def stop(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        f"if {when == 'before'}: stop()\n"
        "with p.at_once():\n"
        "    print('indexing', flush=True)\n"
        "    stop()\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50
    )
    assert done.returncode == 0
    assert done.stdout == ("" if when == "before" else "indexing\n")
    assert "run the same command to continue" in done.stderr
