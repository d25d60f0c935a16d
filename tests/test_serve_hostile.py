"""serve.py among hostile clients: no crash, bounded memory, and others are answered meanwhile."""
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from serving_helpers import (
    answer,
    call,
    picture,
    picture_part,
    question,
    serving,
    text_part,
    wait_until,
)
from test_eval import make_model_folder

from serving import ask, connections

ROOT = Path(__file__).parent.parent
HEAD = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, max_new_tokens=400) as running:
        yield running


@contextlib.contextmanager
def process(folder, *flags):
    """serve.py in a process of its own -> (process, port)."""
    argv = [sys.executable, "serve.py", f"--model={folder}", "--port=0", "--device=cpu",
            "--context=512", "--max_new_tokens=400", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(argv, cwd=ROOT, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield running, int(re.search(r":(\d+)/$", running.stdout.readline()).group(1))
    finally:
        running.kill()
        running.communicate()


def raw(port, *pieces, pause=0.0, seconds=20):
    """Send bytes, read until the server closes or a whole answer is there -> bytes."""
    reply = b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
            while piece := client.recv(65536):
                reply += piece
                if b"\r\n\r\n" in reply and reply.endswith(b"}"):
                    break
        except OSError:
            pass
    return reply


def with_length(content):
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content


def status_of(reply):
    """The status of an answer; it must hold one error in JSON."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), reply[:200]
    error = json.loads(body)["error"]
    assert error["code"] == int(head[9:12]) and len(error["message"].splitlines()) == 1
    return error["code"]


def bomb(side=9000):
    """A PNG of few bytes and 81 megapixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


# ---- each is refused as it should be -------------------------------------------------------------

BODIES = {
    b"": 400,
    b"{": 400,
    b"[" * 50_000: 400,
    b'{"a":' * 50_000: 400,
    b"[" + b"{}," * 200_000 + b"{}]": 413,
    b"\xff\xfe\xfd": 400,
    b"1" * 100_000: 400,
    b"[]": 400,
    b"NaN": 400,
}
VALUES = [("temperature", "NaN"), ("temperature", "Infinity"), ("temperature", "1e999"),
          ("temperature", "true"), ("temperature", "-1"), ("top_p", "2"), ("top_p", "NaN"),
          ("max_tokens", "0"), ("max_tokens", "1.5"), ("max_tokens", "1" + "0" * 400),
          ("max_tokens", "401"), ("seed", "1e3"), ("seed", "9" * 30), ("stop", '["", "a"]'),
          ("stop", "[1]"), ("stop", '["a","a","a","a","a"]'), ("n", "2"), ("tools", "[1]"),
          ("stream", '"yes"'), ("stream_options", "[]"), ("max_tiles", "10000"),
          ("logprobs", "true"), ("nonsense", "1"), ("\\ud800", "1"), ("messages", "{}")]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:8]))
def test_a_body_that_is_no_request_is_refused(server, body):
    assert status_of(raw(server.server_port, with_length(body))) == BODIES[body]


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_a_value_that_cannot_be_meant_is_refused_by_name(server, name, value):
    text = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{name}": {value}}}'
    status, error, _ = call(server.server_port, text.encode())
    shown = json.loads(f'"{name}"').encode(errors="replace").decode()
    assert status == 400 and shown in error["error"]["message"]


@functools.cache
def contents():
    """What stands in a message -> what the refusal says."""
    part = picture_part(picture())
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}
    escapes = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "%41" * 999}}
    return {
        "nothing": (None, "content must be"),
        "no parts": ([], "content must be"),
        "a number": (7, "content must be"),
        "parts in parts": ([[[]]], "only parts"),
        "a sound": ([{"type": "input_audio"}], "only parts"),
        "a path": ([{"type": "image_url", "image_url": "/etc/passwd"}], "no file is opened"),
        "a file URL": ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                       "no file is opened"),
        "a URL": ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
                  "no address"),
        "broken base64": ([broken], "base64"),
        "escapes": ([escapes], "more than 100 %"),
        "no picture": ([picture_part(b"GIF89a no picture")], "picture"),
        "half a picture": ([picture_part(picture(size=(500, 500))[:-40])], "picture"),
        "a bomb": ([picture_part(bomb())], "megapixels"),
        "nine pictures": ([part] * 9, "at most 8"),
        "a long text": ("x" * 32_001, "at most 32,000"),
        "more than the context": ("word " * 600, "tokens"),
    }


@pytest.mark.parametrize("kind", contents())
def test_a_message_that_cannot_be_read_is_refused_with_the_reason(server, kind):
    content, reason = contents()[kind]
    status, error, _ = call(server.server_port, question(content))
    assert status == 400 and reason in error["error"]["message"]


@pytest.mark.parametrize("roles", [[], ["assistant"], ["user", "user"], ["system"], ["tool"],
                                   ["user", "system"], ["user", "assistant"], [[]], [None]])
def test_roles_out_of_order_are_refused(server, roles):
    messages = [{"role": role, "content": "hi"} for role in roles]
    assert call(server.server_port, {"messages": messages})[0] == 400


@pytest.mark.parametrize("message", [
    {"tool_calls": [{"id": "1"}]}, {"weight": 1},
    {"content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
    {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,", "x": 1}}]},
])
def test_what_is_not_read_in_a_message_is_refused_by_name(server, message):
    status, error, _ = call(server.server_port, {"messages": [
        {"role": "user", "content": "hi", "name": "me", "refusal": None, **message}]})
    (name,) = {"tool_calls", "weight", "cache_control", "x"} & set(re.findall(r"\w+", str(message)))
    assert status == 400 and f"{name} is not known here" in error["error"]["message"]


def test_lone_surrogates_and_texts_that_write_json_are_answered(server):
    body = (rb'{"messages": [{"role": "user", "content": "\ud800\" \u0000 \udfff"}], '
            rb'"stop": "\udc00"}')
    assert call(server.server_port, body)[0] == 200
    assert call(server.server_port, question("x", model="\ud800"))[0] == 404


HEADS = {
    "no request": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    "no version": (b"GET /health HTTP/x\r\n\r\n", 400),
    "a version to come": (b"GET /health HTTP/9.9\r\n\r\n", 505),
    "an unknown method": (b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "another path": (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    "a long line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    "a long header": (b"GET /health HTTP/1.1\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "many headers": (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 403),
    "no length": (HEAD + b"\r\n{}", 411),
    "a negative length": (HEAD + b"Content-Length: -1\r\n\r\n{}", 411),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 411),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    "chunks and a length": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: x\r\n\r\n{}", 411),
    "a huge length": (HEAD + b"Content-Length: 99999999999999999\r\n\r\n{}", 413),
    "an endless length": (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", 411),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_cannot_be_served_is_refused(server, kind):
    head, status = HEADS[kind]
    assert status_of(raw(server.server_port, head)) == status


def test_a_body_of_get_is_not_read_as_a_request(server):
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    reply = raw(server.server_port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: %d\r\n\r\n" % len(inner) + inner)
    assert reply.count(b"HTTP/1.1") == 1 and status_of(reply) == 411


def test_a_body_that_is_too_large_is_refused_so_that_its_sender_reads_it(server):
    size = connections.MAX_BODY + 1
    reply = raw(server.server_port, HEAD + b"Content-Length: %d\r\n\r\n" % size, b" " * size)
    assert status_of(reply) == 413


def test_one_connection_serves_several_requests_and_head_has_no_body(server):
    head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    body = json.dumps(question("hi")).encode()
    reply = raw(server.server_port, head + with_length(body) + with_length(body) + last)
    assert reply.count(b"HTTP/1.1 200 OK") >= 2 and reply.count(b'{"status": "ok"}') <= 1


# ---- slow and many -------------------------------------------------------------------------------

def test_slow_clients_cannot_keep_others_out(server, monkeypatch):
    """More than there are places for: half a head, half a body, a body that is announced only."""
    pieces = [b"POST /v1/cha", HEAD, HEAD + b"Content-Length: 20000000\r\n\r\n{"]
    with contextlib.ExitStack() as held:
        for i in range(connections.MAX_CONNECTIONS + 20):
            slow = held.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            slow.sendall(pieces[i % 3])
        assert answer(server.server_port, "hi")
        assert answer(server.server_port, [picture_part(picture()), text_part("What?")])
        with server.lock:
            assert len(server.deadlines) <= connections.MAX_CONNECTIONS
    wait_until(lambda: len(server.deadlines) == 0)
    assert server.n_body_bytes == 0


def test_a_client_that_is_late_is_closed(server, monkeypatch):
    monkeypatch.setattr(connections, "READ_SECONDS", 0.3)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.3)
    for piece in (b"", b"GET /hea", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"):
        began = time.monotonic()
        assert raw(server.server_port, piece) == b""
        assert time.monotonic() - began < 5


def test_a_client_that_reads_nothing_loses_its_place(server, monkeypatch):
    monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.server_port))
        monkeypatch.setattr(server.assistant, "texts", lambda tokens: iter(["x" * 10**7]))
        client.sendall(with_length(json.dumps(question("hi", stream=True)).encode()))
        wait_until(lambda: server.engine.n_held == 1)
        wait_until(lambda: server.engine.n_held == 0)


def test_a_text_is_answered_while_large_pictures_are_decoded(server, monkeypatch):
    """The tiles of pictures wait for each other; a text waits for none of them."""
    free = threading.Event()
    monkeypatch.setattr(server.assistant, "tiles", lambda *_: free.wait(20) and 1 / 0)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        body = question([picture_part(picture()), text_part("What?")])
        waiting = [pool.submit(call, server.server_port, body) for _ in range(3)]
        wait_until(lambda: server.engine.n_held == 3)
        assert answer(server.server_port, "hi")
        free.set()
        # What only we can have done wrong is a 500 in JSON, and the server goes on.
        assert [job.result()[0] for job in waiting] == [500] * 3


def hostile(number):
    """Pieces of one hostile request, drawn by its number."""
    draw = random.Random(number)
    message = json.dumps(question("hi", stream=number % 2 == 0)).encode()
    kinds = [
        list(BODIES),
        [head for head, _ in HEADS.values()],
        [draw.randbytes(draw.randrange(1, 3000))],
        [with_length(message)[:draw.randrange(1, len(message))]],
        [with_length(bytes(b ^ (draw.random() < 0.02) for b in message))],
        [json.dumps(question(content)).encode() for content, _ in contents().values()],
        [b'{"messages": [], "x": "' + draw.randbytes(99).hex().encode() * 5000 + b'"}'],
    ]
    kind = number % len(kinds)
    content = draw.choice(kinds[kind])
    if kind in (0, 5, 6):
        content = with_length(content)
    if number % 11 == 0:  # slowly
        middle = len(content) // 2
        return [content[:middle], content[middle:]]
    return [content]


def memory_of(pid):
    """Resident bytes of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("n", [200, pytest.param(1000, marks=pytest.mark.nightly)])
def test_a_thousand_hostile_requests_crash_nothing_and_leave_no_memory(folder, n):
    def send(number):
        pieces = hostile(number)
        return raw(port, *pieces, pause=0.2 * (len(pieces) > 1), seconds=1)

    with process(folder) as (running, port), concurrent.futures.ThreadPoolExecutor(16) as pool:
        honest = answer(port, "hi")
        list(pool.map(send, range(100)))  # what is allocated once
        before = memory_of(running.pid)
        jobs = [pool.submit(send, number) for number in range(n)]
        n_answered = 0
        while not all(job.done() for job in jobs):
            status, said, _ = call(port, question("hi"))
            assert status in (200, 429, 503)
            if status == 200:
                assert said["choices"][0]["message"]["content"] == honest
                n_answered += 1
            time.sleep(0.1)
        replies = [job.result() for job in jobs]
        assert running.poll() is None
        assert answer(port, "hi") == honest and n_answered > 2
        assert memory_of(running.pid) - before < 50 * 2**20
        statuses = {reply[9:12] for reply in replies if reply}
        assert b"400" in statuses and b"500" not in statuses
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 0 and errors == ""


# ---- the end -------------------------------------------------------------------------------------

def test_sigterm_once_or_twice_finishes_what_runs_and_refuses_what_comes(folder):
    with process(folder) as (running, port):
        whole = answer(port, "hi", max_tokens=400)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(answer, port, "hi", max_tokens=400) for _ in range(4)]
            time.sleep(0.15)
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGTERM)
            assert {job.result() for job in jobs} == {whole}
        text, errors = running.communicate(timeout=20)
        assert running.returncode == 0 and errors == "" and "finished first" in text


def test_an_idle_server_with_open_connections_ends_at_once(folder):
    with process(folder) as (running, port), socket.create_connection(("127.0.0.1", port)):
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=20)
        assert running.returncode == 0 and time.monotonic() - began < 10


def test_the_limits_in_the_docs_are_those_of_the_program():
    text = (ROOT / "docs" / "serving.md").read_text()
    limits = {
        "bytes of a request": connections.MAX_BODY,
        "bytes of the headers": connections.MAX_HEAD,
        "bytes of all requests": connections.MAX_BODIES,
        "brackets and commas": connections.MAX_VALUES,
        "connections": connections.MAX_CONNECTIONS,
        "seconds to send a request": connections.READ_SECONDS,
        "seconds to take an answer": connections.WRITE_SECONDS,
        "seconds between requests": connections.IDLE_SECONDS,
        "pictures of a request": ask.MAX_PICTURES,
        "characters of a request": ask.MAX_CHARACTERS,
        "stop texts": ask.MAX_STOPS,
    }
    for name, value in limits.items():
        assert re.search(rf"\| {name}[^|]*\| {value:,} \|", text), (name, value)
