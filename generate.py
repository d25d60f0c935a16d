"""The scheduler of prompts, sampling, and the Assistant: a loaded model folder that answers.

Shape letters: T tokens of a prompt, S rows that decode together, K key/value heads, D head dim, V
vocabulary, N tiles of side s.
"""
import collections
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from decoding import (
    compiler,
    decode_step,
    graph_step,
    join_weights,
    no_compiler,
    prefill,
    without_waiting,
)
from inputs.chat import chat_ids
from inputs.images import load_image, make_tiles
from inputs.tokenizer import Tokenizer
from vision import working_dtype
from weights import check_vocabulary, load_folder

GREEDY_BELOW = 1e-5  # a temperature below is 0: logits divided by it may overflow
PREFILL_TOKENS = 16384  # prompt tokens that go through the model at once


# ---- what decodes --------------------------------------------------------------------------------

@dataclass(slots=True)
class Decoding:
    """How answers are generated."""
    max_new_tokens: int  # longest answer
    stop_ids: set  # token ids that end an answer; they are not part of it
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens of this total probability
    top_k: int = 0  # draw among so many tokens; 0 = all
    seed: int = 0
    stopped: bool = False  # whoever asked may set it: the answer ends with its next token
    batch_size: int = 64  # rows that decode together, at most
    batch_tokens: int = 2**19  # places of their cache, at most; a single row gets what it needs
    places: int = 0  # of a row: prompt and answer; 0: what the longest waiting prompt needs
    compiled: bool = False  # run the compiled step; a process waits for it at its first answer


class Request(NamedTuple):
    """A prompt that waits for a slot."""
    number: int
    prompt: list  # token ids
    tiles: torch.Tensor | None  # uint8 (N, 3, s, s)
    settings: Decoding


@dataclass(slots=True)
class Row:
    """A request that is being answered."""
    number: int  # of the request
    position: int  # of the newest token, which the next step reads
    end: int  # position at which the answer is as long as allowed
    settings: Decoding
    noise: torch.Generator


@dataclass(slots=True)
class Batch:
    """Rows that decode together. Their places in the cache, its slots, are the first ones."""
    cache: torch.Tensor  # keys and values (n_layers, 2, slots, K, places, D)
    tokens: torch.Tensor  # (slots,) the newest token of each row
    rows: list  # Rows, at most one for each slot
    longest_prompt: int  # that still fits, with its answer
    graphs: dict  # CUDA graphs of these tensors, see graph_step
    compiler: Callable  # of decode_step

    def remove(self, slot):
        """Take a row out. The last one moves into its slot."""
        row = self.rows.pop()
        if slot < len(self.rows):
            filled = row.position + 1
            last = len(self.rows)
            self.cache[:, :, slot, :, :filled] = self.cache[:, :, last, :, :filled]
            self.tokens[slot] = self.tokens[last]
            self.rows[slot] = row


# ---- the scheduler -------------------------------------------------------------------------------

@torch.inference_mode()
def decode(model, requests, settings):
    """Answer a stream of prompts, many at once.

    requests: an iterable of (token ids, uint8 tiles (N, 3, s, s) or None); settings: a Decoding.
    Yields (number of the request, token id) as tokens come, without the stop ids, and
    (number, None) when an answer is whole. Rows that end make room for the next requests; the
    iterable is read only as far as there is room. A draw depends on seed + number and on the step,
    not on the rows beside it.

    A request may have a Decoding of its own as a third element; its draws depend on its seed alone.
    An iterable that yields None has no request now. It is asked again after the next step, and
    should wait rather than yield None when no answer is being generated.
    """
    if settings.max_new_tokens == 0:
        for number, _ in enumerate(requests):
            yield number, None
        return

    numbered = number_requests(requests, settings)
    waiting = collections.deque()
    read_requests(waiting, numbered, settings.batch_size)
    while waiting:
        batch = new_batch(model, waiting, settings)
        while True:
            # New prompts go first. They get their first token, then all rows get their next ones.
            read_requests(waiting, numbered, settings.batch_size)
            first = len(batch.rows)
            admitted = admit(batch, waiting)
            if admitted:
                logits = start_rows(model, batch, admitted)
            elif batch.rows:
                first = 0
                logits = advance_rows(model, batch)
            else:
                break  # a prompt that is too long for this batch may still wait
            tokens, finite = choose_tokens(model, logits, batch.rows[first:])
            batch.tokens[first:len(batch.rows)] = tokens
            yield from finish_rows(batch, first, read_tokens(model, tokens, finite))


def number_requests(requests, settings):
    """Yield a Request for each request, and None for None."""
    number = 0
    for request in requests:
        if request is None:
            yield None
            continue
        prompt, tiles, *own = request
        if not own:
            own = [replace(settings, seed=settings.seed + number)]
        yield Request(number, prompt, tiles, *own)
        number += 1


def read_requests(waiting, numbered, most):
    """Fill the queue with up to `most` requests, as far as there are any now."""
    while len(waiting) < most:
        request = next(numbered, None)
        if request is None:
            return
        waiting.append(request)


def new_batch(model, waiting, settings):
    """An empty Batch for the waiting requests: any of them fits, with its answer."""
    longest = max(len(request.prompt) for request in waiting)
    longest = 64 * math.ceil(longest / 64)
    places = longest + settings.max_new_tokens
    S = min(len(waiting), settings.batch_tokens // places)
    if settings.places:  # more may come than wait now
        places = settings.places
        longest = places
        S = settings.batch_size
    S = max(S, 1)
    head = model.language_model.lm_head.weight
    cache = torch.zeros(
        model.llm.n_layers, 2, S, model.llm.n_kv_heads, places, model.llm.head_dim,
        dtype=working_dtype(head), device=head.device)
    tokens = torch.zeros(S, dtype=torch.int64, device=head.device)
    how = compiler if settings.compiled else no_compiler
    return Batch(cache, tokens, rows=[], longest_prompt=longest, graphs={}, compiler=how)


def admit(batch, waiting):
    """Take the waiting requests that start now -> a list.

    Several prompts in one pack cost less than one after the other, so as long as more wait than
    slots are free, nobody is admitted until a quarter of the slots is free.
    """
    admitted = []
    n_slots = len(batch.tokens)
    n_free = n_slots - len(batch.rows)
    if 4 * n_free < n_slots and n_free < len(waiting):
        return admitted
    n_tokens = 0
    while waiting and len(admitted) < n_free:
        length = len(waiting[0].prompt)
        n_tokens += length
        if length > batch.longest_prompt:
            break  # it waits for the next batch
        if admitted and n_tokens > PREFILL_TOKENS:
            break  # it goes into the next pack
        admitted.append(waiting.popleft())
    return admitted


def start_rows(model, batch, admitted):
    """Put requests into the next slots and run their prompts -> logits (len(admitted), V)."""
    first = len(batch.rows)
    for request in admitted:
        length = len(request.prompt)
        end = length + request.settings.max_new_tokens
        noise = torch.Generator().manual_seed(request.settings.seed)
        batch.rows.append(Row(request.number, length, end, request.settings, noise))
    prompts = [request.prompt for request in admitted]
    tiles = [request.tiles for request in admitted]
    slots = list(range(first, len(batch.rows)))
    return prefill(model, prompts, tiles, batch.cache, slots)


def advance_rows(model, batch):
    """Run the newest token of every row -> logits (S, V)."""
    S = len(batch.rows)
    positions = torch.tensor([row.position for row in batch.rows])
    length = int(positions.max()) + 1
    if batch.cache.is_cuda:
        # A graph runs all slots. What it does in a free one is overwritten by the next prompt.
        free = torch.zeros(len(batch.tokens) - S, dtype=torch.int64)
        logits = graph_step(model, batch, torch.cat([positions, free]), length)[:S]
    else:
        logits = decode_step(model, batch.tokens[:S], positions, batch.cache[:, :, :S], length,
                             batch.compiler)
    for row in batch.rows:
        row.position += 1
    return logits


def finish_rows(batch, first, tokens):
    """Yield what decode yields for new tokens of the rows from `first` on; take out whole ones."""
    whole = []
    for slot, token in enumerate(tokens, first):
        row = batch.rows[slot]
        stopped = token in row.settings.stop_ids or row.settings.stopped
        if not stopped:
            yield row.number, token
        if stopped or row.position + 1 >= row.end:
            whole.append(slot)
            yield row.number, None
    for slot in reversed(whole):
        batch.remove(slot)


# ---- sampling ------------------------------------------------------------------------------------

def choose_tokens(model, logits, rows):
    """logits (S, V) of these rows -> (their next token ids (S,), whether all logits are finite).

    Both stay on the device, where read_tokens reads them.
    """
    finite = logits.sum(dtype=torch.float32).isfinite()  # any NaN or infinity gets into the sum
    logits[:, model.image_token_id] = float("-inf")  # a placeholder is never an answer
    likeliest = logits.argmax(-1)
    if all(row.settings.temperature < GREEDY_BELOW for row in rows):
        return likeliest, finite
    wanted = []
    for row in rows:
        draw = row.settings
        noise = torch.rand(1, generator=row.noise).item()
        greedy = draw.temperature < GREEDY_BELOW
        temperature = 1.0 if greedy else draw.temperature
        wanted.append([temperature, draw.top_p, draw.top_k, noise, greedy])
    wanted = without_waiting(torch.tensor(wanted), logits.device)  # (S, 5), fp32
    temperature, top_p, top_k, noise, greedy = wanted.unbind(1)
    drawn = sample(logits, temperature, top_p, top_k, noise)
    return torch.where(greedy > 0, likeliest, drawn), finite


def read_tokens(model, tokens, finite):
    """What choose_tokens returned -> a list of token ids. ValueError if logits were not finite.

    This is where a step waits for the GPU, once.
    """
    *tokens, finite = torch.cat([tokens, finite[None]]).tolist()
    if not finite:
        raise ValueError(f"{getattr(model, 'folder', 'the model')}: its logits are not finite; are "
                         "its weights damaged, or is --dtype too narrow for them?")
    return tokens


def sample(logits, temperature, top_p, top_k, noise):
    """logits (S, V), settings of each row (S,), noise (S,) in [0, 1) -> token ids (S,)."""
    p, ids = (logits / temperature[:, None]).softmax(-1).sort(-1, descending=True)
    mass_before = p.cumsum(-1) - p
    outside = mass_before >= top_p[:, None]
    place = torch.arange(p.shape[1], device=p.device)
    outside |= (place >= top_k[:, None]) & (top_k[:, None] > 0)
    outside[:, 0] = False  # the first token always stays
    mass = p.masked_fill(outside, 0.0).cumsum(-1)
    choice = (mass <= noise[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, choice)[:, 0]


# ---- for users -----------------------------------------------------------------------------------

def generate(model, prompts, tiles, max_new_tokens, stop_ids, **settings):
    """Answers to a list of prompts, each a list of token ids.

    tiles: uint8 (N, 3, s, s) or None for each prompt; settings: the other fields of Decoding.
    """
    settings = Decoding(max_new_tokens, stop_ids, **settings)
    answers = [[] for _ in prompts]
    for number, token in decode(model, zip(prompts, tiles, strict=True), settings):
        if token is not None:
            answers[number].append(token)
    return answers


def generate_stream(model, prompt, tiles, max_new_tokens, stop_ids, **settings):
    """Answer one prompt, token id by token id; arguments as in `generate`."""
    settings = Decoding(max_new_tokens, stop_ids, **settings)
    for _, token in decode(model, [(prompt, tiles)], settings):
        if token is not None:
            yield token


class Assistant:
    """A loaded model folder that answers."""

    def __init__(self, folder, device, dtype, max_tiles=0, **settings):
        """Load a folder's weights; ValueError for what is no whole model.

        max_tiles: of a picture, 0 = what the folder says; settings: the fields of Decoding.
        """
        if not folder:
            raise ValueError("give a model folder with --model=DIR")
        self.model, about = load_folder(folder, device, dtype)
        self.tokenizer = Tokenizer(folder)
        check_vocabulary(self.model.llm, self.tokenizer)
        self.model.eval()
        if self.model.language_model.lm_head.weight.is_cuda:
            join_weights(self.model)
        self.settings = {"stop_ids": {self.tokenizer.eos_id}, **settings}
        self.template = about.get("template", "sailvl-chat")
        self.thumbnail = about.get("use_thumbnail", True)
        self.max_tiles = max_tiles or about.get("max_dynamic_patch", 12)

    def warm_up(self, n_rows):
        """Compile now what n_rows that decode together need, if this model is compiled."""
        n = min(n_rows, 2)  # all numbers of rows but 1 have the same graph
        if self.settings.get("compiled"):
            self.answers([([0], None)] * n, max_new_tokens=2, stop_ids=set())

    def tiles(self, source, max_tiles=0):
        """Picture, a path or the bytes of a file -> uint8 tiles (N, 3, s, s)."""
        side = self.model.vision.image_size
        return make_tiles(load_image(source), 1, max_tiles or self.max_tiles, side, self.thumbnail)

    def prompt(self, turns, tiles, system=None):
        """[(question, answer), ..., (question, None)] and the tiles of each picture, in a list.

        system: a message in place of the template's. -> (ids (T,), tiles (N, 3, s, s) of all
        pictures or None).
        """
        counts = [len(t) for t in tiles]
        ids = chat_ids(self.tokenizer, self.template, turns, counts,
                       self.model.vision.tokens_per_tile, self.model.llm.max_positions, system)
        return ids, torch.cat(tiles) if tiles else None

    def ids_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, token ids of its answer).

        Each comes as soon as it is whole. An answer of max_new_tokens ids was cut off.
        """
        settings = Decoding(**self.settings | settings)
        unfinished = collections.defaultdict(list)
        for number, token in decode(self.model, prompts, settings):
            if token is None:
                yield number, unfinished.pop(number, [])
            else:
                unfinished[number].append(token)

    def answer_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, answer), when it is whole."""
        for number, ids in self.ids_each(prompts, **settings):
            yield number, self.tokenizer.decode(ids).strip()

    def answers(self, prompts, **settings):
        """[(ids, tiles), ...] -> their answers, all generated together."""
        return [text for _, text in sorted(self.answer_each(prompts, **settings))]

    def stream(self, ids, tiles):
        """Yield the answer piece by piece; a character of several tokens comes when it is whole."""
        yield from self.texts(generate_stream(self.model, ids, tiles, **self.settings))

    def texts(self, tokens):
        """Token ids as they come -> the pieces of their text, none cut inside a character."""
        ids_so_far = []
        shown = ""
        text = ""
        for token in tokens:
            ids_so_far.append(token)
            text = self.tokenizer.decode(ids_so_far).strip()  # spaces at the end are held back
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        if text != shown:
            yield text[len(shown):]  # the answer ended inside a character
