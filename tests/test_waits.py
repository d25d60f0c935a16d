"""evals/endpoint.py: a busy endpoint is waited for, as long as it says, and not for ever."""
import email.utils
import threading
import time
import urllib.error

import pytest

from evals import endpoint


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the waits; [seconds of each of them]."""
    waits = []
    now = 1_700_000_000.0

    def wait(self, seconds, problem):
        waits.append(seconds)

    monkeypatch.setattr(endpoint.ChatClient, "_wait", wait)
    monkeypatch.setattr(endpoint.time, "time", lambda: now + sum(waits))
    return waits


def fail(status, **headers):
    """What urlopen raises."""
    message = email.message_from_string("".join(f"{k}: {v}\n" for k, v in headers.items()))
    return urllib.error.HTTPError("http://x/v1", status, "Too Many Requests", message, None)


def client_of(monkeypatch, tmp_path, answers):
    """A client whose endpoint gives these answers, the last one for ever; exceptions are raised."""
    answers = list(answers)

    def send(call):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {"reply": answer, "finish": "stop", "usage": {}}

    monkeypatch.setattr(endpoint, "send", send)
    return endpoint.ChatClient("http://x/v1", "m", tmp_path / "r.jsonl")


def test_a_busy_endpoint_is_waited_for_minutes_before_the_run_stops(monkeypatch, tmp_path, clock):
    client = client_of(monkeypatch, tmp_path, [fail(429)])
    with pytest.raises(ValueError, match="HTTP 429.*run again to go on"):
        client.entry("q", 0)
    assert clock[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert 600 <= sum(clock) <= 900


def test_after_ten_busy_minutes_an_answer_is_still_taken(monkeypatch, tmp_path, clock):
    client = client_of(monkeypatch, tmp_path, [fail(429)] * 15 + ["yes"])
    assert client.entry("q", 0)["reply"] == "yes"
    assert sum(clock) > 600


@pytest.mark.parametrize("status", [429, 503, 529])
def test_retry_after_is_honoured_in_seconds_and_as_a_date(monkeypatch, tmp_path, clock, status):
    date = email.utils.formatdate(1_700_000_000 + 25 + 300, usegmt=True)
    answers = [fail(status, **{"Retry-After": "25"}), fail(status, **{"Retry-After": date}), "yes"]
    client = client_of(monkeypatch, tmp_path, answers)
    assert client.entry("q", 0)["reply"] == "yes"
    assert clock == [25, 300]


@pytest.mark.parametrize(
    "text",
    ["", "soon", "-5", "nan", "inf", "1e9", "0", "٣", "Tue, 99 Foo 2024 00:00:00", "\x1b[2J"],
)
def test_a_retry_after_that_means_nothing_neither_hammers_nor_hangs(
    monkeypatch, tmp_path, clock, text
):
    client = client_of(monkeypatch, tmp_path, [fail(429, **{"Retry-After": text})])
    with pytest.raises(ValueError, match="HTTP 429"):
        client.entry("q", 0)
    assert clock[:3] == [1, 2, 4] and sum(clock) <= 900


def test_who_asks_for_more_than_a_run_waits_is_told_at_once(monkeypatch, tmp_path, clock):
    client = client_of(monkeypatch, tmp_path, [fail(429, **{"Retry-After": "86400"})])
    with pytest.raises(ValueError, match="it asks to wait 86400 s.*run again to go on"):
        client.entry("q", 0)
    assert clock == []


def test_an_absent_endpoint_is_still_tried_six_times(monkeypatch, tmp_path, clock):
    client = client_of(monkeypatch, tmp_path, [OSError("no route")])
    with pytest.raises(ValueError, match="no route"):
        client.entry("q", 0)
    assert clock == [1, 2, 4, 8, 16]


def test_a_long_wait_is_told_once_and_ends_when_another_request_fails(
    monkeypatch, tmp_path, capsys
):
    waiting = threading.Event()

    def send(call):
        if b"busy" in call.data:
            waiting.set()
            raise fail(429, **{"Retry-After": "600"})
        waiting.wait()
        time.sleep(0.05)
        raise fail(401)

    monkeypatch.setattr(endpoint, "send", send)
    client = endpoint.ChatClient("http://x/v1", "m", tmp_path / "r.jsonl", threads=3)
    start = time.monotonic()
    with pytest.raises(ValueError, match="HTTP 401"):
        client.ask(["busy 1", "busy 2", "q"], [lambda reply: True] * 3)
    assert time.monotonic() - start < 5
    told = capsys.readouterr().err
    assert told.count("asking again in 600 s") == 1 and "HTTP 429" in told
