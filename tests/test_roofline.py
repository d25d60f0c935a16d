"""bench.roofline: each term is its formula, and sizes come from the recipes."""
import json
from dataclasses import replace

import pytest

import train
from bench import roofline
from model import LLMConfig
from training.flops import Trained, train_flops
from training.traffic import Traffic
from vision import VisionConfig

HBM = 0.8 * 3.35e12
# Two documents of 2,048 tokens, with two tiles.
SMALL = roofline.StagePack(
    cfg=train.RunConfig(tokens_per_pack=4096, max_tiles_per_pack=2, grad_accum_steps=4,
                        parallel="ddp", activation_checkpointing="none"),
    vision=VisionConfig(n_layers=1),
    llm=LLMConfig(n_layers=1),
    trained=Trained(),
    n_all=10**9,
    n_trained=10**9,
    kernels=1000,
    compiled_bytes=HBM / 100,
    # 7/8 of a sum of 4 GB, there and back
    traffic=Traffic(step_inside=7e9),
)


def test_terms_add_up_to_a_pack_and_flops_of_matmuls_and_attention_to_the_strict_ones():
    ms, _ = roofline.predict_pack(SMALL)
    assert ms.pack == pytest.approx(sum(ms)) and all(term >= 0 for term in ms)
    (vit, vit_back), (llm, llm_back) = roofline.attention_flops(SMALL)
    matmuls = ms.matmul / 1000 * 0.7 * 989e12
    strict = train_flops(SMALL.vision, SMALL.llm, 2, [2048, 2048], 384, SMALL.trained)
    assert matmuls + vit + vit_back + llm + llm_back == pytest.approx(strict)


def test_terms_of_a_small_stage_are_those_made_by_hand():
    ms, beside = roofline.predict_pack(SMALL)
    tile = 4 * 1025 * 1025 * 1024
    documents = 4 * 12 * 128 * (2 * 2048 * 2049 // 2)
    assert roofline.attention_flops(SMALL) == ((2 * tile, 4 * tile), (documents, 2 * documents))
    # five matmuls backward for two forward
    assert ms.vit_attention == pytest.approx(1000 * (2 * tile / 280e12 + 5 * tile / 260e12))
    parts = 2 * 2 * 4 * 4096 * 12 * 128
    seconds = documents / 380e12 + 2.5 * documents / 205e12 + parts / HBM
    assert ms.llm_attention == pytest.approx(1000 * seconds)
    flash, _ = roofline.predict_pack(SMALL, roofline.FLASH_3)
    assert flash.vit_attention == pytest.approx(1000 * (2 * tile / 392e12 + 5 * tile / 363e12))
    assert flash.llm_attention < ms.llm_attention and flash.matmul == ms.matmul
    assert ms.compiled == pytest.approx(10)
    assert ms.weights == pytest.approx(1000 * (10 + 6 / 4) * 1e9 / HBM)
    # 384 rows are one chunk
    assert ms.loss == pytest.approx(1000 * (6 * 384 + 22 * 1536) * 151936 / HBM)
    assert ms.optimizer == pytest.approx(1000 * 44e9 / HBM / 4)
    # a sum of 4 GB, there and back, hides behind half of a pack; 1,000 launches behind none
    busy = sum(ms[:6])
    assert busy < 27
    assert ms.waiting == pytest.approx(27 - busy + (17.5 - busy / 2) / 4)
    assert beside["NVLink"] == pytest.approx(17.5 / 4) and beside["launches"] == pytest.approx(27)


def test_a_pack_that_the_cpu_or_a_link_cannot_keep_up_with_waits_for_it():
    def waiting(**changes):
        return roofline.predict_pack(replace(SMALL, **changes))[0].waiting

    assert waiting(kernels=10**5) > 2000
    sharded = replace(SMALL.cfg, parallel="fsdp")
    # 17.5 ms, less than a pack
    assert waiting(cfg=sharded, traffic=Traffic(pack_inside=7e9), kernels=100) == 0
    assert waiting(cfg=sharded, traffic=Traffic(pack_inside=7e11), kernels=100) > 500


def test_nobody_waits_for_the_gradient_of_what_is_frozen():
    frozen = replace(SMALL, trained=Trained(False, True, False), n_trained=10**7)
    ms, _ = roofline.predict_pack(frozen)
    everything, _ = roofline.predict_pack(SMALL)
    assert roofline.attention_flops(frozen)[0][1] == 0
    for term in ("matmul", "vit_attention", "weights", "loss", "optimizer"):
        assert getattr(ms, term) < getattr(everything, term), term


def test_sizes_are_those_of_the_recipe():
    counted = {"kernels": 1, "compiled_gb": 2.5}
    held = {"sft_8b instruction": counted, "pretrain_2b advance": counted, "decode": {"kernels": 1}}
    (name, large), = roofline.stages_of("sft_8b", held).items()
    assert name == "instruction" and large.sharded and large.llm.dim == 3584
    assert large.n_all == large.n_trained > 7.5e9 and large.compiled_bytes == 2.5e9
    assert large.traffic.pack_inside > 7e9 * 8 * 7 / 8 and not large.traffic.step_inside
    assert large.lengths == [2048] * 4 and large.n_tiles == 32 and large.n_supervised == 768
    (name, small), = roofline.stages_of("pretrain_2b", held).items()
    assert name == "advance" and not small.trained.llm and small.n_trained < 0.2 * small.n_all
    assert small.traffic.step_inside == 2 * 7 / 8 * 4 * small.n_trained


def test_every_recipe_that_make_nogpu_has_counted_is_in_the_table(capsys):
    held = json.loads(roofline.HELD.read_text())
    roofline.main()
    text = capsys.readouterr().out
    for stage, counted in held.items():
        assert (f"| {stage} |" in text) == (stage.split()[0] in roofline.SCRIPT_OF_RECIPE
                                             and "compiled_gb" in counted), stage
