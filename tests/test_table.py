"""The table of benchmarks, its protocols and their hash."""

import dataclasses

import pytest

from evals import scorers, table


def test_the_table_is_the_papers():
    groups = [b.group for b in table.PAPER.values()]
    assert [groups.count(g) for g in dict.fromkeys(groups)] == [7, 7, 2, 2]
    assert len({b.md5 for b in table.PAPER.values()}) == 18
    tiles = {name: b.tiles for name, b in table.PAPER.items() if b.tiles != 6}
    assert tiles == {
        "MMMU_VAL": 12,
        "ChartQA_TEST": 12,
        "OCRVQA_TESTCORE": 12,
        "DocVQA_VAL": 18,
        "InfoVQA_VAL": 24,
        "OCRBench": 24,
    }
    needs_judge = [name for name, b in table.PAPER.items() if b.judge == "required"]
    assert needs_judge == ["MMVet", "MathVista_MINI"]
    drops_period = [name for name, b in table.PAPER.items() if b.period]
    assert drops_period == ["ChartQA_TEST", "OCRVQA_TESTCORE"]
    later = table.PROTOCOLS["vlmevalkit-2026-08"]
    assert later["MMStar"].tiles == 10
    assert later["OCRBench"].tiles == 24
    assert later["MME"].max_new_tokens == 1024
    # its yes and no are read with the full stops of 2025, so that MME is recent too
    assert later["MMStar"].recent and later["MME"].recent and not later["DocVQA_VAL"].recent
    assert table.PAPER["ChartQA_TEST"].scorer is scorers.swapped_relaxed_accuracy
    assert later["ChartQA_TEST"].scorer is scorers.relaxed_accuracy
    assert {b.two_scales for b in table.PAPER.values()} == {False}
    assert {b.two_scales for name, b in later.items() if name in table.PAPER} == {True}
    assert later["toy_ocr"] == table.TOY["toy_ocr"]


def test_the_protocol_that_was_no_version_of_vlmevalkit_is_refused_with_the_new_name():
    with pytest.raises(ValueError, match="2025-04: it mixed rules .*; use vlmevalkit-2026-08"):
        table.parse_benchmarks("toy", "vlmevalkit-2025-04")


def test_addresses_are_where_vlmevalkit_has_the_files_and_decide_no_score():
    moved = {
        "MMBench_DEV": "benchmarks/MMBench",
        "SEEDBench_IMG": "benchmarks/SEEDBench",
        "ScienceQA": "benchmarks/ScienceQA",
    }
    folders = {name: b.folder for name, b in table.PAPER.items()}
    assert folders == dict.fromkeys(table.PAPER, "VLMEval") | moved
    mme = table.PAPER["MME"]
    before = table.protocol_hash([mme])
    assert table.protocol_hash([dataclasses.replace(mme, folder="elsewhere")]) == before
    assert table.protocol_hash([dataclasses.replace(mme, tiles=5)]) != before


def test_names_of_benchmarks_and_of_their_files():
    def names(text):
        return list(table.parse_benchmarks(text))

    assert names("toy") == ["toy_general", "toy_ocr", "toy_chart", "toy_count", "toy_halluc"]
    assert names("toy_ocr, toy_chart,toy_ocr") == ["toy_ocr", "toy_chart"]
    assert names("all") == list(table.PAPER)
    assert names("MMBench_DEV_EN,MME") == ["MMBench_DEV", "MME"]
    for bad in ("toy_orc", "", " , "):
        with pytest.raises(ValueError, match="there are: toy, all"):
            names(bad)
    with pytest.raises(ValueError, match="vlmevalkit-2026-08"):
        table.parse_benchmarks("toy", "sailvl")


def test_protocol_hash_follows_the_rules():
    toy_ocr = table.TOY["toy_ocr"]
    base = table.protocol_hash([toy_ocr])
    assert base == table.protocol_hash([toy_ocr]) and len(base) == 64
    assert base == table.protocol_hash([toy_ocr], max_tiles=4)
    others = {
        table.protocol_hash([table.TOY["toy_chart"]]),
        table.protocol_hash([toy_ocr], max_tiles=9),
        table.protocol_hash([toy_ocr], max_new_tokens=1),
        table.protocol_hash([table.PAPER["MME"]]),
        table.protocol_hash([table.find_benchmark("MME", "vlmevalkit-2026-08")]),
    }
    assert len(others | {base}) == 6


def test_protocol_hash_is_that_of_results_written_before():
    """Results of earlier versions stay comparable: the hash changes with the rules alone.

    They are at version 5: ANLS, ChartQA, options and empty references as VLMEvalKit has them.
    """
    toy = table.protocol_hash(table.TOY.values())
    assert toy == "0ceac8da4e96df508a999c921e2173d2447d1c34290fb9a9eccda24c6d6c0782"
    paper = table.protocol_hash(table.PAPER.values())
    assert paper == "95f54ec29b5f5621666bfced9d2983e134b3e1007f7f88f6abb8a028e2217ba1"
