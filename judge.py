"""A judge: any OpenAI-compatible endpoint that reads answers which no rule can read. Standard library only.

Replies are kept in a .jsonl, a line each, so that no question is asked twice and an interrupted run goes on.
The key comes from the environment: JUDGE_API_KEY; for api.openai.com also OPENAI_API_KEY; else none is sent.
"""
import contextlib, hashlib, http.client, json, os, time, urllib.error, urllib.parse, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ATTEMPTS = (0.0, 0.5, 1.0)          # temperatures, until a reply is valid (VLMEvalKit raises it by 0.5 each time too)
TRIES, WAIT_S, TIMEOUT_S = 6, 1.0, 120     # of a request that fails; seconds before the second try, then doubled

class Judge:
    """url: of the API, such as http://127.0.0.1:8000/v1; model: its name there; cache: path of the .jsonl."""
    def __init__(self, url, model, cache, threads=8):
        if not url.startswith(("http://", "https://")) or not model:
            raise ValueError("a judge needs both --judge=http://.../v1 and --judge_model=NAME")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.cache, self.threads, self.known = model, Path(cache), threads, {}
        for line in self.cache.read_bytes().splitlines() if self.cache.exists() else ():
            with contextlib.suppress(ValueError, KeyError):                # a torn line is passed over
                entry = json.loads(line)
                self.known[entry["key"]] = entry["reply"]

    def reply(self, prompt, temperature):
        """One reply, from the cache or the endpoint. ValueError when the endpoint refuses or stays away."""
        key = hashlib.sha256(json.dumps([self.model, prompt, temperature]).encode()).hexdigest()
        if key in self.known: return self.known[key]
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": temperature,
                "max_tokens": 128}
        openai = urllib.parse.urlsplit(self.url).hostname == "api.openai.com"
        secret = os.environ.get("JUDGE_API_KEY") or openai and os.environ.get("OPENAI_API_KEY")
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {
            "Content-Type": "application/json", **({"Authorization": f"Bearer {secret}"} if secret else {})})
        for wait in [WAIT_S * 2 ** i for i in range(TRIES)]:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    text = json.load(answer)["choices"][0]["message"]["content"] or ""
                break
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {e.reason}"
                if e.code < 500 and e.code not in (408, 409, 429): wait = 0        # asking again does not help
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as e:
                problem = f"{type(e).__name__}: {e}"
            if not wait or wait == WAIT_S * 2 ** (TRIES - 1):
                raise ValueError(f"judge {self.url}: {problem}; replies so far are kept, run again to go on")
            time.sleep(wait)
        self.known[key] = text
        line = "\n" + json.dumps({"key": key, "model": self.model, "reply": text, "prompt": prompt})
        with open(self.cache, "a", encoding="utf-8") as f: f.write(line)    # one write: lines of threads do not mix
        return text

    def ask(self, prompts, valid):
        """Prompts and, for each, a test of the reply -> the first valid reply of each, "" where there was none."""
        def one(prompt, good):
            return next((r for r in (self.reply(prompt, t) for t in ATTEMPTS) if good(r)), "")
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(self.threads) as pool:
            jobs = [pool.submit(one, *pair) for pair in zip(prompts, valid)]
            try:
                return [job.result() for job in jobs]
            finally:
                pool.shutdown(cancel_futures=True)                         # after an error nothing more is asked

def connect(url, model, cache):
    """`ask` of that judge; None if there is neither url nor model."""
    return Judge(url, model, cache).ask if url or model else None
