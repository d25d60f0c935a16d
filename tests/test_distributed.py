"""Ranks: DDP and FSDP take the steps of one process; activation checkpointing keeps less."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as td
from stand_in import ADVANCE, ALL, ALONE, batch, build, largest_difference, train

from configurator import configure
from train import RunConfig
from training import distributed, meeting

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_take_the_same_steps_as_one_process_with_both_micro_batches(two_ranks, parallel):
    model, optimizer = build(ADVANCE)
    norm = train(model, optimizer, ALONE, [0, 1], [0, 1])
    results = two_ranks[1]
    assert results[f"{parallel}_norm"] == pytest.approx(norm, rel=1e-5)
    assert largest_difference(results[f"{parallel}_advance"], model.state_dict()) < 1e-5
    model, optimizer = build(ALL)
    train(model, optimizer, ALONE, [0, 1], [2])
    assert largest_difference(results[f"{parallel}_all"], model.state_dict()) < 1e-5


def test_activation_checkpointing_keeps_less_and_changes_neither_gradients_nor_names():
    grads, kept, count = [], [], lambda t: kept.append(t.nbytes) or t
    held = {}
    for what in ("none", "selective", "full"):
        model, _ = build(ALL, activation_checkpointing=what)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(*batch(0, 0))
        held[what] = sum(kept)
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert largest_difference(*grads[:2]) == largest_difference(*grads[1:]) == 0.0
    assert held["selective"] < held["none"] > held["full"], held


def test_without_torchrun_there_is_one_rank_and_no_process_group():
    assert distributed.setup_distributed("cpu") == ALONE and not td.is_initialized()
    with pytest.raises(ValueError, match="device must be one of auto, cuda, cpu, got 'tpu'"):
        configure(RunConfig(), ["--device=tpu"])


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but RANK is not set; start with torchrun"),
        ({"WORLD_SIZE": "8", "RANK": ""}, "WORLD_SIZE is 8, but RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x' and not a number; start with torchrun"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1' and not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, which needs a WORLD_SIZE above it, not 2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' and not a number"),
        ({"LOCAL_RANK": "0x1"}, "LOCAL_RANK is '0x1' and not a number"),
    ],
)
def test_variables_of_ranks_that_are_half_set_or_no_numbers_are_named(
    variables, words, monkeypatch
):
    """Kubernetes and MPI set WORLD_SIZE alone, a shell script leaves RANK empty."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        distributed.setup_distributed("cpu")
    assert not td.is_initialized()


@pytest.mark.parametrize("variables", [{"RANK": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": " "}])
def test_empty_variables_of_ranks_and_a_world_of_one_are_a_single_process(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.setup_distributed("cpu") == ALONE and not td.is_initialized()


def test_ranks_that_are_started_again_meet_each_other_and_no_dead_rank():
    """Each machine's torchrun counts its own restarts, so that counts cannot tell starts apart."""
    store = td.HashStore()
    # A start in which rank 1 answered and died, and one whose rank 0 died when it had called.
    store.set("call", "first")
    store.set("first 1", "dead")
    store.set("first here", "dead")
    with ThreadPoolExecutor(3) as pool:
        other = pool.submit(meeting.answer_call, store, "b", 1)
        third = pool.submit(meeting.answer_call, store, "c", 2)
        with pytest.raises(TimeoutError):
            other.result(timeout=0.3)
        pool.submit(meeting.call_ranks, store, "a", 3).result(timeout=20)
        assert other.result(timeout=20) == third.result(timeout=20) == "a"
    assert store.get("a here") == b"b c"
