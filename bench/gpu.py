"""On a machine with a GPU: is it correct there, then every row of docs/speed.md that needs one.

    make gpu BIN=FOLDER_OF_PYTHON      # or, in an environment that has the packages: make gpu

Each part is cut off after its time, so that all end within ten minutes. What was measured by then
is in OUT/rows.txt, and at the end as one table. Exit code 1 if any part fails. Packages that are
missing are named before anything runs, so this file imports none of them at its top.
"""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

NEEDED = ("torch", "triton", "numpy", "PIL", "tiktoken", "safetensors", "tqdm", "pytest",
          "transformers")
# (seconds, arguments of python)
PARTS = [
    # Other test files want packages that a machine for training may lack.
    (110, ["-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "tests/test_triton.py",
           "tests/test_cross_entropy.py"]),
    (80, ["-m", "bench", "attn", "--rounds=5"]),
    (25, ["-m", "bench", "ce", "--rounds=5"]),
    (115, ["-m", "bench", "train", "--rounds=5"]),
    (35, ["-m", "bench", "stages", "--rounds=5"]),
    (95, ["-m", "bench", "vs-hf", "--rounds=5", "--rows=25m,2b"]),
    (25, ["-m", "bench", "decode", "--rounds=5"]),
    (35, ["-m", "bench", "warmup"]),
]
GRACE_S = 10  # that a part has for its table once it is told to end


def missing_packages():
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def run_part(seconds, arguments, log):
    """Run python with these arguments -> (its rows, what is wrong with it or None).

    Everything it prints is added to the file `log`. A part of bench has its rows, as JSON, on its
    last line, also if it is cut off.
    """
    before = log.stat().st_size if log.exists() else 0
    name = " ".join(arguments[1:])
    fault = None
    with open(log, "ab") as f:
        part = subprocess.Popen([sys.executable, *arguments], stdout=f, stderr=subprocess.STDOUT)
        try:
            code = part.wait(seconds)
            if code:
                fault = f"{name}: exit code {code}"
        except subprocess.TimeoutExpired:
            fault = f"{name}: cut off after {seconds} s"
            part.terminate()
            try:
                part.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                part.kill()
                part.wait()
    printed = log.read_bytes()[before:].decode(errors="replace")
    print(printed, flush=True)
    return rows_of(printed), fault


def rows_of(printed):
    """The rows on the last line of a part of bench; [] if there are none."""
    last = printed.rstrip().rpartition("\n")[2]
    if not last.startswith("["):
        return []
    try:
        return json.loads(last)
    except ValueError:
        return []  # a part that was killed in the middle of its line


def run_parts(parts, out):
    """Run all parts, print one table and what failed -> exit code."""
    # It imports PyTorch.
    from bench.measure import markdown_table
    out.mkdir(parents=True, exist_ok=True)
    log = out / "rows.txt"
    log.unlink(missing_ok=True)
    rows = []
    faults = []
    for seconds, arguments in parts:
        more, fault = run_part(seconds, arguments, log)
        rows += more
        if fault:
            faults.append(fault)
    text = markdown_table(rows) if rows else "no row was measured"
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n")
    for fault in faults:
        print(f"FAILED  {fault}")
    print(f"{len(rows)} rows, {len(faults)} of {len(parts)} parts failed; all of it is in {log}")
    return 1 if faults else 0


def main():
    missing = missing_packages()
    if missing:
        sys.exit(f"make gpu needs {', '.join(missing)}: install them (PIL is pillow) for "
                 f"{sys.executable}, or name another one: make gpu BIN=FOLDER_OF_PYTHON")
    os.chdir(Path(__file__).parent.parent)
    sys.exit(run_parts(PARTS, Path(os.environ.get("OUT", "out/gpu"))))


if __name__ == "__main__":
    main()
