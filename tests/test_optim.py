"""What trains and how fast: frozen modules, optimizer groups, schedule, clipping, seeds."""

import pytest
import torch
from stand_in import ADVANCE, ALONE, Tiny, batch, build, train

from train import RunConfig, Stage
from training import optim


def test_a_frozen_module_keeps_every_bit_and_is_not_in_the_optimizer():
    model, optimizer = build(ADVANCE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, ALONE, [0, 1], range(2))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if not k.startswith("language_model")}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {
        id(p) for n, p in model.named_parameters() if not n.startswith("language_model")
    }


def test_what_trains_is_told_and_a_stage_that_trains_nothing_is_refused():
    assert optim.set_trainable(Tiny(), ADVANCE) == (True, True, False)
    blind = Tiny()
    blind.vision_model = None
    assert optim.set_trainable(blind, ADVANCE) == (False, True, False)
    with pytest.raises(ValueError, match="lr_vision"):
        optim.set_trainable(Tiny(), Stage())


def test_only_matrices_decay_and_each_module_has_its_rate():
    stage = Stage(lr_vision=1e-5, lr_projector=1e-3, lr_llm=2e-5, weight_decay=0.1)
    model = Tiny(tied=False)
    optim.set_trainable(model, stage)
    groups = optim.make_optimizer(model, stage, RunConfig()).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in groups if g["weight_decay"] == 0.1 for p in g["params"]}
    assert (
        "vision_model.patch_embedding.weight" in decayed
        and "language_model.lm_head.weight" in decayed
    )
    assert not any("embed_tokens" in n or "norm" in n for n in decayed)
    assert not any(n.endswith(("bias", "class_embedding", "ls1")) for n in decayed)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert {(g["name"].split("/")[0], g["lr"], g["base_lr"]) for g in groups} == {
        ("vision_model", 1e-5, 1e-5),
        ("mlp1", 1e-3, 1e-3),
        ("language_model", 2e-5, 2e-5),
    }


def test_the_stage_table_counts_tied_weights_once():
    model = Tiny()
    optim.set_trainable(model, ADVANCE)
    rows = optim.print_stage_table("advance", model, ADVANCE)
    assert sum(r[1] for r in rows) == sum(p.numel() for p in model.parameters())
    assert [r[2] == r[1] for r in rows] == [True, True, False]


def test_the_rate_warms_up_from_above_zero_and_ends_at_the_floor():
    scale = [optim.lr_scale(s, 100, 10, 0.1) for s in range(100)]
    assert 0 < scale[0] < scale[9] < scale[10] == 1.0
    assert (
        all(a > b for a, b in zip(scale[10:], scale[11:], strict=False)) and 0.1 < scale[-1] < 0.101
    )
    assert optim.lr_scale(55, 100, 10, 0.1) == pytest.approx(0.55)  # half way down
    assert optim.lr_scale(0, 1, 0, 0.0) == 1.0 and optim.lr_scale(
        500, 100, 10, 0.1
    ) == pytest.approx(0.1)


def test_clipping_reports_the_norm_per_module_and_scales_all_by_one_factor():
    model, _ = build(ADVANCE)
    model(*batch(0, 0)).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    total, modules = optim.clip_grad_norm(model, 0.25)
    assert total.item() == pytest.approx(
        torch.cat([g.flatten() for g in before.values()]).norm().item(), rel=1e-5
    )
    assert total.item() > 0.25 and set(modules) == {"vision_model", "mlp1"}
    for n, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, before[n] * (0.25 / total))
    next(iter(model.parameters())).grad.fill_(float("nan"))
    assert not optim.clip_grad_norm(model, 0.25)[0].isfinite()


def test_seeds_depend_on_every_part():
    draws = []
    for parts in ((1, 2, 3), (1, 3, 2), (1, 2, 4), (1, 2, 3)):
        optim.seed_everything(*parts)
        draws.append(torch.rand(()).item())
    assert draws[0] == draws[3] and len(set(draws)) == 3
