"""Signals that ask a run to stop, and the watchdog of a run that hangs."""
import contextlib
import faulthandler
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as td

from training.distributed import all_reduce_sum


class Preemption:
    """SIGTERM and SIGUSR1 ask for a checkpoint at the end of the step that runs.

    Create it before anything slow: until then these signals kill the process.
    """

    def __init__(self):
        self.signals = []
        self.nothing_to_save = False
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.signals.append(number)
        if self.nothing_to_save:
            self._end()

    def _end(self):
        print("stopped by a signal before a step was made; an index that was begun is gone on "
              "with: run the same command to continue", file=sys.stderr, flush=True)
        sys.exit(0)

    @contextlib.contextmanager
    def at_once(self):
        """Within, a signal ends the process at once: data may be indexed for hours."""
        self.nothing_to_save = True
        if self.signals:
            self._end()
        yield
        self.nothing_to_save = False

    def stop_requested(self, dist):
        """True on all ranks if any of them was asked to stop. All call it once per step.

        ValueError in a worker whose torchrun has died: an orphan must not write into the folder of
        the job that takes its place.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent:
            raise ValueError("torchrun has ended, so this worker ends too; "
                             "run the same command again to continue")
        count = torch.tensor(len(self.signals), device=dist.device)
        return all_reduce_sum(count, dist).item() > 0


class Watchdog:
    """Ends a run that hangs, and leaves in last_step/rank_K.txt where it did.

    All ranks call `note` at about the same moment, with what comes next. If the next call is not
    there after timeout_s, the stacks of all threads follow in the file and the process ends.
    Under torchrun an alarm of the system ends it 5 s later: it needs no Python, as a rank that
    waits in a driver runs none, and by then all ranks have written their stacks.
    """

    def __init__(self, out_dir, dist, timeout_s):
        self.path = Path(out_dir) / "last_step" / f"rank_{dist.rank}.txt"
        self.timeout_s = timeout_s
        self.file = None
        self.warned = False

    def note(self, text):
        """Start the time again; text: what comes next."""
        self.stop()
        alone = not td.is_initialized()
        if not alone:
            signal.alarm(self.timeout_s + 5)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "wb", buffering=0)  # stays open: the stacks go there
            self.file.write(f"{text}\n".encode(errors="backslashreplace"))
        except OSError as e:  # a full disk must not end a run that can go on
            if not self.warned:
                print(f"WARNING: {self.path} cannot be written ({e.strerror}); where a step hangs "
                      "will not be told", file=sys.stderr, flush=True)
            self.warned = True
        file = self.file or sys.__stderr__
        faulthandler.dump_traceback_later(self.timeout_s, file=file, exit=alone)

    def stop(self):
        """Nothing is watched until the next note."""
        faulthandler.cancel_dump_traceback_later()
        if td.is_initialized():
            signal.alarm(0)
