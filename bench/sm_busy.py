"""How busy the processors (SMs) of a GPU are during attention, by counting blocks. Needs no GPU.

    python -m bench.sm_busy

A processor runs one program of these kernels at a time, and programs start in the order of the
table. The unit of time is one block of 128 queries and 128 keys. Busy is all work over processors
times the time until the last program ends. So this shows what is lost because there are too few
programs, or because a long one ends late; it knows nothing of memory or of a program's start.
"""
import heapq
import itertools
import random

import torch

from bench.kernels import AttentionShape
from kernels import attention_launch

N_PROCESSORS = 132  # H100 and H200
HOPPER = (9, 0)


def mixed_lengths(n_tokens):
    """Documents of 64 to 3,000 tokens that fill a pack."""
    rng = random.Random(1)
    lengths = []
    while sum(lengths) < n_tokens - 100:
        lengths.append(min(rng.randint(64, 3000), n_tokens - sum(lengths)))
    return lengths


PACKS = {
    "2B, 4 of 2,048": AttentionShape([2048] * 4, 12, 2, 128, True),
    "2B, mixed, 8k": AttentionShape(mixed_lengths(8192), 12, 2, 128, True),
    "2B, one of 8,192": AttentionShape([8192], 12, 2, 128, True),
    "2B, 8 of 2,048": AttentionShape([2048] * 8, 12, 2, 128, True),
    "2B, one of 16,384": AttentionShape([16384], 12, 2, 128, True),
    "8B, 4 of 2,048": AttentionShape([2048] * 4, 28, 4, 128, True),
    "8B, mixed, 8k": AttentionShape(mixed_lengths(8192), 28, 4, 128, True),
    "0.5B, 2 of 2,048": AttentionShape([2048] * 2, 14, 2, 64, True),
    "0.5B, mixed, 4k": AttentionShape(mixed_lengths(4096), 14, 2, 64, True),
    "ViT, 32 tiles": AttentionShape([1025] * 32, 16, 16, 64, False),
}


def round_up(x, step):
    return -(-x // step) * step


def kernels_of(pack):
    """The names of the kernels that a pack needs, forward and backward."""
    programs = len(pack.lengths) * pack.n_heads
    if attention_launch.whole_documents(
            pack.lengths, pack.causal, pack.head_dim, programs, N_PROCESSORS):
        return ("_forward", "_backward_whole")
    return ("_forward", "_backward_q", "_backward_kv")


def rows_walked(kernel, block, sizes, causal, fold):
    """Rows of the other side that a program walks, its edges in whole steps."""
    BM, BN, STEP = sizes
    first, last, start, end = block
    length = end - start
    if fold:
        return length - 1
    if kernel == "_backward_kv":
        if not causal:
            return round_up(length, STEP)
        diagonal = min(round_up(length - first, STEP), BN)
        return diagonal + round_up(max(length - first - BN, 0), STEP)
    if causal:
        return first + round_up(last - first, STEP)
    return length // BN * BN + round_up(length % BN, STEP)


def busy_share(pack, kernel):
    """-> (programs, share of the time that the processors work)."""
    borders = [0, *itertools.accumulate(pack.lengths)]
    fold = (kernel in ("_forward", "_backward_whole")
            and attention_launch.folds(pack.lengths, pack.causal))
    BM, BN, options = attention_launch.launch_settings(
        kernel, pack.head_dim, torch.bfloat16, HOPPER, fold)
    sizes = (BM, BN, options["STEP"])
    of_queries = kernel != "_backward_kv"
    n_programs = 0
    total = 0.0
    elapsed = 0.0
    own = BM if of_queries else BN
    for size, begin, limit in attention_launch.launches(kernel, own, pack.lengths, pack.causal):
        free_at = [0.0] * N_PROCESSORS
        for block in attention_launch.split_into_blocks(borders, size, begin, limit, of_queries):
            first, last, _, _ = block
            # A program computes its whole block, but a document has as many rows as it has. The
            # matmul units work on at least 64 rows at a time.
            height = (last - first if kernel == "_backward_whole" else max(size, 64)) / 128
            work = height * rows_walked(kernel, block, sizes, pack.causal, fold) / 128
            for _ in range(pack.n_heads):
                heapq.heappush(free_at, heapq.heappop(free_at) + work)
                n_programs += 1
                total += work
        # the next launch waits for this one
        elapsed += max(free_at)
    return n_programs, total / (N_PROCESSORS * elapsed)


def main():
    print(f"programs, and how busy {N_PROCESSORS} processors are")
    for name, pack in PACKS.items():
        cells = []
        for kernel in kernels_of(pack):
            n_programs, busy = busy_share(pack, kernel)
            cells.append(f"{kernel[1:]} {n_programs:6,d} {busy:4.0%}")
        print(f"{name:18s} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
