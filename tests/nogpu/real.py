"""train.py and sft.py themselves on a card that does nothing: toy data, all stages.

    python tests/nogpu/real.py OUT [--compile=off ...]

Real: the loader with its workers and pinned memory, weights read from a folder, compiled blocks,
checkpoints written in the background, model folders. The last line is JSON.
"""
import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402

import model as model_file  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from training import checkpoint  # noqa: E402


def run_script(script, *argv):
    sys.argv = ["script", *argv]
    script.main()


def faults_of(out, stages):
    """(what a run of these stages should have left and has not, copies that were not pinned)."""
    faults = [f"no model folder {out / name}" for name in stages
              if not (out / name / "model.safetensors").exists()]
    if not list((out / "checkpoints").glob("step_*/manifest.json")):
        faults.append(f"no checkpoint in {out}")
    unpinned = card.counts().get("copy to the card, not pinned", 0)
    return faults, unpinned


def main():
    out = Path(sys.argv[1])
    card.pretend_results(model_file)
    # The moments have no values that could be checked.
    checkpoint.find_fault = lambda *_: None
    flags = ["--dtype=bfloat16", "--grad_accum_steps=2", "--num_workers=2", "--save_every=2",
             *sys.argv[2:]]
    pretrained = out / "real_pretrain"
    tuned = out / "real_sft"
    for folder in (pretrained, tuned):
        shutil.rmtree(folder, ignore_errors=True)

    first = ["config/toy.py", f"--init_from={out}/start", f"--data={out}/toy/pretrain-*.tar",
             f"--out_dir={pretrained}", *flags]
    run_script(train, *first, "--stages=alignment", "--max_steps=3")
    run_script(train, *first, "--max_steps=5")  # alignment is done, advance runs
    faults, unpinned = faults_of(pretrained, ("alignment", "advance"))
    second = ["config/toy_sft.py", f"--init_from={pretrained}/advance", f"--out_dir={tuned}",
              "--max_steps=3", *flags]
    stages = ("knowledge", "instruction", "preference")
    second += [f"--{name}.data={out}/toy/{name}-*.tar" for name in stages]
    run_script(sft, *second)
    more, more_unpinned = faults_of(tuned, stages)
    says = ("train.py and sft.py ran all five toy stages, with checkpoints in the background; "
            f"{unpinned + more_unpinned} copies to the card from memory that is not pinned")
    print(json.dumps({"faults": faults + more, "says": says}))


main()
