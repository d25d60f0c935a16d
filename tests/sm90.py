"""Compile every kernel for Hopper, sm_90a, on a machine without a GPU, and print what came out.

    python tests/sm90.py

For each kernel it prints registers and bytes of stack per thread, shared memory of a block, which
instructions there are, and how many of them a warp runs for a full block. Stack above 0 means that
registers were spilled; Hopper has 227 KB of shared memory for a block. A descriptor that a kernel
makes takes 13 tensormap.replace and a fence. fp32 is meant for tests of the kernels, not for speed,
and left out. docs/speed.md holds the table.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import attention_launch as L  # noqa: E402
from kernels import attention_triton as A  # noqa: E402
from kernels import cross_entropy as C  # noqa: E402

# name: (H, K, D, causal, folded). The ViT, both language models, the toy world, the largest head.
SHAPES = dict(
    vit=(16, 16, 64, False, True),
    vit_1024=(16, 16, 64, False, False),
    llm_2b=(12, 2, 128, True, False),
    llm_8b=(28, 4, 128, True, False),
    toy=(4, 2, 32, True, False),
    d16=(4, 4, 16, True, False),
    d256=(8, 4, 256, True, False),
)

# What a warp may run for a full block up to head dim 128, by Triton 3.6 or 3.7: no more than now.
MOST_INSTRUCTIONS = dict(_forward=516, _backward_q=485, _backward_kv=460, _backward_whole=480)
MOST_FORWARD_VIT = 410


def signature_of(fn, constants, numbers):
    """{argument: its type}. numbers: {argument: type} where it is not bf16."""
    kinds = dict(
        lse="*fp32",
        delta="*fp32",
        losses="*fp32",
        weights="*fp32",
        labels="*i64",
        sums="*fp32",
        k_sums="*fp32",
        v_sums="*fp32",
        table="*i32",
        scale="fp32",
        T="i32",
        V="i32",
        row="i32",
    )
    rows_of = {"q_blocks": "BM", "g_blocks": "BM", "k_blocks": "BN", "v_blocks": "BN"}
    for name, rows in rows_of.items():
        kinds[name] = f"tensordesc<bf16[{constants.get(rows)},{constants.get('D')}]>"
    kinds["k_starts"] = f"tensordesc<bf16[16,{constants.get('D')}]>"
    for name in fn.arg_names:
        if name.endswith("_row"):
            kinds[name] = "i32"
    signature = {}
    for name in fn.arg_names:
        kind = numbers.get(name) or kinds.get(name, "*bf16")
        signature[name] = "constexpr" if name in constants else kind
    return signature


def compiled(fn, constants, options, numbers=()):
    """-> the compiled kernel. numbers: {argument: type} where it is not bf16."""
    signature = signature_of(fn, constants, dict(numbers))
    # what Triton finds at a launch: tensors and rows start at multiples of 16
    aligned = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind[0] == "*" or name.endswith("_row"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    values = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def run_cuobjdump(kernel, option):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        Path(f.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        done = subprocess.run([tool, option, f.name], capture_output=True, text=True, check=True)
    return done.stdout


def full_block_instructions(kernel):
    """Instructions a warp runs for a full block: the last innermost loop with a wgmma.

    With warp specialisation there is one such loop for each group of consumers; they are the same.
    """
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", run_cuobjdump(kernel, "-sass"))
    code = [(int(place, 16), text) for place, text in instructions]
    loops = []
    for place, text in code:
        jump = re.search(r"BRA\S*\s+(?:\S+,\s*)*`?\(?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < place:
            loops.append((int(jump[1], 16), place))
    lengths = []
    for first, last in loops:
        body = [text for place, text in code if first <= place <= last]
        holds_another = any((a, b) != (first, last) and first <= a <= b <= last for a, b in loops)
        if not holds_another and any("HGMMA" in text for text in body):
            lengths.append(len(body))
    return lengths[-1] if lengths else 0


def measure(kernel):
    """-> dict of registers, stack (bytes), shared (KB) and counts."""
    usage = run_cuobjdump(kernel, "-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    count = kernel.asm["ptx"].count
    return dict(
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared / 1024,
        wgmma=count("wgmma.mma_async"),
        tma=count("cp.async.bulk.tensor"),
        replaced=count("tensormap.replace"),
        fences=count("fence.proxy.tensormap"),
        loop=full_block_instructions(kernel),
        specialised="warp_specialize" in kernel.asm["ttgir"],
    )


def main():
    print(
        "kernel shape BM BN warps: registers, stack, shared KB, wgmma, tma, tensormap.replace,",
        "fences, instructions of a full block per warp, warp-specialised",
    )
    for name, (H, K, D, causal, fold) in SHAPES.items():
        for fn in (A._forward, A._backward_q, A._backward_kv, A._backward_whole):
            kernel = fn.fn.__name__
            if kernel == "_backward_whole" and not fold:
                continue
            BM, BN, options = L.launch_settings(kernel, D, torch.bfloat16, (9, 0), fold)
            # the blocks of the folded token
            for small in (False, True) if fold and kernel == "_forward" else (False,):
                known = dict(H=H, K=K, D=D, BM=16 if small else BM, BN=BN, CAUSAL=causal, FOLD=fold)
                known["CHUNK"] = L.CHUNK
                known |= {"WARPS": False} | options
                known["WARPS"] &= not small
                constants = {key: value for key, value in known.items() if key in fn.arg_names}
                launch = {key: options[key] for key in ("num_warps", "num_stages")}
                partial = dict(dk="*fp32", dv="*fp32") if H != K else {}
                got = measure(compiled(fn, constants, launch, partial))
                print(
                    f"{kernel} {name} {known['BM']} {BN} {options['num_warps']}:",
                    *got.values(),
                    flush=True,
                )
                assert got["stack"] == 0 and got["shared"] <= 227 and got["tma"] > 0
                assert small or got["wgmma"] > 0
                assert got["specialised"] == bool(constants.get("WARPS"))
                assert got["replaced"] == (13 if fold and kernel == "_forward" else 0)
                most = MOST_INSTRUCTIONS[kernel]
                if (name, kernel) == ("vit", "_forward"):
                    most = MOST_FORWARD_VIT
                assert D > 128 or got["loop"] <= most, (name, kernel, got["loop"], most)
    got = measure(compiled(C._to_gradient, dict(BLOCK=4096), dict(num_warps=8)))
    print("_to_gradient", *got.values())
    assert got["stack"] == 0


if __name__ == "__main__":
    main()
