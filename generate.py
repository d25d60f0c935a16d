"""The scheduler of prompts, sampling, and the Assistant: a loaded model folder that answers.

Shape letters: T tokens of a prompt, S rows that decode together, K key/value heads, D head dim, V
vocabulary, N tiles of side s.
"""
import collections
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from decoding import decode_step, graph_step, prefill, without_waiting
from inputs.chat import chat_ids
from inputs.images import load_image, make_tiles
from inputs.tokenizer import Tokenizer
from vision import working_dtype
from weights import check_vocabulary, load_folder

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
    batch_size: int = 64  # rows that decode together, at most
    batch_tokens: int = 2**19  # places of their cache, at most; a single row gets what it needs


class Request(NamedTuple):
    """A prompt that waits for a slot."""
    number: int
    prompt: list  # token ids
    tiles: torch.Tensor | None  # uint8 (N, 3, s, s)


@dataclass(slots=True)
class Row:
    """A request that is being answered."""
    number: int  # of the request
    position: int  # of the newest token, which the next step reads
    end: int  # position at which the answer is as long as allowed
    noise: torch.Generator


@dataclass(slots=True)
class Batch:
    """Rows that decode together: S slots, each with its part of the cache."""
    cache: torch.Tensor  # keys and values (n_layers, 2, S, K, places, D)
    tokens: torch.Tensor  # (S,) the newest token of each row
    rows: list  # of S: the Row in this slot, or None while it is free
    longest_prompt: int  # that still fits, with its answer
    graphs: dict  # CUDA graphs of these tensors, see graph_step

    def busy_slots(self):
        return [slot for slot, row in enumerate(self.rows) if row]

    def free_slots(self):
        return [slot for slot, row in enumerate(self.rows) if not row]


# ---- the scheduler -------------------------------------------------------------------------------

@torch.inference_mode()
def decode(model, requests, settings):
    """Answer a stream of prompts, many at once.

    requests: an iterable of (token ids, uint8 tiles (N, 3, s, s) or None); settings: a Decoding.
    Yields (number of the request, token id) as tokens come, without the stop ids, and
    (number, None) when an answer is whole. Rows that end make room for the next requests; the
    iterable is read only as far as there is room. A draw depends on seed + number and on the step,
    not on the rows beside it.
    """
    numbered = (Request(number, *request) for number, request in enumerate(requests))
    if settings.max_new_tokens == 0:
        for request in numbered:
            yield request.number, None
        return

    waiting = collections.deque(itertools.islice(numbered, settings.batch_size))
    while waiting:
        batch = new_batch(model, waiting, settings)
        while True:
            # New prompts go first. They get their first token, then all rows get their next ones.
            admitted = admit(batch, waiting, numbered)
            if admitted:
                slots, logits = start_rows(model, batch, admitted, settings)
            elif batch.busy_slots():
                slots, logits = advance_rows(model, batch, is_last=not waiting)
            else:
                break
            rows = [batch.rows[slot] for slot in slots]
            tokens, finite = choose_tokens(model, logits, rows, settings)
            if len(slots) == len(batch.rows):
                batch.tokens.copy_(tokens)
            else:
                batch.tokens[slots] = tokens
            tokens = read_tokens(model, tokens, finite)
            yield from finish_rows(batch, slots, tokens, settings.stop_ids)
        # a prompt that was too long for this batch still waits
        waiting.extend(itertools.islice(numbered, settings.batch_size - len(waiting)))


def new_batch(model, waiting, settings):
    """An empty Batch for the waiting requests: any of them fits, with its answer."""
    longest = max(len(request.prompt) for request in waiting)
    longest = 64 * math.ceil(longest / 64)
    places = longest + settings.max_new_tokens
    S = max(1, min(len(waiting), settings.batch_tokens // places))
    head = model.language_model.lm_head.weight
    cache = torch.zeros(
        model.llm.n_layers, 2, S, model.llm.n_kv_heads, places, model.llm.head_dim,
        dtype=working_dtype(head), device=head.device)
    tokens = torch.zeros(S, dtype=torch.int64, device=head.device)
    return Batch(cache, tokens, rows=[None] * S, longest_prompt=longest, graphs={})


def admit(batch, waiting, requests):
    """Take the waiting requests that start now -> a list, empty as long as most slots are busy.

    Several prompts in one pack cost less than one after the other, so nobody is admitted until a
    quarter of the slots is free. For each request that leaves the queue another one is read.
    """
    admitted = []
    n_free = len(batch.free_slots())
    if 4 * n_free < len(batch.rows):
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
        waiting.extend(itertools.islice(requests, 1))
    return admitted


def start_rows(model, batch, admitted, settings):
    """Put requests into free slots and run their prompts -> (slots, logits (len(slots), V))."""
    slots = batch.free_slots()[:len(admitted)]
    prompts = [request.prompt for request in admitted]
    tiles = [request.tiles for request in admitted]
    logits = prefill(model, prompts, tiles, batch.cache, slots)
    for slot, request in zip(slots, admitted, strict=True):
        length = len(request.prompt)
        noise = torch.Generator().manual_seed(settings.seed + request.number)
        batch.rows[slot] = Row(request.number, length, length + settings.max_new_tokens, noise)
    return slots, logits


def advance_rows(model, batch, is_last):
    """Run the newest token of every row -> (slots, logits (len(slots), V)).

    is_last: nobody waits, so free slots are dropped. That copies the cache, so it is done when
    half of them are free. It is not done on CUDA, where graphs hold on to the tensors. There all
    slots are returned, free ones too: picking the busy ones would wait for the GPU.
    """
    on_gpu = batch.cache.is_cuda
    slots = list(range(len(batch.rows))) if on_gpu else batch.busy_slots()
    if is_last and not on_gpu and 2 * len(slots) <= len(batch.rows):
        batch.cache = batch.cache[:, :, slots]
        batch.tokens = batch.tokens[slots]
        batch.rows = [batch.rows[slot] for slot in slots]
        slots = list(range(len(slots)))

    positions = torch.tensor([row.position if row else 0 for row in batch.rows])
    length = int(positions.max()) + 1
    if on_gpu:
        logits = graph_step(model, batch, positions, length)
    else:
        logits = decode_step(model, batch.tokens, positions, batch.cache, length)
    if len(slots) < len(batch.rows):
        logits = logits[slots]
    for row in batch.rows:
        if row:
            row.position += 1
    return slots, logits


def finish_rows(batch, slots, tokens, stop_ids):
    """Yield what decode yields for these new tokens; free the slots whose answers are whole."""
    for slot, token in zip(slots, tokens, strict=True):
        row = batch.rows[slot]
        if row is None:
            continue
        stopped = token in stop_ids
        if not stopped:
            yield row.number, token
        if stopped or row.position + 1 >= row.end:
            batch.rows[slot] = None
            yield row.number, None


# ---- sampling ------------------------------------------------------------------------------------

def choose_tokens(model, logits, rows, settings):
    """logits (S, V) of these rows -> (their next token ids (S,), whether all logits are finite).

    Both stay on the device, where read_tokens reads them. A row may be None, in a free slot.
    """
    finite = logits.sum(dtype=torch.float32).isfinite()  # any NaN or infinity gets into the sum
    logits[:, model.image_token_id] = float("-inf")  # a placeholder is never an answer
    if settings.temperature == 0:
        return logits.argmax(-1), finite
    noise = [torch.rand(1, generator=row.noise) if row else torch.zeros(1) for row in rows]
    noise = without_waiting(torch.cat(noise), logits.device)
    return sample(logits, settings.temperature, settings.top_p, settings.top_k, noise), finite


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
    """logits (S, V), noise (S,) uniform in [0, 1), temperature above 0 -> token ids (S,)."""
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    mass_before = p.cumsum(-1) - p
    outside = mass_before >= top_p
    outside[:, 0] = False  # the first token always stays
    p = p.masked_fill(outside, 0.0)
    if top_k:
        p[:, top_k:] = 0.0
    mass = p.cumsum(-1)
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
        self.settings = {"stop_ids": {self.tokenizer.eos_id}, **settings}
        self.template = about.get("template", "sailvl-chat")
        self.thumbnail = about.get("use_thumbnail", True)
        self.max_tiles = max_tiles or about.get("max_dynamic_patch", 12)

    def tiles(self, path):
        """Picture file -> uint8 tiles (N, 3, s, s)."""
        side = self.model.vision.image_size
        return make_tiles(load_image(path), 1, self.max_tiles, side, self.thumbnail)

    def prompt(self, turns, tiles):
        """[(question, answer), ..., (question, None)] and the tiles of each picture, in a list.

        -> (ids (T,), tiles (N, 3, s, s) of all pictures or None).
        """
        counts = [len(t) for t in tiles]
        ids = chat_ids(self.tokenizer, self.template, turns, counts,
                       self.model.vision.tokens_per_tile, self.model.llm.max_positions)
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
        ids_so_far = []
        shown = ""
        text = ""
        for token in generate_stream(self.model, ids, tiles, **self.settings):
            ids_so_far.append(token)
            text = self.tokenizer.decode(ids_so_far).strip()  # spaces at the end are held back
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        if text != shown:
            yield text[len(shown):]  # the answer ended inside a character
