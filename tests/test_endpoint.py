"""The client of chat endpoints: cache, retries, refusals, resuming; never a guess."""

import contextlib
import http.server
import json
import socketserver
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pytest

from curation.stages import cost_in_dollars
from evals import chat_request
from evals import endpoint as J
from evals.endpoint import ChatClient


@pytest.fixture
def endpoint(monkeypatch):
    """A local endpoint: answer(prompt, temperature) -> text, or an int as HTTP status."""
    monkeypatch.setattr(J, "WAIT_S", 0.01)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    state = SimpleNamespace(answer=lambda prompt, temperature: "A", asked=[], keys=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(prompt := body["messages"][0]["content"])
            state.keys.append(self.headers.get("Authorization"))
            out = state.answer(prompt, body["temperature"])
            ok = (
                self.path == "/v1/chat/completions"
                and body["model"] == "m"
                and not isinstance(out, int)
            )
            data = (
                json.dumps({"choices": [{"message": {"content": out}}]}).encode()
                if out != "torn"
                else b'{"choi'
            )
            self.send_response(200 if ok else out)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()


def always(reply):
    return True


def test_replies_are_kept_and_asked_only_once(endpoint, tmp_path, monkeypatch):
    endpoint.answer = lambda prompt, temperature: prompt.upper()
    prompts = [f"question {i}\nfoo" for i in range(40)]
    assert ChatClient(endpoint.url, "m", tmp_path / "x" / "j.jsonl").ask(
        prompts, [always] * 40
    ) == [p.upper() for p in prompts]
    assert sorted(endpoint.asked) == sorted(prompts) and endpoint.keys[0] is None
    text = (tmp_path / "x" / "j.jsonl").read_text()
    assert [json.loads(line)["model"] for line in text.split("\n")[1:]] == ["m"] * 40
    (tmp_path / "x" / "j.jsonl").write_text(text[:-9])  # as if killed in the middle of a line
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    again = ChatClient(endpoint.url + "/chat/completions", "m", tmp_path / "x" / "j.jsonl")
    assert (
        again.ask(prompts, [always] * 40) == [p.upper() for p in prompts]
        and len(endpoint.asked) == 41
    )
    assert (
        endpoint.keys[-1] == "Bearer secret"
        and "secret" not in (tmp_path / "x" / "j.jsonl").read_text()
    )


def test_a_busy_or_broken_endpoint_is_asked_again(endpoint, tmp_path):
    replies = [429, 503, "torn", [{"type": "text"}], None, "B"]
    endpoint.answer = lambda prompt, temperature: replies.pop(0)
    one = ChatClient(endpoint.url, "m", tmp_path / "j.jsonl", threads=1)
    assert (
        one.ask(["q"], [lambda reply: reply == "B"]) == ["B"] and not replies
    )  # None is a reply, and not valid


def test_what_stays_invalid_is_no_reply_and_temperature_rises(endpoint, tmp_path):
    seen = []
    endpoint.answer = lambda prompt, temperature: seen.append(temperature) or f"hm {temperature}"
    one = ChatClient(endpoint.url, "m", tmp_path / "j.jsonl")
    assert one.ask(["q"], [lambda reply: reply == "yes"]) == [""] and seen == [0.0, 0.5, 1.0]
    assert one.ask(["q"], [lambda reply: "0.5" in reply]) == ["hm 0.5"] and len(seen) == 3


def test_pictures_go_along_and_come_back_with_finish_and_usage_and_a_refused_picture_is_not_the_end(
    endpoint, tmp_path
):
    endpoint.answer = lambda parts, temperature: (
        400 if parts[0]["image_url"]["url"].endswith("AAAA") else "A"
    )
    one = ChatClient(f"{endpoint.url}, {endpoint.url}", "m", tmp_path / "j.jsonl", threads=1)
    pictures = [b"\x89PNG", b"\xff\xd8\xff", b"\0\0\0"]
    found = dict(one.each([("q", always, [picture]) for picture in pictures]))
    assert [found[i]["reply"] for i in range(3)] == ["A", "A", ""] and found[2][
        "finish"
    ] == "http_400"
    assert found[0]["usage"] == {} and endpoint.asked[0] == [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
        {"type": "text", "text": "q"},
    ]
    assert endpoint.asked[1][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    again = ChatClient(
        endpoint.url, "m", tmp_path / "j.jsonl"
    )  # another picture or none: another question
    assert (
        dict(again.each([("q", always, pictures[:1])]))[0]["reply"] == "A"
        and len(endpoint.asked) == 3
    )
    endpoint.answer = lambda prompt, temperature: "B"
    assert again.ask(["q"], [always]) == ["B"] and again.counts == {"calls": 1}


def test_a_refusal_and_an_absent_endpoint_end_in_one_line_and_what_was_answered_stays(
    endpoint, tmp_path
):
    endpoint.answer = lambda prompt, temperature: 401 if prompt == "q3" else "A"
    one = ChatClient(endpoint.url, "m", tmp_path / "j.jsonl", threads=1)
    with pytest.raises(ValueError, match="HTTP 401.*run again to go on"):
        one.ask(["q1", "q2", "q3", "q4"], [always] * 4)
    assert (
        endpoint.asked[:3] == ["q1", "q2", "q3"] and endpoint.asked.count("q3") == 1
    )  # not asked again at once
    endpoint.answer = lambda prompt, temperature: "A"
    assert (
        ChatClient(endpoint.url, "m", tmp_path / "j.jsonl").ask(
            ["q1", "q2", "q3", "q4"], [always] * 4
        )
        == ["A"] * 4
    )
    assert [endpoint.asked.count(q) for q in ("q1", "q2", "q3", "q4")] == [1, 1, 2, 1]
    with pytest.raises(ValueError, match="127.0.0.1:9/.*kept, run again"):
        ChatClient("http://127.0.0.1:9/v1", "m", tmp_path / "k.jsonl").ask(["q"], [always])
    for url, model in (("", "m"), ("127.0.0.1", "m"), (endpoint.url, "")):
        with pytest.raises(ValueError, match="--judge_model=NAME"):
            ChatClient(url, model, tmp_path / "j.jsonl")


ERRORS = {
    '{"error": {"message": "no model x,\\nonly m", "type": "a"}}': "no model x, only m",  # OpenAI
    '{"object": "error", "message": "no model x"}': "no model x",  # an older vLLM
    '{"error": "no model x"}': "no model x",
    '{"detail": "no model x"}': "no model x",  # FastAPI
    '{"detail": [{"msg": "no"}]}': '[{"msg": "no"}]',
    "<html><h1>Bad gateway</h1></html>": "Bad gateway",
    '{"error": null}': "null",
    "": "",
    "x" * 10**6: "x" * 300 + ";",
    "[" * 10**5: "[",
    '{"error": "the key s3cret is wrong"}': "the key *** is wrong",
}


@pytest.mark.parametrize("body", ERRORS, ids=range(len(ERRORS)))
def test_the_words_of_an_error_are_told_in_one_line(raw, tmp_path, monkeypatch, body):
    monkeypatch.setenv("JUDGE_API_KEY", "s3cret")
    raw.serve = lambda socket: socket.sendall(
        reply_of(body.encode(), "HTTP/1.1 404 Not Found"))
    line = ask_raw(raw, tmp_path)
    said = ERRORS[body]
    assert ("HTTP 404 Not Found: " + said if said else "HTTP 404 Not Found") in line
    assert len(line) < 600


def test_a_refused_picture_is_told_with_the_words_of_the_endpoint(raw, tmp_path):
    raw.serve = lambda socket: socket.sendall(
        reply_of(b'{"error": {"message": "10 MB at most"}}', "HTTP/1.1 413 Too Large"))
    client = ChatClient(f"http://{raw.address}/v1", "m", tmp_path / "j.jsonl", threads=1)
    entry = client.entry("q", 0.0, [b"\x89PNG"])
    assert entry["finish"] == "http_413" and entry["why"] == "10 MB at most"


# ---- doors: redirects, drips, floods, odd JSON ---------------------------------------------------


@pytest.fixture
def raw(monkeypatch):
    """A server of bytes: `serve` (a function of the socket) answers; `asked` are its requests."""
    monkeypatch.setattr(J, "WAIT_S", 0.01)
    monkeypatch.setattr(J, "TRIES", 2)
    state = SimpleNamespace(serve=None, asked=[])

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.settimeout(10)
            state.asked.append(self.request.recv(65536))
            with contextlib.suppress(OSError):
                state.serve(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()


def ask_raw(raw, tmp_path):
    """The one line that asking this server ends in."""
    client = ChatClient(f"http://{raw.address}/v1", "m", tmp_path / "j.jsonl", threads=1)
    with pytest.raises(ValueError) as e:
        client.ask(["q"], [always])
    assert len(str(e.value).splitlines()) == 1 and raw.address in str(e.value)
    assert not (tmp_path / "j.jsonl").exists()
    return str(e.value)


def reply_of(body, head="HTTP/1.1 200 OK"):
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(raw, endpoint, tmp_path, monkeypatch, status):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    head = f"HTTP/1.1 {status} Moved\r\nLocation: {endpoint.url}/chat/completions"
    raw.serve = lambda socket: socket.sendall(reply_of(b"", head))
    line = ask_raw(raw, tmp_path)
    told = f"HTTP {status} Moved to '{endpoint.url}/chat/completions', which is not followed"
    assert told in line
    assert endpoint.asked == [] and endpoint.keys == [] and len(raw.asked) == 1
    assert b"secret" in raw.asked[0] and "secret" not in line


def drip(data, seconds=0.02):
    """Send these bytes one by one."""

    def serve(socket):
        for i in range(len(data)):
            socket.sendall(data[i : i + 1])
            time.sleep(seconds)

    return serve


@pytest.mark.parametrize(
    "data",
    [
        reply_of(b" " * 1000),
        b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 300,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
    ],
    ids=["body", "headers", "chunks", "nothing"],
)
def test_a_reply_that_drips_ends_after_the_time_limit(raw, tmp_path, monkeypatch, data):
    monkeypatch.setattr(chat_request, "TIMEOUT_S", 0.5)
    raw.serve = lambda socket: (drip(data)(socket), time.sleep(5))
    start = time.monotonic()
    line = ask_raw(raw, tmp_path)
    assert "timed out" in line or "was not there after 0.5 s" in line
    assert time.monotonic() - start < 4 and len(raw.asked) == 2  # asked again once


def test_a_reply_of_hundreds_of_megabytes_is_cut_off(raw, tmp_path):
    sent = []

    def serve(socket):
        socket.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n")
        for _ in range(300):
            socket.sendall(b" " * 10**6)
            sent.append(1)

    raw.serve = serve
    tracemalloc.start()
    line = ask_raw(raw, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a reply of more than 4 MiB" in line
    assert peak < 40e6 and len(sent) < 60, (peak, len(sent))


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"choices": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"a":' * 100_000,
        "[]",
        "{}",
        "null",
        "7",
        '"text"',
        '{"choices": {}}',
        '{"choices": []}',
        '{"choices": [null]}',
        '{"choices": [{"message": "hello"}]}',
        '{"choices": [{"message": {"content": {"a": 1}}}]}',
        '{"choices": [{"message": {"content": 7}}]}',
        '{"choices": [{"message": {"content": "A"}}], "usage": [1]}',
        '{"choices": [{"message": {"content": "A"}}], "usage": "many"}',
        '{"choices": [{"message": {"content": "A"}, "finish_reason": ' + "9" * 5000 + "}]}",
        "\udcff\udcfe",
        "",
    ],
)
def test_odd_json_is_one_line(raw, tmp_path, body):
    data = body.encode("utf-8", "surrogateescape")
    raw.serve = lambda socket: socket.sendall(reply_of(data))
    assert "replies so far are kept" in ask_raw(raw, tmp_path)


NO_COUNTS = ["1" + "0" * 400, "-1", "true", '"7"', "1.5", "null", "[1]", "1e999"]


@pytest.mark.parametrize("number", NO_COUNTS)
def test_a_count_of_tokens_that_is_none_costs_nothing_and_the_reply_is_kept(raw, tmp_path, number):
    usage = f'{{"prompt_tokens": {number}, "completion_tokens": 3}}'
    body = f'{{"choices": [{{"message": {{"content": "A"}}}}], "usage": {usage}}}'
    raw.serve = lambda socket: socket.sendall(reply_of(body.encode()))
    client = ChatClient(f"http://{raw.address}/v1", "m", tmp_path / "j.jsonl", threads=1)
    entry = client.entry("q", 0)
    assert entry["reply"] == "A" and entry["usage"] == {"completion_tokens": 3}

    old = json.dumps({"key": "k", "reply": "B"})[:-1] + f', "usage": {usage}}}'
    torn = '{"key": [1], "reply": "B"}\n{"key": "x", "reply": 7}\n{"forget": [1]}'
    (tmp_path / "old.jsonl").write_text(f"{old}\n{torn}\n")
    replies = J.Replies(tmp_path / "old.jsonl")
    assert list(replies.known) == ["k"]
    prices = SimpleNamespace(price_in=0.0, price_out=10.0)
    assert cost_in_dollars(prices, replies.known["k"]["usage"]) == 3e-5


def test_what_is_no_http_is_one_line(raw, tmp_path):
    many_headers = b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500
    two_lines = b"HTTP/1.1 404 Not\x0bFound\r\n\r\n"
    for said in (b"\x16\x03\x01", b"HTTP/9.9 abc\r\n\r\n", many_headers, two_lines):
        raw.serve = lambda socket, said=said: socket.sendall(said)
        assert "replies so far are kept" in ask_raw(raw, tmp_path)
    client = ChatClient(f"https://{raw.address}/v1", "m", tmp_path / "j.jsonl", threads=1)
    with pytest.raises(ValueError, match="https://.*SSL.*replies so far are kept"):
        client.ask(["q"], [always])
