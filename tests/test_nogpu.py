"""make nogpu: what its judge of a stage finds wrong, without the stand-in for the CUDA driver."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sft
import train
from configurator import configure
from model import VLM
from training import limits
from training.memory import memory_plan
from training.optim import set_trained_parts

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "nogpu"))
import mixes  # noqa: E402
import proof  # noqa: E402

GOOD = {
    "allocated": 60.0,
    "reserved": 65.0,
    "planned_allocated": 61.0,
    "planned_reserved": 66.0,
    "card_gb": 78,
    "breaks": 0,
    "recompiled": 0,
    "kernels": 500,
    "kernels_eager": 1000,
    "compiled_gb": 100.0,
    "mixed": {},
    "syncs": {"model.py loss": 2},
}
ALLOWED = {"model.py loss": 2}
HELD = {"kernels": 500, "compiled_gb": 97.5}


def test_a_stage_as_it_should_be_has_no_fault():
    assert proof.stage_faults(GOOD, HELD, ALLOWED) == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"allocated": 63.0}, "allocated 63.0 GB, --dry_run says 61.0"),
        ({"allocated": 58.0}, "allocated 58.0 GB, --dry_run says 61.0"),
        ({"reserved": 70.0}, "reserved 70.0 GB, --dry_run says 66.0"),
        ({"reserved": 63.0}, "reserved 63.0 GB, --dry_run says 66.0"),
        ({"reserved": 79.0, "planned_reserved": 79.0}, "reserved 79.0 GB of 78"),
        ({"breaks": 1}, "1 graph breaks"),
        ({"recompiled": 2}, "2 graphs compiled after the first pack"),
        ({"kernels": 501}, "501 kernels a pack, held.json holds 500"),
        ({"compiled_gb": 100.5}, "compiled kernels move 100.5 GB for a pack, held.json holds 97.5"),
        ({"mixed": {"aten::index": 2}}, "aten::index mixes tensors of the CPU and of the card, 2"),
        ({"kernels_eager": 800}, "500 kernels a pack, eager 800"),
        ({"syncs": {"model.py loss": 3}}, "model.py loss waits for the card 3 times"),
        ({"syncs": {"model.py hidden": 1}}, "model.py hidden waits for the card 1 times"),
    ],
)
def test_each_kind_of_fault_is_named(change, says):
    fault, = proof.stage_faults(GOOD | change, HELD, ALLOWED)
    assert says in fault


def test_an_index_that_was_left_on_the_cpu_is_found_and_numbers_and_copies_are_not():
    """The meta device is the card here: PyTorch lets the same operations mix with it."""
    x = torch.zeros(4, 3, device="meta")
    here = torch.arange(4)
    with mixes.WatchDevices() as watched:
        x.copy_(torch.ones(3))
        torch.ones(3).to("meta")
        x * torch.tensor(2.0) + x[here.to("meta")]
    assert not watched.found
    with mixes.WatchDevices() as watched:
        x[here]
    fault, = proof.mixed_faults(watched.found)
    assert fault.startswith("aten::index mixes")


def test_devices_are_watched_in_the_backward_pass_too():
    class LeftOnTheCpu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient[torch.arange(len(gradient))]

    x = torch.zeros(4, device="meta", requires_grad=True)
    with mixes.WatchDevices() as watched:
        LeftOnTheCpu.apply(x).sum().backward()
    assert watched.found == {"aten::index": 1}


def test_the_ends_of_documents_belong_on_the_cpu_and_what_attends_does_not():
    q = torch.zeros(4, 2, 8, device="meta")
    ends = torch.tensor([0, 4], dtype=torch.int32)
    with mixes.WatchDevices() as watched:
        torch.ops.sail_vl.attention(q, q, q, ends, True, "sdpa")
    assert not watched.found
    with mixes.WatchDevices() as watched, contextlib.suppress(RuntimeError, NotImplementedError):
        torch.ops.sail_vl.attention(q, q, torch.zeros(4, 2, 8), ends, True, "sdpa")
    assert watched.found["sail_vl::attention"] == 1


def test_the_list_of_waits_is_the_one_of_the_docs():
    allowed = proof.allowed_syncs((ROOT / "docs" / "speed.md").read_text())
    assert allowed["model.py loss"] == proof.MICRO
    for place in allowed:
        path, name = place.split()
        source = (ROOT / path).read_text()
        assert f"def {name}(" in source, place


def test_every_recipe_is_a_case():
    covered = {name for case in proof.CASES for name in case.configs}
    recipes = {path.stem for path in ROOT.glob("config/*.py")}
    # real.py runs these two
    assert covered == recipes - {"toy", "toy_sft"}


# ---- a script that hangs -------------------------------------------------------------------------


def test_a_script_that_does_not_end_is_ended_and_its_log_says_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "HANG_S", 2)
    script = tmp_path / "hangs.py"
    script.write_text("import time\n\ndef stuck_here():\n    time.sleep(60)\n\nstuck_here()\n")
    log = tmp_path / "log"
    start = time.monotonic()
    assert proof.run_child([str(script)], dict(os.environ), log) is None
    assert time.monotonic() - start < 30
    assert "stuck_here" in log.read_text()


REAL = """
import sys, types
from pathlib import Path
# card.py needs the stand-in, and nothing here needs card.py.
sys.modules["card"] = types.ModuleType("card")
sys.path.insert(0, "tests/nogpu")
import real
real.CHECKPOINT_S = 1
out = Path(sys.argv[1])
"""


def run_real(code, out):
    """Code that finds tests/nogpu/real.py as `real` -> (its exit code, all it printed)."""
    done = subprocess.run([sys.executable, "-c", REAL + code, str(out)], cwd=ROOT, timeout=100,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_checkpoint_that_never_comes_ends_the_run_that_waits_for_it(tmp_path):
    """It waited for ever, and what had gone wrong was not to be seen."""
    code, said = run_real("""
note = lambda: real.signals.Watchdog.note(types.SimpleNamespace(), real.KILL_AT)
real.signals.Watchdog.note = lambda *_: None
print(real.run_and_kill(types.SimpleNamespace(main=note), out))
""", tmp_path)
    assert code == 0 and "TimeoutError: no checkpoint in" in said
    assert "the run that was to be killed ended by itself" in said


def test_real_sees_the_checkpoint_that_a_run_goes_on_from(tmp_path):
    """It watched a name that the program does not call, so each run was said to begin anew."""
    code, said = run_real("""
real.run_folder.load_checkpoint = lambda *_: None
loaded = real.resumed_from()
progress = types.SimpleNamespace(stage="s", fingerprint=1, step=1, world=1)
real.run_folder.read_progress = lambda _: progress
real.run_folder.resume(out, progress, 2, None, None)
print("loaded", loaded == [out])
""", tmp_path)
    assert code == 0 and "loaded True" in said, said


# ---- memory --------------------------------------------------------------------------------------


def plans(case):
    """{"case stage": the MemoryPlan of each stage of a Case}."""
    script = sft if case.script == "sft.py" else train
    cfg = script.Config()
    configure(cfg, [*(f"config/{name}.py" for name in case.configs), "--init_from=", *case.flags])
    with torch.device("meta"):
        model = VLM(cfg.vision, cfg.llm, 0)
    stages = limits.named_stages(cfg, train.all_stages(cfg))
    found = {}
    for name, stage in stages:
        trained = set_trained_parts(model, stage, cfg)
        found[f"{case.name} {name}"] = memory_plan(cfg, model, trained, case.world)
    return found


@pytest.mark.parametrize("case", proof.CASES, ids=lambda case: case.name)
def test_the_plan_of_memory_is_what_the_allocator_took(monkeypatch, case):
    """held.json has what PyTorch's allocator took when `make nogpu` ran last."""
    monkeypatch.chdir(ROOT)
    held = json.loads(proof.HELD.read_text())
    compared = 0
    for stage, plan in plans(case).items():
        assert plan.reserved / 1e9 <= case.card_gb, stage
        if stage in held:
            assert plan.allocated / 1e9 == pytest.approx(held[stage]["allocated"], rel=0.03), stage
            assert plan.reserved / 1e9 == pytest.approx(held[stage]["reserved"], rel=0.03), stage
            compared += 1
    if not compared:
        pytest.skip(f"held.json has no stage of {case.name}")
