"""LoRA and frozen blocks: what trains, what stays, what is merged, what others load."""

import copy
import signal

import pytest
import torch
from small_model import pack, tiny
from test_survival import difference, one_stage, read
from test_train import log
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
import vision as vision_file
from model import VLM, init_weights
from train import RunConfig, Stage
from training import checkpoint, compile, distributed, lora, optim
from training.flops import Trained, train_flops

torch.set_num_threads(1)
ALL = Stage(lr_vision=1e-3, lr_projector=1e-3, lr_llm=1e-3)
LLM_ONLY = Stage(lr_llm=1e-3)


def adapted(cfg, stage=ALL, seed=0, **llm):
    """A small model with adapters and frozen parts, and what of it trains."""
    model = tiny(seed, **llm)
    trained = optim.set_trained_parts(model, stage, cfg)
    lora.init_adapters(model, seed)
    return model, trained


def stir_adapters(model, seed=5):
    """Move the matrices B away from zero, as training does."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.copy_(0.05 * torch.randn(p.shape, generator=g))


LORA = RunConfig(lora_rank=4, lora_alpha=8)
BOTH = RunConfig(lora_rank=4, lora_alpha=8, lora_vision=True)
BATCH = pack((9, 30, 14), (1, 3, 0))


# ---- what trains ---------------------------------------------------------------------------------


def test_fresh_adapters_change_no_logit():
    tokens, _, positions, cu, tiles = BATCH
    model, _ = adapted(BOTH)
    assert torch.equal(
        model.logits(tokens, positions, cu, tiles), tiny().logits(tokens, positions, cu, tiles)
    )


@pytest.mark.parametrize("cfg", [LORA, BOTH])
def test_adapters_train_and_the_weights_beside_them_keep_every_bit_and_name(cfg):
    model, _ = adapted(cfg, Stage(lr_vision=1e-3, lr_llm=1e-3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name for name in before if not lora.is_adapter(name)} == set(
        dict(tiny().named_parameters())
    )
    optimizer = optim.make_optimizer(model, ALL, RunConfig())
    for _ in range(2):
        model(*BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    whole_vit = set() if cfg.lora_vision else {n for n in before if n.startswith("vision_model.")}
    assert changed == {n for n in before if lora.is_adapter(n)} | whole_vit
    per_block = {"language_model": 14, "vision_model": 8 if cfg.lora_vision else 0}
    for module, n in per_block.items():
        blocks = {"language_model": 3, "vision_model": 2}[module]
        found = [name for name in before if name.startswith(module) and lora.is_adapter(name)]
        assert len(found) == n * blocks


def test_adapters_do_not_change_the_random_weights_of_a_run():
    with torch.device("meta"):
        model = VLM(tiny().vision, tiny().llm, 319)
        plain = VLM(tiny().vision, tiny().llm, 319)
    lora.add_adapters(model, LORA, ALL)
    model.to_empty(device="cpu")
    init_weights(model, 3)
    weights = model.state_dict()
    for name, tensor in plain.to_empty(device="cpu").init_weights(3).state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_blocks_and_what_lies_before_them_get_no_gradient_and_no_moments(tied):
    cfg = RunConfig(freeze_llm_layers=2, freeze_vision_layers=1)
    model, trained = adapted(cfg, tie_embeddings=tied)
    assert trained == Trained(True, True, True, 1, 2)
    model(*BATCH).backward()
    frozen = ("vision_model.embeddings", "vision_model.encoder.layers.0.")
    frozen += tuple(f"language_model.model.{part}" for part in ("embed", "layers.0.", "layers.1."))
    optimizer = optim.make_optimizer(model, ALL, RunConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        trains = not name.startswith(frozen)
        assert (p.grad is not None) == trains == (id(p) in held), name
    head = model.language_model.lm_head.weight
    assert head.requires_grad == (not tied)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_of_a_stage_says_that_a_head_is_frozen_with_the_embeddings(tied, capsys):
    model, _ = adapted(RunConfig(freeze_llm_layers=1), tie_embeddings=tied)
    optim.print_stage_table("stage", model, ALL)
    assert ("the head, which shares it" in capsys.readouterr().out) == tied


def kept_tensors(model):
    """How many tensors a forward pass keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        model(*BATCH)
    return len(kept)


def test_frozen_blocks_keep_no_activations_where_no_gradient_passes():
    blocks_trained = {}
    for layers in (3, 5):
        cfg = RunConfig(lora_rank=4, freeze_llm_layers=layers - 1)
        blocks_trained[layers] = kept_tensors(adapted(cfg, LLM_ONLY, n_layers=layers)[0])
    assert blocks_trained[3] == blocks_trained[5]
    whole = kept_tensors(adapted(RunConfig(lora_rank=4), LLM_ONLY, n_layers=5)[0])
    assert whole > 3 * blocks_trained[5]


@pytest.mark.parametrize(
    "cfg, stage, words",
    [
        (RunConfig(freeze_llm_layers=4), ALL, "--freeze_llm_layers=4: there are 3 blocks"),
        (RunConfig(freeze_vision_layers=2), ALL, "all that lr_vision would train is frozen"),
        (RunConfig(freeze_llm_layers=3, lora_rank=4), ALL, "all that lr_llm would train"),
    ],
)
def test_a_setting_that_leaves_nothing_to_train_is_refused(cfg, stage, words):
    with pytest.raises(ValueError, match=words):
        adapted(cfg, stage)


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [LORA, BOTH])
def test_merged_and_unmerged_logits_agree_to_1e_5_of_the_largest(cfg):
    tokens, _, positions, cu, tiles = BATCH
    model, _ = adapted(cfg)
    stir_adapters(model)
    unmerged = model.logits(tokens, positions, cu, tiles)
    weights = {name: p.detach() for name, p in model.state_dict().items()}
    before = {name: p.clone() for name, p in weights.items()}
    merged, adapters = lora.merge_adapters(weights, cfg.lora_alpha / cfg.lora_rank)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    plain = tiny()
    difference = (unmerged - plain.logits(tokens, positions, cu, tiles)).abs().max()
    plain.load_state_dict(merged)  # strict: all names of a plain model, and no others
    after = plain.logits(tokens, positions, cu, tiles)
    assert difference > 0.1
    assert (after - unmerged).abs().max() <= 1e-5 * unmerged.abs().max()
    assert len(adapters) == 3 * 7 + (2 * 4 if cfg.lora_vision else 0)


def test_a_sum_is_made_in_fp32_and_rounded_once():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 6, generator=g).bfloat16()
    A = torch.randn(2, 6, generator=g)
    B = torch.randn(8, 2, generator=g)
    merged = lora.add_product(weight, A, B, 2.0)
    exact = weight.double() + 2.0 * B.double() @ A.double()
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact.bfloat16())


# ---- what it costs -------------------------------------------------------------------------------


def no_matmuls(q, k, v, *_, **__):
    """In the place of attention: every input has a gradient, and no matmul is counted."""
    groups = q.shape[1] // k.shape[1]
    return q * (k + v).repeat_interleave(groups, 1)


@pytest.mark.parametrize(
    "cfg, rates",
    [
        (RunConfig(), (1, 1, 1)),
        (RunConfig(), (0, 1, 0)),
        (RunConfig(freeze_llm_layers=2, freeze_vision_layers=1), (1, 1, 1)),
        (RunConfig(freeze_llm_layers=2), (0, 0, 1)),
        (RunConfig(freeze_llm_layers=3), (0, 0, 1)),
        (RunConfig(freeze_vision_layers=1), (1, 0, 0)),
        (LORA, (0, 0, 1)),
        (LORA, (0, 1, 1)),
        (LORA, (1, 0, 1)),
        (BOTH, (1, 1, 1)),
        (RunConfig(lora_rank=4, freeze_llm_layers=1), (0, 0, 1)),
        (RunConfig(lora_rank=4, lora_vision=True, freeze_vision_layers=1), (1, 1, 0)),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_strict_flops_are_those_that_pytorch_runs(monkeypatch, cfg, rates, tied):
    """Matmuls against PyTorch's own counter; attention, which is another kernel, is taken out."""
    monkeypatch.setattr(model_file, "attention", no_matmuls)
    monkeypatch.setattr(vision_file, "attention", no_matmuls)
    stage = Stage(lr_vision=rates[0], lr_projector=rates[1], lr_llm=rates[2])
    model, trained = adapted(cfg, stage, tie_embeddings=tied)
    tokens, labels, positions, cu, tiles = BATCH
    rows = (labels != model_file.IGNORE).nonzero()[:, 0]
    with FlopCounterMode(display=False) as counter:
        h = model.embed(tokens, tiles)
        h = model.language_model.hidden(h, positions, model_file.packed(cu), rows=rows)
        model.language_model.head(h).sum().backward()

    def strict(lengths):
        return train_flops(model.vision, model.llm, len(tiles), lengths, len(rows), trained)

    # A pair of tokens costs the same wherever it is; documents of one token have the fewest pairs.
    T = len(tokens)
    pairs = T * (T + 1) // 2
    llm_scores = pairs * (strict([T]) - strict([1] * T)) / (pairs - T)
    vision = model.vision
    blocks = vision.n_layers
    passed = blocks - trained.frozen_vision_layers if trained.vision else 0
    vit_scores = len(tiles) * 4 * (vision.n_patches + 1) ** 2 * vision.dim * (blocks + 2 * passed)
    # Under a frozen ViT only the projector's norm needs the gradient of its first matrix's input;
    # the formula leaves that out.
    for_the_norm = 0
    if trained.projector and not trained.vision:
        width = vision.dim * vision.downsample**2
        for_the_norm = 2 * len(tiles) * vision.tokens_per_tile * width * model.llm.dim
    expected = strict([T]) - llm_scores - vit_scores + for_the_norm
    assert counter.get_total_flops() == expected


# ---- how it runs ---------------------------------------------------------------------------------


def loss_and_gradients(model):
    model.zero_grad()
    loss = model(*BATCH)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_adapters_work_compiled_and_under_activation_checkpointing(how):
    model, _ = adapted(BOTH)
    stir_adapters(model)
    eager = copy.deepcopy(model)
    compile.compile_blocks(model, backend="eager")
    distributed.checkpoint_activations(model, how)
    for ours, its in zip(loss_and_gradients(model), loss_and_gradients(eager), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_in_bf16_adapters_and_their_moments_stay_fp32():
    model, _ = adapted(LORA, LLM_ONLY)
    optim.set_dtypes(model, torch.bfloat16)
    optimizer = optim.make_optimizer(model, LLM_ONLY, RunConfig())
    optim.make_moments(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        model(*BATCH).backward()
    tensors = checkpoint.tensors_of(model, optimizer)
    for name, tensor in tensors.items():
        adapter = "lora_" in name
        assert tensor.dtype == (torch.float32 if adapter else torch.bfloat16), name
    assert sum(name.startswith("optimizer.") for name in tensors) == 3 * 14 * 3


# ---- runs ----------------------------------------------------------------------------------------

ADAPTERS = ["--lora_rank=1", "--lora_alpha=4", "--lora_vision=True", "--llm.n_layers=2"]
ADAPTERS += ["--vision.n_layers=2", "--alignment.drop_path=0.3", "--freeze_llm_layers=1"]


def test_a_run_with_adapters_that_is_killed_ends_with_the_same_bits(
    zygote, shards, tmp_path
):
    def arguments(out):
        return one_stage(tmp_path / out, shards, *ADAPTERS, "--save_every=2", steps=7)

    die = """
import os, signal
note = signals.Watchdog.note
def dying(self, text):
    note(self, text)
    if text.startswith("alignment step 5: samples"):
        os.kill(os.getpid(), signal.SIGKILL)
signals.Watchdog.note = dying
"""
    assert zygote.run("train", arguments("whole"), 1, tmp_path / "whole.txt") == [0]
    killed = zygote.run("train", arguments("killed"), 1, tmp_path / "killed.txt", die)
    assert killed == [-signal.SIGKILL]
    assert zygote.run("train", arguments("killed"), 1, tmp_path / "again.txt") == [0]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, killed = ((tmp_path / out / "alignment" / file) for out in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes()
    assert "resumes at step" in (tmp_path / "again.txt").read_text()


@pytest.mark.parametrize("parallel, dtype", [("ddp", "float32"), ("fsdp", "float32"),
                                             ("fsdp", "bfloat16")])
def test_two_ranks_train_the_adapters_of_one_process(
    zygote, shards, tmp_path, parallel, dtype
):
    """Of rank 1, so that under FSDP the second rank has no row of A."""
    common = [*ADAPTERS, f"--dtype={dtype}", "--save_every=3"]
    one = one_stage(tmp_path / "one", shards, *common, "--grad_accum_steps=2", steps=3)
    assert zygote.run("train", one, 1, tmp_path / "one.txt") == [0]
    two = one_stage(tmp_path / "two", shards, *common, f"--parallel={parallel}", steps=3)
    assert zygote.run("train", two, 2, tmp_path / "two.txt") == [0, 0]
    exact = dtype == "float32"
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if exact else 1e-2)
    if exact:
        assert difference(read(tmp_path / "one"), read(tmp_path / "two")) < 1e-5
