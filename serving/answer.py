"""An answer that is being generated, and how it is told in OpenAI's JSON."""
import itertools
import json
import queue
import time
from dataclasses import dataclass, field

from serving.ask import Ask, Refused

LOOK_SECONDS = 0.5  # between two looks at whether the client is still there
ENDED = object()  # the last entry of the tokens of an answer


@dataclass(eq=False)
class Answer:
    """An answer that is being generated. It ends early when ask.decoding.stopped is set."""
    ask: Ask
    tokens: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)  # ids, then ENDED
    number: int = field(default_factory=itertools.count(1).__next__)
    created: int = field(default_factory=lambda: int(time.time()))
    n_tokens: int = 0  # that were read
    stopped_at_text: bool = False  # whether one of ask.stops came
    failed: bool = False  # whether the model failed

    def finish_reason(self):
        """Why a whole answer ended, in OpenAI's words."""
        cut_off = self.n_tokens >= self.ask.decoding.max_new_tokens
        return "length" if cut_off and not self.stopped_at_text else "stop"

    def usage(self):
        n_prompt = len(self.ask.ids)
        return {"prompt_tokens": n_prompt, "completion_tokens": self.n_tokens,
                "total_tokens": n_prompt + self.n_tokens}

    def ids_as_they_come(self):
        """Yield token ids, and None every LOOK_SECONDS. Refused if the model failed."""
        looked = time.monotonic()
        while True:
            token = None
            try:
                token = self.tokens.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                pass
            if token is ENDED:
                break
            if token is not None:
                self.n_tokens += 1
                yield token
            if time.monotonic() >= looked + LOOK_SECONDS:
                looked = time.monotonic()
                yield None
        if self.failed:
            raise Refused(500, "the model failed; the server has printed why")

    def texts(self, assistant, tokens):
        """Token ids as they come -> the pieces of the answer, up to a text that ends it."""
        stops = self.ask.stops
        held_back = max((len(stop) for stop in stops), default=1) - 1
        text = ""
        n_sent = 0
        for piece in assistant.texts(tokens):
            text += piece
            found = [text.find(stop) for stop in stops if stop in text]
            if found:
                self.stopped_at_text = True
                yield text[n_sent:min(found)]
                return
            end = len(text) - held_back
            if end > n_sent:
                yield text[n_sent:end]
                n_sent = end
        yield text[n_sent:]

    def as_object(self, model, key, said, reason, **more):
        """A chat.completion; or a chunk of one, if key is "delta". said: what stands under key."""
        kind = "chat.completion.chunk" if key == "delta" else "chat.completion"
        choice = {"index": 0, key: said, "finish_reason": reason, "logprobs": None}
        return {"id": f"chatcmpl-{self.number}", "object": kind, "created": self.created,
                "model": model, "choices": [choice]} | more


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def error_object(status, message, param=None):
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": kind, "param": param, "code": status}
