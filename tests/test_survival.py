"""A run that is killed, resized, stalled, fed rubbish or out of disk goes on by itself.

It ends with the same weights. Every test here runs the real scripts in real processes, on one to
four ranks; zygote.py starts them quickly. Texts such as IDS run inside the ranks before the script
does; they find the modules of training/ and inputs/ under their names.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_train import argv, kill_tree, launch, log, weights

from training import checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# ---- what runs inside the ranks before the script does -------------------------------------------
IDS = """
import os, signal
original_note = signals.Watchdog.note
def note(self, text):  # called once a step, with the ids of its samples
    original_note(self, text)
    with open(self.path.with_suffix(".all"), "a") as f:
        f.write(text + chr(10))
    if text.startswith(STOP + ":") and RANK == 0:  # at the end of this step
        os.kill(os.getpid(), signal.SIGTERM)
signals.Watchdog.note = note
STOP = "never"
"""
FP64 = """
import torch
torch.Tensor.float = torch.Tensor.double  # what the model does in fp32 for accuracy
optim.set_dtypes = lambda model, dtype: model.double()
policy = distributed.MixedPrecisionPolicy
distributed.MixedPrecisionPolicy = lambda *a, **kw: policy(torch.float64, torch.float64, **kw)

"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return golden.write_data(tmp_path_factory.mktemp("shards"))


def one_stage(out, data, *more, steps=40):
    """One stage, in which everything trains."""
    return argv(out, data, *more, stages=("alignment",), steps=steps, everything=True)


# random numbers in every step
CHANCE = ["--vision.n_layers=2", "--alignment.drop_path=0.3"]


def stop_at(step):
    return IDS + f"STOP = 'alignment step {step}'"


def read(out, step=None):
    """{name: tensor} of a checkpoint of a run, weights and moments; step None: the newest."""
    path = (
        checkpoint.find_checkpoint(out)
        if step is None
        else Path(out) / "checkpoints" / f"step_{step:08d}"
    )
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(t.size, dtype=t.properties.dtype) for k, t in sizes.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


def samples(out):
    """{step: ids of all ranks, sorted}; of a step that was repeated the last one."""
    steps = {}
    for path in sorted((Path(out) / "last_step").glob("*.all")):
        mine = dict(re.findall(r"^(\w+ step \d+): samples (.*)$", path.read_text(), re.MULTILINE))
        for step, ids in mine.items():
            steps.setdefault(step, []).extend(filter(None, ids.split(", ")))
    return {step: sorted(ids) for step, ids in steps.items()}


def losses(out):
    """{(stage, step): loss}, last line wins; every line parses and none is torn."""
    text = (Path(out) / "log.jsonl").read_text()
    assert text.endswith("\n")
    return {(row["stage"], row["step"]): row["loss"] for row in map(json.loads, text.splitlines())}


# ---- stop and go on ------------------------------------------------------------------------------


def test_stops_at_three_points_and_other_numbers_of_workers_change_no_bit_of_weights_or_data(
    zygote, shards, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert zygote.run(
        "train", one_stage(whole, shards, "--save_every=40", *CHANCE), 2, tmp_path / "1", IDS
    ) == [0, 0]
    for step, workers in ((7, 2), (20, 0), (33, 4), (0, 1)):  # within and across epochs
        arguments = one_stage(parts, shards, "--save_every=40", f"--num_workers={workers}", *CHANCE)
        assert zygote.run("train", arguments, 2, tmp_path / "2", stop_at(step)) == [0, 0], (
            tmp_path / "2"
        ).read_text()
    assert losses(whole) == losses(parts) and samples(whole) == samples(parts)
    files = [
        {
            name: digest
            for name, (_, digest) in json.loads(
                (checkpoint.find_checkpoint(out) / "manifest.json").read_text()
            )["files"].items()
            if name.endswith("distcp")
        }
        for out in (whole, parts)
    ]
    assert files[0] == files[1] and len(files[0]) == 2
    state = [checkpoint.read_progress(checkpoint.find_checkpoint(out)) for out in (whole, parts)]
    assert state[0] == state[1] and state[0].position[0] >= 1  # beyond the first epoch


@pytest.mark.parametrize(
    "code, limit",
    [
        pytest.param("", 1e-5, id="fp32"),
        pytest.param(FP64, 1e-12, id="fp64", marks=pytest.mark.nightly),
    ],
)
def test_a_run_resized_from_2_to_1_to_4_to_2_ranks_sees_the_same_samples_and_ends_the_same(
    zygote, shards, tmp_path, code, limit
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rates = [f"--alignment.lr_{m}=1e-4" for m in ("vision", "projector", "llm")]
    more = ["--grad_accum_steps=2", "--save_every=40", *rates, *CHANCE]
    assert zygote.run("train", one_stage(whole, shards, *more), 2, tmp_path / "1", IDS + code) == [
        0,
        0,
    ]
    for ranks, step in ((2, 10), (1, 20), (4, 30), (2, 0)):  # the command stays the same
        done = zygote.run(
            "train", one_stage(parts, shards, *more), ranks, tmp_path / "2", stop_at(step) + code
        )
        assert done == [0] * ranks, (tmp_path / "2").read_text()
    assert len(samples(whole)) == 40 and samples(parts) == samples(whole)
    assert (
        difference(
            *(
                {k: v for k, v in tensors.items() if k.startswith("model.")}
                for tensors in (read(whole), read(parts))
            )
        )
        <= limit
    )
    shutil.rmtree(parts / "alignment")
    (parts / "finished.json").unlink()
    assert zygote.run("train", one_stage(parts, shards, *more), 3, tmp_path / "3") == [2, 2, 2]
    assert "cannot share alike; start it on 1, 2, 4 ranks" in (tmp_path / "3").read_text()


def kill_at_random(zygote, shards, tmp_path, kills, most, *more):
    """Kill a run on two ranks `kills` times at random moments and start it again each time.

    It ends as one that was left alone.
    """
    steps, rng = 4 * kills + 10, random.Random(1)

    def arguments(out):
        return argv(out, shards, "--save_every=3", *more, steps=steps)

    def lines():
        path = out / "log.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    assert zygote.run("train", arguments(tmp_path / "whole"), 2, tmp_path / "1", IDS, 600) == [0, 0]
    out, done = tmp_path / "killed", 0
    while done < kills:
        pids = zygote.start("train", arguments(out), 2, tmp_path / "2", IDS)
        goal = lines() + rng.randint(0, 7)
        while lines() < goal and None in zygote.ask(poll=pids):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        if None in zygote.ask(poll=pids):
            zygote.kill(pids)
            done += 1
        zygote.wait(pids)
    assert zygote.run("train", arguments(out), 2, tmp_path / "2", IDS, 600) == [0, 0], (
        tmp_path / "2"
    ).read_text()[-2000:]
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 2 * steps
    assert samples(out) == samples(tmp_path / "whole")  # none lost, none doubled
    for stage in ("alignment", "advance"):
        got, want = (
            hashlib.sha256((folder / stage / "model.safetensors").read_bytes()).hexdigest()
            for folder in (out, tmp_path / "whole")
        )
        assert got == want
    assert len(log(out)) - 2 * steps <= most * kills  # steps done again


def test_ten_kills_at_random_moments_leave_the_same_weights_samples_and_log(
    zygote, shards, tmp_path
):
    # an unfinished save is lost with the job, so up to two times save_every
    kill_at_random(zygote, shards, tmp_path, 10, 6)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "more, most", [((), 6), (("--save_async=False",), 3)], ids=["beside", "at once"]
)
def test_fifty_kills_at_random_moments_leave_the_same_weights_samples_and_log(
    zygote, shards, tmp_path, more, most
):
    kill_at_random(zygote, shards, tmp_path, 50, most, *more)


DIES = """
import os
calls = []
def dying(owner, name):
    original = getattr(owner, name)
    def call(*args, **kw):
        if saving:
            calls.append(name)
            if RANK == VICTIM and len(calls) == POINT:
                os._exit(77)
        return original(*args, **kw)
    setattr(owner, name, call)
for name in ("fsync", "rename", "replace", "open"):
    dying(os, name)
for name in ("file_hash", "gather", "tensors_of", "write_checkpoint"):
    dying(checkpoint, name)
for name in ("split_work", "memory_for"):
    dying(snapshot, name)
dying(checkpoint.dcp, "save")
dying(checkpoint.json, "dumps")
saving, save = [], checkpoint.Saver.save
def second(self, step, *args, **kw):
    if step == 6:  # the first to delete an older one
        self.wait()  # for the save before, or it would be the one that dies
        saving.append(step)
    return save(self, step, *args, **kw)
checkpoint.Saver.save = second
"""


def test_kills_inside_a_save_all_leave_a_good_checkpoint_and_an_exact_resume(
    zygote, shards, tmp_path
):
    kill_inside_a_save(zygote, shards, tmp_path, "True", {0: (5, 17), 1: (2, 6)})


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["True", "False"])
def test_sixteen_kills_inside_a_save_do_too(zygote, shards, tmp_path, mode):
    kill_inside_a_save(
        zygote, shards, tmp_path, mode, {0: (1, 3, 5, 8, 11, 14, 17, 20), 1: range(1, 9)}
    )


def kill_inside_a_save(zygote, shards, tmp_path, mode, points):
    def arguments(out):
        return one_stage(out, shards, "--save_every=2", f"--save_async={mode}", steps=7)

    assert zygote.run("train", arguments(tmp_path / "whole"), 2, tmp_path / "1") == [0, 0]
    want, killed = losses(tmp_path / "whole"), 0
    for victim, numbers in points.items():
        for point in numbers:
            out = tmp_path / f"{victim}-{point}"
            codes = zygote.run(
                "train",
                arguments(out),
                2,
                tmp_path / "2",
                DIES + f"VICTIM, POINT = {victim}, {point}",
            )
            if codes[victim] != 77:
                break
            killed += 1
            assert checkpoint.find_checkpoint(out).name in ("step_00000004", "step_00000006")
            assert zygote.run("train", arguments(out), 2, tmp_path / "2") == [0, 0], (
                tmp_path / "2"
            ).read_text()[-2000:]
            assert losses(out) == want and not list(out.glob("checkpoints/.tmp*"))
            got, whole = weights(out / "alignment"), weights(tmp_path / "whole" / "alignment")
            assert all(torch.equal(got[k], whole[k]) for k in whole)
    assert killed == sum(map(len, points.values()))


KILLED = """
import os, signal, data, torch
batch_of = data.PackedDataset.__getitem__
def deadly(self, pack):
    if torch.utils.data.get_worker_info() and pack.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch_of(self, pack)
data.PackedDataset.__getitem__ = deadly
"""


def test_a_worker_that_is_killed_ends_the_run_with_one_line(zygote, shards, tmp_path):
    arguments = one_stage(tmp_path / "r", shards, "--num_workers=1", "--grad_accum_steps=2")
    assert zygote.run("train", arguments, 1, tmp_path / "1", KILLED) == [2]
    last = (tmp_path / "1").read_text().splitlines()[-1]
    assert last.startswith("error: DataLoader worker") and last.endswith("fewer --num_workers")


# ---- signals, stalls, orphans --------------------------------------------------------------------


def test_a_stalled_rank_leaves_its_stack_and_samples_and_ends_all(zygote, shards, tmp_path):
    code = (
        IDS
        + """
import train, time
inputs = train.model_inputs
def sleepy(batch, device):
    while RANK == 1 and batch["position"][2] == 6:
        time.sleep(1)
    return inputs(batch, device)
train.model_inputs = sleepy
"""
    )
    start = time.monotonic()
    codes = zygote.run(
        "train", one_stage(tmp_path / "r", shards, "--timeout_s=4"), 2, tmp_path / "1", code
    )
    assert time.monotonic() - start < 60 and 0 not in codes
    for rank, place in ((0, "backward"), (1, "sleepy")):
        text = (tmp_path / f"r/last_step/rank_{rank}.txt").read_text()
        assert re.match(r"alignment step 3: samples pretrain-\S+, ", text) and place in text, text


@pytest.mark.parametrize(
    "place, workers, note",
    [
        ("make_loader", 0, "alignment step 1: waiting for data"),
        ("make_loader", 1, "alignment step 1: waiting for data"),
        ("model_inputs", 0, "alignment step 1: samples pretrain-"),
    ],
)
def test_a_run_of_one_process_that_hangs_in_its_data_or_a_step_ends_and_says_where(
    zygote, shards, tmp_path, place, workers, note
):
    if place == "make_loader":
        code = "def hang(*args):\n    time.sleep(600)\n    yield\n"
    else:
        code = "def hang(*args):\n    time.sleep(600)\n"
    code = f"import time\n{code}train.{place} = hang"
    start = time.monotonic()
    arguments = one_stage(tmp_path / "r", shards, "--timeout_s=2", f"--num_workers={workers}")
    assert zygote.run("train", arguments, 1, tmp_path / "1", code) == [1]
    text = (tmp_path / "r/last_step/rank_0.txt").read_text()
    assert time.monotonic() - start < 30 and text.startswith(note) and "train.py" in text, text


@pytest.mark.parametrize(
    "name, target, when",
    [
        ("SIGTERM", "all", "step"),
        ("SIGUSR1", "one", "validation"),
        ("SIGTERM", "one", "set-up"),
        ("SIGUSR1", "all", "checkpoint"),
    ],
)
def test_a_signal_at_any_moment_saves_at_a_step_boundary_and_the_run_goes_on_exactly(
    zygote, shards, tmp_path, name, target, when
):
    preempt(zygote, shards, tmp_path, name, target, when)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("target", ["all", "one"])
@pytest.mark.parametrize("when", ["set-up", "step", "slow loader", "validation", "checkpoint"])
def test_twenty_signals_save_twenty_times(zygote, shards, tmp_path, name, target, when):
    preempt(zygote, shards, tmp_path, name, target, when)


def preempt(zygote, shards, tmp_path, name, target, when):
    place = {
        "set-up": "train.start_weights",
        "step": "train.model_inputs",
        "slow loader": "optim.seed_everything",
        "validation": "metrics.validation_loss",
        "checkpoint": "checkpoint.write_checkpoint",
    }[when]
    nth = 1 if when in ("set-up", "validation", "checkpoint") else 3  # call of it
    code = f"""
import os, signal, time, train
original, times = {place}, []
def call(*args, **kw):
    times.append(1)
    if len(times) == {nth} and (RANK == 1 or {target == "all"}):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.3)
    return original(*args, **kw)
{place} = call
"""

    def arguments(out):
        flags = ["--val_every=2", "--val_packs=2", "--save_every=3", f"--val_data={shards}"]
        return one_stage(out, shards, *flags, steps=5)

    start = time.monotonic()
    assert zygote.run("train", arguments(tmp_path / "r"), 2, tmp_path / "1", code) == [0, 0], (
        tmp_path / "1"
    ).read_text()
    assert time.monotonic() - start < 60 and "stopped by a signal" in (tmp_path / "1").read_text()
    rows = log(tmp_path / "r")
    assert (
        checkpoint.read_progress(checkpoint.find_checkpoint(tmp_path / "r")).step
        == rows[-1]["step"]
        < 5
    )  # none is lost
    assert zygote.run("train", arguments(tmp_path / "r"), 2, tmp_path / "1") == [0, 0], (
        tmp_path / "1"
    ).read_text()
    whole = tmp_path.parent / "whole_of_signals"  # made once
    if not (whole / "alignment").exists():
        assert zygote.run("train", arguments(whole), 2, tmp_path / "2") == [0, 0]
    assert losses(whole) == losses(tmp_path / "r") and len(log(tmp_path / "r")) == 5
    assert [r.get("val_loss") for r in log(whole)] == [
        r.get("val_loss") for r in log(tmp_path / "r")
    ]


def workers_of(torchrun):
    found = subprocess.run(
        ["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in found]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_start_is_refused_by_name_and_orphans_of_a_dead_torchrun_end(
    zygote, shards, tmp_path
):
    arguments = one_stage(
        tmp_path / "r", shards, "--print_every=1", "--save_every=100000", steps=10**5
    )
    torchrun = launch("train.py", arguments, ranks=2)
    try:
        next(line for line in torchrun.stdout if line.startswith("alignment 2/"))
        workers, holder = workers_of(torchrun), (tmp_path / "r/lock").read_text()
        start = time.monotonic()
        assert (
            zygote.run("train", arguments, 1, tmp_path / "2") == [2]
            and time.monotonic() - start < 5
        )
        assert f"is in use by {holder}" in (tmp_path / "2").read_text() and len(workers) == 2
        torchrun.kill()
        end = time.monotonic() + 10
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(alive, workers)) and not list((tmp_path / "r").glob("checkpoints/step*"))
    finally:
        kill_tree(torchrun.pid)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_torchrun_itself_saves(shards, tmp_path, name):
    """As Slurm sends it; SIGUSR1 needs torchrun's --signals-to-handle, as the README says."""
    arguments = one_stage(
        tmp_path / "r", shards, "--print_every=1", "--save_every=100000", steps=10**5
    )
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
            "train.py",
            *map(str, arguments),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        next(line for line in torchrun.stdout if line.startswith("alignment 2/"))
        torchrun.send_signal(getattr(signal, name))
        assert "stopped by a signal after alignment" in torchrun.communicate(timeout=60)[0]
        assert (
            checkpoint.read_progress(checkpoint.find_checkpoint(tmp_path / "r")).step
            == log(tmp_path / "r")[-1]["step"]
        )
    finally:
        kill_tree(torchrun.pid)


# ---- numbers -------------------------------------------------------------------------------------
SPY = (
    FP64
    + """
import data, torch, train
from torch.distributed.tensor import DTensor
planned = train.stage_dataset
def of_eight_packs(cfg, stage, tokenizer, vision, packs_per_step, *args):
    return planned(cfg, stage, tokenizer, vision, 8, *args)
train.stage_dataset = of_eight_packs
batch_of = data.PackedDataset.__getitem__
def masked(self, pack):  # every second pack, so every second rank, asks nothing
    batch = batch_of(self, pack)
    if pack.position[2] % 2 == 0:
        batch["labels"].fill_(chat.IGNORE)
        batch["size"] |= dict(supervised=0, weight=0.0)
    return batch
data.PackedDataset.__getitem__ = masked
clip = optim.clip_grad_norm
def spy(model, max_norm):
    whole = {k: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
             for k, p in distributed.unwrap(model).named_parameters()}
    if RANK == 0:
        torch.save(whole, OUT)
    return clip(model, max_norm)
optim.clip_grad_norm = spy
"""
)
NODES = """
import os
os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(RANK % 2)}  # two nodes of two ranks
"""
MERGED = """
loader = train.make_loader
def merged(*args):
    while True:
        parts = [batch for _, batch in zip(range(8), loader(*args))]
        names = ("tokens", "labels", "positions", "weights", "tiles")
        whole = {k: torch.cat([p[k] for p in parts]) for k in names}
        whole["size"] = {k: sum(p["size"][k] for p in parts) for k in parts[0]["size"]}
        whole |= {k: sum((p[k] for p in parts), []) for k in ("ids", "bad", "lengths")}
        yield whole | {k: parts[-1][k] for k in ("position", "counts", "costs")}
train.make_loader = merged
"""


def test_gradients_of_ragged_micro_batches_equal_the_single_batch_on_every_layout(
    zygote, shards, tmp_path
):
    """With packs of pictures and of text alone, and ranks that have nothing supervised."""
    gradients = {}
    for ranks, accum, parallel in (
        (1, 1, "ddp"),
        (1, 8, "ddp"),
        (2, 4, "ddp"),
        (4, 2, "ddp"),
        (2, 4, "fsdp"),
        (4, 2, "hsdp"),
    ):
        name = f"{ranks}x{accum}-{parallel}"
        code = SPY + f"OUT = {str(tmp_path / name) + '.pt'!r}" + (MERGED if accum == 1 else "")
        if parallel == "hsdp":
            code = NODES + code
        arguments = one_stage(
            tmp_path / name,
            f"{shards},{Path(shards).parent}/text.jsonl",
            f"--parallel={parallel}",
            f"--grad_accum_steps={accum}",
            "--tokens_per_pack=150",
            "--loss_weight=sqrt",
            steps=1,
        )
        assert zygote.run("train", arguments, ranks, tmp_path / "1", code) == [0] * ranks, (
            tmp_path / "1"
        ).read_text()
        gradients[name] = torch.load(tmp_path / f"{name}.pt")
    want = gradients.pop("1x1-ddp")
    assert (
        all(g.dtype == torch.float64 and g.isfinite().all() for g in want.values())
        and min(g.abs().max() for g in want.values()) > 1e-6
    )
    assert {
        name: difference(got, want) < 1e-12 for name, got in gradients.items()
    } == dict.fromkeys(gradients, True)


TEXT_ONLY = """
planned_alone = train.stage_dataset
def mine(cfg, *args, **kw):  # rank 1 never sees a picture
    pictures, text = cfg.data.split(",")
    cfg.data = text if RANK == 1 else pictures
    return planned_alone(cfg, *args, **kw)
train.stage_dataset = mine
metrics.account = lambda *args: {}  # which adds up what all ranks plan alike
"""


@pytest.mark.parametrize(
    "parallel, frozen",
    [("ddp", False), pytest.param("fsdp", False, marks=pytest.mark.nightly), ("fsdp", True)],
)
def test_a_rank_without_pictures_hangs_nobody_and_changes_no_gradient(
    zygote, shards, tmp_path, parallel, frozen
):
    data = f"{shards},{Path(shards).parent}/text.jsonl"
    more = [f"--parallel={parallel}", "--tokens_per_pack=150"] + [
        "--alignment.lr_vision=0",
        "--alignment.lr_projector=0",
    ] * frozen
    code = "import train\n" + TEXT_ONLY
    assert zygote.run(
        "train", one_stage(tmp_path / "r", data, *more, steps=50), 2, tmp_path / "1", code
    ) == [0, 0]
    if frozen:
        return
    code = SPY.replace("% 2 == 0", "< 0") + TEXT_ONLY + f"OUT = {str(tmp_path / '2.pt')!r}"
    assert zygote.run(
        "train", one_stage(tmp_path / "2", data, *more, steps=1), 2, tmp_path / "1", code
    ) == [0, 0]
    # both packs in one process, where a pack without tiles runs no vision at all
    reference = (
        SPY.replace("% 2 == 0", "< 0")
        + f"OUT = {str(tmp_path / '1.pt')!r}"
        + """
import model
metrics.account = lambda *args: {}  # as in TEXT_ONLY
embed = model.VLM.embed
def bare(self, tokens, tiles):
    if len(tiles):
        return embed(self, tokens, tiles)
    return self.language_model.model.embed_tokens(tokens)
model.VLM.embed = bare
planned_both = train.stage_dataset
def both(cfg, *args, **kw):
    import copy
    pictures, text = cfg.data.split(",")
    packs = []
    for data in (pictures, text):
        cfg.data = data
        packs.append(planned_both(cfg, *args, **kw))
    packs[0].text = packs[1]
    return packs[0]
train.stage_dataset = both
loader = train.make_loader
def alternate(packs, rank, world, *args):
    for pair in zip(loader(packs, 0, 2, *args), loader(packs.text, 1, 2, *args)):
        yield from pair
train.make_loader = alternate
"""
    )
    arguments = one_stage(tmp_path / "3", data, *more, "--grad_accum_steps=2", steps=1)
    assert zygote.run("train", arguments, 1, tmp_path / "1", reference) == [0], (
        tmp_path / "1"
    ).read_text()
    got, want = torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "1.pt")
    assert difference(got, want) < 1e-6 and min(g.abs().max() for g in got.values()) > 0


NOT_FINITE = """
import train
inputs, count = train.model_inputs, []
def poisoned(batch, device):
    count.append(1)
    if len(count) in STEPS and WHERE in ("all", f"loss {RANK}"):
        batch["weights"] = batch["weights"] * float("nan")
    return inputs(batch, device)
train.model_inputs = poisoned
start = train.start_weights
def with_hook(model, *args):
    start(model, *args)
    weight = model.mlp1[1].weight
    def poison(g):
        return g * float("inf") if len(count) in STEPS and WHERE == f"gradient {RANK}" else g
    weight.register_hook(poison)
train.start_weights = with_hook
"""


@pytest.mark.parametrize(
    "where", ["loss 1", "gradient 0", pytest.param("all", marks=pytest.mark.nightly)]
)
def test_a_step_not_finite_on_any_rank_is_skipped_by_all_and_the_third_in_a_row_ends_the_run(
    zygote, shards, tmp_path, where
):
    out, code = tmp_path / "r", NOT_FINITE + f"WHERE = {where!r}\n"
    assert zygote.run(
        "train",
        one_stage(out, shards, "--save_every=1", steps=3),
        2,
        tmp_path / "1",
        code + "STEPS = [3]\n" + stop_at(3),
    ) == [0, 0]  # or it would not be saved
    rows = log(out)
    assert (
        rows[2]["loss" if where != "gradient 0" else "grad_norm"] is None
        and len(rows[2]["skipped"]) == rows[2]["samples"]
        and "skipped" not in rows[1]
    )
    a, b = read(out, 2), read(out, 3)  # weights, moments and their steps
    assert all(torch.equal(a[k], b[k]) for k in a)
    progress = checkpoint.read_progress(checkpoint.find_checkpoint(out))
    assert all(isinstance(x, float) for x in progress.losses) and progress.bad_steps == 1
    codes = zygote.run(
        "train",
        one_stage(tmp_path / "s", shards, "--save_every=1", steps=9),
        2,
        tmp_path / "2",
        code + "STEPS = [3, 5, 6, 7]",
    )
    assert codes == [2, 2] and "three steps in a row" in (tmp_path / "2").read_text()
    assert (
        len(log(tmp_path / "s")) == 7
        and checkpoint.find_checkpoint(tmp_path / "s").name == "step_00000004"
    )
    assert not (tmp_path / "s/alignment").exists()


def test_the_validation_loss_does_not_depend_on_ranks_or_sharding_and_changes_no_step(
    zygote, shards, tmp_path
):
    found = {}
    for ranks, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        out = tmp_path / f"{ranks}{parallel}"
        more = [
            f"--val_data={shards},{Path(shards).parent}/text.jsonl",
            "--val_every=2",
            "--val_packs=5",
            f"--parallel={parallel}",
            f"--grad_accum_steps={2 // ranks}",
        ]
        assert (
            zygote.run("train", one_stage(out, shards, *more, steps=3), ranks, tmp_path / "1")
            == [0] * ranks
        )
        rows = log(out)
        assert ["val_loss" in row for row in rows] == [False, True, True]  # and at the end
        found[ranks, parallel] = [row["val_loss"] for row in rows[1:]] + [
            row["loss"] for row in rows
        ]
    for values in found.values():
        assert values == pytest.approx(found[1, "ddp"], abs=1e-5)
    out = tmp_path / "without"
    assert zygote.run(
        "train", one_stage(out, shards, "--grad_accum_steps=2", steps=3), 1, tmp_path / "1"
    ) == [0]
    assert [row["loss"] for row in log(out)] == found[1, "ddp"][2:]
    parts = log(out)[-1]
    assert (
        sum(parts[f"{part}_s"] for part in ("data", "forward", "backward", "optimizer"))
        <= parts["seconds"]
    )


def test_a_checkpoint_after_a_validation_has_the_moments_of_one_without(zygote, shards, tmp_path):
    """FSDP holds whole weights after a forward pass without a backward pass."""
    tensors = []
    for name, more in (("without", []), ("with", [f"--val_data={shards}", "--val_packs=2"])):
        arguments = one_stage(
            tmp_path / name,
            shards,
            "--parallel=fsdp",
            "--save_every=2",
            "--val_every=2",
            *more,
            steps=3,
        )
        assert zygote.run("train", arguments, 2, tmp_path / "1") == [0, 0], (
            tmp_path / "1"
        ).read_text()
        tensors.append(read(tmp_path / name, 2))
    assert difference(*tensors) == 0
    assert all(t.any() for name, t in tensors[0].items() if name.endswith("mlp1.1.weight.exp_avg"))


def test_the_golden_curve_is_what_its_command_gives_and_two_ranks_meet_it(
    zygote, shards, tmp_path
):
    recorded = json.loads(golden.FILE.read_text())
    made = golden.make(tmp_path)
    out = tmp_path / "two"
    arguments = golden.flags(out, shards, ranks=2)
    assert zygote.run("train", arguments, 2, tmp_path / "output") == [0, 0]
    assert recorded.keys() == made.keys() and recorded["command"] == made["command"]
    same = recorded.items() >= golden.here().items()
    for curve in (made["loss"], golden.losses(out)):
        assert curve == pytest.approx(
            recorded["loss"], abs=golden.SAME if same else golden.TOLERANCE
        )


# ---- disk ----------------------------------------------------------------------------------------


def test_a_full_disk_costs_neither_the_run_nor_an_old_checkpoint_and_the_next_save_tries_again(
    zygote, shards, tmp_path
):
    code = """
import collections, resource, train
save, Usage = checkpoint.Saver.save, collections.namedtuple("Usage", "free")
def full(self, step, *args, **kw):
    # step 4: seen before; step 6: met while writing
    checkpoint.shutil.disk_usage = lambda path: Usage(1000 if step == 4 else 10 ** 12)
    limit = 20000 if step == 6 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, step, *args, **kw)
    checkpoint.concurrent.futures.wait([self.pending])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
checkpoint.Saver.save = full
"""
    out = tmp_path / "r"
    assert zygote.run(
        "train", one_stage(out, shards, "--save_every=2", steps=9), 2, tmp_path / "1", code
    ) == [0, 0]
    text = (tmp_path / "1").read_text()
    assert re.search(
        r"WARNING: NO CHECKPOINT: \S+/r/checkpoints: a checkpoint needs 0.00 GB, 0.00 GB are free",
        text,
    )
    assert "the checkpoint could not be written" in text and "is the disk full?" in text
    assert sorted(p.name for p in out.glob("checkpoints/*")) == [
        "latest",
        "step_00000002",
        "step_00000008",
    ]


def test_a_run_that_will_not_fit_on_the_disk_is_refused_before_the_first_step(
    zygote, shards, tmp_path
):
    code = """
import collections
Usage = collections.namedtuple("Usage", "free")
checkpoint.shutil.disk_usage = lambda path: Usage(9 * 10 ** 5)
"""
    assert zygote.run(
        "train", one_stage(tmp_path / "r", shards, "--save_every=1"), 1, tmp_path / "1", code
    ) == [2]
    text = (tmp_path / "1").read_text()
    assert (
        "error: " in text
        and "stage alignment with 3 more checkpoints and a model folder needs" in text
    )
    assert not (tmp_path / "r/log.jsonl").read_text()
