"""The model behind an OpenAI-compatible endpoint, with a chat page at http://127.0.0.1:8000/.

    python serve.py --model=out/demo/model
    python serve.py --model=DIR --host=0.0.0.0 --api_key_file=key.txt   # for other machines too

    GET  /                      the chat page
    GET  /health                {"status": "ok"}
    GET  /v1/models             the name of the model
    POST /v1/chat/completions   an answer, whole or as a stream
    POST /tiles                 a picture as the model gets it

It is meant for looking, evaluating and recaptioning with one GPU. For many users, export the model
and serve it with vLLM (docs/serving.md). All that a client can ask for is bounded.
"""
import hmac
import json
import math
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from PIL import Image

from configurator import configure, run_script, setting
from generate import Assistant
from inputs.images import MAX_TILES, picture_uri
from model_files import check_sizes_of_weights
from serving.answer import as_json, error_object
from serving.ask import Refused, number, read_ask, read_picture
from serving.connections import Connections
from serving.engine import Engine
from training.checkpoint_folder import model_folder
from training.distributed import compute_dtype, setup_distributed

PAGE = Path(__file__).parent / "serving" / "page.html"
LOCAL = ("localhost", "127.0.0.1", "::1")
MAX_BODY = 20 * 2**20  # bytes of a request
READ_SECONDS = 30  # to send a request
IDLE_SECONDS = 60  # a connection may be kept open between requests


@dataclass(slots=True)
class Config:
    model: str = ""  # model folder, a run's checkpoint, or a run folder (its newest checkpoint)
    host: str = "127.0.0.1"  # where to listen; 0.0.0.0: other machines can connect
    port: int = setting(8000, at_most=65535)  # 0: any free one
    api_key_file: str = ""  # its first line must come with each request, as a bearer token
    max_new_tokens: int = setting(1024, at_least=1, at_most=4096)  # longest answer
    context: int = setting(8192, at_least=64, at_most=2**17)  # tokens of a prompt and its answer
    batch_size: int = setting(8, at_least=1, at_most=256)  # answers generated at once
    waiting: int = setting(16, at_most=4096)  # requests that may wait beside them
    max_tiles: int = setting(0, at_most=MAX_TILES)  # of a picture; 0 = as the model folder says
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one


class Server(Connections):
    """What all connections share."""

    def __init__(self, cfg, assistant, key=""):
        self.cfg = cfg
        self.key = key
        self.assistant = assistant
        self.name = Path(cfg.model).resolve().name
        self.pictures = threading.Semaphore(2)  # decoded pictures are large: two at a time
        super().__init__(cfg.host, cfg.port, Handler)
        places = min(cfg.context, assistant.model.llm.max_positions)
        self.engine = Engine(assistant, cfg.batch_size, cfg.waiting, places)


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""
    protocol_version = "HTTP/1.1"
    server_version = "sail-vl"
    sys_version = ""
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """No line for each request."""

    def handle_one_request(self):
        self.n_reserved = 0
        self.server.set_deadline(self.connection, IDLE_SECONDS)
        try:
            super().handle_one_request()
        finally:
            self.server.reserve(-self.n_reserved)

    def parse_request(self):
        self.server.set_deadline(self.connection, READ_SECONDS)
        return super().parse_request()

    # ---- which request it is -----------------------------------------------------------------

    def do_GET(self):
        self.route({"/": self.send_page, "/health": self.send_health,
                    "/v1/models": self.send_models})

    do_HEAD = do_GET

    def do_POST(self):
        self.route({"/v1/chat/completions": self.complete, "/tiles": self.send_tiles})

    def route(self, paths):
        """Call the function of the path. A refusal becomes an error in JSON."""
        path = self.path.partition("?")[0]
        try:
            self.check_client(path)
            if path not in paths:
                raise Refused(404, f"there is no {self.command} {path[:100]} here")
            paths[path]()
        except Refused as e:
            self.send_error(e.status, str(e), e.param)

    def check_client(self, path):
        """Refused without the key; and, if we listen for this machine only, with another name."""
        host = urlsplit("//" + self.headers.get("Host", "")).hostname
        if self.server.cfg.host in LOCAL and host not in LOCAL:  # a web page can make up a name
            raise Refused(403, f"this server is {self.server.cfg.host}, not {host}")
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if self.server.key and path not in ("/", "/health"):
            if not hmac.compare_digest(sent, self.server.key.encode()):
                raise Refused(401, "the API key is missing or wrong")

    def read_body(self):
        """The JSON object of a request -> dict. Web pages of others cannot send this type."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise Refused(411, "send Content-Length")
        length = int(length)
        if length > MAX_BODY:
            raise Refused(413, f"{length:,} bytes; at most {MAX_BODY:,} are read")
        self.server.reserve(length)
        self.n_reserved = length
        content = self.rfile.read(length)
        if len(content) < length:
            raise ConnectionAbortedError
        self.server.set_deadline(self.connection, math.inf)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return body

    # ---- answers -----------------------------------------------------------------------------

    def send(self, status, content, kind="application/json", headers=()):
        """Send a whole answer; content: bytes, or what becomes JSON."""
        if not isinstance(content, bytes):
            content = as_json(content)
        self.send_response(status)
        for name, value in [("Content-Type", kind), ("Content-Length", len(content)), *headers]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, status, message=None, param=None):
        """An error as OpenAI's clients read it. The base class calls this for malformed requests.

        The connection is closed, because the body may not have been read.
        """
        self.close_connection = True
        message = message or self.responses.get(status, ("error",))[0]
        headers = [("Connection", "close")]
        if status in (429, 503):
            headers.append(("Retry-After", "1"))
        self.send(status, {"error": error_object(status, message, param)}, headers=headers)

    def send_page(self):
        self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", [
            ("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data: blob:")])

    def send_health(self):
        self.send(200, {"status": "ok"})

    def send_models(self):
        about = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "local",
                 "max_model_len": self.server.engine.places,
                 "max_tiles": self.server.assistant.max_tiles}
        self.send(200, {"object": "list", "data": [about]})

    def send_tiles(self):
        """{"image": data URI, "max_tiles": ...} -> its tiles as pictures, thumbnail last."""
        body = self.read_body()
        assistant = self.server.assistant
        most = number(body, "max_tiles", 0, 1, assistant.max_tiles, whole=True)
        picture = read_picture({"image_url": body.get("image")}, "image")
        with self.server.pictures:
            try:
                tiles = assistant.tiles(picture, most)
            except ValueError as e:
                raise Refused(400, str(e), "image") from None
        uris = [picture_uri(Image.fromarray(tile.permute(1, 2, 0).numpy())) for tile in tiles]
        tokens = len(tiles) * assistant.model.vision.tokens_per_tile
        self.send(200, {"tiles": uris, "tokens": tokens})

    def complete(self):
        """An answer to a chat."""
        body = self.read_body()
        server = self.server
        if body.get("model") not in (None, "", server.name):
            raise Refused(404, f"the model {str(body['model'])[:100]!r} is not here, only "
                               f"{server.name!r}", "model")
        with server.engine.place():
            with server.pictures:
                ask = read_ask(body, server.assistant, server.cfg.max_new_tokens,
                               server.engine.places)
            answer = server.engine.start(ask)
            try:
                if ask.stream:
                    self.stream(answer)
                else:
                    text = "".join(answer.texts(server.assistant, self.tokens(answer)))
                    message = {"role": "assistant", "content": text}
                    self.send(200, answer.as_object(server.name, "message", message,
                                                    answer.finish_reason(), usage=answer.usage()))
            finally:
                ask.decoding.stopped = True  # the client may have gone

    def stream(self, answer):
        """An answer as server-sent events, one for each piece of text."""
        self.close_connection = True
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"),
                            ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()

        def send_event(delta, reason=None, **more):
            event = answer.as_object(self.server.name, "delta", delta, reason, **more)
            self.wfile.write(b"data: " + as_json(event) + b"\n\n")

        try:
            send_event({"role": "assistant", "content": ""})
            for text in answer.texts(self.server.assistant, self.tokens(answer)):
                send_event({"content": text})
            send_event({}, answer.finish_reason())
            if answer.ask.usage:
                send_event({}, choices=[], usage=answer.usage())
            self.wfile.write(b"data: [DONE]\n\n")
        except Refused as e:  # the head has been sent, so that the error is an event
            error = {"error": error_object(e.status, str(e), e.param)}
            self.wfile.write(b"data: " + as_json(error) + b"\n\n")

    def tokens(self, answer):
        """The token ids of an answer as they come. It is stopped if the client has gone."""
        for token in answer.ids_as_they_come():
            if token is not None:
                yield token
            elif self.client_is_gone():
                raise ConnectionAbortedError

    def client_is_gone(self):
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)


# ---- the script ----------------------------------------------------------------------------------

def main():
    cfg = Config()
    configure(cfg)
    key = ""
    if cfg.api_key_file:
        key = Path(cfg.api_key_file).read_text().partition("\n")[0].strip()
        if not key:
            raise ValueError(f"{cfg.api_key_file}: its first line is empty; write the key there")
    cfg.model = model_folder(cfg.model)
    check_sizes_of_weights(cfg.model)
    device = setup_distributed(cfg.device).device
    assistant = Assistant(cfg.model, device, compute_dtype(cfg.dtype, device), cfg.max_tiles,
                          max_new_tokens=cfg.max_new_tokens)
    server = Server(cfg, assistant, key)

    def end(*_):
        threading.Thread(target=server.shutdown).start()  # it waits for the loop that we are in

    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), end)
    if cfg.host not in LOCAL and not key:
        print(f"WARNING: whoever reaches {cfg.host} can ask; set --api_key_file", file=sys.stderr)
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(f"{server.name}: http://{host}:{server.server_port}/", flush=True)
    server.serve_forever()
    server.server_close()
    print("shutting down: the answers at work are finished first", flush=True)
    server.engine.close()


if __name__ == "__main__":
    run_script(main)
