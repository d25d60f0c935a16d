"""The Triton kernels, on a GPU or in Triton's interpreter, against the definition in fp64.

The error is at most twice that of PyTorch in the same precision (flash-attention's rule), and a
broken line is noticed.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from kernels import attention as A
from kernels import attention_launch, attention_triton
from model import Block, LLMConfig, init_weights, packed, rope_table

pytest.importorskip("triton", reason="pip install -r requirements-dev.txt")
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy on NaN, where a test means it
torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("ATTENTION", "triton")


def inputs(lengths, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(sum(lengths), n, dim, generator=g).to(DEVICE, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, dout, torch.tensor([0, *lengths]).cumsum(0).int()


def out_and_gradients(attend, q, k, v, dout, cu, causal, dtype=None):
    q, k, v = (x.to(dtype or x.dtype).detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, cu, int(cu.diff().max()), causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))]


def broken(lengths, heads, kv_heads, dim, causal, dtype=torch.float32):
    """Which of out, dq, dk, dv break the rule."""
    args = *inputs(lengths, heads, kv_heads, dim, dtype), causal
    exact = out_and_gradients(A._reference, *args, dtype=torch.float64)
    theirs, ours = (out_and_gradients(f, *args) for f in (A._reference, A.attention))
    assert all(x.dtype == dtype for x in ours)

    def error(a, x):
        return (a - x).abs().nan_to_num(float("inf")).max()

    return {
        name
        for name, a, b, x in zip(NAMES, ours, theirs, exact, strict=True)
        if not error(a, x) <= 2 * error(b, x) + 1e-6
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, dim, causal",
    [
        ([7], 2, 1, 16, True),
        ([150, 1, 37, 0, 5], 6, 1, 64, True),  # Qwen2.5-1.5B's 12 / 2
        ([131, 3], 7, 1, 32, True),  # Qwen2.5-7B's 28 / 4
        ([131, 3], 4, 2, 128, False),
        ([70], 1, 1, 256, True),
        ([1 + i % 7 for i in range(64)], 1, 1, 16, True),  # 64 documents
        ([129, 129], 2, 1, 64, False),  # folded: one longer than whole blocks
        ([1025], 1, 1, 64, False),  # a tile of the ViT, folded
        ([1025], 1, 1, 16, True),
        ([1, 127, 128, 129, 300], 2, 1, 64, True),  # around the sizes of blocks
        ([1, 63, 64, 65, 127, 128, 200], 2, 2, 128, False),
        ([129, 257], 4, 2, 64, False),  # folded, and two query heads share a key head
    ],
    ids=lambda x: str(x)[:20],
)
def test_triton_errs_at_most_twice_as_much_as_pytorch(lengths, heads, kv_heads, dim, causal, dtype):
    assert broken(lengths, heads, kv_heads, dim, causal, dtype) == set()


def test_a_few_documents_of_whole_blocks_and_a_row_are_walked_by_blocks(monkeypatch):
    """A kernel with a program for each document would leave most of a GPU without work."""
    monkeypatch.setattr(attention_launch, "whole_documents", lambda *_: False)
    assert broken([129, 257], 2, 1, 64, False) == set()


@pytest.mark.parametrize("lengths, causal", [([129, 129], False), ([20, 9], True)])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_gradients_are_heads_of_one_tensor_that_nobody_has_to_put_together(
    lengths, causal, heads, kv_heads
):
    q, k, v, dout, cu = inputs(lengths, heads, kv_heads, 16)
    _, *grads = out_and_gradients(A.attention, q, k, v, dout, cu, causal)
    first = grads[0].data_ptr()
    head = 16 * dout.element_size()
    assert [x.data_ptr() - first for x in grads] == [0, heads * head, (heads + kv_heads) * head]
    assert {x.stride(0) for x in grads} == {(heads + 2 * kv_heads) * 16}


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter computes bf16 wrongly")
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, dim, causal",
    [
        ([2000, 1, 777, 64, 0, 4099], 12, 2, 128, True),
        ([2000, 777], 28, 4, 128, True),
        ([1025] * 8, 16, 16, 64, False),
        ([1024] * 4, 16, 16, 64, False),
        ([333, 70], 4, 4, 256, True),
        ([4, 900], 6, 6, 32, False),
    ],
)
def test_bf16_on_a_gpu_errs_at_most_twice_as_much_and_is_deterministic(
    lengths, heads, kv_heads, dim, causal
):
    assert broken(lengths, heads, kv_heads, dim, causal, torch.bfloat16) == set()
    args = *inputs(lengths, heads, kv_heads, dim, torch.bfloat16), causal
    first, second = (out_and_gradients(A.attention, *args) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_empty_pack_gives_nothing_and_harms_nothing():
    q, k, v, dout, cu = inputs([0, 0], 2, 1, 16)
    out, *grads = out_and_gradients(A.attention, q, k, v, dout, cu, True)
    assert out.shape == (0, 2, 16) and [g.shape[0] for g in grads] == [0, 0, 0]


def test_views_of_a_joint_projection_are_read_in_place():
    lengths = [19, 6]
    joint = torch.randn(25, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = joint.unbind(1)
    assert attention_launch._aligned(q) is q
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.testing.assert_close(
        A.attention(q, k, v, cu, 19, True), A._reference(q, k, v, cu, 19, True)
    )


@pytest.mark.parametrize(
    "lengths, causal",
    [
        ([9, 131, 20], True),
        ([129, 129], False),
        ([128, 131, 257], True),
        ([130, 9, 65], False),
    ],
)
def test_changing_one_document_leaves_the_others_bit_identical(lengths, causal):
    q, k, v, dout, cu = inputs(lengths, 1, 1, 16)
    before = out_and_gradients(A.attention, q, k, v, dout, cu, causal)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[cu[1] : cu[2]] = float("nan")
    after = out_and_gradients(A.attention, *changed, dout, cu, causal)
    others = [i for i in range(sum(lengths)) if not cu[1] <= i < cu[2]]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(before, after, strict=True))


def test_compiled_blocks_are_one_graph_whatever_the_pack_and_checkpointing_gives_the_same():
    block = Block(LLMConfig(dim=32, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48)).to(DEVICE)
    init_weights(block, 0)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=count)
    checkpointed = functools.partial(checkpoint, block, use_reentrant=False)
    for lengths in ([9, 20], [3, 5, 26], [31], [2, 40]):
        x = (
            torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(0))
            .to(DEVICE)
            .requires_grad_()
        )
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        rope = rope_table(torch.cat([torch.arange(n) for n in lengths]).to(DEVICE), 16, 1e4)
        results = []
        for f in (block, compiled, checkpointed):
            out = f(x, rope, packed(cu))
            results.append(
                [out, *torch.autograd.grad(out.square().sum(), (x, block.self_attn.k_proj.weight))]
            )
        for a, b, c in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
            assert torch.equal(a, c)
    assert count.frame_count <= 2  # the first pack, then one graph for all sizes


def test_what_the_kernels_cannot_do_is_refused(monkeypatch):
    q, k, v, _, cu = inputs([5], 2, 1, 24)
    with pytest.raises(
        ValueError, match="ATTENTION=triton: head_dim 24 is not a power of two from 16 to 256"
    ):
        A.attention(q, k, v, cu, 5, True)
    monkeypatch.setattr(attention_triton, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        A.attention(q, k, v, cu, 5, True)


# Each mutation is one wrong line in the source, and what of (out, dq, dk, dv) must then break the
# rule on which case.
GQA, TILE = ([150, 20], 4, 2, 16, True), ([129, 129], 1, 1, 16, False)
LONG = ([200, 20], 1, 1, 16, True)
WHOLE = ([257, 129], 1, 1, 16, False)
CHUNKS = ([641], 1, 1, 16, False)  # more queries than _backward_whole walks at once
MUTATIONS = {
    "mask of the forward pass": ("<= limit[:, None], s,", "<= limit[:, None] + 1, s,", GQA, NAMES),
    "mask of dQ": ("<= limit[:, None], p,", "<= limit[:, None] + 1, p,", GQA, ("dq",)),
    "mask of dK and dV": ("cols[:, None] <= rows", "cols[:, None] < rows", GQA, ("dk", "dv")),
    "scale": ("D**-0.5 * math.log2(math.e)", "D**-0.5", GQA, NAMES),
    "last full block of keys, forward": (
        "begin, edge, BN, warp",
        "begin, edge - BN, BN, warp",
        GQA,
        ("out",),
    ),
    "last full block of keys, dQ": ("(0, edge, BN):", "(0, edge - BN, BN):", GQA, ("dq",)),
    "edge of keys": ("edge, stop, STEP)", "edge, stop - STEP, STEP)", GQA, ("out", "dq")),
    "last full block of queries": (
        "begin, tail, BM)",
        "begin, tail - BM, BM)",
        LONG,
        ("dk", "dv"),
    ),
    "last block of queries": (
        "tl.cdiv(end - start - tail, STEP)",
        "(end - start - tail) // STEP",
        GQA,
        ("dk", "dv"),
    ),
    "diagonal of queries": ("BN // STEP)", "BN // STEP - 1)", GQA, ("dk", "dv")),
    "end of a document": (
        "(first + rows < stop)[:, None], other",
        "(first + rows <= stop)[:, None], other",
        GQA,
        ("dk", "dv"),
    ),
    "last row of a document": (
        "(first + rows < stop)[:, None])",
        "(first + rows < stop - 1)[:, None])",
        GQA,
        NAMES,
    ),
    "last block of the table": (
        "min(end - start, limit), size)",
        "min(end - start - 1, limit), size)",
        ([129, 20], 1, 1, 16, True),
        ("out", "dq", "dk", "dv"),
    ),
    "key head of a query head": ("head // (H // K) * D", "head % K * D", GQA, NAMES),
    "query heads of a key head": (
        "parts[0].view(T, K, H // K, D).sum(2)",
        "parts[0].view(T, H // K, K, D).sum(1)",
        GQA,
        ("dk",),
    ),
    "folded key": ("total += 1.0", "total += 0.0", TILE, ("out",)),
    "only the folded key": ("[None, :] == 0, s_0", "[None, :] <= 1, s_0", TILE, ("out",)),
    "folded query, dV": ("+ p_0[:, None] * g_0", "+ 0 * p_0[:, None] * g_0", TILE, ("dv",)),
    "folded query, dQ": ("dq_0 += tl.sum(ds_0", "dq_0 += 0 * tl.sum(ds_0", TILE, ("dq",)),
    "first key and first query": ("dk_0 = ds_00", "dk_0 = 0 * ds_00", TILE, ("dk",)),
    "first key and the others": ("dv_0 += tl.sum(p", "dv_0 += 0 * tl.sum(p", TILE, ("dv",)),
    "dQ of the rounds before": ("tl.load(place), i", "0 * tl.load(place), i", WHOLE, ("dq",)),
    "dK of chunks before": ("k_sums, key, stop", "k_sums, key, key", CHUNKS, ("dk",)),
    "first query only once": ("tl.where(chunk == 1, p_0, 0.0)", "p_0", CHUNKS, NAMES[1:]),
    "delta of a whole document": ("(dp - d[None, :])", "dp", WHOLE, ("dq", "dk")),
    "gradient of the scale, whole": (
        "to_gradient = scale * 0.6931471805599453",
        "to_gradient = scale",
        WHOLE,
        ("dq", "dk"),
    ),
    "row of the joint gradient": (
        "dq_row, head * D, STEP, D)",
        "H * D, head * D, STEP, D)",
        WHOLE,
        ("dq",),
    ),
    "gradient of the scale": ("a_k *= scale * 0.6931471805599453", "a_k *= scale", GQA, ("dk",)),
    "delta": ("input_precision=DOT) - d[:, None])", "input_precision=DOT))", GQA, ("dq",)),
}


@pytest.fixture
def new_memory_holds_nan():
    """What a kernel does not write is then never right by chance, from a result before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_line_is_noticed(name, tmp_path, monkeypatch, new_memory_holds_nan):
    old, new, case, noticed = MUTATIONS[name]
    places = {attention_triton: attention_launch, attention_launch: A}  # {module: who calls it}
    module, caller = next(
        (pair for pair in places.items() if old in Path(pair[0].__file__).read_text()),
        (None, None),
    )
    assert module, f"{old!r} is no longer in the source: mend this mutation"
    path = tmp_path / "mutant.py"
    path.write_text(Path(module.__file__).read_text().replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(caller, module.__name__.split(".")[-1], mutant)
    assert set(noticed) <= broken(*case)


def test_every_kernel_compiles_for_hopper_without_spilling():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/sm90.py"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    specialised = [line for line in done.stdout.splitlines() if line.endswith("True")]
    assert len(specialised) == 1  # the forward kernel of the ViT
