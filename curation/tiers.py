"""Stages quick, composition, incremental: choose fine-tuning data by training on it.

SAIL-VL's evaluation of data, in three tiers: rank candidates, weigh a mix, let it grow.
"""
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from curation.shards import index_tokenizer
from inputs import files
from inputs.sources import open_sources
from runs.plan import run_plan


@dataclass
class MixRuns:
    """Trains on mixes of the groups in --in=name=source,... and evaluates each mix."""
    cfg: object
    out: Path
    groups: dict  # {name: its sources}
    scores: dict = field(default_factory=dict)  # {mix: overall score, or None if it is not run}

    def measure(self, mix, shares):
        """Train and evaluate on shares {group: 0 to 1} -> overall score, None without --run=True.

        All shares together are cut to --n samples. A share is the first part of a source.
        """
        cfg = self.cfg
        folder = self.out / mix
        train = ["sft.py", *shlex.split(cfg.sft), f"--stages={cfg.stage}",
                 f"--{cfg.stage}.data={folder / 'mix.json'}", f"--out_dir={folder / 'sft'}"]
        evaluate = ["eval.py", *shlex.split(cfg.eval), f"--model={folder}/sft/{cfg.stage}",
                    f"--out_dir={folder / 'eval'}"]
        meta = json.dumps(self.meta(shares), indent=1) + "\n"
        run_plan(folder, [train, evaluate], cfg.run, **{"mix.json": meta})

        score = None
        if cfg.run:
            score = files.read_json(folder / "eval" / "results.json", dict)["overall"]
        self.scores[mix] = score
        return score

    def meta(self, shares):
        """The InternVL meta file of a mix."""
        total = sum(self.count_rows(group) * share for group, share in shares.items())
        cut = min(1.0, self.cfg.n / total) if self.cfg.n else 1.0
        meta = {}
        for group, share in shares.items():
            for k, source in enumerate(self.groups[group]):
                meta[f"{group}-{k}"] = {
                    "root": str(source.root.resolve()),
                    "annotation": str(source.path.resolve()),
                    "length": len(source.rows),
                    "repeat_time": share * cut,
                }
        return meta

    def count_rows(self, group):
        return sum(len(source.rows) for source in self.groups[group])


def run_tier(cfg, tier):
    """Write the mixes of a tier, print their commands, run them with --run=True, rank them.

    Since a share is the first part of a source, shuffle each source once before.
    """
    groups = {}
    for source in open_sources(cfg.in_, index_tokenizer(), "sailvl-chat"):
        groups.setdefault(source.name, []).append(source)
    runs = MixRuns(cfg, Path(cfg.out or f"out/{tier}"), groups)
    if tier == "quick":
        measure_alone(runs)
    elif tier == "composition":
        measure_halves(runs)
    else:
        measure_additions(runs)

    ranked = sorted(runs.scores.items(), key=lambda item: -(item[1] or 0))
    files.write_atomic(runs.out / "ranking.json", json.dumps(ranked, indent=1) + "\n")
    if cfg.run:
        for mix, score in ranked:
            print(f"{score or 0:8.2f}  {files.printable(mix)}")


def measure_alone(runs):
    """quick: each group by itself."""
    for group in runs.groups:
        runs.measure(group, {group: 1.0})


def measure_halves(runs):
    """composition: all groups together, then with one after the other halved."""
    everything = dict.fromkeys(runs.groups, 1.0)
    runs.measure("all", everything)
    for group in runs.groups:
        runs.measure(f"half_{group}", everything | {group: 0.5})


def measure_additions(runs):
    """incremental: add one group after the other; it stays if the score does not fall."""
    kept = []
    best = 0.0
    for group in runs.groups:
        mix = [*kept, group]
        score = runs.measure("+".join(mix), dict.fromkeys(mix, 1.0)) or 0.0
        # Commands that are only printed assume that every group stays.
        if not kept or not runs.cfg.run or score >= best:
            kept = mix
            best = score
    if runs.cfg.run:
        print(f"kept: {files.printable(', '.join(kept))}")
    else:
        print("with --run=True a set stays only if the score does not fall")
