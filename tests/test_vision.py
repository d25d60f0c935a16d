"""vision.py: the ViT's own arithmetic, pixel shuffle, projector."""

import pytest
import torch

from vision import Projector, VisionConfig, ViT, keep_factors, pixel_shuffle

torch.set_num_threads(1)


def test_pixel_shuffle_is_version_2():
    x = torch.randn(2, 16, 5)  # 4 x 4 patches
    y = pixel_shuffle(x)
    for R in range(2):
        for C in range(2):
            square = [x[:, (2 * R + di) * 4 + 2 * C + dj] for di in (0, 1) for dj in (0, 1)]
            assert torch.equal(y[:, R * 2 + C], torch.cat(square, -1))


def test_parameter_names_and_counts_are_those_of_internvit_300m():
    with torch.device("meta"):
        vit, mlp1 = ViT(VisionConfig()), Projector(VisionConfig(), 1536)
    state = vit.state_dict()
    assert len(state) == 340 and sum(t.numel() for t in state.values()) == 304_012_288
    assert state["encoder.layers.23.attn.qkv.weight"].shape == (3072, 1024)
    assert state["encoder.layers.0.ls1"].shape == (1024,)
    assert state["embeddings.position_embedding"].shape == (1, 1025, 1024)
    assert {n: tuple(t.shape) for n, t in mlp1.state_dict().items()} == {
        "0.weight": (4096,),
        "0.bias": (4096,),
        "1.weight": (1536, 4096),
        "1.bias": (1536,),
        "3.weight": (1536, 1536),
        "3.bias": (1536,),
    }


def small_vit(**kw):
    from model import init_weights

    vit = ViT(
        VisionConfig(**{**dict(image_size=56, dim=32, n_layers=3, n_heads=2, ffn_dim=64), **kw})
    )
    init_weights(vit, 0, std=0.2)
    return vit


def test_tiles_do_not_depend_on_their_neighbours():
    vit, tiles = small_vit(), torch.randn(5, 3, 56, 56)
    together = vit(tiles)
    assert together.shape == (5, 16, 32)
    tiles[3] = 0
    again = vit(tiles)
    assert torch.equal(together[:3], again[:3]) and torch.equal(together[4], again[4])


def test_positions_are_interpolated_to_another_grid():
    vit = small_vit()
    table = vit.embeddings.position_embedding
    grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    bigger = torch.nn.functional.interpolate(grid, size=(6, 5), mode="bicubic", align_corners=False)
    tiles = torch.randn(1, 3, 84, 70)
    x = vit.embeddings.patch_embedding(tiles).flatten(2) + bigger.flatten(2)
    torch.testing.assert_close(vit.embeddings(tiles)[:, 1:], x.transpose(1, 2))
    assert vit(tiles).shape == (1, 30, 32)


def test_stochastic_depth_drops_whole_tiles_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    tiles, length = 4000, 3
    layers = keep_factors(3, tiles, length, 0.4, "cpu")
    for rate, factors in zip([0.0, 0.2, 0.4], layers, strict=True):
        assert factors.shape == (2, tiles * length)
        by_tile = factors.view(2, tiles, length)
        assert bool((by_tile == by_tile[:, :, :1]).all())
        dropped = (factors == 0).float().mean().item()
        assert dropped == pytest.approx(rate, abs=0.03)
        kept = factors[factors > 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    vit, tiles = small_vit(), torch.randn(4, 3, 56, 56)
    plain = vit(tiles)
    vit.drop_path = 0.9
    assert torch.equal(vit.eval()(tiles), plain) and not torch.equal(vit.train()(tiles), plain)
