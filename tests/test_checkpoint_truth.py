"""A checkpoint holds what it says: whole, finite, of the step it names, or nothing is saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stand_in import ALL, ALONE, build, save, train

from training import checkpoint, state_check
from training.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TINY = """--tokenizer=toy/tokenizer --vision=toy --vision.dim=32 --vision.n_layers=1
    --vision.n_heads=2 --vision.ffn_dim=64 --llm=toy --llm.dim=32 --llm.n_layers=1 --llm.n_heads=2
    --llm.n_kv_heads=1 --llm.head_dim=16 --llm.ffn_dim=64 --num_workers=0 --max_tiles=4
    --tokens_per_pack=300 --max_tiles_per_pack=20 --dtype=float32 --threads=1 --seed=7
    --stages=alignment --alignment.lr_vision=1e-3 --alignment.lr_projector=1e-3
    --alignment.lr_llm=1e-3 --val_packs=2""".split()


def flags(out, shards, *more, steps=4):
    """Flags of a tiny stage in which everything trains."""
    data = [f"--data={shards}", f"--val_data={shards}"]
    return [*TINY, f"--out_dir={out}", f"--alignment.steps={steps}", *data, *more]


def read(path):
    """{name: tensor} of a checkpoint, weights and moments."""
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(t.size, dtype=t.properties.dtype) for k, t in sizes.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def named(out, step):
    return Path(out) / "checkpoints" / f"step_{step:08d}"


# ---- every tensor, of the step it says -----------------------------------------------------------


@pytest.mark.parametrize("points", [[4], pytest.param([1, 2, 3, 5], marks=pytest.mark.nightly)])
def test_sharded_runs_that_validate_save_all_moments_and_resume_exactly_from_each_save(
    zygote, shards, tmp_path, points
):
    more = ["--parallel=fsdp", "--val_every=4", "--save_every=1", "--keep=9"]
    whole = tmp_path / "whole"
    arguments = flags(whole, shards, *more, steps=6)
    assert zygote.run("train", arguments, 2, tmp_path / "1") == [0, 0], (tmp_path / "1").read_text()
    last = read(named(whole, 6))
    for step in range(1, 7):
        for name, tensor in read(named(whole, step)).items():
            if name.endswith(".step"):
                assert tensor == step, (name, tensor, step)
            elif name.startswith("optimizer."):
                assert tensor.any(), f"{name} is all zeros at step {step}"
    for step in points:  # step 4 validates
        out = tmp_path / f"from_{step}"
        shutil.copytree(named(whole, step), named(out, step))
        done = zygote.run("train", flags(out, shards, *more, steps=6), 2, tmp_path / "2")
        assert done == [0, 0], (tmp_path / "2").read_text()
        got = read(named(out, 6))
        assert got.keys() == last.keys()
        assert all(torch.equal(got[name], last[name]) for name in last), f"from step {step}"


def test_a_sharded_run_that_is_left_gathered_ends_instead_of_saving_zeros(zygote, shards, tmp_path):
    out = tmp_path / "r"
    code = "from training import metrics\nmetrics.reshard = lambda model: None"
    more = ["--parallel=fsdp", "--val_every=2", "--save_every=1"]
    codes = zygote.run("train", flags(out, shards, *more), 2, tmp_path / "1", code)
    text = (tmp_path / "1").read_text()
    assert 0 not in codes and "Traceback" not in text and "has no moments" in text, text
    assert checkpoint.find_checkpoint(out) == named(out, 1)


def lose_a_moment(model, optimizer):
    p = next(iter(optimizer.state))
    optimizer.state[p].pop("exp_avg_sq")


def lose_a_state(model, optimizer):
    optimizer.state.pop(next(iter(optimizer.state)))


def forget_a_step(model, optimizer):
    next(iter(optimizer.state.values()))["step"].zero_()


def cut_a_moment(model, optimizer):
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].flatten()[:1]


def other_parameters(model, optimizer):
    """What a gathered FSDP unit shows: equal weights in other objects."""
    layer = model.mlp1[1]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def freeze_one(model, optimizer):
    model.mlp1[1].weight.requires_grad_(False)


def other_dtype(model, optimizer):
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].double()


LIES = {
    lose_a_moment: "has not all of step, exp_avg, exp_avg_sq",
    lose_a_state: "has no moments",
    forget_a_step: "has made 2 updates, but the moments of 1 of",
    cut_a_moment: "have not its shape",
    other_parameters: "mlp1.1.weight has no moments",
    freeze_one: "mlp1.1.weight.exp_avg was .* at the last save, now it is None",
    other_dtype: "was .*float32.* at the last save, now it is .*float64",
}


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_save_that_would_lie_is_an_error_and_leaves_nothing_behind(tmp_path, lie):
    model, optimizer = build(ALL)
    saver = checkpoint.Saver(tmp_path, ALONE)
    train(model, optimizer, ALONE, [0, 1], [0])
    saver.save(1, model, optimizer, Progress(stage="advance", step=1))
    train(model, optimizer, ALONE, [0, 1], [1])
    lie(model, optimizer)
    with pytest.raises(ValueError, match=LIES[lie]):
        saver.save(2, model, optimizer, Progress(stage="advance", step=2))
    saver.wait()
    assert checkpoint.find_checkpoint(tmp_path) == named(tmp_path, 1)
    assert not named(tmp_path, 2).exists()


def test_steps_that_were_skipped_are_no_updates(tmp_path):
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], range(2))
    save(tmp_path, 5, model, optimizer, Progress(step=5, skipped=3))
    with pytest.raises(ValueError, match="has made 5 updates"):
        save(tmp_path, 6, model, optimizer, Progress(step=5))


def test_a_checkpoint_whose_moments_are_of_another_step_is_not_gone_on_from(tmp_path, monkeypatch):
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], [0])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "find_fault", lambda tensors, updates: None)
        save(tmp_path, 4, model, optimizer, Progress(step=4))
    with pytest.raises(ValueError, match="step_00000004 is not fit to go on from: .*4 updates"):
        checkpoint.load_checkpoint(named(tmp_path, 4), *build(ALL))


# ---- finite, or nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
def test_what_is_not_finite_is_never_saved(tmp_path, value, where):
    model, optimizer = build(ALL)
    weight = model.mlp1[1].weight
    tensor = weight.detach() if where == "weight" else optimizer.state[weight][where]
    tensor[-1, -1] = value
    with pytest.raises(ValueError, match="step_00000001 is not saved: not finite: .*mlp1.1.weight"):
        save(tmp_path, 1, model, optimizer)
    assert checkpoint.find_checkpoint(tmp_path) is None


def test_large_finite_values_and_empty_or_mixed_tensors_are_finite():
    most = torch.finfo(torch.float32).max
    tensors = {
        "a": torch.full((3,), most),
        "b": torch.empty(0),
        "c": torch.ones(2, dtype=torch.bfloat16),
        "d": torch.tensor(-most),
    }
    assert state_check.not_finite(tensors) is None
    assert state_check.not_finite({"b": torch.empty(0)}) is None
    tensors["c"][1] = float("nan")
    assert state_check.not_finite(tensors) == "not finite: c"


POISON = """
import torch
step = torch.optim.AdamW.step
def poisoned(self, *args, **kw):
    step(self, *args, **kw)
    state = next(iter(self.state.values()))
    if state["step"] == 3 and RANK == 0:  # after the last update
        with torch.no_grad():
            p = self.param_groups[0]["params"][0]
            getattr(p, "_local_tensor", p).view(-1)[0] = float("nan")
torch.optim.AdamW.step = poisoned
"""


def test_a_stage_whose_last_update_breaks_the_weights_ends_with_an_error_and_no_model_folder(
    zygote, shards, tmp_path
):
    out = tmp_path / "r"
    codes = zygote.run("train", flags(out, shards, steps=3), 1, tmp_path / "1", POISON)
    text = (tmp_path / "1").read_text()
    assert codes == [2] and "Traceback" not in text
    assert f"error: {out}/alignment is not saved: not finite" in text
    assert not (out / "alignment").exists()
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


# ---- stages that are done ------------------------------------------------------------------------


def test_a_model_folder_that_was_removed_is_trained_again_and_an_interrupted_retry_goes_on(
    zygote, shards, tmp_path
):
    out = tmp_path / "r"
    log = out / "log.jsonl"
    arguments = flags(out, shards, "--save_every=1", steps=3)
    assert zygote.run("train", arguments, 1, tmp_path / "1") == [0]
    first = (out / "alignment/model.safetensors").read_bytes()
    shutil.rmtree(out / "alignment")
    stop = """
import os, signal
from training import checkpoint
save = checkpoint.Saver.save
def then_stop(self, step, *args, **kw):
    save(self, step, *args, **{**kw, "wait": True})
    if step == 2:
        os._exit(77)
checkpoint.Saver.save = then_stop
"""
    assert zygote.run("train", arguments, 1, tmp_path / "2", stop) == [77]
    told = (tmp_path / "2").read_text()
    assert "alignment: its model folder was removed, so it is trained again" in told
    assert len(log.read_text().splitlines()) == 3 + 2
    assert zygote.run("train", arguments, 1, tmp_path / "3") == [0]
    assert "resumes at step 2" in (tmp_path / "3").read_text()
    assert len(log.read_text().splitlines()) == 3 + 2 + 1
    assert (out / "alignment/model.safetensors").read_bytes() == first


def test_a_stage_is_not_started_where_its_model_folder_could_not_be_written(
    zygote, shards, tmp_path
):
    (tmp_path / "r/alignment").mkdir(parents=True)
    (tmp_path / "r/alignment/notes.txt").write_text("mine")
    assert zygote.run("train", flags(tmp_path / "r", shards), 1, tmp_path / "1") == [2]
    assert "r/alignment exists and is not a model folder" in (tmp_path / "1").read_text()
    assert not (tmp_path / "r/log.jsonl").exists()


def test_a_full_disk_under_the_printed_output_and_the_notes_costs_no_step(zygote, shards, tmp_path):
    out = tmp_path / "r"
    (out / "last_step").mkdir(parents=True)
    (out / "last_step/rank_0.txt").symlink_to("/dev/full")
    arguments = flags(out, shards, "--save_every=2", "--print_every=1")
    assert zygote.run("train", arguments, 1, "/dev/full") == [0]
    assert (out / "alignment/config.json").exists()
