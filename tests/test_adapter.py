"""The adapter folder: what a stage writes, what PEFT loads, what convert.py merges or refuses."""

import json
import types

import pytest
import torch
from folders import save
from safetensors.torch import load_file, save_file
from small_model import pack
from test_convert import assembled, run, tokenizer  # noqa: F401

import model_files
import weights
from train import RunConfig, Stage
from training import lora, optim, result
from training.distributed import ALONE

torch.set_num_threads(1)
CFG = RunConfig(lora_rank=4, lora_alpha=8, lora_vision=True, template="sailvl-chat")
RATES = Stage(lr_vision=1e-3, lr_llm=1e-3)


def finish_stage(base, out, rates=RATES, cfg=CFG):
    """Write RUN/instruction as a stage does that began from `base` -> the model with adapters."""
    model, source = weights.open_folder(base)
    trained = optim.set_trained_parts(model, rates, cfg)
    weights.fill(model.to_empty(device="cpu"), source.tensors)
    lora.init_adapters(model, 0)
    g = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
    stage_run = types.SimpleNamespace(cfg=cfg, dist=ALONE, out=out)
    state = {name: p.detach() for name, p in model.state_dict().items()}
    result.write_result(stage_run, "instruction", state, source, base, trained)
    return model


@pytest.fixture
def base(tmp_path, tokenizer):  # noqa: F811
    """A model folder in bf16, as released ones are."""
    assembled(tmp_path, tokenizer, tie_embeddings=True)
    model, _ = weights.load_folder(tmp_path / "m", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "m/config.json").read_text()) | {"torch_dtype": "bfloat16"}
    weights.save_folder(model.state_dict(), config, tmp_path / "base", tmp_path / "m")
    return tmp_path / "base"


# ---- what a stage writes -------------------------------------------------------------------------


def test_a_stage_writes_the_merged_model_and_the_adapter_that_gives_it(base, tmp_path):
    finish_stage(base, tmp_path)
    folder = tmp_path / "instruction"
    assert run("check", folder).stdout.endswith("every parameter filled once\n")
    done = run("merge", base, folder / "adapter", tmp_path / "merged")
    assert done.returncode == 0 and not done.stderr, done.stderr
    ours = load_file(folder / "model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    before = load_file(base / "model.safetensors")
    assert ours.keys() == merged.keys() and all(torch.equal(ours[k], merged[k]) for k in ours)
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == 3 * 7 + 2 * 4 and all(".layers." in name for name in changed)


def test_the_folder_of_a_stage_is_replaced_with_its_adapter_but_not_with_files_of_others(
    base, tmp_path
):
    finish_stage(base, tmp_path)
    finish_stage(base, tmp_path)
    folder = tmp_path / "instruction"
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert model_files.find_change(folder) is None
    (folder / "adapter/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="also holds adapter"):
        finish_stage(base, tmp_path)
    (folder / "adapter/notes.txt").unlink()
    (folder / "adapter/adapter_config.json").write_text("{}")
    assert "adapter_config.json has changed" in model_files.find_change(folder)


def test_a_part_that_trained_whole_is_named_at_the_end_and_when_the_adapter_is_merged(
    base, tmp_path, capsys
):
    finish_stage(base, tmp_path, Stage(lr_projector=1e-3, lr_llm=1e-3))
    assert "projector trained without adapters, so adapter/ is not the whole" in (
        capsys.readouterr().out
    )
    done = run("merge", base, tmp_path / "instruction/adapter", tmp_path / "merged")
    assert done.returncode == 0 and "WARNING: projector trained too" in done.stderr


# ---- what PEFT loads -----------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [CFG, RunConfig(lora_rank=4, template="sailvl-chat")])
def test_peft_on_the_transformers_export_gives_the_logits_of_the_stage(base, tmp_path, cfg):
    peft = pytest.importorskip("peft", reason="pip install -r requirements-dev.txt")
    t = pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    from inputs.images import normalize

    model = finish_stage(base, tmp_path, RATES, cfg).float().eval()
    assert run("export", base, tmp_path / "hf", "--layout=transformers").returncode == 0
    theirs = t.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "instruction/adapter").eval()
    theirs_names = {n for n, _ in adapted.named_parameters() if ".lora_" in n}
    stored = load_file(tmp_path / "instruction/adapter/adapter_model.safetensors")
    assert {n.replace(".default", "") for n in theirs_names} == set(stored)

    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = model.image_token_id
    pixels = normalize(tiles)
    with torch.no_grad():
        got = adapted(input_ids=tokens[None], pixel_values=pixels).logits[0]
        with adapted.disable_adapter():
            plain = adapted(input_ids=tokens[None], pixel_values=pixels).logits[0]
    want = model.logits(tokens, positions, cu, tiles)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (plain - want).abs().max() > 0.05

    # And back: what PEFT saves, convert.py merges.
    adapted.save_pretrained(tmp_path / "saved")
    done = run("merge", base, tmp_path / "saved", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    ours = load_file(tmp_path / "merged/model.safetensors")
    stage = load_file(tmp_path / "instruction/model.safetensors")
    assert all(torch.equal(ours[name], stage[name]) for name in stage)


# ---- what is refused -----------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Rewrite the matrices as change(name, tensor) says: a tensor, or None to leave one out."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: change(name, tensor) for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "rank": (lambda f: edit_config(f, r=8), "rank 8 and the weight"),
    "no rank": (lambda f: edit_config(f, r=0), "r = 0 is not supported"),
    "another method": (lambda f: edit_config(f, use_dora=True), "use_dora = true"),
    "more modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "missing": (
        lambda f: edit_tensors(f, lambda n, x: None if n == FIRST else x),
        "layers.0.self_attn.q_proj has no lora_A",
    ),
    "missing pair": (
        lambda f: edit_tensors(f, lambda n, x: None if "layers.0.self_attn.q_proj" in n else x),
        "has no matrices for model.language_model.layers.0.self_attn.q_proj",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda n, x: x[:, :3].clone() if n == FIRST else x),
        "lora_A of model.language_model.layers.0.self_attn.q_proj has shape (4, 3)",
    ),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" + b"\0" * 9),
        "adapter_model.safetensors: damaged or cut short",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "give the folder adapter/"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
    base, tmp_path, what
):
    finish_stage(base, tmp_path)
    break_it, words = BROKEN[what]
    break_it(tmp_path / "instruction/adapter")
    done = run("merge", base, tmp_path / "instruction/adapter", tmp_path / "merged")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not (tmp_path / "merged").exists()


def test_another_base_or_a_smaller_model_is_refused(base, tmp_path):
    finish_stage(base, tmp_path)
    adapter = tmp_path / "instruction/adapter"
    done = run("merge", tmp_path / "m", adapter, tmp_path / "merged")
    assert done.returncode == 2 and "trained beside other weights than those of" in done.stderr
    edit_tensors(adapter, lambda name, x: x)  # without the hash of its base
    model, config = weights.load_folder(base)
    model.llm.n_layers = 2
    model.language_model.model.layers = model.language_model.model.layers[:2]
    save(tmp_path / "small", model, tokenizer=base, extra=config)
    done = run("merge", tmp_path / "small", adapter, tmp_path / "merged")
    assert done.returncode == 2 and "14 tensors belong to no linear layer of" in done.stderr
