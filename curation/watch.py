"""Stop asking an endpoint that brings nothing usable, before all captions are dropped for it."""
import collections
import io
from dataclasses import dataclass, field

from PIL import Image

from curation.shards import PostponedShard

# So many questions in a row without a usable reply end a stage. If half of all replies are useless
# for good reasons, that happens by chance once in 10^15 questions.
USELESS_IN_A_ROW = 50
# More HTTP refusals than this, and than half of a shard, end it too.
MIN_REFUSED = 20
# A row that any model can be asked about, with the picture of `control_picture`.
CONTROL_ROW = {
    "alt_text": "a red square",
    "caption": "A red square on a white background.",
    "conversations": [
        {"from": "human", "value": "<image>\nWhich colour has the square?"},
        {"from": "gpt", "value": "The square is red."},
    ],
}


def control_picture():
    """Bytes of a PNG of a red square on white."""
    image = Image.new("RGB", (224, 224), "white")
    image.paste((255, 0, 0), (56, 56, 168, 168))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class UselessReplies(ValueError):
    """The endpoint is at fault. No row is dropped for it; the same command asks again."""


@dataclass
class ReplyWatch:
    """What became of the questions of a run."""
    endpoint: str
    n_usable: int = 0
    useless: collections.Counter = field(default_factory=collections.Counter)  # in a row, by reason
    why: str = ""  # the last of them, in the endpoint's words
    n_refused: int = 0  # by HTTP, in this shard
    postponed: set = field(default_factory=set)  # names of shards that wait for a usable reply

    def note(self, reason, n_questions, why=""):
        """Count one question; reason: why its reply is not used, or None. UselessReplies: stop.

        n_questions: those of the shard. why: the reason in the endpoint's words.
        """
        if not reason:
            self.n_usable += 1
            self.useless.clear()
            return
        self.useless[reason] += 1
        self.why = why
        if reason.startswith("http_"):
            self.n_refused += 1
        if self.useless.total() >= USELESS_IN_A_ROW:
            raise UselessReplies(self.message())
        if self.n_refused > max(MIN_REFUSED, n_questions // 2):
            raise UselessReplies(self.message(f"{self.endpoint} refuses most pictures ({reason})"))

    def end_shard(self, name, control):
        """PostponedShard if no question of the run had a usable reply so far.

        control: asks about CONTROL_ROW and returns why the reply is of no use, or None. That is
        done when the shard comes again: then either these rows or the endpoint are at fault.
        """
        self.n_refused = 0
        if self.n_usable:
            return
        if name not in self.postponed:
            self.postponed.add(name)
            raise PostponedShard(self.message())
        problem = control()
        if problem:
            raise PostponedShard(self.message(
                f"{self.endpoint}: nothing usable came of the rows of {name}, nor of a question "
                f"about a red square ({problem})"))

    def message(self, problem=""):
        if not problem:
            reasons = ", ".join(f"{name} {n}" for name, n in self.useless.items())
            problem = (f"{self.endpoint}: nothing usable came of the last "
                       f"{self.useless.total()} questions ({reasons})")
        if self.why:
            problem += f": {self.why}"
        if self.useless["stump"]:
            problem += "; where captions may end without a full stop give --ending=any"
        return (f"{problem}; none of these rows is dropped: see what the endpoint says, then give "
                "the same command again, without the rows that no model can answer")
