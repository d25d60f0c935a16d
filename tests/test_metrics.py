"""What a run measures: the log, spikes, trackers, peak FLOPs, the printed line, the plot."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train import RunConfig
from training import metrics, plot


@pytest.mark.parametrize("series", [25, pytest.param(100, marks=pytest.mark.nightly)])
def test_spikes_of_ten_sigma_are_found_and_one_step_in_ten_thousand_alarms_at_most(series):
    found = false = steps = 0
    for seed in range(series):
        rng = np.random.default_rng(seed)
        losses = 8 * np.exp(-np.arange(2000) / 400) + 2 + 0.05 * rng.standard_normal(2000)
        spikes = set(rng.choice(np.arange(150, 2000), 5, replace=False).tolist())
        window = []
        for step, loss in enumerate(losses):
            sigmas, window = metrics.spike(window, float(loss) + 0.5 * (step in spikes))
            found += sigmas > metrics.SPIKE and step in spikes
            false += sigmas > metrics.SPIKE and step not in spikes
            steps += 1
    assert found >= 0.99 * 5 * series and false <= steps / 10_000, (found, false)
    assert metrics.spike(window, float("nan")) == (0.0, window)
    alarms = 0
    for _ in range(500):  # a loss that stays up ends the alarm
        sigmas, window = metrics.spike(window, 4.0 + 0.05 * float(rng.standard_normal()))
        alarms += sigmas > metrics.SPIKE
    assert 0 < alarms < 128 and sigmas < metrics.SPIKE


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_is_off_by_default_and_one_that_is_not_installed_says_what_to_do(
    tmp_path, monkeypatch, name
):
    assert metrics.open_tracker(RunConfig(), {}) is None
    monkeypatch.setitem(
        sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None
    )
    with pytest.raises(ValueError, match=f"pip install {name}"):
        metrics.open_tracker(RunConfig(track=name, out_dir=str(tmp_path)), {})
    rows = []
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1}, rows.append)
    assert rows == [{"step": 1}]


def test_a_torn_last_log_line_is_cut_and_every_line_parses(tmp_path):
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1, "loss": float("nan"), "text": "多"})
        f.write(b'{"step": 2, "lo')
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 2, "loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None, "text": "多"}, {"step": 2, "loss": 0.5}]


def test_a_line_of_the_log_that_finds_no_room_is_left_out_whole(tmp_path, capfd):
    class Full(io.FileIO):
        def write(self, data):
            return super().write(data[:10])

    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"step": 1})
    with Full(tmp_path / "log.jsonl", "ab+") as f:
        metrics.log_line(f, {"step": 2, "loss": 0.5})
    assert (
        tmp_path / "log.jsonl"
    ).read_text() == '{"step": 1}\n' and "WARNING: no room" in capfd.readouterr().err


def test_a_bad_sample_that_is_met_again_after_a_restart_is_named_once(tmp_path):
    records = [{"id": "a", "reason": "ä"}, {"id": "b", "reason": "c"}]
    for part in (records[:1], records, records):
        metrics.log_bad(tmp_path, part)
    assert [
        json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    ] == records


# a row of the log
ROW = {
    "stage": "advance",
    "step": 12,
    "steps": 400,
    "loss": 2.34567,
    "lr": {"vision": 1e-5, "llm": 0.0},
    "tokens_per_s": 12345.6,
    "tiles_per_s": 7.5,
    "mfu": None,
    "data_wait": 0.031,
    "memory_gb": 1.25,
    "dropped": 2,
    "quarantined": 3,
    "eta_s": 3725.0,
    "run_eta_s": 7200.0,
    "spike": 0.5,
}


def test_the_step_line_shows_all_that_was_promised():
    assert metrics.format_step(ROW) == (
        "advance 12/400 | loss 2.3457 | lr vision 1.0e-05 | 12,346 tok/s 7.5 tiles/s | "
        "mfu n/a | data wait 3% | mem 1.2 GB | dropped 2 quarantined 3 | left: stage 1:02:05, run "
        "2:00:00"
    )
    assert "mfu 41.2%" in metrics.format_step(ROW | {"mfu": 0.412})
    assert metrics.format_step(ROW | {"spike": 9.4, "val_loss": 1.25}).endswith(
        "| SPIKE 9 sigma | val loss 1.2500"
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GB200", 2500e12),
        ("Quadro of tomorrow", None),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GB300", None),
    ],
)
def test_peak_flops_knows_the_card_or_says_so(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert (
        metrics.peak_flops(torch.device("cuda")) == peak
        and metrics.peak_flops(torch.device("cpu")) is None
    )


def test_the_plot_command_draws_a_log_with_stages_and_a_resume(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        ("align", 1, 3.0),
        ("align", 2, None),
        ("align", 2, 2.0),
        ("advance", 1, 1.5),
        ("advance", 2, 1.0),
    ]
    with metrics.open_log(tmp_path) as f:
        metrics.log_line(f, {"event": "start"})
        for stage, step, loss in rows:
            metrics.log_line(f, {"stage": stage, "step": step, "loss": loss})
    plot.plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_sums_of_an_epoch_come_with_the_next_printed_line_and_not_every_step():
    said = []
    printer = metrics.StepPrinter(SimpleNamespace(write=said.append), 4)
    for step in range(1, 11):
        epoch = {"epoch": {"epochs": step}} if step not in (4, 6, 7, 8) else {}
        printer.add(ROW | {"step": step, "steps": 10} | epoch)
    assert [line.split(" | ")[0] for line in said] == [
        "advance 4/10", "advance 8/10", "advance 10/10"]
    assert [line.split(" | ")[-1] for line in said] == [
        '{"epochs": 3}', '{"epochs": 5}', '{"epochs": 10}']
