"""kernels/cross_entropy.py: the plain loss and gradients, in pieces, frozen, in bf16, in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy as C
from kernels.cross_entropy import linear_cross_entropy

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows=37, width=16, vocabulary=53, dtype=torch.float64, device="cpu"):
    g = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, width, generator=g, dtype=dtype) for n in (rows, vocabulary))
    labels, weights = (
        torch.randint(0, vocabulary, (rows,), generator=g),
        torch.rand(rows, generator=g),
    )
    return h.to(device), weight.to(device), labels.to(device), weights.to(device)


def plain(h, weight, labels, weights=None):
    loss = F.cross_entropy(
        (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32)), labels, reduction="none"
    )
    return (loss if weights is None else loss * weights).sum()


def loss_and_gradients(f, h, weight, labels, weights, scale=0.37):
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = f(h, weight, labels, weights)
    return [loss.detach(), *torch.autograd.grad(loss * scale, (h, weight))]


@pytest.mark.parametrize("chunk", [53, 53 * 10, 10**6])  # a row, ten rows, everything at once
def test_in_pieces_it_equals_the_plain_loss_in_fp64(monkeypatch, chunk):
    monkeypatch.setattr(C, "LOGITS_AT_ONCE", chunk)
    h, weight, labels, weights = inputs()
    for w in (None, weights):
        for a, b in zip(
            loss_and_gradients(linear_cross_entropy, h, weight, labels, w),
            loss_and_gradients(plain, h, weight, labels, w),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_what_is_frozen_gets_no_gradient_and_no_row_is_no_loss():
    h, weight, labels, weights = inputs()
    frozen = linear_cross_entropy(h.requires_grad_(), weight, labels)
    frozen.backward()
    assert weight.grad is None and h.grad is not None and frozen.requires_grad
    assert not linear_cross_entropy(h.detach(), weight, labels).requires_grad
    with torch.no_grad():
        assert linear_cross_entropy(h, weight.requires_grad_(), labels) == frozen
    empty = linear_cross_entropy(h.detach()[:0].requires_grad_(), weight, labels[:0])
    empty.backward()
    assert empty == 0 and torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_second_backward_pass_is_refused():
    h, weight, labels, _ = inputs()
    loss = linear_cross_entropy(h.requires_grad_(), weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")],
        ),
    ],
)
def test_bf16_errs_at_most_twice_as_much_as_pytorch(device):
    *args, weights = inputs(600, 64, 5000, torch.bfloat16, device)
    exact = loss_and_gradients(plain, *(x.double() for x in args[:2]), args[2], weights.double())
    theirs = loss_and_gradients(plain, *args, weights)
    ours = loss_and_gradients(linear_cross_entropy, *args, weights)
    for a, b, x in zip(ours, theirs, exact, strict=True):
        assert (a - x).abs().max() <= 2 * (b - x).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_triton_kernel_equals_pytorch(dtype):
    pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
    z = 3 * torch.randn(4, 4500, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    labels, weights = (
        torch.tensor([0, 4499, 4096, 17], device=DEVICE),
        torch.tensor([1, 0.5, 0, 2.0], device=DEVICE),
    )
    exact, ours, theirs = z.double(), z.clone(), z.clone()
    losses = [
        C._by_pytorch(exact, labels, weights.double()),
        C._by_triton(ours, labels, weights),
        C._by_pytorch(theirs, labels, weights),
    ]
    torch.testing.assert_close(losses[1], losses[0].float())
    torch.testing.assert_close(losses[2], losses[0].float())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_the_peak_memory_does_not_grow_with_the_rows():
    code = """if True:
        import resource, sys, torch
        from kernels import cross_entropy as C
        C.LOGITS_AT_ONCE, rows = 2 ** 20, 4096
        h, weight = torch.randn(rows, 8), torch.randn(2 ** 14, 8)
        labels = torch.arange(rows)
        h.requires_grad_(), weight.requires_grad_()
        # what the libraries need once
        C.linear_cross_entropy(h[:64], weight, labels[:64]).backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        C.linear_cross_entropy(h, weight, labels).backward()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert int(done.stdout) < 64 * 1024, (
        done.stderr
    )  # KiB; the logits alone are 256 MiB, a chunk is 4
