"""train.py and sft.py: what trains, what is frozen, exact resume, honest refusals."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sft
import train
from toy import __main__ as toy

ROOT = Path(__file__).parent.parent
TINY = """
    --tokenizer=toy/tokenizer --seed=7 --threads=1 --num_workers=0 --dtype=float32
    --vision=toy --vision.dim=32 --vision.n_layers=1 --vision.n_heads=2 --vision.ffn_dim=64
    --llm=toy --llm.dim=32 --llm.n_layers=1 --llm.n_heads=2 --llm.n_kv_heads=1 --llm.head_dim=16
    --llm.ffn_dim=64 --max_tiles=4 --tokens_per_pack=300 --max_tiles_per_pack=20
""".split()


def argv(out, shards, *more, stages=("alignment", "advance"), steps=4, everything=False):
    """Flags of a tiny run. Pretraining freezes what it freezes, unless everything is to train."""
    lrs = {"alignment": ["projector"], "advance": ["vision", "projector"]}
    if everything:
        lrs = {}
    flags = [f"--{s}.steps={steps}" for s in stages] + [f"--stages={','.join(stages)}"]
    for s in stages:
        flags += [f"--{s}.lr_{m}=1e-3" for m in lrs.get(s, ["vision", "projector", "llm"])]
    if not any(str(flag).startswith("--data=") for flag in more):
        flags.append(f"--data={shards}")
    return [*TINY, f"--out_dir={out}", *flags, *more]


def run(script, arguments, monkeypatch):
    """The script's main in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, arguments)])
    script.main()


def launch(script, arguments, ranks=1, **kw):
    """The script as a user starts it; stderr is joined to stdout."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *torchrun, script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kw,
    )


def kill_tree(pid):
    """SIGKILL a process and all that descend from it, so that nobody can tidy up."""
    children = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True
    ).stdout.split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    for child in children:
        kill_tree(child)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def start(tmp_path_factory, shards):
    """A model folder that one step of no size has left as it was made."""
    out = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        run(
            train,
            argv(out, shards, "--alignment.lr_projector=1e-12", stages=("alignment",), steps=1),
            patch,
        )
    return out / "alignment"


def changed(before, after):
    """Which of the three modules' tensors changed: {module: {True, False}}."""
    a, b = weights(before), weights(after)
    assert a.keys() == b.keys()
    return {
        module: {not torch.equal(a[k], b[k]) for k in a if k.startswith(module + ".")}
        for module in ("vision_model", "mlp1", "language_model")
    }


def test_each_stage_of_pretraining_trains_what_it_says_and_leaves_the_rest_bit_identical(
    tmp_path, shards, start, monkeypatch, capsys
):
    # rates high enough to show in bfloat16
    arguments = argv(
        tmp_path / "run",
        shards,
        "--advance.lr_vision=1e-2",
        "--alignment.lr_projector=1e-2",
        "--advance.lr_projector=1e-2",
        f"--init_from={start}",
    )
    run(train, arguments, monkeypatch)
    assert changed(start, tmp_path / "run/alignment") == dict(
        vision_model={False}, mlp1={True}, language_model={False}
    )
    assert changed(tmp_path / "run/alignment", tmp_path / "run/advance") == dict(
        vision_model={True}, mlp1={True}, language_model={False}
    )
    rows = log(tmp_path / "run")
    assert [(r["stage"], r["step"]) for r in rows] == [
        (s, k + 1) for s in ("alignment", "advance") for k in range(4)
    ]
    assert rows[-1]["lr"].keys() == {"vision_model", "mlp1"} and rows[0]["lr"].keys() == {"mlp1"}
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert (
        about["origins"]["alignment.lr_projector"] == "command line"
        and about["origins"]["beta1"] == "default"
    )
    assert "changed since" not in capsys.readouterr().out
    run(train, [*arguments, "--beta2=0.5"], monkeypatch)  # finished: nothing is done again
    assert log(tmp_path / "run") == rows
    text = capsys.readouterr().out
    assert "settings that changed since this run was started: beta2: 0.95 -> 0.5" in text
    finished = f"advance: finished before, in {tmp_path / 'run/advance'}; "
    assert finished + "remove that folder to train it again" in text


def test_each_stage_of_fine_tuning_changes_every_tensor_and_what_it_freezes_stays_bit_identical(
    tmp_path, shards, start, monkeypatch
):
    stages = ("knowledge", "instruction", "preference")
    rates = [f"--{s}.lr_{m}=1e-2" for s in stages for m in ("vision", "projector", "llm")]
    run(
        sft,
        argv(tmp_path / "all", shards, *rates, f"--init_from={start}", stages=stages, steps=10),
        monkeypatch,
    )
    folders = [start, *(tmp_path / "all" / s for s in stages)]
    for before, after in zip(folders[:-1], stages, strict=True):
        assert changed(before, tmp_path / "all" / after) == dict.fromkeys(
            ("vision_model", "mlp1", "language_model"), {True}
        )
    run(
        sft,
        argv(
            tmp_path / "some",
            shards,
            *rates,
            "--knowledge.lr_vision=0",
            "--instruction.lr_llm=0",
            f"--init_from={start}",
            stages=stages[:2],
        ),
        monkeypatch,
    )
    assert changed(start, tmp_path / "some/knowledge") == dict(
        vision_model={False}, mlp1={True}, language_model={True}
    )
    assert changed(tmp_path / "some/knowledge", tmp_path / "some/instruction") == dict(
        vision_model={True}, mlp1={True}, language_model={False}
    )


def test_a_stopped_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path, shards, monkeypatch):
    run(train, argv(tmp_path / "whole", shards, steps=7), monkeypatch)
    for out, stop in (("term", signal.SIGTERM), ("kill", signal.SIGKILL)):
        arguments = argv(tmp_path / out, shards, "--save_every=1", steps=7)  # older ones are pruned
        slow = [*arguments, "--print_every=1"]
        process = launch("train.py", slow)
        for line in process.stdout:
            if line.startswith(("alignment 5/", "advance 3/")):
                process.send_signal(stop)
        assert process.wait(60) == (0 if stop == signal.SIGTERM else -9)
        run(train, arguments, monkeypatch)
        for stage in ("alignment", "advance"):
            got, want = weights(tmp_path / out / stage), weights(tmp_path / "whole" / stage)
            assert all(torch.equal(got[k], want[k]) for k in want), (out, stage)


def test_one_stage_after_the_other_gives_what_both_in_one_command_give(
    tmp_path, shards, monkeypatch
):
    run(train, argv(tmp_path / "both", shards, steps=6), monkeypatch)
    save = "--save_every=3"
    first = launch("train.py", argv(tmp_path / "each", shards, save, "--stages=alignment", steps=6))
    assert first.wait(60) == 0, first.stdout.read()
    slow = argv(tmp_path / "each", shards, save, "--print_every=1", "--stages=advance", steps=6)
    process, output = launch("train.py", slow), ""
    for line in process.stdout:
        output += line
        if line.startswith("advance 4/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, output
    numbers = sorted(path.name for path in (tmp_path / "each" / "checkpoints").glob("step_*"))
    assert numbers[-1] in ("step_00000010", "step_00000011")  # behind the six of alignment
    run(train, slow, monkeypatch)
    got, want = weights(tmp_path / "each" / "advance"), weights(tmp_path / "both" / "advance")
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.nightly), "fsdp"])
def test_two_ranks_under_torchrun_take_the_steps_of_one_process(
    tmp_path, shards, monkeypatch, parallel
):
    run(train, argv(tmp_path / "one", shards, "--grad_accum_steps=2"), monkeypatch)
    process = launch(
        "train.py", argv(tmp_path / parallel, shards, f"--parallel={parallel}"), ranks=2
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / parallel), strict=True):
        assert a["samples"] == b["samples"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    got, want = weights(tmp_path / parallel / "advance"), weights(tmp_path / "one" / "advance")
    assert (
        max((got[k].float() - want[k].float()).abs().max() for k in want) < 1e-2
    )  # stored in bfloat16


def test_sft_and_train_take_the_same_steps_with_the_same_settings(tmp_path, shards, monkeypatch):
    one = argv(tmp_path / "t", shards, stages=("alignment",), everything=True)
    run(train, one, monkeypatch)
    run(sft, argv(tmp_path / "s", shards, stages=("knowledge",)), monkeypatch)
    losses = [r["loss"] for r in log(tmp_path / "t")]
    assert losses == [r["loss"] for r in log(tmp_path / "s")] and len(losses) == 4


def test_the_loss_falls(tmp_path, shards, monkeypatch):
    run(
        sft,
        argv(tmp_path / "s", shards, "--knowledge.lr_llm=1e-2", stages=("knowledge",), steps=40),
        monkeypatch,
    )
    losses = [r["loss"] for r in log(tmp_path / "s")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_that_ends_or_fails_leaves_neither_thread_nor_worker(
    tmp_path, shards, monkeypatch, fails
):
    arguments = argv(tmp_path / "r", shards, "--num_workers=1", stages=("alignment",), steps=2)
    if fails:
        monkeypatch.setattr(train.optim, "clip_grad_norm", None)
        with pytest.raises(TypeError):
            run(train, arguments, monkeypatch)
    else:
        run(train, arguments, monkeypatch)
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learnin_rate=1"], "unknown"),
        (["--advance.lr_visoin=1"], "lr_vision"),
        (["--seed=abc"], "whole number"),
        (["--llm=toi"], "toy"),
        (["--stages=alignmnt"], "unknown stage 'alignmnt'"),
        (["--init_from=nowhere"], "nowhere is not a model folder"),
        (
            ["--init_from=toy/vit", "--dry_run=True"],
            "toy/vit is a vision encoder alone; convert.py assemble",
        ),
        (["--data=nowhere.jsonl"], "does not exist"),
        (["--data="], "no data"),
        (["config/nothing.py"], "config/nothing.py"),
        (["--llm.vocab_size=500"], "vocab_size"),
        (["--alignment.lr_projector=0", "--stages=alignment"], "trains nothing"),
        (["--template=sailvl"], "--template=sailvl: unknown"),
        (["--grad_accum_steps=0"], "grad_accum_steps=0 must be at least 1"),
        (["--max_steps=-1"], "max_steps=-1 must be at least 0"),
        (["--llm.n_heads=3", "--llm.n_kv_heads=2"], "3 heads do not divide over 2"),
        (["--vision.image_size=90"], "image_size 90 does not divide"),
    ],
)
def test_a_mistake_gets_one_clear_line_and_writes_no_weights(
    tmp_path, shards, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *argv(tmp_path / "run", shards, *arguments)])
    from configurator import run_script as guarded

    with pytest.raises(SystemExit) as stop:
        guarded(train.main)
    error = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2
        and error.startswith("error: ")
        and message in error
        and "\n" not in error
    )
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("step_*"))


def test_the_folder_of_a_run_is_no_start(tmp_path, shards, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()  # that never came to a checkpoint
    with pytest.raises(ValueError, match="run is not a model folder: .*of a run are RUN/STAGE"):
        run(train, argv(tmp_path / "a", shards, f"--init_from={tmp_path / 'run'}"), monkeypatch)


def test_a_checkpoint_or_folder_of_another_shape_is_refused(tmp_path, shards, monkeypatch):
    run(train, argv(tmp_path / "a", shards, stages=("alignment",)), monkeypatch)
    with pytest.raises(ValueError, match="llm.n_layers=2.*has 1"):
        run(
            train,
            argv(tmp_path / "b", shards, f"--init_from={tmp_path}/a/alignment", "--llm.n_layers=2"),
            monkeypatch,
        )
    run(train, argv(tmp_path / "c", shards, "--save_every=2", stages=("alignment",)), monkeypatch)
    import shutil

    # as a run leaves it that is killed before it writes the model folder
    shutil.rmtree(tmp_path / "c" / "alignment")
    (tmp_path / "c" / "finished.json").unlink()
    with pytest.raises(ValueError, match="does not fit this model"):
        run(
            train,
            [*argv(tmp_path / "c", shards, stages=("alignment",)), "--llm.dim=64"],
            monkeypatch,
        )
    with pytest.raises(ValueError, match="holds an earlier run"):
        run(
            train,
            argv(tmp_path / "c", shards, "--resume=never", stages=("alignment",)),
            monkeypatch,
        )


def test_other_data_under_a_checkpoint_are_refused(tmp_path, shards, monkeypatch):
    run(train, argv(tmp_path / "a", shards, "--save_every=2", stages=("alignment",)), monkeypatch)
    import shutil

    # as a run leaves it that is killed before it writes the model folder
    shutil.rmtree(tmp_path / "a" / "alignment")
    (tmp_path / "a" / "finished.json").unlink()
    toy.write_parts(toy.Config(out=str(tmp_path), n="50"), ["pretrain"])
    with pytest.raises(
        ValueError,
        match="data of stage alignment, their order or the size of packs and steps changed",
    ):
        run(train, argv(tmp_path / "a", f"{tmp_path}/*.tar", stages=("alignment",)), monkeypatch)


def test_the_data_of_a_stage_go_first_and_a_flag_that_would_be_lost_is_refused(
    tmp_path, shards, monkeypatch
):
    arguments = argv(
        tmp_path / "r", shards, f"--advance.data={shards.replace('*', '000000')}", "--max_steps=1"
    )
    run(
        train,
        [a for a in arguments if not a.startswith("--data=")] + [f"--alignment.data={shards}"],
        monkeypatch,
    )
    (tmp_path / "c.py").write_text("advance.data = 'other.jsonl'")
    with pytest.raises(ValueError, match="--advance.data=PATH"):
        run(train, [tmp_path / "c.py", *argv(tmp_path / "s", shards)], monkeypatch)


def test_unreadable_samples_are_named_and_a_rotten_source_stops_the_run(tmp_path, monkeypatch):
    toy.write_parts(toy.Config(out=str(tmp_path), n="30"), ["pretrain"])
    (tmp_path / "rows.jsonl").write_text(
        '{"broken\n' * 101
        + json.dumps(
            {
                "id": "x",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            }
        )
        + "\n"
    )
    with pytest.raises(ValueError, match="unreadable samples"):
        run(
            train,
            argv(tmp_path / "r", f"{tmp_path}/pretrain-000000.tar,{tmp_path}/rows.jsonl"),
            monkeypatch,
        )
    bad = [json.loads(line) for line in (tmp_path / "r/bad_samples.jsonl").read_text().splitlines()]
    assert len(bad) == 101 and bad[0]["source"] == "rows" and "JSON" in bad[0]["reason"]
