"""How long a step of a recipe should take on eight H100, term by term. Needs no GPU.

    python -m bench.roofline

A prediction, until a card says otherwise. It is made for the fullest pack, of which `make nogpu`
has counted the kernels and the bytes that compiled kernels move (tests/nogpu/held.json). Each term
is the function below that has its name. What is not counted: the start and the end of kernels,
what NCCL takes from the processors while it sends, and what runs once a pack around the blocks
(embedding, pixel shuffle, norms of projector and head), a millisecond.
"""
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import sft
import train
from configurator import configure
from model import VLM, LLMConfig
from training import limits, memory
from training.dry_run import GPU_TFLOPS
from training.flops import Trained, document_scores, gradients_pass, train_flops
from training.optim import set_trained_parts
from training.traffic import Traffic, traffic_plan
from vision import VisionConfig, tile_scores

ROOT = Path(__file__).parent.parent
HELD = ROOT / "tests" / "nogpu" / "held.json"
SCRIPT_OF_RECIPE = {"pretrain_2b": train, "sft_2b": sft, "pretrain_8b": train, "sft_8b": sft}
WORLD = 8  # GPUs of one machine

PEAK = GPU_TFLOPS * 1e12
# Large bf16 matmuls of an H100 reach 650 to 790 TFLOP/s, by their shape; none of ours is small.
MATMUL_SHARE = 0.7


class Rates(NamedTuple):
    """FLOP/s of attention, forward and backward, to tiles of the ViT and to documents."""
    vit: tuple
    llm: tuple


# Our kernels: the middle of what was predicted from their SASS, 230 to 330 for tiles of 1,025
# tokens, 330 to 430 and 180 to 230 for documents. Backward of tiles: 195, the same for the two
# kernels with seven products, over the clocks that the one with five needs (docs/speed.md).
OURS = Rates((280e12, 260e12), (380e12, 205e12))
# flash-attention 3, which --attention=varlen takes where it is installed: its paper for 1,024 and
# 2,048 tokens, and for documents backward a benchmark of Triton's developers.
FLASH_3 = Rates((392e12, 363e12), (521e12, 316e12))
HBM = 3.35e12  # bytes a second, data sheet of the H100 SXM
HBM_SHARE = 0.8  # that a kernel with nothing else to do reaches; an assumption
NVLINK = 400e9  # bytes a second one way, of the 450 of the data sheet; an assumption
PCIE = 50e9  # bytes a second, of the 64 of PCIe 5.0 x16; an assumption
# Seconds of the CPU for a kernel: 93 ms for the 3,879 of an eager pack of advance on a busy core,
# with a driver that does nothing, and 3 us of the real one.
LAUNCH = 27e-6


@dataclass
class StagePack:
    """A stage of a recipe and its fullest pack."""
    cfg: object
    vision: VisionConfig
    llm: LLMConfig
    trained: Trained
    n_all: int  # parameters
    n_trained: int
    kernels: int  # of a pack, compiled
    compiled_bytes: float  # that Inductor's kernels read and write for a pack
    traffic: Traffic  # between the GPUs

    @property
    def lengths(self):
        """Tokens of the documents of the pack."""
        length = min(memory.TOKENS, self.cfg.tokens_per_pack)
        return [length] * (self.cfg.tokens_per_pack // length)

    @property
    def n_tiles(self):
        return memory.fullest_tiles(self.cfg, self.vision)

    @property
    def n_supervised(self):
        return memory.supervised_rows(self.cfg.tokens_per_pack)

    @property
    def sharded(self):
        # On one machine hsdp is fsdp.
        return self.cfg.parallel != "ddp"


# ---- matmuls and attention -----------------------------------------------------------------------


def strict_flops(stage):
    """The numerator of MFU, of one pack."""
    return train_flops(stage.vision, stage.llm, stage.n_tiles, stage.lengths, stage.n_supervised,
                       stage.trained)


def attention_flops(stage):
    """-> FLOPs forward and strict FLOPs backward, a pair for the ViT and one for the LLM."""
    trained = stage.trained
    vit = stage.n_tiles * tile_scores(stage.vision)
    vit_backward = stage.vision.n_layers - trained.frozen_vision_layers if trained.vision else 0
    llm = document_scores(stage.llm, stage.lengths)
    frozen, to_the_bottom = gradients_pass(stage.llm, trained)
    llm_backward = stage.llm.n_layers - (0 if to_the_bottom else frozen)
    return ((stage.vision.n_layers * vit, vit_backward * 2 * vit),
            (stage.llm.n_layers * llm, llm_backward * 2 * llm))


def matmul_seconds(stage):
    """Strict FLOPs without attention over MATMUL_SHARE of the peak.

    Neither "none" nor "selective" checkpointing computes a matmul twice.
    """
    attention = sum(itertools.chain(*attention_flops(stage)))
    return (strict_flops(stage) - attention) / (MATMUL_SHARE * PEAK)


def attention_seconds(flops, rates):
    """flops: forward and strict backward. The rates count five matmuls backward for two forward."""
    forward, backward = flops
    return forward / rates[0] + 1.25 * backward / rates[1]


def llm_attention_seconds(stage, rates):
    """With what each query head gives to dK and dV: written in fp32, read again and summed."""
    llm = stage.llm
    flops = attention_flops(stage)[1]
    layers = llm.n_layers * (flops[1] > 0)
    parts = layers * 2 * 2 * 4 * sum(stage.lengths) * llm.n_heads * llm.head_dim
    return attention_seconds(flops, rates) + hbm_seconds(parts)


# ---- bytes through the memory of the GPU ---------------------------------------------------------


def hbm_seconds(n_bytes):
    return n_bytes / (HBM_SHARE * HBM)


def compiled_seconds(stage):
    """Norms, rotation, SwiGLU, GELU, residuals, and their backward pass: Inductor's own count."""
    return hbm_seconds(stage.compiled_bytes)


def weight_seconds(stage):
    """What a pack does for each weight, whatever its tokens.

    DDP: a bf16 gradient is read (2 bytes) and added to the fp32 one (8); once a step the bf16
    copies are made (6). FSDP: gathered weights are copied to their places (4), forward and
    backward; a gradient is written in fp32 for its sum (6).
    """
    if stage.sharded:
        return hbm_seconds(8 * stage.n_all + 6 * stage.n_trained)
    return hbm_seconds((10 + 6 / stage.cfg.grad_accum_steps) * stage.n_trained)


def loss_seconds(stage):
    """kernels/cross_entropy.py: bf16 logits read twice and written once. If the head trains, each
    chunk adds to an fp32 gradient (10), which starts at 0 (4) and is scaled (8)."""
    llm = stage.llm
    n_bytes = 6 * stage.n_supervised * llm.vocab_size
    if stage.trained.llm:
        rows = min(stage.n_supervised, memory.rows_at_once(llm.vocab_size))
        chunks = -(-stage.n_supervised // rows)
        n_bytes += (10 * chunks + 12) * llm.vocab_size * llm.dim
    return hbm_seconds(n_bytes)


def optimizer_seconds(stage):
    """A step of AdamW reads weight, gradient and two moments and writes all but the gradient (28);
    the norm reads gradients (4), clipping scales them (8), and they become 0 (4)."""
    n = stage.n_trained / (WORLD if stage.sharded else 1)
    return hbm_seconds(44 * n)


# ---- transfers and launches ----------------------------------------------------------------------


def tile_copy_seconds(stage):
    """uint8 tiles over PCIe; hidden beside the pack before."""
    return stage.n_tiles * 3 * stage.vision.image_size**2 / PCIE


class Prediction(NamedTuple):
    """Milliseconds for a pack; what is once a step is divided by its packs."""
    matmul: float
    vit_attention: float
    llm_attention: float
    compiled: float
    weights: float
    loss: float
    optimizer: float
    waiting: float  # for transfers, tiles and launches that the rest cannot hide

    @property
    def pack(self):
        return sum(self)


def predict_pack(stage, rates=OURS):
    """-> Prediction, and what goes on beside it: {"NVLink": ms, "PCIe": ms, "launches": ms}."""
    packs = stage.cfg.grad_accum_steps
    busy = (
        matmul_seconds(stage),
        attention_seconds(attention_flops(stage)[0], rates.vit),
        llm_attention_seconds(stage, rates.llm),
        compiled_seconds(stage),
        weight_seconds(stage),
        loss_seconds(stage),
    )
    of_pack = stage.traffic.pack_inside / NVLINK
    of_step = stage.traffic.step_inside / NVLINK
    beside = {"NVLink": of_pack + of_step / packs, "PCIe": tile_copy_seconds(stage),
              "launches": LAUNCH * stage.kernels}
    # All but DDP's sum goes on while a pack computes; that has the last pack's backward pass, half.
    hidden = sum(busy)
    waiting = max(0.0, max(of_pack, beside["PCIe"], beside["launches"]) - hidden)
    waiting += max(0.0, of_step - hidden / 2) / packs
    seconds = (*busy, optimizer_seconds(stage) / packs, waiting)
    return (Prediction(*(1000 * s for s in seconds)),
            {name: 1000 * s for name, s in beside.items()})


# ---- the table -----------------------------------------------------------------------------------


def stages_of(recipe, held):
    """{stage: StagePack} of those stages of a recipe that held.json has counted."""
    script = SCRIPT_OF_RECIPE[recipe]
    cfg = script.Config()
    configure(cfg, [str(ROOT / "config" / f"{recipe}.py"), "--init_from="])
    found = {}
    for name, settings in limits.named_stages(cfg, train.all_stages(cfg)):
        counted = held.get(f"{recipe} {name}", {})
        if "compiled_gb" not in counted:
            continue
        with torch.device("meta"):
            model = VLM(cfg.vision, cfg.llm, 0)
        trained = set_trained_parts(model, settings, cfg)
        found[name] = StagePack(cfg, cfg.vision, cfg.llm, trained, memory.size_of(model),
                            memory.trained_size(model), counted["kernels"],
                            1e9 * counted["compiled_gb"],
                            traffic_plan(cfg.parallel, model, WORLD))
    return found


def table_line(name, stage):
    """A stage as a line of markdown."""
    ms, beside = predict_pack(stage)
    packs = stage.cfg.grad_accum_steps
    with_flash, _ = predict_pack(stage, FLASH_3)
    mfu = []
    for prediction in (ms, with_flash):
        mfu.append(100 * strict_flops(stage) / (prediction.pack / 1000) / PEAK)
    cells = [name, *(f"{x:.1f}" for x in ms), *(f"{x:.1f}" for x in beside.values()),
             f"{ms.pack:.0f}", f"{packs * ms.pack / 1000:.2f}", *(f"{x:.1f} %" for x in mfu)]
    return "| " + " | ".join(cells) + " |"


def main():
    held = json.loads(HELD.read_text())
    names = ["stage", *(name.replace("_", " ") for name in Prediction._fields), "(NVLink)",
             "(PCIe)", "(launches)", "a pack", "a step, s", "strict MFU", "with flash-attention 3"]
    print(f"Predicted for {WORLD} H100, milliseconds of a pack; in brackets: beside it. "
          "No card has run it.")
    print("| " + " | ".join(names) + " |")
    print("|---" * len(names) + "|")
    for recipe in SCRIPT_OF_RECIPE:
        for name, stage in stages_of(recipe, held).items():
            print(table_line(f"{recipe} {name}", stage))


if __name__ == "__main__":
    main()
