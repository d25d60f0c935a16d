"""16-bit copies of weights: the same gradients, no casts, and up to date after a step."""
import pytest
import torch
from small_model import pack, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from training import distributed
from training.compile import compile_blocks
from training.copies import copy_weights, refresh_copies
from vision import Linear

STEPS = 3
MICRO = 2


def weights_after_training(model, copied):
    """Gradients of each step and the weights after the last one, in bf16 arithmetic."""
    weights_and_copies = copy_weights(model, torch.bfloat16) if copied else ([], [])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = []
    for step in range(STEPS):
        for k in range(MICRO):
            distributed.set_gradient_sync(model, k == MICRO - 1)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(*pack([40, 30], [3, 2], MICRO * step + k))
            loss.backward()
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        refresh_copies(*weights_and_copies)
        distributed.clear_gradients(model, optimizer)
    return found + [p.detach() for p in model.parameters()]


def check_same_bits(model, copied_model):
    with_copies = weights_after_training(copied_model, copied=True)
    for ours, autocasts in zip(with_copies, weights_after_training(model, False), strict=True):
        assert torch.equal(ours, autocasts)


@pytest.mark.parametrize("how", ["none", "selective"])
def test_copies_train_to_the_same_bits_as_autocast(how):
    models = (tiny(n_layers=2).train(), tiny(n_layers=2).train())
    for model in models:
        distributed.checkpoint_activations(model, how)
    check_same_bits(*models)


def test_copies_train_to_the_same_bits_under_ddp(process_group):
    """DDP hears of gradients that autograd did not add itself, and sums them."""
    check_same_bits(*(distributed.parallelize(model.train(), "ddp", torch.bfloat16,
                                              distributed.ALONE)
                      for model in (tiny(n_layers=2), tiny(n_layers=2))))


class Casts(TorchDispatchMode):
    """Counts what is cast from fp32 to bf16 or back, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return operator(*args, **(kwargs or {}))


def test_no_weight_and_no_gradient_of_a_linear_layer_is_cast_in_a_micro_batch():
    model = tiny(n_layers=2).train()
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    weights = {layer.weight.shape for layer in layers}
    copy_weights(model, torch.bfloat16)
    batch = pack([40, 30], [3, 2])
    casts = Casts()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch)  # what is made once
    with casts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)
        loss.backward()
    assert weights.isdisjoint(casts.shapes)


def test_frozen_weights_and_fp32_arithmetic_have_no_copies():
    model = tiny()
    assert copy_weights(model, torch.float32) == ([], [])
    model.requires_grad_(False)
    assert copy_weights(model, torch.bfloat16) == ([], [])


def test_sizes_of_copies_are_numbers_to_the_compiler():
    """As those of weights are. A symbolic width costs the ViT a copy of its gradients."""
    model = tiny(n_layers=2).train()
    copy_weights(model, torch.bfloat16)
    found = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if node.op == "placeholder" and "_copy" in node.target:
                found.append(node.meta["example_value"].shape)
        return graph

    compile_blocks(model, backend)
    with torch.autocast("cpu", torch.bfloat16):
        model(*pack([40, 30], [3, 2]))
    torch._dynamo.reset()
    symbolic = [shape for shape in found if not all(isinstance(n, int) for n in shape)]
    assert found and not symbolic


def test_the_gradient_of_a_copy_is_added_before_the_next_block_runs_backward():
    """So bf16 gradients are not kept, and DDP sums beside the backward pass."""
    model = tiny(n_layers=2).train()
    copy_weights(model, torch.bfloat16)
    first, last = model.language_model.model.layers
    added = []
    weight = last.mlp.down_proj.weight
    weight.register_post_accumulate_grad_hook(lambda _: added.append("last"))
    first.input_layernorm.weight.register_hook(lambda _: added.append("first"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*pack([40, 30], [3, 2]))
    loss.backward()
    assert added == ["last", "first"]
