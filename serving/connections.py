"""The connections of the server: how many, how long they may take, how much they may send."""
import socket
import sys
import threading
import time
from http.server import ThreadingHTTPServer

from serving.ask import Refused

MAX_CONNECTIONS = 128
MAX_BODIES = 64 * 2**20  # bytes of all requests that are being read or answered


class Connections(ThreadingHTTPServer):
    """Connections, one thread each. One whose request does not come to an end is closed."""
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host, port, handler):
        self.deadlines = {}  # open socket -> when the request that it sends must be there
        self.lock = threading.Lock()
        self.n_body_bytes = 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def process_request(self, connection, address):
        with self.lock:
            full = len(self.deadlines) >= MAX_CONNECTIONS
        if full:
            self.shutdown_request(connection)
        else:
            self.set_deadline(connection, 10)  # its thread sets another one
            super().process_request(connection, address)

    def shutdown_request(self, connection):
        with self.lock:
            self.deadlines.pop(connection, None)
        super().shutdown_request(connection)

    def handle_error(self, connection, address):
        """A client that went away is no error of ours; of others print one line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f"error: {address[0]}: {type(error).__name__}: {error}", file=sys.stderr)

    def service_actions(self):
        """Called twice a second: close the connections that are late."""
        now = time.monotonic()
        with self.lock:
            late = [connection for connection, end in self.deadlines.items() if end < now]
        for connection in late:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has gone by itself

    def set_deadline(self, connection, seconds):
        with self.lock:
            self.deadlines[connection] = time.monotonic() + seconds

    def reserve(self, n_bytes):
        """Count bytes of a body that is read next; a negative number gives them back."""
        with self.lock:
            if self.n_body_bytes + n_bytes > MAX_BODIES:
                raise Refused(503, "too many large requests at once; try again")
            self.n_body_bytes += n_bytes
