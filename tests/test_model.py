"""model.py: packing, loss, frozen parts, FLOPs. Exactness is in test_parity.py."""


import pytest
import torch
import torch.distributed as td
from small_model import IMG, LLM, VISION, pack, tiny
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

import vision
from aimv2 import vision_encoder
from inputs.chat import IGNORE
from model import VLM, LanguageModel, LLMConfig, init_weights, packed
from training.distributed import ALONE, checkpoint_activations, parallelize
from training.flops import Trained, llm_flops, train_flops
from vision import VisionConfig

torch.set_num_threads(1)


def test_documents_of_a_pack_do_not_see_each_other():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30, 14, 21), (1, 3, 0, 2))
    before = vlm.logits(tokens, positions, cu, tiles)
    tokens, tiles = tokens.clone(), tiles.clone()
    tokens[25:39] = torch.arange(14)  # text and pictures of the second document
    tiles[1:4] = 255 - tiles[1:4]
    after = vlm.logits(tokens, positions, cu, tiles)
    assert torch.equal(before[:9], after[:9]) and torch.equal(before[39:], after[39:])
    assert not torch.equal(before[9:39], after[9:39])


def test_what_no_label_asks_for_skips_the_mlp_of_the_last_block():
    vlm, (tokens, labels, positions, cu, _), rows = tiny(), pack((9, 30)), []
    for block in vlm.language_model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    loss = vlm(tokens, labels, positions, cu)
    assert rows[:-1] == [39] * (len(rows) - 1) and rows[-1] == (labels != IGNORE).sum() < 39
    logits = vlm.logits(tokens, positions, cu)
    exact = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss, exact)
    weights = [*vlm.language_model.parameters()]
    gradients = [torch.autograd.grad(x, weights) for x in (loss, exact)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_loss_is_the_weighted_sum_over_supervised_positions():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30, 14), (1, 3, 0))
    weights = torch.rand(tokens.shape)
    rows = labels != IGNORE
    logits = vlm.logits(tokens, positions, cu, tiles)
    each = torch.nn.functional.cross_entropy(logits[rows], labels[rows], reduction="none")
    torch.testing.assert_close(vlm(tokens, labels, positions, cu, tiles), each.sum())
    torch.testing.assert_close(
        vlm(tokens, labels, positions, cu, tiles, weights), (each * weights[rows]).sum()
    )


@pytest.mark.parametrize("head", ["untied", "tied", "a unit of its own", "SAIL-VL2"])
def test_a_sharded_head_gives_the_same_loss_and_gradients(head):
    kind = {"kind": "aimv2", "qwen3": True} if head == "SAIL-VL2" else {}
    td.init_process_group("gloo", rank=0, world_size=1, store=td.HashStore())
    try:
        plain, sharded = (tiny(tie_embeddings=head == "tied", **kind) for _ in range(2))
        if head == "a unit of its own":
            fully_shard(sharded.language_model.lm_head)
        checkpoint_activations(sharded, "full")
        parallelize(sharded, "fsdp", torch.float32, ALONE)
        batch = pack((9, 30, 14), (1, 3, 0))
        losses = [model(*batch, torch.linspace(0, 1, 53)) for model in (plain, sharded)]
        for loss in losses:
            (loss * 0.01).backward()  # as the loop scales it
        torch.testing.assert_close(*losses)
        for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad.full_tensor(), atol=1e-5, rtol=1e-4)
    finally:
        td.destroy_process_group()


def test_a_pack_without_supervision_gives_zero_loss_and_zero_gradients():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30), (1, 3))
    loss = vlm(tokens, torch.full_like(labels, IGNORE), positions, cu, tiles)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in vlm.parameters())


def test_a_pack_without_tiles_still_reaches_every_trainable_parameter():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30))
    assert len(tiles) == 0
    plain = vlm.eval()(tokens, labels, positions, cu, tiles)
    loss = vlm.train()(tokens, labels, positions, cu, tiles)
    loss.backward()
    assert torch.equal(loss, plain) and all(p.grad is not None for p in vlm.parameters())
    assert not vlm.mlp1[1].weight.grad.any()


def test_frozen_parts_get_no_gradients_and_a_frozen_vit_keeps_no_activations():
    vlm = tiny()
    batch = pack((9, 30), (1, 3))
    vlm(*batch).backward()
    full = vlm.mlp1[1].weight.grad.clone()
    vlm.zero_grad(set_to_none=True)
    vlm.vision_model.requires_grad_(False)
    vlm.language_model.requires_grad_(False)
    seen = []
    hook = vlm.vision_model.encoder.layers[-1].register_forward_hook(
        lambda m, args, out: seen.append(out.grad_fn)
    )
    vlm(*batch).backward()
    hook.remove()
    assert seen == [None]
    assert all(
        (p.grad is not None) == name.startswith("mlp1.") for name, p in vlm.named_parameters()
    )
    torch.testing.assert_close(vlm.mlp1[1].weight.grad, full)


def test_activation_checkpointing_changes_no_gradient():
    batch, grads = pack((9, 30), (1, 3)), []
    for what in ("none", "selective", "full"):
        vlm = tiny()
        checkpoint_activations(vlm, what)
        vlm(*batch).backward()
        grads.append([p.grad for p in vlm.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


def test_frozen_bf16_and_trainable_fp32_run_together_under_autocast():
    vlm = tiny(std=0.05)
    vlm.vision_model.to(torch.bfloat16).requires_grad_(False)
    vlm.language_model.to(torch.bfloat16).requires_grad_(False)
    batch = pack((9, 30, 14), (1, 3, 0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = vlm(*batch)
    loss.backward()
    assert loss.dtype == torch.float32 and vlm.mlp1[1].weight.grad.dtype == torch.float32
    exact = vlm.float()(*batch)
    assert abs(loss - exact) < 0.01 * exact


def test_wrong_number_of_image_tokens_is_refused_with_both_numbers():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30), (1, 3))
    with pytest.raises(ValueError, match="16 <IMG_CONTEXT> tokens, but its 3 tiles give 12"):
        vlm(tokens, labels, positions, cu, tiles[:3])


def test_a_language_model_alone_reads_embeddings():
    text = LanguageModel(LLMConfig(**LLM))
    init_weights(text, 0)
    whole = tiny()
    whole.language_model.load_state_dict(text.state_dict())
    tokens, labels, positions, cu, _ = pack((9, 30))
    assert text.loss(text.embed(tokens), labels, positions, cu) > 0
    logits = text.head(text.hidden(text.embed(tokens), positions, packed(cu)))
    assert torch.equal(logits, whole.logits(tokens, positions, cu))


def test_a_model_without_layers_works():
    tokens, labels, positions, cu, _ = pack((9, 30))
    assert tiny(n_layers=0)(tokens, labels, positions, cu) > 0


def test_init_weights_gives_the_same_numbers_after_meta_and_keeps_the_tie():
    one = VLM(VisionConfig(**VISION), LLMConfig(**LLM, tie_embeddings=True), IMG).init_weights(3)
    with torch.device("meta"):
        two = VLM(VisionConfig(**VISION), LLMConfig(**LLM, tie_embeddings=True), IMG)
    two.to_empty(device="cpu").init_weights(3)
    assert two.language_model.lm_head.weight is two.language_model.model.embed_tokens.weight
    states = one.state_dict().values(), two.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# ---- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "llm, sample, align, advance, sft",
    [
        ("qwen2.5-1.5b", (1, 320, 48), 2.48202, 3.93243, 4.79336),
        ("qwen2.5-1.5b", (7, 2048, 192), 17.1308, 27.2837, 32.7399),
        ("qwen2.5-1.5b", (11, 3840, 768), 32.7178, 48.6723, 59.0931),
        ("qwen2.5-7b", (1, 320, 48), 9.27721, 10.7319, 14.9604),
        ("qwen2.5-7b", (7, 2048, 192), 61.7089, 71.8918, 98.8287),
        ("qwen2.5-7b", (11, 3840, 768), 119.125, 135.127, 186.078),
    ],
)
def test_strict_flops_equal_an_independent_count_to_a_tenth_of_a_percent(
    llm, sample, align, advance, sft
):
    tiles, tokens, supervised = sample
    cfg = LLMConfig(**LLMConfig.PRESETS[llm])
    for train, teraflops in (((0, 1, 0), align), ((1, 1, 0), advance), ((1, 1, 1), sft)):
        got = train_flops(VisionConfig(), cfg, tiles, [tokens], supervised, train)
        skipped = (
            2
            * (tokens - supervised)
            * (cfg.dim * cfg.n_heads * cfg.head_dim + 3 * cfg.dim * cfg.ffn_dim)
        )
        got += skipped * (2 + train[2])  # the count knows no last block that skips o_proj and MLP
        assert isinstance(got, int) and got / 1e12 == pytest.approx(teraflops, rel=1e-3)


@pytest.mark.parametrize("kind", ["internvit", "aimv2"])
def test_flops_of_a_vit_are_those_that_pytorch_counts(kind):
    cfg = VisionConfig(56, dim=48, n_layers=3, n_heads=4, ffn_dim=160, kind=kind)
    vit = vision_encoder(cfg)
    init_weights(vit, 0)
    for frozen in (True, False):
        vit.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            out = vit(torch.randn(5, 3, 56, 56))
            if not frozen:
                out.sum().backward()
        counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        # PyTorch counts attention's backward pass by how it is computed, not at 2 x the forward.
        attention = sum(n for op, n in counted.items() if "attention" in op or "bmm" in op)
        L = cfg.rows_per_tile
        ours = vision.vit_flops(cfg, 5, Trained(vision=not frozen))
        ours -= 5 * 3 * (1 if frozen else 3) * 4 * L * L * cfg.dim
        assert sum(counted.values()) - attention == ours


def test_strict_flops_count_attention_only_inside_documents():
    cfg = LLMConfig(**LLM)
    one, two = (llm_flops(cfg, lengths, 10, Trained()) for lengths in ([64], [32, 32]))
    assert one - two == 3 * 3 * 4 * 4 * 16 * (32 * 32)
