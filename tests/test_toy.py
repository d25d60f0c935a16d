"""toy.py: exact truth, determinism, a clean split, real tiling."""
import json
import random
import re
import time
from pathlib import Path

import pytest
import torch

from toy import __main__ as toy
from inputs.chat import render
from inputs.packing import Packs
from inputs.sources import open_sources
from inputs.tokenizer import Tokenizer
from inputs.images import count_tiles, tile_grid

TOY = Tokenizer(Path(__file__).parent.parent / "toy" / "tokenizer")


def test_samples_are_a_pure_function_of_the_seed():
    for part in toy.LEVELS:
        (a, boards_a), (b, boards_b) = toy.record(5, part, 7), toy.record(5, part, 7)
        assert a == b and [toy.jpeg(toy.render(*x)) for x in boards_a] == [toy.jpeg(toy.render(*x)) for x in boards_b]
        assert toy.record(6, part, 7)[0] != a


def test_training_and_benchmarks_share_no_board_and_no_sign_word():
    truth = lambda board: (board.grid, tuple(sorted(board.cells.items())))
    train = [board for i in range(1500) for board, _ in toy.record(1, "knowledge", i)[1]]
    held = [toy.bench_row(name, 1, i)[1] for name in toy.BENCHMARKS for i in range(200)]
    assert not {truth(b) for b in train} & {truth(b) for b in held}
    words = lambda boards: {b.things[0] for b in boards if b.kind == "sign"}
    assert not words(train) & words(held) and words(held)


def test_every_board_is_tiled_as_its_truth_says_whatever_the_size_of_the_picture():
    grids = set()
    for i in range(400):
        row, boards = toy.record(2, "pretrain", i)
        (board, rng), = boards
        image = toy.render(board, rng)
        assert tile_grid(*image.size, 1, 4, 84) == board.grid
        assert len(row["cells"][0]) == 9 * count_tiles(*image.size, 1, 4, 84)
        grids.add(board.grid)
    assert len(grids) >= 6


def test_every_cell_word_is_one_token_and_no_unseen_word_is():
    assert all(len(TOY.encode(" " + word)) == 1 for word in toy.CELL_WORDS + toy.PLACE_WORDS)
    assert len(TOY.encode("MATEKU")) == 6
    for i in range(300):
        for cells in toy.record(3, "instruction", i)[0]["cells"]:
            what, where = zip(*(cell.split() for cell in cells))
            assert set(what) <= set(toy.CELL_WORDS) and [*where] == toy.PLACE_WORDS * (len(cells) // 9)


def test_answers_agree_with_the_truth():
    for i in range(300):
        row, board, _ = toy.bench_row("toy_count", 4, i)
        word = row["question"].split()[2]
        kind = {"crosses": "cross"}.get(word, word[:-1])
        n = sum(word in ("shapes",) or t[1] == word or t[2] == kind for t in board.things)
        assert row["answer"] == str(n), row
        row, board, _ = toy.bench_row("toy_halluc", 4, i)
        color, kind = row["question"].split()[3:5]
        assert row["answer"] == toy.yes(any(t[1:3] == (color, kind) for t in board.things))
        row, board, _ = toy.bench_row("toy_ocr", 4, i)
        if board.kind == "sign":
            assert row["answer"] == board.things[0]
        row, board, _ = toy.bench_row("toy_chart", 4, i)
        if row["question"].startswith("What is the value of"):
            assert row["answer"] == str(dict(board.things)[row["question"][:-1].split()[-1]])
        row, board, _ = toy.bench_row("toy_general", 4, i)
        assert row["answer"] in row and len({row[x] for x in "ABCD" if x in row}) == sum(x in row for x in "ABCD")


def test_the_drill_tells_the_way_to_a_neighbour_and_offers_what_is_in_the_picture():
    rng, told, hard = random.Random(3), 0, 0
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    spot = lambda row, column: toy.PLACES[row % 3 * 3 + column % 3]
    for _ in range(300):
        board = toy.draw_board(rng, "scene", False)
        at = {(row, column): f"{color} {kind}" for _, color, kind, row, column in board.things}
        for question, answer in toy.drill_turns(board, rng):
            if way := re.fullmatch(r"Wh(?:at|ich place) is just (.+) the (\w+ \w+)\?(?: Explain\.)?", question):
                (here,) = [cell for cell, name in at.items() if name == way[2]]
                there = here[0] + steps[way[1]][0], here[1] + steps[way[1]][1]
                name = at.get(there, "nothing")
                assert answer == (spot(*there) if "Which" in question else
                                  f"{spot(*here)}, {spot(*there)}: {name}" if "Explain" in question else name)
                told += 1
            if "colour" in question and "A. " in question:
                options = set(re.findall(r"^[A-D]\. (.+)$", question, re.M))
                assert options <= (seen := {color for _, color, *_ in board.things}) or seen <= options
                hard += 1
    assert told > 100 and hard > 50, (told, hard)


def test_the_listing_names_every_cell_in_the_order_of_the_visual_tokens():
    for i in range(100):
        row, boards = toy.record(3, "pretrain", i)
        words = toy.listing(boards[0][0]).split()[1:]
        assert words == [cell.split()[0] for cell in row["cells"][0]][:len(words)] and len(words) == 9 * boards[0][0].grid[0] * boards[0][0].grid[1]


def test_answers_cannot_be_guessed_from_the_question():
    answers = [toy.bench_row("toy_halluc", 1, i)[0]["answer"] for i in range(400)]
    assert 0.4 < answers.count("Yes") / 400 < 0.6
    letters = [toy.bench_row("toy_general", 1, i)[0]["answer"] for i in range(400)]
    assert all(letters.count(x) > 60 for x in "AB")


def test_alt_text_says_less_than_the_caption():
    rows = [toy.record(1, "pretrain", i)[0] for i in range(200)]
    assert sum(len(r["alt_text"]) for r in rows) < 0.7 * sum(len(r["caption"]) for r in rows)


def test_shards_are_ordinary_webdataset_tars_and_a_finished_shard_is_kept(tmp_path, monkeypatch):
    cfg = toy.Config(out=str(tmp_path), n=40)
    toy.write_parts(cfg, ["instruction"])
    path = tmp_path / "instruction-000000.tar"
    before = path.stat().st_mtime_ns
    toy.write_parts(cfg, ["instruction"])
    assert path.stat().st_mtime_ns == before
    packs = Packs(open_sources(str(path), TOY, "sailvl-chat"), TOY, "sailvl-chat", tile_size=84, tokens_per_tile=9,
                  max_tiles=4, tokens_per_pack=600, tiles_per_pack=40)
    assert packs.n == 40 and packs.n_bad == 0
    batch = packs[next(packs.sequence())]
    assert not batch["bad"] and (batch["tokens"] == TOY.image_id).sum() == 9 * len(batch["tiles"])


def test_words_and_cell_labels_stand_where_the_visual_tokens_stand(tmp_path):
    toy.write_parts(toy.Config(out=str(tmp_path), n=20), ["pretrain"])
    batches = {}
    for name in (("pixels", "none"), ("words", "none"), ("words", "also"), ("pixels", "also"), ("pixels", "only")):
        packs = Packs(open_sources(f"{tmp_path}/*.tar", TOY, "sailvl-chat", name[0]), TOY, "sailvl-chat", tile_size=84,
                      tokens_per_tile=9, max_tiles=4, tokens_per_pack=4000, tiles_per_pack=200, image_as=name[0],
                      cell_labels=name[1], loss_weight="sample")
        batches[name] = packs[next(packs.sequence())]
    plain, words = batches["pixels", "none"], batches["words", "none"]["tiles"]
    at = plain["tokens"] == TOY.image_id
    assert at.any() and len({tuple(batch["ids"]) for batch in batches.values()}) == 1
    assert words.shape == (at.sum(), 2) and (batches["words", "none"]["tokens"] == plain["tokens"]).all()
    assert set(TOY.decode([i]) for i in words[:, 1]) <= {f" {place}" for place in toy.PLACE_WORDS}
    for name in (("words", "also"), ("pixels", "also"), ("pixels", "only")):
        said = torch.stack([batches[name]["labels"][at] == word for word in words.T])   # each cell says its own word
        assert said.any(0).all() and (name[1] == "only" or said[0].all())
        assert name[1] == "also" or (said[0, 1:] != said[0, :-1]).float().mean() > 0.8  # or, by turns, its place
        others = -100 if name[1] == "only" else plain["labels"][~at]
        assert (batches[name]["labels"][~at] == others).all()
    assert (batches["pixels", "also"]["weights"] == plain["weights"]).all()        # answers weigh what they weighed


def test_rows_without_cells_cannot_be_labelled_with_cells(tmp_path):
    row = {"id": "a", "image": "a.png", "caption": "a cat"}
    (tmp_path / "text.jsonl").write_text(json.dumps({"id": "b", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "cells": None}))
    packs = Packs(open_sources(f"{tmp_path}/text.jsonl", TOY, "sailvl-chat"), TOY, "sailvl-chat", tile_size=84,
                  tokens_per_tile=9, tokens_per_pack=400, tiles_per_pack=9, cell_labels="also")
    assert packs[next(packs.sequence())]["ids"] == ["b"]               # text alone has no cells and needs none
    for how in (dict(image_as="words"), dict(cell_labels="also")):
        with pytest.raises(ValueError, match="need `cells`, which only toy data has"):
            render(row, TOY, "sailvl-chat", [1], 9, **how)


def test_drawing_is_fast_enough_to_be_free(capsys):
    start = time.perf_counter()
    for i in range(60):
        for board, rng in toy.record(1, "pretrain", i)[1]:
            toy.jpeg(toy.render(board, rng))
    rate = 60 / (time.perf_counter() - start)
    with capsys.disabled():
        print(f" [{rate:.0f} samples/s on this machine]", end="")
    assert rate > 0
