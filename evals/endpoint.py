"""A model behind any OpenAI-compatible endpoint, asked about text and pictures. Standard library only.

For eval.py a judge of answers that no rule can read, for curate.py a captioner and a judge of captions. Replies are
kept in a .jsonl, a line each, so that no question is asked twice and an interrupted run goes on.
The key comes from the environment: JUDGE_API_KEY; else none is sent.
"""
import base64, collections, contextlib, hashlib, http.client, itertools, json, os, threading, time
import urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ATTEMPTS = (0.0, 0.5, 1.0)          # temperatures, until a reply is valid (VLMEvalKit raises it by 0.5 each time too)
TRIES, WAIT_S, TIMEOUT_S = 6, 1.0, 120     # of a request that fails; seconds before the second try, then doubled
REFUSED = (400, 413, 415, 422)      # HTTP: nothing is wrong but this picture or its size
IMAGE_TYPES = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp"}    # by the first two bytes

class Replies:
    """Replies by key in an append-only .jsonl: {"reply", "finish", "usage", ...}. A torn line is passed over."""
    def __init__(self, path):
        self.path, self.known, self.lock = Path(path), {}, threading.Lock()
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self.known[entry["key"]] = {"finish": None, "usage": {}, "reply": entry["reply"], **entry}

    def add(self, key, **entry):
        """Write one reply down, then believe it."""
        line = "\n" + json.dumps(entry := {"key": key, **entry})       # the newline first: it ends a torn line
        with self.lock, open(self.path, "a", encoding="utf-8") as f: f.write(line)
        self.known[key] = entry
        return entry

def reply_key(model, prompt, temperature, images=()):
    """The key of a reply: who was asked, what, about which pictures (bytes)."""
    pictures = [hashlib.sha256(image).hexdigest() for image in images]
    return hashlib.sha256(json.dumps([model, prompt, temperature, *pictures]).encode()).hexdigest()

class ChatClient:
    """url: of the API, such as http://127.0.0.1:8000/v1, or several that serve the same model, separated by commas;
    model: its name there; cache: path of the .jsonl; threads: requests at a time; max_tokens: longest reply."""
    def __init__(self, url, model, cache, threads=8, max_tokens=128):
        self.urls = [part.strip() for part in url.split(",") if part.strip()]
        if not self.urls or not model or not all(u.startswith(("http://", "https://")) for u in self.urls):
            raise ValueError("give http://.../v1 and a model: --judge and --judge_model=NAME; curate.py: --endpoint...")
        self.urls = [u.rstrip("/").removesuffix("/chat/completions") + "/chat/completions" for u in self.urls]
        self.model, self.threads, self.max_tokens, self.turn = model, threads, max_tokens, itertools.count()
        self.replies, self.counts = Replies(cache), collections.Counter()   # counts: calls, retries

    def request(self, prompt, temperature, images):
        """The HTTP request of one call; each goes to the next endpoint."""
        content = [{"type": "text", "text": prompt}]
        for image in images:
            uri = f"data:image/{IMAGE_TYPES.get(image[:2], 'jpeg')};base64,{base64.b64encode(image).decode()}"
            content.insert(-1, {"type": "image_url", "image_url": {"url": uri}})
        body = {"model": self.model, "messages": [{"role": "user", "content": content if images else prompt}],
                "temperature": temperature, "max_tokens": self.max_tokens}
        secret = os.environ.get("JUDGE_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {secret}"} if secret else {})}
        return urllib.request.Request(self.urls[next(self.turn) % len(self.urls)], json.dumps(body).encode(), headers)

    def entry(self, prompt, temperature, images=()):
        """One reply from the log or an endpoint, {"reply", "finish", "usage"}; finish is "http_400" or the like where a
        picture was refused. ValueError when the endpoint refuses everything or stays away."""
        key = reply_key(self.model, prompt, temperature, images)
        if key in self.replies.known: return self.replies.known[key]
        for attempt in range(TRIES):
            call, last = self.request(prompt, temperature, images), attempt == TRIES - 1
            with self.replies.lock: self.counts["calls"] += 1
            try:
                with urllib.request.urlopen(call, timeout=TIMEOUT_S) as answer:
                    whole = json.load(answer)
                    choice, usage = whole["choices"][0], whole.get("usage") or {}
                    text, finish = "" + (choice["message"]["content"] or ""), choice.get("finish_reason")
                break
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {e.reason}" + "; set JUDGE_API_KEY=..." * (e.code in (401, 403))
                if images and e.code in REFUSED: return {"reply": "", "finish": f"http_{e.code}", "usage": {}}
                last = last or e.code < 500 and e.code not in (408, 409, 429)      # asking again does not help
            except (OSError, ValueError, LookupError, TypeError, AttributeError, http.client.HTTPException) as e:
                problem = f"{type(e).__name__}: {e}"
            if last: raise ValueError(f"judge {call.full_url}: {problem}; replies so far are kept, run again to go on")
            with self.replies.lock: self.counts["retries"] += 1
            time.sleep(WAIT_S * 2 ** attempt)
        shown = {} if images else {"prompt": prompt}                   # about pictures, prompts are files
        return self.replies.add(key, model=self.model, reply=text, finish=finish,
                                usage={k: v for k, v in usage.items() if isinstance(v, int)}, **shown)

    def first_valid(self, prompt, good, images=()):
        """The first reply that good(text) accepts, the temperature rising; None where there was none."""
        for temperature in ATTEMPTS:
            entry = self.entry(prompt, temperature, images)
            if good(entry["reply"]) or str(entry["finish"]).startswith("http_"): return entry

    def each(self, jobs):
        """[(prompt, test of the reply, pictures), ...] -> yield (number, entry or None), each as soon as it is there.
        ValueError as in `entry`."""
        self.replies.path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = {pool.submit(self.first_valid, *job): number for number, job in enumerate(jobs)}
            try:
                for job in as_completed(waiting): yield waiting[job], job.result()
            finally:
                pool.shutdown(cancel_futures=True)                         # after an error nothing more is asked

    def ask(self, prompts, valid):
        """Prompts and, for each, a test of the reply -> the first valid reply of each, "" where there was none."""
        found = dict(self.each([*zip(prompts, valid)]))
        return [found[i]["reply"] if found[i] else "" for i in range(len(prompts))]

def connect(url, model, cache):
    """`ask` of that judge; None if there is neither url nor model."""
    return ChatClient(url, model, cache).ask if url or model else None
