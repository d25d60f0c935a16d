"""curation/watch.py: what an endpoint at fault refuses is not dropped, and is asked again."""
import collections
import hashlib
import json

import pytest
from curation_helpers import dropped_rows, png, run, run_well, write_tar
from toy_endpoint import Endpoint

from curation import watch
from evals import endpoint as endpoint_client

CAPTION = "A red cat sits on a mat."


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint_client, "WAIT_S", 0.001)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture
def server():
    """An endpoint with a settable reply and status; no request fails by itself."""
    found = Endpoint({}, 0, 0)
    found.reply = lambda sha256, prompt, temperature: (CAPTION, "stop")
    yield found
    found.server.shutdown()


def write_rows(folder, shards, rows):
    """Shards of so many rows each, all pictures different."""
    for k in range(shards):
        members = []
        for i in range(rows):
            members.append((f"{i}.png", png((i % 256, k, i // 256))))
            members.append((f"{i}.json", json.dumps({"id": f"{k}-{i}", "caption": "x"}).encode()))
        write_tar(folder / f"{k}.tar", members)


# {reason: (HTTP status, reply, why it ends) of an endpoint at fault}
FAULTS = {
    "http_400": (400, "", "stop"),
    "http_422": (422, "", "stop"),
    "refused": (200, "I'm sorry, I can't see it.", "stop"),
    "cut_off": (200, "a red", "length"),
    "stump": (200, "The picture shows a red cat,", "stop"),
    "no_valid_reply": (200, "", "stop"),
}


def answer_all(server, status=200, text=CAPTION, finish="stop"):
    """Let an endpoint give one answer to everything."""
    server.status = lambda sha256: status
    server.reply = lambda sha256, prompt, temperature: (text, finish)


@pytest.mark.parametrize("reason", FAULTS)
@pytest.mark.parametrize(("shards", "rows"), [(1, 1), (1, 12), (3, 5), (30, 3), (1, 200)])
def test_an_endpoint_that_refuses_everything_drops_nothing_and_is_asked_again(
    tmp_path, server, reason, shards, rows
):
    write_rows(tmp_path / "in", shards, rows)
    flags = ["annotate", f"--in={tmp_path}/in", f"--out={tmp_path}/out", "--endpoint_model=m",
             f"--endpoint={server.url}"]
    answer_all(server, *FAULTS[reason])
    code, text = run(*flags)
    assert code == 2, text
    line = text.splitlines()[-1]
    assert reason in line and "none of these rows is dropped" in line and server.url in line
    assert dropped_rows(tmp_path / "out") == []
    assert server.n_requests <= 5 * watch.USELESS_IN_A_ROW

    answer_all(server)
    report = run_well(*flags)
    assert report["out"] == shards * rows and report["dropped"] == {}
    # What was paid for in vain is in the bill.
    if not reason.startswith("http_"):
        assert report["replies"] > shards * rows


def test_an_endpoint_that_breaks_in_the_middle_is_noticed_and_what_it_answered_is_kept(
    tmp_path, server
):
    write_rows(tmp_path / "in", 4, 100)
    flags = ["annotate", f"--in={tmp_path}/in", f"--out={tmp_path}/out", "--endpoint_model=m",
             f"--endpoint={server.url}", "--threads=2"]

    def reply(sha256, prompt, temperature):
        return ("sorry" if server.n_requests > 130 else CAPTION), "stop"

    server.reply = reply
    code, text = run(*flags)
    assert code == 2 and "refused 50" in text
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1
    answer_all(server)
    report = run_well(*flags)
    assert report["out"] == 400
    # The good replies were kept, and what was useless was asked again.
    times_asked = collections.Counter(server.asked)
    assert len(times_asked) == 400
    assert all(times_asked[call] == 1 for call in server.asked[:120])


def test_pictures_that_are_refused_among_others_are_dropped_for_good(tmp_path, server):
    write_rows(tmp_path / "in", 3, 6)
    flags = ["annotate", f"--in={tmp_path}/in", f"--out={tmp_path}/out", "--endpoint_model=m",
             f"--endpoint={server.url}"]
    # All pictures of the first shard.
    refused = {hashlib.sha256(png((i, 0, 0))).hexdigest() for i in range(6)}
    server.status = lambda sha256: 400 if sha256 in refused else 200
    report = run_well(*flags)
    assert report["out"] == 12 and report["dropped"] == {"http_400": 6}
    asked = server.n_requests
    run_well(*flags)
    assert server.n_requests == asked


@pytest.mark.parametrize("reason", FAULTS)
def test_a_last_shard_of_rows_that_no_model_answers_is_made_all_the_same(tmp_path, server, reason):
    """The other shards are done, so no good reply of this run speaks for the endpoint."""
    flags = ["annotate", f"--in={tmp_path}/in", f"--out={tmp_path}/out", "--endpoint_model=m",
             f"--endpoint={server.url}"]
    write_rows(tmp_path / "in", 1, 6)
    run_well(*flags)
    write_rows(tmp_path / "in", 2, 3)
    (tmp_path / "in" / "0.tar").unlink()
    bad = {hashlib.sha256(png((i, 1, 0))).hexdigest() for i in range(3)}
    status, text, finish = FAULTS[reason]
    server.status = lambda sha256: status if sha256 in bad else 200

    def reply(sha256, prompt, temperature):
        return (text, finish) if sha256 in bad else (CAPTION, "stop")

    server.reply = reply
    code, printed = run(*flags)
    assert code == 0 and f"dropped {{'{reason}': 3}}" in printed
    # An endpoint that is at fault today was not at fault when it was asked before.
    write_rows(tmp_path / "in", 3, 4)
    (tmp_path / "in" / "0.tar").unlink()
    (tmp_path / "in" / "1.tar").unlink()
    answer_all(server, *FAULTS[reason])
    code, printed = run(*flags)
    assert code == 2 and f"nor of a question about a red square ({reason})" in printed
    assert len(dropped_rows(tmp_path / "out")) == 3


def test_a_text_too_long_for_the_endpoint_does_not_end_the_stage(tmp_path, server):
    rows = []
    for i in range(8):
        turns = [{"from": "human", "value": f"Why {i}?"}, {"from": "gpt", "value": "So."}]
        rows.append(json.dumps({"id": i, "conversations": turns}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def reply(sha256, prompt, temperature):
        server.status = lambda sha256: 400 if "Why 3?" in prompt else 200
        return "difficulty: 1\ncomplexity: 1\nrelevance: 1", "stop"

    server.reply = reply
    report = run_well("sft-quality", f"--in={tmp_path}/rows.jsonl", f"--out={tmp_path}/out",
                      f"--endpoint={server.url}", "--endpoint_model=m", "--threads=1")
    assert report["out"] == 7 and report["dropped"] == {"http_400": 1}
