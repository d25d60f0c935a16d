"""What the tests of serve.py share: a server in this process, and a plain client."""
import base64
import contextlib
import http.client
import io
import json
import threading
import time

from PIL import Image

import serve
from generate import Assistant


@contextlib.contextmanager
def serving(folder, key="", endless=False, **settings):
    """A running server of the model folder. endless: answers go on to the last token."""
    cfg = serve.Config(**{"model": str(folder), "port": 0, "max_new_tokens": 64, "context": 512,
                          **settings})
    assistant = Assistant(cfg.model, "cpu", None, max_new_tokens=cfg.max_new_tokens)
    if endless:
        assistant.settings["stop_ids"] = set()
    server = serve.Server(cfg, assistant, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.close()


def call(port, body=None, path="/v1/chat/completions", method="POST", **headers):
    """-> (status, the answer's JSON, its headers). body: bytes, or what becomes JSON."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    client.request(method, path, body, {"Content-Type": "application/json", **headers})
    reply = client.getresponse()
    content = reply.read()
    client.close()
    return reply.status, json.loads(content), reply.headers


def question(content, **more):
    """The body of a request with one message."""
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def answer(port, content, **more):
    """The text of an answer."""
    status, said, _ = call(port, question(content, **more))
    assert status == 200, said
    return said["choices"][0]["message"]["content"]


def streamed(port, body):
    """The objects of a stream of server-sent events, without [DONE]."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.request("POST", "/v1/chat/completions", json.dumps(body).encode(),
                   {"Content-Type": "application/json"})
    parts = client.getresponse().read().decode().split("\n\n")
    client.close()
    events = [part.removeprefix("data: ") for part in parts if part]
    return [json.loads(event) for event in events if event != "[DONE]"]


def picture(colour=(200, 10, 10), size=(56, 28)):
    """The bytes of a picture."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def picture_part(content):
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": uri}}


def text_part(text):
    return {"type": "text", "text": text}


def wait_until(condition, seconds=20):
    """Fail if this does not become true."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)
