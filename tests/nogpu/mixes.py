"""Operations that mix a tensor on the CPU with tensors on the card.

PyTorch refuses most of them, and then a case stops. Some it carries out, with a copy and a wait
each time: an index that was left on the CPU, for one.
"""
import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Copies go from one device to the other. The others only ask for a size or a device.
ALLOWED = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::set_",
           "aten::empty_like", "aten::zeros_like", "aten::ones_like", "aten::full_like"}
# Arguments that belong there: our attention reads the ends of documents on the CPU.
ON_THE_CPU = {"cu_seqlens"}


class WatchDevices(TorchDispatchMode):
    """While it is entered, `found` counts {name of an operation: calls that mix devices}.

    Graphs of torch.compile need it not: it refuses to make one that mixes. A number on the CPU
    (no dimensions) is no tensor to a kernel, which gets its value.
    """

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), settings=None):
        names = [argument.name for argument in operation._schema.arguments]
        given = [x for i, x in enumerate(args) if names[i] not in ON_THE_CPU]
        tensors = [x for x in tree_leaves((given, settings)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device.type != "cpu"}
        name = operation._schema.name
        if len(devices) > 1 and name not in ALLOWED:
            self.found[name] += 1
        return operation(*args, **(settings or {}))
