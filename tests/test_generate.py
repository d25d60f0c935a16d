"""generate.py: the cache, the scheduler, sampling."""

import random

import pytest
import torch
from small_model import IMG, pack, tiny

import generate as G
from generate import Decoding, generate, generate_stream

torch.set_num_threads(1)


def prompts_and_tiles(n, seed=0):
    rng, prompts, tiles = random.Random(seed), [], []
    for i in range(n):
        k = rng.choice((0, 0, 1, 2))
        tokens, _, _, _, t = pack([rng.randrange(10, 40)], [k], seed=i)
        prompts.append(tokens.tolist())
        tiles.append(t if k else None)
    return prompts, tiles


def test_greedy_answers_equal_recomputing_the_whole_sequence():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(3)
    answers = generate(vlm, prompts, tiles, 8, set())
    for prompt, t, answer in zip(prompts, tiles, answers, strict=True):
        sequence = list(prompt)
        for token in answer:
            n = len(sequence)
            logits = vlm.logits(torch.tensor(sequence), torch.arange(n), torch.tensor([0, n]), t)
            assert token == logits[-1, :IMG].argmax()  # <IMG_CONTEXT> is never an answer
            sequence.append(token)
        assert len(answer) == 8


def test_cached_logits_equal_the_full_forward_to_1e_4():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(8)
    size, rows = max(map(len, prompts)) + 1, list(range(8))
    with torch.inference_mode():
        cache = torch.zeros(3, 2, 8, 2, size + 5, 16)
        first = G.prefill(vlm, prompts, tiles, cache, rows)
        positions = torch.tensor([len(p) for p in prompts])
        second = G.decode_step(vlm, first.argmax(-1), positions, cache, size)
        wider = G.decode_step(vlm, first.argmax(-1), positions, cache, size + 5)
        for i, (prompt, t) in enumerate(zip(prompts, tiles, strict=True)):
            sequence = torch.tensor([*prompt, first[i].argmax()])
            full = vlm.logits(
                sequence, torch.arange(len(sequence)), torch.tensor([0, len(sequence)]), t
            )
            for ours, theirs in ((first[i], full[-2]), (second[i], full[-1]), (wider[i], full[-1])):
                assert (ours - theirs).abs().max() <= 1e-4


def test_batch_of_one_and_of_64_give_the_same_greedy_answers(monkeypatch):
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(64)
    stop = set(range(0, 320, 9))  # rows end at different steps and are retired
    together = generate(vlm, prompts, tiles, 24, stop)
    alone = [
        generate(vlm, [prompt], [t], 24, stop)[0] for prompt, t in zip(prompts, tiles, strict=True)
    ]
    assert together == alone
    assert len({len(a) for a in together}) > 5 and not any(stop & set(a) for a in together)
    monkeypatch.setattr(G, "PREFILL_TOKENS", 100)  # prompts in several packs
    assert together == generate(vlm, prompts, tiles, 24, stop)
    for small in (
        dict(batch_size=5),
        dict(batch_tokens=300),
    ):  # rows are admitted where others were retired
        assert together == generate(vlm, prompts, tiles, 24, stop, **small)
    draw = dict(temperature=1.5, top_p=0.9, seed=7)  # noise belongs to the row, not to the batch
    drawn = generate(vlm, prompts[:20], tiles[:20], 24, stop, **draw)
    assert (
        drawn
        == generate(vlm, prompts[:20], tiles[:20], 24, stop, **draw, batch_size=3)
        != together[:20]
    )
    assert drawn[4:5] == generate(vlm, prompts[4:5], tiles[4:5], 24, stop, **draw | dict(seed=11))


def test_requests_are_taken_from_an_iterator_only_when_there_is_room_and_a_long_one_waits():
    vlm, taken = tiny().eval(), []

    def requests():
        for n in (5, 60, 10, 200, 7, 7, 7):
            taken.append(n)
            yield [1 + n % 9] * n, None

    seen = list(G.decode(vlm, requests(), Decoding(6, {5}, batch_size=2)))
    assert sorted(row for row, token in seen if token is None) == list(range(7)) and len(taken) == 7
    alone = [generate(vlm, [[1 + n % 9] * n], [None], 6, {5})[0] for n in taken]
    assert alone == [[t for r, t in seen if r == row and t is not None] for row in range(7)]
    taken.clear()
    stream = G.decode(vlm, requests(), Decoding(6, {5}, batch_size=2))
    next(stream)
    assert len(taken) <= 4


def test_requests_with_settings_of_their_own_answer_as_they_would_alone():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(6)
    own = [dict(max_new_tokens=3 + i, stop_ids=set(range(0, 320, 7 + i)), temperature=0.8 * (i % 3),
                top_p=1 - 0.1 * i, top_k=(0, 9)[i % 2], seed=i) for i in range(6)]
    requests = zip(prompts, tiles, [Decoding(**settings) for settings in own], strict=True)
    together = [[] for _ in own]
    for number, token in G.decode(vlm, requests, Decoding(20, set(), batch_size=4)):
        if token is not None:
            together[number].append(token)
    alone = [generate(vlm, [prompt], [t], **settings)[0]
             for prompt, t, settings in zip(prompts, tiles, own, strict=True)]
    assert together == alone


def test_a_request_that_comes_later_joins_the_others_and_a_stopped_one_ends():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(3)
    alone = generate(vlm, prompts, tiles, 30, set())
    asked = [Decoding(30, set()) for _ in prompts]
    running = set()
    came = []  # how many answers were being generated when the request was taken

    def requests():
        for number in (0, 1):
            running.add(number)
            yield prompts[number], tiles[number], asked[number]
        for _ in range(3):
            yield None
        came.append(len(running))
        running.add(2)
        yield prompts[2], tiles[2], asked[2]
        while running:
            yield None

    answers = [[], [], []]
    settings = Decoding(30, set(), batch_size=4, places=160)
    for number, token in G.decode(vlm, requests(), settings):
        if token is None:
            running.discard(number)
            continue
        answers[number].append(token)
        asked[1].stopped = len(answers[1]) == 5
    assert came == [2]
    assert answers == [alone[0], alone[1][:5], alone[2]]


def test_streamed_tokens_equal_the_answer_and_sampling_is_reproducible():
    vlm = tiny().eval()
    (prompt,), (t,) = prompts_and_tiles(1)
    kw = dict(max_new_tokens=12, stop_ids={5}, temperature=1.0, top_p=0.9, top_k=50)
    answer = generate(vlm, [prompt], [t], seed=1, **kw)[0]
    assert list(generate_stream(vlm, prompt, t, seed=1, **kw)) == answer
    assert generate(vlm, [prompt], [t], seed=2, **kw)[0] != answer
    assert generate(vlm, [prompt], [t], 12, {5}, temperature=1.0, top_k=1) == generate(
        vlm, [prompt], [t], 12, {5}
    )
    assert generate(vlm, [], [], 4, set()) == [] and generate(vlm, [prompt], [t], 0, set()) == [[]]


def test_sampling_draws_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([[1.0, 3.0, 2.0, -50.0]])
    noise = torch.arange(0, 1, 1e-4)

    def draw(temperature, top_p, top_k):
        settings = [torch.full_like(noise, value) for value in (temperature, top_p, top_k)]
        return G.sample(logits.expand(len(noise), -1), *settings, noise)

    drawn = draw(2.0, 1.0, 0)
    torch.testing.assert_close(
        drawn.bincount(minlength=4) / len(noise), (logits[0] / 2).softmax(-1), atol=2e-4, rtol=0
    )
    assert set(draw(2.0, 1.0, 2).tolist()) == {1, 2}
    assert set(draw(2.0, 0.3, 0).tolist()) == {1}


def test_a_prompt_with_placeholders_but_without_tiles_is_refused():
    tokens = pack((9, 30), (1, 3))[0]
    with pytest.raises(ValueError, match="16 <IMG_CONTEXT> tokens, but its 0 tiles give 0"):
        generate(tiny(), [tokens.tolist()], [None], 4, set())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_in_prefill_and_in_each_step(value, temperature):
    prompts, tiles = prompts_and_tiles(3)
    whole = tiny().eval()
    fine = generate(whole, prompts, tiles, 8, set(), temperature=temperature, seed=1)
    assert all(len(answer) == 8 for answer in fine)

    # One value of the projector: only rows with a picture would show it.
    vlm = tiny().eval()
    vlm.folder = "a/model"
    with torch.no_grad():
        vlm.mlp1[1].bias[2] = value
    with pytest.raises(ValueError, match="a/model: its logits are not finite"):
        generate(vlm, prompts, tiles, 8, set(), temperature=temperature, seed=1)

    # One row of the embeddings, that of a token which the first prompt's answer holds.
    vlm = tiny().eval()
    token = fine[0][3]
    with torch.no_grad():
        vlm.language_model.model.embed_tokens.weight[token] = value
    said = []
    with pytest.raises(ValueError, match="the model: its logits are not finite"):
        for one in generate_stream(
            vlm, prompts[0], tiles[0], 8, set(), temperature=temperature, seed=1
        ):
            said.append(one)
    assert said == fine[0][: len(said)] and token not in fine[0][: len(said) - 1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_choosing_tokens_reads_nothing_from_the_device(temperature):
    """A step waits for a GPU once, in read_tokens. A tensor on the meta device cannot be read."""
    logits = torch.empty(2, 320, device="meta")
    settings = Decoding(5, set(), temperature, top_p=0.9, top_k=7)
    noise = torch.Generator().manual_seed(0)
    row = G.Row(0, position=3, end=9, settings=settings, noise=noise)
    tokens, finite = G.choose_tokens(tiny(), logits, [row, row])
    assert tokens.shape == (2,) and finite.shape == ()
