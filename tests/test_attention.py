"""kernels/attention.py: every path against the definition, isolation to the last bit, precision."""

import itertools

import pytest
import torch

from kernels import attention as A
from kernels import varlen
from kernels.attention import attention

torch.set_num_threads(1)


def qkv(lengths, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), n, dim, generator=g, dtype=dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def both(monkeypatch, args, causal, dtype=None):
    """Output and gradients of the sdpa path and of the reference (in its own dtype or another)."""
    results = []
    for path in ("sdpa", "reference"):
        monkeypatch.setenv("ATTENTION", path)
        q, k, v, cu = args
        kind = dtype if path == "reference" and dtype else q.dtype
        inputs = [x.to(kind).detach().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, cu, int(cu.diff().max()), causal)
        g = torch.randn(
            out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
        ).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    return results


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize(
    "lengths", [[7], [1, 1], [17, 17, 17], [60, 3, 41, 1, 40, 60], [200, 150, 12], [150, 150]]
)
def test_sdpa_equals_the_definition(monkeypatch, lengths, heads, kv_heads, causal):
    for a, b in zip(*both(monkeypatch, qkv(lengths, heads, kv_heads), causal), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_empty_documents_are_harmless(monkeypatch):
    for a, b in zip(*both(monkeypatch, qkv([5, 0, 9, 0]), True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "causal, lengths",
    [(True, [60, 3, 41, 200, 40, 150]), (False, [37, 37, 37]), (False, [37, 20, 37])],
)
def test_changing_one_document_leaves_the_others_bit_identical(causal, lengths):
    q, k, v, cu = qkv(lengths)
    before = attention(q, k, v, cu, max(lengths), causal)
    for start, end in itertools.pairwise(cu.tolist()):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[start:end] = torch.randn_like(x[start:end])
        changed[2][start] = float("nan")  # not even a NaN gets out
        after = attention(*changed, cu, max(lengths), causal)
        others = torch.ones(len(q), dtype=torch.bool)
        others[start:end] = False
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("lengths", [[60, 41, 3, 40], [37, 37], [200, 150]])
def test_bf16_error_is_at_most_twice_that_of_pytorch_in_bf16(monkeypatch, lengths):
    args = qkv(lengths, 5, 1, 32, torch.bfloat16)
    ours, exact = both(monkeypatch, args, True, torch.float64)
    monkeypatch.setattr(A, "_sdpa", A._reference)
    theirs, _ = both(monkeypatch, args, True, torch.float64)
    for a, b, x in zip(ours, theirs, exact, strict=True):
        assert (a - x).abs().max() <= 2 * (b - x).abs().max() + 1e-5


def test_padding_of_a_group_stays_below_five_eighths():
    lengths = torch.randint(1, 900, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    borders = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    gather, scatter, groups = A._plan(borders, True, torch.device("cpu"))
    assert len(gather) <= sum(lengths) * 8 / 5 and sum(s for s, _ in groups) == 200
    assert torch.equal(gather[scatter], torch.arange(sum(lengths)))


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("ATTENTION", "flash")
    with pytest.raises(
        ValueError, match="'flash' is not a known path; use reference, sdpa, triton or varlen"
    ):
        attention(*qkv([4]), 4, True)


@pytest.mark.parametrize("path", ["triton", "varlen"])
def test_a_path_that_needs_a_gpu_is_refused_without_one(monkeypatch, path):
    monkeypatch.setenv("ATTENTION", "sdpa")  # so that nothing stays set
    with pytest.raises(ValueError, match=f"--attention={path} needs a CUDA GPU; on a cpu use auto"):
        A.choose_attention(path, torch.device("cpu"))
    monkeypatch.setenv("ATTENTION", "varlen")
    with pytest.raises(ValueError, match="needs bfloat16 on a CUDA GPU; use --attention=auto"):
        attention(*qkv([4]), 4, True)


def test_the_chosen_path_is_taken(monkeypatch):
    monkeypatch.setenv("ATTENTION", "sdpa")
    args = qkv([60, 3, 41])
    before = attention(*args, 60, True)
    A.choose_attention("auto", torch.device("cpu"))
    assert torch.equal(attention(*args, 60, True), before)
    monkeypatch.setattr(A, "PYTORCH_PATHS", {"sdpa": A._reference})
    A.choose_attention("sdpa", torch.device("cpu"))
    assert torch.equal(attention(*args, 60, True), A._reference(*args, 60, True))


@pytest.mark.parametrize("causal", [True, False])
def test_pytorchs_kernel_for_packs_takes_grouped_heads(causal):
    """On tensors without numbers: the arguments are what this PyTorch wants."""
    q, k, v, cu = (x.to("meta") for x in qkv([60, 3, 41], 4, 2, 64, torch.bfloat16))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = varlen.attend_varlen(*inputs, cu, 60, causal)
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
