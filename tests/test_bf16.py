"""bf16 arithmetic: the dtype of the residuals, and training that follows fp32."""
import pytest
import torch
from small_model import pack, tiny

KINDS = {"InternViT and Qwen2.5": {}, "AIMv2 and Qwen3": {"kind": "aimv2", "qwen3": True}}
STEPS = 16


def in_dtype(dtype):
    """fp32 weights and the arithmetic of `dtype`, as train.py has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_residuals_have_the_dtype_of_the_arithmetic_where_weights_are_fp32(kind, dtype):
    model = tiny(**kind).train()
    model.vision_model.drop_path = 0.1
    found = []

    def record(block, inputs, output):
        found.append((inputs[0].dtype, output.dtype))

    blocks = [*model.vision_model.blocks, *model.language_model.model.layers]
    for block in blocks:
        block.register_forward_hook(record)
    with in_dtype(dtype):
        model(*pack([40, 30], [3, 2]))
    assert found == [(dtype, dtype)] * len(blocks)


def losses_of_training(kind, dtype):
    """The loss of each step."""
    model = tiny(std=0.05, n_layers=2, **kind).train()
    model.vision_model.drop_path = 0.1
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    found = []
    for step in range(STEPS):
        torch.manual_seed(step)  # stochastic depth draws the same
        batch = pack([40, 30], [3, 2], step % 2)
        labels = batch[1]
        with in_dtype(dtype):
            loss = model(*batch) / (labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_training_in_bf16_follows_training_in_fp32(kind):
    exact = losses_of_training(kind, torch.float32)
    assert exact[-1] < 0.6 * exact[0]
    ours = losses_of_training(kind, torch.bfloat16)
    apart = (ours - exact).abs().mean() / exact.mean()
    assert apart < 0.002, f"{apart:.2%} of the loss"
