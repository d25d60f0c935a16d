"""SAIL-VL-1.5, 1.6 and SAIL-VL2: AIMv2 and Qwen3 equal transformers' own, whole and in parts."""

import json
import math
import shutil
import types

import command_line
import pytest
import torch
import torch.nn.functional as F
from folders import same_state, save, sparse_folder
from PIL import Image
from small_model import pack, tiny
from test_convert import tokenizer  # noqa: F401, a fixture
from test_parity import text_config

import convert
import model_files
import sample
import sft
import train
import weights
from inputs.images import normalize
from inputs.tokenizer import QWEN3_TOKENS, Tokenizer
from model import LLMConfig, packed
from training import optim
from training.distributed import checkpoint_activations
from vision import VisionConfig

torch.set_num_threads(1)
t = pytest.importorskip(
    "transformers", reason="transformers is the oracle; pip install -r requirements-dev.txt"
)
# what is new in each, in a small model
KINDS = {
    "SAIL-VL-1.5": {"kind": "aimv2"},
    "SAIL-VL2": {"kind": "aimv2", "qwen3": True, "head_dim": 24, "tie_embeddings": True},
    "InternViT with Qwen3": {"qwen3": True},
}
AIMV2_NAMES = {  # ours -> theirs
    "preprocessor.patchifier.proj": "embeddings.patch_embed",
    "preprocessor.patchifier.norm": "embeddings.rms_norm",
    "preprocessor.pos_embed": "embeddings.position_embedding.weight",
    "trunk.post_trunk_norm": "rms_norm",
    "trunk.blocks": "encoder.layers",
    "norm_": "rms_norm",
    "attn.proj": "attention.out_proj",
    "mlp.fc1": "ffn.gate_proj",
    "mlp.fc2": "ffn.down_proj",
    "mlp.fc3": "ffn.up_proj",
}


def assert_equal(ours, theirs, what=""):
    """To 1e-5 of the largest entry."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert theirs.abs().max() > 0 and error <= 1e-5, (what, error.item())


def aimv2_twin(vit, v):
    """transformers' Aimv2VisionModel with the same weights -> it, {our name: its names}."""
    twin = t.Aimv2VisionModel(
        t.Aimv2VisionConfig(
            hidden_size=v.dim,
            intermediate_size=v.ffn_dim,
            num_hidden_layers=v.n_layers,
            num_attention_heads=v.n_heads,
            image_size=v.image_size,
            patch_size=v.patch_size,
            rms_norm_eps=v.norm_eps,
            use_head=False,
        )
    )
    names = {}
    state = {}
    for name, tensor in vit.state_dict().items():
        theirs = name
        for ours, new in AIMV2_NAMES.items():
            theirs = theirs.replace(ours, new)
        names[name] = [theirs]
        if ".attn.qkv." in name:
            names[name] = [theirs.replace("attn.qkv", f"attention.{x}_proj") for x in "qkv"]
        if name.endswith("pos_embed"):
            tensor = tensor[0]
        state |= dict(zip(names[name], tensor.chunk(len(names[name])), strict=True))
    assert state.keys() == twin.state_dict().keys(), state.keys() ^ twin.state_dict().keys()
    twin.load_state_dict(state)
    return twin.eval(), names


@pytest.mark.parametrize("size", ["small", "full width"])
def test_aimv2_equals_transformers_forward_and_in_every_gradient(size):
    vlm = tiny(kind="aimv2")
    if size == "full width":
        smaller = {"n_layers": 1, "image_size": 112}
        preset = VisionConfig(**VisionConfig.PRESETS["aimv2-huge"] | smaller)
        vlm.vision, vlm.vision_model = preset, convert.VLM(preset, vlm.llm, 0).vision_model
        convert.init_weights(vlm.vision_model, seed=0, std=0.05)
    vit = vlm.vision_model
    twin, names = aimv2_twin(vit, vlm.vision)
    side = vlm.vision.image_size
    tiles = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    ours = vit(tiles.requires_grad_())
    theirs = twin(tiles).last_hidden_state
    assert ours.shape == (1, vlm.vision.n_patches, vlm.vision.dim)
    assert_equal(ours, theirs)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (pixels,) = torch.autograd.grad((ours * weight).sum(), tiles, retain_graph=True)
    (ours * weight).sum().backward()
    mine = pixels.clone()
    tiles.grad = None
    (theirs * weight).sum().backward()
    assert_equal(mine, tiles.grad, "pixels")
    for name, p in vit.named_parameters():
        its = torch.cat([twin.get_parameter(n).grad for n in names[name]])
        assert_equal(p.grad.view(its.shape), its, name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_qwen3_equals_transformers_forward_and_in_every_gradient(tied):
    llm = tiny(qwen3=True, head_dim=24, tie_embeddings=tied, rope_theta=1e6).language_model
    c = llm.cfg
    config = text_config(c).to_dict() | {"model_type": "qwen3"}
    twin = t.Qwen3ForCausalLM(t.Qwen3Config(**config))
    twin.load_state_dict(llm.state_dict())
    assert twin.state_dict().keys() == llm.state_dict().keys()
    tokens, _, positions, _, _ = pack((60,))
    labels = tokens.roll(-1)
    ours = llm.head(llm.hidden(llm.embed(tokens), positions, packed(torch.tensor([0, 60]))))
    theirs = twin.eval()(input_ids=tokens[None]).logits[0]
    assert_equal(ours, theirs)
    F.cross_entropy(ours, labels).backward()
    F.cross_entropy(theirs, labels).backward()
    for name, p in llm.named_parameters():
        assert_equal(p.grad, twin.get_parameter(name).grad, name)


def test_aimv2_is_trained_with_stochastic_depth_and_keeps_tiles_apart():
    vit = tiny(kind="aimv2").vision_model
    tiles = torch.randn(5, 3, 56, 56)
    together = vit(tiles)
    tiles[3] = 0
    again = vit(tiles)
    assert torch.equal(together[:3], again[:3]) and torch.equal(together[4], again[4])
    vit.drop_path = 0.9
    assert torch.equal(vit.eval()(tiles), again) and not torch.equal(vit.train()(tiles), again)


def test_aimv2_takes_tiles_of_another_size_with_interpolated_positions():
    vit = tiny(kind="aimv2").vision_model
    grid = vit.preprocessor.pos_embed.view(1, 4, 4, 64).permute(0, 3, 1, 2)
    bigger = F.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False)
    tiles = torch.randn(1, 3, 84, 70)
    patches = vit.preprocessor.patchifier
    x = patches.norm(patches.proj(tiles).flatten(2).transpose(1, 2))
    expected = x + bigger.flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.preprocessor(tiles), expected)
    assert vit(tiles).shape == (1, 30, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_changes_no_gradient_of_the_new_blocks(kind):
    batch, gradients = pack((9, 30), (1, 3)), []
    for how in ("none", "selective", "full"):
        vlm = tiny(**KINDS[kind])
        checkpoint_activations(vlm, how)
        vlm(*batch).backward()
        gradients.append([p.grad for p in vlm.parameters()])
    for a, b, c in zip(*gradients, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.any()


def test_no_norm_and_no_position_of_the_new_parts_decays():
    vlm = tiny(**KINDS["SAIL-VL2"])
    stage = train.Stage(lr_vision=1e-3, lr_projector=1e-3, lr_llm=1e-3, weight_decay=0.1)
    groups = optim.make_optimizer(vlm, stage, train.Config()).param_groups
    names = {id(p): name for name, p in vlm.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    kept = set(names.values()) - decayed
    assert "vision_model.trunk.blocks.0.mlp.fc3.weight" in decayed
    assert {
        "vision_model.preprocessor.pos_embed",
        "vision_model.preprocessor.patchifier.norm.weight",
        "vision_model.trunk.post_trunk_norm.weight",
        "language_model.model.layers.0.self_attn.q_norm.weight",
    } <= kept


# ---- folders -------------------------------------------------------------------------------------


def run(*args):
    """convert.py with these arguments, in this process. -> return code, stdout, stderr."""
    code, out, err = command_line.run(convert.main, ["convert.py", *map(str, args)])
    return types.SimpleNamespace(returncode=code, stdout=out, stderr=err)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_bit_for_bit_whole_and_in_parts(tmp_path, kind):
    vlm = tiny(**KINDS[kind])
    back, raw = weights.load_folder(save(tmp_path / "m", vlm))
    assert same_state(vlm, back) and (back.vision, back.llm) == (vlm.vision, vlm.llm)
    for part in ("vit", "llm"):
        about = weights.inspect_folder(save(tmp_path / part, vlm, part))
        assert (about.vision or vlm.vision, about.llm or vlm.llm) == (vlm.vision, vlm.llm)
    names = {"SAIL-VL-1.5": "SailVLModel", "SAIL-VL2": "SAILVLModel"}
    assert raw["architectures"] == [names.get(kind, "InternVLChatModel")]


def test_the_shapes_are_those_of_the_released_sail_vl_1_6_8b(tmp_path):
    """8,332,532,736 parameters: the total_size of its index, in bf16."""
    vision = VisionConfig(**VisionConfig.PRESETS["aimv2-huge"])
    llm = LLMConfig(**LLMConfig.PRESETS["qwen2.5-7b"])
    about = weights.inspect_folder(sparse_folder(tmp_path / "m", vision, llm))
    assert (about.vision, about.llm) == (vision, llm)
    stored = [piece for pieces in about.tensors.values() for piece in pieces]
    assert sum(2 * math.prod(piece.shape) for piece in stored) == 16_665_065_472
    assert about.config["architectures"] == ["SailVLModel"]


def test_the_config_of_the_released_sail_vl_1_6_8b_is_recognised():
    from model_config import parse_config

    vision, llm = parse_config(SAIL_VL_1_6_8B)
    assert vision == VisionConfig(**VisionConfig.PRESETS["aimv2-huge"])
    assert llm == LLMConfig(**LLMConfig.PRESETS["qwen2.5-7b"])


# Its entries that say what the model is, as it is released.
SAIL_VL_1_6_8B = {
    "architectures": ["SailVLModel"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "sailvl-chat",
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "vision_config": {
        "architectures": ["AIMv2Model"],
        "attention_dropout": 0.0,
        "hidden_size": 1536,
        "image_size": 448,
        "intermediate_size": 4096,
        "model_type": "aimv2",
        "num_attention_heads": 12,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dropout": 0.0,
        "qkv_bias": False,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "use_bias": False,
    },
}


# ---- from parts to transformers ------------------------------------------------------------------


def assembled(tmp_path, words, kind):
    """A whole model with its tokenizer, of parts as they are released -> its folder."""
    vlm = tiny(vocab_size=330, rope_theta=1e6, **KINDS[kind])
    save(tmp_path / "vit", vlm, "vit")
    save(tmp_path / "llm", vlm, "llm", words)
    parts = (f"--vision={tmp_path}/vit", f"--llm={tmp_path}/llm")
    done = run("assemble", *parts, f"--out={tmp_path}/m", "--dtype=float32")
    assert done.returncode == 0, done.stderr
    return tmp_path / "m"


def logits_of(vlm):
    tokens, _, positions, cu, tiles = pack((30,), (3,))
    tokens[tokens == 319] = vlm.image_token_id
    with torch.no_grad():
        return tokens, tiles, vlm.eval().logits(tokens, positions, cu, tiles)


@pytest.mark.parametrize("kind", ["InternVL", *KINDS])
def test_transformers_reads_the_export_and_it_comes_back_bit_for_bit(
    tmp_path, tokenizer, monkeypatch, kind  # noqa: F811
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setitem(KINDS, "InternVL", {})
    folder = assembled(tmp_path, tokenizer, kind)
    vlm, raw = weights.load_folder(folder)
    done = run("export", folder, tmp_path / "hf", "--layout=transformers")
    assert done.returncode == 0, done.stderr
    theirs, info = t.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True, trust_remote_code=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    tokens, tiles, ours = logits_of(vlm)
    with torch.no_grad():
        its = theirs.eval()(input_ids=tokens[None], pixel_values=normalize(tiles)).logits[0]
    assert_equal(ours, its)

    back, again = weights.load_folder(tmp_path / "hf")
    assert same_state(vlm, back) and (back.vision, back.llm) == (vlm.vision, vlm.llm)
    assert back.image_token_id == vlm.image_token_id and again["template"] == raw["template"]
    assert run("check", tmp_path / "hf").stdout.endswith("every parameter filled once\n")
    assert run("export", tmp_path / "hf", tmp_path / "again").returncode == 0
    assert model_files.weights_hash(tmp_path / "again") == model_files.weights_hash(folder)

    theirs.save_pretrained(tmp_path / "saved")  # as transformers itself writes it
    assert same_state(vlm, weights.load_folder(tmp_path / "saved")[0])


@pytest.fixture
def qwen3_words(tmp_path, tokenizer):  # noqa: F811
    """A small Qwen3 tokenizer as released: four more tokens, and no added_tokens.json."""
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    for i, token in enumerate(QWEN3_TOKENS, 256 + 22):
        config["added_tokens_decoder"][str(i)] = {"content": token, "special": False}
    folder = tmp_path / "words"
    shutil.copytree(tokenizer, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_image_tokens_follow_those_of_qwen3_and_thoughts_stay_in_answers(tmp_path, qwen3_words):
    folder = assembled(tmp_path, qwen3_words, "SAIL-VL2")
    mine = Tokenizer(folder)
    released = {"<think>": 151667, "</think>": 151668, "<img>": 151669, "<IMG_CONTEXT>": 151671}
    assert {token: mine.special[token] - 256 + 151643 for token in released} == released
    assert weights.load_folder(folder)[0].image_token_id == mine.image_id
    theirs = t.AutoTokenizer.from_pretrained(folder)
    text = "<think>\nno</think>yes <tool_response> <ref>a</ref>"
    assert mine.encode(text) == theirs(text)["input_ids"]
    assert mine.decode(mine.encode(text)) == text
    assert len(set(mine.special.values())) == 35


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight rows about one picture each."""
    folder = tmp_path_factory.mktemp("rows")
    for k in range(8):
        Image.new("RGB", (56, 56), (30 * k, 10, 200)).save(folder / f"{k}.png")
        row = {
            "image": f"{k}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": f"number {k}"},
            ],
        }
        with open(folder / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    return folder / "rows.jsonl"


@pytest.mark.parametrize("kind", ["SAIL-VL-1.5", "SAIL-VL2"])
def test_from_parts_over_training_and_an_answer_to_transformers(
    tmp_path, tokenizer, rows, monkeypatch, kind  # noqa: F811
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = assembled(tmp_path, tokenizer, kind)
    assert run("check", folder).stdout.endswith("every parameter filled once\n")
    flags = [
        f"--init_from={folder}",
        f"--data={rows}",
        f"--out_dir={tmp_path}/run",
        "--stages=instruction",
        "--instruction.steps=5",
        "--instruction.lr_vision=1e-3",
        "--instruction.lr_projector=1e-3",
        "--instruction.lr_llm=1e-3",
        "--instruction.drop_path=0.1",
        "--tokens_per_pack=400",
        "--max_tiles=1",
        "--max_tiles_per_pack=8",
        "--activation_checkpointing=selective",
        "--num_workers=0",
        "--threads=1",
        "--dtype=float32",
        "--grad_accum_steps=1",
    ]
    code, _, errors = command_line.run(sft.main, ["sft.py", *flags])
    assert code == 0, errors
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 5 and losses[-1] < losses[0]

    trained = tmp_path / "run/instruction"
    before, after = (weights.load_folder(f)[0].state_dict() for f in (folder, trained))
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not unchanged, unchanged
    question = [f"--image={rows.parent}/3.png", "--prompt=what?", "--max_new_tokens=4"]
    code, answer, errors = command_line.run(
        sample.main, ["sample.py", f"--model={trained}", "--device=cpu", *question]
    )
    assert code == 0 and errors == "" and answer.endswith("\n")
    assert run("export", trained, tmp_path / "hf", "--layout=transformers").returncode == 0
    _, info = t.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "hf", output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
