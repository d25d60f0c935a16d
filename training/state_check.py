"""What a save checks before anything is saved as good."""
import math

import torch
from torch.distributed.tensor import DTensor

from training.distributed import gather

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of every trained parameter


def layout_of(tensors):
    """{name: (shape, dtype)}; two saves of a stage must have the same."""
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


def find_fault(tensors, updates):
    """What is wrong with {name: tensor} of checkpoint.tensors_of, as text; None if nothing is.

    updates: the optimizer steps of this stage. The moments of each trained parameter must have
    taken as many. Of sharded tensors each rank sees its own part.
    """
    trained = {name.removeprefix("optimizer.").rpartition(".")[0]
               for name in tensors if name.startswith("optimizer.")}
    counters = []
    for name in trained:
        weight = tensors.get(f"model.{name}")
        moments = [tensors.get(f"optimizer.{name}.{key}") for key in MOMENTS]
        if weight is None or any(m is None for m in moments):
            return f"{name} has not all of {', '.join(MOMENTS)}"
        if any(m.shape != weight.shape for m in moments[1:]):
            return f"the moments of {name} have not its shape {tuple(weight.shape)}"
        counters.append(moments[0])
    if counters:
        counts = torch.stack(counters).tolist()
        wrong = [name for name, n in zip(trained, counts, strict=True) if n != updates]
        if wrong:
            return (f"the run has made {updates:g} updates, but the moments of {len(wrong)} of "
                    f"{len(trained)} parameters have not, such as {min(wrong)}")
    return not_finite(tensors)


@torch.no_grad()
def not_finite(tensors):
    """Which of {name: tensor} hold NaN or infinity, as text; None if none does."""
    parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    parts = {name: t for name, t in parts.items() if t.numel()}
    if not parts:
        return None
    # The largest absolute value of all: one pass over the memory, and NaN stays NaN.
    largest = torch.nn.utils.get_total_norm(list(parts.values()), math.inf, foreach=True)
    if largest.isfinite():
        return None
    names = [name for name, t in parts.items() if not t.isfinite().all()]
    return f"not finite: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"


def refuse_fault(fault, what, dist):
    """ValueError on every rank if any of them has found a fault in `what`."""
    faults = [text for text in gather(fault, dist) if text]
    if faults:
        raise ValueError(f"{what} is not saved: {faults[0]}. What was saved before is intact")
