"""common.py: gradients over ranks, optimizer groups, schedule, checkpoints, lock, log."""

import io
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch import nn

from training import checkpoint, distributed, metrics, optim, run_folder, settings
from training.distributed import Dist
from training.settings import RunConfig, Stage

HERE = Path(__file__).resolve()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(dim)
        self.up_proj = nn.Linear(dim, 2 * dim)
        self.down_proj = nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.input_layernorm(x))))


class Vision(nn.Module):
    def forward(self, tiles):
        x = self.patch_embedding(tiles).flatten(2).transpose(1, 2) + self.class_embedding  # (N, P, C)
        return self.encoder.layers[0](x * self.ls1)


class Tiny(nn.Module):
    """A stand-in with the three parts of a VLM; tied embedding as in the small language models. Odd sizes, so that no
    dimension divides evenly over two ranks."""

    def __init__(self, dim=7, vocab=11, tied=True):
        super().__init__()
        self.vision_model = Vision()
        self.vision_model.class_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.vision_model.patch_embedding = nn.Conv2d(3, dim, 2, 2)
        self.vision_model.ls1 = nn.Parameter(torch.ones(dim))
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList([Block(dim)])
        self.mlp1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.embed_tokens = nn.Embedding(vocab, dim)
        self.language_model.model.layers = nn.ModuleList([Block(dim), Block(dim)])
        self.language_model.lm_head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def logits(self, tokens, tiles):
        x = self.mlp1(self.vision_model(tiles).mean(dim=(0, 1)))  # (C,)
        x = self.language_model.model.embed_tokens(tokens) + x  # (T, C)
        for layer in self.language_model.model.layers:
            x = layer(x)
        return self.language_model.lm_head(x)

    def forward(self, tokens, tiles):
        return nn.functional.cross_entropy(self.logits(tokens, tiles), tokens.roll(-1), reduction="sum")


def batch(step, rank):
    """One rank's micro-batch: rank 0 has 5 tokens, rank 1 has 3."""
    g = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 11, (5 - 2 * rank,), generator=g), torch.randn(2, 3, 4, 4, generator=g)


def build(stage, cfg, dist, **sizes):
    torch.manual_seed(0)
    model = Tiny(**sizes)
    optim.set_trainable(model, stage)
    model = distributed.parallelize(model, cfg, dist)
    return model, optim.make_optimizer(model, stage, cfg)


def train(model, optimizer, dist, ranks, steps):
    """`steps` updates on the batches of `ranks`; returns the last gradient norm. The loop of train.py in small."""
    for step in steps:
        tokens = sum(len(batch(step, r)[0]) for r in range(2))
        for i, rank in enumerate(ranks):
            distributed.set_gradient_sync(model, i == len(ranks) - 1)
            (model(*batch(step, rank)) * dist.world / tokens).backward()
        norm, _ = optim.clip_grad_norm(model, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm.item()


ALL = Stage(steps=4, lr_vision=1e-2, lr_projector=1e-2, lr_llm=1e-2)
ADVANCE = Stage(steps=4, lr_vision=1e-2, lr_projector=1e-2)
ALONE = Dist()


def on_two_ranks(folder):
    """Run by torchrun-like processes (see test below): every check that needs two ranks, one process start for all."""
    torch.set_num_threads(1)
    dist = distributed.setup_distributed("cpu", 60)
    results = {}
    for parallel in ("ddp", "fsdp"):
        cfg = RunConfig(parallel=parallel)
        model, optimizer = build(ADVANCE, cfg, dist)
        results[f"{parallel}_norm"] = train(model, optimizer, dist, [dist.rank], [0, 1])
        results[f"{parallel}_advance"] = distributed.full_state(model)
        model, optimizer = build(ALL, cfg, dist)  # the next stage
        train(model, optimizer, dist, [dist.rank], [2])
        results[f"{parallel}_all"] = distributed.full_state(model)
    # a checkpoint of one plain process -> ddp -> fsdp -> (back in the test) one plain process
    for source, target, parallel, step in (("none", "ddp", "ddp", 2), ("ddp", "fsdp", "fsdp", 3)):
        cfg = RunConfig(parallel=parallel)
        model, optimizer = build(ALL, cfg, dist)
        path = checkpoint.find_checkpoint(f"{folder}/{source}", dist)
        assert checkpoint.load_checkpoint(path, model, optimizer, dist) == {"step": step}
        train(model, optimizer, dist, [dist.rank], [step])
        checkpoint.save_checkpoint(f"{folder}/{target}", step + 1, model, optimizer, {"step": step + 1}, dist, keep=2)
    guard = run_folder.Preemption()
    results["stop_before"] = guard.stop_requested(dist)
    if dist.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    results["stop_after"] = guard.stop_requested(dist)
    if dist.is_main:
        torch.save(results, f"{folder}/results.pt")
    distributed.close_distributed()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = build(ALL, RunConfig(), ALONE)
    train(model, optimizer, ALONE, [0, 1], [0, 1])
    checkpoint.save_checkpoint(folder / "none", 2, model, optimizer, {"step": 2}, ALONE, keep=2)
    torch.manual_seed(0)
    env = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000),
               PYTHONPATH=str(HERE.parent.parent), OMP_NUM_THREADS="1")
    jobs = [subprocess.Popen([sys.executable, HERE, folder], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                             stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [job.communicate(timeout=180)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    return folder, torch.load(folder / "results.pt")


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_same_steps_as_one_process_with_both_micro_batches(two_ranks, parallel):
    model, optimizer = build(ADVANCE, RunConfig(), ALONE)
    norm = train(model, optimizer, ALONE, [0, 1], [0, 1])
    results = two_ranks[1]
    assert results[f"{parallel}_norm"] == pytest.approx(norm, rel=1e-5)
    assert largest_difference(results[f"{parallel}_advance"], model.state_dict()) < 1e-5
    model, optimizer = build(ALL, RunConfig(), ALONE)
    train(model, optimizer, ALONE, [0, 1], [2])
    assert largest_difference(results[f"{parallel}_all"], model.state_dict()) < 1e-5


def test_a_checkpoint_moves_from_one_process_to_ddp_to_fsdp_and_back(two_ranks):
    folder, _ = two_ranks
    model, optimizer = build(ALL, RunConfig(), ALONE)
    assert checkpoint.load_checkpoint(checkpoint.find_checkpoint(folder / "fsdp"), model, optimizer, ALONE) == {"step": 4}
    train(model, optimizer, ALONE, [0, 1], [4])
    straight, straight_optimizer = build(ALL, RunConfig(), ALONE)
    train(straight, straight_optimizer, ALONE, [0, 1], range(5))
    assert largest_difference(model.state_dict(), straight.state_dict()) < 1e-5


def test_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks):
    assert (two_ranks[1]["stop_before"], two_ranks[1]["stop_after"]) == (False, True)


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    train(model, optimizer, ALONE, [0, 1], range(2))
    checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {"position": [3, 4]}, ALONE, keep=2)
    train(model, optimizer, ALONE, [0, 1], range(2, 4))
    again, again_optimizer = build(ALL, RunConfig(beta2=0.9), ALONE)
    path = checkpoint.find_checkpoint(tmp_path)
    state = checkpoint.load_checkpoint(path, again, again_optimizer, ALONE)
    assert state == checkpoint.read_state(path) == {"position": [3, 4]}
    assert again_optimizer.param_groups[0]["betas"] == (0.9, 0.9)  # settings come from the configuration
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


DAMAGES = {"truncated": truncate, "bit flipped": flip_a_bit,
           "shard deleted": lambda path: next(path.glob("*.distcp")).unlink(),
           "state emptied": lambda path: (path / "state.json").write_text(""),
           "manifest of another step": lambda path: (path / "manifest.json").write_text('{"step": 1, "files": {}}'),
           "manifest deleted": lambda path: (path / "manifest.json").unlink()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capfd, kind):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, {}, ALONE, keep=2)
    DAMAGES[kind](tmp_path / "checkpoints" / "step_00000002")
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000001"
    assert "DAMAGED" in capfd.readouterr().out
    checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {}, ALONE, keep=2)  # the repeated step replaces it
    assert checkpoint.find_checkpoint(tmp_path).name == "step_00000002"


def test_a_stage_that_is_to_end_before_where_its_run_stands_is_refused(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"stage": "base", "fingerprint": "f", "step": 5}))
    packs = types.SimpleNamespace(fingerprint="f", packs_per_step=1)
    with pytest.raises(ValueError, match="stage base is to have 3 steps, but .* is 5 steps into it; raise --max_steps or "
                                         "base.steps, or start anew in another --out_dir"):
        run_folder.resume(tmp_path, "base", 3, packs, 1, None, None, distributed.Dist())


def test_a_strict_resume_refuses_a_damaged_checkpoint_instead_of_going_back(tmp_path):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, {}, ALONE, keep=2)
    assert checkpoint.find_checkpoint(tmp_path, strict=True).name == "step_00000002"
    flip_a_bit(tmp_path / "checkpoints" / "step_00000002")
    with pytest.raises(ValueError, match="damaged checkpoint .*step_00000002: __0_0.distcp has changed"):
        checkpoint.find_checkpoint(tmp_path, strict=True)


def test_swapped_slices_of_two_ranks_are_damage(two_ranks):
    path = sorted((two_ranks[0] / "ddp" / "checkpoints").glob("step_*"))[-1]
    first, second = sorted(path.glob("*.distcp"))
    contents = first.read_bytes(), second.read_bytes()
    assert checkpoint.damage(path) is None and contents[0] != contents[1]
    try:
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
        assert "has changed since it was written" in checkpoint.damage(path)
    finally:
        first.write_bytes(contents[0])
        second.write_bytes(contents[1])


@pytest.mark.parametrize("series", [25, pytest.param(100, marks=pytest.mark.nightly)])
def test_spikes_of_ten_sigma_are_found_and_one_step_in_ten_thousand_alarms_at_most(series):
    found = false = steps = 0
    for seed in range(series):
        rng = np.random.default_rng(seed)
        losses = 8 * np.exp(-np.arange(2000) / 400) + 2 + 0.05 * rng.standard_normal(2000)
        spikes = set(rng.choice(np.arange(150, 2000), 5, replace=False).tolist())
        window = []
        for step, loss in enumerate(losses):
            sigmas, window = metrics.spike(window, float(loss) + 0.5 * (step in spikes))
            found += sigmas > metrics.SPIKE and step in spikes
            false += sigmas > metrics.SPIKE and step not in spikes
            steps += 1
    assert found >= 0.99 * 5 * series and false <= steps / 10_000, (found, false)
    assert metrics.spike(window, float("nan")) == (0.0, window)
    alarms = 0
    for _ in range(500):                                  # a loss that stays up ends the alarm
        sigmas, window = metrics.spike(window, 4.0 + 0.05 * float(rng.standard_normal()))
        alarms += sigmas > metrics.SPIKE
    assert 0 < alarms < 128 and sigmas < metrics.SPIKE


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_is_off_by_default_and_one_that_is_not_installed_says_what_to_do(tmp_path, monkeypatch, name):
    assert metrics.open_tracker(RunConfig(), {}) is None
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        metrics.open_tracker(RunConfig(track=name, out_dir=str(tmp_path)), {})
    rows = []
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1}, rows.append)
    assert rows == [{"step": 1}]


def test_a_save_beside_the_training_holds_the_moment_it_was_asked_for(tmp_path):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    train(model, optimizer, ALONE, [0, 1], range(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    future = checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {}, ALONE, keep=2, wait=False)
    train(model, optimizer, ALONE, [0, 1], range(2, 4))   # while it is being written
    checkpoint.saved(future)
    again, again_optimizer = build(ALL, RunConfig(), ALONE)
    checkpoint.load_checkpoint(checkpoint.find_checkpoint(tmp_path), again, again_optimizer, ALONE)
    assert largest_difference(again.state_dict(), before) == 0.0


def test_a_save_that_dies_anywhere_leaves_the_last_checkpoint_usable(tmp_path, monkeypatch):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, {}, ALONE, keep=2)
    calls = []

    def dying(original):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) > survive:
                raise KeyboardInterrupt
            return original(*args, **kwargs)
        return call

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for survive in range(100):
        calls.clear()
        try:
            checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {}, ALONE, keep=2)
        except BaseException:  # the storage layer wraps what it catches
            path = checkpoint.find_checkpoint(tmp_path)
            assert path is not None and checkpoint.read_state(path) == {}
        else:
            break
    assert survive >= 8 and checkpoint.find_checkpoint(tmp_path).name == "step_00000002"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_the_newest_good_checkpoints_stay_and_older_ones_go(tmp_path):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    for step in range(1, 6):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, {}, ALONE, keep=1)
        if step == 4:
            truncate(tmp_path / "checkpoints" / "step_00000004")
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000003", "step_00000004", "step_00000005"]  # 4 is damaged and does not count
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000005"


def test_a_checkpoint_of_another_model_is_refused_with_names_and_shapes(tmp_path):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, {}, ALONE, keep=2)
    other, other_optimizer = build(ALL, RunConfig(), ALONE, dim=8)
    with pytest.raises(ValueError, match=r"class_embedding is \(1, 1, 7\), here \(1, 1, 8\).*more"):
        checkpoint.load_checkpoint(checkpoint.find_checkpoint(tmp_path), other, other_optimizer, ALONE)
    untied, untied_optimizer = build(ALL, RunConfig(), ALONE, tied=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is not there"):
        checkpoint.load_checkpoint(checkpoint.find_checkpoint(tmp_path), untied, untied_optimizer, ALONE)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="GB are free"):
        checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, {}, ALONE, keep=2)
    assert checkpoint.find_checkpoint(tmp_path) is None


def test_a_frozen_module_keeps_every_bit_and_is_not_in_the_optimizer():
    model, optimizer = build(ADVANCE, RunConfig(), ALONE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, ALONE, [0, 1], range(2))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith("language_model")}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if not n.startswith("language_model")}


def test_what_trains_is_told_and_a_stage_that_trains_nothing_is_refused():
    assert optim.set_trainable(Tiny(), ADVANCE) == (True, True, False)
    blind = Tiny()
    blind.vision_model = None
    assert optim.set_trainable(blind, ADVANCE) == (False, True, False)
    with pytest.raises(ValueError, match="lr_vision"):
        optim.set_trainable(Tiny(), Stage())


def test_only_matrices_decay_and_each_module_has_its_rate():
    stage = Stage(lr_vision=1e-5, lr_projector=1e-3, lr_llm=2e-5, weight_decay=0.1)
    model = Tiny(tied=False)
    optim.set_trainable(model, stage)
    groups = optim.make_optimizer(model, stage, RunConfig()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.1 for p in g["params"]}
    assert "vision_model.patch_embedding.weight" in decayed and "language_model.lm_head.weight" in decayed
    assert not any("embed_tokens" in n or "norm" in n for n in decayed)
    assert not any(n.endswith(("bias", "class_embedding", "ls1")) for n in decayed)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {(g["name"].split("/")[0], g["lr"], g["base_lr"]) for g in groups} == {
        ("vision_model", 1e-5, 1e-5), ("mlp1", 1e-3, 1e-3), ("language_model", 2e-5, 2e-5)}


def test_the_stage_table_counts_tied_weights_once():
    model = Tiny()
    rows = optim.print_stage_table("advance", model, ADVANCE)
    assert sum(r[1] for r in rows) == sum(p.numel() for p in model.parameters())
    assert [r[2] == r[1] for r in rows] == [True, True, False]


def test_the_rate_warms_up_from_above_zero_and_ends_at_the_floor():
    scale = [optim.lr_scale(s, 100, 10, 0.1) for s in range(100)]
    assert 0 < scale[0] < scale[9] < scale[10] == 1.0
    assert all(a > b for a, b in zip(scale[10:], scale[11:], strict=False)) and 0.1 < scale[-1] < 0.101
    assert optim.lr_scale(55, 100, 10, 0.1) == pytest.approx(0.55)  # half way down
    assert optim.lr_scale(0, 1, 0, 0.0) == 1.0 and optim.lr_scale(500, 100, 10, 0.1) == pytest.approx(0.1)


def test_clipping_reports_the_norm_per_module_and_scales_all_by_one_factor():
    model, _ = build(ADVANCE, RunConfig(), ALONE)
    model(*batch(0, 0)).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    total, modules = optim.clip_grad_norm(model, 0.25)
    assert total.item() == pytest.approx(torch.cat([g.flatten() for g in before.values()]).norm().item(), rel=1e-5)
    assert total.item() > 0.25 and set(modules) == {"vision_model", "mlp1"}
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, before[n] * (0.25 / total))
    next(iter(model.parameters())).grad.fill_(float("nan"))
    assert not optim.clip_grad_norm(model, 0.25)[0].isfinite()


def test_activation_checkpointing_keeps_less_and_changes_neither_gradients_nor_names():
    grads, kept, count = [], [], lambda t: kept.append(t.nbytes) or t
    held = {}
    for what in ("none", "selective", "full"):
        model, _ = build(ALL, RunConfig(activation_checkpointing=what), ALONE)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(*batch(0, 0))
        held[what] = sum(kept)
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert largest_difference(*grads[:2]) == largest_difference(*grads[1:]) == 0.0
    assert held["selective"] < held["none"] > held["full"], held


def test_a_second_job_in_the_run_folder_is_refused_by_pid_and_a_dead_holder_is_not_in_the_way(tmp_path):
    code = (f"import time; from training import run_folder; run_folder.lock_run_folder({str(tmp_path)!r}); print('locked', flush=True); "
            "time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on "):
        run_folder.lock_run_folder(tmp_path)
    holder.kill()
    holder.wait()
    leftover = tmp_path / "checkpoints" / ".tmp_step_00000001"
    leftover.mkdir(parents=True)
    run_folder.lock_run_folder(tmp_path)
    assert not leftover.exists()


def test_a_torn_last_log_line_is_cut_and_every_line_parses(tmp_path):
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1, "loss": float("nan"), "text": "多"})
        f.write(b'{"step": 2, "lo')
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 2, "loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None, "text": "多"}, {"step": 2, "loss": 0.5}]


def test_a_line_of_the_log_that_finds_no_room_is_left_out_whole(tmp_path, capfd):
    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:10])
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1})
    with Full(tmp_path / "log.jsonl", "ab+") as f:
        metrics.log_line(f, {"step": 2, "loss": 0.5})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n' and "WARNING: no room" in capfd.readouterr().err


def test_a_bad_sample_that_is_met_again_after_a_restart_is_named_once(tmp_path):
    records = [{"id": "a", "reason": "ä"}, {"id": "b", "reason": "c"}]
    for part in (records[:1], records, records):
        metrics.log_bad(tmp_path, part)
    assert [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()] == records


def test_checkpoints_of_later_steps_than_where_a_run_goes_on_are_set_aside_aloud(tmp_path, capfd):
    model, optimizer = build(ALL, RunConfig(), ALONE)
    for step in (10, 12):
        checkpoint.save_checkpoint(tmp_path, step, model, optimizer, {}, ALONE, keep=2)
    checkpoint.set_aside(tmp_path, 10)
    assert "step_00000012 is of a later step than 10" in capfd.readouterr().err
    checkpoint.set_aside(tmp_path, 0)
    checkpoint.save_checkpoint(tmp_path, 2, model, optimizer, {}, ALONE, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "aside_step_00000010", "aside_step_00000012", "latest", "step_00000002"]


def test_a_run_none_of_whose_checkpoints_is_whole_is_refused_not_started_anew(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path) is None
    model, optimizer = build(ALL, RunConfig(), ALONE)
    checkpoint.save_checkpoint(tmp_path, 1, model, optimizer, {}, ALONE, keep=2)
    manifest = tmp_path / "checkpoints/step_00000001/manifest.json"
    manifest.write_text('{"step": 1, "files": {}}')
    with pytest.raises(ValueError, match="no checkpoint is whole; restore one, or remove the folder to start anew"):
        checkpoint.find_checkpoint(tmp_path)


def test_the_run_record_says_what_ran(tmp_path):
    run_folder.write_run_config(tmp_path, {"seed": 7}, {"seed": "command line"}, 2)
    record = run_folder.read_run_config(tmp_path)
    assert record["config"] == {"seed": 7} and record["origins"] == {"seed": "command line"} and record["world"] == 2
    assert record["versions"]["torch"] == torch.__version__ and record["argv"] == sys.argv and "commit" in record


def test_the_step_line_shows_all_that_was_promised():
    row = {"stage": "advance", "step": 12, "steps": 400, "loss": 2.34567, "lr": {"vision": 1e-5, "llm": 0.0},
           "tokens_per_s": 12345.6, "tiles_per_s": 7.5, "mfu": None, "data_wait": 0.031, "memory_gb": 1.25,
           "dropped": 2, "quarantined": 3, "eta_s": 3725.0, "run_eta_s": 7200.0,
           "spike": 0.5}
    assert metrics.format_step(row) == ("advance 12/400 | loss 2.3457 | lr vision 1.0e-05 | 12,346 tok/s 7.5 tiles/s | "
                                       "mfu n/a | data wait 3% | mem 1.2 GB | dropped 2 quarantined 3 | eta 1:02:05 of "
                                       "2:00:00")
    assert "mfu 41.2%" in metrics.format_step(row | {"mfu": 0.412})
    assert metrics.format_step(row | {"spike": 9.4, "val_loss": 1.25}).endswith("| SPIKE 9 sigma | val loss 1.2500")


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
                                            ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12),
                                            ("NVIDIA GB200", 2500e12), ("Quadro of tomorrow", None),
                                            ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H200", 989e12),
                                            ("NVIDIA H200 NVL", 835e12), ("NVIDIA H800 PCIe", 756e12),
                                            ("NVIDIA GH200 480GB", 989e12), ("NVIDIA GeForce RTX 4090", 165e12),
                                            ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA RTX A1000", None),
                                            ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA RTX A4000", None),
                                            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA GB300", None)])
def test_peak_flops_knows_the_card_or_says_so(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert metrics.peak_flops(torch.device("cuda")) == peak and metrics.peak_flops(torch.device("cpu")) is None


def test_the_plot_command_draws_a_log_with_stages_and_a_resume(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [("align", 1, 3.0), ("align", 2, None), ("align", 2, 2.0), ("advance", 1, 1.5), ("advance", 2, 1.0)]
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"event": "start"})
        for stage, step, loss in rows:
            metrics.log_line(f, {"stage": stage, "step": step, "loss": loss})
    metrics.plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_depend_on_every_part():
    draws = []
    for parts in ((1, 2, 3), (1, 3, 2), (1, 2, 4), (1, 2, 3)):
        optim.seed_everything(*parts)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_without_torchrun_there_is_one_rank_and_no_process_group():
    assert distributed.setup_distributed("cpu") == ALONE and not td.is_initialized()
    from configurator import configure
    with pytest.raises(ValueError, match="device must be one of auto, cuda, cpu, got 'tpu'"):
        configure(settings.RunConfig(), ["--device=tpu"])


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])
