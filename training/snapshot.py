"""What each rank writes of a checkpoint: every tensor, and every shard of one, is written once."""
import collections

from torch.distributed.tensor import DTensor

from training.host_memory import memory_for


def snapshot(tensors, dist, copy):
    """The tensors that this rank writes -> ({name: tensor}, whether they are copies).

    With copy=True they are copies in main memory, if there is enough of it, and the live ones may
    change from now on.
    """
    mine = split_work(tensors, dist)
    copy = copy and memory_for(mine)
    if copy:
        mine = {name: t.to("cpu", copy=True) for name, t in mine.items()}
    return mine, copy


def copies_of(tensor, dist):
    """-> (which of the equal copies of a tensor, or of a shard of it, this rank has; of how many).

    Each rank has a copy of a plain tensor. A shard has one on each node under HSDP, else none.
    """
    if not isinstance(tensor, DTensor):
        return dist.rank, dist.world
    mesh = tensor.device_mesh
    if mesh.ndim == 1:
        return 0, 1
    return mesh.get_local_rank(0), mesh.size(0)


def split_work(tensors, dist):
    """This rank's part of {name: tensor}: its shards, and its share of what others hold as well.

    Tensors with as many copies lie end to end on a line. It is cut into stretches of equal length,
    one for each copy; a tensor is written from the copy in whose stretch it starts.
    """
    lengths = collections.Counter()
    for t in tensors.values():
        lengths[copies_of(t, dist)] += t.nbytes
    starts = collections.Counter()
    mine = {}
    for name, t in tensors.items():
        which = copies_of(t, dist)
        copy, copies = which
        if starts[which] * copies // (1 + lengths[which]) == copy:
            mine[name] = t
        starts[which] += t.nbytes
    return mine
