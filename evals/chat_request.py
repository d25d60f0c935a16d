"""One HTTP request to a chat endpoint, bounded in time and size, without redirects.

urllib follows a redirect to any host, with the key in the headers, and waits as long as a byte
comes now and then. Standard library only.
"""
import http.client
import io
import json
import re
import time
import urllib.request

# From the connection to the end of the reply. A connection itself may take as long.
TIMEOUT_S = 120
MAX_REPLY_BYTES = 4 * 2**20
MAX_ERROR_BYTES = 2**16
MAX_ERROR_WORDS = 300  # characters that are kept of what an error says
MAX_TOKENS = 10**9  # a larger count of tokens is none


class DeadlineReader(io.RawIOBase):
    """The bytes of a socket until a deadline; a socket's own timeout begins anew with each byte."""

    def __init__(self, raw, sock):
        self.raw = raw
        self.sock = sock
        self.deadline = time.monotonic() + TIMEOUT_S

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"the reply was not there after {TIMEOUT_S} s")
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class BoundedReply(http.client.HTTPResponse):
    """A reply that has to be there in time."""

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(DeadlineReader(self.fp.detach(), sock))


class PlainConnection(http.client.HTTPConnection):
    response_class = BoundedReply


class SecureConnection(http.client.HTTPSConnection):
    response_class = BoundedReply


class PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(PlainConnection, request)


class SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(SecureConnection, request, context=self._context)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        # urllib then raises HTTPError with the status of the redirect.
        return None


OPENER = urllib.request.build_opener(PlainHandler, SecureHandler, NoRedirect)


def send(call):
    """Make an HTTP request to a chat endpoint -> {"reply", "finish", "usage"}.

    Raises OSError (HTTPError for a redirect) or HTTPException if there is no answer in time;
    ValueError, LookupError, TypeError or AttributeError if it is none of a chat endpoint.
    """
    with OPENER.open(call, timeout=TIMEOUT_S) as answer:
        content = answer.read(MAX_REPLY_BYTES + 1)
    if len(content) > MAX_REPLY_BYTES:
        raise ValueError(f"a reply of more than {MAX_REPLY_BYTES // 2**20} MiB")
    try:
        whole = json.loads(content)
    except RecursionError:
        raise ValueError("a reply whose JSON is nested too deep") from None
    choice = whole["choices"][0]
    # Adding text refuses what is none.
    reply = "" + (choice["message"]["content"] or "")
    usage = whole.get("usage") or {}
    if not isinstance(usage, dict):
        raise ValueError("a reply whose usage is no object")
    counts = token_counts(usage)
    return {"reply": reply, "finish": choice.get("finish_reason"), "usage": counts}


def error_words(error):
    """What the body of an HTTPError says, in one short line; "" if it says nothing."""
    try:
        text = error.read(MAX_ERROR_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return ""
    try:
        found = json.loads(text)
        # As OpenAI, vLLM and llama.cpp have it, or FastAPI.
        for name in ("error", "message", "detail"):
            if isinstance(found, dict):
                found = found.get(name, found)
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        text = re.sub("<[^>]*>", " ", text)  # a page of a proxy
    return " ".join(text.split())[:MAX_ERROR_WORDS]


def token_counts(usage):
    """{name: count} of the tokens that a reply says it took; what is no count is left out."""
    if not isinstance(usage, dict):
        return {}
    counts = {}
    for name, count in usage.items():
        # True and False are integers for isinstance.
        if type(count) is int and 0 <= count <= MAX_TOKENS:
            counts[name] = count
    return counts
