"""data.py: tokens, labels, sources, order, packs, and that nothing is lost."""
import io, itertools, json, os, signal, subprocess, sys, tarfile, time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import configurator, data
from inputs import chat, images, index, sources as sources_module, tars
from data import make_loader
from inputs.chat import IGNORE, chat_ids, render
from inputs.packing import Packs, permute
from inputs.sources import open_sources
from inputs.tokenizer import SPECIAL_TOKENS, Tokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"  # ../shared is an optional folder of test data
TOY = Tokenizer(ROOT / "toy" / "tokenizer")
KW = dict(tile_size=84, tokens_per_tile=9, max_tiles=4, tokens_per_pack=300, tiles_per_pack=20)


def picture(width=84, height=84, color=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def write_rows(folder, rows, name="rows.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder / name)


def talk(question="What?", answer="This.", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def some_rows(folder, n, seed=0):
    """n rows about pictures of several shapes, some without a picture."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for k, size in enumerate([(84, 84), (168, 84), (84, 252), (168, 168)]):
        (folder / f"{k}.png").write_bytes(picture(*size))
    for i in range(n):
        row = talk("How many? " * int(rng.integers(1, 12)), "Some answer. " * int(rng.integers(1, 9)), id=f"r{i}")
        rows.append(row | ({"image": f"{rng.integers(4)}.png"} if rng.random() < 0.8 else {}))
    return write_rows(folder, rows)


# ---- tokenizer and template ----

@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_the_tokenizer(text):
    import unicodedata
    assert TOY.decode(TOY.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_typed_by_a_user_is_plain_text(token):
    ids = TOY.encode(f"look {token} here")
    assert not set(ids) & TOY.special_ids and TOY.decode(ids) == f"look {token} here"


@pytest.mark.skipif(not (SHARED / "tokenizer").exists(), reason="the Qwen tokenizer is not part of this repository")
def test_the_qwen_tokenizer_has_the_published_special_ids():
    tok = Tokenizer(SHARED / "tokenizer" / "qwen2")
    assert tok.n_vocab == 151674 and tok.eos_id == 151645 and tok.image_id == 151667
    assert [tok.special[t] for t in ("<|endoftext|>", "<img>", "</img>", "</box>")] == [151643, 151665, 151666, 151673]
    assert tok.encode("Hello, world! 你好 123") == [9707, 11, 1879, 0, 220, 108386, 220, 16, 17, 18]


def test_the_prompt_is_the_released_template_character_by_character():
    ids = chat_ids(TOY, "sailvl-chat", [("What is it?", None)], [2], 9)
    text = TOY.decode(ids, skip_special=False)
    assert text == ("<|im_start|>system\n你是由抖音内容理解组开发的多模态大模型，英文名叫UniVL, 是一个有用无害的人工智能助手。<|im_end|>"
                    "<|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 18 + "</img>\nWhat is it?<|im_end|>"
                    "<|im_start|>assistant\n")
    text = TOY.decode(chat_ids(TOY, "internvl2_5", [("a", "b"), ("c", None)], [], 9), skip_special=False)
    assert text.endswith("<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


@given(st.lists(st.tuples(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_supervised_tokens_are_the_answers_and_their_end_and_nothing_else(turns):
    import unicodedata
    turns = [(q.replace("<image>", ""), a) for q, a in turns]
    turns = [(q if q.strip() else "q", a if a.strip() else "a") for q, a in turns]
    talk_ = [{"from": f, "value": v} for q, a in turns for f, v in (("human", q), ("gpt", a))]
    row = {"id": "x", "conversations": talk_}
    ids, labels = render(row, TOY, "sailvl-chat", [], 9)
    said = TOY.decode([int(i) for i in labels if i != IGNORE], skip_special=False)
    assert said == "".join(unicodedata.normalize("NFC", a) + "<|im_end|>" for _, a in turns)
    assert all(labels[t] in (IGNORE, ids[t + 1]) for t in range(len(ids) - 1)) and labels[-1] == IGNORE


def test_a_wrong_number_of_image_placeholders_is_refused():
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        render(talk("<image><image> what?", id="x"), TOY, "sailvl-chat", [1], 9)


def spans(ids, tokenizer):
    """Lengths of the runs of <IMG_CONTEXT> between <img> and </img>; nothing else may stand there, nor outside."""
    start, end, found = tokenizer.special["<img>"], tokenizer.special["</img>"], []
    for i in np.flatnonzero(ids == start):
        n = int(np.flatnonzero(ids[i:] == end)[0]) - 1
        assert (ids[i + 1:i + 1 + n] == tokenizer.image_id).all()
        found.append(n)
    assert sum(found) == (ids == tokenizer.image_id).sum() and len(found) == (ids == end).sum()
    return found


def test_context_tokens_are_256_a_tile_for_1000_random_images_and_prompts():
    """R16, the arithmetic at full size: one to four images of any size, placeholders anywhere."""
    rng = np.random.default_rng(16)
    for i in range(1000):
        sizes = np.exp(rng.uniform(0, np.log(5000), (rng.integers(1, 5), 2))).astype(int).tolist()
        n_tiles = [images.count_tiles(w, h, 1, int(rng.integers(1, 13))) for w, h in sizes]
        words = [" ".join(["word"] * int(rng.integers(0, 9))) for _ in range(len(sizes) + 1)]
        text = "?" + "<image>".join(words) if rng.random() < 0.5 else "What are they?"   # or no placeholder at all
        ids, _ = render(talk(text, "Ok.", id=str(i)), TOY, "sailvl-chat", n_tiles, 256)
        assert spans(ids, TOY) == [256 * n for n in n_tiles]


def test_no_image_span_is_cut_and_a_picture_that_changed_is_left_out_with_its_id(tmp_path):
    """R16, with real pictures and tight packs."""
    rng, rows = np.random.default_rng(5), []
    for k in range(20):
        size = np.exp(rng.uniform(2, 6, 2)).astype(int).tolist() if k else (336, 84)
        (tmp_path / f"{k}.png").write_bytes(picture(*size))
    for i in range(100):
        rows.append(talk("See: " * int(rng.integers(1, 9)), "Ok.", id=f"r{i}",
                         image=[f"{k}.png" for k in rng.integers(0, 20, rng.integers(1, 5))]))
    sources = open_sources(write_rows(tmp_path, rows), TOY, "sailvl-chat")
    packs, seen = Packs(sources, TOY, "sailvl-chat", **KW), 0
    for pack in itertools.takewhile(lambda pack: pack.position[0] == 0, packs.sequence()):
        batch = packs[pack]
        planned = [9 * n for _, _, tiles in pack.samples for n in tiles]
        assert spans(batch["tokens"].numpy(), TOY) == planned and sum(planned) == 9 * len(batch["tiles"])
        seen += len(batch["ids"])
    assert seen > 80
    (tmp_path / "0.png").write_bytes(picture(84, 84))           # another shape than the index saw
    bad = {b["id"]: b["reason"] for p in itertools.takewhile(lambda p: p.position[0] == 0, packs.sequence())
           for b in packs[p]["bad"]}
    assert bad and all("0.png" in rows[int(i[1:])]["image"] for i in bad)
    assert all("tiles where" in reason and "were planned" in reason for reason in bad.values())


# ---- formats ----

def test_every_source_format_gives_the_same_documents(tmp_path):
    picture_file = picture(168, 84)
    llava = [talk("<image>\nWhat?", "Red.", id="a", image="p.png")]
    parts = [{"type": "image", "image": "p.png"}, {"type": "text", "text": "What?"}]
    messages = [{"id": "a", "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Red."}]}]
    for name in ("jsonl", "json", "messages", "folder", "tar"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(picture_file)
    write_rows(tmp_path / "jsonl", llava)
    (tmp_path / "json" / "rows.json").write_text(json.dumps(llava))
    write_rows(tmp_path / "messages", messages)
    (tmp_path / "folder" / "p.json").write_text(json.dumps(talk("<image>\nWhat?", "Red.")))
    with tarfile.open(tmp_path / "tar" / "s.tar", "w") as tar:
        for name, content in (("a.json", json.dumps(llava[0]).encode()), ("a.png", picture_file)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "meta.json").write_text("\ufeff" + json.dumps(         # with a byte-order mark, as editors write it
        {"m": {"root": "jsonl", "annotation": "jsonl/rows.jsonl"}}))
    batches = []
    for spec in ("jsonl/rows.jsonl", "json/rows.json", "messages/rows.jsonl", "folder", "tar/s.tar", "meta.json"):
        packs = Packs(open_sources(str(tmp_path / spec), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
        batches.append(packs[next(packs.sequence())])
    for batch in batches[1:]:
        assert torch.equal(batch["tokens"], batches[0]["tokens"]) and torch.equal(batch["labels"], batches[0]["labels"])
        assert torch.equal(batch["tiles"], batches[0]["tiles"]) and batch["tiles"].shape == (3, 3, 84, 84)


def test_a_folder_of_captioned_pictures_and_a_brace_pattern_of_tars_are_read(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jpg").write_bytes(picture())
    (tmp_path / "f" / "a.txt").write_text("a red square")
    for k in range(3):
        with tarfile.open(tmp_path / f"s-{k:03d}.tar", "w") as tar:
            for name, content in ((f"{k}.txt", b"red"), (f"{k}.jpg", picture())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    sources = open_sources(f"{tmp_path}/f,{tmp_path}/s-{{000..002}}.tar", TOY, "sailvl-chat")
    assert len(sources) == 4 and sum(len(s.rows) for s in sources) == 4
    assert chat.conversation(sources[0].row(0))[1] == [(chat.CAPTION_PROMPT, "a red square")]


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the real pictures are not part of this repository")
def test_real_photos_charts_and_receipts_go_through_in_their_own_formats(tmp_path):
    import shutil
    tok = Tokenizer(SHARED / "tokenizer" / "qwen2")
    for name, file in (("receipts", "receipts.jsonl"), ("charts", "charts.json")):
        shutil.copytree(SHARED / "data" / name, tmp_path / name, copy_function=shutil.copyfile)
        packs = Packs(open_sources(str(tmp_path / name / file), tok, "sailvl-chat"), tok, "sailvl-chat", tile_size=448,
                      tokens_per_tile=256, max_tiles=6, tokens_per_pack=8192, tiles_per_pack=24)
        batch = packs[next(packs.sequence())]
        assert packs.n_bad <= 1 and not batch["bad"] and len(batch["tiles"]) > 1   # one receipt has an empty answer
        assert (batch["tokens"] == tok.image_id).sum() == 256 * len(batch["tiles"])


# ---- order and packs ----

@given(st.integers(1, 3000), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_of_an_epoch_is_a_permutation(n, seed, epoch):
    order = permute(np.arange(n), n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert n < 50 or (order != permute(np.arange(n), n, seed, epoch + 1)).any()


def test_every_sample_comes_exactly_once_an_epoch_and_budgets_hold(tmp_path):
    sources = open_sources(some_rows(tmp_path, 301), TOY, "sailvl-chat")
    packs, seen, dropped = Packs(sources, TOY, "sailvl-chat", seed=3, window=64, **KW), [], 0
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
    spec = write_rows(tmp_path, [talk("<image>\nWhat?", "Red.", image="p.png"), talk("long " * 400, "Red.")])
    sources = open_sources(spec, TOY, "sailvl-chat")
    budget = int(sources[0].rows[0]["tokens"]) + 30           # 45 for 4 tiles and a thumbnail, 27 for 2 and one
    packs = Packs(sources, TOY, "sailvl-chat", **(KW | dict(tokens_per_pack=budget)))
    pack = next(packs.sequence())
    assert len(pack.samples) == 1 and pack.counts == {"used": 1, "too_long": 1}
    batch = packs[pack]
    assert len(batch["tiles"]) == 3 and (batch["tokens"] == TOY.image_id).sum() == 27


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_sequence_of_packs_does_not_depend_on_ranks_workers_or_where_it_resumed(tmp_path, world):
    sources = open_sources(some_rows(tmp_path, 120), TOY, "sailvl-chat")
    packs = Packs(sources, TOY, "sailvl-chat", window=50, packs_per_step=4, **KW)
    want = [packs[p]["ids"] for p, _ in zip(packs.sequence(), range(24))]
    for workers in (0, 2):
        loaders = [iter(make_loader(packs, rank, world, workers)) for rank in range(world)]
        got = [next(loaders[k % world]) for k in range(16)]
        assert [b["ids"] for b in got] == want[:16]
    again = iter(make_loader(packs, 0, 1, 0, got[-1]["position"], got[-1]["counts"]))
    assert [next(again)["ids"] for _ in range(8)] == want[16:]


def test_padded_packs_have_one_length_and_ask_nothing_more(tmp_path):
    source = some_rows(tmp_path, 40)
    make = lambda pad: Packs(open_sources(source, TOY, "sailvl-chat"), TOY, "sailvl-chat", pad=pad, **KW)
    for pack in itertools.islice(make(False).sequence(), 5):
        plain, padded = make(False)[pack], make(True)[pack]
        n = len(plain["tokens"])
        assert len(padded["tokens"]) == 300 == padded["cu_seqlens"][-1] and padded["size"] == plain["size"]
        assert (padded["tokens"][:n] == plain["tokens"]).all() and (padded["labels"][n:] == IGNORE).all()


def test_a_blind_run_sees_gray_tiles_and_the_same_text(tmp_path):
    sources = open_sources(some_rows(tmp_path, 20), TOY, "sailvl-chat")
    seen, blind = (Packs(sources, TOY, "sailvl-chat", image_as=image_as, **KW) for image_as in ("pixels", "blank"))
    a, b = seen[next(seen.sequence())], blind[next(blind.sequence())]
    assert (a["tokens"] == b["tokens"]).all() and a["tiles"].shape == b["tiles"].shape and len(a["tiles"])
    assert (b["tiles"] == images.GRAY).all() and not (a["tiles"] == images.GRAY).all()


def test_samples_that_are_all_too_long_stop_the_run_with_what_to_do(tmp_path):
    sources = open_sources(some_rows(tmp_path, 9), TOY, "sailvl-chat")
    packs = Packs(sources, TOY, "sailvl-chat", **KW | dict(tokens_per_pack=5))
    with pytest.raises(ValueError, match="raise --tokens_per_pack"):
        next(packs.sequence())


def test_documents_of_a_pack_are_the_documents_alone(tmp_path):
    packs = Packs(open_sources(some_rows(tmp_path, 12), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    batch = packs[next(packs.sequence())]
    for a, b in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:]):
        assert batch["positions"][a:b].tolist() == list(range(b - a)) and batch["labels"][b - 1] == IGNORE


def test_unreadable_samples_are_left_out_named_and_counted(tmp_path):
    (tmp_path / "good.png").write_bytes(picture())
    noise = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(noise, "JPEG")            # its header is whole
    (tmp_path / "half.png").write_bytes(noise.getvalue()[:20000])
    (tmp_path / "page.png").write_text("<html>not found</html>")
    rows = [talk(image="good.png", id="good"), talk(image="half.png", id="half"), talk(image="page.png", id="page"),
            talk(image="gone.png", id="gone"), talk("<image><image>?", image="good.png", id="two"),
            talk(answer=" ", image="good.png", id="empty")]
    spec = write_rows(tmp_path, rows)
    with open(spec, "a") as file:
        file.write("{broken json\na stray line\n")
    packs = Packs(open_sources(spec, TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    batch = packs[next(packs.sequence())]
    assert batch["ids"] == ["good"] and [b["id"] for b in batch["bad"]] == ["half"]
    reasons = " ".join(b["reason"] for b in packs.sources[0].meta["bad"])
    assert packs.n_bad == 6 and "gone.png" in reasons and "placeholders" in reasons and "empty gpt turn" in reasons


def test_an_empty_data_set_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="no usable sample.*data.py check"):
        Packs(open_sources(write_rows(tmp_path, []), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_sources(str(tmp_path / "nothing.jsonl"), TOY, "sailvl-chat")


def test_the_index_is_rebuilt_when_the_file_changes(tmp_path):
    spec = write_rows(tmp_path, [talk()])
    assert len(open_sources(spec, TOY, "sailvl-chat")[0].rows) == 1
    write_rows(tmp_path, [talk(), talk()])
    assert len(open_sources(spec, TOY, "sailvl-chat")[0].rows) == 2


def test_a_row_that_was_mended_is_read_without_touching_its_file(tmp_path):
    spec = write_rows(tmp_path, [talk(image="late.png"), talk()])
    assert len(open_sources(spec, TOY, "sailvl-chat")[0].meta["bad"]) == 1
    (tmp_path / "late.png").write_bytes(picture())
    assert open_sources(spec, TOY, "sailvl-chat")[0].meta["bad"] == []


def test_openai_image_urls_are_read_and_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    part = lambda **more: {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, more]},
                                        {"role": "assistant", "content": "This."}]}
    rows = [part(type="image_url", image_url={"url": "a.png"}), part(type="video_url", video_url={"url": "a.mp4"}),
            talk(video="a.mp4")]
    source, = open_sources(write_rows(tmp_path, rows), TOY, "sailvl-chat")
    assert source.rows["n_images"].tolist() == [1, 0, 0]
    reasons = [bad["reason"] for bad in source.meta["bad"]]
    assert len(reasons) == 2 and "video_url" in reasons[0] and "a video" in reasons[1]


def test_other_budgets_order_or_steps_are_other_data(tmp_path):
    sources = open_sources(write_rows(tmp_path, [talk()]), TOY, "sailvl-chat")
    marks = {Packs(sources, TOY, "sailvl-chat", **KW | more).fingerprint
             for more in ({}, dict(seed=9), dict(tokens_per_pack=399), dict(packs_per_step=3), dict(shuffle=False))}
    assert len(marks) == 5


def test_a_damaged_tar_is_named(tmp_path):
    (tmp_path / "cut.tar").write_bytes(b"not a tar at all" * 99)
    with pytest.raises(ValueError, match="cut.tar is no whole tar file"):
        open_sources(f"{tmp_path}/cut.tar", TOY, "sailvl-chat")


def test_check_names_the_line_and_show_prints_what_the_model_sees(tmp_path, capsys):
    (tmp_path / "p.png").write_bytes(picture())
    rows = [talk("<image>\nWhat?", "Red.", image="p.png", id="a"), {"id": "b", "conversations": []}]
    spec = write_rows(tmp_path, rows)
    assert data.check_sources([spec]) == 1
    assert "line 2" in capsys.readouterr().out
    data.show_samples(Packs(open_sources(spec, TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW), 1)
    seen = "<img><IMG_CONTEXT x 9></img>\nWhat?<|im_end|><|im_start|>assistant\n[[Red.<|im_end|>]]"
    assert seen in capsys.readouterr().out


# ---- sources that go wrong ----

def test_sources_keep_no_file_open_and_one_spelt_otherwise_is_one_index(tmp_path, monkeypatch):
    for k in range(40):
        write_rows(tmp_path, [talk(id=f"{k}")], f"{k}.jsonl")
    before = len(os.listdir("/proc/self/fd"))
    sources = open_sources(f"{tmp_path}/*.jsonl", TOY, "sailvl-chat")
    assert sum(len(s.rows) + len(s.images) for s in sources) == 40 and len(os.listdir("/proc/self/fd")) == before
    monkeypatch.chdir(tmp_path)
    open_sources("7.jsonl,./7.jsonl", TOY, "sailvl-chat")
    assert len([*tmp_path.glob(".7.jsonl.index-*")]) == 1


def test_a_row_that_no_tokenizer_or_memory_can_take_is_quarantined(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1_500_000)
    rows = [talk("blanks" + " " * 1_000_000, id="a"), talk("long" * 400_000, id="b"), talk(id="c")]
    source, = open_sources(write_rows(tmp_path, rows), TOY, "sailvl-chat")
    blanks, long = [bad["reason"] for bad in source.meta["bad"]]
    assert source.rows["size"].sum() == os.path.getsize(tmp_path / "rows.jsonl")
    assert "cannot be split into tokens" in blanks and "a row of 1600098 bytes" in long and source.row(2)["id"] == "c"


def test_a_row_that_changes_while_a_run_reads_it_is_quarantined_not_fatal(tmp_path):
    row = json.dumps(talk("<image>\nWhat?", id="a", image=["p.png"]))
    (tmp_path / "p.png").write_bytes(picture())
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    sources = open_sources(f"{tmp_path}/rows.jsonl", TOY, "sailvl-chat")
    packs = Packs(sources, TOY, "sailvl-chat", **KW)
    (tmp_path / "rows.jsonl").write_text(row.replace('["p.png"]', "[]       ") + "\n")
    batch = packs[next(packs.sequence())]
    assert [bad["id"] for bad in batch["bad"]] == ["a"] and batch["ids"] == []


def test_a_caption_file_or_array_of_another_kind_is_named(tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, text in (("a.json", "[1]"), ("b.txt", "\ufeffA cat."), ("c.txt", "[sic] {a} cat")):
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name[0]}.png").write_bytes(picture())
    (folder / "d.png").write_bytes(picture())
    (folder / "d.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert data.check_sources([str(folder)]) == 2
    out = capsys.readouterr().out
    assert "a.png" in out and "holds a list, not a dict" in out and "d.png" in out and "utf-8" in out and "2 bad" in out
    source, = open_sources(str(folder), TOY, "sailvl-chat")
    assert [source.row(k)["caption"] for k in (1, 2)] == ["A cat.", "[sic] {a} cat"]
    (folder / "a.json").write_text('{"caption": "A dog."}')            # what is beside it is not looked at
    (folder / "a.txt").write_bytes(b"\xe9")
    (folder / "d.txt").unlink()
    (folder / "d.txt").mkdir()
    (folder / "e.png").write_bytes(picture())
    (folder / "e.txt").write_text("far too long " * 9_000_000)
    assert data.check_sources([str(folder)]) == 2
    out = capsys.readouterr().out
    assert "d.png" in out and "directory" in out and "e.txt has more than" in out and "5 rows, 3 good, 2 bad" in out
    (folder / "e.txt").unlink()
    (tmp_path / "number.json").write_text("7")
    with pytest.raises(ValueError, match="number.json holds a int, not a list"):
        open_sources(f"{tmp_path}/number.json", TOY, "sailvl-chat")
    (tmp_path / "none.jsonl").write_text("")
    assert data.check_sources([f"{tmp_path}/none.jsonl"]) == 1
    (tmp_path / "rows.jsonl.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack it"):
        open_sources(f"{tmp_path}/rows.jsonl.gz", TOY, "sailvl-chat")


def test_a_bare_caption_in_a_tar_is_text_whatever_it_begins_with(tmp_path):
    with tarfile.open(tmp_path / "a.TAR", "w") as tar:
        for name, content in (("1.jpg", picture()), ("1.txt", b"{a} cat"), ("2.png", picture()), ("2.TXT", b"[sic]"),
                              ("3.png", picture()), ("3.json", b'{"caption": "A dog."}')):
            tars.add_member(tar, name, content)
    source, = open_sources(f"{tmp_path}/a.TAR", TOY, "sailvl-chat")
    assert [source.row(k)["caption"] for k in range(3)] == ["{a} cat", "[sic]", "A dog."] and not source.meta["bad"]


def test_check_looks_at_the_pictures_of_a_tar_that_the_index_found(tmp_path, capsys):
    row = lambda *names: json.dumps({"image": [*names], "caption": "Two."}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.png", picture()), ("1.json", row("1.png", "gone.png")),
                              ("2.a.png", picture()), ("2.b.png", picture()[:60]), ("2.json", row("http://x/y.jpg")),
                              ("3.png", picture()), ("3.json", row("gone.png", "gone.jpg"))):
            tars.add_member(tar, name, content)
    assert data.check_sources([f"{tmp_path}/a.tar"]) == 1
    out = capsys.readouterr().out
    assert "row 2: image 2: " in out and "damaged picture" in out and "3 rows, 2 good, 1 bad" in out


def test_a_folder_that_changed_below_its_top_is_indexed_again(tmp_path):
    below = tmp_path / "folder" / "b"
    below.mkdir(parents=True)
    for name, text in (("p", "Old."), ("q", "Other.")):
        (below / f"{name}.png").write_bytes(picture())
        (below / f"{name}.txt").write_text(text)
    captions = lambda: [s.row(k)["caption"] for s in open_sources(f"{tmp_path}/folder", TOY, "sailvl-chat") for k in
                        range(len(s.rows))]
    assert captions() == ["Old.", "Other."]
    (below / "p.txt").write_text("New and longer.")
    assert captions() == ["New and longer.", "Other."]
    (below / "dangling").symlink_to("/nowhere")
    n = len([*tmp_path.glob(".folder.index-*")])
    for _ in range(3):                                                 # the index of a part of it is no change
        assert captions() == ["New and longer.", "Other."]
        open_sources(str(below), TOY, "sailvl-chat")
    assert len([*tmp_path.glob(".folder.index-*")]) == n
    (below / "q.png").unlink()
    assert captions() == ["New and longer."]


def test_what_is_there_as_it_is_written_goes_before_patterns_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[1].jsonl", "1.jsonl", "a{0..1}.jsonl", "year=2026/x.jsonl", "year=2026/x8.jsonl", "k/year=2026/x.jsonl"):
        write_rows(Path(name).parent, [talk()], Path(name).name)
    spec = "[1].jsonl,a{0..1}.jsonl,year=2026/*.jsonl,year=2026/x{7..8}.jsonl,"
    spec += "k/year=2026/x.jsonl,mine=[1].jsonl,theirs=b=c{0..1}.jsonl"
    assert [(name, str(path)) for name, path in sources_module.expand_paths(spec)] == [
        ("", "[1].jsonl"), ("", "a{0..1}.jsonl"), ("", "year=2026/x.jsonl"), ("", "year=2026/x8.jsonl"),
        ("", "year=2026/x7.jsonl"), ("", "year=2026/x8.jsonl"), ("", "k/year=2026/x.jsonl"),
        ("mine", "[1].jsonl"), ("theirs", "b=c0.jsonl"), ("theirs", "b=c1.jsonl")]


class Deadly(torch.utils.data.Dataset):
    sources = ()

    def __len__(self):
        return 9

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line_that_says_what_to_try(capsys):
    with pytest.raises(SystemExit):
        configurator.run_script(lambda: next(iter(data.Loader(Deadly(), num_workers=1, batch_size=None))))
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: DataLoader worker") and told.endswith("Try fewer --num_workers")


def test_no_room_in_shared_memory_is_one_line(tmp_path, monkeypatch):
    packs = Packs(open_sources(some_rows(tmp_path, 9), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", lambda size: torch.empty(0).expand(-7))
    with pytest.raises(OSError, match="MB of tiles in shared memory.*--shm-size.*fewer --num_workers"):
        next(iter(make_loader(packs, num_workers=2)))


def test_tiles_that_come_from_workers_are_those_the_main_process_makes(tmp_path):
    packs = Packs(open_sources(some_rows(tmp_path, 60), TOY, "sailvl-chat"), TOY, "sailvl-chat", **KW, seed=3)
    planned, batches = packs.sequence(), [iter(make_loader(packs, num_workers=n)) for n in (1, 3)]
    kept = []
    for _ in range(30):                                                # more than there are slots, two loaders at once
        want = packs[next(planned)]
        kept += [(want, next(b)) for b in batches]
    for want, got in kept:                                             # all at the end: nothing was written over
        assert want["ids"] == got["ids"] and torch.equal(want["tiles"], got["tiles"])


@pytest.mark.nightly
def test_processes_that_index_end_where_their_parent_was_killed(tmp_path):
    code = ("import os, time, data, multiprocessing as m, concurrent.futures as c\n"
            "if __name__ == '__main__':\n    pool = c.ProcessPoolExecutor(1, m.get_context('spawn'), index._reading, ((),))\n"
            "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)")
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    child = int(parent.stdout.readline())
    parent.kill()
    end = time.time() + 20
    while os.path.exists(f"/proc/{child}/cwd") and time.time() < end:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{child}/cwd")
