"""Where the ranks of one start meet, whatever earlier ranks have left in torchrun's store."""
import time
import uuid

import torch.distributed as td
from torch.distributed.rendezvous import rendezvous

POLL_S = 0.1


def store_of_this_start(rank, world, timeout):
    """A part of torchrun's store in which these ranks alone write.

    torchrun starts ranks anew with the store of those that died, on several machines with counts of
    restarts that differ. There a rank may find the address of a dead one. So rank 0 calls by a new
    name, the others answer, and it says who is here. Who is not among them waits for its next call.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    name = uuid.uuid4().hex
    if rank == 0:
        call_ranks(store, name, world)
        return td.PrefixStore(name, store)
    return td.PrefixStore(answer_call(store, name, rank), store)


def call_ranks(store, name, world):
    """What rank 0 does: it waits until each other rank has answered its name."""
    store.set("call", name)
    here = [store.get(f"{name} {other}").decode() for other in range(1, world)]
    store.set(f"{name} here", " ".join(here))


def answer_call(store, name, rank):
    """What any other rank does -> the name of the rank 0 that has heard it."""
    while True:
        call = store.get("call").decode()
        store.set(f"{call} {rank}", name)
        # A rank 0 that has died has another caller after it.
        while store.get("call").decode() == call:
            here = f"{call} here"
            if store.check([here]) and name in store.get(here).decode().split():
                return call
            time.sleep(POLL_S)
