"""A local OpenAI-compatible endpoint that knows the exact truth of toy pictures; facts of captions.

    # fails 5 % of the requests and answers another 5 % in a wrong form
    python tests/toy_endpoint.py serve PORT_FILE shards/web/*.truth.jsonl
    python tests/toy_endpoint.py facts shards/web/*.truth.jsonl -- \\
        alt=shards/unique new=shards/captions:shards/reference

As a captioner it says the truth. As a judge it finds richness from the recall and alignment from
the precision of the facts in the caption. Which replies are malformed depends on question, picture
and temperature alone. Which requests fail does not, for they are asked again.
"""
import base64
import collections
import hashlib
import http.server
import json
import re
import sys
import tarfile
import threading
import time
from pathlib import Path

THING = re.compile(
    r"(?:(small|large) )?(?:(red|green|blue|yellow|purple|black) )?"
    r"(circle|square|triangle|star|cross)\b"
    r"(?: ((?:top|bottom)(?: left| right)?|left|right|middle)\b)?"
)
BOARD = re.compile(r"\b(sign|note|list|table|bar chart|line chart)\b")


# ---- facts ---------------------------------------------------------------------------------------


def facts(caption):
    """Facts that a caption states, a Counter.

    For each thing: its kind; with colour; with colour and size; with all that and its place. Also
    the number of things, the kind of board, and each word, row or value written on it.
    """
    found = collections.Counter()
    for size, color, kind, place in THING.findall(caption):
        found[kind] += 1
        if color:
            found[f"{color} {kind}"] += 1
        if color and size:
            found[f"{size} {color} {kind}"] += 1
        if color and size and place:
            found[f"{size} {color} {kind} {place}"] += 1
    found.update(f"number {n}" for n in re.findall(r"\b(\d+) shape", caption))
    found.update(f"a {kind}" for kind in BOARD.findall(caption))
    written = caption.partition(":")[2]
    found.update(f"reads {part}" for part in re.findall(r"\b[A-Z]+\d*\b", written))
    values = caption.partition("chart:")[2]
    found.update(f"value {color} {n}" for color, n in re.findall(r"([a-z]+) (\d+)\b", values))
    return found


def precision_recall(pairs):
    """[(caption, truth), ...] -> precision and recall of all their facts, in per cent."""
    hits = 0
    stated = 0
    wanted = 0
    for caption, truth in pairs:
        found = facts(caption)
        true = facts(truth)
        hits += (found & true).total()
        stated += found.total()
        wanted += true.total()
    return 100 * hits / max(1, stated), 100 * hits / max(1, wanted)


def read_truth(paths):
    """{sha256 of a picture: caption} of the toy world's .truth.jsonl files."""
    truth = {}
    for path in paths:
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            truth[row["sha256"]] = row["caption"]
    return truth


def read_shards(folder):
    """Yield the rows of all shards of a folder."""
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield json.loads(tar.extractfile(member).read())


# ---- the endpoint --------------------------------------------------------------------------------


def hash_share(text):
    """A number in [0, 1) that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


class Endpoint:
    """Serves in a thread.

    truth: {sha256 of a picture: caption}. asked: every (sha256, prompt, temperature) that got a
    reply, in order. fail, malformed: shares of the requests.
    """

    def __init__(self, truth, fail=0.05, malformed=0.05, delay=0.0):
        self.truth = truth
        self.fail = fail
        self.malformed = malformed
        self.delay = delay
        self.asked = []
        self.n_requests = 0
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.endpoint = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def count(self, call):
        """Note a request -> whether it fails."""
        with self.lock:
            self.n_requests += 1
            fails = hash_share(str(self.n_requests)) < self.fail
            if not fails:
                self.asked.append(call)
        return fails

    def status(self, sha256):
        """The HTTP status of a request that does not fail."""
        return 200

    def reply(self, sha256, prompt, temperature):
        """(text, reason why it ends)."""
        share = hash_share(f"{sha256}/{prompt}/{temperature}")
        malformed = share < self.malformed
        which = int(share * 2**32) % 4
        truth = self.truth.get(sha256)
        if "richness" not in prompt.lower():
            if malformed:
                return ["", "   ", "\n", ""][which], "stop"
            return truth, "length" if truth.endswith(" and") else "stop"

        caption = re.search(r"Caption: (.*)", prompt)[1]
        precision, recall = precision_recall([(caption, truth)])
        richness = f"richness: {1 + round(recall / 25)}"
        alignment = f"alignment: {1 + round(precision / 25)}"
        good = f"{richness}\n{alignment}"
        if malformed:
            wrong = [richness, "richness: 7\nalignment: 5", "I would say 4 of 5."]
            return [*wrong, good + "\nrichness: 5"][which], "stop"
        return good, "stop"


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, *args):
        """Say nothing of a client that was killed."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        if isinstance(parts, str):  # no picture
            parts = [{"type": "text", "text": parts}]
        prompt = "".join(part.get("text", "") for part in parts)
        uri = next((part["image_url"]["url"] for part in parts if "image_url" in part), "")
        sha256 = hashlib.sha256(base64.b64decode(uri.partition(",")[2])).hexdigest()
        time.sleep(endpoint.delay)
        fails = endpoint.count((sha256, prompt, body["temperature"]))
        text, finish = endpoint.reply(sha256, prompt, body["temperature"])
        usage = {
            "prompt_tokens": 100 + len(prompt.split()),
            "completion_tokens": len(text.split()),
        }
        choice = {"message": {"content": text}, "finish_reason": finish}
        status = 500 if fails else endpoint.status(sha256)
        whole = {"choices": [choice], "usage": usage}
        if status >= 400:
            whole = {"error": {"message": f"there is no answer to {len(prompt)} characters"}}
        content = json.dumps(whole).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        """Print nothing."""


# ---- command line --------------------------------------------------------------------------------


def serve(address_file, truth_files):
    """Write the endpoint's address into a file and serve until the process is killed."""
    endpoint = Endpoint(read_truth(truth_files))
    Path(address_file).write_text(endpoint.url)
    threading.Event().wait()


def print_facts(truth_files, sets):
    """sets: name=folder of shards, or name=folder:other, without the rows that are in other."""
    truth = read_truth(truth_files)
    for entry in sets:
        name, _, folders = entry.partition("=")
        folder, _, without = folders.partition(":")
        left_out = {row["id"] for row in read_shards(without)} if without else set()
        pairs = []
        for row in read_shards(folder):
            if row["id"] not in left_out:
                pairs.append((row["caption"], truth[row["sha256"]]))
        precision, recall = precision_recall(pairs)
        print(f"{name}: {len(pairs)} captions, precision {precision:.1f} %, "
              f"recall {recall:.1f} % of the facts")


def main():
    command, *args = sys.argv[1:]
    if command == "serve":
        serve(args[0], args[1:])
    else:
        cut = args.index("--")
        print_facts(args[:cut], args[cut + 1 :])


if __name__ == "__main__":
    main()
