"""A model folder that answers questions about pictures, with the interface of ChatClient."""
import collections

from evals.endpoint import ATTEMPTS, Replies, reply_key
from generate import Assistant
from inputs.files import json_hash
from model_files import small_file_hashes, weights_hash
from training import distributed


def model_key(folder):
    """A hash of all in a model folder that decides its answers."""
    return json_hash([weights_hash(folder), small_file_hashes(folder)])[:16]


def load_assistant(cfg):
    """The Assistant of --model, on this process' GPU or on the CPU.

    The processes of torchrun share nothing but the folder they write.
    """
    device = distributed.own_device()
    dtype = distributed.compute_dtype(cfg.dtype, device)
    return Assistant(cfg.model, device, dtype, max_tiles=cfg.max_tiles,
                     compiled=distributed.is_compiled(cfg.compile, device))


class LocalModel:
    """Takes the same jobs as ChatClient and keeps the same log; batches take the place of threads.

    model: the name in the log. cache: path of the .jsonl with the replies so far.
    """

    def __init__(self, cfg, assistant, model, cache):
        self.cfg = cfg
        self.assistant = assistant
        self.model = model
        self.replies = Replies(cache)
        self.counts = collections.Counter()  # calls

    def each(self, jobs):
        """[(prompt, test of the reply, pictures), ...] -> yield (number, entry of its reply).

        The entry is None if no attempt gave a valid reply.
        """
        left = dict(enumerate(jobs))
        known = self.replies.known
        for temperature in ATTEMPTS:
            keys = {}
            for i, (prompt, _, pictures) in left.items():
                keys[i] = reply_key(self.model, prompt, temperature, pictures)
            to_ask = {i: job for i, job in left.items() if keys[i] not in known}
            if temperature == 0:
                self.answer(to_ask, keys, temperature)
            else:
                # One by one, each answer drawn with a seed of its own: the same answers come out
                # wherever an earlier process was killed.
                for i, job in to_ask.items():
                    self.answer({i: job}, keys, temperature)
            for i, (_, is_valid, _) in list(left.items()):
                if is_valid(known[keys[i]]["reply"]):
                    del left[i]
                    yield i, known[keys[i]]
        for i in left:
            yield i, None

    def answer(self, jobs, keys, temperature):
        """Answer jobs {number: job} together. Each reply is logged as soon as it is complete."""
        if not jobs:
            return
        asked = []  # numbers of the jobs, in the order of their prompts
        prompts = self.make_prompts(jobs, keys, asked)
        longest = self.cfg.max_new_tokens
        seed = int(keys[next(iter(jobs))][:8], 16)
        answers = self.assistant.ids_each(prompts, batch_size=self.cfg.batch_size, seed=seed,
                                          max_new_tokens=longest, temperature=temperature)
        for k, ids in answers:
            self.counts["calls"] += 1
            text = self.assistant.tokenizer.decode(ids).strip()
            finish = "length" if len(ids) >= longest else "stop"
            usage = {"completion_tokens": len(ids)}
            self.replies.add(keys[asked[k]], reply=text, finish=finish, usage=usage)

    def make_prompts(self, jobs, keys, asked):
        """Yield (ids, tiles) of each job whose pictures decode, and append its number to `asked`.

        A generator, so that pictures are decoded only when the batch has room for their row.
        """
        for i, (prompt, _, pictures) in jobs.items():
            try:
                tiles = [self.assistant.tiles(content) for content in pictures]
            except (ValueError, OSError):
                self.replies.add(keys[i], reply="", finish="unreadable", usage={})
                continue
            asked.append(i)
            question = "<image>\n" * len(tiles) + prompt
            yield self.assistant.prompt([(question, None)], tiles)
