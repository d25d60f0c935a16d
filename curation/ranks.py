"""The ranks of a stage: who makes which shard, and arrays that are spread over all of them.

Under torchrun all ranks are in one process group (gloo). Without it one process is the only rank.
Shards are dealt out by a counter in the group's store. The counter ends with the group: where a
rank dies, torchrun ends the others and starts all of them anew, and what no rank has finished is
dealt out again. Nothing else is held by anybody.

Shapes: n rows of all shards. Each rank has a block of rows that follow one another, those from
bounds[rank] to bounds[rank + 1].
"""
import ctypes
import os
import signal
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as td

from inputs import files
from training.distributed import ALONE, Dist, gather, setup_distributed

# A rank waits so long for the others, which may be at work on a large shard. If one of them dies,
# torchrun ends it before.
PATIENCE_S = 7 * 24 * 3600
PR_SET_PDEATHSIG = 1  # of Linux, sys/prctl.h


@dataclass(slots=True)
class Ranks:
    """This process among the ranks of a stage."""
    dist: Dist = ALONE
    n_deals: int = 0  # so far

    @property
    def rank(self):
        return self.dist.rank

    @property
    def world(self):
        return self.dist.world

    def gather(self, value):
        """[value of rank 0, value of rank 1, ...] on every rank, when all are here."""
        return gather(value, self.dist)

    def deal(self, items):
        """Yield those of the items that this rank gets. Whoever asks next gets the next one."""
        self.n_deals += 1
        if self.world == 1:
            yield from items
            return
        store = td.distributed_c10d._get_default_store()
        while True:
            k = store.add(f"dealt {self.n_deals}", 1) - 1
            if k >= len(items):
                return
            yield items[k]

    def share(self, items):
        """The part of a list that belongs to this rank: neighbours, the same whoever made them."""
        return items[len(items) * self.rank // self.world
                     : len(items) * (self.rank + 1) // self.world]

    def exchange(self, rows, owner):
        """Send row k of an array to rank owner[k] -> what came, by sender, and how much of each."""
        sizes = np.bincount(owner, minlength=self.world)
        if self.world == 1:
            return rows, sizes
        # numpy sorts numbers of 16 bits by radix, which is ten times as quick.
        order = np.argsort(owner.astype(np.uint16), kind="stable")
        rows = np.ascontiguousarray(rows[order])
        got = torch.empty(self.world, dtype=torch.int64)
        td.all_to_all_single(got, torch.from_numpy(sizes))
        width = rows.dtype.itemsize * int(np.prod(rows.shape[1:], initial=1))
        sent = torch.from_numpy(rows.view(np.uint8).reshape(-1))
        received = torch.empty(int(got.sum()) * width, dtype=torch.uint8)
        td.all_to_all_single(received, sent, (got * width).tolist(), (sizes * width).tolist())
        return received.numpy().view(rows.dtype).reshape(-1, *rows.shape[1:]), got.numpy()

    def fetch(self, block, bounds, rows):
        """The values of these rows (m,), of an array of which each rank has its block."""
        wanted, back = np.unique(rows, return_inverse=True)
        asked, counts = self.exchange(wanted, owner_of(bounds, wanted))
        sender = np.repeat(np.arange(self.world), counts)
        values, _ = self.exchange(block[asked - bounds[self.rank]], sender)
        return values[back]

    def sum(self, array):
        """Sum of an array over the ranks."""
        if self.world == 1:
            return array
        total = torch.from_numpy(np.array(array))
        td.all_reduce(total)
        return total.numpy()


def join_ranks():
    """The Ranks of this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    return Ranks(setup_distributed("cpu", PATIENCE_S))


def end_with_parent():
    """Let Linux kill this process when torchrun is killed.

    A rank that lived on would work in the folder beside the ranks of the next torchrun.
    """
    parent = os.getppid()
    library = ctypes.CDLL(None)
    if hasattr(library, "prctl"):
        library.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        raise ValueError("torchrun has ended; start the same command again")


def on_first_rank(ranks, work):
    """work() on rank 0 alone -> its result there, None elsewhere.

    If it fails all ranks end, and rank 0 says why.
    """
    result = None
    error = None
    if ranks.rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as e:
            error = e
    if ranks.gather(error is not None)[0]:
        if error:
            raise error
        sys.exit(2)
    return result


def owner_of(bounds, rows):
    """Which rank has each of these rows."""
    return np.searchsorted(bounds, rows, "right") - 1


def connected(ranks, bounds, first, second):
    """Rows that pairs connect, in steps too -> the lowest row (block,) that each own row reaches.

    first, second (pairs,): rows; each rank has some of the pairs. In each round the root of a
    higher row is hung under that of the lower, and all rows are pointed at their roots (Shiloach
    and Vishkin, 1982).
    """
    start = bounds[ranks.rank]
    label = np.arange(start, bounds[ranks.rank + 1])
    while True:
        first = ranks.fetch(label, bounds, first)
        second = ranks.fetch(label, bounds, second)
        differ = first != second
        first = first[differ]
        second = second[differ]
        if ranks.sum(np.array([len(first)]))[0] == 0:
            return label
        links = np.stack([np.maximum(first, second), np.minimum(first, second)], 1)
        links, _ = ranks.exchange(links, owner_of(bounds, links[:, 0]))
        np.minimum.at(label, links[:, 0] - start, links[:, 1])
        while True:
            root = ranks.fetch(label, bounds, label)
            moved = np.array([(root != label).sum()])
            label = root
            if ranks.sum(moved)[0] == 0:
                break


# ---- files that ranks leave for each other -------------------------------------------------------


def save_array(path, array):
    with files.atomic_write(path, "wb") as file:
        np.save(file, array)


def is_whole_array(path):
    """Whether a .npy is there and not cut off."""
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError):
        return False
    return True
