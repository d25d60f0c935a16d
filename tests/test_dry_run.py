"""--dry_run: parameters, FLOPs and memory of the fact sheet, without building anything."""

import re

import pytest
from test_train import run

import sft
import train


@pytest.mark.parametrize(
    "script, config, parameters, samples, flops, memory",
    [  # per stage; FLOPs as in test_model
        (train, "pretrain_2b", 2_089_762_304, 2048, (17.1308, 27.2837), (4.30, 8.56)),
        (train, "pretrain_8b", 7_947_169_280, 2048, (61.7089, 71.8918), (16.3, 20.5)),
        (sft, "sft_2b", 2_089_762_304, 512, (32.7399,) * 3, (33.4,) * 3),
        (sft, "sft_8b", 7_947_169_280, 512, (98.8287,) * 3, (15.9,) * 3),
    ],
)
def test_dry_run_prints_parameters_flops_and_memory_of_the_fact_sheet_without_building_anything(
    monkeypatch, capsys, script, config, parameters, samples, flops, memory
):
    run(script, [f"config/{config}.py", "--dry_run=True"], monkeypatch)
    text = capsys.readouterr().out
    assert f"685 tensors, {parameters:,} parameters" in text and "days in all" in text
    found = [float(x.replace(",", "")) for x in re.findall(r"([\d,.e+]+) TFLOP per step", text)]
    width, inner = (
        (1536, 8960) if "2b" in config else (3584, 18944)
    )  # what the last block skips, which the
    skipped = (
        2 * (2048 - 192) * (width**2 + 3 * width * inner) / 1e12 * (3 if script is sft else 2)
    )  # sheet has not
    assert found == pytest.approx([samples * (x - skipped) for x in flops], rel=1e-3)
    assert [float(x) for x in re.findall(r"moments: ([\d.]+) GB per GPU", text)] == pytest.approx(
        memory, abs=0.06
    )
