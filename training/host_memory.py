"""Main memory that is free for the copies which are written in the background."""
import re
from pathlib import Path

from torch.distributed.tensor import DTensor

from training.distributed import rank_variable


def memory_for(tensors):
    """Whether each rank of this machine can copy its `tensors` and leave as much again free."""
    need = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors.values())
    ranks_here = rank_variable("LOCAL_WORLD_SIZE", 1)
    return 2 * need * ranks_here < available_memory()


def available_memory():
    """Bytes of main memory that this run may still take; 0 if the system does not say.

    The least of what the machine has and of what is left to the control groups (cgroups, version
    2) that a job scheduler or a container has put this process into.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free = 1024 * int(meminfo.split("MemAvailable:")[1].split()[0])
        found = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        group = Path("/sys/fs/cgroup", found[1] if found else "")
        # A limit on any group above ours counts as well, up to /sys/fs/cgroup.
        for folder in (group, *group.parents)[:-3]:
            limit_file = folder / "memory.max"
            if not limit_file.exists():
                continue
            limit = limit_file.read_text().strip()
            if limit != "max":
                used = int((folder / "memory.current").read_text())
                free = min(free, int(limit) - used)
    except (OSError, LookupError, ValueError):
        return 0
    return free
