"""torch.compile of the transformer blocks."""
import torch
import torch.fx.experimental._config as fx_config

from aimv2 import AIMv2Block
from model import Block
from vision import VisionBlock


def compile_blocks(model, backend="inductor"):
    """Compile every transformer block in place: names and checkpoints do not change.

    The sizes of a pack (T, N, S) are symbols from the start. So blocks of one kind share a graph,
    and a new pack compiles nothing.
    """
    # It brings the compiler, most of a second: a run without it does not wait.
    import torch._inductor.config as inductor_config
    # Graphs of another stage, in which other parts trained, would count against PyTorch's limit.
    torch._dynamo.reset()
    # PyTorch would cut the graph of a block where a bucket of DDP ends. Blocks are smaller than
    # buckets, and its cutter does not know symbolic sizes.
    torch._dynamo.config.optimize_ddp = False
    # Two sizes that are equal in the first pack are not the same size.
    fx_config.use_duck_shape = False
    # Inductor would fuse two sums over the same rows only where there are many. So the last block,
    # which computes rows with a label, would be compiled anew for a pack with more of them.
    inductor_config.triton.mix_order_reduction_non_strict_mode = True
    for module in model.modules():
        if isinstance(module, (VisionBlock, AIMv2Block, Block)):
            module.compile(dynamic=True, backend=backend)
