"""Prefetching: while a step is trained, the packs of the next one are fetched and copied."""
import collections
import itertools
import threading

import torch

from data import model_inputs

CLOSE_S = 10  # so long a pack that is on its way may hold up the end of a stage


class Prefetcher:
    """The micro-batches of one step after the other, which a thread fetches from a loader.

    A step has to know how many tokens all its packs have before its first backward pass, so it
    begins when all of them are there. Each pack that goes into training makes room for another
    one. Those of one step and two more are in memory, and at most two of them on the device.

    Without workers there is no thread either: reading images in it would take the interpreter from
    the loop again and again.
    """

    def __init__(self, batches, accum, device, num_workers):
        """batches: the iterator of a loader; nobody else takes from it."""
        self.batches = batches
        self.accum = accum
        self.device = device
        # Copies on a stream of their own run beside the computation.
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None
        self.packs = collections.deque()  # fetched, and not yet trained
        self.changed = threading.Condition()  # guards the lines above and below
        self.error = None  # why nothing more is fetched
        self.closed = False
        self.thread = None
        if num_workers:
            self.thread = threading.Thread(target=self.fetch, name="prefetch", daemon=True)
            self.thread.start()

    def fetch(self):
        """What the thread does."""
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a new thread is on the first GPU
            while not self.closed:
                batch = next(self.batches)
                with self.changed:
                    self.packs.append(batch)
                    self.changed.notify_all()
                    self.changed.wait_for(self.has_room)
        except BaseException as e:
            # The loop gets it when it has trained what came before.
            with self.changed:
                self.error = e
                self.changed.notify_all()

    def has_room(self):
        return self.closed or len(self.packs) <= self.accum

    def next_step(self):
        """The batches of the next step, on the CPU. Raises what the loader has raised."""
        while self.thread is None and len(self.packs) < self.accum:
            self.packs.append(next(self.batches))
        with self.changed:
            self.changed.wait_for(lambda: self.error or len(self.packs) >= self.accum)
            if len(self.packs) < self.accum:
                raise self.error
            return list(itertools.islice(self.packs, self.accum))

    def on_device(self):
        """Yield the batches of next_step one by one, with their tensors on the device.

        The tensors are for one turn of the loop: afterwards the batch does not have them any more.
        """
        for _ in range(self.accum):
            with self.changed:
                batch = self.packs.popleft()
                following = self.packs[0] if self.packs else None
                self.changed.notify_all()
            if self.copies:
                self.copy(batch)
                self.wait_for_copies(batch)
                if following:
                    self.copy(following)
            yield batch
            for name, value in list(batch.items()):
                if isinstance(value, torch.Tensor):
                    del batch[name]

    def copy(self, batch):
        """Begin to copy the tensors of a batch, unless that was done before."""
        with torch.cuda.stream(self.copies):
            batch |= model_inputs(batch, self.device)

    def wait_for_copies(self, batch):
        """Let the computation that is asked for from now on wait until the batch is there."""
        computation = torch.cuda.current_stream()
        computation.wait_stream(self.copies)
        for value in batch.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                # Its memory is not given away before the computation has read it.
                value.record_stream(computation)

    def close(self):
        """End the thread, and with it the loader's workers."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.thread:
            self.thread.join(CLOSE_S)
        self.batches = None
