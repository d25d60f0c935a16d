"""curation/dedup.py: near-duplicates are found, and only they."""
import random

import numpy as np
import pytest
from curation_helpers import dropped_rows, encoded, run, run_well, scene, write_tar
from PIL import Image, ImageDraw
from toy_endpoint import read_shards

from curation import dedup
from curation.collect import perceptual_hash


def plant_duplicates(folder):
    """Shards of 120 scenes, s0 to s119; p and q are copies of every third of the first 60.

    The copy _0 is the same file, p is saved again, q is shrunk or enlarged. Two flat pictures have
    the same hash and other colours. Returns the numbers of the scenes that were copied.
    """
    rng = np.random.default_rng(1)
    scenes = [scene(rng) for _ in range(120)]
    members = []
    for i, image in enumerate(scenes):
        members.append((f"s{i}", encoded(image, format="JPEG", quality=92)))
    copied = range(0, 60, 3)
    for i in copied:
        size = (200, 200) if i % 2 else (120, 120)
        members.append((f"p{i}", encoded(scenes[i], format="JPEG", quality=60)))
        members.append((f"q{i}", encoded(scenes[i].resize(size), format="PNG")))
    for color in ("red", "blue"):
        members.append((color, encoded(Image.new("RGB", (90, 90), color), format="PNG")))
    members.append(("_0", members[0][1]))
    random.Random(1).shuffle(members)

    named = []
    for name, data in members:
        suffix = ".png" if data[:1] == b"\x89" else ".jpg"
        named.append((name + suffix, data))
    for k in range(0, len(named), 40):
        write_tar(folder / f"{k:03d}.tar", named[k : k + 40])
    return copied


def test_planted_near_duplicates_are_found_across_shards_and_only_them(tmp_path):
    copied = plant_duplicates(tmp_path / "in")
    report = run_well("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    assert report["dropped"] == {"same_file": 1}
    report = run_well("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")
    assert report["dropped"] == {"near_duplicate": 40} and report["out"] == 122
    kept = {row["source_id"] for row in read_shards(tmp_path / "d")}
    names = {row["id"]: row["source_id"] for row in read_shards(tmp_path / "c")}
    for row in dropped_rows(tmp_path / "d"):
        # The same number: s12, p12, q12.
        assert row["source_id"][1:] == names[row["duplicate_of"]][1:]
    for i in copied:
        # The largest of each cluster stays.
        largest = {f"q{i}"} if i % 2 else {f"s{i}", f"p{i}", f"_{i}"}
        assert kept & {f"s{i}", f"p{i}", f"q{i}", f"_{i}"} <= largest
    _, text = run("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")
    assert "nothing new to do" in text


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_clusters_of_hashes_are_those_of_all_pairs_compared(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**64, 400, dtype=np.uint64)

    def flip(value, k):
        bits = rng.choice(64, k, replace=False)
        return value ^ np.uint64(sum(1 << int(bit) for bit in bits))

    flipped = [flip(value, rng.integers(0, distance + 3)) for value in base[:200]]
    hashes = np.array([*base, *flipped, *[base[0]] * 50])
    hashes = hashes[rng.permutation(len(hashes))]
    tone = np.zeros((len(hashes), 48), np.uint8)
    root = dedup.near_duplicates(hashes, tone, distance)

    near = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    for _ in range(6):  # whoever is reached in steps
        steps = near.astype(np.float32)
        near = steps @ steps > 0
    assert ((root[:, None] == root) == near).all() and (near.sum(1) > 1).any()


def test_near_duplicate_captions_are_found_and_short_ones_are_nobodys_duplicates():
    rng = random.Random(2)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(200)]
    copies = [text.replace(text.split()[30], "changed") for text in texts[:30]]
    signatures = [dedup.minhash(text) for text in [*texts, *copies, "a b", "a b"]]
    root = dedup.near_texts(np.stack(signatures), 0.7, np.arange(len(signatures)))
    assert root[200:230].tolist() == list(range(30))
    assert len(set(root.tolist())) == 202


def test_white_pages_with_two_lines_of_text_all_stay():
    """Their difference hashes are almost empty, and equal ones say nothing."""
    hashes = []
    tones = []
    for k in range(40):
        page = Image.new("RGB", (640, 480), "white")
        draw = ImageDraw.Draw(page)
        draw.text((40, 60), f"invoice {k * 37} total", fill="black", font_size=28)
        draw.text((40, 120), f"No. {k * 7919}", fill="black", font_size=28)
        dhash, tone = perceptual_hash(page)
        hashes.append(int(dhash, 16))
        tones.append(np.frombuffer(bytes.fromhex(tone), np.uint8))
    assert len(set(hashes)) < 20  # the hash alone cannot tell them apart
    cluster = dedup.near_duplicates(np.array(hashes, np.uint64), np.stack(tones), 3)
    assert len(set(cluster.tolist())) == 40
