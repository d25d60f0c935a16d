"""What only a GPU can show: the kernels inside the model, compiled blocks, CUDA graphs, NCCL.

`make gpu` runs it.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from test_train import argv, log, weights

from bench import samples as bench
from generate import generate
from model_config import config_json
from training import distributed
from training.compile import compile_blocks
from weights import load_folder, save_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def toy(dtype=torch.bfloat16, stage="sft"):
    """-> model, optimizer and a pack of the toy size on the GPU."""
    model, optimizer = bench.build_model("toy", stage, dtype, CUDA)
    model.init_weights(0)
    return model, optimizer, bench.pack_samples(*bench.random_samples("toy"), CUDA)


def gradients(model, batch, dtype):
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = model(**batch) / 100
    loss.backward()
    return [loss.detach().float(), *(p.grad.float() for p in model.parameters())]


def error(ours, exact):
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
        for a, b in zip(ours, exact, strict=True)
    )


@pytest.mark.parametrize("path", ["triton", "varlen"])
def test_the_model_on_packed_kernels_errs_at_most_twice_as_much_as_on_pytorchs(monkeypatch, path):
    model, _, batch = toy()
    monkeypatch.setenv("ATTENTION", "reference")
    exact, theirs = gradients(model, batch, torch.float32), gradients(model, batch, torch.bfloat16)
    monkeypatch.setenv("ATTENTION", path)
    ours = gradients(model, batch, torch.bfloat16)
    assert error(ours, exact) <= 2 * error(theirs, exact), (
        error(ours, exact),
        error(theirs, exact),
    )


def test_compiled_blocks_err_at_most_twice_as_much_as_eager_ones_and_new_packs_compile_nothing():
    model, _, batch = toy()
    exact, eager = gradients(model, batch, torch.float32), gradients(model, batch, torch.bfloat16)
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    ours = gradients(compiled, batch, torch.bfloat16)
    assert error(ours, exact) <= 2 * error(eager, exact), (error(ours, exact), error(eager, exact))
    graphs = torch._dynamo.utils.counters["stats"]
    gradients(
        compiled, bench.pack_samples(*bench.random_samples("toy", 1), CUDA), torch.bfloat16
    )  # its sizes go free
    before = graphs["unique_graphs"]
    for seed in range(2, 12):
        gradients(
            compiled, bench.pack_samples(*bench.random_samples("toy", seed), CUDA), torch.bfloat16
        )
    assert graphs["unique_graphs"] == before, (
        f"{graphs['unique_graphs'] - before} graphs compiled for ten more packs"
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_by_cuda_graphs_says_what_decoding_on_the_cpu_says(tmp_path, compiled):
    model, _, _ = toy(torch.float32)
    config = config_json(bench.VISION_TOY, bench.LLM_TOY, torch.float32)
    save_folder(model.state_dict(), config, tmp_path / "model", bench.TOKENIZER_FOLDER)
    g, image = torch.Generator().manual_seed(0), model.image_token_id
    size, n = model.vision.image_size, model.vision.tokens_per_tile
    tiles = torch.randint(0, 256, (9, 1, 3, size, size), generator=g).byte()
    prompts = [
        [image] * n + torch.randint(0, 1000, (5 + 70 * i,), generator=g).tolist() for i in range(9)
    ]
    said = [
        generate(
            load_folder(tmp_path / "model", device, torch.float32)[0].eval(),
            prompts,
            tiles,
            40,
            {7},
            batch_size=4,
            compiled=compiled and device == CUDA,
        )
        for device in (torch.device("cpu"), CUDA)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_over_nccl_is_the_step_of_one_process(parallel, monkeypatch):
    for name, value in dict(
        RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=29411
    ).items():
        monkeypatch.setenv(name, str(value))
    model, _, batch = toy(torch.float32)
    exact = gradients(model, batch, torch.float32)
    dist = distributed.setup_distributed("cuda")
    try:
        spread = distributed.parallelize(copy.deepcopy(model), parallel, torch.float32, dist)
        spread.train()
        (spread(**batch) / 100).backward()
        full = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in spread.parameters()]
        assert error(full, exact[1:]) <= 1e-5
    finally:
        distributed.close_distributed()


# ---- whole runs ----------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
# Waits for the first checkpoint at the end of step 5, and dies.
KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "")
import train
from training import signals
note = signals.Watchdog.note
def note_or_die(self, text):
    note(self, text)
    if text.startswith("alignment step 5: samples"):
        while not list(self.path.parent.parent.glob("checkpoints/step_*/manifest.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
signals.Watchdog.note = note_or_die
train.main()
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return golden.write_data(tmp_path_factory.mktemp("shards"))


def run_train(out, shards, *more, steps, code=None):
    """train.py on the GPU, one stage in which all trains -> its exit code."""
    flags = argv(out, shards, "--device=cuda", *more, stages=("alignment",), steps=steps,
                 everything=True)
    script = ["-c", code] if code else ["train.py"]
    return subprocess.run([sys.executable, *script, *flags], cwd=ROOT).returncode


def test_a_run_that_was_killed_on_a_gpu_goes_on_with_the_same_bits(tmp_path, shards):
    flags = ["--dtype=bfloat16", "--save_every=3", "--grad_accum_steps=2", "--num_workers=2"]
    assert run_train(tmp_path / "whole", shards, *flags, steps=8) == 0
    assert run_train(tmp_path / "killed", shards, *flags, steps=8, code=KILLED) == -9
    assert list((tmp_path / "killed").glob("checkpoints/step_*/manifest.json"))
    assert run_train(tmp_path / "killed", shards, *flags, steps=8) == 0
    whole = weights(tmp_path / "whole" / "alignment")
    resumed = weights(tmp_path / "killed" / "alignment")
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different
    # a step that was done again has a second row
    losses = [
        {row["step"]: row["loss"] for row in log(tmp_path / name)} for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


def test_the_golden_curve_of_fifty_steps_is_met_on_a_gpu(tmp_path, shards):
    flags = golden.flags(tmp_path / "run", shards, "--device=cuda")
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True)
    curve = json.loads(golden.FILE.read_text())["loss"]
    assert golden.losses(tmp_path / "run") == pytest.approx(curve, abs=golden.TOLERANCE)
