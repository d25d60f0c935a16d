"""curation/ranks.py: any number of ranks make the same shards, whatever is killed."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from curation_helpers import (
    ROOT,
    TOY_PROMPTS,
    encoded,
    make_small_collection,
    run,
    run_well,
    scene,
    stage_files,
    write_tar,
)
from test_curate import call_key, reply_keys
from test_dedup import plant_duplicates
from toy_endpoint import Endpoint

from curation.ranks import Ranks, connected
from inputs.locks import take_lock

# Each stage needs the one before it.
STAGES = {
    "collect": ["--min_side=8"],
    "dedup": ["--by=both"],
    "select": ["--n=40", "--clusters=3"],
    "filter": ["--min_words=0", "--max_ngram_share=0.5"],
}


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Pictures with duplicates in four shards."""
    folder = tmp_path_factory.mktemp("web")
    plant_duplicates(folder)
    return folder


def arguments(stage, source, out):
    return [stage, f"--in={source}", f"--out={out}", *STAGES[stage]]


@pytest.fixture(scope="module")
def alone(web, tmp_path_factory):
    """What one process makes of it: {stage: folder}."""
    base = tmp_path_factory.mktemp("alone")
    source = web
    for stage in STAGES:
        run_well(*arguments(stage, source, base / stage))
        source = base / stage
    return {"web": web, **{stage: base / stage for stage in STAGES}}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same_shards(alone, zygote, tmp_path, n_ranks):
    source = alone["web"]
    for stage in STAGES:
        words = arguments(stage, source, tmp_path / stage)
        codes = zygote.run("curate", words, n_ranks, tmp_path / "printed")
        assert codes == [0] * n_ranks, (tmp_path / "printed").read_text()
        assert stage_files(tmp_path / stage) == stage_files(alone[stage]), stage
        source = alone[stage]
    # One report for all ranks.
    lines = (tmp_path / "printed").read_text().splitlines()
    assert sum(line.startswith("collect: 5 of 5 shards") for line in lines) == 1


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_are_killed_at_any_moment_leave_the_same_shards(
    alone, zygote, tmp_path, stage, n_kills
):
    """torchrun ends the other ranks when one dies, and starts all again."""
    source = alone[[*alone][[*alone].index(stage) - 1]]
    words = arguments(stage, source, tmp_path / "out")
    rng = random.Random(n_kills)
    for k in range(n_kills):
        pids = zygote.start("curate", words, 2, tmp_path / f"killed{k}")
        time.sleep(rng.uniform(0.05, 1.5))
        zygote.kill(pids[::-1])
        zygote.wait(pids)
    assert zygote.run("curate", words, 2, tmp_path / "last") == [0, 0], (
        tmp_path / "last").read_text()
    assert stage_files(tmp_path / "out") == stage_files(alone[stage])


ASKING = {
    "annotate": ["--endpoint_model=m", f"--prompts={TOY_PROMPTS}"],
    "score": ["--endpoint_model=m"],
    "recaption": [f"--prompts={TOY_PROMPTS}", "--max_new_tokens=6", "--dtype=float32"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small_collection(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("n_kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("stage", ASKING)
def test_ranks_that_are_killed_while_they_ask_ask_nothing_twice_and_lose_nothing(
    small, zygote, tmp_path, stage, n_kills
):
    """No reply that is written down is asked for again; the shards are those of one process."""
    folder, truth = small
    endpoint = Endpoint(truth, fail=0, delay=0.05)
    asked = f"--model={folder}/model" if stage == "recaption" else f"--endpoint={endpoint.url}"
    words = [stage, f"--in={folder}/c", "--threads=2", asked, *ASKING[stage]]
    report = run_well(*words, f"--out={tmp_path}/alone")
    n_asked = len(endpoint.asked)

    out = tmp_path / "out"
    rng = random.Random(n_kills)
    written = set()
    for k in range(n_kills):
        pids = zygote.start("curate", [*words, f"--out={out}"], 2, tmp_path / f"killed{k}")
        time.sleep(rng.uniform(0.3, 1.2))
        zygote.kill(pids[::-1])
        zygote.wait(pids)
        assert reply_keys(out) >= written
        written = reply_keys(out)
        time.sleep(0.2)  # requests under way arrive at the endpoint
        so_far = len(endpoint.asked)
    last = zygote.run("curate", [*words, f"--out={out}"], 2, tmp_path / "last")
    assert last == [0, 0], (tmp_path / "last").read_text()
    assert stage_files(out) == stage_files(tmp_path / "alone")
    # Every reply stands there once, and none of those from before was asked for at the end.
    replies = b"\n".join(path.read_bytes() for path in out.glob("replies/*.jsonl"))
    n_written = sum(line.endswith(b"}") for line in replies.splitlines())
    assert len(reply_keys(out)) == report["replies"] == n_written
    assert not written & {call_key(call) for call in endpoint.asked[so_far:]}
    # Of each kill, what its two ranks with two threads had under way.
    assert len(endpoint.asked) - 2 * n_asked <= 4 * n_kills
    endpoint.server.shutdown()


def test_the_ranks_of_a_torchrun_that_is_killed_end_and_the_next_one_goes_on(small, tmp_path):
    """Else they would work in the folder beside those of the next one."""
    folder, truth = small
    endpoint = Endpoint(truth, fail=0, delay=0.5)
    words = ["annotate", f"--in={folder}/c", f"--out={tmp_path}/out", "--threads=1",
             f"--endpoint={endpoint.url}", *ASKING["annotate"]]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "curate.py", *words]
    with open(tmp_path / "printed", "w") as printed:
        torchrun = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: len(endpoint.asked) >= 2)
    endpoint.delay = 600  # of all further replies: ranks that live on wait for them
    time.sleep(1)
    ranks = children_of(torchrun.pid)
    torchrun.send_signal(signal.SIGKILL)
    torchrun.wait()
    wait_until(lambda: not any(is_running(pid) for pid in ranks))
    wait_until(lambda: can_be_locked(tmp_path / "out" / ".shards" / "lock"))
    endpoint.delay = 0
    code, text = run(*words)
    assert len(ranks) == 2 and code == 0, text
    endpoint.server.shutdown()


def wait_until(holds, timeout=120):
    end = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def can_be_locked(path):
    """Not at once: threads of a process that was killed may hold its files a little longer."""
    file, _ = take_lock(path)
    if file:
        file.close()
    return file is not None


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_running(pid):
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_empty_shards_and_ranks_without_a_shard_stop_no_stage(zygote, tmp_path):
    """Four ranks and two shards, of which one holds nothing."""
    rng = np.random.default_rng(2)
    members = [(f"{k}.png", encoded(scene(rng, 70), format="PNG")) for k in range(6)]
    write_tar(tmp_path / "web" / "0.tar", [])
    write_tar(tmp_path / "web" / "1.tar", members)
    source = tmp_path / "web"
    for stage in STAGES:
        words = arguments(stage, source, tmp_path / stage)
        codes = zygote.run("curate", words, 4, tmp_path / "printed")
        assert codes == [0] * 4, (tmp_path / "printed").read_text()
        source = tmp_path / stage
    assert "filter: 2 of 2 shards" in (tmp_path / "printed").read_text()


def test_a_damaged_shard_costs_itself_and_is_told_of_once_for_all_ranks(zygote, alone, tmp_path):
    web = tmp_path / "web"
    shutil.copytree(alone["web"], web)
    path = web / "040.tar"
    path.write_bytes(path.read_bytes()[:-20000])
    words = arguments("collect", web, tmp_path / "collect")
    codes = zygote.run("curate", words, 2, tmp_path / "printed")
    assert sorted(codes)[-1] == 2
    printed = (tmp_path / "printed").read_text()
    assert printed.count("left out: ") == 1 and "4 shards are whole" in printed
    words = arguments("dedup", tmp_path / "collect", tmp_path / "dedup")
    assert zygote.run("curate", words, 2, tmp_path / "again") == [0, 0]


def test_a_second_run_in_a_folder_is_refused_in_one_line(alone, zygote, tmp_path):
    words = arguments("collect", alone["web"], tmp_path / "out")
    (tmp_path / "out" / ".shards").mkdir(parents=True)
    lock, _ = take_lock(tmp_path / "out" / ".shards" / "lock")
    with lock:
        code, text = run(*words)
        assert code == 2 and "another run is at work in" in text and "torchrun" in text
        assert zygote.run("curate", words, 2, tmp_path / "printed") == [2, 2]
    errors = (tmp_path / "printed").read_text()
    assert errors.count("error: another run is at work in") == 1
    assert zygote.run("curate", words, 2, tmp_path / "again") == [0, 0]


def test_rows_that_pairs_connect_get_the_lowest_row_that_they_reach():
    rng = np.random.default_rng(5)
    n = 300
    pairs = rng.integers(0, n, (170, 2))
    label = connected(Ranks(), np.array([0, n]), pairs[:, 0], pairs[:, 1])
    reach = np.eye(n, dtype=bool)
    reach[pairs[:, 0], pairs[:, 1]] = True
    reach |= reach.T
    for _ in range(9):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    assert label.tolist() == reach.argmax(1).tolist()
