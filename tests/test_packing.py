"""The order of samples, packs and what becomes of each record: nothing lost, nothing doubled, hardly any room left."""
import collections, functools, io, itertools, json, os, struct, subprocess, sys, types, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from inputs import index as index_module, packing, sources, tokenizer
from training import checkpoint, metrics
from bench.samples import length_file
from data import make_loader
from inputs.packing import Packs, fill_packs
from inputs.sources import open_sources
from model import LLMConfig, train_flops
from test_data import KW, TOY, some_rows, talk, write_rows
from vision import VisionConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_thread():
    """Pictures this small take ten times as long on threads that wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of_lengths(T, N, n=60000, **more):
    """Packs of one whole epoch of the fixed length file, in the order of the run."""
    packs = Packs([length_file(n)], None, "", tile_size=448, tokens_per_tile=256, tokens_per_pack=T, tiles_per_pack=N,
                  packs_per_step=8, **more)
    planned = []
    for w in range(-(-packs.n // packs.window)):
        planned += packs.plan_window(0, w, len(planned) % 8)[0]
    return packs, planned


@pytest.mark.parametrize("T, N, fill", [(8192, 48, 0.995), (16384, 64, 0.999), (8192, 28, 0.995), (16384, 56, 0.999)])
def test_packs_are_full_within_both_budgets_and_the_ranks_of_a_step_have_alike_much_to_do(T, N, fill):
    packs, planned = plan_of_lengths(T, N)
    assert sorted(row for pack in planned for _, row, _ in pack.samples) == list(range(60000))
    assert max(pack.tokens for pack in planned) <= T and max(pack.tiles for pack in planned) <= N
    assert sum(pack.tokens for pack in planned) / T / len(planned) >= fill
    text = packs.sources[0].rows["tokens"]
    flops = np.array([train_flops(VisionConfig(), LLMConfig(), pack.tiles, lengths := [
        int(text[row]) + 256 * sum(tiles) for _, row, tiles in pack.samples], sum(lengths) // 10) for pack in planned])
    steps = flops[:len(flops) // 8 * 8].reshape(-1, 8)                   # (steps, ranks), across windows too
    assert (steps.max(1) / steps.mean(1)).mean() <= 1.015


def test_small_data_fill_their_packs_too():
    rng = np.random.default_rng(0)
    tokens = rng.integers(25, 130, 3000).tolist()                        # as config/toy.py has them
    packs = fill_packs(tokens, [int(t > 70) * 3 for t in tokens], 800, 40)
    assert sorted(itertools.chain(*packs)) == list(range(3000))
    assert sum(tokens) / 800 / len(packs) > 0.99
    assert fill_packs([], [], 800, 40) == [] and fill_packs([800], [40], 800, 40) == [[0]]


def test_no_sample_waits_for_more_packs_than_may_wait():
    """Even one that never fits best: a long one, behind which short ones come."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 60, 4000)
    tokens[::50] = 90
    packs = fill_packs(tokens.tolist(), [0] * 4000, 100, 1)
    taken = np.empty(4000, int)
    for number, pack in enumerate(packs):
        taken[pack] = number
    arrived = np.array([taken[:max(1, i - packing.WAITING + 1)].min(initial=0) for i in range(4000)])
    order = np.sort(taken)                                              # a sample comes when that many were taken
    comes = np.array([order[max(0, i - packing.WAITING)] for i in range(4000)])
    assert (taken - comes).max() <= packing.WAITING and (arrived <= taken).all()


def test_a_pack_holds_samples_of_all_kinds():
    """Not sorted by length: the mean length inside packs spreads no more than that of packs filled at random."""
    packs, planned = plan_of_lengths(16384, 64, 20000)
    length = packs.plan_samples(np.arange(packs.n))[1]
    means = np.array([length[[row for _, row, _ in pack.samples]].mean() for pack in planned if len(pack.samples) > 8])
    assert means.std() < 1.6 * length.std() / 13 ** 0.5                  # 13 samples a pack


# ---- R12 -------------------------------------------------------------------------------------------------------------

def random_source(n, rng):
    rows, images = np.zeros(n, index_module.ROW), np.zeros(n, index_module.IMAGE)
    rows["tokens"] = rng.integers(1, 330, n)                             # some are longer than a pack
    rows["tokens"][rng.random(n) < 0.02] = -1
    rows["n_images"], rows["first_image"] = rng.random(n) < 0.5, np.arange(n)
    images["width"], images["height"] = rng.integers(40, 400, (2, n))
    bad = [{}] * int((rows["tokens"] < 0).sum())
    return types.SimpleNamespace(name="r", path="", rows=rows, images=images, repeat=1, weight=0, max_tiles=0,
                                 meta=dict(bad=bad, digest=""))


@pytest.mark.parametrize("cases", [100, pytest.param(300, marks=pytest.mark.nightly)])
def test_random_sizes_ranks_workers_and_resume_points_lose_no_sample_and_double_none(cases):
    rng = np.random.default_rng(12)
    for case in range(cases):
        n, world, workers = int(np.exp(rng.uniform(0, np.log(5000)))), int(rng.integers(1, 9)), int(rng.integers(0, 5))
        accum, other = int(rng.integers(1, 4)), int(rng.integers(1, 9))
        source = random_source(n, rng)
        if (source.rows["tokens"] < 0).all():
            continue
        packs = Packs([source], None, "", packs_per_step=world * accum, seed=case, window=int(rng.choice([64, 500, 16384])),
                      **KW | dict(tokens_per_pack=320))
        plan, rows_of = packs.plan_window, lambda planned: [[row for _, row, _ in pack.samples] for pack in planned]
        packs.plan_window = functools.lru_cache(None)(plan)              # each rank plans the same, so once is enough:
        assert case % 4 or rows_of(plan(0, 0, 0)[0]) == rows_of(packs.plan_window(0, 0, 0)[0]), f"case {case}: not pure"
        lengths = packs.plan_samples(np.arange(n))[1]
        drop = collections.Counter(lengths[lengths < 0].tolist())
        if drop.total() == n:                                            # none fits: refused in another test
            continue
        def global_sequence(world, position, counts, steps):
            """What all ranks get, woven together; whatever the workers, each rank's sampler decides."""
            ranks = [iter(make_loader(packs, rank, world, workers, position, counts).sampler) for rank in range(world)]
            return [next(ranks[i % world]) for i in range(steps * packs.packs_per_step)]
        whole, done = [], 0                                              # until two epochs are through
        sequence = packs.sequence()
        while done < 2 or len(whole) % packs.packs_per_step:
            whole.append(next(sequence))
            done = whole[-1].position[0]
        ids = [[row for _, row, _ in pack.samples] for pack in whole]
        for epoch in (0, 1):
            seen = [i for pack, rows in zip(whole, ids) if pack.position[0] == epoch for i in rows]
            assert len(seen) == len(set(seen)) == n - drop.total(), f"case {case}: {n} samples, {len(seen)} used, {drop}"
        steps = len(whole) // packs.packs_per_step
        got = global_sequence(world, (0, 0, 0), {}, min(steps, 6))
        assert [[row for _, row, _ in p.samples] for p in got] == ids[:len(got)], f"case {case}"
        if steps > 1:                                                    # resumed, on another number of ranks if it fits
            at = int(rng.integers(1, steps))
            last, other = whole[at * packs.packs_per_step - 1], other if packs.packs_per_step % other == 0 else world
            got = global_sequence(other, json.loads(json.dumps(last.position)), last.counts, min(steps - at, 6))
            want = ids[at * packs.packs_per_step:][:len(got)]
            assert [[row for _, row, _ in p.samples] for p in got] == want, f"case {case} resumed at step {at} of {steps}"


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 1), (1, 4), (2, 4), (3, 1), (4, 0), (8, 0)])
def test_batches_come_in_one_order_whatever_the_ranks_and_workers(tmp_path, world, workers):
    packs = Packs(open_sources(some_rows(tmp_path, 150), TOY, "sailvl-chat"), TOY, "sailvl-chat", packs_per_step=24, **KW)
    want = [packs[pack]["ids"] for pack in itertools.islice(packs.sequence(), 48)]
    loaders = [iter(make_loader(packs, rank, world, workers)) for rank in range(world)]
    got = [next(loaders[k % world]) for k in range(48)]
    assert [batch["ids"] for batch in got] == want
    ends = [[batch["position"], batch["counts"]] for batch in got]
    for a in range(0, 48, world):                                        # all ranks know where all of them stand
        assert ends[a:a + world] == [ends[a]] * world and len(got[a]["costs"]) == world


# ---- R11 -------------------------------------------------------------------------------------------------------------

def encoded(image, format, **options):
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def damaged(folder, n):
    """15 kinds of rows that cannot be used, by the words of their reason; each is made n times."""
    noise = encoded(Image.effect_noise((200, 200), 60), "JPEG")
    png = bytearray(encoded(Image.new("RGB", (84, 84), "red"), "PNG"))
    bomb, png[60] = bytearray(png), png[60] ^ 255
    bomb[16:24] = struct.pack(">II", 20000, 10000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    files = {"half.jpg": (noise[:len(noise) // 2], "damaged picture"), "empty.jpg": (b"", "not a picture"),
             "page.jpg": (b"<html>gone</html>", "not a picture"), "bomb.png": (bytes(bomb), "megapixels"),
             "chunk.png": (bytes(png), "damaged picture"),
             "scan.tif": (encoded(Image.new("L", (9, 9)), "TIFF"), "not a picture")}
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    rows = [(json.dumps(talk(image=name)), why) for name, (_, why) in files.items()]
    rows += [(json.dumps(talk(image=name)), "No such file") for name in ("missing.png", "link.png")]
    rows += [('{"id": "x", "conversations": [', "not valid JSON"), ("\0" * 40, "not valid JSON"), ("[1, 2]", "a list, where"),
             (json.dumps(talk("<image><image>?", image="good.png")), "2 <image> placeholders for 1 images"),
             (json.dumps(talk(answer=" ")), "conversations[1]: empty gpt turn"), (json.dumps(talk(video="a.mp4")), "a video"),
             (json.dumps({"conversations": [{"from": "robot", "value": "a"}, {"from": "gpt", "value": "b"}]}), "robot")]
    assert len(rows) == 15
    return rows * n


def odd_but_good(folder, n):
    red = Image.new("RGB", (90, 60), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.linspace(0, 65535, 84 * 84).reshape(84, 84).astype(np.uint16)
    files = {"cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"), "palette.png": encoded(red.quantize(4), "PNG"),
             "deep.png": encoded(Image.fromarray(grey), "PNG"), "alpha.png": encoded(red.convert("RGBA"), "PNG"),
             "turned.jpg": encoded(red, "JPEG", exif=exif), "film.gif": encoded(red, "GIF", save_all=True, append_images=[red]),
             "dot.png": encoded(Image.new("RGB", (1, 1)), "PNG"), "line.png": encoded(Image.new("RGB", (1, 5000)), "PNG"),
             "one.png": encoded(red.convert("1"), "PNG"), "grey.jpg": encoded(red.convert("L"), "JPEG")}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [json.dumps(talk(image=name)) for name in files] * n


def test_60_bad_rows_of_15_kinds_among_2000_are_quarantined_for_their_reason_and_nothing_else_is(tmp_path):
    Image.new("RGB", (84, 84), "blue").save(tmp_path / "good.png")
    bad, rng = damaged(tmp_path, 4), np.random.default_rng(0)
    good = odd_but_good(tmp_path, 6) + [json.dumps(talk(image="good.png") if i % 2 else talk()) for i in range(1876)]
    long = [json.dumps(talk("word " * 400))] * 4
    lines = [(line, why) for line, why in bad] + [(line, None) for line in good] + [(line, "too_long") for line in long]
    lines = [lines[i] for i in rng.permutation(len(lines))]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line, _ in lines))
    packs = Packs(open_sources(str(tmp_path / "rows.jsonl"), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    assert packs.n == 2000
    found = {b["row"]: b["reason"] for b in packs.sources[0].meta["bad"]}
    used, later, planned = [], {}, [*itertools.takewhile(lambda p: p.position[0] == 0, packs.sequence())]
    for pack in planned:
        batch = packs[pack]
        used += [int(i.split(":")[1]) for i in batch["ids"]]
        later |= {int(b["id"].split(":")[1]): b["reason"] for b in batch["bad"]}
    half = planned[len(planned) // 2]                                    # the same after a stop in the middle
    again = {int(b["id"].split(":")[1]) for p in itertools.takewhile(
        lambda p: p.position[0] == 0, packs.sequence(half.position, half.counts)) for b in packs[p]["bad"]}
    before = {int(b["id"].split(":")[1]) for p in planned[:len(planned) // 2 + 1] for b in packs[p]["bad"]}
    assert before | again == set(later) and not before & again
    assert not found.keys() & later.keys()
    for i, (_, why) in enumerate(lines):
        reason = (found | later).get(i)
        assert (reason is not None) == (why not in (None, "too_long")), (i, lines[i], reason)
        assert reason is None or why in reason, (why, reason)
    assert sorted(used) == [i for i, (_, why) in enumerate(lines) if why is None]
    counts = planned[-1].counts
    assert counts["too_long"] == 4 and counts["unreadable"] == len(found) and len(found | later) == 60
    assert counts["used"] == len(used) + len(later) and sum(counts.values()) == 2000


# ---- accounting ------------------------------------------------------------------------------------------------------

def test_a_lost_or_doubled_sample_is_noticed_at_the_step_with_its_numbers():
    packs = types.SimpleNamespace(n=10)
    progress = checkpoint.Progress(counts={"used": 7, "too_long": 2, "unreadable": 1},
                                   samples_seen=6, quarantined=1)
    sums = metrics.account({"used": 3}, progress, packs, False)["epoch"]
    assert sums == dict(epochs=1, records=10, to_come=0, used=6, dropped={"too_long": 2},
                        quarantined={"in the index": 1, "in training": 1})
    # no epoch ended in this step
    assert metrics.account({"used": 7, "too_long": 3}, progress, packs, False) == {}
    before, progress.counts = progress.counts, {"used": 7, "too_long": 7}
    assert metrics.account(before, progress, packs, True)["epoch"]["to_come"] == 6
    progress.samples_seen = 5
    with pytest.raises(AssertionError, match="7 samples were planned, 5 used and 1 quarantined"):
        metrics.account({}, progress, packs, False)


def test_an_epoch_that_does_not_add_up_is_refused(tmp_path):
    packs = Packs(open_sources(write_rows(tmp_path, [talk()] * 30), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    with pytest.raises(ValueError, match="31 samples are accounted for after 1 epochs of 30"):
        [*itertools.islice(packs.sequence((0, 0, 0), {"used": 1}), 99)]


# ---- R25 -------------------------------------------------------------------------------------------------------------

FAILS = """
import multiprocessing, sys
import configurator, data
from inputs import index as index_module, packing, sources, tokenizer
from training import metrics
def main():
    tok = tokenizer.Tokenizer(data.TOY_TOKENIZER)
    packs = packing.Packs(sources.open_sources(sys.argv[1], tok, "sailvl-chat"), tok, "sailvl-chat", tile_size=84,
                       tokens_per_tile=9, tokens_per_pack=300)
    batches = iter(data.make_loader(packs, num_workers=2))
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    raise ValueError("stopped")
configurator.run_script(main)
"""


def test_a_program_that_fails_ends_and_so_do_its_workers_which_ignore_sigterm(tmp_path):
    done = subprocess.run([sys.executable, "-c", FAILS, some_rows(tmp_path, 20)], cwd=ROOT, capture_output=True, text=True,
                          timeout=200)                                   # it would wait for ever
    assert done.returncode == 2 and done.stderr.endswith("error: stopped\n"), done.stderr
    workers = done.stdout.split()
    assert len(workers) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in workers)


MEMORY = """
import itertools, os, sys, types
import numpy as np
import data
from inputs import index as index_module, packing, sources, tokenizer
from training import metrics
folder, n_rows, n_batches, workers = sys.argv[1], *map(int, sys.argv[2:5])
def of(name, pid="self"):
    return sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith(name)) / 1024
source = sources.open_sources(f"{folder}/rows.jsonl", tok := tokenizer.Tokenizer(data.TOY_TOKENIZER), "sailvl-chat")[0]
with open(f"{folder}/rows.bin", "wb") as rows, open(f"{folder}/images.bin", "wb") as images:
    for start in range(0, n_rows, 100_000):
        part = np.zeros(min(100_000, n_rows - start), index_module.ROW)
        part["tokens"], part["n_images"], part["first_image"] = 50, 1, start + np.arange(len(part))
        rows.write(part.tobytes())
        sizes = np.zeros(len(part), index_module.IMAGE)
        sizes["width"] = sizes["height"] = 84
        images.write(sizes.tobytes())
    for file in (rows, images):                                         # what is not on the disk yet counts as dirty
        file.flush()
        os.fsync(file.fileno())
kw = dict(tile_size=84, tokens_per_tile=9, max_tiles=4, tokens_per_pack=300, tiles_per_pack=20)
before = of("Private_Dirty")
big = types.SimpleNamespace(name="big", path="", rows=index_module.map_index(f"{folder}/rows.bin"), repeat=1, weight=0, max_tiles=0,
                            images=index_module.map_index(f"{folder}/images.bin"), meta=dict(bad=[], digest=""))
packs = packing.Packs([big], None, "", **kw)
planned = [len(packs.plan_window(0, w)[0]) for w in range(5)]
index = of("Private_Dirty") - before
loader = iter(data.make_loader(packing.Packs([source], tok, "sailvl-chat", **kw), num_workers=workers))
warm = n_batches // 4
for _ in range(warm): next(loader)
start = of("Rss")
for _ in range(n_batches - warm): next(loader)
print(index, (of("Rss") - start) / (n_batches - warm) * 1000, packs.n)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="this system does not count private pages")
@pytest.mark.parametrize("n_batches, workers, slope", [
    pytest.param(800, 0, 3, id="short"), pytest.param(4000, 2, 1, id="long", marks=pytest.mark.nightly)])
def test_an_index_of_two_million_rows_takes_no_memory_of_its_own_and_batches_leave_none_behind(
        tmp_path, n_batches, workers, slope):
    some_rows(tmp_path, 300)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), "2000000", str(n_batches), str(workers)],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    index, per_1000, n = map(float, done.stdout.split())
    assert n == 2_000_000 and index < 40, f"{index:.1f} MB"
    assert per_1000 <= slope, f"{per_1000:.2f} MB more after 1,000 batches"


def test_an_index_built_by_several_processes_is_the_one_of_one_process(tmp_path, monkeypatch):
    one = some_rows(tmp_path, 260)
    with open(one, "a") as file:
        file.write("a stray line\n" + json.dumps(talk(image="gone.png")) + "\n")
    read = lambda source: [(source.index / f"{name}.bin").read_bytes() for name in ("rows", "images")]
    want = open_sources(one, TOY, "sailvl-chat")[0]
    for name in ("rows.bin", "images.bin"):
        (want.index / name).rename(tmp_path / name)
    (want.index / "meta.json").unlink()
    index_module.map_index.cache_clear()
    monkeypatch.setattr(index_module, "RECORDS_PER_TASK", 60)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: {0, 1})
    got = open_sources(one, TOY, "sailvl-chat")[0]
    assert read(got) == [(tmp_path / name).read_bytes() for name in ("rows.bin", "images.bin")] and got.meta == want.meta
    assert len(got.meta["bad"]) == 2 and len(got.rows) == 262
