"""curation/dedup.py: near-duplicates are found, and only they."""
import io
import random

import command_line
import numpy as np
import pytest
from curation_helpers import (
    ROOT,
    dropped_rows,
    encoded,
    run,
    run_well,
    scene,
    stage_files,
    write_tar,
)
from PIL import Image, ImageDraw, ImageEnhance
from toy_endpoint import read_shards

import convert
from curation import compare, dedup, embeddings, look, minhash, overlay, pairs
from curation.ranks import Ranks


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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The toy ViT in a model folder."""
    folder = tmp_path_factory.mktemp("model") / "m"
    flags = ["assemble", f"--vision={ROOT}/toy/vit", f"--llm={ROOT}/toy/llm", f"--out={folder}"]
    code, _, errors = command_line.run(convert.main, ["convert.py", *flags])
    assert code == 0, errors
    return folder


def test_by_embedding_the_same_pictures_are_found_on_any_number_of_ranks_with_their_cosines(
    tmp_path, model, zygote
):
    plant_duplicates(tmp_path / "in")
    run_well("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    words = ["dedup", f"--in={tmp_path}/c", "--by=embedding", "--dtype=float32"]
    code, text = run(*words, f"--out={tmp_path}/d")
    assert code == 2 and "--model=FOLDER" in text
    words.append(f"--model={model}")
    report = run_well(*words, f"--out={tmp_path}/d")
    assert report["dropped"] == {"near_duplicate": 40}
    names = {row["id"]: row["source_id"] for row in read_shards(tmp_path / "c")}
    for row in dropped_rows(tmp_path / "d"):
        assert row["source_id"][1:] == names[row["duplicate_of"]][1:]
        assert 0.95 <= row["cosine"] <= 1
    codes = zygote.run("curate", [*words, f"--out={tmp_path}/two"], 2, tmp_path / "printed")
    assert codes == [0, 0], (tmp_path / "printed").read_text()
    assert stage_files(tmp_path / "two") == stage_files(tmp_path / "d")


def test_vectors_that_are_near_are_found_among_many_pivots_in_several_rounds(monkeypatch):
    monkeypatch.setattr(embeddings, "ROWS_OF_PIVOT", 16)
    monkeypatch.setattr(embeddings, "BYTES_AT_ONCE", 2**16)
    rng = np.random.default_rng(6)
    features = rng.normal(size=(600, 24)).astype(np.float32) + 3
    copies = np.arange(0, 300, 3)
    features[copies + 300] = features[copies] + 0.1 * rng.normal(size=(100, 24))
    digests = rng.integers(0, 2**62, 600).tolist()
    ids = np.array([f"{digest << 2:016x}0000" for digest in digests], "S20")
    places = np.arange(600)
    blocks = []
    for part in (places[:250], places[250:]):
        blocks.append(embeddings.VectorBlock(features[part], part - part[0], part, ids[part]))
    centre, found = embeddings.embedding_pairs(Ranks(), "cpu", blocks, 0.95)
    assert np.abs(centre - features.mean(0)).max() < 1e-5
    cosines = [embeddings.cosine_of(features[a], features[b], centre) for a, b in found]
    assert min(cosines) >= 0.948
    wanted = {(k, k + 300) for k in copies.tolist()}
    assert len(wanted & {tuple(pair) for pair in found.tolist()}) >= 98
    assert len(found) <= 100


def draw_chart(heights):
    """A bar chart; all of them share a template."""
    page = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(page)
    for y in range(60, 341, 56):
        draw.line((60, y, 600, y), fill=(225, 225, 225))
    for k, height in enumerate(heights):
        draw.rectangle((80 + 64 * k, 340 - height, 120 + 64 * k, 340), fill=(40, 110, 220))
        draw.text((84 + 64 * k, 345), str(2015 + k), fill="black", font_size=12)
    draw.text((60, 20), "Share of the market, in percent", fill="black", font_size=16)
    return page


def draw_page(k):
    """A white page with two lines of text, all but equal to a difference hash."""
    page = Image.new("RGB", (640, 480), "white")
    draw = ImageDraw.Draw(page)
    draw.text((40, 60), f"invoice {k * 37} total", fill="black", font_size=28)
    draw.text((40, 120), f"No. {k * 7919}", fill="black", font_size=28)
    return page


def pictures():
    """Pictures that are nobody's near-duplicate, of three kinds."""
    rng = np.random.default_rng(4)
    detailed = []
    for _ in range(6):
        noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype="uint8"))
        rough = noise.resize((400, 300), Image.Resampling.BICUBIC)
        detailed.append(Image.blend(scene(rng, 400).resize((400, 300)), rough, 0.3))
    charts = [draw_chart(rng.integers(60, 260, 8)) for _ in range(6)]
    return [*detailed, *charts, *[draw_page(k) for k in range(1, 7)]]


def crop(image):
    x = round(image.width * 0.02)
    y = round(image.height * 0.02)
    return image.crop((x, y, image.width - x, image.height - y))


def watermark(image):
    layer = Image.new("RGBA", image.size)
    place = (image.width // 2, image.height * 4 // 5)
    ImageDraw.Draw(layer).text(place, "example.com", fill=(255, 255, 255, 110), font_size=24)
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


EDITS = {
    "half size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "jpeg 30": lambda image: Image.open(io.BytesIO(encoded(image, format="JPEG", quality=30))),
    "crop of 2 %": crop,
    "lighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "watermark": watermark,
    "gray": lambda image: image.convert("L").convert("RGB"),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
}
OTHERS = {
    "mirrored": Image.Transpose.FLIP_LEFT_RIGHT,
    "turned": Image.Transpose.ROTATE_90,
    "upside down": Image.Transpose.ROTATE_180,
}


def looks_of(images):
    return np.array([look.look_of(image) for image in images], look.LOOK)


def candidates(looks):
    """Pairs that are compared, as a set."""
    hashes, unsure = look.hash_of(looks["gray"])
    found = pairs.picture_pairs(Ranks(), np.arange(len(looks)), hashes, unsure, 20)
    return {tuple(pair) for pair in found.tolist()}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_picture_is_found_and_is_the_duplicate_of_its_original_alone(edit):
    originals = pictures()
    looks = looks_of([*originals, *map(EDITS[edit], originals)])
    n = len(originals)
    compared = np.array(sorted(candidates(looks)))
    results = overlay.compare_looks(looks[compared[:, 0]], looks[compared[:, 1]])
    same = compared[overlay.margin_of(results, 0.9) >= 0]
    assert same.tolist() == [[k, k + n] for k in range(n)]


@pytest.mark.parametrize("how", OTHERS)
def test_a_mirrored_or_turned_picture_is_no_duplicate(how):
    originals = pictures()
    looks = looks_of([*originals, *[image.transpose(OTHERS[how]) for image in originals]])
    n = len(originals)
    results = overlay.compare_looks(looks[:n], looks[n:])
    assert (overlay.margin_of(results, 0.9) < 0).all()


@pytest.mark.parametrize("by", [[30, -30], [30, 0]])
def test_charts_of_one_template_of_which_a_bar_or_two_differ_are_no_duplicates(by):
    """Nine tenths of their edges are the same; where one bar grows, all that differs is darker."""
    heights = np.array([166, 153, 158, 169, 150, 161, 155, 164])
    others = heights + [*by, 0, 0, 0, 0, 0, 0]
    charts = [draw_chart(heights), draw_chart(others)]
    looks = looks_of([*charts, EDITS["jpeg 30"](charts[0])])
    results = overlay.compare_looks(looks[[0, 0]], looks[[1, 2]])
    assert results["found"][0] >= 0.9
    assert (overlay.margin_of(results, 0.9) >= 0).tolist() == [False, True]


def test_more_pictures_of_one_key_than_are_compared_have_other_neighbours_in_each_table():
    """A page among hundreds of its template: a bit of its hash turns, and it is found all the same.
    """
    rng = np.random.default_rng(9)
    n = 400
    hashes = np.zeros((n, 2, 2), np.uint64)
    hashes[:, :, 1] = rng.integers(0, 2**63, (n, 1), dtype=np.uint64)
    unsure = np.tile(np.arange(3, dtype=np.uint8), (2 * n, 2, 3, 1))
    turned = hashes ^ np.uint64(2**62) * np.array([0, 1], np.uint64)
    found = pairs.picture_pairs(Ranks(), np.arange(2 * n), np.concatenate([hashes, turned]), unsure,
                                4)
    assert found.tolist() == [[k, k + n] for k in range(n)]


def test_equal_shapes_in_other_colours_are_no_duplicates_and_a_grey_copy_is_one():
    shapes = []
    for color in ("red", "blue"):
        image = Image.new("RGB", (200, 200), "white")
        ImageDraw.Draw(image).ellipse((120, 30, 170, 80), fill=color)
        shapes.append(image)
    looks = looks_of([*shapes, shapes[0].convert("L").convert("RGB")])
    results = overlay.compare_looks(looks[[0, 0]], looks[[1, 2]])
    assert (overlay.margin_of(results, 0.9) >= 0).tolist() == [False, True]


def test_two_pictures_are_compared_if_their_keys_agree_but_for_unsure_bits():
    rng = np.random.default_rng(3)
    n = 60
    hashes = rng.integers(0, 2**63, (n, 2, 2), dtype=np.uint64)
    unsure = np.stack([rng.permuted(np.tile(np.arange(24), (n, 1)), axis=1)[:, :3]
                       for _ in range(6)], 1).reshape(n, 2, 3, 3).astype(np.uint8)
    turned = hashes.copy()
    turned[:, 1] = rng.integers(0, 2**63, (n, 2), dtype=np.uint64)
    for k in range(n):
        for bit in unsure[k, 0, 0][: k % 4] if k >= 20 else []:
            turned[k, 0, 0] ^= np.uint64(1) << np.uint64(bit)
    turned[:20, 0, 1] ^= np.uint64(0x1FFFFF)  # 21 bits that are in no key
    found = pairs.picture_pairs(Ranks(), np.arange(2 * n), np.concatenate([hashes, turned]),
                                np.concatenate([unsure, unsure]), 20)
    wanted = [[k, k + n] for k in range(20, n)]
    assert [pair for pair in found.tolist() if pair[1] - pair[0] == n] == wanted


def test_of_the_captions_at_the_asked_for_jaccard_99_of_100_are_found_and_none_below_it(tmp_path):
    rng = random.Random(2)
    words = [f"w{i}" for i in range(4000)]
    members = []
    n_near = 0
    for k in range(300):
        text = rng.choices(words, k=62)
        other = list(text)
        # 54 of 66 3-grams are common, or 53 of 67.
        near = k % 3 > 0
        changed = range(60 - (6 if near else 7), 60)
        n_near += near
        for place in changed:
            other[place + 2] = f"x{place}"
        for name, caption in ((f"{k}a", text), (f"{k}b", other)):
            picture = encoded(Image.new("RGB", (70, 70), (k % 256, k // 256, name[-1] == "a")),
                              format="PNG")
            members += [(f"{name}.png", picture), (f"{name}.txt", " ".join(caption).encode())]
    write_tar(tmp_path / "in" / "0.tar", members)
    run_well("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    run_well("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d", "--by=text", "--jaccard=0.8")
    dropped = dropped_rows(tmp_path / "d")
    assert all(row["jaccard"] >= 0.8 for row in dropped)
    assert 0.99 * n_near <= len(dropped) <= n_near


def test_ranks_without_a_picture_or_caption_find_no_pairs():
    """There may be more ranks than shards."""
    none = np.zeros(0, np.int64)
    hashes = np.zeros((0, 2, 2), np.uint64)
    unsure = np.zeros((0, 2, 3, 3), np.uint8)
    assert pairs.picture_pairs(Ranks(), none, hashes, unsure, 20).shape == (0, 2)
    assert pairs.text_pairs(Ranks(), none, np.zeros((0, 16), np.uint64)).shape == (0, 2)


def test_short_captions_are_nobodys_duplicates():
    assert len(minhash.caption_ngrams("a b")) == 0
    assert not minhash.minhash_bands(minhash.caption_ngrams("a b"), 4, 8).any()


def test_of_a_chain_only_those_go_that_are_duplicates_of_the_one_that_stays(tmp_path):
    """a is near b and b near c, but c is no near-duplicate of a."""
    class Chain:
        def compare(self, compared):
            results = np.zeros(len(compared), compare.RESULT)
            results["margin"] = np.where(np.diff(compared, axis=1)[:, 0] == 1, 0.1, -1)
            return results

    facts = np.zeros(3, dedup.DEDUP_ROW)
    facts["pixels"] = 9, 5, 7
    chain = np.array([[4, 5], [5, 6]])
    verdicts = compare.keep_best(Chain(), np.array([4, 5, 6]), facts, chain)
    assert verdicts[["row", "kept"]].tolist() == [(5, 4)]


def test_every_merge_is_written_with_its_distances_and_the_report_shows_pairs_at_the_threshold(
    tmp_path
):
    plant_duplicates(tmp_path / "in")
    run_well("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    run_well("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")
    for row in dropped_rows(tmp_path / "d"):
        assert 0.8 <= row["found"] <= 1 and 0 <= row["one_sided"] <= 1
    code, text = run("report", f"--in={tmp_path}/c", f"--pairs={tmp_path}/d", "--pictures=4",
                     f"--out={tmp_path}/r")
    assert code == 0, text
    page = (tmp_path / "r" / "report.html").read_text()
    assert page.count("data:image") == 4 + 2 * 4 and "margin" in page
