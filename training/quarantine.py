"""Samples that cannot be read: which rows they are, and when they are too many to go on."""
from training.distributed import gather
from training.metrics import log_bad

EMPTY_STEPS = 3  # so many steps in a row without one readable sample end a run


class Quarantine:
    """The different rows that could not be read since this start of the run.

    A row counts once, however often its epoch comes. It is not remembered from start to start:
    it may have been mended.
    """

    def __init__(self, packs, out_dir, dist):
        """ValueError if too many of the rows that are used were unreadable when indexed."""
        self.n_used = packs.n_used
        self.out_dir = out_dir
        self.dist = dist
        self.rows = set()
        self.n_seen = 0
        self.n_empty = 0
        problem = too_many(packs.n_bad, packs.n_used, out_dir)
        if problem:
            raise ValueError(problem)

    def add(self, micro, totals):
        """Note the unreadable samples of a step. Returns why the run must stop, or "".

        totals: of all ranks, which all call it and get the same answer.
        """
        self.n_seen += int(totals["samples"] + totals["bad"])
        if totals["bad"]:
            bad = [record for batch in micro for record in batch["bad"]]
            bad = sum(gather(bad, self.dist), [])
            self.rows |= {(record["file"], record["row"]) for record in bad}
            if self.dist.is_main:
                log_bad(self.out_dir, bad)
        self.n_empty = 0 if totals["samples"] else self.n_empty + 1
        if self.n_empty >= EMPTY_STEPS:
            return (f"{EMPTY_STEPS} steps in a row without a sample that could be read: see "
                    f"{self.out_dir}/bad_samples.jsonl")
        return too_many(len(self.rows), min(self.n_seen, self.n_used), self.out_dir)


def too_many(n_bad, n, out_dir):
    """What to say if n_bad of n different rows are more than max(100, 1 %), else ""."""
    if n_bad <= max(100, 0.01 * n):
        return ""
    return (f"{n_bad} unreadable samples of {n}: see {out_dir}/bad_samples.jsonl, repair or "
            "remove them")
