"""Prefill, decode, sampling, and the Assistant: a loaded model folder that answers."""
import collections
import itertools
import torch
import torch.nn.functional as F

from inputs.chat import chat_ids
from inputs.images import load_image, make_tiles
from inputs.tokenizer import Tokenizer
from model import packed
from vision import working_dtype
from weights import check_vocabulary, load_folder

PREFILL_TOKENS = 16384      # prompt tokens that go through the model at once during generation

# ---- generation ------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def decode(model, requests, max_new_tokens, stop_ids, temperature=0.0, top_p=1.0, top_k=0, seed=0, batch_size=64,
           batch_tokens=2 ** 19):
    """Answer a stream of prompts, many at once: yield (number of the request, token id) as they come, without the stop
    ids, and (number, None) when an answer is whole. Rows that end make room for the next requests.
    requests: an iterable of (token ids, uint8 tiles (n, 3, s, s) or None); stop_ids: a set. temperature 0 is greedy;
    else top_k (0 = all) and top_p restrict a draw that depends on seed + number and on the step, not on the batch.
    At most batch_size rows decode together, in a cache of at most batch_tokens places (but always one row)."""
    requests, ahead, llm = enumerate(requests), collections.deque(), model.llm
    head, stop_ids = model.language_model.lm_head.weight, stop_ids if max_new_tokens else range(llm.vocab_size)
    on_gpu = head.is_cuda
    while ahead.extend(itertools.islice(requests, batch_size - len(ahead))) or ahead:
        room = -(-max(len(prompt) for _, (prompt, _) in ahead) // 64) * 64  # of a prompt; a longer one, later, waits
        S = max(1, min(len(ahead), batch_tokens // (room + max_new_tokens)))
        cache = torch.zeros(llm.n_layers, 2, S, llm.n_kv_heads, room + max_new_tokens, llm.head_dim,
                            dtype=working_dtype(head), device=head.device)  # of the keys and values
        rows, tokens, graphs = [None] * S, torch.zeros(S, dtype=torch.int64, device=head.device), {}
        while True:
            free, fresh = [i for i in range(S) if not rows[i]], []
            while 4 * len(free) >= S and len(fresh) < len(free) and ahead and len(ahead[0][1][0]) <= room and (
                    not fresh or sum(len(prompt) for _, (prompt, _) in [*fresh, ahead[0]]) <= PREFILL_TOKENS):
                fresh.append(ahead.popleft())                               # admitted by the quarter: one pack costs
                ahead.extend(itertools.islice(requests, 1))                 # less than one prompt after the other
            if fresh:
                slots = free[:len(fresh)]
                logits = prefill(model, *zip(*(request for _, request in fresh)), cache, slots)
                for slot, (number, (prompt, _)) in zip(slots, fresh):       # number, position, end, source of noise
                    rows[slot] = [number, len(prompt), len(prompt) + max_new_tokens,
                                  torch.Generator().manual_seed(seed + number)]
            else:
                slots = [i for i in range(S) if rows[i]]
                if not slots: break
                if not ahead and 2 * len(slots) <= S and not on_gpu:        # nobody follows: a smaller batch, copied at
                    cache, tokens, rows = cache[:, :, slots], tokens[slots], [rows[i] for i in slots]   # most once per
                    S, slots = len(slots), range(len(slots))                                            # halving
                positions = [row[1] if row else 0 for row in rows]
                logits = (graph_step if on_gpu else decode_step)(model, tokens, positions, cache, graphs)
                logits = logits if len(slots) == S else logits[slots]       # most often all: nothing to copy
                for slot in slots:
                    rows[slot][1] += 1
            logits[:, model.image_token_id] = float("-inf")                 # a placeholder is never an answer
            noise = torch.cat([torch.rand(1, generator=rows[i][3]) for i in slots]) if temperature else torch.zeros(1)
            tokens[slots] = sample(logits, temperature, top_p, top_k, noise.to(head.device))
            for slot, token in zip(slots, tokens[slots].tolist()):
                number, position, end, _ = rows[slot]
                if token not in stop_ids: yield number, token
                if token in stop_ids or position + 1 >= end:
                    rows[slot] = None
                    yield number, None

def generate(model, prompts, tiles, *args, **settings):
    """The answers, a list of token ids for each prompt; arguments as for decode, prompts and tiles as two lists."""
    answers = [[] for _ in prompts]
    for row, token in decode(model, zip(prompts, tiles), *args, **settings):
        if token is not None: answers[row].append(token)
    return answers

def generate_stream(model, prompt, tiles, *args, **settings):
    """Answer one prompt, token id by token id."""
    return (token for _, token in decode(model, [(prompt, tiles)], *args, **settings) if token is not None)

def prefill(model, prompts, tiles, cache, slots):
    """Run prompts as one pack, fill these slots of the cache (n_layers, 2, S, K, size, D) -> logits (len(slots), V) of
    their last tokens."""
    tokens, rows, positions = torch.tensor([(token, slot, i) for slot, prompt in zip(slots, prompts)
                                            for i, token in enumerate(prompt)], device=cache.device).T      # (T,) each
    cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, prompts))], dtype=torch.int32)
    attend_packed, pictures = packed(cu_seqlens), [t for t in tiles if t is not None]
    def attend(kept, q, k, v):
        kept[:, rows, :, positions] = torch.stack([k, v], 1)                # (T, 2, K, D)
        return attend_packed(q, k, v)
    h = model.embed(tokens, torch.cat(pictures).to(cache.device) if pictures else None)
    return model.head(model.hidden(h, positions, attend, cache, rows=(cu_seqlens[1:] - 1).to(h.device)))

def decode_step(model, tokens, positions, cache, _=None, L=0):
    """The next tokens (S,) of all rows, each at its position, fill the cache -> logits (S, V). Attention looks at the
    first L places of the cache; 0 = as many as there are tokens."""
    L, positions = L or max(positions) + 1, torch.as_tensor(positions, device=cache.device)
    rows = torch.arange(len(positions), device=cache.device)
    unseen = (torch.arange(L, device=cache.device) > positions[:, None])[:, None, None]         # (S, 1, 1, L)
    mask = torch.zeros_like(unseen, dtype=cache.dtype).masked_fill_(unseen, float("-inf"))  # once, not in each block
    def attend(kept, q, k, v):                                              # q (S, H, D), k and v (S, K, D)
        kept[:, rows, :, positions] = torch.stack([k, v], 1)                # (S, 2, K, D)
        q = q.unflatten(1, (k.shape[1], -1))                                # (S, K, H/K, D): heads that share a key
        k, v = kept[:, :, :, :L]                                            # (S, K, L, D)        head, as queries
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)
    return model.head(model.hidden(model.language_model.model.embed_tokens(tokens), positions, attend, cache))

def graph_step(model, tokens, positions, cache, graphs):
    """decode_step as a CUDA graph, one launch in place of some hundreds: captured once per 512 tokens of length for
    these very tensors and kept in the dict `graphs`. Not run on a GPU yet."""
    L = min(-(-(max(positions) + 1) // 512) * 512, cache.shape[-2])
    where = graphs.setdefault("positions", torch.zeros_like(tokens)).copy_(torch.tensor(positions))
    if L not in graphs:
        pool = graphs.setdefault("pool", torch.cuda.graph_pool_handle())
        (side := torch.cuda.Stream()).wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                       # lazy set-up happens outside of the graph;
            decode_step(model, tokens, where, cache, L=L)                   # the same step again writes the same cache
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            graphs[L] = graph, decode_step(model, tokens, where, cache, L=L)
    graphs[L][0].replay()
    return graphs[L][1]

def sample(logits, temperature, top_p, top_k, noise):
    """logits (S, V), noise (S,) uniform in [0, 1) -> token ids (S,). Greedy at temperature 0."""
    if temperature == 0: return logits.argmax(-1)
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[:, 1:] = p[:, 1:].masked_fill((p.cumsum(-1) - p)[:, 1:] >= top_p, 0.0)    # the first token always stays
    if top_k:
        p[:, top_k:] = 0.0
    mass = p.cumsum(-1)
    choice = (mass <= noise[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, choice)[:, 0]

class Assistant:
    """A loaded model folder with the settings of `generate`. Shapes: T tokens of a prompt, N tiles of side s."""
    def __init__(self, folder, device, dtype, vision=True, max_tiles=0, **settings):
        if not folder: raise ValueError("give a model folder with --model=DIR")
        (self.model, about), self.tokenizer = load_folder(folder, device, dtype), Tokenizer(folder)
        if vision and self.model.vision is None:
            raise ValueError(f"{folder}: a language model without vision; give a whole model folder")
        check_vocabulary(self.model.llm, self.tokenizer)
        self.model.eval()
        self.settings = {"stop_ids": {self.tokenizer.eos_id}, **settings}
        self.template, self.thumbnail = about.get("template", "sailvl-chat"), about.get("use_thumbnail", True)
        self.max_tiles = max_tiles or about.get("max_dynamic_patch", 12)

    def tiles(self, path):
        """Picture file -> uint8 tiles (N, 3, s, s)."""
        return make_tiles(load_image(path), 1, self.max_tiles, self.model.vision.image_size, self.thumbnail)

    def prompt(self, turns, tiles):
        """[(question, answer), ..., (question, None)] and each picture's tiles -> (ids (T,), tiles (N, 3, s, s))."""
        counts, per_tile = [len(t) for t in tiles], self.model.vision.tokens_per_tile
        return chat_ids(self.tokenizer, self.template, turns, counts, per_tile), torch.cat(tiles) if tiles else None

    def ids_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, token ids of its answer), each when it is whole;
        one of max_new_tokens ids was cut off."""
        said = collections.defaultdict(list)
        for number, token in decode(self.model, prompts, **self.settings | settings):
            if token is None:
                yield number, said.pop(number, [])
            else:
                said[number].append(token)

    def answer_each(self, prompts, **settings):
        """An iterable of (ids, tiles) -> yield (number of the prompt, answer), each as soon as it is whole."""
        return ((number, self.tokenizer.decode(ids).strip()) for number, ids in self.ids_each(prompts, **settings))

    def answers(self, prompts, **settings):
        """[(ids, tiles), ...] -> their answers, all generated together."""
        return [text for _, text in sorted(self.answer_each(prompts, **settings))]

    def stream(self, ids, tiles):
        """Yield the answer piece by piece; a character of several tokens comes when it is whole."""
        said, shown, text = [], "", ""
        for token in generate_stream(self.model, ids, tiles, **self.settings):
            said.append(token)
            text = self.tokenizer.decode(said).strip()                 # closing spaces stay unsaid
            if len(text) > len(shown) and not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text
        if text != shown: yield text[len(shown):]                      # a broken end
