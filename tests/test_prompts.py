"""What a model is asked."""

from benchmark_rows import OPTIONS

from evals import prompts, table


def test_prompts():
    row, short = (
        {"question": "What?", "hint": "", **OPTIONS},
        "Answer the question using a single word or phrase.",
    )
    letter = "Answer with the option's letter from the given choices directly."
    asked = {name: prompts.build_prompt(b.prompt, row) for name, b in table.PAPER.items()}
    for name in ("MathVista_MINI", "MMVet", "POPE"):
        assert asked[name] == "What?"
    for name in (
        "OCRBench",
        "DocVQA_VAL",
        "InfoVQA_VAL",
        "ChartQA_TEST",
        "TextVQA_VAL",
        "OCRVQA_TESTCORE",
    ):
        assert asked[name] == f"What?\n{short}"
    for name in (
        "MMStar",
        "MMBench_DEV",
        "MMMU_VAL",
        "SEEDBench_IMG",
        "RealWorldQA",
        "AI2D_TEST",
        "ScienceQA",
    ):
        assert asked[name] == f"What?\nA. red circle\nB. blue circle\nC. red\n{letter}"
    assert (
        asked["MME"] == f"What? {short}"
        and asked["HallusionBench"] == f"What? Please answer yes or no. {short}"
    )
    assert prompts.build_prompt("mcq", row | {"hint": "Look."}).startswith("Look.\nWhat?\nA. ")
    assert (
        prompts.build_prompt("mcq", {"question": "Q", "A": "红"})
        == "Q\nA. 红\n请直接回答选项字母。"
    )
    assert prompts.build_prompt("mcq", {"question": "Q"}) == "Q\nAnswer the question directly."
    assert prompts.build_prompt("mcq", {"question": "问"}) == "问\n请直接回答问题。"
    assert prompts.build_prompt("plain", row, 2) == "Image-1: <image>\nImage-2: <image>\nWhat?"
