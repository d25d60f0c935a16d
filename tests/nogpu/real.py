"""train.py and sft.py themselves on a card that does nothing: toy data, all stages.

    python tests/nogpu/real.py OUT [--compile=off ...]

Real: the loader with its workers and pinned memory, weights read from a folder, compiled blocks,
checkpoints written in the background, model folders. The first run is killed after a checkpoint,
and the next one has to go on from it. The last line is JSON.
"""
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402

import model as model_file  # noqa: E402
import sft  # noqa: E402
import train  # noqa: E402
from training import checkpoint, run_folder, signals  # noqa: E402

KILL_AT = "alignment step 4: samples"
CHECKPOINT_S = 60  # so long the checkpoint of step 2 may take


def run_script(script, *argv):
    sys.argv = ["script", *argv]
    script.main()


def wait_for_checkpoint(out):
    """TimeoutError if there is none in time: one that cannot be written never comes."""
    end = time.monotonic() + CHECKPOINT_S
    while not list(out.glob("checkpoints/step_*/manifest.json")):
        if time.monotonic() > end:
            raise TimeoutError(f"no checkpoint in {out} after {CHECKPOINT_S} s")
        time.sleep(0.1)


def run_and_kill(script, out, *argv):
    """Run the script in a process that dies in step 5, once there is a checkpoint -> its faults."""
    note = signals.Watchdog.note

    def note_or_die(self, text):
        note(self, text)
        if text.startswith(KILL_AT):
            wait_for_checkpoint(out)
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()  # nothing has used the card yet
    if not child:
        signals.Watchdog.note = note_or_die
        try:
            run_script(script, *argv)
        except BaseException:
            traceback.print_exc()  # nothing else would tell why, for the next line ends it
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        return ["the run that was to be killed ended by itself"]
    return []


def resumed_from():
    """A list to which the paths of the checkpoints are added that are loaded from now on."""
    loaded = []
    load_checkpoint = run_folder.load_checkpoint

    def load(path, *rest):
        loaded.append(path)
        return load_checkpoint(path, *rest)

    run_folder.load_checkpoint = load
    return loaded


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
    first.append("--max_steps=6")
    faults = run_and_kill(train, pretrained, *first)
    loaded = resumed_from()
    run_script(train, *first)
    if not loaded:
        faults.append("the run did not go on from its checkpoint after it was killed")
    more, unpinned = faults_of(pretrained, ("alignment", "advance"))
    faults += more
    second = ["config/toy_sft.py", f"--init_from={pretrained}/advance", f"--out_dir={tuned}",
              "--max_steps=3", *flags]
    stages = ("knowledge", "instruction", "preference")
    second += [f"--{name}.data={out}/toy/{name}-*.tar" for name in stages]
    run_script(sft, *second)
    more, more_unpinned = faults_of(tuned, stages)
    says = ("train.py and sft.py ran all five toy stages, with checkpoints in the background, and "
            "went on after a kill; "
            f"{unpinned + more_unpinned} copies to the card from memory that is not pinned")
    print(json.dumps({"faults": faults + more, "says": says}))


if __name__ == "__main__":
    main()
