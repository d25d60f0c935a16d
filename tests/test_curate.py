"""curate.py: nothing lost, nothing paid twice, whatever is killed; what is dropped and why; near-duplicates; numbers."""
import collections, hashlib, io, json, multiprocessing, os, random, sys, tarfile, time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import command_line, configurator, curate
from curation import ask as ask_module, balance, dedup, shards, text as captions
from curation.filter import caption_problem
from evals import endpoint as J
pass
from runs import plan
from inputs.sources import open_sources
from rows import dataset_of
from inputs.tokenizer import Tokenizer
from test_hostile import hostile_tar
from toy_endpoint import Endpoint, facts, precision_recall, read_shards

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # ../shared is an optional folder of test data
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["curate"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(J, "WAIT_S", 0.01)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


def run(stage, *flags):
    """The command line in this process -> exit code and what it printed."""
    code, out, err = command_line.run(curate.main, ["curate.py", stage, *flags])
    return code, out + err


def good(stage, *flags):
    code, text = run(stage, *flags)
    assert code == 0, text
    out = next(Path(f[6:]) for f in map(str, flags) if f.startswith("--out="))
    report = json.loads((out / "report.json").read_text())
    if "in" in report:                                                 # every row is one of kept and dropped
        lost = [row for path in sorted((out / "dropped").glob("*.jsonl")) for row in map(json.loads, open(path))]
        assert report["in"] == report["out"] + len(lost) and report["out"] == len([*read_shards(out)])
        assert report["dropped"] == collections.Counter(row["reason"] for row in lost)
    return report


def png(color, size=(8, 8)):
    Image.new("RGB", size, tuple(int(c) for c in color)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def web(folder, n, per_shard):
    """Shards of n tiny pictures as img2dataset writes them -> truth {sha256: caption}, some of it hard to get."""
    rng, truth, members = random.Random(1), {}, []
    for i in range(n):
        picture = png((i % 256, i // 256, 7))
        kind, color, size = rng.choice(("circle", "star")), rng.choice(("red", "blue")), rng.choice(("small", "large"))
        truth[hashlib.sha256(picture).hexdigest()] = {3: "", 5: "I'm sorry, I cannot describe it.", 7: "a red circle and"}.get(
            i, f"1 shape: {size} {color} {kind} left.")
        members += [(f"{i:09d}.png", picture), (f"{i:09d}.json", json.dumps({"caption": "some shapes", "url": f"u{i}"}).encode())]
    for k in range(0, n, per_shard): write_tar(folder / f"{k // per_shard:05d}.tar", members[2 * k:2 * (k + per_shard)])
    return truth


def files(folder):
    return {path.name: path.read_bytes() for path in [*folder.glob("*.tar"), *folder.glob("dropped/*.jsonl")]}


def keys(folder):
    return {entry["key"] for path in folder.glob("replies/*.jsonl") for line in path.read_bytes().splitlines()
            if line.endswith(b"}") for entry in [json.loads(line)]}


def in_a_process(argv):
    sys.argv, J.WAIT_S = ["curate.py", *argv], 0.01
    sys.stdout = sys.stderr = open(os.devnull, "w")
    configurator.run_script(curate.main)


def killed(endpoint, kills, argv, out):
    """Run a stage in fresh processes, each but the last killed by SIGKILL -> how many replies were asked for again, and
    how many of those had been written down."""
    start, rows = len(endpoint.asked), []
    for k in range(kills):
        process, begun = FORK.Process(target=in_a_process, args=(argv,)), len(endpoint.asked)
        process.start()
        step = random.Random(k).randint(5, 30)
        while process.is_alive() and len(endpoint.asked) < begun + step: time.sleep(0.002)
        assert process.is_alive(), f"it ended before kill {k + 1}"
        process.kill()
        process.join()
        time.sleep(0.05)                                               # what is under way arrives at the endpoint
        rows.append((len(endpoint.asked), keys(out)))
    process = FORK.Process(target=in_a_process, args=(argv,))
    process.start()
    process.join()
    assert process.exitcode == 0
    seen = collections.Counter(endpoint.asked[start:])
    written = sum(key_of_call(call) in before for at, before in rows for call in {*endpoint.asked[at:]})
    return sum(n - 1 for n in seen.values()), written


def key_of_call(call):
    sha, prompt, temperature = call
    return hashlib.sha256(json.dumps(["m", prompt, temperature, sha]).encode()).hexdigest()


@pytest.mark.parametrize("rows, kills", [(240, 2), pytest.param(2000, 10, marks=pytest.mark.nightly)])
def test_r29_a_chain_with_failures_and_kills_gives_the_same_shards_and_pays_for_nothing_twice(tmp_path, rows, kills):
    truth = web(tmp_path / "web", rows, rows // 4)
    assert good("collect", f"--in={tmp_path}/web", f"--out={tmp_path}/c", "--min_side=8")["out"] == rows
    reports = {}
    for name, n in (("whole", 0), ("killed", kills)):
        endpoint = Endpoint(truth, delay=0.002)
        ask = [f"--endpoint={endpoint.url}", "--endpoint_model=m", "--threads=4"]
        at = tmp_path / name
        for stage, source, flags in (("annotate", tmp_path / "c", ["--prompts=curation/prompts/toy"]), ("score", at / "annotate", [])):
            argv, out = [stage, f"--in={source}", f"--out={at / stage}", *ask, *flags], at / stage
            before = len(endpoint.asked)
            if n:
                again, written = killed(endpoint, n, argv, out)
                assert written == 0 and again <= 4 * n                # only what was on its way when the axe fell
            else:
                good(*argv)
                assert max(collections.Counter(endpoint.asked[before:]).values()) == 1
            calls = len(endpoint.asked)
            code, text = run(*argv)                                    # idempotent
            assert code == 0 and "nothing new to do" in text and len(endpoint.asked) == calls
            reports[name, stage] = good(*argv)
        good("filter", f"--in={at}/score", f"--out={at}/filter", "--min_words=1", "--max_repetition=1", "--min_richness=2")
        endpoint.server.shutdown()
    for stage in ("annotate", "score", "filter"):
        assert files(tmp_path / "whole" / stage) == files(tmp_path / "killed" / stage), stage
    dropped = reports["whole", "annotate"]["dropped"]
    assert dropped["refused"] == dropped["cut_off"] == 1 and dropped["no_valid_reply"] >= 1
    ids = [row["id"] for row in read_shards(tmp_path / "c")]
    done = [row["id"] for row in read_shards(tmp_path / "killed" / "annotate")]
    lost = [json.loads(line)["id"] for path in (tmp_path / "killed/annotate/dropped").glob("*.jsonl") for line in open(path)]
    assert sorted(done + lost) == sorted(ids) and len({*ids}) == rows  # each exactly one of done and failed
    for row in read_shards(tmp_path / "killed" / "score"):             # partial answers of the judge: none
        assert row["scores"] == {"richness": 5, "alignment": 5} and row["by"] == {"annotate": "m", "score": "m"}
        assert row["alt_text"] == "some shapes" and row["caption"] == truth[row["sha256"]]
        assert row["conversations"][0]["value"] == "<image>\nDescribe the image.\nsome shapes"
    packs = open_sources(f"{tmp_path}/killed/annotate/*.tar", Tokenizer(ROOT / "toy" / "tokenizer"), "sailvl-chat")
    assert sum(len(s.rows) for s in packs) == len(done) and not any(s.meta["bad"] for s in packs)


def test_r23_hostile_tars_are_refused_and_what_is_good_in_them_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    hostile_tar(tmp_path / "in" / "a.tar", png((1, 2, 3), (70, 70)))
    huge = tarfile.TarInfo("huge.txt")
    huge.size = 10 ** 10
    (tmp_path / "in" / "b.tar").write_bytes(huge.tobuf() + bytes(2048))
    with open(tmp_path / "in" / "c.tar", "wb") as file:                # 10 GB declared, and there, as a hole
        file.write(huge.tobuf())
        file.seek(10 ** 10, 1)
        file.write(bytes(1024))
    away = {path: path.exists() for path in map(Path, ("/tmp/out.txt", "/tmp/out.png", "/out.txt", "/out.png"))}
    start = time.process_time()
    code, text = run("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    assert code == 2 and "b.tar" in text and "a.tar" not in text and time.process_time() - start < 2
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["in"] == 10 and report["done"] == 2 and [*report["damaged"]] == ["b"]
    assert report["dropped"] == {"bad_row": 1, "link_or_device": 4, "too_big": 1, "unsafe_name": 3}
    kept, = read_shards(tmp_path / "c")
    assert kept["caption"] == "a red square" and kept["source_id"] == "good"
    assert {p.name for p in tmp_path.iterdir()} == {"in", "c"} and away == {path: path.exists() for path in away}


def scene(rng, size=160):
    """A picture like no other: smooth coloured noise with a few hard edges."""
    pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, **settings):
    image.save(file := io.BytesIO(), **settings)
    return file.getvalue()


def test_dedup_finds_planted_near_duplicates_across_shards_and_only_them(tmp_path):
    rng, members, planted = np.random.default_rng(1), [], {}
    scenes = [scene(rng) for _ in range(120)]
    for i, image in enumerate(scenes): members.append((f"s{i}", encoded(image, format="JPEG", quality=92)))
    for i in range(0, 60, 3):                                          # saved again, shrunk, enlarged
        planted[i] = [f"p{i}", f"q{i}"]
        members.append((f"p{i}", encoded(scenes[i], format="JPEG", quality=60)))
        members.append((f"q{i}", encoded(scenes[i].resize((200, 200) if i % 2 else (120, 120)), format="PNG")))
    members += [("red", encoded(Image.new("RGB", (90, 90), "red"), format="PNG")),   # flat: same hash, other colours
                ("blue", encoded(Image.new("RGB", (90, 90), "blue"), format="PNG")),
                ("_0", members[0][1])]
    random.Random(1).shuffle(members)
    for k in range(0, len(members), 40):
        write_tar(tmp_path / "in" / f"{k:03d}.tar", [(name + (".png" if data[:1] == b"\x89" else ".jpg"), data)
                                                    for name, data in members[k:k + 40]])
    report = good("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c")
    assert report["dropped"] == {"same_file": 1}
    report = good("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")
    assert report["dropped"] == {"near_duplicate": 40} and report["out"] == 122
    kept = {row["source_id"]: row for row in read_shards(tmp_path / "d")}
    by_id = {row["id"]: row["source_id"] for row in read_shards(tmp_path / "c")}
    for path in (tmp_path / "d" / "dropped").glob("*.jsonl"):
        for row in map(json.loads, open(path)):
            assert row["source_id"][1:] == by_id[row["duplicate_of"]][1:]          # s12, p12, q12
    for i in planted:                                                  # the largest of each cluster stays
        assert kept.keys() & {f"s{i}", f"p{i}", f"q{i}", f"_{i}"} <= ({f"q{i}"} if i % 2 else {f"s{i}", f"p{i}", f"_{i}"})
    assert "nothing new to do" in run("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")[1]


@pytest.mark.parametrize("distance", [0, 1, 3, 6])
def test_clusters_of_hashes_are_those_of_all_pairs_compared(distance):
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2 ** 64, 400, dtype=np.uint64)
    flip = lambda x, k: x ^ np.uint64(sum(1 << int(b) for b in rng.choice(64, k, replace=False)))
    hash = np.array([*base, *(flip(x, rng.integers(0, distance + 3)) for x in base[:200]), *[base[0]] * 50])
    order = rng.permutation(len(hash))
    hash, tone = hash[order], np.zeros((len(hash), 48), np.uint8)
    root = dedup.near_duplicates(hash, tone, distance)
    near = np.bitwise_count(hash[:, None] ^ hash) <= distance
    for _ in range(6): near = near.astype(np.float32) @ near.astype(np.float32) > 0    # whoever is reached in steps
    assert ((root[:, None] == root) == near).all() and (near.sum(1) > 1).any()


def test_near_duplicate_captions_are_found_and_short_ones_are_nobodys_duplicates():
    rng = random.Random(2)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(200)]
    copies = [t.replace(t.split()[30], "changed") for t in texts[:30]]
    every = np.stack([dedup.minhash(t) for t in [*texts, *copies, "a b", "a b"]])
    root = dedup.near_texts(every, 0.7, np.arange(len(every)))
    assert [int(r) for r in root[200:230]] == [*range(30)] and len({*root.tolist()}) == 202


def test_select_is_balanced_over_sources_and_clusters_and_reproducible(tmp_path):
    rng = np.random.default_rng(3)
    for name, n in (("big", 90), ("small", 12)):
        write_tar(tmp_path / name / "0.tar", [(f"{i}.png", encoded(scene(rng, 70), format="PNG")) for i in range(n)])
    good("collect", f"--in=big={tmp_path}/big,small={tmp_path}/small", f"--out={tmp_path}/c")
    flags = [f"--in={tmp_path}/c", "--n=24", "--clusters=1"]
    assert good("select", *flags, f"--out={tmp_path}/a")["out"] == 24
    assert collections.Counter(row["source"] for row in read_shards(tmp_path / "a")) == {"big": 12, "small": 12}
    good("select", *flags, f"--out={tmp_path}/b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    good("select", *flags, "--seed=1", f"--out={tmp_path}/s")
    assert files(tmp_path / "a") != files(tmp_path / "s")
    assert balance.fair_shares(np.array([5, 1, 100, 0]), 16).tolist() == [5, 1, 10, 0]
    groups = np.repeat(np.eye(3, dtype=np.float32) * 9, 50, axis=0) + rng.normal(size=(150, 3)).astype(np.float32)
    assert len({*zip(balance.kmeans(groups, 3, 1).tolist(), np.repeat(range(3), 50).tolist())}) == 3


@pytest.mark.parametrize("text, want", [
    ("richness: 4\nalignment: 5", {"richness": 4, "alignment": 5}), (" Alignment: 1 \n richness: 2\n", {"alignment": 1, "richness": 2}),
    ("richness: 4", None), ("richness: 4\nalignment: 6", None), ("richness: 4\nalignment: 5\nrichness: 4", None),
    ("richness: 4.5\nalignment: 5", None), ("Sure!\nrichness: 4\nalignment: 5", None), ("4\n5", None), ("", None),
    ("richness: 4\n\nalignment: 5", None), ("richness: 4 or 5\nalignment: 5", None)])
def test_scores_are_read_strictly(text, want):
    assert ask_module.read_scores(text, ("richness", "alignment")) == want


def test_a_caption_is_filtered_for_the_first_reason_and_passes_without_one():
    long = "a red ball lies on a green table next to two cups"
    ask = lambda text, scores=(), **settings: caption_problem(curate.Config(**settings), {"caption": text, "scores": dict(scores)})
    assert ask(long) is None and ask(long, {"richness": 3}, min_richness=3.0) is None
    assert ask(long, {"richness": 2}, min_richness=3.0) == "low_richness" and ask(long, min_alignment=1.0) == "not_scored"
    assert ask("a ball") == "too_short" and ask(long, max_words=5) == "too_long"
    assert ask("the cat sat and the cat sat and the cat sat and") == "repetitive"
    assert ask("一个红色的球在绿色的桌子上") == "other_script" and ask("一个红色的球在绿色的桌子上", script="cjk") is None


def test_common_openings_are_thinned_out_to_their_share(tmp_path):
    rng, members = random.Random(4), []
    for i in range(300):
        start = "the image shows a" if i < 225 else f"w{i} x{i} y{i} z{i}"
        text = f"{start} " + " ".join(f"v{rng.randrange(10 ** 6)}" for _ in range(5))
        members += [(f"{i}.png", png((i % 256, i // 256, 9))), (f"{i}.txt", text.encode())]
    write_tar(tmp_path / "in" / "0.tar", members)
    good("collect", f"--in={tmp_path}/in", f"--out={tmp_path}/c", "--min_side=8")
    report = good("filter", f"--in={tmp_path}/c", f"--out={tmp_path}/f", "--max_ngram_share=0.25")
    kept = [row["caption"].startswith("the image shows a") for row in read_shards(tmp_path / "f")]
    assert [*report["dropped"]] == ["homogeneous"] and sum(not x for x in kept) == 75 and 55 <= sum(kept) <= 95


def test_report_numbers_are_those_counted_by_hand_and_the_page_escapes_text(tmp_path, monkeypatch):
    texts = ["A red cat.", "a red cat", "a <b>blue</b> dog & a red cat"]
    for name, some in (("one", texts), ("two", ["a red dog"] * 3)):
        write_tar(tmp_path / name / "0.tar", [m for i, t in enumerate(some) for m in (
            (f"{i}.png", png((i, 0, 0), (70, 70))), (f"{i}.txt", t.encode()))])
        good("collect", f"--in={name}={tmp_path}/{name}", f"--out={tmp_path}/{name}_c")
    sets = f"--in=one={tmp_path}/one_c,two={tmp_path}/two_c"
    good("report", sets, f"--references={tmp_path}/one_c", f"--out={tmp_path}/r")
    assert "no caption has an id" in run("report", sets, f"--references={tmp_path}/one", f"--out={tmp_path}/r1")[1]
    told = json.loads((tmp_path / "r" / "report.json").read_text())
    one = told["Diversity"]["one"]
    # words: a red cat | a red cat | a b blue b dog a red cat
    assert [one[f"unique_{n}grams"] for n in (1, 2, 3, 4)] == [6, 7, 6, 5] and one["words"] == 14
    assert one["equal_to_another"] == 0 and told["Diversity"]["two"]["equal_to_another"] == 2
    assert told["Agreement"]["one, words"]["f1"] == 1.0
    # a red dog: 2 of 3 words twice, then 3 of 3 of 8
    assert told["Agreement"]["two, words"]["precision"] == round((2 / 3 + 2 / 3 + 1) / 3, 4)
    assert told["Agreement"]["two, words"]["recall"] == round((2 / 3 + 2 / 3 + 3 / 8) / 3, 4)
    page = (tmp_path / "r" / "report.html").read_text()
    assert "&lt;b&gt;blue&lt;/b&gt; dog &amp;" in page and "<b>blue" not in page and page.count("data:image") == 3
    assert "n-grams only" in told["note"] or "nltk" in told["note"]
    tag = lambda listed: [(w, {"cat": "NN", "dog": "NNS", "red": "JJ", "blue": "JJ"}.get(w, "DT")) for w in listed]
    monkeypatch.setattr(captions, "load_tagger", lambda: (tag, "a tagger made for this test"))
    good("report", sets, f"--out={tmp_path}/r2")
    numbers = json.loads((tmp_path / "r2" / "report.json").read_text())["Diversity"]["one"]
    assert [numbers[f"unique_{k}"] for k in ("nouns", "verbs", "adjectives")] == [2, 0, 2]


def test_an_input_that_is_touched_or_grows_is_collected_again_and_loses_nothing(tmp_path):
    members = lambda n: [m for i in range(n) for m in ((f"{i}.png", png((i, 0, 0), (70, 70))), (f"{i}.txt", b"a red cat"))]
    for k in (1, 2): write_tar(tmp_path / "in" / f"{k:03d}.tar", members(3 * k))
    argv = ["collect", f"--in={tmp_path}/in/{{001..002}}.tar", f"--out={tmp_path}/c"]
    assert good(*argv)["dropped"] == {"same_file": 3}
    before = files(tmp_path / "c")
    os.utime(tmp_path / "in" / "001.tar", (1, 1))
    assert good(*argv)["out"] == 6 and files(tmp_path / "c") == before
    write_tar(tmp_path / "in" / "001.tar", members(4))
    assert good(*argv)["in"] == 10 and {row["source_id"] for row in read_shards(tmp_path / "c")} >= {*"0123"}


def test_a_shard_that_ends_too_early_is_named_in_one_line_and_no_stage_takes_it_for_whole(small, tmp_path):
    for path in (small[0] / "c").glob("*.tar"): (tmp_path / path.name).write_bytes(path.read_bytes())
    with tarfile.open(last := sorted(tmp_path.glob("*.tar"))[-1]) as tar: end = tar.getmembers()[4].offset
    os.truncate(last, end)                                             # between two members: nothing else gives it away
    for stage in ("collect", "dedup", "select", "filter"):
        code, text = run(stage, f"--in={tmp_path}", f"--out={tmp_path}/{stage}", *["--max_ngram_share=0.5", "--min_words=0"] * (stage == "filter"))
        assert code == 2 and text.splitlines()[-1].count(str(last)) == 1, text
        assert len([*(tmp_path / stage).glob("*.tar")]) == (2 if stage == "collect" else 0)


def test_what_a_record_may_hold_is_bounded_and_what_it_is_called_loses_no_row(tmp_path):
    def head(name, size, kind=tarfile.REGTYPE):
        (member := tarfile.TarInfo(name)).size, member.type = size, kind
        return member.tobuf(tarfile.GNU_FORMAT)
    for name, blocks in (("pax", [("x", 3 * 10 ** 9, tarfile.XHDTYPE)]), ("many", [(f"a.{k}.jpg", 60 * 2 ** 20) for k in range(9)]),
                         ("json", [("a.json", 50 * 2 ** 20)])):
        with open(tmp_path / f"{name}.tar", "wb") as file:
            for block in blocks:
                file.write(head(*block))
                file.seek(block[1], 1)
            file.write(bytes(1024))
    with pytest.raises(shards.DamagedShard, match="3000000000 bytes"): [*shards.read_records(shards.InputShard("", tmp_path / "pax.tar"))]
    for name in ("many", "json"):
        assert [*shards.read_records(shards.InputShard("", tmp_path / f"{name}.tar"))] == [({"id": "a"}, {}, "too_big")]
    write_tar(tmp_path / "in" / "0.tar", [("row-000001.txt", b"a red cat"), ("b c.txt", b"a red dog")])
    good("filter", f"--in={tmp_path}/in", f"--out={tmp_path}/f")
    assert [reason for *_, reason in shards.read_records(shards.InputShard("", tmp_path / "f" / "0.tar"))] == [None, None]
    for name in ("plain", "x.jfif"): (tmp_path / name).write_bytes(png((len(name), 0, 0), (70, 70)))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps({"id": n, "image": n, "caption": "a red cat"}) + "\n" for n in (
        "plain", "x.jfif", "/dev/zero")))
    assert good("collect", f"--in=a/b={tmp_path}/r.jsonl", f"--out={tmp_path}/c")["dropped"] == {"bad_row": 1}
    assert good("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d", "--by=text")["in"] == 2
    source, = open_sources(f"{tmp_path}/c/*.tar", Tokenizer(ROOT / "toy" / "tokenizer"), "sailvl-chat")
    assert source.rows["n_images"].tolist() == [1, 1]


def test_collect_takes_folders_jsonl_and_tars_counts_what_it_drops_and_data_reads_what_it_writes(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, content in (("a", png((1, 1, 1), (70, 80))), ("b", png((2, 2, 2), (20, 80))), ("c", png((3, 3, 3), (70, 900))),
                          ("d", b"no picture"), ("e", png((1, 1, 1), (70, 80)))):
        (tmp_path / "photos" / f"{name}.png").write_bytes(content)
        (tmp_path / "photos" / f"{name}.txt").write_text(f"picture {name}")
    rows = [{"id": 7, "image": "photos/a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]},
            {"id": 8, "image": "photos/none.png", "caption": "x"}, {"id": 9, "caption": "no picture"},
            {"id": 10, "image": ["photos/a.png", "photos/b.png"], "caption": "two"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    report = good("collect", f"--in={tmp_path}/photos,{tmp_path}/rows.jsonl", f"--out={tmp_path}/c", "--shard_size=3")
    assert report["in"] == 10 and report["out"] == 1 and report["shards"] == 4
    assert report["dropped"] == {"too_small": 1, "too_narrow": 1, "unreadable_picture": 1, "same_file": 2, "no_such_file": 1,
                                 "no_picture": 1, "several_pictures": 1, "bad_row": 1}
    row, = read_shards(tmp_path / "c")
    assert row["alt_text"] == row["caption"] == "picture a" and (row["width"], row["height"]) == (70, 80)
    dataset = dataset_of(f"{tmp_path}/c/*.tar")
    assert dataset.packs.n == 1 and dataset[next(dataset.packs.sequence())]["size"]["tiles"] == 1


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the real pictures are not part of this repository")
def test_real_photos_go_through_collect_dedup_and_report(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in open(SHARED / "data" / "photos" / "photos.jsonl")][:60]
    for row in rows: row["image"] = str(SHARED / "data" / "photos" / row["image"])
    (tmp_path / "photos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    report = good("collect", f"--in={tmp_path}/photos.jsonl,{SHARED}/data/documents", f"--out={tmp_path}/c")
    assert report["out"] >= 68 and report["in"] == 70
    assert good("dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d")["out"] >= 0.98 * report["out"]
    good("report", f"--in={tmp_path}/d", f"--out={tmp_path}/r", "--pictures=5")
    numbers = json.loads((tmp_path / "r" / "report.json").read_text())["Diversity"]
    assert [*numbers.values()][0]["unique_1grams"] > 150


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two shards of collected pictures and a tiny random model."""
    from test_eval import make_model_folder
    folder = tmp_path_factory.mktemp("small")
    truth = web(folder / "web", 24, 8)
    good("collect", f"--in={folder}/web", f"--out={folder}/c", "--min_side=8")
    make_model_folder(folder / "model")
    return folder, truth


def test_our_own_captioner_writes_the_same_shards_whoever_is_killed_and_however_many_work(small, tmp_path):
    folder, _ = small
    argv = ["recaption", f"--in={folder}/c", f"--model={folder}/model", "--prompts=curation/prompts/toy", "--max_new_tokens=6", "--dtype=float32"]
    good(*argv, f"--out={tmp_path}/one")
    three = [FORK.Process(target=in_a_process, args=([*argv, f"--out={tmp_path}/three"],)) for _ in range(3)]
    for process in three: process.start()
    for process in three: process.join()
    assert [p.exitcode for p in three] == [0, 0, 0]
    assert files(tmp_path / "one") == files(tmp_path / "three")
    report = good(*argv, f"--out={tmp_path}/three")                    # each answer was made by one of them
    assert report["calls"] == report["replies"] == json.loads((tmp_path / "one" / "report.json").read_text())["calls"]
    for half in (tmp_path / "one").glob("*.tar"): half.unlink()        # killed before the shard, after the replies
    lines = sorted((tmp_path / "one" / "replies").glob("*.jsonl"))
    lines[0].write_bytes(lines[0].read_bytes()[:-9])                   # in the middle of a line
    again = good(*argv, f"--out={tmp_path}/one")
    assert again["calls"] == 1 and files(tmp_path / "one") == files(tmp_path / "three")


def test_pictures_go_to_several_endpoints_and_spend_is_what_they_say(small, tmp_path):
    folder, truth = small
    a, b = Endpoint(truth, 0, 0), Endpoint(truth, 0, 0)
    report = good("annotate", f"--in={folder}/c", f"--out={tmp_path}/a", f"--endpoint={a.url},{b.url}", "--endpoint_model=m",
                  "--mode=caption", "--price_in=1000", "--price_out=1000000")
    assert len(a.asked) > 5 and len(b.asked) > 5 and len(a.asked) + len(b.asked) == report["replies"]
    words = len((ROOT / "curation" / "prompts" / "caption.txt").read_text().split())
    said = sum(len(text.split()) for text in truth.values())
    assert report["prompt_tokens"] == (100 + words) * report["replies"] and report["completion_tokens"] == said
    assert report["dollars"] == pytest.approx(report["prompt_tokens"] / 1000 + said)


def test_what_only_a_picture_is_to_blame_for_drops_the_picture_and_the_rest_stops_the_run(small, tmp_path):
    folder, truth = small
    for status, ends in ((400, 0), (401, 2)):
        endpoint, some = Endpoint(truth, 0, 0), [*truth][10]
        endpoint.status = lambda sha: status if sha == some else 200
        flags = [f"--in={folder}/c", f"--out={tmp_path}/{status}", f"--endpoint={endpoint.url}", "--endpoint_model=m"]
        code, text = run("annotate", *flags)
        assert code == ends and ("http_400" in text if not ends else "HTTP 401 Unauthorized; set JUDGE_API_KEY" in text and text.count("\n") == 1), text


@pytest.mark.parametrize("argv, words", [
    (["nonsense"], "usage: python curate.py collect|dedup|"), (["collect", "--in=nowhere.tar", "--out={t}/x"], "does not exist"),
    (["collect", "--in={f}/web"], "--out=DIR"), (["collect", "--in=", "--out={t}/x"], "nothing to read"),
    (["collect", "--in={f}/web", "--out={f}/web"], "holds the input"), (["dedup", "--in={f}/web", "--out={t}/x"], "collect` first"),
    (["annotate", "--in={f}/c", "--out={t}/x"], "give --model=FOLDER, or --endpoint"),
    (["annotate", "--in={f}/c", "--out={t}/x", "--endpoint=localhost", "--endpoint_model=m"], "http://"),
    (["collect", "--in={f}/web,{f}/web", "--out={t}/x"], "two inputs are called"),
    (["collect", "--in={f}/web", "--out={f}/c", "--min_side=9"], "another min_side"),
    (["recaption", "--in={f}/c", "--out={t}/x", "--model={f}/c"], "no *.safetensors"),
    (["dedup", "--in={f}/c", "--out={t}/x", "--distance=9"], "give 0 to 8"), (["select", "--in={f}/c", "--clusters=0"], "at least 1"), (["collect", "--in=1.tar", "--in=2.tar"], "in quotes")])
def test_a_mistake_gets_one_line_that_says_what_to_do(small, tmp_path, argv, words):
    code, text = run(*[a.format(f=small[0], t=tmp_path) for a in argv])
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1 and words in text, text


def test_sft_quality_scores_dialogues_of_any_source(small, tmp_path):
    folder, truth = small
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    talk = [{"from": "human", "value": "<image>\n<image>\nWhat differs?"}, {"from": "gpt", "value": "Nothing."}]
    rows = [{"id": f"r/{i}", "image": ["a.png", "a.png"], "conversations": talk} for i in range(3)]
    rows.append({"id": "empty", "image": "a.png", "conversations": [{"from": "human", "value": ""}, talk[1]]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    endpoint = Endpoint(truth, 0, 0)
    endpoint.reply = lambda sha, prompt, t: ("difficulty: 2\ncomplexity: 3\nrelevance: 5" if "< image >" in prompt and (
        "Question: " in prompt) else "?", "stop")
    report = good("sft-quality", f"--in={tmp_path}/rows.jsonl", f"--out={tmp_path}/q", f"--endpoint={endpoint.url}", "--endpoint_model=m")
    assert report["means"] == {"difficulty": 2.0, "complexity": 3.0, "relevance": 5.0} and report["calls"] == 1  # all three are alike
    assert report["dropped"] == {"bad_row": 1}
    row = next(iter(read_shards(tmp_path / "q")))
    assert row["conversations"] == talk and row["image"] == ["row-000000.0.png", "row-000000.1.png"]
    source, = open_sources(f"{tmp_path}/q/*.tar", Tokenizer(ROOT / "toy" / "tokenizer"), "sailvl-chat")
    assert source.rows["n_images"].tolist() == [2, 2, 2]


def test_three_tiers_write_mixes_and_commands_and_rank_what_was_run(tmp_path, monkeypatch):
    sets = {"a": 10, "b": 20, "c": 30}
    for name, n in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"id": i, "text": "hello there"}) + "\n" for i in range(n)))
    spec = "--in=" + ",".join(f"{name}={tmp_path}/{name}.jsonl" for name in sets)
    code, text = run("quick", spec, f"--out={tmp_path}/q", "--n=5", "--sft=config/toy_sft.py", "--eval=--benchmarks=toy")
    assert code == 0 and text.count("python sft.py config/toy_sft.py --stages=instruction --instruction.data=") == 3
    assert json.loads((tmp_path / "q" / "c" / "mix.json").read_text())["c-0"]["repeat_time"] == pytest.approx(5 / 30)
    value = {"a": 50, "a+b": 49, "a+c": 50, "all": 60, "half_a": 61, "half_b": 40, "half_c": 50}
    def fake(command):
        out = Path(next(a[10:] for a in command if a.startswith("--out_dir=")))
        if command[1] == "eval.py":
            out.mkdir(parents=True)
            (out / "results.json").write_text(json.dumps({"overall": value[out.parent.name]}))
        return type("Done", (), {"returncode": 0})
    monkeypatch.setattr(plan.subprocess, "run", fake)
    code, text = run("composition", spec, f"--out={tmp_path}/m", "--n=0", "--run=True")
    assert code == 0 and [line.split()[1] for line in text.splitlines()[-4:]] == ["half_a", "all", "half_c", "half_b"]
    mix = json.loads((tmp_path / "m" / "half_b" / "mix.json").read_text())
    assert {k: v["repeat_time"] for k, v in mix.items()} == {"a-0": 1.0, "b-0": 0.5, "c-0": 1.0}
    code, text = run("composition", spec, f"--out={tmp_path}/m", "--n=7", "--run=True")
    assert code == 2 and "was run with other data or flags" in text   # no score of another mix
    code, text = run("incremental", spec, f"--out={tmp_path}/i", "--n=0", "--run=True")
    assert code == 0 and "kept: a, c" in text


def test_facts_of_toy_captions_are_counted_as_they_are_written():
    assert facts("2 shapes: small red star top left, large blue cross.") == collections.Counter(
        ["star", "red star", "small red star", "small red star top left", "cross", "blue cross", "large blue cross", "number 2"])
    assert facts("A list: A12, B3.") == collections.Counter(["a list", "reads A12", "reads B3"])
    assert facts("A bar chart: red 3, blue 4.") == collections.Counter(["a bar chart", "value red 3", "value blue 4"])
    assert precision_recall([("a red square", "1 shape: small red star left.")]) == (0, 0)
    assert precision_recall([("a picture with a star", "1 shape: small red star left.")]) == (100, 20)
