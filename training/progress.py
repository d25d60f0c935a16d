"""state.json of a checkpoint: how far a stage has come."""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from inputs.files import read_json

STATE_FORMAT = 2  # raised when an entry gets another meaning or a new one is needed


@dataclass(slots=True)
class Progress:
    """How far a stage has come: all that a resumed run must know beside the tensors."""
    stage: str = ""
    fingerprint: str = ""  # of the data, their order and the size of packs
    packs_per_step: int = 1
    world: int = 1  # ranks on which the run began; they set the packs of a step
    position: list = field(default_factory=lambda: [0, 0, 0])  # epoch, window, packs done in it
    counts: dict = field(default_factory=dict)  # samples by their fate: used, too_long, ...
    step: int = 0
    skipped: int = 0  # steps whose loss or gradient was not finite: they updated nothing
    bad_steps: int = 0  # the last of them in a row
    quarantined: int = 0  # samples that could not be read
    tokens_seen: int = 0
    samples_seen: int = 0
    spike: float = 0.0  # standard deviations of the last loss above the trend
    losses: list = field(default_factory=list)  # the last ones, from which the trend is taken
    format: int = STATE_FORMAT

    @property
    def updates(self):
        """Optimizer steps of this stage, which are the `step` of its AdamW moments."""
        return self.step - self.skipped

    def advance(self, step, last_batch, totals, finite):
        """Count a step. last_batch says where the data go on; totals are those of all ranks."""
        self.step = step
        self.position = last_batch["position"]
        self.counts = last_batch["counts"]
        self.skipped += not finite
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.quarantined += int(totals["bad"])
        self.tokens_seen += int(totals["tokens"])
        self.samples_seen += int(totals["samples"])


def read_progress(path):
    """The Progress that was saved with the checkpoint `path`. Unknown entries are ignored.

    ValueError, with the path, if another version of this program wrote it, or if an entry is
    missing or of the wrong type.
    """
    path = Path(path) / "state.json"
    state = read_json(path, dict)
    found = state.get("format", 1)
    if found != STATE_FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads {STATE_FORMAT}; "
                         "go on with the version that wrote it, or start anew in another "
                         "--out_dir")
    values = {}
    for entry in dataclasses.fields(Progress):
        value = state.get(entry.name)
        number_as_int = entry.type is float and type(value) is int
        if type(value) is not entry.type and not number_as_int:
            what = f"{value!r} as" if entry.name in state else "no"
            raise ValueError(f"{path} has {what} {entry.name!r}; restore it, or remove the "
                             "checkpoint to go on from the one before")
        values[entry.name] = value
    return Progress(**values)
