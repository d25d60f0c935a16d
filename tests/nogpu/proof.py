"""Every stage of every recipe on a card that does nothing: one table, and what is wrong with it.

    bash runs/nogpu.sh                  # all cases
    bash runs/nogpu.sh sft_2b decode    # some
    bash runs/nogpu.sh --quick          # one of the fine-tuning stages: all have the same sizes
    bash runs/nogpu.sh --hold           # also write held.json, what the next run is held to

Exit code 1 if anything is wrong. Each case is a process of its own, with its output in a file.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HELD = HERE / "held.json"

# How far the peak may be from what --dry_run says, and above what held.json holds of bytes.
MARGIN = 0.03
COMPILED_KERNELS = 0.6  # the most of the eager kernels that a compiled pack may launch
HANG_S = 3600  # seconds after which a script is taken to hang, and ended
MICRO = 2  # micro-batches of a step that stage.py runs


@dataclass
class Case:
    """A recipe on a number of GPUs."""
    name: str
    script: str
    configs: list
    world: int = 8
    card_gb: float = 78  # the most it may reserve; NCCL and the driver take some of 80 GB
    flags: list = field(default_factory=list)


CASES = [
    Case("pretrain_2b", "train.py", ["pretrain_2b"]),
    Case("sft_2b", "sft.py", ["sft_2b"]),
    Case("pretrain_8b", "train.py", ["pretrain_8b"]),
    Case("sft_8b", "sft.py", ["sft_8b"]),
    Case("sft_one_gpu", "sft.py", ["sft_2b", "sft_one_gpu"], world=1),
    Case("sft_lora", "sft.py", ["sft_2b", "sft_lora"], world=1, card_gb=23),
    Case("sft_lora_8b", "sft.py", ["sft_8b", "sft_lora", "sft_lora_8b"], world=1, card_gb=39),
    Case("ablation", "train.py", ["pretrain_2b", "ablation"], world=1, card_gb=23),
    Case("ablation_sft", "sft.py", ["sft_2b", "ablation_sft"], world=1, card_gb=23),
    Case("captioner", "sft.py", ["captioner"], flags=["--llm=qwen2.5-7b"]),
    Case("pretrain_2b_64", "train.py", ["pretrain_2b"], world=64),
    Case("sft_2b_64", "sft.py", ["sft_2b"], world=64),
    Case("pretrain_8b_64", "train.py", ["pretrain_8b"], world=64),
    Case("sft_8b_64", "sft.py", ["sft_8b"], world=64),
    Case("pretrain_8b_fsdp", "train.py", ["pretrain_8b"], flags=["--parallel=fsdp"]),
    Case("pretrain_8b_64_fsdp", "train.py", ["pretrain_8b"], world=64, flags=["--parallel=fsdp"]),
    Case("pretrain_8b_hsdp", "train.py", ["pretrain_8b"], world=64, flags=["--parallel=hsdp"]),
    Case("sft_8b_hsdp", "sft.py", ["sft_8b"], world=64, flags=["--parallel=hsdp"]),
    Case("sft_8b_hsdp_1024", "sft.py", ["sft_8b"], world=1024, flags=["--parallel=hsdp"]),
]
# Scripts that print one JSON object of their own: {"faults": [...], ...}.
OTHERS = ["real", "decode", "rows", "mutant"]


# ---- what is wrong with a stage ------------------------------------------------------------------


def allowed_syncs(text):
    """{place: times in a step of MICRO micro-batches} from the list in docs/speed.md."""
    found = {}
    for place, micro, step in re.findall(r"^\| `(\S+\.py \S+)` \|.*\| (\d+) \| (\d+) \|$", text,
                                         re.MULTILINE):
        found[place] = MICRO * int(micro) + int(step)
    return found


def stage_faults(row, held, allowed):
    """What is wrong with a row of the table, as texts. held: its entry in held.json, or None.

    allowed: of allowed_syncs.
    """
    faults = []
    for what in ("allocated", "reserved"):
        planned = row[f"planned_{what}"]
        if abs(row[what] - planned) > MARGIN * planned:
            faults.append(f"{what} {row[what]:.1f} GB, --dry_run says {planned:.1f}")
    if row["reserved"] > row["card_gb"]:
        faults.append(f"reserved {row['reserved']:.1f} GB of {row['card_gb']:g}")
    if row["breaks"]:
        faults.append(f"{row['breaks']} graph breaks")
    if row["recompiled"]:
        faults.append(f"{row['recompiled']} graphs compiled after the first pack")
    if row["kernels"] > COMPILED_KERNELS * row["kernels_eager"]:
        faults.append(f"{row['kernels']} kernels a pack, eager {row['kernels_eager']}")
    most = (held or {}).get("kernels", row["kernels"])
    if row["kernels"] > most:
        faults.append(f"{row['kernels']} kernels a pack, held.json holds {most}")
    most_gb = (held or {}).get("compiled_gb", row["compiled_gb"])
    if row["compiled_gb"] > most_gb * (1 + MARGIN):
        faults.append(f"compiled kernels move {row['compiled_gb']:.1f} GB for a pack, held.json "
                      f"holds {most_gb:.1f}")
    faults += mixed_faults(row["mixed"])
    for place, n in row["syncs"].items():
        if n > allowed.get(place, 0):
            faults.append(f"{place} waits for the card {n} times in a step, docs/speed.md lists "
                          f"{allowed.get(place, 0)}")
    return faults


def mixed_faults(mixed):
    """mixed: {name of an operation: calls}, of mixes.WatchDevices."""
    return [f"{name} mixes tensors of the CPU and of the card, {n} times in a step"
            for name, n in mixed.items()]


# ---- running -------------------------------------------------------------------------------------


def card_environment(out, world=1):
    """The environment of a process above the stand-in."""
    cache = out / "cache"
    return os.environ | {
        "LD_PRELOAD": str(out / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(out),
        "TRITON_LIBCUDA_PATH": str(out),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "OMP_NUM_THREADS": "1",
        "NOGPU_WORLD": str(world),
    }


def run_child(command, environment, log):
    """Run a script, all output into `log` -> the JSON objects it printed, or None if it failed.

    One that hangs has failed: the stacks of its threads are at the end of the log.
    """
    with open(log, "w") as file:
        script = subprocess.Popen([sys.executable, "-X", "faulthandler", *command], cwd=ROOT,
                                  env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            script.wait(HANG_S)
        except subprocess.TimeoutExpired:
            script.send_signal(signal.SIGABRT)
            script.wait()
    if script.returncode:
        return None
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{\"")]


def run_case(case, out, quick):
    """The rows of a case, one for each stage; a row that is only a fault if it crashed."""
    data = f"--data={out}/toy/*-*.tar"
    command = [str(HERE / "stage.py"), case.script,
               *(f"config/{name}.py" for name in case.configs), "--init_from=", "--num_workers=0",
               "--tokenizer=toy/llm", data, *case.flags]
    if quick and case.script == "sft.py":
        command.append("--stages=instruction")
    environment = card_environment(out, case.world)
    rows = {}
    for how in ("auto", "off"):
        log = out / f"{case.name}_{how}.log"
        folder = out / f"{case.name}_{how}"
        shutil.rmtree(folder, ignore_errors=True)
        run = [*command, f"--compile={how}", f"--out_dir={folder}"]
        found = run_child(run, environment, log)
        if found is None:
            return [{"stage": case.name, "crash": f"it stopped, see {log}"}]
        for row in found:
            rows.setdefault(row["stage"], {})[how] = row
    table = []
    for stage, both in rows.items():
        row = both["auto"]
        row["stage"] = f"{case.name} {stage}"
        row["world"] = case.world
        row["card_gb"] = case.card_gb
        row["kernels_eager"] = both["off"]["kernels"]
        row["mixed"] = both["off"]["mixed"]
        table.append(row)
    return table


# ---- the table -----------------------------------------------------------------------------------

HEADER = ("| stage | GPUs | allocated, GB | reserved | `--dry_run` | graphs | breaks | recompiled "
          "| kernels a pack | eager | share | waits a step | collectives a step, GB |")


def table_line(row):
    """A stage as a line of markdown."""
    share = row["kernels"] / row["kernels_eager"]
    moved = sum(n for name, n in row["collectives"].items() if name.endswith(" bytes")) / 1e9
    calls = sum(n for name, n in row["collectives"].items() if not name.endswith(" bytes"))
    cells = [row["stage"], row["world"], f"{row['allocated']:.1f}", f"{row['reserved']:.1f}",
             f"{row['planned_allocated']:.1f}, {row['planned_reserved']:.1f}", row["graphs"],
             row["breaks"], row["recompiled"], f"{row['kernels']:,}", f"{row['kernels_eager']:,}",
             f"{100 * share:.0f} %", sum(row["syncs"].values()), f"{calls}, {moved:.2f}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def prepare(out):
    """Toy data and a toy model, made once."""
    if not (out / "toy").exists():
        run = [sys.executable, "-m", "toy", f"--out={out}/toy", "--n=400"]
        subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    if not (out / "start").exists():
        run = [sys.executable, "convert.py", "assemble", "--vision=toy/vit", "--llm=toy/llm",
               f"--out={out}/start"]
        subprocess.run(run, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--quick", action="store_true")
    known = [case.name for case in CASES] + OTHERS
    parser.add_argument("names", nargs="*", help=", ".join(known))
    args = parser.parse_args()
    unknown = set(args.names) - set(known)
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; choose from {', '.join(known)}")
    names = args.names or known

    prepare(args.out)
    held = json.loads(HELD.read_text()) if HELD.exists() else {}
    allowed = allowed_syncs((ROOT / "docs" / "speed.md").read_text())
    faults = []
    print(HEADER)
    print("|---" * HEADER.count("| ") + "|", flush=True)
    for case in CASES:
        if case.name not in names:
            continue
        for row in run_case(case, args.out, args.quick):
            if "crash" in row:
                faults.append(f"{row['stage']}: {row['crash']}")
                continue
            print(table_line(row), flush=True)
            stage = row["stage"]
            faults += [f"{stage}: {text}"
                       for text in stage_faults(row, held.get(stage), allowed)]
            held[stage] = {"kernels": row["kernels"], "allocated": round(row["allocated"], 2),
                           "reserved": round(row["reserved"], 2),
                           "compiled_gb": round(row["compiled_gb"], 1)}
    for name in OTHERS:
        if name in names:
            faults += run_other(name, args.out)
    if args.hold:
        lines = [f"{json.dumps(stage)}: {json.dumps(held[stage])}" for stage in sorted(held)]
        HELD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    for text in faults:
        print(f"WRONG  {text}")
    sys.exit(1 if faults else 0)


def run_other(name, out):
    """Run a script of OTHERS, print what it says, and return its faults."""
    log = out / f"{name}.log"
    found = run_child([str(HERE / f"{name}.py"), str(out)], card_environment(out), log)
    if not found:
        return [f"{name}: it stopped, see {log}"]
    print(f"{name}: {found[-1]['says']}", flush=True)
    return [f"{name}: {text}" for text in found[-1]["faults"]]


if __name__ == "__main__":
    main()
