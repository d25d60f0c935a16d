"""What a GPU sends to others in a step, and from which speed of the links on nobody waits for it.

Of B bytes that N ranks gather, or whose sums they scatter, each sends B (N - 1) / N. A sum that all
of them get is both. Ranks of several nodes are taken to form a ring, which leaves a node once for
each of its n ranks: one n-th of what a GPU sends goes to another node. `make nogpu` counts the
bytes.
"""
from dataclasses import dataclass

from training.distributed import ranks_of_node
from training.memory import block_size, size_of, trained_size


@dataclass
class Traffic:
    """Bytes that a GPU sends inside its node, and to others."""
    pack_inside: float = 0.0  # in each micro-batch
    pack_between: float = 0.0
    step_inside: float = 0.0  # once a step, in the backward pass of its last micro-batch
    step_between: float = 0.0

    def of_step(self, packs):
        """-> (bytes inside, bytes between) of a step of so many micro-batches."""
        inside = packs * self.pack_inside + self.step_inside
        return inside, packs * self.pack_between + self.step_between

    def speeds(self, pack_seconds, backward_seconds):
        """-> bytes a second (inside, between) at which it takes no longer than the computation."""
        inside = self.pack_inside / pack_seconds + self.step_inside / backward_seconds
        return inside, self.pack_between / pack_seconds + self.step_between / backward_seconds


def sharing_bytes(model):
    """Bytes of weights that FSDP gathers, and of gradients that it scatters, for a micro-batch.

    Weights are bf16. All are gathered for the forward pass, and for the backward pass all but those
    of the outermost unit; a frozen ViT too, because FSDP looks ahead. Gradients are fp32.
    """
    again = model.llm.n_layers * block_size(model) + size_of(model.vision_model)
    return 2 * (size_of(model) + again) + 4 * trained_size(model)


def traffic_plan(how, model, world):
    """The Traffic of a stage. model: a VLM whose parameters know whether they train."""
    n = min(ranks_of_node(world), world)
    nodes = world / n
    outside = 1 / n if nodes > 1 else 0
    if how == "ddp":
        sent = 2 * 4 * trained_size(model) * (world - 1) / world
        return Traffic(step_inside=sent * (1 - outside), step_between=sent * outside)
    if how == "fsdp":
        sent = sharing_bytes(model) * (world - 1) / world
        return Traffic(pack_inside=sent * (1 - outside), pack_between=sent * outside)
    summed = 4 * trained_size(model) / n  # the gradients of a shard
    return Traffic(pack_inside=sharing_bytes(model) * (n - 1) / n,
                   step_between=2 * summed * (nodes - 1) / nodes)
