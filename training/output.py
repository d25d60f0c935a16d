"""What a run prints must not end it: its terminal may close, the disk under its output be full."""
import sys


class ForgivingStream:
    """A text stream whose failing writes are lost."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            pass

    def __getattr__(self, name):
        return getattr(self.stream, name)


def forgive_output():
    """From now on a failing print loses its text and raises nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, ForgivingStream):
            setattr(sys, name, ForgivingStream(stream))
