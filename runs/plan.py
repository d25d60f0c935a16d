"""Several command lines in a row, resumed where they stopped.

Used by runs.scaling and by the tiers of curate.py.
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

from inputs.files import printable, write_atomic


def run_plan(folder, commands, run, processes=1, **files):
    """Print command lines whose last one writes folder/eval/results.json; with run=True, run them.

    A folder that has its results is passed over. files: {name: text} to write into the folder
    before. Raises ValueError where a folder was run with other commands, or where one fails."""
    folder = Path(folder)
    record = folder / "plan.json"
    plan = json.dumps([commands, files])
    if record.exists() and record.read_text() != plan:
        raise ValueError(
            f"{folder} was run with other data or flags: remove it, or give another --out")
    if (folder / "eval" / "results.json").exists():
        return

    if run:
        files = files | {record.name: plan}
    if files:
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, text)

    # The printed line is what a user would type; the line that runs needs no torchrun on the PATH.
    shown = ["python"]
    launcher = [sys.executable]
    if processes > 1:
        ranks = f"--nproc_per_node={processes}"
        shown = ["torchrun", ranks]
        launcher += ["-m", "torch.distributed.run", "--standalone", ranks]
    for command in commands:
        print(printable(shlex.join([*shown, *command])), flush=True)
        if run and subprocess.run([*launcher, *command]).returncode != 0:
            raise ValueError(f"{folder}: {command[0]} failed, see above; run again to resume")
