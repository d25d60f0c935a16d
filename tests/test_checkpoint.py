"""Checkpoints: exact resume on any layout, damage, a save that dies, full disks, pruning."""

import dataclasses
import json
import os
import shutil
import types

import pytest
from stand_in import ALL, ALONE, build, largest_difference, save, train

from train import RunConfig
from training import checkpoint, optim, run_folder
from training.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_a_checkpoint_moves_from_one_process_to_ddp_to_fsdp_and_back(two_ranks):
    folder, _ = two_ranks
    model, optimizer = build(ALL)
    path = checkpoint.find_checkpoint(folder / "fsdp")
    checkpoint.load_checkpoint(path, model, optimizer)
    assert checkpoint.read_progress(path) == Progress(step=4)
    train(model, optimizer, ALONE, [0, 1], [4])
    straight, straight_optimizer = build(ALL)
    train(straight, straight_optimizer, ALONE, [0, 1], range(5))
    assert largest_difference(model.state_dict(), straight.state_dict()) < 1e-5


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path):
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], range(2))
    save(tmp_path, 2, model, optimizer, Progress(step=2, position=[3, 4]))
    train(model, optimizer, ALONE, [0, 1], range(2, 4))
    again, again_optimizer = build(ALL, cfg=RunConfig(beta2=0.9))
    path = checkpoint.find_checkpoint(tmp_path)
    checkpoint.load_checkpoint(path, again, again_optimizer)
    assert checkpoint.read_progress(path) == Progress(step=2, position=[3, 4])
    # settings come from the configuration
    assert again_optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    for group in again_optimizer.param_groups:
        group["betas"] = (0.9, 0.95)
    train(again, again_optimizer, ALONE, [0, 1], range(2, 4))
    assert largest_difference(again.state_dict(), model.state_dict()) == 0.0


def truncate(path):
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_a_bit(path):
    shard = next(path.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "truncated": truncate,
    "bit flipped": flip_a_bit,
    "shard deleted": lambda path: next(path.glob("*.distcp")).unlink(),
    "state emptied": lambda path: (path / "state.json").write_text(""),
    "manifest of another step": lambda path: (path / "manifest.json").write_text(
        '{"step": 1, "files": {}}'
    ),
    "manifest is a pipe": lambda path: put_pipe(path / "manifest.json"),
    "state is a pipe": lambda path: put_pipe(path / "state.json"),
    "manifest deleted": lambda path: (path / "manifest.json").unlink(),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capfd, kind):
    model, optimizer = build(ALL)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    DAMAGES[kind](tmp_path / "checkpoints" / "step_00000002")
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000001"
    assert "DAMAGED" in capfd.readouterr().out
    save(tmp_path, 2, model, optimizer)  # the repeated step replaces it
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000002"


def test_a_strict_resume_refuses_a_damaged_checkpoint_instead_of_going_back(tmp_path):
    model, optimizer = build(ALL)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    assert checkpoint.find_checkpoint(tmp_path, strict=True).name == "step_00000002"
    flip_a_bit(tmp_path / "checkpoints" / "step_00000002")
    message = "damaged checkpoint .*step_00000002: __0_0.distcp has changed"
    with pytest.raises(ValueError, match=message):
        checkpoint.find_checkpoint(tmp_path, strict=True)


def test_swapped_slices_of_two_ranks_are_damage(two_ranks):
    path = sorted((two_ranks[0] / "ddp" / "checkpoints").glob("step_*"))[-1]
    first, second = sorted(path.glob("*.distcp"))
    contents = first.read_bytes(), second.read_bytes()
    assert checkpoint.verify_checkpoint(path) is None
    assert contents[0] != contents[1]
    try:
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        assert "has changed since it was written" in checkpoint.verify_checkpoint(path)
    finally:
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])


def test_a_save_beside_the_training_holds_the_moment_it_was_asked_for(tmp_path):
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], range(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    saver = checkpoint.Saver(tmp_path, ALONE)
    saver.save(2, model, optimizer, Progress(step=2))
    train(model, optimizer, ALONE, [0, 1], range(2, 4))  # while it is being written
    saver.wait()
    again, again_optimizer = build(ALL)
    checkpoint.load_checkpoint(checkpoint.find_checkpoint(tmp_path), again, again_optimizer)
    assert largest_difference(again.state_dict(), before) == 0.0


def test_a_save_that_dies_anywhere_leaves_the_last_checkpoint_usable(tmp_path, monkeypatch):
    model, optimizer = build(ALL)
    save(tmp_path, 1, model, optimizer)
    calls = []

    def dying(original):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > survivable:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for survivable in range(100):  # noqa: B007 - `dying` reads it
        calls.clear()
        try:
            save(tmp_path, 2, model, optimizer)
        except BaseException:  # the storage layer wraps what it catches
            path = checkpoint.find_checkpoint(tmp_path)
            assert path is not None and checkpoint.read_progress(path) == Progress()
        else:
            break
    assert survivable >= 8 and checkpoint.find_checkpoint(tmp_path).name == "step_00000002"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_the_newest_good_checkpoints_stay_and_older_ones_go(tmp_path):
    model, optimizer = build(ALL)
    for step in range(1, 6):
        save(tmp_path, step, model, optimizer, keep=1)
        if step == 4:
            truncate(tmp_path / "checkpoints" / "step_00000004")
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    # 4 is damaged and does not count
    assert names == ["latest", "step_00000003", "step_00000004", "step_00000005"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000005"


def test_a_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path):
    model, optimizer = build(ALL)
    save(tmp_path, 1, model, optimizer)
    path = checkpoint.find_checkpoint(tmp_path)
    other, other_optimizer = build(ALL, dim=8)
    with pytest.raises(ValueError, match=r"class_embedding is \(1, 1, 7\), here \(1, 1, 8\).*more"):
        checkpoint.load_checkpoint(path, other, other_optimizer)
    untied, untied_optimizer = build(ALL, tied=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is not there"):
        checkpoint.load_checkpoint(path, untied, untied_optimizer)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, optimizer = build(ALL)
    usage = types.SimpleNamespace(free=10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB are free"):
        save(tmp_path, 1, model, optimizer)
    assert checkpoint.find_checkpoint(tmp_path) is None


def test_checkpoints_of_later_steps_than_where_a_run_goes_on_are_set_aside_aloud(tmp_path, capfd):
    model, optimizer = build(ALL)
    for step in (10, 12):
        save(tmp_path, step, model, optimizer)
    checkpoint.set_aside(tmp_path, 10)
    assert "step_00000012 is of a later step than 10" in capfd.readouterr().err
    checkpoint.set_aside(tmp_path, 0)
    save(tmp_path, 2, model, optimizer)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "aside_step_00000010",
        "aside_step_00000012",
        "latest",
        "step_00000002",
    ]


STRANGERS = [
    "step_00000020.keep_this",
    "step_00000020.bak",
    "step_00000002_best",
    "step_2",
    "step_000000002",
    "step_",
    "step_0000000x",
    "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
    "step_00000001 (copy)",
    ".tmp_notes",
    ".tmp_step_00000001.keep",
    "aside_step_00000099",
]


@pytest.mark.parametrize("name", STRANGERS)
def test_names_that_are_not_our_own_are_neither_deleted_nor_read(tmp_path, name):
    model, optimizer = build(ALL)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / name)
    run_folder.lock_run_folder(tmp_path)
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000002"
    checkpoint.set_aside(tmp_path, 2)
    for step in (3, 4, 5):
        save(tmp_path, step, model, optimizer)
    names = {path.name for path in folder.iterdir()}
    assert names == {"latest", name, "step_00000004", "step_00000005"}
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000005"


def test_a_file_or_a_link_with_a_name_of_ours_ends_no_run_and_what_it_leads_to_stays(tmp_path):
    model, optimizer = build(ALL)
    save(tmp_path / "other", 1, model, optimizer)
    kept = tmp_path / "other/checkpoints/step_00000001"
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (folder / "step_00000001").symlink_to(kept)
    (folder / "step_00000009").write_text("a note")
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step_00000001"
    for step in (2, 3, 4, 9):
        save(tmp_path / "run", step, model, optimizer)
    assert checkpoint.verify_checkpoint(kept) is None and (folder / "step_00000001").is_symlink()
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step_00000009"


def test_a_run_none_of_whose_checkpoints_is_intact_is_refused_not_started_anew(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path) is None
    model, optimizer = build(ALL)
    save(tmp_path, 1, model, optimizer)
    manifest = tmp_path / "checkpoints/step_00000001/manifest.json"
    manifest.write_text('{"step": 1, "files": {}}')
    message = "no checkpoint is intact; restore one, or remove the folder to start anew"
    with pytest.raises(ValueError, match=message):
        checkpoint.find_checkpoint(tmp_path)


def test_a_checkpoint_before_the_first_step_has_all_moments_and_looking_at_them_makes_none(
    tmp_path,
):
    model, optimizer = build(ALL)
    optimizer.state.clear()
    with pytest.raises(ValueError, match="call make_moments first"):
        checkpoint.tensors_of(model, optimizer)
    assert not optimizer.state
    optim.make_moments(optimizer)
    names = set(checkpoint.tensors_of(model, optimizer))
    train(model, optimizer, ALONE, [0, 1], [0])
    assert set(checkpoint.tensors_of(model, optimizer)) == names


def write_state(folder, **changes):
    """state.json of a fresh Progress with changes; a value of None leaves the entry out."""
    state = dataclasses.asdict(Progress()) | changes
    state = {name: value for name, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(state))


def test_a_state_with_entries_that_are_not_known_still_loads(tmp_path):
    write_state(tmp_path, stage="advance", step=5, of_tomorrow=1)
    assert checkpoint.read_progress(tmp_path) == Progress(stage="advance", step=5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"format": None}, "has format 1, this version reads 2; go on with the version"),
        ({"format": 9}, "has format 9"),
        ({"format": [2]}, r"has format \[2\]"),
        *(({name.name: None}, f"has no '{name.name}'") for name in dataclasses.fields(Progress)
          if name.name != "format"),
        ({"step": "5"}, "has '5' as 'step'"),
        ({"step": True}, "has True as 'step'"),
        ({"position": {}}, "has {} as 'position'"),
    ],
)
def test_a_state_of_another_version_or_with_lacking_entries_is_one_line_with_its_path(
    tmp_path, changes, words
):
    write_state(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{tmp_path}/state.json {words}"):
        checkpoint.read_progress(tmp_path)


@pytest.mark.parametrize("text", ["", '{"step": ', "[1]", "null"])
def test_a_torn_state_is_one_line_with_its_path(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/state.json (is not valid|holds a)"):
        checkpoint.read_progress(tmp_path)
