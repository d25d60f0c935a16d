"""inputs/packing.py and fill.py: nothing is lost, nothing doubled, hardly any room left."""

import collections
import functools
import io
import itertools
import json
import math
import struct
import types
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import (
    SMALL,
    TOY,
    dataset_of,
    packs_of,
    picture,
    some_rows,
    sources_of,
    talk,
    write_rows,
)

from bench.samples import length_file
from data import make_loader
from inputs.fill import WAITING, fill_in_order, fill_packs
from inputs.packing import Packs, PackSettings, permute
from inputs.records import IMAGE, ROW
from model import LLMConfig
from training import metrics
from training.flops import train_flops
from training.progress import Progress
from vision import VisionConfig


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine pictures this small take ten times as long on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of_lengths(T, N, n=60000):
    """Packs of one whole epoch of the fixed length file, in the order of the run."""
    settings = PackSettings(
        tile_size=448,
        tokens_per_tile=256,
        tokens_per_pack=T,
        tiles_per_pack=N,
        packs_per_step=8,
    )
    packs = Packs([length_file(n)], settings)
    planned = []
    for w in range(math.ceil(packs.n / settings.window)):
        planned += packs.plan_window(0, w, len(planned) % 8)[0]
    return packs, planned


@pytest.mark.parametrize(
    "T, N, fill", [(8192, 48, 0.995), (16384, 64, 0.999), (8192, 28, 0.995), (16384, 56, 0.999)]
)
def test_packs_are_full_within_both_budgets_and_the_ranks_of_a_step_have_alike_much_to_do(
    T, N, fill
):
    packs, planned = plan_of_lengths(T, N)
    assert sorted(row for pack in planned for _, row, _ in pack.samples) == list(range(60000))
    assert max(pack.tokens for pack in planned) <= T and max(pack.tiles for pack in planned) <= N
    assert sum(pack.tokens for pack in planned) / T / len(planned) >= fill
    text = packs.sources[0].rows["tokens"]
    flops = []
    for pack in planned:
        lengths = [int(text[row]) + 256 * sum(tiles) for _, row, tiles in pack.samples]
        supervised = sum(lengths) // 10
        flops.append(train_flops(VisionConfig(), LLMConfig(), pack.tiles, lengths, supervised))
    flops = np.array(flops)
    steps = flops[: len(flops) // 8 * 8].reshape(-1, 8)  # (steps, ranks), across windows too
    assert (steps.max(1) / steps.mean(1)).mean() <= 1.015


def test_small_data_fill_their_packs_too():
    rng = np.random.default_rng(0)
    tokens = rng.integers(25, 130, 3000).tolist()  # as config/toy.py has them
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
    arrived = np.array([taken[: max(1, i - WAITING + 1)].min(initial=0) for i in range(4000)])
    order = np.sort(taken)  # a sample comes when that many were taken
    comes = np.array([order[max(0, i - WAITING)] for i in range(4000)])
    assert (taken - comes).max() <= WAITING and (arrived <= taken).all()


def test_a_pack_holds_samples_of_all_kinds():
    """Their mean lengths spread no more than those of packs filled at random."""
    packs, planned = plan_of_lengths(16384, 64, 20000)
    length = packs.plan_samples(np.arange(packs.n))[1]
    members = [[row for _, row, _ in pack.samples] for pack in planned]
    means = np.array([length[rows].mean() for rows in members if len(rows) > 8])
    assert means.std() < 1.6 * length.std() / 13**0.5  # 13 samples a pack


def random_source(n, rng):
    rows = np.zeros(n, ROW)
    images = np.zeros(n, IMAGE)
    rows["tokens"] = rng.integers(1, 330, n)  # some are longer than a pack
    rows["tokens"][rng.random(n) < 0.02] = -1
    rows["n_images"] = rng.random(n) < 0.5
    rows["first_image"] = np.arange(n)
    images["width"], images["height"] = rng.integers(40, 400, (2, n))
    bad = [{"row": i} for i in np.flatnonzero(rows["tokens"] < 0).tolist()]
    return types.SimpleNamespace(
        name="r",
        path="",
        rows=rows,
        images=images,
        repeat=1,
        weight=0,
        max_tiles=0,
        meta=dict(bad=bad, digest=""),
    )


def rows_of(packs):
    return [[row for _, row, _ in pack.samples] for pack in packs]


def global_sequence(packs, world, workers, position, counts, n):
    """The first n packs that all ranks get, woven together.

    Whatever the workers, each rank's sampler decides.
    """
    dataset = types.SimpleNamespace(packs=packs)
    ranks = []
    for rank in range(world):
        ranks.append(iter(make_loader(dataset, rank, world, workers, position, counts).sampler))
    return [next(ranks[i % world]) for i in range(n)]


def two_epochs(packs):
    """The packs of two epochs, up to the end of a step."""
    whole = []
    for pack in packs.sequence():
        whole.append(pack)
        if pack.position[0] >= 2 and len(whole) % packs.settings.packs_per_step == 0:
            return whole


@pytest.mark.parametrize("cases", [100, pytest.param(300, marks=pytest.mark.nightly)])
def test_random_sizes_ranks_workers_and_resume_points_lose_no_sample_and_double_none(cases):
    rng = np.random.default_rng(12)
    for case in range(cases):
        n = int(np.exp(rng.uniform(0, np.log(5000))))
        world = int(rng.integers(1, 9))
        workers = int(rng.integers(0, 5))
        accum = int(rng.integers(1, 4))
        other = int(rng.integers(1, 9))
        source = random_source(n, rng)
        if (source.rows["tokens"] < 0).all():
            continue
        per_step = world * accum
        window = int(rng.choice([64, 500, 16384]))
        packs = packs_of(
            [source], packs_per_step=per_step, seed=case, window=window, tokens_per_pack=320
        )
        plan = packs.plan_window
        # Each rank plans the same, so once is enough.
        packs.plan_window = functools.lru_cache(None)(plan)
        if case % 4 == 0:
            again = rows_of(packs.plan_window(0, 0, 0)[0])
            assert rows_of(plan(0, 0, 0)[0]) == again, f"case {case}: not pure"
        lengths = packs.plan_samples(np.arange(n))[1]
        drop = collections.Counter(lengths[lengths < 0].tolist())
        if drop.total() == n:  # none fits: refused in another test
            continue
        whole = two_epochs(packs)
        ids = rows_of(whole)
        for epoch in (0, 1):
            epoch_packs = [pack for pack in whole if pack.position[0] == epoch]
            seen = list(itertools.chain(*rows_of(epoch_packs)))
            assert len(seen) == len(set(seen)) == n - drop.total(), (
                f"case {case}: {n} samples, {len(seen)} used, {drop}"
            )
        steps = len(whole) // per_step
        got = global_sequence(packs, world, workers, (0, 0, 0), {}, min(steps, 6) * per_step)
        assert rows_of(got) == ids[: len(got)], f"case {case}"
        if steps > 1:  # resumed, on another number of ranks if it fits
            at = int(rng.integers(1, steps))
            last = whole[at * per_step - 1]
            ranks = other if per_step % other == 0 else world
            position = json.loads(json.dumps(last.position))
            n_packs = min(steps - at, 6) * per_step
            got = global_sequence(packs, ranks, workers, position, last.counts, n_packs)
            want = ids[at * per_step :][: len(got)]
            assert rows_of(got) == want, f"case {case} resumed at step {at} of {steps}"


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def damaged(folder, n):
    """15 kinds of rows that cannot be used, by the words of their reason; each is made n times."""
    noise = encoded(Image.effect_noise((200, 200), 60), "JPEG")
    png = bytearray(encoded(Image.new("RGB", (84, 84), "red"), "PNG"))
    bomb = bytearray(png)
    png[60] ^= 255
    bomb[16:24] = struct.pack(">II", 20000, 10000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    files = {
        "half.jpg": (noise[: len(noise) // 2], "damaged picture"),
        "empty.jpg": (b"", "not a picture"),
        "page.jpg": (b"<html>gone</html>", "not a picture"),
        "bomb.png": (bytes(bomb), "megapixels"),
        "chunk.png": (bytes(png), "damaged picture"),
        "scan.tif": (encoded(Image.new("L", (9, 9)), "TIFF"), "not a picture"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    rows = [(json.dumps(talk(image=name)), why) for name, (_, why) in files.items()]
    rows += [(json.dumps(talk(image=name)), "No such file") for name in ("missing.png", "link.png")]
    robot = {"conversations": [{"from": "robot", "value": "a"}, {"from": "gpt", "value": "b"}]}
    rows += [
        ('{"id": "x", "conversations": [', "not valid JSON"),
        ("\0" * 40, "not valid JSON"),
        ("[1, 2]", "a list, where"),
        (
            json.dumps(talk("<image><image>?", image="good.png")),
            "2 <image> placeholders for 1 images",
        ),
        (json.dumps(talk(answer=" ")), "conversations[1]: empty gpt turn"),
        (json.dumps(talk(video="a.mp4")), "a video"),
        (json.dumps(robot), "robot"),
    ]
    assert len(rows) == 15
    return rows * n


def odd_but_good(folder, n):
    red = Image.new("RGB", (90, 60), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.linspace(0, 65535, 84 * 84).reshape(84, 84).astype(np.uint16)
    files = {
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"),
        "palette.png": encoded(red.quantize(4), "PNG"),
        "deep.png": encoded(Image.fromarray(grey), "PNG"),
        "alpha.png": encoded(red.convert("RGBA"), "PNG"),
        "turned.jpg": encoded(red, "JPEG", exif=exif),
        "film.gif": encoded(red, "GIF", save_all=True, append_images=[red]),
        "dot.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "line.png": encoded(Image.new("RGB", (1, 5000)), "PNG"),
        "one.png": encoded(red.convert("1"), "PNG"),
        "grey.jpg": encoded(red.convert("L"), "JPEG"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [json.dumps(talk(image=name)) for name in files] * n


def first_epoch(sequence):
    return itertools.takewhile(lambda pack: pack.position[0] == 0, sequence)


def bad_rows(dataset, packs):
    """The numbers of the rows that could not be read."""
    bad = [b for pack in packs for b in dataset[pack]["bad"]]
    return {int(b["id"].split(":")[1]) for b in bad}


def test_60_bad_rows_of_15_kinds_among_2000_are_quarantined_for_their_reason_and_nothing_else_is(
    tmp_path,
):
    Image.new("RGB", (84, 84), "blue").save(tmp_path / "good.png")
    bad = damaged(tmp_path, 4)
    rng = np.random.default_rng(0)
    good = odd_but_good(tmp_path, 6) + [
        json.dumps(talk(image="good.png") if i % 2 else talk()) for i in range(1876)
    ]
    long = [json.dumps(talk("word " * 400))] * 4
    lines = (
        [(line, why) for line, why in bad]
        + [(line, None) for line in good]
        + [(line, "too_long") for line in long]
    )
    lines = [lines[i] for i in rng.permutation(len(lines))]
    (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line, _ in lines))
    dataset = dataset_of(tmp_path / "rows.jsonl")
    packs = dataset.packs
    assert packs.n == 2000
    found = {b["row"]: b["reason"] for b in packs.sources[0].meta["bad"]}
    used = []
    later = {}
    planned = list(first_epoch(packs.sequence()))
    for pack in planned:
        batch = dataset[pack]
        used += [int(i.split(":")[1]) for i in batch["ids"]]
        later |= {int(b["id"].split(":")[1]): b["reason"] for b in batch["bad"]}
    half = planned[len(planned) // 2]  # the same after a stop in the middle
    again = bad_rows(dataset, first_epoch(packs.sequence(half.position, half.counts)))
    before = bad_rows(dataset, planned[: len(planned) // 2 + 1])
    assert before | again == set(later) and not before & again
    assert not found.keys() & later.keys()
    for i, (_, why) in enumerate(lines):
        reason = (found | later).get(i)
        assert (reason is not None) == (why not in (None, "too_long")), (i, lines[i], reason)
        assert reason is None or why in reason, (why, reason)
    assert sorted(used) == [i for i, (_, why) in enumerate(lines) if why is None]
    counts = planned[-1].counts
    assert counts["too_long"] == 4
    assert counts["unreadable"] == len(found) and len(found | later) == 60
    assert counts["used"] == len(used) + len(later) and sum(counts.values()) == 2000


def test_a_lost_or_doubled_sample_is_noticed_at_the_step_with_its_numbers():
    packs = types.SimpleNamespace(n=10)
    counts = {"used": 7, "too_long": 2, "unreadable": 1}
    progress = Progress(counts=counts, samples_seen=6, quarantined=1)
    sums = metrics.account({"used": 3}, progress, packs, False)["epoch"]
    assert sums == dict(
        epochs=1,
        records=10,
        to_come=0,
        used=6,
        dropped={"too_long": 2},
        quarantined={"in the index": 1, "in training": 1},
    )
    # no epoch ended in this step
    assert metrics.account({"used": 7, "too_long": 3}, progress, packs, False) == {}
    progress.counts = {"used": 7, "too_long": 7}
    assert metrics.account(counts, progress, packs, True)["epoch"]["to_come"] == 6
    progress.samples_seen = 5
    with pytest.raises(AssertionError, match="7 samples were planned, 5 used and 1 quarantined"):
        metrics.account({}, progress, packs, False)


def test_an_epoch_that_does_not_add_up_is_refused(tmp_path):
    packs = packs_of(write_rows(tmp_path, [talk()] * 30))
    with pytest.raises(ValueError, match="31 samples are accounted for after 1 epochs of 30"):
        [*itertools.islice(packs.sequence((0, 0, 0), {"used": 1}), 99)]


@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n), n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert n < 50 or (order != permute(np.arange(n), n, seed, epoch + 1)).any()


def test_every_sample_comes_exactly_once_an_epoch_and_budgets_hold(tmp_path):
    sources = sources_of(some_rows(tmp_path, 301))
    packs = packs_of(sources, seed=3, window=64)
    seen = []
    for pack in packs.sequence():
        if pack.position[0] == 1:
            break
        assert pack.tokens <= 300 and pack.tiles <= 20
        seen += [row for _, row, _ in pack.samples]
        counts = pack.counts
    dropped = sum(v for k, v in counts.items() if k != "used")
    assert len(seen) == len(set(seen)) == counts["used"] and counts["used"] + dropped == 301


def test_a_sample_that_is_too_long_gets_fewer_tiles_or_is_dropped_whole_and_counted(tmp_path):
    (tmp_path / "p.png").write_bytes(picture(336, 84))
    spec = write_rows(
        tmp_path, [talk("<image>\nWhat?", "Red.", image="p.png"), talk("long " * 400, "Red.")]
    )
    sources = sources_of(spec)
    # 4 tiles and a thumbnail take 45 tokens, 2 and one 27
    budget = int(sources[0].rows[0]["tokens"]) + 30
    dataset = dataset_of(sources, tokens_per_pack=budget)
    pack = next(dataset.packs.sequence())
    assert len(pack.samples) == 1 and pack.counts == {"used": 1, "too_long": 1}
    batch = dataset[pack]
    assert len(batch["tiles"]) == 3 and (batch["tokens"] == TOY.image_id).sum() == 27


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_sequence_of_packs_does_not_depend_on_ranks_workers_or_where_it_resumed(
    tmp_path, world
):
    sources = sources_of(some_rows(tmp_path, 120))
    dataset = dataset_of(sources, window=50, packs_per_step=4)
    want = [dataset[pack]["ids"] for pack in itertools.islice(dataset.packs.sequence(), 24)]
    for workers in (0, 2):
        loaders = [iter(make_loader(dataset, rank, world, workers)) for rank in range(world)]
        got = [next(loaders[k % world]) for k in range(16)]
        assert [b["ids"] for b in got] == want[:16]
    again = iter(make_loader(dataset, 0, 1, 0, got[-1]["position"], got[-1]["counts"]))
    assert [next(again)["ids"] for _ in range(8)] == want[16:]


def test_samples_that_are_all_too_long_stop_the_run_with_what_to_do(tmp_path):
    sources = sources_of(some_rows(tmp_path, 9))
    packs = packs_of(sources, tokens_per_pack=5)
    with pytest.raises(ValueError, match="raise --tokens_per_pack"):
        next(packs.sequence())


@pytest.mark.parametrize("packs_per_step", [1, 3])
def test_without_shuffle_samples_come_in_the_order_of_the_files(tmp_path, packs_per_step):
    sources = [source for k in range(2) for source in sources_of(some_rows(tmp_path / f"{k}", 90))]
    # Windows of 32 samples end inside steps and inside files.
    packs = packs_of(sources, shuffle=False, window=32, packs_per_step=packs_per_step)
    whole = []
    for pack in packs.sequence():
        if pack.position[0] == 2:
            break
        assert pack.tokens <= SMALL["tokens_per_pack"] and pack.tiles <= SMALL["tiles_per_pack"]
        whole += [(source, row) for source, row, _ in pack.samples]
    assert whole == [(source, row) for source in range(2) for row in range(90)] * 2

    # A run that goes on after a step has the same ones to come.
    sequence = packs.sequence()
    before = [next(sequence) for _ in range(4 * packs_per_step)]
    rest = next(packs.sequence(before[-1].position, before[-1].counts))
    assert rest.samples == next(sequence).samples


def test_without_shuffle_a_pack_ends_where_the_next_sample_does_not_fit():
    tokens = [5, 5, 1, 9, 2, 1]
    tiles = [1, 1, 1, 1, 1, 1]
    assert fill_in_order(tokens, tiles, 10, 9) == [[0, 1], [2, 3], [4, 5]]
    assert fill_in_order(tokens, tiles, 99, 4) == [[0, 1, 2, 3], [4, 5]]
    assert fill_in_order([], [], 10, 9) == []


def test_an_empty_data_set_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no usable sample.*data.py check"):
        packs_of(write_rows(tmp_path, []))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources_of(str(tmp_path / "nothing.jsonl"))


def test_other_budgets_order_or_steps_are_other_data(tmp_path):
    sources = sources_of(write_rows(tmp_path, [talk()]))
    changes = ({}, {"seed": 9}, {"tokens_per_pack": 399}, {"packs_per_step": 3}, {"shuffle": False})
    fingerprints = {packs_of(sources, **change).fingerprint for change in changes}
    assert len(fingerprints) == 5
