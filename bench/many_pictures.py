"""collect, dedup and select of N small pictures on the ranks of torchrun: seconds and memory.

    python -m bench.many_pictures N FOLDER RANKS

A tenth of the pictures are the one before, saved again, and one of a hundred is the same file. The
pictures are made first, which is not timed. FOLDER needs 20 KB a picture.
"""
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from inputs.tars import add_record

PER_SHARD = 5000


def draw_shapes(rng):
    """A picture of 64 to 96 pixels like no other: smooth noise with some shapes before it."""
    width, height = (int(side) for side in rng.integers(64, 97, 2))
    cells = rng.integers(4, 17, 2)
    noise = rng.integers(0, 256, (*cells, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        x, y, wide, high = rng.integers(0, 60, 4).tolist()
        color = tuple(rng.integers(0, 256, 3).tolist())
        shape = draw.rectangle if x % 2 else draw.ellipse
        shape((x, y, x + wide, y + high), fill=color)
    return image


def save_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_pictures(job):
    """Write shard number `number` of `count` pictures into a folder, unless it is there."""
    folder, number, count = job
    path = Path(folder) / f"{number:06d}.tar"
    if path.exists():
        return
    rng = np.random.default_rng(number)
    image = draw_shapes(rng)
    new = path.with_suffix(".tmp")
    with tarfile.open(new, "w", format=tarfile.USTAR_FORMAT) as tar:
        for k in range(count):
            if k % 10 == 9:
                content = save_jpeg(image, 60)
            elif k % 100 != 98:
                image = draw_shapes(rng)
                content = save_jpeg(image, 88)
            row = {"caption": f"picture {k} of shard {number}"}
            add_record(tar, f"{number:06d}-{k:04d}", row, [(".jpg", content)])
    new.rename(path)


def main():
    n = int(float(sys.argv[1]))
    folder = Path(sys.argv[2])
    n_ranks = int(sys.argv[3])
    (folder / "web").mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, start in enumerate(range(0, n, PER_SHARD)):
        jobs.append((folder / "web", number, min(PER_SHARD, n - start)))
    with multiprocessing.Pool(n_ranks) as pool:
        list(tqdm(pool.imap_unordered(write_pictures, jobs), "make", len(jobs), disable=None))

    print("| stage | seconds | rows/s of all ranks | CPU seconds of all ranks | rows/s of a core "
          "| GB of the largest rank |\n|---|---|---|---|---|---|")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = usage.ru_utime + usage.ru_stime
    flags = {"collect": [], "dedup": [], "select": [f"--n={n // 10}"]}
    source = folder / "web"
    for stage, further in flags.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={n_ranks}", "--", "curate.py", stage,
                   f"--in={source}", f"--out={folder / stage}", "--workers=1", *further]
        start = time.perf_counter()
        with open(folder / f"{stage}.txt", "w") as printed:
            subprocess.run(command, check=True, stdout=printed, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - start
        # Of all processes so far; none is larger later than the largest one before it.
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        memory = usage.ru_maxrss / 2**20
        cpu = usage.ru_utime + usage.ru_stime - before
        before += cpu
        n_in = json.loads((folder / stage / "report.json").read_text())["in"]
        print(f"| {stage} | {seconds:.0f} | {n_in / seconds:.0f} | {cpu:.0f} | {n_in / cpu:.0f} "
              f"| {memory:.2f} |", flush=True)
        source = folder / stage


if __name__ == "__main__":
    main()
