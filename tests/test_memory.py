"""--dry_run's memory: the activations it counts are those that compiled blocks keep."""

import pytest
import torch

import train
from model import VLM, LLMConfig
from training import distributed, optim
from training.compile import compile_blocks
from training.memory import activation_bytes
from vision import VisionConfig

TOKENS = 40
TILES = 2
IMAGE = 500


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    yield
    torch._dynamo.reset()


def compiled_model(trained, checkpointing, n_layers):
    vit = VisionConfig(56, dim=48, n_layers=n_layers, n_heads=4, ffn_dim=160)
    llm = LLMConfig(512, 64, n_layers, 4, 2, 16, 192, tie_embeddings=True)
    model = VLM(vit, llm, IMAGE).init_weights(0).train()
    parts = (model.vision_model, model.mlp1, model.language_model)
    for part, trains in zip(parts, trained, strict=True):
        part.requires_grad_(trains)
    optim.set_dtypes(model, torch.bfloat16)
    # It decides what to keep as it does on a GPU.
    compile_blocks(model, "aot_eager_decomp_partition")
    distributed.checkpoint_activations(model, checkpointing)
    return model


def remove_layers(model, n):
    """Leave n blocks in each part: the first ones, and the last one, which returns rows."""
    for layers in (model.vision_model.encoder.layers, model.language_model.model.layers):
        del layers[n - 1:-1]
    model.vision.n_layers = n
    model.llm.n_layers = n


def kept_bytes(model):
    """Bytes that a forward pass keeps, without weights and autocast's copies of them."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters()
                                                      if p.ndim == 2}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if storage.data_ptr() not in parameters and not is_copy:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = TILES * model.vision.tokens_per_tile
    tokens = torch.tensor([IMAGE] * images + [1] * (TOKENS - images))
    labels = torch.tensor([-100] * 20 + [3] * 20)
    tiles = torch.zeros(TILES, 3, 56, 56, dtype=torch.uint8)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        borders = torch.tensor([0, TOKENS], dtype=torch.int32)
        model(tokens, labels, torch.arange(TOKENS), borders, tiles)
    return sum(storages.values())


@pytest.mark.parametrize(
    "trained, checkpointing",
    [
        ((True, True, False), "none"),
        ((True, True, True), "selective"),
    ],
)
def test_the_plan_counts_what_compiled_blocks_keep(trained, checkpointing):
    """Two depths are compared, which leaves the blocks."""
    model = compiled_model(trained, checkpointing, 4)
    cfg = train.Config(tokens_per_pack=TOKENS, activation_checkpointing=checkpointing)
    cfg.max_tiles_per_pack = TILES
    kept = []
    planned = []
    for n_layers in (4, 2):
        if n_layers < 4:
            remove_layers(model, n_layers)
        kept.append(kept_bytes(model))
        planned.append(activation_bytes(cfg, model, trained))
    assert kept[0] - kept[1] == pytest.approx(planned[0] - planned[1], rel=0.01)
