"""Parity with transformers' InternVL and Qwen2, an independent implementation.

Logits, every gradient, every part.
"""

import pytest
import torch
import torch.nn.functional as F
from small_model import IMG, LLM, tiny

from inputs.chat import IGNORE
from inputs.images import normalize
from model import VLM, LLMConfig, packed, rope_table
from vision import Projector, VisionConfig, pixel_shuffle

t = pytest.importorskip(
    "transformers", reason="transformers is the oracle; pip install -r requirements-dev.txt"
)
torch.set_num_threads(1)
EXACT = dict(atol=1e-4, rtol=1e-4)
VIT_NAMES = {  # ours -> theirs, one after the other
    "embeddings.class_embedding": "embeddings.cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.": "patch_embeddings.projection.",
    "encoder.layers": "encoder.layer",
    ".attn.proj.": ".attention.projection_layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
}
NAMES = {
    "vision_model.": "model.vision_tower.",
    "mlp1.0": "model.multi_modal_projector.layer_norm",
    "mlp1.1": "model.multi_modal_projector.linear_1",
    "mlp1.3": "model.multi_modal_projector.linear_2",
    "language_model.lm_head": "lm_head",
    "language_model.model.": "model.language_model.",
}


def their_names(name):
    """What transformers calls our parameter: one name, or three where it keeps q, k and v apart."""
    for ours, theirs in (NAMES | (VIT_NAMES if name.startswith("vision_model") else {})).items():
        name = name.replace(ours, theirs) if not name.startswith("model.language_model.") else name
    return [
        name.replace(".attn.qkv.", f".attention.{x}_proj.")
        for x in ("qkv" if ".attn.qkv." in name else "q")
    ]


def vision_config(v):
    return t.InternVLVisionConfig(
        hidden_size=v.dim,
        num_hidden_layers=v.n_layers,
        num_attention_heads=v.n_heads,
        intermediate_size=v.ffn_dim,
        image_size=[v.image_size] * 2,
        patch_size=[v.patch_size] * 2,
        attention_bias=True,
        norm_type="layer_norm",
        layer_norm_eps=v.norm_eps,
        use_mean_pooling=True,
    )


def text_config(c):
    return t.Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.ffn_dim,
        rms_norm_eps=c.norm_eps,
        head_dim=c.head_dim,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        tie_word_embeddings=c.tie_embeddings,
        max_position_embeddings=c.max_positions,
    )


def twin_of(vlm):
    """The same weights in transformers' InternVLForConditionalGeneration."""
    twin = t.InternVLForConditionalGeneration(
        t.InternVLConfig(
            vision_config=vision_config(vlm.vision).to_dict(),
            text_config=text_config(vlm.llm).to_dict(),
            image_token_id=IMG,
            tie_word_embeddings=vlm.llm.tie_embeddings,
        )
    )
    state = {}
    for name, tensor in vlm.state_dict().items():
        theirs = their_names(name)
        state |= dict(zip(theirs, tensor.chunk(len(theirs)), strict=True))
    assert state.keys() == twin.state_dict().keys(), state.keys() ^ twin.state_dict().keys()
    twin.load_state_dict(state)
    return twin.eval()


def conversation(vlm, images, seed=0):
    """One document, images of so many tiles each and text between -> tokens, labels, tiles."""
    g, s = torch.Generator().manual_seed(seed), vlm.vision.image_size
    parts = [torch.randint(0, 300, (7,), generator=g)]
    for n in images:
        parts += [
            torch.full((n * vlm.vision.tokens_per_tile,), IMG),
            torch.randint(0, 300, (5,), generator=g),
        ]
    tokens = torch.cat(parts)
    labels = torch.randint(0, 300, tokens.shape, generator=g)
    labels[torch.rand(tokens.shape, generator=g) < 0.5] = IGNORE
    return (
        tokens,
        labels,
        torch.randint(0, 256, (sum(images), 3, s, s), generator=g, dtype=torch.uint8),
    )


def same_logits_and_gradients(vlm, twin, tokens, labels, tiles):
    """Both run forward and backward.

    1e-4 in every logit, 1e-4 of its largest entry in every parameter's gradient.
    """
    positions, cu = torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32)
    ours = vlm.logits(tokens, positions, cu, tiles)
    theirs = twin(
        input_ids=tokens[None], pixel_values=normalize(tiles) if len(tiles) else None
    ).logits[0]
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, theirs, **EXACT)
    vlm.zero_grad()
    twin.zero_grad()
    vlm(tokens, labels, positions, cu, tiles).backward()
    F.cross_entropy(theirs, labels, reduction="sum").backward()
    for name, p in vlm.named_parameters():
        theirs = [twin.get_parameter(n).grad for n in their_names(name)]
        if theirs[0] is None:  # it saw no picture; ours ran a black tile, unused
            assert not len(tiles) and not p.grad.any(), name
        else:
            theirs = torch.cat(theirs)
            assert (p.grad - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@pytest.mark.parametrize("heads", [(12, 2), (28, 4)], ids=["2B 6 to 1", "8B 7 to 1"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "images, side",
    [((), 56), ((1,), 56), ((5,), 56), ((1, 4, 2), 56), ((1,), 84), ((2, 3), 84)],
    ids=[
        "text",
        "one tile",
        "many tiles",
        "several images",
        "one tile, other grid",
        "several images, other grid",
    ],
)
def test_logits_and_all_gradients_equal_transformers_before_and_after_a_step(
    images, side, tied, heads
):
    vlm = tiny(n_heads=heads[0], n_kv_heads=heads[1], tie_embeddings=tied, rope_theta=1e6)
    twin = twin_of(vlm)
    vlm.vision.image_size = side  # 84: the 4 x 4 position table is interpolated to 6 x 6
    batch = conversation(vlm, images)
    same_logits_and_gradients(vlm, twin, *batch)
    before = vlm.logits(
        batch[0], torch.arange(len(batch[0])), torch.tensor([0, len(batch[0])]), batch[2]
    )
    rate = 0.1 / torch.nn.utils.get_total_norm([p.grad for p in vlm.parameters()]).item()
    for model in (vlm, twin):  # each with its own gradients
        torch.optim.SGD(model.parameters(), rate).step()
    after = vlm.logits(
        batch[0], torch.arange(len(batch[0])), torch.tensor([0, len(batch[0])]), batch[2]
    )
    assert (after - before).abs().max() > 1e-2
    same_logits_and_gradients(vlm, twin, *conversation(vlm, images, seed=1))


def test_vit_at_full_width_equals_transformers():
    v = VisionConfig(n_layers=2)
    vit = VLM(v, LLMConfig(**LLM), IMG).init_weights(0, std=0.05).vision_model
    twin = t.InternVLVisionModel(vision_config(v)).eval()
    for name, tensor in vit.state_dict().items():
        theirs = [
            n.removeprefix("model.vision_tower.") for n in their_names(f"vision_model.{name}")
        ]
        for n, rows in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            twin.get_parameter(n).data.copy_(rows)
    tiles = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours, theirs = vit(tiles), twin(tiles).last_hidden_state[:, 1:]
    assert ours.shape == (1, 1024, 1024)
    torch.testing.assert_close(ours, theirs, **EXACT)
    (a,), (b,) = (torch.autograd.grad(x.square().mean(), tiles) for x in (ours, theirs))
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_pixel_shuffle_is_the_formula_index_by_index():
    x = torch.arange(2 * 1024 * 1024).view(2, 1024, 1024)  # every entry another number
    y, grid = pixel_shuffle(x), x.view(2, 32, 32, 1024)  # F[n, r, c, k]
    assert y.shape == (2, 256, 4096)
    for R in range(16):
        for C in range(16):
            for di in (0, 1):
                for dj in (0, 1):
                    q = di * 2048 + dj * 1024
                    assert torch.equal(
                        y[:, 16 * R + C, q : q + 1024], grid[:, 2 * R + di, 2 * C + dj]
                    )
    theirs = t.InternVLModel.pixel_shuffle(None, grid, scale_factor=0.5)
    assert torch.equal(y, theirs.reshape(2, 256, 4096))


@pytest.mark.parametrize("width", [1536, 3584])
def test_projector_equals_transformers(width):
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    v, c = VisionConfig(), LLMConfig(dim=width)
    torch.manual_seed(0)
    ours = Projector(v, width)
    twin = InternVLMultiModalProjector(
        t.InternVLConfig(vision_config=vision_config(v), text_config=text_config(c))
    )
    twin.load_state_dict(
        {
            their_names(f"mlp1.{n}")[0].removeprefix("model.multi_modal_projector."): tensor
            for n, tensor in ours.state_dict().items()
        }
    )
    x = torch.randn(2, 256, 4096)
    torch.testing.assert_close(ours(x), twin(x), **EXACT)


@pytest.mark.parametrize("kind", ["default", "dynamic"])  # InternVL3 has the second one
def test_rope_equals_transformers_bit_for_bit_at_all_32768_positions(kind):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    positions, c = torch.arange(32768), LLMConfig()
    config = text_config(c)
    config.rope_parameters |= {"rope_type": kind, "factor": 2.0}
    cos, sin = Qwen2RotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rope_table(positions, c.head_dim, c.rope_theta)
    sign = torch.where(
        torch.arange(c.head_dim) < c.head_dim // 2, -1.0, 1.0
    )  # of rotate_half, kept in our table
    assert torch.equal(ours[0][:, 0], cos[0]) and torch.equal(ours[1][:, 0], sin[0] * sign)


@pytest.mark.parametrize("heads", [(6, 1), (7, 1)])
def test_decoder_equals_transformers_up_to_position_32767(heads):
    cfg = dict(dim=96, n_heads=heads[0], n_kv_heads=heads[1], head_dim=128, rope_theta=1e6)
    llm = tiny(**cfg).language_model
    twin = t.Qwen2ForCausalLM(text_config(llm.cfg))
    twin.load_state_dict(llm.state_dict())
    g = torch.Generator().manual_seed(0)
    positions = torch.randperm(32766, generator=g)[:94].add(1).sort().values
    positions = torch.cat([torch.tensor([0]), positions, torch.tensor([32767])])
    tokens = torch.randint(0, 300, (96,), generator=g)
    attend = packed(torch.tensor([0, 96]))
    ours = llm.head(llm.hidden(llm.embed(tokens), positions, attend))
    theirs = twin.eval()(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=torch.ones(1, 96, dtype=torch.long),
    ).logits[0]
    torch.testing.assert_close(ours, theirs, **EXACT)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, p in llm.named_parameters():
        b = twin.get_parameter(name).grad
        assert (p.grad - b).abs().max() <= 1e-4 * b.abs().max(), name


def test_documents_packed_into_one_row_equal_transformers_on_each_alone():
    vlm = tiny()
    twin, documents = (
        twin_of(vlm),
        [conversation(vlm, images, seed=i) for i, images in enumerate([(1,), (3, 1), ()])],
    )
    lengths = [len(tokens) for tokens, _, _ in documents]
    tokens, _, tiles = map(torch.cat, zip(*documents, strict=True))
    ours = vlm.logits(
        tokens,
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths]).cumsum(0),
        tiles,
    )
    for (tokens, _, tiles), rows in zip(documents, ours.split(lengths), strict=True):
        pixels = normalize(tiles) if len(tiles) else None
        torch.testing.assert_close(
            rows, twin(input_ids=tokens[None], pixel_values=pixels).logits[0], **EXACT
        )
