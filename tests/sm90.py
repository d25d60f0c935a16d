"""Compile every kernel for Hopper, sm_90a, on a machine without a GPU, and print what came out.

    python tests/sm90.py

For each kernel it prints registers and bytes of stack per thread, shared memory of a block, and
which instructions there are. Stack above 0 means that registers were spilled; Hopper has 227 KB of
shared memory for a block. fp32 is meant for tests of the kernels, not for speed, and left out.
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


def compiled(fn, constants, options, number="bf16"):
    """-> dict of registers, stack (bytes), shared (KB), wgmma, tma, specialised."""
    kinds = dict(
        lse="*fp32",
        delta="*fp32",
        losses="*fp32",
        weights="*fp32",
        labels="*i64",
        table="*i32",
        scale="fp32",
        T="i32",
        V="i32",
        row="i32",
        q_row="i32",
        k_row="i32",
        v_row="i32",
    )
    signature = {
        name: "constexpr" if name in constants else kinds.get(name, f"*{number}")
        for name in fn.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind[0] == "*"
    }
    source = ASTSource(
        fn, signature, {(fn.arg_names.index(n),): x for n, x in constants.items()}, aligned
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        Path(f.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    count = kernel.asm["ptx"].count
    return dict(
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared / 1024,
        wgmma=count("wgmma.mma_async"),
        tma=count("cp.async.bulk.tensor"),
        specialised="warp_specialize" in kernel.asm["ttgir"],
    )


def main():
    print("kernel shape BM BN warps: registers, stack, shared KB, wgmma, tma, warp-specialised")
    for name, (H, K, D, causal, fold) in SHAPES.items():
        for fn in (A._forward, A._backward_q, A._backward_kv):
            kernel = fn.fn.__name__
            BM, BN, options = A.launch_settings(kernel, D, torch.bfloat16, (9, 0))
            for small in (False, True) if fold else (False,):  # the blocks of the folded token
                if small:
                    BM, BN = (BM, 16) if kernel == "_backward_kv" else (16, BN)
                constants = dict(
                    H=H, K=K, D=D, BM=BM, BN=BN, CAUSAL=causal, FOLD=fold, DOT=options["DOT"]
                )
                if kernel == "_forward":
                    constants["WARPS"] = options.get("WARPS", False) and not small
                got = compiled(fn, constants, {k: options[k] for k in ("num_warps", "num_stages")})
                print(
                    f"{kernel} {name} {BM} {BN} {options['num_warps']}:", *got.values(), flush=True
                )
                assert got["stack"] == 0 and got["shared"] <= 227 and got["tma"] > 0
                assert small or got["wgmma"] > 0
                assert got["specialised"] == bool(constants.get("WARPS"))
    got = compiled(C._to_gradient, dict(BLOCK=4096), dict(num_warps=8))
    print("_to_gradient", *got.values())
    assert got["stack"] == 0


if __name__ == "__main__":
    main()
