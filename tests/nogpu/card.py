"""PyTorch on a card that does nothing: what has to be pretended above driver.c.

Import it before the program. The library must be preloaded, see runs/nogpu.sh. Values on the card
are those that were copied there, for no kernel runs. So everything that reads a result of a kernel
is told here what to read.
"""
import collections
import ctypes
import os
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).parent.parent.parent
library = ctypes.CDLL(None)
library.nogpu_report.restype = ctypes.c_char_p

# "name over N" -> calls among N ranks, and "name over N bytes" -> bytes of what all of them hold
collectives = collections.Counter()
syncs = collections.Counter()  # place in the program -> how often it waited for the card


# ---- what the library has counted ----------------------------------------------------------------


def counts():
    """{name: calls since the last call of this function} of all that reached the driver.

    "nodes of captures" is the number of kernels and copies in the CUDA graphs captured since.
    """
    lines = library.nogpu_report().decode().splitlines()
    library.nogpu_reset()
    found = {}
    for line in lines:
        calls, total, name = line.split("\t")
        found[name] = int(total if name == "nodes of captures" else calls)
    return found


def kernels(found):
    """Kernels among `counts`."""
    return sum(n for name, n in found.items() if name.startswith("kernel "))


# ---- what a kernel would have computed -----------------------------------------------------------


def peek(tensor):
    """A copy on the CPU of a tensor that was copied to the card: its memory is ours."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(bytearray(array), dtype=tensor.dtype).view(tensor.shape)


rows_found = []  # how many rows the next calls of nonzero on the card find


def nonzero_of(rows_expected):
    """Let the next nonzero on the card find as many rows as this boolean tensor has."""
    rows_found[:] = [int(rows_expected.sum())]


def pretend_nonzero():
    """nonzero reads its number of rows from the card, where no kernel has written it."""
    real = torch.Tensor.nonzero

    def nonzero(mask):
        if not (mask.is_cuda and rows_found):
            return real(mask)
        torch.cuda.current_stream().synchronize()  # as the real one does
        return torch.zeros(rows_found.pop(), mask.ndim, dtype=torch.int64, device=mask.device)

    torch.Tensor.nonzero = nonzero


def do_without_cudnn():
    """The patch embedding as a product, and no attention of cuDNN's."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)

    def forward(self, x):
        n, channels, side, _ = x.shape
        p = self.kernel_size[0]
        squares = x.view(n, channels, side // p, p, side // p, p).permute(0, 2, 4, 1, 3, 5)
        rows = squares.reshape(-1, channels * p * p)
        out = F.linear(rows, self.weight.flatten(1), self.bias)
        return out.view(n, side // p, side // p, -1).permute(0, 3, 1, 2)

    torch.nn.Conv2d.forward = forward


def pretend_rows(model):
    """Tell nonzero what the forward pass of model.VLM looks for."""
    embed = model.VLM.embed
    loss = model.LanguageModel.loss

    def embed_with_rows(self, tokens, tiles):
        nonzero_of(peek(tokens) == self.image_token_id)
        return embed(self, tokens, tiles)

    def loss_with_rows(self, h, labels, *rest):
        nonzero_of(peek(labels) != model.IGNORE)
        return loss(self, h, labels, *rest)

    model.VLM.embed = embed_with_rows
    model.LanguageModel.loss = loss_with_rows


def pretend_results(model):
    """Everything of the above. model: the module model.py."""
    pretend_nonzero()
    do_without_cudnn()
    pretend_rows(model)


# ---- other ranks ---------------------------------------------------------------------------------


def pretend_world(world):
    """Be rank 0 of `world`: collectives are counted, and the others are taken to have the same."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ["LOCAL_WORLD_SIZE"] = str(min(8, world))
    start = td.init_process_group

    def init_process_group(*_, **__):
        start("fake", rank=0, world_size=world, store=FakeStore())

    def all_gather_object(out, value, group=None):
        out[:] = [value] * len(out)

    td.init_process_group = init_process_group
    td.new_group = lambda **_: td.group.WORLD
    td.all_gather_object = all_gather_object
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        count_collective(name)
    pretend_buckets()


def count_collective(name):
    real = getattr(td, name)

    def counted(*args, **settings):
        tensors = [x for x in (*args, *settings.values()) if isinstance(x, torch.Tensor)]
        what = f"{name} over {td.get_world_size(settings.get('group'))}"
        collectives[what] += 1
        collectives[f"{what} bytes"] += max(tensor.nbytes for tensor in tensors)
        return real(*args, **settings)

    setattr(td, name, counted)


def pretend_buckets():
    """DDP's own sum reads what the fake process group does not return."""
    parallel = torch.nn.parallel.DistributedDataParallel
    real = parallel.__init__

    def hook(_, bucket):
        td.all_reduce(bucket.buffer())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def init(self, *args, **settings):
        real(self, *args, **settings)
        self.register_comm_hook(None, hook)

    parallel.__init__ = init


# ---- waiting for the card ------------------------------------------------------------------------


def program_frame():
    """file.function of the innermost frame that belongs to the program."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests"):
            # Python 3.11 gives a comprehension a frame of its own, later versions do not.
            if not frame.name.endswith("comp>"):
                return f"{path.relative_to(ROOT)} {frame.name}"
    return "outside of the program"


def watch_syncs(on):
    """Count in `syncs` where the program waits for the card, as PyTorch sees it."""
    torch.cuda.set_sync_debug_mode("warn" if on else "default")
    warnings.simplefilter("always" if on else "default")

    def show(message, *_, **__):
        if "synchroniz" in str(message):
            syncs[program_frame()] += 1

    warnings.showwarning = show
