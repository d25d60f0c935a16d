"""model.py: packing, loss, frozen parts, generation, FLOPs. Exactness is in test_parity.py."""
import random, types

import pytest
import torch, torch.distributed as td
from torch.distributed.fsdp import fully_shard

import model as M, vision
import generate as G
from training.distributed import Dist, checkpoint_activations, parallelize
from generate import generate, generate_stream
from model import IGNORE, LLMConfig, VLM, train_flops
from training.dry_run import activation_bytes
from vision import VisionConfig

torch.set_num_threads(1)
VISION = dict(image_size=56, patch_size=14, dim=64, n_layers=2, n_heads=4, ffn_dim=128)         # 4 tokens per tile
LLM = dict(vocab_size=320, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, rope_theta=1e4)
IMG = 319


def tiny(seed=0, vision=True, std=0.2, **llm):
    """A small random model; the wide std makes mistakes visible."""
    vlm = VLM(VisionConfig(**VISION) if vision else None, LLMConfig(**{**LLM, **llm}), IMG).init_weights(seed, std=std)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in vlm.named_parameters():
            if p.dim() == 1:                    # also biases, norms and layer scales away from 0 and 1
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return vlm


def pack(lengths, n_tiles=(), seed=0):
    """Random documents; document i holds n_tiles[i] tiles. -> tokens, labels, positions, cu_seqlens, tiles."""
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, 300, (sum(lengths),), generator=g)
    for start, n in zip(cu.tolist(), n_tiles):
        tokens[start + 1:start + 1 + 4 * n] = IMG
    labels = torch.randint(0, 300, tokens.shape, generator=g)
    labels[torch.rand(tokens.shape, generator=g) < 0.5] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    tiles = torch.randint(0, 256, (sum(n_tiles), 3, 56, 56), generator=g, dtype=torch.uint8)
    return tokens, labels, positions, cu.int(), tiles


def test_documents_of_a_pack_do_not_see_each_other():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30, 14, 21), (1, 3, 0, 2))
    before = vlm.logits(tokens, positions, cu, tiles)
    tokens, tiles = tokens.clone(), tiles.clone()
    tokens[25:39] = torch.arange(14)                            # text and pictures of the second document
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
    for ours, theirs in zip(*(torch.autograd.grad(x, [*vlm.language_model.parameters()]) for x in (loss, exact))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_loss_is_the_weighted_sum_over_supervised_positions():
    vlm = tiny()
    tokens, labels, positions, cu, tiles = pack((9, 30, 14), (1, 3, 0))
    weights = torch.rand(tokens.shape)
    rows = labels != IGNORE
    logits = vlm.logits(tokens, positions, cu, tiles)
    each = torch.nn.functional.cross_entropy(logits[rows], labels[rows], reduction="none")
    torch.testing.assert_close(vlm(tokens, labels, positions, cu, tiles), each.sum())
    torch.testing.assert_close(vlm(tokens, labels, positions, cu, tiles, weights), (each * weights[rows]).sum())


@pytest.mark.parametrize("head", ["untied", "tied", "a unit of its own"])
def test_a_sharded_head_gives_the_same_loss_and_gradients(head):
    td.init_process_group("gloo", rank=0, world_size=1, store=td.HashStore())
    try:
        plain, sharded = (tiny(tie_embeddings=head == "tied") for _ in range(2))
        if head == "a unit of its own":
            fully_shard(sharded.language_model.lm_head)
        checkpoint_activations(sharded, "full")
        parallelize(sharded, "fsdp", torch.float32, Dist())
        batch = pack((9, 30, 14), (1, 3, 0))
        losses = [model(*batch, torch.linspace(0, 1, 53)) for model in (plain, sharded)]
        for loss in losses:
            (loss * 0.01).backward()                            # as the loop scales it
        torch.testing.assert_close(*losses)
        for a, b in zip(plain.parameters(), sharded.parameters()):
            torch.testing.assert_close(a.grad, b.grad.full_tensor(), atol=1e-5, rtol=1e-4)
    finally:
        td.destroy_process_group()


def test_embedding_noise_is_of_the_given_size_and_in_training_only():
    vlm, (tokens, labels, positions, cu, tiles) = tiny(), pack((9, 30), (1, 2))
    clean = vlm(tokens, labels, positions, cu, tiles)
    vlm.embed_noise, x = 0.5, torch.randn(20000, 64)
    noise = vlm.noisy(x) - x
    size = noise.square().mean(-1).sqrt() / x.square().mean(-1).sqrt()             # uniform between 0 and 0.5
    assert abs(size.mean() - 0.25) < 0.01 and 0.49 < size.quantile(0.99) < 0.6 and size.min() < 0.01
    assert abs(noise.mean()) < 0.01
    assert vlm(tokens, labels, positions, cu, tiles) != clean
    assert vlm.eval()(tokens, labels, positions, cu, tiles) == clean


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
    hook = vlm.vision_model.encoder.layers[-1].register_forward_hook(lambda m, args, out: seen.append(out.grad_fn))
    vlm(*batch).backward()
    hook.remove()
    assert seen == [None]
    assert all((p.grad is not None) == name.startswith("mlp1.") for name, p in vlm.named_parameters())
    torch.testing.assert_close(vlm.mlp1[1].weight.grad, full)


def test_activation_checkpointing_changes_no_gradient():
    batch, grads = pack((9, 30), (1, 3)), []
    for what in ("none", "selective", "full"):
        vlm = tiny()
        checkpoint_activations(vlm, what)
        vlm(*batch).backward()
        grads.append([p.grad for p in vlm.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads))


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
    with pytest.raises(ValueError, match="16 <IMG_CONTEXT> tokens, but its 0 tiles give 0"):
        generate(vlm, [tokens.tolist()], [None], 4, set())


def test_a_model_without_vision_or_without_layers_works():
    tokens, labels, positions, cu, _ = pack((9, 30))
    text = tiny(vision=False)
    assert not [n for n, _ in text.named_parameters() if not n.startswith("language_model.")]
    assert text(tokens, labels, positions, cu) > 0
    assert tiny(n_layers=0)(tokens, labels, positions, cu) > 0


def test_init_weights_gives_the_same_numbers_after_meta_and_keeps_the_tie():
    one = VLM(VisionConfig(**VISION), LLMConfig(**LLM, tie_embeddings=True), IMG).init_weights(3)
    with torch.device("meta"):
        two = VLM(VisionConfig(**VISION), LLMConfig(**LLM, tie_embeddings=True), IMG)
    two.to_empty(device="cpu").init_weights(3)
    assert two.language_model.lm_head.weight is two.language_model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


# ---- generation ------------------------------------------------------------------------------------------------------

def prompts_and_tiles(n, seed=0):
    rng, prompts, tiles = random.Random(seed), [], []
    for i in range(n):
        k = rng.choice((0, 0, 1, 2))
        tokens, _, _, _, t = pack([rng.randrange(10, 40)], [k], seed=i)
        prompts.append(tokens.tolist())
        tiles.append(t if k else None)
    return prompts, tiles


def test_greedy_answers_equal_recomputing_the_whole_sequence():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(3)
    for prompt, t, answer in zip(prompts, tiles, generate(vlm, prompts, tiles, 8, set())):
        sequence = list(prompt)
        for token in answer:
            n = len(sequence)
            logits = vlm.logits(torch.tensor(sequence), torch.arange(n), torch.tensor([0, n]), t)
            assert token == logits[-1, :IMG].argmax()            # <IMG_CONTEXT> is never an answer
            sequence.append(token)
        assert len(answer) == 8


def test_cached_logits_equal_the_full_forward_to_1e_4():
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(8)
    size, rows = max(map(len, prompts)) + 1, list(range(8))
    with torch.inference_mode():
        cache = torch.zeros(3, 2, 8, 2, size + 5, 16)
        first = G.prefill(vlm, prompts, tiles, cache, rows)
        positions = torch.tensor([len(p) for p in prompts])
        second = G.decode_step(vlm, first.argmax(-1), positions, cache, size)
        wider = G.decode_step(vlm, first.argmax(-1), positions, cache, size + 5)
        for i, (prompt, t) in enumerate(zip(prompts, tiles)):
            sequence = torch.tensor([*prompt, first[i].argmax()])
            full = vlm.logits(sequence, torch.arange(len(sequence)), torch.tensor([0, len(sequence)]), t)
            for ours, theirs in ((first[i], full[-2]), (second[i], full[-1]), (wider[i], full[-1])):
                assert (ours - theirs).abs().max() <= 1e-4


def test_batch_of_one_and_of_64_give_the_same_greedy_answers(monkeypatch):
    vlm = tiny().eval()
    prompts, tiles = prompts_and_tiles(64)
    stop = set(range(0, 320, 9))                                # rows end at different steps and are retired
    together = generate(vlm, prompts, tiles, 24, stop)
    assert together == [generate(vlm, [p], [t], 24, stop)[0] for p, t in zip(prompts, tiles)]
    assert len({len(a) for a in together}) > 5 and not any(stop & set(a) for a in together)
    monkeypatch.setattr(G, "PREFILL_TOKENS", 100)               # prompts in several packs
    assert together == generate(vlm, prompts, tiles, 24, stop)
    for small in (dict(batch_size=5), dict(batch_tokens=300)):          # rows are admitted where others were retired
        assert together == generate(vlm, prompts, tiles, 24, stop, **small)
    draw = dict(temperature=1.5, top_p=0.9, seed=7)                     # noise belongs to the row, not to the batch
    drawn = generate(vlm, prompts[:20], tiles[:20], 24, stop, **draw)
    assert drawn == generate(vlm, prompts[:20], tiles[:20], 24, stop, **draw, batch_size=3) != together[:20]
    assert drawn[4:5] == generate(vlm, prompts[4:5], tiles[4:5], 24, stop, **draw | dict(seed=11))


def test_requests_are_taken_from_an_iterator_only_when_there_is_room_and_a_long_one_waits():
    vlm, taken = tiny().eval(), []
    def requests():
        for n in (5, 60, 10, 200, 7, 7, 7):
            taken.append(n)
            yield [1 + n % 9] * n, None
    seen = list(G.decode(vlm, requests(), G.Decoding(6, {5}, batch_size=2)))
    assert sorted(row for row, token in seen if token is None) == list(range(7)) and len(taken) == 7
    alone = [generate(vlm, [[1 + n % 9] * n], [None], 6, {5})[0] for n in taken]
    assert alone == [[t for r, t in seen if r == row and t is not None] for row in range(7)]
    taken.clear()
    stream = G.decode(vlm, requests(), G.Decoding(6, {5}, batch_size=2))
    next(stream)
    assert len(taken) <= 4


def test_streamed_tokens_equal_the_answer_and_sampling_is_reproducible():
    vlm = tiny().eval()
    (prompt,), (t,) = prompts_and_tiles(1)
    kw = dict(max_new_tokens=12, stop_ids={5}, temperature=1.0, top_p=0.9, top_k=50)
    answer = generate(vlm, [prompt], [t], seed=1, **kw)[0]
    assert list(generate_stream(vlm, prompt, t, seed=1, **kw)) == answer
    assert generate(vlm, [prompt], [t], seed=2, **kw)[0] != answer
    assert generate(vlm, [prompt], [t], 12, {5}, temperature=1.0, top_k=1) == generate(vlm, [prompt], [t], 12, {5})
    assert generate(vlm, [], [], 4, set()) == [] and generate(vlm, [prompt], [t], 0, set()) == [[]]


def test_sampling_draws_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([[1.0, 3.0, 2.0, -50.0]])
    noise = torch.arange(0, 1, 1e-4)
    drawn = G.sample(logits.expand(len(noise), -1), 2.0, 1.0, 0, noise)
    torch.testing.assert_close(drawn.bincount(minlength=4) / len(noise), (logits[0] / 2).softmax(-1), atol=2e-4, rtol=0)
    assert set(G.sample(logits.expand(len(noise), -1), 2.0, 1.0, 2, noise).tolist()) == {1, 2}
    assert set(G.sample(logits.expand(len(noise), -1), 2.0, 0.3, 0, noise).tolist()) == {1}


# ---- FLOPs -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("llm, sample, align, advance, sft", [
    ("qwen2.5-1.5b", (1, 320, 48), 2.48202, 3.93243, 4.79336),
    ("qwen2.5-1.5b", (7, 2048, 192), 17.1308, 27.2837, 32.7399),
    ("qwen2.5-1.5b", (11, 3840, 768), 32.7178, 48.6723, 59.0931),
    ("qwen2.5-7b", (1, 320, 48), 9.27721, 10.7319, 14.9604),
    ("qwen2.5-7b", (7, 2048, 192), 61.7089, 71.8918, 98.8287),
    ("qwen2.5-7b", (11, 3840, 768), 119.125, 135.127, 186.078)])
def test_strict_flops_equal_an_independent_count_to_a_tenth_of_a_percent(llm, sample, align, advance, sft):
    tiles, tokens, supervised = sample
    cfg = LLMConfig(**LLMConfig.PRESETS[llm])
    for train, teraflops in (((0, 1, 0), align), ((1, 1, 0), advance), ((1, 1, 1), sft)):
        got = train_flops(VisionConfig(), cfg, tiles, [tokens], supervised, train)
        skipped = 2 * (tokens - supervised) * (cfg.dim * cfg.n_heads * cfg.head_dim + 3 * cfg.dim * cfg.ffn_dim)
        got += skipped * (2 + train[2])                 # the count knows no last block that skips o_proj and MLP
        assert isinstance(got, int) and got / 1e12 == pytest.approx(teraflops, rel=1e-3)


def test_strict_flops_count_attention_only_inside_documents():
    cfg = LLMConfig(**LLM)
    one, two = (train_flops(None, cfg, 0, lengths, 10, (False, False, True)) for lengths in ([64], [32, 32]))
    assert one - two == 3 * 3 * 4 * 4 * 16 * (32 * 32)


@pytest.mark.parametrize("trained", [(False, True, False), (True, True, False), (True, True, True)])
def test_the_plan_counts_the_activations_that_autograd_keeps(monkeypatch, trained):
    """Two depths are compared, which leaves the blocks. Norms and attention save what the kernels of a GPU save."""
    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v, out := torch.zeros_like(q), torch.zeros(q.shape[:2]))    # fp32 log-sums
            return out

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, n):
            ctx.save_for_backward(x, torch.zeros(*x.shape[:-1], n))
            return x.clone()

    kept = {}
    def count(tensor):                                              # once; not weights, nor autocast's copies of them
        if not {tensor.shape, tensor.mT.shape if tensor.dim() > 1 else tensor.shape} & shapes:
            kept[tensor.data_ptr()] = tensor
        return tensor
    for module, norm, n in ((M, "rms_norm", 1), (vision, "layer_norm", 2)):
        monkeypatch.setattr(module, "attention", lambda q, k, v, *_, **__: Attend.apply(*(x.contiguous() for x in (q, k, v))))
        monkeypatch.setattr(module.F, norm, lambda x, *_, n=n: Norm.apply(x, n))
    bytes_of = {}
    for layers in (2, 5):
        vit = VisionConfig(56, dim=48, n_layers=layers, n_heads=4, ffn_dim=160)
        llm = LLMConfig(512, 64, layers, 4, 2, 16, 192, tie_embeddings=True)
        vlm = VLM(vit, llm, 500).init_weights(0)
        for part, on in zip((vlm.vision_model, vlm.mlp1, vlm.language_model), trained):
            part.requires_grad_(on)
        shapes = {p.shape for p in vlm.parameters()}
        kept.clear()
        batch = [torch.tensor(x) for x in ([500] * 8 + [1] * 32, [-100] * 20 + [3] * 20, [*range(40)])]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            vlm(*batch, torch.tensor([0, 40], dtype=torch.int32), torch.zeros(2, 3, 56, 56, dtype=torch.uint8))
        bytes_of[layers] = sum(t.nbytes for t in kept.values()), activation_bytes(vit, llm, 40, 2, trained)
    (a, x), (b, y) = bytes_of.values()
    assert b - a == pytest.approx(y - x, rel=0.01), (b - a, y - x)
