"""What the tests of curation share: its command line, small pictures, shards, runs in processes."""
import collections
import hashlib
import io
import json
import multiprocessing
import os
import random
import sys
import tarfile
from pathlib import Path

import command_line
from PIL import Image
from toy_endpoint import read_shards

import configurator
import curate
from evals import endpoint

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # an optional folder of test data beside the repository
TOY_PROMPTS = ROOT / "curation" / "prompts" / "toy"
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["curate"])


# ---- the command line ----------------------------------------------------------------------------


def run(stage, *flags):
    """curate.py in this process -> (exit code, everything it printed)."""
    code, out, err = command_line.run(curate.main, ["curate.py", stage, *flags])
    return code, out + err


def run_well(stage, *flags):
    """curate.py as it should end -> its report. Every row it read is either kept or dropped."""
    code, text = run(stage, *flags)
    assert code == 0, text
    out = next(Path(flag[6:]) for flag in map(str, flags) if flag.startswith("--out="))
    report = json.loads((out / "report.json").read_text())
    if "in" in report:
        dropped = dropped_rows(out)
        assert report["in"] == report["out"] + len(dropped)
        assert report["out"] == len(list(read_shards(out)))
        assert report["dropped"] == collections.Counter(row["reason"] for row in dropped)
    return report


def run_in_a_process(argv):
    """The target of a process that runs curate.py, silently."""
    sys.argv = ["curate.py", *argv]
    endpoint.WAIT_S = 0.01
    sys.stdout = open(os.devnull, "w")
    sys.stderr = sys.stdout
    configurator.run_script(curate.main)


# ---- what a stage has written --------------------------------------------------------------------


def dropped_rows(out):
    rows = []
    for path in sorted((out / "dropped").glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return rows


def stage_files(out):
    """{name: bytes} of all that a stage's output consists of."""
    paths = [*out.glob("*.tar"), *out.glob("dropped/*.jsonl")]
    return {path.name: path.read_bytes() for path in paths}


# ---- pictures and shards -------------------------------------------------------------------------


def png(color, size=(8, 8)):
    """Bytes of a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, tuple(int(c) for c in color)).save(file, "PNG")
    return file.getvalue()


def scene(rng, size=160):
    """A picture like no other: smooth coloured noise with a few hard edges."""
    pixels = rng.integers(0, 256, (6, 6, 3), dtype="uint8")
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, **settings):
    """Bytes of a Pillow image as a file."""
    file = io.BytesIO()
    image.save(file, **settings)
    return file.getvalue()


def write_tar(path, members):
    """A tar of [(name, bytes), ...]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_web(folder, n, per_shard):
    """Shards of n tiny pictures as img2dataset writes them -> the truth {sha256: caption}.

    The captions of pictures 3, 5 and 7 are none, a refusal, and cut off.
    """
    rng = random.Random(1)
    special = {3: "", 5: "I'm sorry, I cannot describe it.", 7: "a red circle and"}
    truth = {}
    members = []
    for i in range(n):
        picture = png((i % 256, i // 256, 7))
        kind = rng.choice(("circle", "star"))
        color = rng.choice(("red", "blue"))
        size = rng.choice(("small", "large"))
        sha256 = hashlib.sha256(picture).hexdigest()
        truth[sha256] = special.get(i, f"1 shape: {size} {color} {kind} left.")
        row = json.dumps({"caption": "some shapes", "url": f"u{i}"})
        members += [(f"{i:09d}.png", picture), (f"{i:09d}.json", row.encode())]
    for k in range(0, n, per_shard):
        shard = members[2 * k : 2 * (k + per_shard)]
        write_tar(folder / f"{k // per_shard:05d}.tar", shard)
    return truth


def make_small_collection(folder):
    """Three shards of collected pictures in folder/c, a tiny random model -> (folder, truth)."""
    from test_eval import make_model_folder

    truth = write_web(folder / "web", 24, 8)
    run_well("collect", f"--in={folder}/web", f"--out={folder}/c", "--min_side=8")
    make_model_folder(folder / "model")
    return folder, truth
