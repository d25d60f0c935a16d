"""curate.py as a whole: nothing is lost or paid twice, whatever is killed; mistakes explained."""
import collections
import hashlib
import json
import random
import time

import pytest
from curation_helpers import (
    FORK,
    SHARED,
    TOY_PROMPTS,
    dropped_rows,
    make_small_collection,
    run,
    run_in_a_process,
    run_well,
    stage_files,
    write_web,
)
from rows import sources_of
from toy_endpoint import Endpoint, read_shards

from evals import endpoint as endpoint_client


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint_client, "WAIT_S", 0.01)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small_collection(tmp_path_factory.mktemp("small"))


# ---- kills ---------------------------------------------------------------------------------------


def call_key(call):
    """The key under which the reply to a request is kept."""
    sha256, prompt, temperature = call
    return hashlib.sha256(json.dumps(["m", prompt, temperature, sha256]).encode()).hexdigest()


def reply_keys(out):
    """Keys of all replies that are written down; half a line is none."""
    keys = set()
    for path in out.glob("replies/*.jsonl"):
        lines = path.read_bytes().splitlines()
        keys |= {json.loads(line)["key"] for line in lines if line.endswith(b"}")}
    return keys


def run_and_kill(endpoint, kills, argv, out):
    """Run a stage in fresh processes, each but the last killed by SIGKILL.

    Returns how many replies were asked for again, and how many of those were written down before.
    """
    start = len(endpoint.asked)
    kept = []  # after each kill: requests so far, keys of the replies on the disk
    for k in range(kills):
        before = len(endpoint.asked)
        process = FORK.Process(target=run_in_a_process, args=(argv,))
        process.start()
        step = random.Random(k).randint(5, 30)
        while process.is_alive() and len(endpoint.asked) < before + step:
            time.sleep(0.002)
        assert process.is_alive(), f"it ended before kill {k + 1}"
        process.kill()
        process.join()
        time.sleep(0.05)  # requests under way arrive at the endpoint
        kept.append((len(endpoint.asked), reply_keys(out)))
    process = FORK.Process(target=run_in_a_process, args=(argv,))
    process.start()
    process.join()
    assert process.exitcode == 0

    times_asked = collections.Counter(endpoint.asked[start:])
    again = sum(n - 1 for n in times_asked.values())
    written = 0
    for at, keys in kept:
        written += sum(call_key(call) in keys for call in set(endpoint.asked[at:]))
    return again, written


def run_chain(truth, collected, folder, kills):
    """annotate, score and filter into a folder, with failing requests and kills -> reports."""
    endpoint = Endpoint(truth, delay=0.002)
    ask = [f"--endpoint={endpoint.url}", "--endpoint_model=m", "--threads=4"]
    reports = {}
    for stage, source, flags in (
        ("annotate", collected, [f"--prompts={TOY_PROMPTS}"]),
        ("score", folder / "annotate", []),
    ):
        out = folder / stage
        argv = [stage, f"--in={source}", f"--out={out}", *ask, *flags]
        before = len(endpoint.asked)
        if kills:
            again, written = run_and_kill(endpoint, kills, argv, out)
            # Only what was on its way when the process was killed.
            assert written == 0 and again <= 4 * kills
        else:
            run_well(*argv)
            assert max(collections.Counter(endpoint.asked[before:]).values()) == 1

        # The same command again asks nothing.
        calls = len(endpoint.asked)
        code, text = run(*argv)
        assert code == 0 and "nothing new to do" in text and len(endpoint.asked) == calls
        reports[stage] = run_well(*argv)
    run_well(
        "filter",
        f"--in={folder}/score",
        f"--out={folder}/filter",
        "--min_words=1",
        "--max_repetition=1",
        "--min_richness=2",
    )
    endpoint.server.shutdown()
    return reports


@pytest.mark.parametrize(
    ("rows", "kills"), [(240, 2), pytest.param(2000, 10, marks=pytest.mark.nightly)]
)
def test_r29_a_chain_with_failures_and_kills_gives_the_same_shards_and_pays_for_nothing_twice(
    tmp_path, rows, kills
):
    truth = write_web(tmp_path / "web", rows, rows // 4)
    collected = tmp_path / "c"
    report = run_well("collect", f"--in={tmp_path}/web", f"--out={collected}", "--min_side=8")
    assert report["out"] == rows
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    reports = run_chain(truth, collected, whole, 0)
    run_chain(truth, collected, killed, kills)
    for stage in ("annotate", "score", "filter"):
        assert stage_files(whole / stage) == stage_files(killed / stage), stage
    dropped = reports["annotate"]["dropped"]
    assert dropped["refused"] == dropped["cut_off"] == 1 and dropped["no_valid_reply"] >= 1

    # Each row is exactly one of done and dropped.
    ids = [row["id"] for row in read_shards(collected)]
    done = [row["id"] for row in read_shards(killed / "annotate")]
    lost = [row["id"] for row in dropped_rows(killed / "annotate")]
    assert sorted(done + lost) == sorted(ids) and len(set(ids)) == rows
    # No row has a part of a judge's answer.
    for row in read_shards(killed / "score"):
        assert row["scores"] == {"richness": 5, "alignment": 5}
        assert row["by"] == {"annotate": "m", "score": "m"}
        assert row["alt_text"] == "some shapes" and row["caption"] == truth[row["sha256"]]
        question = row["conversations"][0]["value"]
        assert question == "<image>\nDescribe the image.\nsome shapes"
    # The reference captions are training data.
    sources = sources_of(f"{killed}/annotate/*.tar")
    assert sum(len(source.rows) for source in sources) == len(done)
    assert not any(source.meta["bad"] for source in sources)


# ---- real pictures -------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (SHARED / "data").exists(), reason="the real pictures are not part of this repository"
)
def test_real_photos_go_through_collect_dedup_and_report(tmp_path, monkeypatch):
    photos = SHARED / "data" / "photos"
    rows = [json.loads(line) for line in (photos / "photos.jsonl").read_text().splitlines()][:60]
    for row in rows:
        row["image"] = str(photos / row["image"])
    (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    sets = f"--in={tmp_path}/photos.jsonl,{SHARED}/data/documents"
    report = run_well("collect", sets, f"--out={tmp_path}/c")
    assert report["out"] >= 68 and report["in"] == 70
    unique = run_well("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")
    assert unique["out"] >= 0.98 * report["out"]
    numbers = run_well("report", f"--in={tmp_path}/d", f"--out={tmp_path}/r", "--pictures=5")
    assert list(numbers["Diversity"].values())[0]["unique_1grams"] > 150


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], "usage: python curate.py collect|dedup|"),
        (["collect", "--in=nowhere.tar", "--out={t}/x"], "does not exist"),
        (["collect", "--in={f}/web"], "--out=DIR"),
        (["collect", "--in=", "--out={t}/x"], "nothing to read"),
        (["collect", "--in={f}/web", "--out={f}/web"], "holds the input"),
        (["dedup", "--in={f}/web", "--out={t}/x"], "collect` first"),
        (["annotate", "--in={f}/c", "--out={t}/x"], "give --model=FOLDER, or --endpoint"),
        (
            ["annotate", "--in={f}/c", "--out={t}/x", "--endpoint=localhost", "--endpoint_model=m"],
            "http://",
        ),
        (["collect", "--in={f}/web,{f}/web", "--out={t}/x"], "two inputs are called"),
        (["collect", "--in={f}/web", "--out={f}/c", "--min_side=9"], "another min_side"),
        (["recaption", "--in={f}/c", "--out={t}/x", "--model={f}/c"], "no *.safetensors"),
        (["dedup", "--in={f}/c", "--out={t}/x", "--distance=50"], "give 0 to 40"),
        (["select", "--in={f}/c", "--clusters=0"], "at least 1"),
        (["collect", "--in=1.tar", "--in=2.tar"], "in quotes"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_to_do(small, tmp_path, argv, words):
    code, text = run(*[word.format(f=small[0], t=tmp_path) for word in argv])
    assert code == 2 and text.startswith("error: "), text
    assert text.count("\n") == 1 and words in text, text
