"""The three changes of the README's section Hacking, applied as they stand there."""
import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import convert
import model
import vision
from evals import table
from evals.score import score_rows
from evals.scorers import exact_match
from inputs import records, sources
from inputs.tokenizer import Tokenizer
from model import VLM, LLMConfig
from vision import VisionConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture
def blocks():
    """The Python blocks of the section, in their order."""
    section = (ROOT / "README.md").read_text().split("## Hacking")[1].split("\n## ")[0]
    found = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(found) == 3
    return found


def test_the_readmes_projector_takes_the_place_of_ours_and_learns(blocks, monkeypatch):
    scope = {"nn": nn, "torch": torch}
    exec(blocks[0], scope)
    monkeypatch.setattr(model, "Projector", scope["Projector"])
    vision_config = VisionConfig(56, dim=32, n_layers=1, n_heads=2, ffn_dim=64)
    llm_config = LLMConfig(64, 32, 1, 2, 2, 16, 64, tie_embeddings=True)
    vlm = VLM(vision_config, llm_config, image_token_id=9).init_weights(0)
    n = vision_config.tokens_per_tile
    tokens = torch.tensor([1, *[9] * n, 2, 3, 4])
    labels = torch.full_like(tokens, -100)
    labels[-3:-1] = torch.tensor([3, 4])
    pack = dict(tokens=tokens, labels=labels, positions=torch.arange(len(tokens)),
                cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
                tiles=torch.randint(0, 256, (1, 3, 56, 56)).byte())
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=1e-3)
    before = vlm(**pack).item()
    for _ in range(40):
        vlm(**pack).backward()
        assert all(p.grad.abs().sum() > 0 for p in vlm.mlp1.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert vlm(**pack).item() < 0.7 * before
    assert isinstance(vision.Projector(vision_config, 32), nn.Sequential)  # ours is untouched


def test_the_readmes_benchmark_is_scored(blocks):
    benchmark = eval(blocks[1], {"Benchmark": table.Benchmark, "exact_match": exact_match})
    rows = [{"index": "1", "question": "What?", "answer": "red", "prediction": "Red."},
            {"index": "2", "question": "What?", "answer": "red", "prediction": "blue"}]
    score, details = score_rows(benchmark, rows)
    assert score == 50 and details["n"] == 2


def test_the_readmes_format_is_read_as_training_data(blocks, monkeypatch, tmp_path):
    monkeypatch.setitem(records.ROW_READERS, ".csv", None)  # gone when the test is over
    exec(blocks[2], {"csv": csv, "ROW_READERS": records.ROW_READERS})
    (tmp_path / "a.jpg").write_bytes((ROOT / "examples" / "folder" / "1.jpg").read_bytes())
    (tmp_path / "rows.csv").write_text('image,question,answer\na.jpg,"What, then?",A board.\n')
    tokenizer = Tokenizer(ROOT / "toy" / "tokenizer")
    source, = sources.open_sources(str(tmp_path / "rows.csv"), tokenizer, "sailvl-chat")
    assert not source.meta["bad"] and len(source.rows) == 1
    assert source.row(0)["conversations"][1]["value"] == "A board."
    assert source.image(0, 0, source.row(0))[:2] == b"\xff\xd8"


def test_another_projector_is_refused_by_the_export_that_does_not_know_it():
    state = {"mlp1.layers.0.norm1.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="no such projector; use --layout=internvl"):
        convert.transformers_tensors(state, "InternVLForConditionalGeneration")
