"""Stage plan: hours, memory, disk and traffic of collect, dedup and select, before they run.

seconds of a rank = pictures * (ms of a picture + ms of a kilobyte * its kilobytes) / ranks. The
rates are CPU time of one core of an AMD EPYC with AVX512, those of a kilobyte of a Xeon at 2.5 GHz,
28 and 29 November 2026 (docs/log.md). Waiting for the disk is not in them: the traffic says what it
has to bear.
"""
from dataclasses import dataclass

from curation.compare import VERDICT
from curation.dedup import DEDUP_ROW
from curation.look import HASHED_CROPS, LOOK, UNSURE_BITS
from curation.pairs import ENTRY, keys_at_once

MS_PER_KEY_ROW = 0.04  # of a picture in the search for candidates
MS_PER_COMPARISON = 2.7  # of one pair of pictures
ROW_KB = 1.0  # the .json of a row in its shard
# Of a compared pair in memory: a key of two numbers and its result in a dict, by tracemalloc.
COMPARED_BYTES = 267
COPIES_IN_MEMORY = 3  # of the table of keys while it is sent and sorted
FEATURE_BYTES = 4 * 112  # of a row in select, without --model


@dataclass(slots=True)
class StagePlan:
    """What a stage costs. ms: of one picture."""
    name: str
    ms: float
    ms_per_kb: float
    reads: float  # how often each picture is read
    writes: float  # how often it is written
    extra_bytes: float  # a picture, on the disk, beside its shard
    held_bytes: float  # a picture, in the memory of a rank
    sent_bytes: float  # a picture, between the ranks


def stage_plans(cfg):
    entries = 3 * len(HASHED_CROPS) * 2**UNSURE_BITS  # of the table of keys, for a picture
    compared = MS_PER_KEY_ROW + MS_PER_COMPARISON * cfg.compared
    looks = LOOK.itemsize * 2 * cfg.compared  # read again for comparisons
    return [
        StagePlan("collect", 0.3, 0.08, 2, 1, 17, 18, 18),
        StagePlan("dedup", 0.6 + compared, 0.08, 2 + looks / 1e3 / cfg.picture_kb, 1,
                  LOOK.itemsize + DEDUP_ROW.itemsize,
                  DEDUP_ROW.itemsize + VERDICT.itemsize + COMPARED_BYTES * cfg.compared,
                  entries * ENTRY.itemsize),
        StagePlan("select", 0.3, 0.0, 1, 1, FEATURE_BYTES + 13, FEATURE_BYTES + 41, 32),
    ]


def print_curation_plan(cfg):
    """Print a table with a line for each stage, and the formulas behind it."""
    if cfg.by != "image":
        raise ValueError(f"--by={cfg.by}: plan knows the rates of --by=image alone")
    print(f"{cfg.n:,} pictures of {cfg.picture_kb:g} KB on {cfg.ranks} ranks of one core")
    print(f"{'stage':8} {'hours':>9} {'GB a rank':>10} {'TB on disk':>11} {'TB sent':>8} "
          f"{'TB read+written':>16} {'GB/s of it':>11}")
    # A rank makes so many keys at once, however many rows it has.
    at_once = keys_at_once(cfg.ranks) * ENTRY.itemsize * COPIES_IN_MEMORY / 1e9
    for stage in stage_plans(cfg):
        ms = stage.ms + stage.ms_per_kb * cfg.picture_kb
        hours = cfg.n * ms / 1e3 / cfg.ranks / 3600
        memory = cfg.n / cfg.ranks * stage.held_bytes / 1e9
        if stage.name == "dedup":
            memory += at_once
        shard_bytes = (cfg.picture_kb + ROW_KB) * 1e3
        disk = cfg.n * (shard_bytes + stage.extra_bytes) / 1e12
        sent = cfg.n * stage.sent_bytes / 1e12
        moved = cfg.n * (shard_bytes * (stage.reads + stage.writes) + stage.extra_bytes) / 1e12
        rate = moved * 1e3 / max(hours * 3600, 1e-9)
        print(f"{stage.name:8} {hours:9.2f} {memory:10.2f} {disk:11.2f} {sent:8.2f} "
              f"{moved:16.2f} {rate:11.2f}")
    print("hours = pictures * (ms of a picture + ms of a KB * KB) / ranks, of the processor alone; "
          "if the disks\n  give less than the GB/s of the last column: TB read+written / what they "
          "give\n"
          "memory of a rank = pictures / ranks * bytes held, in dedup "
          f"{at_once:.2f} GB more for keys; +0.4 GB for Python\n"
          f"disk = pictures * ({cfg.picture_kb + ROW_KB:g} KB of a shard + bytes beside it)\n"
          "sent = pictures * bytes sent\n"
          "read+written = pictures * (KB of a shard * times read and written + bytes beside it)")
    for stage in stage_plans(cfg):
        print(f"  {stage.name}: {stage.ms:.3g} + {stage.ms_per_kb:.3g} * KB ms; "
              f"bytes of a picture: {stage.held_bytes:.0f} held, "
              f"{stage.extra_bytes:.0f} beside the shard, {stage.sent_bytes:.0f} sent; "
              f"read {stage.reads:.3g}, written {stage.writes:g} times")
    print(f"dedup compares {cfg.compared:g} pairs for each picture, {MS_PER_COMPARISON} ms each "
          "(--compared=N)")
