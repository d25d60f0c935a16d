"""torch.compile: one graph for all blocks of a kind, whatever the pack, and the same gradients."""

import copy
import random

import pytest
import torch
from small_model import pack, tiny
from torch._dynamo.utils import counters

from training import distributed
from training.compile import compile_blocks

DROP = 0.5


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    counters.clear()
    yield
    torch._dynamo.reset()


def model_with_stochastic_depth(**kind):
    model = tiny(n_layers=2, **kind).train()
    model.vision_model.drop_path = DROP
    return model


def varied_packs(n):
    """Packs of other numbers of tokens, documents and tiles, among them one of each."""
    draw = random.Random(0)
    sizes = [(3, 5), (1, 1)]  # documents, tiles
    while len(sizes) < n:
        sizes.append((draw.choice([1, 2, 3, 6]), draw.choice([1, 2, 4, 5])))
    packs = []
    for seed, (documents, tiles) in enumerate(sizes):
        lengths = [draw.randint(4, 40) for _ in range(documents)]
        lengths[0] += 4 * tiles
        packs.append(pack(lengths, [tiles], seed))
    return packs


def loss_and_gradients(model, batch):
    torch.manual_seed(7)  # stochastic depth draws the same
    model.zero_grad()
    loss = model(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


SAIL_VL2 = {"kind": "aimv2", "qwen3": True}


@pytest.mark.parametrize(
    "how, backend, kind",
    [
        ("none", "eager", {}),
        ("selective", "aot_eager", {}),
        ("full", "eager", {}),
        ("none", "eager", SAIL_VL2),
    ],
)
def test_twenty_varied_packs_share_a_graph_for_each_kind_of_block(how, backend, kind):
    model = model_with_stochastic_depth(**kind)
    eager = copy.deepcopy(model)
    compile_blocks(model, backend)
    distributed.checkpoint_activations(model, how)
    for batch in varied_packs(20):
        results = loss_and_gradients(model, batch)
        for ours, its in zip(results, loss_and_gradients(eager, batch), strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)
        # Blocks of the ViT, blocks of the language model, and its last one, which returns rows.
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def kept_for_the_backward_pass(model, batch):
    """Bytes that a forward pass keeps, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    return sum(storages.values())


def test_compiled_blocks_keep_less_under_selective_checkpointing():
    batch = pack([40, 30], [3, 2])
    plain = kept_for_the_backward_pass(model_with_stochastic_depth(), batch)
    model = model_with_stochastic_depth()
    compile_blocks(model, backend="aot_eager_decomp_partition")
    distributed.checkpoint_activations(model, "selective")
    compiled = kept_for_the_backward_pass(model, batch)
    assert compiled < 0.7 * plain, f"{compiled:,} of {plain:,} bytes"


def test_compiled_blocks_with_stochastic_depth_run_under_ddp(process_group):
    model = model_with_stochastic_depth()
    eager = copy.deepcopy(model)
    compile_blocks(model, backend="eager")
    model = distributed.parallelize(model, "ddp", torch.float32, distributed.ALONE)
    batch = pack([40, 30], [3, 2])
    results = loss_and_gradients(model, batch)
    for ours, its in zip(results, loss_and_gradients(eager, batch), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)


def test_ddp_holds_gradients_once(process_group):
    """In every micro-batch of every step they lie in the buckets that are summed over the ranks."""
    model = tiny()
    ddp = distributed.parallelize(model, "ddp", torch.float32, distributed.ALONE)
    optimizer = torch.optim.SGD(ddp.parameters(), 1e-3)
    buckets = set()

    def record(_, bucket):
        buckets.add(bucket.buffer().untyped_storage().data_ptr())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, record)
    for step in range(4):
        buckets.clear()
        gradients = []
        for last in (False, False, True):
            distributed.set_gradient_sync(ddp, last)
            ddp(*pack([40, 30], [3, 2], step)).backward()
            gradients.append({p.grad.untyped_storage().data_ptr() for p in ddp.parameters()})
        for storages in gradients:
            assert storages == buckets, f"step {step}: {len(storages)} storages"
        optimizer.step()
        distributed.clear_gradients(ddp, optimizer)
        assert all(not p.grad.any() for p in ddp.parameters())


