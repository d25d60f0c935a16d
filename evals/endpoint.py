"""A model behind an OpenAI-compatible endpoint, asked about text and pictures.

For eval.py it is a judge of answers that no rule can read, for curate.py a captioner and a judge
of captions. Replies are kept in a .jsonl, one a line, so that no question is asked twice and an
interrupted run goes on. The key comes from the environment variable JUDGE_API_KEY; without it
none is sent. Standard library only.
"""
import base64
import collections
import concurrent.futures
import email.utils
import hashlib
import http.client
import itertools
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from evals.chat_request import error_words, send, token_counts
from inputs.files import naming, printable, read_jsonl
from inputs.images import image_type

# Temperatures that are tried until a reply is valid. VLMEvalKit raises it by 0.5 each time too.
ATTEMPTS = (0.0, 0.5, 1.0)
# Of a request that fails; the wait before the second try doubles with each further one.
TRIES = 6
WAIT_S = 1.0
# HTTP statuses of an endpoint that is busy or not up yet. It is waited for longer, as long as it
# says; here in units of WAIT_S: the longest wait that it has not asked for, and all together.
BUSY = (429, 503, 529)
LONGEST_WAIT = 60
PATIENCE = 900
# HTTP statuses: nothing is wrong but this picture or text, or its size.
REFUSED = (400, 413, 415, 422)
# HTTP statuses below 500 after which it helps to ask again.
ASK_AGAIN = (408, 409, 429)

HOW_TO_ASK = ("give http://.../v1 and a model: --judge and --judge_model=NAME; curate.py: "
              "--endpoint and --endpoint_model=NAME")


class Replies:
    """Replies by key in an append-only .jsonl: {"reply", "finish", "usage", ...}."""

    def __init__(self, path):
        self.path = Path(path)
        self.known = {}
        self.forgotten = []  # entries that were paid for and are not used
        self.lock = threading.Lock()
        for entry in read_jsonl(self.path):
            if not isinstance(entry, dict):
                continue
            if isinstance(entry.get("key"), str) and isinstance(entry.get("reply"), str):
                # Older versions wrote down counts that are none.
                usage = token_counts(entry.get("usage"))
                self.known[entry["key"]] = {"finish": None, **entry, "usage": usage}
            elif str(entry.get("forget")) in self.known:
                self.forgotten.append(self.known.pop(entry["forget"]))

    def add(self, key, **entry):
        """Write one reply down; returns its entry."""
        entry = {"key": key, **entry}
        self.write(entry)
        self.known[key] = entry
        return entry

    def forget(self, key):
        """Make a question one that was never asked."""
        self.write({"forget": key})
        self.forgotten.append(self.known.pop(key))

    def write(self, entry):
        # The newline comes first: it ends a line that a killed run left torn.
        line = "\n" + json.dumps(entry)
        with self.lock, naming(self.path), open(self.path, "a", encoding="utf-8") as f:
            f.write(line)


def reply_key(model, prompt, temperature, images=()):
    """The key of a reply: who was asked, what, about which pictures (bytes)."""
    pictures = [hashlib.sha256(image).hexdigest() for image in images]
    text = json.dumps([model, prompt, temperature, *pictures])
    return hashlib.sha256(text.encode()).hexdigest()


class ChatClient:
    """Asks the model `model` at `url`, such as http://127.0.0.1:8000/v1.

    url: also several addresses that serve the same model, separated by commas. cache: path of the
    .jsonl. threads: requests at a time. max_tokens: of the longest reply. refusable: a question
    without a picture may be refused, as one with a picture may, and the others go on.
    """

    def __init__(self, url, model, cache, threads=8, max_tokens=128, refusable=False):
        self.urls = [chat_address(part.strip()) for part in url.split(",") if part.strip()]
        if not self.urls or not model:
            raise ValueError(HOW_TO_ASK)
        self.model = model
        self.threads = threads
        self.max_tokens = max_tokens
        self.refusable = refusable
        self.replies = Replies(cache)
        # How many calls and retries there were.
        self.counts = collections.Counter()
        self._next_url = itertools.cycle(self.urls)
        self._stopping = threading.Event()  # wakes those who wait
        self._told = -60.0  # when the last line about waiting was printed

    def request(self, prompt, temperature, images):
        """The HTTP request of one call. Each goes to the next endpoint."""
        content = prompt
        if images:
            content = [*map(image_part, images), {"type": "text", "text": prompt}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        secret = os.environ.get("JUDGE_API_KEY")
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        url = next(self._next_url)
        return urllib.request.Request(url, json.dumps(body).encode(), headers)

    def entry(self, prompt, temperature, images=()):
        """One reply from the log or an endpoint: {"reply", "finish", "usage"}.

        finish is "http_400" or the like where a question was refused, and "why" says what the
        endpoint says. Raises ValueError when it refuses everything or stays away.
        """
        key = reply_key(self.model, prompt, temperature, images)
        if key in self.replies.known:
            return self.replies.known[key]
        waits = Waits()
        while True:
            call = self.request(prompt, temperature, images)
            self._count("calls")
            try:
                reply = send(call)
                break
            except urllib.error.HTTPError as e:
                why = without_key(error_words(e))
                if e.code in REFUSED and (images or self.refusable):
                    return {"reply": "", "finish": f"http_{e.code}", "usage": {}, "why": why}
                problem = http_problem(e, why)
                seconds = waits.after(e.code, retry_after(e.headers, time.time()))
            except (OSError, ValueError, LookupError, TypeError, AttributeError,
                    http.client.HTTPException) as e:
                # No connection, or a reply that is no JSON of the right form.
                problem = f"{type(e).__name__}: {e}"
                seconds = waits.after()
            # An endpoint may send line ends where none belong.
            problem = " ".join(problem.split())
            if seconds is None:
                raise ValueError(f"judge {call.full_url}: {problem}; replies so far are kept, "
                                 "run again to go on")
            self._count("retries")
            self._wait(seconds, f"{call.full_url}: {problem}")
        # Without pictures prompts differ, and the log is easier to read with them. With pictures
        # they are files.
        shown = {} if images else {"prompt": prompt}
        return self.replies.add(key, model=self.model, **reply, **shown)

    def _wait(self, seconds, problem):
        """Wait before the next try; ValueError if the others have stopped meanwhile."""
        now = time.monotonic()
        with self.replies.lock:
            if seconds >= 30 and now - self._told > 60:
                self._told = now
                line = printable(f"{problem}; asking again in {seconds:.0f} s")
                print(line, file=sys.stderr)
        if self._stopping.wait(seconds):
            raise ValueError("stopped while waiting for the endpoint")

    def _count(self, name):
        with self.replies.lock:
            self.counts[name] += 1

    def first_valid(self, prompt, is_valid, images=()):
        """The first entry whose reply is valid, while the temperature rises; None without one.

        It is also the entry of a question that is refused.
        """
        for temperature in ATTEMPTS:
            entry = self.entry(prompt, temperature, images)
            refused = str(entry["finish"]).startswith("http_")
            if refused or is_valid(entry["reply"]):
                return entry
        return None

    def each(self, jobs):
        """Yield (number of the job, entry or None), each as soon as it is there.

        jobs: [(prompt, test of the reply, pictures), ...]. Raises ValueError as `entry` does.
        """
        self.replies.path.parent.mkdir(parents=True, exist_ok=True)
        self._stopping.clear()
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            waiting = {}
            for number, job in enumerate(jobs):
                waiting[pool.submit(self.first_valid, *job)] = number
            try:
                for job in concurrent.futures.as_completed(waiting):
                    yield waiting[job], job.result()
            finally:
                # After an error nothing more is asked.
                self._stopping.set()
                pool.shutdown(cancel_futures=True)

    def ask(self, prompts, tests):
        """Prompts and a test of the reply for each -> the first valid replies, "" for none."""
        jobs = list(zip(prompts, tests, strict=True))
        found = dict(self.each(jobs))
        return [found[i]["reply"] if found[i] else "" for i in range(len(jobs))]


@dataclass
class Waits:
    """The waits before the tries of one question."""
    n_failed: int = 0
    n_busy: int = 0
    waited: float = 0.0  # seconds, for a busy endpoint

    def after(self, status=None, told=0.0):
        """Seconds to wait after a failure; None: it is no use, or it has been tried long enough.

        status: of HTTP, None without an answer. told: seconds that the endpoint asks to wait.
        """
        if status in BUSY:
            seconds = max(WAIT_S * min(2**self.n_busy, LONGEST_WAIT), told)
            self.n_busy += 1
            self.waited += seconds
            return seconds if self.waited <= WAIT_S * PATIENCE else None
        if status is not None and status < 500 and status not in ASK_AGAIN:
            return None
        self.n_failed += 1
        return WAIT_S * 2 ** (self.n_failed - 1) if self.n_failed < TRIES else None


def retry_after(headers, now):
    """Seconds that an answer's Retry-After asks to wait, 0 without one that can be read.

    now: seconds since 1970. The header holds seconds or a date (RFC 9110, 10.2.3).
    """
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def without_key(text):
    """A text of an endpoint, which may repeat the key that it was sent."""
    secret = os.environ.get("JUDGE_API_KEY")
    return text.replace(secret, "***") if secret else text


def http_problem(error, why):
    """An HTTPError in words; why: those of the endpoint, "" if it has none."""
    problem = f"HTTP {error.code} {error.reason}"
    if why:
        problem += f": {why}"
    if error.code in (401, 403):
        problem += "; set JUDGE_API_KEY=..."
    if 300 <= error.code < 400:
        problem += f" to {error.headers['Location']!r}, which is not followed; give the "
        problem += "address that answers"
    told = retry_after(error.headers, time.time())
    if told:
        problem += f"; it asks to wait {told:.0f} s"
    return problem


def chat_address(url):
    """The address of chat completions at an endpoint."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(HOW_TO_ASK)
    return url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


def image_part(image):
    """The bytes of a picture file -> its part of a message."""
    kind = image_type(image)
    uri = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def connect_judge(url, model, cache):
    """`ask` of that judge; None if there is neither url nor model."""
    if not url and not model:
        return None
    return ChatClient(url, model, cache).ask
