"""Run several command lines in a row and go on where they stopped."""
import json
import shlex
import subprocess
import sys
from pathlib import Path

from inputs.files import write_atomic

def run_plan(folder, commands, run, processes=1, **files):
    """Print command lines that end in folder/eval/results.json, unless it is there, and with run=True run them. files:
    {name: text} to be in the folder before. ValueError where a folder was run otherwise, or where a command fails."""
    made, plan = Path(folder) / "plan.json", json.dumps([commands, files])
    if made.exists() and made.read_text() != plan:
        raise ValueError(f"{folder} was run with other data or flags: remove it, or give another --out")
    if (made.parent / "eval" / "results.json").exists(): return
    files |= {made.name: plan} if run else {}
    if files: made.parent.mkdir(parents=True, exist_ok=True)
    for name, text in files.items(): write_atomic(made.parent / name, text)
    ranks = [f"--nproc_per_node={processes}"] if processes > 1 else []
    shown, module = (["torchrun"], ["-m", "torch.distributed.run", "--standalone"]) if ranks else (["python"], [])
    for command in commands:
        print(shlex.join([*shown, *ranks, *command]), flush=True)
        if run and subprocess.run([sys.executable, *module, *ranks, *command]).returncode:
            raise ValueError(f"{folder}: {command[0]} failed, see above; run again to go on")
