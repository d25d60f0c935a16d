"""One thread that decodes: requests that arrive together are answered together.

A request waits in a queue until `generate.decode` has room for it; its tokens go into a queue of
its own, from which the thread of its connection reads them.
"""
import contextlib
import queue
import threading

from generate import Decoding, decode
from serving.answer import ENDED, Answer
from serving.ask import Refused
from serving.connections import tell


class Engine:
    """Answers requests with a loaded model until it is closed."""

    def __init__(self, assistant, batch_size, waiting, places):
        """batch_size: answers generated at once; waiting: requests that may wait beside them.

        places: tokens of a prompt and its answer, at most.
        """
        self.assistant = assistant
        self.places = places
        self.batch_size = batch_size
        self.most = batch_size + waiting
        self.arrived = queue.SimpleQueue()  # Answers
        self.running = {}  # number of a request -> its Answer
        self.lock = threading.Lock()
        self.n_held = 0  # places that are taken
        self.closing = False
        self.thread = threading.Thread(target=self.run, name="decoding", daemon=True)
        self.thread.start()

    # ---- called by the threads of connections ----------------------------------------------------

    @contextlib.contextmanager
    def place(self):
        """A place among the requests that are answered or wait. Refused if there is none."""
        with self.lock:
            if self.closing:
                raise Refused(503, "the server is shutting down")
            if self.n_held >= self.most:
                raise Refused(429, f"{self.most} requests are being answered or wait; try again")
            self.n_held += 1
        try:
            yield
        finally:
            with self.lock:
                self.n_held -= 1

    def start(self, ask):
        """Queue a request -> its Answer."""
        answer = Answer(ask)
        self.arrived.put(answer)
        return answer

    def close(self):
        """Refuse what comes from now on. The thread ends when all places are free."""
        with self.lock:
            self.closing = True

    def is_done(self):
        return self.closing and self.n_held == 0

    # ---- the decoding thread ---------------------------------------------------------------------

    def requests(self):
        """What decode reads: requests as they arrive, None while there is none."""
        number = 0
        while True:
            try:
                answer = self.arrived.get(block=not self.running, timeout=0.2)
            except queue.Empty:
                if self.is_done():
                    return
                if self.running:
                    yield None
                continue
            if answer.ask.decoding.stopped:
                continue  # the client went away while it waited
            self.running[number] = answer
            number += 1
            yield answer.ask.ids, answer.ask.tiles, answer.ask.decoding

    def run(self):
        """Decode until close(). A failure ends the answers at work, and decoding starts anew."""
        while not self.is_done():
            settings = Decoding(1, set(), batch_size=self.batch_size, places=self.places,
                                compiled=self.assistant.settings.get("compiled", False))
            try:
                for number, token in decode(self.assistant.model, self.requests(), settings):
                    answer = self.running[number]
                    if token is None:
                        del self.running[number]
                        answer.tokens.put(ENDED)
                    else:
                        answer.tokens.put(token)
            except Exception as e:  # of the model: a connection's own mistakes are caught before
                tell(e)
                for answer in self.running.values():
                    answer.failed = True
                    answer.tokens.put(ENDED)
                self.running.clear()
