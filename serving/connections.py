"""The connections of the server: how many, how long they may take, how much they may send."""
import http.client
import json
import math
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from inputs.files import printable
from serving.answer import as_json, error_object
from serving.ask import Refused

MAX_CONNECTIONS = 128
MAX_HEAD = 32 * 2**10  # bytes of the header lines of a request
MAX_BODY = 20 * 2**20  # bytes of a request
SMALL_BODY = 256 * 2**10  # bytes of a request that are read however many large ones there are
MAX_BODIES = 64 * 2**20  # bytes of all requests that are being read or answered, beyond that
MAX_VALUES = 100_000  # brackets and commas of a request: each value takes memory of its own
READ_SECONDS = 30  # to send a request
WRITE_SECONDS = 30  # to take what is sent
IDLE_SECONDS = 60  # a connection may be kept open between requests
LINGER_SECONDS = 5  # to read an error while the rest of a request still comes


class Connections(ThreadingHTTPServer):
    """Connections, one thread each. One that keeps us waiting for too long is closed."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host, port, handler):
        self.deadlines = {}  # open socket -> when its client must have sent or read what is due
        self.lock = threading.Lock()
        self.n_body_bytes = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), handler)
        except OSError as e:
            raise ValueError(f"cannot listen at --host={host} --port={port}: "
                             f"{e.strerror or e}; give another one") from None

    def server_bind(self):
        """Without the base class's question to a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, connection, address):
        """Start the thread of a connection.

        If there are too many, the one whose client has least time left makes room: one that works
        for a client that waits has no deadline and is never closed.
        """
        with self.lock:
            full = len(self.deadlines) >= MAX_CONNECTIONS
            slowest = min(self.deadlines, key=self.deadlines.get, default=None)
            if full and self.deadlines[slowest] < math.inf:
                del self.deadlines[slowest]
                full = False
                close(slowest)
        if full:
            self.shutdown_request(connection)
        else:
            self.set_deadline(connection, READ_SECONDS)
            super().process_request(connection, address)

    def shutdown_request(self, connection):
        with self.lock:
            self.deadlines.pop(connection, None)
        super().shutdown_request(connection)

    def handle_error(self, connection, address):
        """A client that went away is no error of ours; of others print one line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            tell(error)

    def service_actions(self):
        """Called twice a second: close the connections that are late."""
        now = time.monotonic()
        with self.lock:
            late = [connection for connection, end in self.deadlines.items() if end < now]
            for connection in late:
                close(connection)

    def set_deadline(self, connection, seconds):
        with self.lock:
            self.deadlines[connection] = time.monotonic() + seconds

    def reserve(self, n_bytes):
        """Count bytes of a large body; a negative number gives them back."""
        with self.lock:
            if n_bytes > 0 and self.n_body_bytes + n_bytes > MAX_BODIES:
                raise Refused(503, "too many large requests at once; try again")
            self.n_body_bytes += n_bytes


def close(connection):
    """End what its thread waits for; the thread closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has gone by itself


def tell(error):
    """Print an error that is no client's, in one line."""
    print(printable(f"error: {type(error).__name__}: {error}"), file=sys.stderr, flush=True)


class Head:
    """Reads the header lines of a request, up to MAX_HEAD bytes."""

    def __init__(self, file):
        self.file = file
        self.n_left = MAX_HEAD

    def readline(self, most):
        line = self.file.readline(min(most, self.n_left + 1))
        self.n_left -= len(line)
        if self.n_left < 0:
            raise http.client.LineTooLong("headers")  # the base class answers with 431
        return line


class Connection(BaseHTTPRequestHandler):
    """The requests of one connection: read whole, within limits, and answered in JSON."""
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.1"  # of a malformed request: it gets a whole answer, too
    server_version = "sail-vl"
    sys_version = ""
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """No line for each request."""

    # ---- reading ---------------------------------------------------------------------------------

    def handle(self):
        self.refused = False
        super().handle()
        if self.refused:
            self.linger()

    def handle_one_request(self):
        self.n_reserved = 0
        self.server.set_deadline(self.connection, IDLE_SECONDS)
        try:
            super().handle_one_request()
        finally:
            self.server.reserve(-self.n_reserved)

    def parse_request(self):
        self.server.set_deadline(self.connection, READ_SECONDS)
        whole = self.rfile
        self.rfile = Head(whole)
        try:
            understood = super().parse_request()
        finally:
            self.rfile = whole
        if understood and (self.command != "POST" or "Transfer-Encoding" in self.headers):
            # What is not read as a body must not be read as the next request.
            has_body = self.headers.get("Content-Length", "0") != "0"
            if has_body or "Transfer-Encoding" in self.headers:
                self.send_error(411, "send a body with POST, and its Content-Length")
                understood = False
        return understood

    def read_body(self):
        """The JSON object of a request -> dict. Web pages of others cannot send this type."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        content = self.read_bytes()
        self.server.set_deadline(self.connection, math.inf)
        n_values = sum(map(content.count, (b"[", b"{", b",")))
        if n_values > MAX_VALUES:
            raise Refused(413, f"{n_values:,} brackets and commas; at most {MAX_VALUES:,} are read")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is not JSON: {e}") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body must be a JSON object")
        return body

    def read_bytes(self):
        """The body, as long as its header says."""
        lengths = set(self.headers.get_all("Content-Length", []))
        length = lengths.pop() if len(lengths) == 1 else ""
        if not length.isdecimal() or len(length) > 18:
            raise Refused(411, "send Content-Length, once")
        length = int(length)
        if length > MAX_BODY:
            raise Refused(413, f"{length:,} bytes; at most {MAX_BODY:,} are read")
        content = bytearray()
        while len(content) < length:
            piece = self.rfile.read(min(2**16, length - len(content)))
            if not piece:
                raise ConnectionAbortedError
            content += piece
            # Only what has come counts: a client that announces much and sends little holds none.
            large = max(len(content) - SMALL_BODY, 0)
            self.server.reserve(large - self.n_reserved)
            self.n_reserved = large
        return bytes(content)

    # ---- answering -------------------------------------------------------------------------------

    def send(self, status, content, kind="application/json", headers=()):
        """Send a whole answer; content: bytes, or what becomes JSON."""
        if not isinstance(content, bytes):
            content = as_json(content)
        self.send_response(status)
        for name, value in [("Content-Type", kind), ("Content-Length", len(content)), *headers]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.write(content)

    def write(self, content):
        """Send bytes. A client that does not take them in time is closed."""
        self.server.set_deadline(self.connection, WRITE_SECONDS)
        self.wfile.write(content)
        self.server.set_deadline(self.connection, math.inf)

    def send_error(self, status, message=None, explain=None, param=None):
        """An error as OpenAI's clients read it.

        The base class calls this for malformed requests, with two sentences. The connection is
        closed, because the body may not have been read.
        """
        self.close_connection = True
        self.refused = True
        message = message or self.responses.get(status, ("error",))[0]
        if explain:
            message += f": {explain}"
        headers = [("Connection", "close")]
        if status in (429, 503):
            headers.append(("Retry-After", "1"))
        self.send(status, {"error": error_object(status, message, param)}, headers=headers)

    def linger(self):
        """Read on after an error: closing while data comes would take the error back."""
        self.server.set_deadline(self.connection, LINGER_SECONDS)
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16):
            pass
