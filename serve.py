"""The model behind an OpenAI-compatible endpoint, with a chat page at http://127.0.0.1:8000/.

    python serve.py --model=out/demo/model
    python serve.py --model=DIR --host=0.0.0.0 --api_key_file=key.txt   # for other machines too

    GET  /                      the chat page
    GET  /health                {"status": "ok"}
    GET  /v1/models             the name of the model; /v1/models/NAME: that model
    POST /v1/chat/completions   an answer, whole or as a stream
    POST /tiles                 a picture as the model gets it

It is meant for looking, evaluating and recaptioning with one GPU. For many users, export the model
and serve it with vLLM (docs/serving.md). All that a client can ask for is bounded.
"""
import contextlib
import hmac
import re
import select
import signal
import socket
import sys
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from configurator import configure, run_script, setting
from generate import Assistant
from inputs.files import naming
from inputs.images import MAX_TILES, picture_uri
from model_files import check_sizes_of_weights
from serving.answer import as_json, error_object
from serving.ask import Refused, number, picture_tiles, read_ask, read_picture
from serving.connections import Connection, Connections, tell
from serving.engine import Engine
from training.checkpoint_folder import model_folder
from training.distributed import compute_dtype, is_compiled, setup_distributed

PAGE = Path(__file__).parent / "serving" / "page.html"
LOCAL = ("localhost", "127.0.0.1", "::1")
FAULT = "a fault of the server, which has printed it"


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
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the decoder; auto: on a GPU


class Server(Connections):
    """What all connections share."""

    def __init__(self, cfg, assistant, key=""):
        self.cfg = cfg
        self.key = key
        self.assistant = assistant
        self.name = Path(cfg.model).resolve().name
        super().__init__(cfg.host, cfg.port, Handler)
        # No more than the model has positions for; /v1/models says how many.
        places = min(cfg.context, assistant.model.llm.max_positions)
        self.engine = Engine(assistant, cfg.batch_size, cfg.waiting, places)

    def close(self):
        """Finish the answers at work. A client that does not take its answer is still closed."""
        self.server_close()
        self.engine.close()
        with contextlib.suppress(OSError):  # whoever read our output may have gone
            print("shutting down: the answers at work are finished first", flush=True)
        while self.engine.thread.is_alive():
            self.service_actions()
            self.engine.thread.join(0.1)


class Handler(Connection):
    """Which request is answered by what."""

    def do_GET(self):
        self.route({"/": self.send_page, "/health": self.send_health,
                    "/v1/models": self.send_models,
                    f"/v1/models/{self.server.name}": self.send_model})

    do_HEAD = do_GET

    def do_POST(self):
        self.route({"/v1/chat/completions": self.complete, "/tiles": self.send_tiles})

    def route(self, paths):
        """Call the function of the path. A refusal becomes an error in JSON."""
        path = urllib.parse.unquote(self.path.partition("?")[0])
        try:
            self.check_client(path)
            if path not in paths:
                raise Refused(404, f"there is no {self.command} {path[:100]} here")
            paths[path]()
        except Refused as e:
            self.send_error(e.status, str(e), param=e.param)
        except OSError:
            raise  # the client has gone
        except Exception as e:
            tell(e)
            self.send_error(500, FAULT)

    def check_client(self, path):
        """Refused without the key; and, if we listen for this machine only, with another name."""
        host = self.headers.get("Host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if self.server.cfg.host in LOCAL and name not in LOCAL:  # a web page can make up a name
            raise Refused(403, f"this server is {self.server.cfg.host}, not {host[:100]!r}")
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if self.server.key and path not in ("/", "/health"):
            if not hmac.compare_digest(sent, self.server.key.encode()):
                raise Refused(401, "the API key is missing or wrong")

    def send_page(self):
        self.send(200, PAGE.read_bytes(), "text/html; charset=utf-8", [
            ("Content-Security-Policy", "default-src 'self' 'unsafe-inline' data: blob:")])

    def send_health(self):
        self.send(200, {"status": "ok"})

    def send_models(self):
        self.send(200, {"object": "list", "data": [self.about_model()]})

    def send_model(self):
        self.send(200, self.about_model())

    def about_model(self):
        return {"id": self.server.name, "object": "model", "created": 0, "owned_by": "local",
                "max_model_len": self.server.engine.places,
                "max_tiles": self.server.assistant.max_tiles}

    def send_tiles(self):
        """{"image": data URI, "max_tiles": ...} -> its tiles as pictures, thumbnail last."""
        body = self.read_body()
        assistant = self.server.assistant
        most = number(body, "max_tiles", 0, 1, assistant.max_tiles, whole=True)
        picture = read_picture({"image_url": body.get("image")}, "image")
        with self.server.engine.place():
            tiles = picture_tiles(assistant, picture, most, "image")
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
            self.write(b"data: " + as_json(event) + b"\n\n")

        try:
            send_event({"role": "assistant", "content": ""})
            for text in answer.texts(self.server.assistant, self.tokens(answer)):
                if text:
                    send_event({"content": text})
            send_event({}, answer.finish_reason())
            if answer.ask.usage:
                send_event({}, choices=[], usage=answer.usage())
            self.write(b"data: [DONE]\n\n")
        # The head has been sent, so that an error is an event.
        except Refused as e:
            self.send_event_of_error(error_object(e.status, str(e), e.param))
        except OSError:
            raise  # the client has gone
        except Exception as e:
            tell(e)
            self.send_event_of_error(error_object(500, FAULT))

    def send_event_of_error(self, error):
        self.write(b"data: " + as_json({"error": error}) + b"\n\n")

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

def read_key(path):
    """The first line of a file that holds the key; ValueError if that cannot be sent."""
    with naming(path):
        key = Path(path).read_bytes().partition(b"\n")[0].decode("latin-1").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"{path}: write a key into its first line, of letters and digits")
    return key


def main():
    cfg = Config()
    configure(cfg)
    if not cfg.host:
        raise ValueError("give --host=127.0.0.1, or 0.0.0.0 for other machines too")
    key = read_key(cfg.api_key_file) if cfg.api_key_file else ""
    cfg.model = model_folder(cfg.model)
    check_sizes_of_weights(cfg.model)
    device = setup_distributed(cfg.device).device
    assistant = Assistant(cfg.model, device, compute_dtype(cfg.dtype, device), cfg.max_tiles,
                          max_new_tokens=cfg.max_new_tokens,
                          compiled=is_compiled(cfg.compile, device))
    assistant.warm_up(cfg.batch_size)
    server = Server(cfg, assistant, key)

    def end(*_):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C waits for nothing
        threading.Thread(target=server.shutdown).start()  # it waits for the loop that we are in

    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), end)
    if cfg.host not in LOCAL and not key:
        print(f"WARNING: whoever reaches {cfg.host} can ask; set --api_key_file", file=sys.stderr)
    host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(f"{server.name}: http://{host}:{server.server_port}/", flush=True)
    server.serve_forever()
    server.close()


if __name__ == "__main__":
    run_script(main)
