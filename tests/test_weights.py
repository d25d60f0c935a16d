"""weights.py: model folders in and out, full accounting, memory."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from folders import edit, same_state, save, sparse_folder
from safetensors.torch import load_file, save_file
from small_model import IMG, pack, tiny

import weights
from model import VLM, LanguageModel, LLMConfig
from training import distributed
from vision import VisionConfig

torch.set_num_threads(1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied):
    vlm = tiny(tie_embeddings=tied, rope_theta=5e5)
    back, raw = weights.load_folder(
        save(tmp_path / "m", vlm, extra=dict(max_dynamic_patch=6), template="internvl2_5")
    )
    assert (back.vision, back.llm) == (vlm.vision, vlm.llm)
    assert (
        raw["max_dynamic_patch"] == 6
        and raw["template"] == "internvl2_5"
        and raw["min_dynamic_patch"] == 1
    )
    assert vlm.state_dict().keys() == back.state_dict().keys()
    assert same_state(vlm, back)
    assert (
        back.language_model.lm_head.weight is back.language_model.model.embed_tokens.weight
    ) == tied
    names = load_file(tmp_path / "m/model.safetensors").keys()
    assert names == {n for n in vlm.state_dict() if not (tied and "lm_head" in n)}
    half, _ = weights.load_folder(tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_stored_head_decides_whether_it_is_tied(tmp_path):
    vlm = tiny()
    folder = save(tmp_path / "m", vlm)
    edit(
        folder, llm_config__tie_word_embeddings=True
    )  # the config says tied, the file holds another head
    back, _ = weights.load_folder(folder)
    assert torch.equal(back.language_model.lm_head.weight, vlm.language_model.lm_head.weight)
    assert not back.llm.tie_embeddings
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    edit(
        folder, llm_config__tie_word_embeddings=False
    )  # the config says untied, the file holds no head
    save_file(tensors, folder / "model.safetensors")
    back, _ = weights.load_folder(folder)
    assert back.language_model.lm_head.weight is back.language_model.model.embed_tokens.weight
    assert back.llm.tie_embeddings


def test_shards_and_index_hold_the_same_model_with_readable_files(tmp_path, monkeypatch):
    vlm = tiny()
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    folder = save(tmp_path / "m", vlm)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in vlm.state_dict().values())
    assert all(oct(f.stat().st_mode)[-3:] == "644" for f in folder.iterdir())
    back, _ = weights.load_folder(folder)
    assert same_state(vlm, back)
    first, *_, last = sorted(folder.glob("model-0*"))
    save_file(load_file(first) | load_file(last), last)
    with pytest.raises(ValueError, match="is stored in an earlier file too"):
        weights.load_folder(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match="missing; the folder is incomplete"):
        weights.load_folder(folder)


def test_a_part_can_be_filled_from_a_whole_folder_or_from_its_own(tmp_path):
    vlm = tiny()
    for name, part in (("whole", ""), ("own", "llm")):
        about = weights.inspect_folder(save(tmp_path / name, vlm, part))
        llm = LanguageModel(vlm.llm)
        weights.fill(llm, about.tensors, "language_model.")
        for key, tensor in llm.state_dict().items():
            assert torch.equal(tensor, vlm.language_model.state_dict()[key]), key
    assert about.vision is None and about.llm == vlm.llm


def test_a_part_alone_is_no_model_and_the_refusal_says_what_to_do(tmp_path):
    for part, words in (
        ("vit", "is a vision encoder only; join it with a language model"),
        ("llm", "is a language model only; join it with a vision encoder"),
    ):
        with pytest.raises(ValueError, match=f"{words}: convert.py assemble"):
            weights.load_folder(save(tmp_path / part, tiny(), part))


def test_saving_replaces_an_old_model_folder_and_nothing_else(tmp_path, monkeypatch):
    folder = save(tmp_path / "m", tiny())
    save(folder, tiny(seed=1))
    assert torch.equal(weights.load_folder(folder)[0].mlp1[1].weight, tiny(seed=1).mlp1[1].weight)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    (tmp_path / ".m.jsonl.index-1").mkdir()  # of the data file beside it
    (tmp_path / ".m.tmp-1").mkdir()  # of a write that was killed
    save(folder, tiny(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.jsonl.index-1", "m", "notes"]
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        save(tmp_path / "notes", tiny())
    monkeypatch.setattr(
        weights, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save(folder, tiny(seed=2))
    assert torch.equal(weights.load_folder(folder)[0].mlp1[1].weight, tiny(seed=1).mlp1[1].weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".m.jsonl.index-1", "m", "notes"]


def test_damaged_folders_are_refused_in_words(tmp_path):
    def fresh():
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return save(tmp_path / "m", tiny())

    with pytest.raises(
        FileNotFoundError, match="nowhere/config.json does not exist; give the folder"
    ):
        weights.load_folder(tmp_path / "nowhere")
    file = fresh() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        weights.load_folder(tmp_path / "m")
    (fresh() / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        weights.load_folder(tmp_path / "m")
    tensors = load_file(fresh() / "model.safetensors")
    save_file(
        tensors | {"mlp1.0.bias": tensors["mlp1.0.bias"].to(torch.int8)},
        tmp_path / "m/model.safetensors",
    )
    with pytest.raises(ValueError, match="mlp1.0.bias is stored as I8, which is none of F32, BF16"):
        weights.load_folder(tmp_path / "m")
    moved = {n.replace("mlp1.0.", "mlp1.7."): x for n, x in tensors.items() if n != "mlp1.3.bias"}
    save_file(moved, tmp_path / "m/model.safetensors")  # both sides are listed
    with pytest.raises(
        ValueError,
        match="3 parameters without a tensor: mlp1.0.bias, mlp1.0.weight, mlp1.3.bias; "
        "2 tensors without a parameter: mlp1.7.bias, mlp1.7.weight",
    ):
        weights.load_folder(tmp_path / "m")
    wide = {n: torch.zeros(65) if n.endswith("layernorm.weight") else x for n, x in tensors.items()}
    save_file(wide, tmp_path / "m/model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"layernorm.weight has shape \(65,\), config.json asks for \(64,\).*and 1 more",
    ):
        weights.load_folder(tmp_path / "m")
    shards = sparse_folder(tmp_path / "s", VisionConfig(), LLMConfig(), 10**9)
    os.truncate(shards / "model-00002-of-00005.safetensors", 10**8)
    with pytest.raises(ValueError, match="model-00002-of-00005.safetensors: damaged or cut short"):
        weights.inspect_folder(shards)
    (shards / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="model-00002-of-00005.safetensors: missing; the folder is incomplete",
    ):
        weights.inspect_folder(shards)


def test_a_plain_qwen2_folder_is_read_by_transformers_with_equal_logits(tmp_path):
    t = pytest.importorskip(
        "transformers", reason="transformers reads the folder; pip install -r requirements-dev.txt"
    )
    vlm = tiny(rope_theta=1e6)
    theirs = t.Qwen2ForCausalLM.from_pretrained(save(tmp_path / "llm", vlm, "llm")).eval()
    tokens, _, positions, cu, _ = pack((30,))
    torch.testing.assert_close(
        vlm.logits(tokens, positions, cu), theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4
    )
    theirs.save_pretrained(tmp_path / "again")  # and what transformers 5 writes is read here
    about = weights.inspect_folder(tmp_path / "again")
    back = tiny(seed=1, rope_theta=1e6)
    weights.fill(back.language_model, about.tensors, "language_model.")
    assert about.llm == vlm.llm
    torch.testing.assert_close(
        vlm.logits(tokens, positions, cu), back.logits(tokens, positions, cu)
    )


def test_the_2b_and_8b_shapes_are_those_of_the_released_checkpoints():
    for llm, total in (("qwen2.5-1.5b", 2_089_762_304), ("qwen2.5-7b", 7_947_169_280)):
        shapes = weights.parameter_shapes(VisionConfig(), LLMConfig(**LLMConfig.PRESETS[llm]))
        assert len(shapes) == 685 and sum(torch.Size(s).numel() for s in shapes.values()) == total
    with torch.device("meta"):
        tied = VLM(VisionConfig(), LLMConfig(tie_embeddings=True), 0)
    assert sum(p.numel() for p in tied.parameters()) == 1_856_388_608


class Counted:
    """safe_open that notes how many numbers were read."""

    read = 0

    def __init__(self, *args, **kw):
        self.file = weights.safe_open.real(*args, **kw)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def get_slice(self, name):
        self.part = self.file.get_slice(name)
        return self

    def __getitem__(self, rows):
        part = self.part[rows]
        Counted.read += part.numel()
        return part


def on_two_ranks(folder):
    """Run by each of two ranks: start sharded from the folders a and b; note what was read."""
    torch.set_num_threads(1)
    dist, real = distributed.setup_distributed("cpu", 60), weights.safe_open
    for name in ("a", "b"):
        tokenizer = types.SimpleNamespace(n_vocab=0)
        model, about = weights.start_model(
            types.SimpleNamespace(), {}, f"{folder}/{name}", tokenizer
        )
        model = distributed.parallelize(model, "fsdp", torch.float32, dist)
        Counted.real, Counted.read = real, 0
        weights.safe_open = type("safe_open", (Counted,), {"real": real})
        weights.start_weights(model, about, seed=0)
        weights.safe_open = real
        reads, full = distributed.gather(Counted.read, dist), distributed.full_state(model)
        if dist.is_main:
            stored = load_file(f"{folder}/{name}/model.safetensors")
            total = sum(x.numel() for x in stored.values())
            assert sum(reads) == total and max(reads) < 0.52 * total, (reads, total)
            assert all(torch.equal(full[n], x) for n, x in stored.items()) and len(full) - len(
                stored
            ) == (name == "b")
            torch.save(reads, f"{folder}/reads.pt")
        whole, _ = weights.load_folder(f"{folder}/{name}")
        whole.image_token_id = model.image_token_id = IMG
        loss = model(*pack((9, 30), (1, 2)))
        torch.testing.assert_close(loss, whole(*pack((9, 30), (1, 2))))
    distributed.close_distributed()


def test_under_fsdp_each_rank_reads_only_what_it_keeps(tmp_path):
    for name, tied in (("a", False), ("b", True)):
        save(tmp_path / name, tiny(tie_embeddings=tied))
    env = os.environ | dict(
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(20000 + (os.getpid() + 7) % 20000),
        PYTHONPATH=str(Path(__file__).parent.parent),
        OMP_NUM_THREADS="1",
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, tmp_path],
            env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    errors = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)[-3000:]
    assert len(torch.load(tmp_path / "reads.pt")) == 2


def test_loading_takes_less_than_1_15_times_the_weights(tmp_path):
    """At 230 MB here; tests/test_full_size.py measures the 2B: 1.11."""
    folder = sparse_folder(
        tmp_path / "m",
        VisionConfig(),
        LLMConfig(dim=512, vocab_size=8000, n_layers=14, n_heads=4, ffn_dim=1024),
    )
    code = (
        # VmHWM, not ru_maxrss: a process inherits the latter from the one that started it
        "import re, resource, torch; from weights import load_folder\n"
        "torch.ones(9).to(torch.bfloat16).copy_(torch.ones(9))\n"
        "before = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "vlm, _ = load_folder(%r)\n"
        "status = open('/proc/self/status').read()\n"
        "peak = 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', status)[1])\n"
        "print((peak - before) / sum(p.nbytes for p in vlm.parameters()))" % str(folder)
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15, done.stdout


if __name__ == "__main__":
    on_two_ranks(sys.argv[1])
