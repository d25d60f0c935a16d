"""A local OpenAI-compatible endpoint that knows the exact truth of toy pictures, and facts of captions against it.

    python tests/toy_endpoint.py serve PORT_FILE shards/web/*.truth.jsonl       # fails 5 %, answers malformed 5 %
    python tests/toy_endpoint.py facts shards/web/*.truth.jsonl -- alt=shards/unique new=shards/captions:shards/reference

As a captioner it says the truth. As a judge it finds richness from the recall and alignment from the precision of the
facts in the caption. Which replies are malformed depends on question, picture and temperature alone; which
requests fail does not, for they are asked again.
"""
import base64, collections, hashlib, http.server, json, re, sys, tarfile, threading, time
from pathlib import Path

THING = re.compile(r"(?:(small|large) )?(?:(red|green|blue|yellow|purple|black) )?(circle|square|triangle|star|cross)\b"
                   r"(?: ((?:top|bottom)(?: left| right)?|left|right|middle)\b)?")
KIND = re.compile(r"\b(sign|note|list|table|bar chart|line chart)\b")


def facts(caption):
    """Facts that a caption states, a Counter: for each thing its kind, colour and kind, all with size, all with place;
    the number of things; the kind of board; each word, row or value written on it."""
    found = collections.Counter()
    for size, color, kind, place in THING.findall(caption):
        found.update([kind] + [f"{color} {kind}"] * bool(color) + [f"{size} {color} {kind}"] * bool(size and color)
                     + [f"{size} {color} {kind} {place}"] * bool(size and color and place))
    found.update(f"number {n}" for n in re.findall(r"\b(\d+) shape", caption))
    found.update(f"a {kind}" for kind in KIND.findall(caption))
    found.update(f"reads {part}" for part in re.findall(r"\b[A-Z]+\d*\b", caption.partition(":")[2]))
    found.update(f"value {color} {n}" for color, n in re.findall(r"([a-z]+) (\d+)\b", caption.partition("chart:")[2]))
    return found


def precision_recall(pairs):
    """[(caption, truth), ...] -> precision and recall of all their facts, in per cent."""
    hits = have = want = 0
    for said, true in pairs:
        a, b = facts(said), facts(true)
        hits, have, want = hits + (a & b).total(), have + a.total(), want + b.total()
    return 100 * hits / max(1, have), 100 * hits / max(1, want)


def read_truth(paths):
    rows = (json.loads(line) for path in paths for line in Path(path).read_text().splitlines())
    return {row["sha256"]: row["caption"] for row in rows}


def read_shards(folder):
    """Rows of all shards of a folder."""
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from (json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json"))


class Endpoint:
    """Serves in a thread; truth: {sha256 of a picture: caption}. asked: every (sha256, prompt, temperature) that got a
    reply, in order. fail, malformed: shares."""
    def __init__(self, truth, fail=0.05, malformed=0.05, delay=0.0):
        self.truth, self.fail, self.malformed, self.delay = truth, fail, malformed, delay
        self.asked, self.n, lock = [], 0, threading.Lock()
        endpoint = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                parts = body["messages"][0]["content"]
                prompt = "".join(p.get("text", "") for p in parts)
                uri = next(p["image_url"]["url"] for p in parts if p["type"] == "image_url")
                sha = hashlib.sha256(base64.b64decode(uri.partition(",")[2])).hexdigest()
                time.sleep(endpoint.delay)
                with lock:
                    endpoint.n += 1
                    broken = int(hashlib.sha256(str(endpoint.n).encode()).hexdigest()[:8], 16) / 2 ** 32 < endpoint.fail
                    if not broken: endpoint.asked.append((sha, prompt, body["temperature"]))
                content, finish = endpoint.reply(sha, prompt, body["temperature"])
                data = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}], "usage": {
                    "prompt_tokens": 100 + len(prompt.split()), "completion_tokens": len(content.split())}}).encode()
                self.send_response(500 if broken else endpoint.status(sha))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            def log_message(self, *args): pass
        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True
            def handle_error(self, *args): pass                        # a client that was killed
        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def status(self, sha): return 200

    def reply(self, sha, prompt, temperature):
        draw = int(hashlib.sha256(f"{sha}/{prompt}/{temperature}".encode()).hexdigest()[:8], 16)
        bad, which, true = draw / 2 ** 32 < self.malformed, draw % 4, self.truth.get(sha)
        if "richness" not in prompt.lower():
            return (["", "   ", "\n", ""][which], "stop") if bad else (true, "length" if true.endswith(" and") else "stop")
        said = re.search(r"Caption: (.*)", prompt)[1]
        precision, recall = precision_recall([(said, true)])
        good = f"richness: {1 + round(recall / 25)}\nalignment: {1 + round(precision / 25)}"
        return ([good.split("\n")[0], "richness: 7\nalignment: 5", "I would say 4 of 5.", good + "\nrichness: 5"][which]
                if bad else good), "stop"


def main():
    command, *args = sys.argv[1:]
    if command == "serve":
        endpoint = Endpoint(read_truth(args[1:]))
        Path(args[0]).write_text(endpoint.url)
        threading.Event().wait()
    cut = args.index("--")
    truth = read_truth(args[:cut])
    for name, folder in (arg.split("=") for arg in args[cut + 1:]):
        folder, _, without = folder.partition(":")
        left_out = {row["id"] for row in read_shards(without)} if without else ()
        pairs = [(row["caption"], truth[row["sha256"]]) for row in read_shards(folder) if row["id"] not in left_out]
        p, r = precision_recall(pairs)
        print(f"{name}: {len(pairs)} captions, precision {p:.1f} %, recall {r:.1f} % of the facts")


if __name__ == "__main__":
    main()
