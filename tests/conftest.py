"""Where there is no GPU, Triton's kernels run in its interpreter.

It has to be told before they are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as td

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def zygote():
    """A process that has imported everything, of which ranks are forked."""
    from zygote import Zygote

    z = Zygote()
    yield z
    z.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Where toy data for pretraining lie, as a pattern."""
    from toy import __main__ as toy

    folder = tmp_path_factory.mktemp("shards")
    toy.write_parts(toy.Config(out=str(folder), n="60"), ["pretrain"])
    return f"{folder}/pretrain-*.tar"


@pytest.fixture
def process_group(tmp_path):
    """This process as the only rank of a group."""
    store = td.FileStore(str(tmp_path / "store"), 1)
    td.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    td.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """(folder, results) of stand_in.on_two_ranks, which two processes have run."""
    from stand_in import ALL, ALONE, ROOT, Progress, build, save, train

    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], [0, 1])
    save(folder / "none", 2, model, optimizer, Progress(step=2))
    env = dict(
        os.environ,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
        MASTER_PORT=str(20000 + os.getpid() % 20000),
        PYTHONPATH=str(ROOT),
    )
    script = Path(__file__).with_name("stand_in.py")
    jobs = []
    for rank in range(2):
        jobs.append(
            subprocess.Popen(
                [sys.executable, script, folder],
                stderr=subprocess.PIPE,
                text=True,
                env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)),
            )
        )
    errors = [job.communicate(timeout=180)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    return folder, torch.load(folder / "results.pt")
