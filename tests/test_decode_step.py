"""decoding.py: the compiled step and the joined products, beside the plain ones."""

import functools
import itertools

import pytest
import torch
from small_model import pack, tiny
from torch._dynamo.utils import counters

from decoding import compiler, decode_step, join_weights, no_compiler
from generate import generate

QWEN3 = {"qwen3": True}


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    counters.clear()
    compiler.cache_clear()
    yield
    torch._dynamo.reset()
    compiler.cache_clear()


def steps(model, how, n_rows, n_steps):
    """Logits of steps in which rows read one token more each, and look further; and the cache."""
    llm = model.llm
    places = 24
    cache = torch.zeros(llm.n_layers, 2, n_rows, llm.n_kv_heads, places, llm.head_dim)
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(n_steps):
        tokens = torch.randint(0, 300, (n_rows,), generator=draw)
        positions = torch.full((n_rows,), i)
        with torch.inference_mode():
            found.append(decode_step(model, tokens, positions, cache, 2 + 2 * i, how))
    return found, cache


@pytest.mark.parametrize("kind", [{}, QWEN3])
def test_a_step_gives_the_logits_of_the_whole_sequence_to_1e_5(kind):
    model = tiny(**kind).eval()
    found, _ = steps(model, no_compiler, 1, 6)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randint(0, 300, (1,), generator=draw) for _ in range(6)])
    with torch.inference_mode():
        whole = model.logits(tokens, torch.arange(6), torch.tensor([0, 6]))
    torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_step_is_the_same_step_and_has_one_graph_for_all_lengths(backend):
    model = tiny(qwen3=True).eval()
    how = functools.partial(compiler, backend=backend)
    for n_rows in (2, 5):
        plain, cache = steps(model, no_compiler, n_rows, 6)
        made, its_cache = steps(model, how, n_rows, 6)
        for ours, its in zip(plain, made, strict=True):
            torch.testing.assert_close(its, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(its_cache, cache, rtol=0, atol=1e-5)
    # one for the positions, one for all blocks
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_compiled_answers_are_those_of_the_plain_step(monkeypatch):
    how = functools.partial(compiler, backend="aot_eager")
    monkeypatch.setattr("generate.compiler", how)
    model = tiny().eval()
    prompts = []
    tiles = []
    for seed, n_tiles in enumerate((0, 1, 0, 2)):
        tokens, _, _, _, t = pack([12 + 9 * seed], [n_tiles], seed=seed)
        prompts.append(tokens.tolist())
        tiles.append(t if n_tiles else None)
    plain = generate(model, prompts, tiles, 8, {5})
    assert counters["stats"]["unique_graphs"] == 0
    assert generate(model, prompts, tiles, 8, {5}, compiled=True) == plain
    assert counters["stats"]["unique_graphs"] >= 2


def storage_bytes(model):
    tensors = list(model.parameters())
    tensors += itertools.chain(*(m.joined for m in model.modules() if getattr(m, "joined", None)))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in tensors if t is not None}
    return sum(storages.values())


@pytest.mark.parametrize("kind", [{}, QWEN3])
def test_joined_weights_give_the_same_logits_in_the_same_memory_under_the_same_names(kind):
    model = tiny(**kind).eval()
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = storage_bytes(model)
    apart, _ = steps(model, no_compiler, 5, 3)
    join_weights(model)
    assert storage_bytes(model) == size
    state = model.state_dict()
    assert list(state) == list(names)
    assert all(torch.equal(state[name], tensor) for name, tensor in names.items())
    together, _ = steps(model, no_compiler, 5, 3)
    for ours, its in zip(apart, together, strict=True):
        torch.testing.assert_close(its, ours, rtol=0, atol=1e-5)

    # a product sees what is written into a weight later
    with torch.no_grad():
        for linear in ("self_attn.v_proj", "mlp.up_proj"):
            model.get_submodule(f"language_model.model.layers.0.{linear}").weight.zero_()
    changed, _ = steps(model, no_compiler, 5, 1)
    assert not torch.equal(changed[0], together[0])
