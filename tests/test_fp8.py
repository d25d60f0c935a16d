"""Products of 8-bit floats: their scales, their error, and the shapes that a GPU wants."""
import copy

import pytest
import torch
from small_model import pack, tiny
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import train
from configurator import configure
from training import distributed, fp8, limits
from training.copies import copy_weights

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
# Rounding moves a number by at most this part of it, and a number too small for the format by at
# most this part of the largest number: half of the step between the smallest numbers.
PART = {E4M3: 2**-4, E5M2: 2**-3}
STEP = {E4M3: 2**-10 / 448, E5M2: 2**-17 / 57344}
BF16 = 2**-8  # the part by which rounding to bf16 moves a number


def most_error(x, dtype):
    """How far the rounding of quantize may move each entry of x."""
    return torch.maximum(PART[dtype] * x.abs(), STEP[dtype] * x.abs().max())


def check_product(ours, a, a_dtype, b, b_dtype):
    """`ours` is a b^T, but for what rounding a, b and the result can change."""
    exact = a @ b.t()
    a_error = most_error(a, a_dtype)
    b_error = most_error(b, b_dtype)
    error = a_error @ b.abs().t() + a.abs() @ b_error.t() + a_error @ b_error.t()
    error += BF16 * (exact.abs() + error) + 1e-5 * (a.abs() @ b.abs().t())
    assert ((ours.float() - exact).abs() <= error).all()


def numbers(*shape, seed=0):
    """Random numbers that bf16 has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().float()


@pytest.fixture
def small_layers(monkeypatch):
    """Layers of the small model count as large ones."""
    monkeypatch.setattr(fp8, "SMALLEST", 32)


@pytest.fixture
def nothing_compiled_is_left():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_rounding_moves_a_number_by_at_most_half_a_step_of_the_format(dtype, size, outlier):
    x = size * numbers(64, 48)
    x[3, 5] = outlier * x.abs().max()
    x8, scale = fp8.quantize(x, dtype)
    error = (x8.double() * scale.double() - x).abs()
    assert (error <= 1.0001 * most_error(x, dtype)).all()
    assert x8.float().abs().max() == torch.finfo(dtype).max


def test_zeros_give_zeros_and_gradients_of_zero():
    x = torch.zeros(20, 48, requires_grad=True)
    weight = torch.zeros(32, 48, requires_grad=True)
    y = fp8.linear(x, weight, None)
    y.backward(torch.zeros_like(y))
    assert not y.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_not_become_finite(bad):
    x = numbers(20, 48).requires_grad_()
    weight = numbers(32, 48, seed=1).requires_grad_()
    spoiled = x.detach().clone()
    spoiled[7, 9] = bad
    assert not fp8.linear(spoiled, weight, None)[7].isfinite().any()
    gradient = numbers(20, 32)
    gradient[2, 3] = bad
    fp8.linear(x, weight, None).backward(gradient.bfloat16())
    assert not x.grad[2].isfinite().any() and not weight.grad[3].isfinite().any()


@pytest.mark.parametrize("rows", [1, 32, 45])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_products_and_gradients_are_as_exact_as_their_formats(rows, weight_dtype):
    x = numbers(rows, 64).bfloat16().requires_grad_()
    weight = numbers(48, 64, seed=1).to(weight_dtype).requires_grad_()
    bias = numbers(48, seed=2).requires_grad_()
    gradient = numbers(rows, 48, seed=3)
    y = fp8.linear(x, weight, bias)
    y.backward(gradient.bfloat16())
    assert y.dtype == torch.bfloat16
    without_bias = fp8.linear(x, weight, None)
    check_product(without_bias, x.float(), E4M3, weight.float(), E4M3)
    check_product(x.grad, gradient, E5M2, weight.float().t(), E4M3)
    check_product(weight.grad, gradient.t(), E5M2, x.float().t(), E4M3)
    torch.testing.assert_close(y, without_bias + bias.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(bias.grad, gradient.sum(0), rtol=0.02, atol=0.02)


def test_no_row_gives_no_row():
    weight = numbers(32, 48).bfloat16()
    assert fp8.linear(torch.empty(0, 48, dtype=torch.bfloat16), weight, None).shape == (0, 32)


# ---- which layers, and their shapes --------------------------------------------------------------


class Products(TorchDispatchMode):
    """Notes the products of 8-bit floats, and fails on one that a GPU would refuse."""

    def __init__(self):
        super().__init__()
        self.formats = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._scaled_mm.default:
            a, b = args[:2]
            assert a.is_contiguous() and b.t().is_contiguous()
            assert not any(n % 16 for n in (a.shape[1], *b.shape))
            self.formats.append((a.dtype, b.dtype))
        return operator(*args, **(kwargs or {}))


def step(model, batch, autocast=True, keep_gradients=False):
    """Loss and gradients, in bf16 arithmetic where it is not fp8's."""
    if not keep_gradients:
        model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def in_fp8(model):
    fp8.use_fp8(model, "fp8", distributed.ALONE)
    return model


@pytest.mark.parametrize("kind", [{}, {"kind": "aimv2", "qwen3": True}])
def test_each_layer_of_the_blocks_makes_three_products_of_shapes_that_a_gpu_takes(small_layers,
                                                                                 kind):
    model = in_fp8(tiny(n_layers=2, **kind).train())
    n_layers = sum(isinstance(m, fp8.Linear) for b in distributed.blocks_of(model)
                   for m in b.modules())
    with Products() as products:
        step(model, pack([41, 30], [3, 2]))
    assert products.formats.count((E4M3, E4M3)) == n_layers
    assert products.formats.count((E5M2, E4M3)) == 2 * n_layers
    assert len(products.formats) == 3 * n_layers


def test_layers_with_small_or_odd_sizes_and_all_outside_the_blocks_stay_as_they_are(capsys):
    model = in_fp8(tiny(n_layers=2, dim=128, head_dim=36, n_kv_heads=4, ffn_dim=256))
    chosen = {name for name, m in model.named_modules() if getattr(m, "multiply", 0) is fp8.linear}
    # Four heads of 36 are 144, a multiple of 16; the ViT's width is 64.
    assert len(chosen) == 14 and all(name.startswith("language_model.model.layers") for name in
                                     chosen)
    assert "fp8: 14 of 22 linear layers" in capsys.readouterr().out
    odd = in_fp8(tiny(n_layers=2, dim=128, head_dim=34, n_kv_heads=4, ffn_dim=256))
    assert sum(getattr(m, "multiply", 0) is fp8.linear for m in odd.modules()) == 6


def test_a_model_without_a_layer_for_fp8_and_adapters_are_refused():
    with pytest.raises(ValueError, match="multiples of 16; set --dtype=bfloat16"):
        in_fp8(tiny())
    cfg = train.Config()
    origins = configure(cfg, ["--dtype=fp8", "--lora_rank=8", "--advance.lr_llm=1e-4"])
    with pytest.raises(ValueError, match="set --dtype=bfloat16, or --lora_rank=0"):
        limits.check_together(cfg, origins, [("advance", cfg.advance)])


def test_a_gpu_without_8_bit_products_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="A100 does not multiply 8-bit floats.*=bfloat16"):
        distributed.compute_dtype("fp8", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert distributed.compute_dtype("fp8", torch.device("cuda")) == torch.bfloat16


# ---- with the rest of the program ----------------------------------------------------------------


def test_checkpointing_and_ddp_change_no_bit(small_layers, process_group):
    """Without autocast, under which PyTorch's emulation on a CPU rounds once more."""
    models = [in_fp8(tiny(n_layers=2).train()) for _ in range(4)]
    distributed.checkpoint_activations(models[1], "selective")
    distributed.checkpoint_activations(models[2], "full")
    models[3] = distributed.parallelize(models[3], "ddp", torch.bfloat16, distributed.ALONE)
    found = [step(model, pack([40, 30], [3, 2]), autocast=False) for model in models]
    for others in found[1:]:
        for ours, plain in zip(others, found[0], strict=True):
            assert torch.equal(ours, plain)


def test_selective_checkpointing_makes_no_product_twice(small_layers):
    model = in_fp8(tiny(n_layers=2).train())
    distributed.checkpoint_activations(model, "selective")
    with Products() as products:
        step(model, pack([40, 30], [3, 2]))
    assert len(products.formats) == 3 * 22


def test_gradients_of_micro_batches_add_up_through_copies_of_weights(small_layers):
    model = in_fp8(tiny(n_layers=2).train())
    copy_weights(model, torch.bfloat16)
    first = step(model, pack([40, 30], [3, 2]))[1:]
    second = step(model, pack([20, 30], [2, 2], seed=1))[1:]
    step(model, pack([40, 30], [3, 2]))
    sums = step(model, pack([20, 30], [2, 2], seed=1), keep_gradients=True)[1:]
    for ours, one, other in zip(sums, first, second, strict=True):
        torch.testing.assert_close(ours, one + other)


def test_one_graph_without_a_break_serves_any_number_of_rows(nothing_compiled_is_left):
    compiled = torch.compile(fp8.linear, backend="eager", fullgraph=True, dynamic=True)
    for rows in (32, 45, 7):
        results = []
        for function in (compiled, fp8.linear):
            x = numbers(rows, 64).bfloat16().requires_grad_()
            weight = numbers(48, 64, seed=1).requires_grad_()
            y = function(x, weight, numbers(48, seed=2))
            y.backward(numbers(rows, 48, seed=3).bfloat16())
            results.append((y, x.grad, weight.grad))
        for ours, eager in zip(*results, strict=True):
            assert torch.equal(ours, eager)
    assert counters["stats"]["unique_graphs"] == 1


def losses(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = []
    for _ in range(6):
        found.append(step(model, pack([40, 30], [3, 2]))[0].item())
        optimizer.step()
    return found


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_loss_falls_as_it_does_in_bf16(small_layers, process_group, how):
    model = tiny(n_layers=1, std=0.05).train()
    models = (copy.deepcopy(model), in_fp8(model))
    bf16, ours = (losses(distributed.parallelize(m, how, torch.bfloat16, distributed.ALONE))
                  for m in models)
    assert ours != bf16
    assert bf16[-1] < 0.7 * bf16[0]
    assert ours[-1] == pytest.approx(bf16[-1], abs=0.1 * (bf16[0] - bf16[-1]))
