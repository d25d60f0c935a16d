"""Run a stage: shard by shard, dealt out to the ranks, resumed after any kill, with totals."""
import collections
import contextlib
import json
import sys
from pathlib import Path

from tqdm import tqdm

from curation import shards
from curation.ranks import join_ranks, on_first_rank
from inputs import files
from inputs.locks import take_lock
from training.distributed import close_distributed

# Counts of a shard that a stage prints only if they are not 0.
SPEND_COUNTS = ("replies", "calls", "retries", "prompt_tokens", "completion_tokens")


def run_stage(cfg, stage, process, prepare=None, **settings):
    """Make every output shard that is missing or out of date, then print and write report.json.

    process(shard, counts) yields a ShardRecord for every record of an input shard, in order.
    prepare(ranks, inputs, missing) comes before, on all ranks at once, if a shard is missing: for a
    stage in which a shard depends on all others. It may add shards to `missing`. settings: all that
    decides what comes out; a folder made with others is refused.
    """
    ranks = join_ranks()
    with contextlib.ExitStack() as stack:
        on_first_rank(ranks, lambda: open_output_folder(cfg, stage, settings, stack))
        out = Path(cfg.out)
        inputs = shards.find_input_shards(cfg)
        unfinished = []
        if ranks.rank == 0:
            unfinished = [k for k, shard in enumerate(inputs) if not shard_is_finished(out, shard)]
        missing = [inputs[k] for k in ranks.gather(unfinished)[0]]
        if prepare and missing:
            prepare(ranks, inputs, missing)
        made = make_missing_shards(ranks, out, stage, missing, process)
        all_made = ranks.gather(made)
        # A rank that ends while others still hold its connections may abort after its work.
        try:
            if ranks.rank == 0:
                report_stage(cfg, stage, inputs, all_made)
        finally:
            close_distributed()


def open_output_folder(cfg, stage, settings, stack):
    """Make a stage's folder, check what it was made with, and hold it until the stack closes.

    ValueError if another run works there.
    """
    if not cfg.out:
        raise ValueError("give a folder to write, --out=DIR")
    out = Path(cfg.out)
    make_output_folder(out, shards.find_input_shards(cfg))
    lock, _ = take_lock(out / ".shards" / "lock")
    if lock is None:
        raise ValueError(f"another run is at work in {out}: wait for it or stop it; to work with "
                         "several processes, start them together with torchrun")
    stack.enter_context(lock)
    check_settings(out, {"stage": stage, **settings})


def report_stage(cfg, stage, inputs, all_made):
    """Write and print the totals. ValueError if an input was damaged.

    all_made: what make_missing_shards of each rank returned.
    """
    out = Path(cfg.out)
    found = {name: error for _, damaged in all_made for name, error in damaged.items()}
    damaged = {shard.name: found[shard.name] for shard in inputs if shard.name in found}
    totals = stage_totals(cfg, out, stage, inputs)
    report = json.dumps(totals | {"damaged": damaged}, indent=1)
    files.write_atomic(out / "report.json", report + "\n")
    print(totals_line(totals, sum(n_new for n_new, _ in all_made)))
    if damaged:
        problems = "; ".join(damaged.values())
        raise ValueError(f"left out: {problems}; {totals['done']} shards are whole")


def make_output_folder(out, inputs):
    """Create a stage's folder and its sub-folders. ValueError if it is the input's own folder."""
    taken = {path.resolve() for shard in inputs for path in (shard.path, shard.path.parent)}
    if out.resolve() in taken:
        raise ValueError(f"--out={out} holds the input; write into another folder")
    for folder in (".shards", "dropped", "replies"):
        (out / folder).mkdir(parents=True, exist_ok=True)


def check_settings(out, settings):
    """Write stage.json; ValueError if the folder was made with other settings."""
    settings = json.loads(json.dumps(settings))  # a tuple becomes a list, as in the file
    path = out / "stage.json"
    if path.exists():
        old = files.read_json(path, dict)
        changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
        if changed:
            others = ", ".join(changed).replace("inputs", "input (names, sizes or times)")
            raise ValueError(f"{out} was made with another {others}: "
                             "write into another folder, or remove this one")
    files.write_atomic(path, json.dumps(settings, indent=1) + "\n")


def make_missing_shards(ranks, out, stage, missing, process):
    """Write the shards that this rank is dealt -> how many, {name: error} of damaged inputs."""
    n_new = 0
    damaged = {}
    postponed = []
    with tqdm(total=len(missing), desc=stage, unit="shard", disable=None) as bar:
        for shard in ranks.deal(missing):
            try:
                tell_of_damage(out, shard)
                shards.write_output_shard(out, shard, process)
                n_new += 1
            except shards.PostponedShard:
                postponed.append(shard)
            except shards.DamagedShard as e:
                # Another input is damaged, and this stage needs all of them.
                if str(shard.path) not in str(e):
                    raise
                damaged[shard.name] = str(e)
            bar.update()
    for shard in postponed:
        shards.write_output_shard(out, shard, process)
        n_new += 1
    return n_new, damaged


def shard_is_finished(out, shard):
    """Whether an output shard exists in full and its input has not changed since."""
    facts = out / ".shards" / f"{shard.name}.json"
    if not (out / f"{shard.name}.tar").exists() or not facts.exists():
        return False
    if files.read_json(facts, dict).get("input") != shards.input_state(shard):
        return False
    return not damaged_outputs(out, shard)


def damaged_outputs(out, shard):
    """Sentences about the files of a finished shard that have another size than when written."""
    facts = files.read_json(out / ".shards" / f"{shard.name}.json", dict)
    paths = (out / f"{shard.name}.tar", out / "dropped" / f"{shard.name}.jsonl")
    found = []
    # Folders of older versions do not say the sizes.
    for path, size in zip(paths, facts.get("output", ()), strict=False):
        have = path.stat().st_size if path.exists() else 0
        if have != size:
            found.append(f"{path} has {have} bytes of {size}")
    return found


def tell_of_damage(out, shard):
    """Say it if a shard is made again because its files are damaged."""
    shard_path = out / f"{shard.name}.tar"
    if shard_path.exists() and (out / ".shards" / f"{shard.name}.json").exists():
        for sentence in damaged_outputs(out, shard):
            print(f"{files.printable(sentence)}; it is made again", file=sys.stderr)


# ---- totals --------------------------------------------------------------------------------------


def cost_in_dollars(cfg, usage):
    """What tokens cost. usage: {"prompt_tokens", "completion_tokens"}."""
    cost_in = usage.get("prompt_tokens", 0) * cfg.price_in
    cost_out = usage.get("completion_tokens", 0) * cfg.price_out
    return (cost_in + cost_out) / 1e6


def stage_totals(cfg, out, stage, inputs):
    """Sums over all finished shards: rows in, out, dropped by reason; rates, tokens, dollars."""
    finished = [shard for shard in inputs if shard_is_finished(out, shard)]
    counts = collections.Counter()
    for shard in finished:
        facts = files.read_json(out / ".shards" / f"{shard.name}.json", dict)
        del facts["input"]
        facts.pop("output", None)
        counts.update(facts)

    seconds = counts.pop("seconds", 0)
    dropped = {}
    for key in sorted(counts):
        if key.startswith("dropped "):
            dropped[key.removeprefix("dropped ")] = counts[key]
    totals = {
        "stage": stage,
        "shards": len(inputs),
        "done": len(finished),
        "in": counts["in"],
        "out": counts["out"],
        "dropped": dropped,
        "seconds": round(seconds, 2),
        "rows/s": round(counts["in"] / max(seconds, 1e-9), 1),
    }
    for key in SPEND_COUNTS:
        if counts[key]:
            totals[key] = counts[key]
    spend = cost_in_dollars(cfg, counts)
    if spend:
        totals["dollars"] = round(spend, 4)
    means = {}
    for key, value in counts.items():
        if key.startswith("sum ") and counts["out"]:
            means[key.removeprefix("sum ")] = round(value / counts["out"], 3)
    if means:
        totals["means"] = means
    return totals


def totals_line(totals, n_new):
    """What a stage prints at its end."""
    news = "" if n_new else ", nothing new to do"
    line = (f"{totals['stage']}: {totals['done']} of {totals['shards']} shards{news}; "
            f"in {totals['in']}, out {totals['out']}, dropped {totals['dropped'] or 'none'}; ")
    shown_before = ("stage", "shards", "done", "in", "out", "dropped")
    line += ", ".join(f"{v} {k}" for k, v in totals.items() if k not in shown_before)
    return line
