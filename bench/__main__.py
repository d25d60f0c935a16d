"""Speed beside what one would use instead: same inputs, same process, parity first, then medians of interleaved rounds.

    python -m bench attn          # packed attention against PyTorch's (default, cuDNN), FlexAttention, flash-attn
    python -m bench ce            # linear + cross-entropy against the plain one: time, memory
    python -m bench train         # training steps: tokens/s, strict MFU, memory, against our own padded batches
    python -m bench vs-hf         # training steps against transformers' InternVL: same weights, same samples
    python -m bench decode        # tokens/s of one answer against transformers' generate, prompts/s of many against one
    python -m bench stages        # alignment and advance beside sft: seconds of a step against its share of the FLOPs
    python -m bench pack          # packs planned from lengths: fill, balance of 8 ranks, time, beside other methods
    python -m bench image         # JPEG to tiles on one core, beside Pillow and transformers' image processor
    python -m bench loader        # images/s of whole batches from 2 workers, beside what an H200 needs
    python -m bench warmup        # seconds until the first compiled step is done, graphs compiled for 20 more packs

Rows come as they are measured; at the end, whatever happened, device and versions, a markdown table and, on the last
line, the same rows as JSON: row, value, unit and, beside a peer, peer, peer_value, ratio (ours over theirs, above 1 is
better). A row that fails, or whose sides disagree, is named and left out, and the exit code is 1. `make gpu` runs it
all where there is a GPU. Data and weights are random. Shape letters: as in kernels/attention.py.
"""
import contextlib, functools, gc, importlib.metadata, io, itertools, json, math, re, signal, subprocess, sys, tempfile
import time, types
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import data, vision
from inputs import images as images_module, index, packing, sources as sources_module, tokenizer as tokenizer_module
from train import RunConfig, Stage
from training import distributed, metrics, optim
from configurator import configure, run_script, setting, subcommand
from kernels import attention as A, cross_entropy as C
from generate import generate
from model import IGNORE, LLMConfig, VLM, compile_blocks, train_flops
from inputs.images import normalize
from vision import VisionConfig
from weights import image_token_id, load_folder, save_folder

TOKENIZER = Path(__file__).resolve().parent.parent / "toy" / "tokenizer"

@dataclass(slots=True)
class Config:
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one, else cpu
    rounds: int = setting(7, at_least=1)  # interleaved rounds, of which the median counts
    rows: str = ""  # only rows whose name begins with one of these, separated by commas
    compiled: bool = True  # vs-hf: beside the compiled peer as well, a minute or two of compilation
    threads: int = 0  # CPU threads; 0: PyTorch's choice

# ---- measuring -------------------------------------------------------------------------------------------------------
def seconds_per_call(sides, rounds, device):
    """sides {name: function} -> {name: median}. Each round calls each side, for 20 ms or once, in turning order."""
    def clock(f, n):
        if device.type == "cuda": torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n): f()
        if device.type == "cuda": torch.cuda.synchronize()
        return (time.perf_counter() - start) / n
    for f in sides.values(): f()                                # compilation, caches
    repeats, times = {name: max(1, int(0.02 / clock(f, 1))) for name, f in sides.items()}, {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides)[::1 if i % 2 else -1]: times[name].append(clock(sides[name], repeats[name]))
    return {name: median(t) for name, t in times.items()}

def compare(row, sides, cfg, device, work, unit, **more):
    """Rows of `ours` beside each other side: value = work of a call / its seconds; more: further columns."""
    assert sides.keys() > {"ours"}, f"only {', '.join(sides) or 'nothing'} runs here: nothing to compare"
    rates = {name: work / seconds for name, seconds in seconds_per_call(sides, cfg.rounds, device).items()}
    return [dict(row=row, value=rates["ours"], unit=unit, peer=name, peer_value=rate, ratio=rates["ours"] / rate) | more
            for name, rate in rates.items() if name != "ours"]

def error(ours, theirs):
    """Largest difference over the largest value, of lists of tensors."""
    return max(((a.double() - b).abs().max() / b.double().abs().max()).item() for a, b in zip(ours, theirs))

def agree(errors):
    """Refuse a row in which we err more than twice as much as the best peer; errors: {side: error} against fp64."""
    best = min(e for side, e in errors.items() if side != "ours")
    assert errors["ours"] <= 2 * best + 1e-6, f"ours errs by {errors['ours']:.2g}, the best peer by {best:.2g}"
    return errors

def show(x):
    return (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}") if isinstance(x, float) else str(x)

def report(rows, device):
    packages = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = [f"{n} {packages[n]}" for n in ("torch", "triton", "transformers", "flash-attn") if n in packages]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1] if sys.platform == "linux" else "CPU"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print("", f"{name}, {torch.get_num_threads()} CPU threads, {', '.join(versions)}", "", sep="\n")
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    for line in columns, ["---"] * len(columns), *([show(row.get(c, "")) for c in columns] for row in rows):
        print(f"| {' | '.join(line)} |")
    print(json.dumps(rows))

# ---- attn, ce --------------------------------------------------------------------------------------------------------
# name: (lengths of the documents, H, K, D, causal)
ATTN = dict(cpu=dict(vit_1025=([1025] * 2, 4, 4, 64, False), vit_demo=([37] * 40, 6, 6, 32, False),
                     llm_demo=([60, 45, 110, 80, 75, 62, 51, 97, 70, 55, 48, 47], 4, 2, 32, True),
                     llm_1k=([500, 300, 224], 12, 2, 128, True)),
            cuda=dict(vit_1024=([1024] * 64, 16, 16, 64, False), vit_1025=([1025] * 64, 16, 16, 64, False),
                      llm_2b=([2048] * 8, 12, 2, 128, True), llm_8b=([2048] * 8, 28, 4, 128, True),
                      llm_2b_mixed=([700, 3000, 1024, 1500, 4096, 2992, 2048, 1024], 12, 2, 128, True),
                      llm_2b_one=([16384], 12, 2, 128, True)))

def attention_sides(lengths, causal, device):
    """{name: f(q, k, v)} of packed q (T, H, D), k and v (T, K, D); the one after ours runs everywhere."""
    torch._dynamo.reset()                                       # or flex would run eagerly after eight graphs
    S, L, cu = len(lengths), max(lengths), torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    def batch(*qkv):                                                                            # (S, heads, L, D)
        return sdpa(*(x.unflatten(0, (S, L)).transpose(1, 2) for x in qkv)).transpose(1, 2).flatten(0, 1)
    def loop(*qkv):
        parts = zip(*(x.transpose(0, 1).split(lengths, 1) for x in qkv))                        # (heads, length, D)
        return torch.cat([sdpa(*(x[None] for x in part))[0] for part in parts], 1).transpose(0, 1)
    equal, sides = S * L == sum(lengths), {"ours": lambda *qkv: A.attention(*qkv, cu, L, causal)}
    sides |= {"sdpa": batch} if equal else {"sdpa, a loop": loop}
    if device.type == "cpu": return sides
    if equal: sides["sdpa, cudnn"] = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(batch)
    document = torch.repeat_interleave(torch.arange(S), torch.tensor(lengths)).to(device)
    visible = lambda b, h, i, j: (document[i] == document[j]) & ((i >= j) if causal else (i >= 0))
    mask = create_block_mask(visible, None, None, sum(lengths), sum(lengths), device)
    flex = torch.compile(functools.partial(flex_attention, block_mask=mask, enable_gqa=True))
    sides["flex"] = lambda *qkv: flex(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
    ends, seen = cu.to(device), (-1, 0 if causal else -1)
    with contextlib.suppress(ImportError):                      # PyTorch's own, of flash-attn 2 or what is installed
        from torch.nn.attention.varlen import varlen_attn
        sides["varlen"] = lambda *qkv: varlen_attn(*qkv, ends, ends, L, L, window_size=seen, enable_gqa=True)
    with contextlib.suppress(ImportError):
        from flash_attn_interface import flash_attn_varlen_func as flash_3
        sides["flash-attn 3"] = lambda *qkv: flash_3(*qkv, ends, ends, L, L, causal=causal)
    with contextlib.suppress(ImportError):
        from flash_attn import flash_attn_varlen_func
        sides["flash-attn"] = lambda *qkv: flash_attn_varlen_func(*qkv, ends, ends, L, L, causal=causal)
    return sides

def attn(cfg, device, name, lengths, H, K, D, causal):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    *qkv, dout = (torch.randn(sum(lengths), n, D, device=device, dtype=dtype) for n in (H, K, K, H))
    sides, modes, errors = attention_sides(lengths, causal, device), dict(fwd={}, bwd={}), {}
    def run(f, kind):
        x = [t.to(kind, copy=True).requires_grad_() for t in qkv]
        out = f(*x)
        backward = functools.partial(torch.autograd.grad, out, x, dout.to(kind), retain_graph=True)
        return [out.detach(), *backward()], backward
    exact, _ = run(list(sides.values())[1], torch.float32 if device.type == "cuda" else torch.float64)
    for side, f in sides.items():
        try:
            results, backward = run(f, dtype)
            errors[side], modes["bwd"][side] = error(results, exact), backward
            modes["fwd"][side] = functools.partial(torch.no_grad()(f), *qkv)
        except Exception as e:                                  # of a library that is built for other machines
            print(f"{name}: {side} does not run here: {str(e).strip().splitlines()[0][:150]}", flush=True)
    agree(errors)
    flops = 4 * D * H * sum(n * (n + 1) // 2 if causal else n * n for n in lengths) / 1e12      # visible pairs only
    for mode, work in dict(fwd=flops, bwd=2.5 * flops).items():
        for row in compare(f"{name}_{mode}", modes[mode], cfg, device, work, "TFLOP/s", error=errors["ours"]):
            yield row | dict(peer_error=errors[row["peer"]])

def ce(cfg, device, name, trains):
    (R, width, V), dtype = ((4096, 1536, 151936), torch.bfloat16) if device.type == "cuda" else (
        (1024, 384, 16384), torch.float32)
    h, labels = torch.randn(R, width, device=device, dtype=dtype), torch.randint(V, (R,), device=device)
    weight = (0.02 * torch.randn(V, width, device=device)).to(torch.float32 if trains else dtype)
    inputs = [h.requires_grad_(), weight.requires_grad_(trains)][:1 + trains]
    plain = lambda h, w, labels: F.cross_entropy((h @ w.to(h.dtype).T).float(), labels, reduction="sum")
    sides = {side: lambda f=f: torch.autograd.grad(f(h, weight, labels) / R, inputs)
             for side, f in (("ours", C.linear_cross_entropy), ("plain", plain))}
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(plain(wide[0], wide[1] if trains else weight.double(), labels) / R, wide)
    errors = agree({side: error(f(), exact) for side, f in sides.items()})
    del wide, exact
    (row,), memory = compare(name, sides, cfg, device, 1.0, "steps/s", error=errors["ours"]), {}
    for side, f in sides.items() if device.type == "cuda" else ():      # peak on top of what is there, gradients too
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        memory[f"{side}_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    yield row | dict(peer_error=errors["plain"]) | memory

# ---- train, warmup, vs-hf --------------------------------------------------------------------------------------------
# name: (ViT, LLM, samples, tiles of each or a mixture to draw them from, text tokens of each (from, to));
# None: as the length file's first samples have them
SIZES = {"7m": (VisionConfig(112, dim=192, n_layers=4, n_heads=3, ffn_dim=768),
                LLMConfig(8192, 256, 4, 4, 2, 64, 768, tie_embeddings=True), 16, 1, (24, 120)),
         "25m": (VisionConfig(112, dim=256, n_layers=6, n_heads=4, ffn_dim=1024),
                 LLMConfig(16384, 384, 8, 6, 2, 64, 1024, tie_embeddings=True), 16, 1, (24, 120)),
         "toy": (VisionConfig(**VisionConfig.PRESETS["toy"]), LLMConfig(**LLMConfig.PRESETS["toy"]), 24,
                 (0, 1, 1, 1, 3, 3, 4, 5), (16, 64)),
         "2b": (VisionConfig(), LLMConfig(), 8, 7, (128, 384)),
         "2b_mix": (VisionConfig(), LLMConfig(), 6, (0, 1, 1, 3, 5, 7), (64, 512)),
         "8b": (VisionConfig(), LLMConfig(**LLMConfig.PRESETS["qwen2.5-7b"]), 8, 7, (128, 384))}
SIZES["7m_mix"] = *SIZES["7m"][:2], 32, None, None
STAGES = dict(alignment=(0, 1, 0), advance=(1, 1, 0), sft=(1, 1, 1))        # which of ViT, projector, LLM train

def random_samples(size, seed=0):
    """-> [(tokens, labels), ...] of a size, the second half of each text supervised, and uint8 tiles (N, 3, s, s)."""
    (vision, _, n, tiles, text), g, samples = SIZES[size], torch.Generator().manual_seed(seed), []
    if text:
        choices = tiles if isinstance(tiles, tuple) else (tiles,)
        tiles = [choices[i] for i in torch.randint(len(choices), (n,), generator=g)]
        lengths = torch.randint(text[0], text[1] + 1, (n,), generator=g).tolist()
    else:
        file = length_file()
        lengths, grid = file.rows["tokens"][:n].tolist(), (file.rows["n_images"] * -(-file.images["width"] // 448))[:n]
        tiles = (grid + (grid > 1)).tolist()                    # with the thumbnail
    for i, length in enumerate(lengths):
        image = torch.full((tiles[i] * vision.tokens_per_tile,), image_token_id(TOKENIZER))
        tokens = torch.cat([image, torch.randint(0, 1000, (length,), generator=g)])
        labels = torch.full_like(tokens, IGNORE)
        labels[-(length // 2) - 1:-1] = tokens[-(length // 2):]                                 # already shifted
        samples.append((tokens, labels))
    return samples, torch.randint(0, 256, (sum(tiles), 3, images_module.image_size, images_module.image_size), generator=g).byte()

def padded(samples):
    """Tokens and labels, right-padded: (S, L) each."""
    return (torch.nn.utils.rnn.pad_sequence(x, True, pad) for x, pad in zip(zip(*samples), (0, IGNORE)))

def pack(samples, tiles, device):
    """The arguments of VLM.forward."""
    lengths, (tokens, labels) = [len(t) for t, _ in samples], (torch.cat(x).to(device) for x in zip(*samples))
    return dict(tokens=tokens, labels=labels, positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
                cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), tiles=tiles.to(device))

def build(size, stage, dtype, device):
    """-> model, optimizer. fp32 masters of what trains; the arithmetic of `dtype` comes from autocast."""
    with torch.device("meta"):
        model = VLM(*SIZES[size][:2], image_token_id(TOKENIZER))
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, p in model.named_parameters():                    # on the device: init_weights would take minutes at 8B
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(not name.endswith("bias"))
    rates = Stage(**{f"lr_{part}": 1e-6 * on for part, on in zip(("vision", "projector", "llm"), STAGES[stage])})
    optim.set_trainable(model, rates)
    optim.set_dtypes(model, dtype)
    return model.train(), optim.make_optimizer(model, rates, RunConfig())

def step(loss, optimizer, dtype, device):
    """One training step; loss() is the mean over supervised tokens."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()

def train(cfg, device, name, size, stage, checkpointing="none"):
    dtype, cuda = distributed.compute_dtype("auto", device), device.type == "cuda"
    (model, optimizer), (samples, tiles) = build(size, stage, dtype, device), random_samples(size)
    distributed.checkpoint_activations(model, checkpointing)
    eights = [[samples[i] for i in batch] for batch in batches_of_8(samples)]   # each padded to its longest sample
    count = lambda batch: sum(int((t == model.image_token_id).sum()) for t, _ in batch) // model.vision.tokens_per_tile
    packs = {"ours": [pack(samples, tiles, device)], "ours, padded": [
        pack([*zip(*padded(batch))], part, device) for batch, part in zip(eights, tiles.split([*map(count, eights)]))]}
    supervised, lengths = sum(int((y != IGNORE).sum()) for _, y in samples), [len(t) for t, _ in samples]
    sides = {side: lambda ps=ps: step(lambda: sum(model(**p) for p in ps) / supervised, optimizer, dtype, device)
             for side, ps in packs.items()}
    if cuda:
        compile_blocks(model)
        torch.cuda.reset_peak_memory_stats()
        sides["ours"]()                                         # alone: the memory is ours
    memory = metrics.peak_memory_gb()
    row, = compare(name, sides, cfg, device, float(sum(lengths)), "tokens/s")
    flops = train_flops(*SIZES[size][:2], len(tiles), lengths, supervised, STAGES[stage])
    tflops, peak = row["value"] / sum(lengths) * flops / 1e12, metrics.peak_flops(device)
    yield row | dict(tflops=tflops, mfu_percent=tflops * 1e14 / peak if peak else "", gb=memory)

def stages(cfg, device, name, size):
    """Seconds of a step with frozen parts beside one in which all train, over the same ratio of FLOPs: 1 is ideal."""
    dtype, (samples, tiles) = distributed.compute_dtype("auto", device), random_samples(size)
    if size == "2b": samples, tiles = samples[:3], tiles[:3 * SIZES[size][3]]   # three models and their moments
    batch, lengths, sides, flops = pack(samples, tiles, device), [len(t) for t, _ in samples], {}, {}
    supervised = int((batch["labels"] != IGNORE).sum())
    for stage, trains in STAGES.items():
        model, optimizer = build(size, stage, dtype, device)
        if device.type == "cuda": compile_blocks(model)
        sides[stage] = lambda m=model, o=optimizer: step(lambda: m(**batch) / supervised, o, dtype, device)
        flops[stage] = train_flops(*SIZES[size][:2], len(tiles), lengths, supervised, trains)
    seconds = seconds_per_call(sides, cfg.rounds, device)
    for stage in ("alignment", "advance"):
        share, ideal = seconds[stage] / seconds["sft"], flops[stage] / flops["sft"]
        yield dict(row=f"{name}_{stage}", value=share, unit="of sft", flop_share=ideal, over_share=share / ideal)

def warmup(cfg, device, name, size):
    dtype, seen = distributed.compute_dtype("auto", device), []
    model, optimizer = build(size, "sft", dtype, device)
    compile_blocks(model)
    for seed in range(21):
        batch, start = pack(*random_samples(size, seed), device), time.perf_counter()
        step(lambda: model(**batch) / 1000, optimizer, dtype, device).item()
        seen.append((time.perf_counter() - start, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    yield dict(row=f"{name}_first_step", value=seen[0][0], unit="s")
    yield dict(row=f"{name}_next_20_steps", value=sum(s for s, _ in seen[1:]), unit="s")
    yield dict(row=f"{name}_graphs_after_the_first_step", value=seen[-1][1] - seen[0][1], unit="graphs")

def export_and_load(state, configs, dtype, device):
    """-> transformers' InternVL with these weights, and the folder of ours beside it, which goes with the process."""
    from transformers import InternVLForConditionalGeneration
    folder = Path(tempfile.mkdtemp(dir=temporary().name))
    save_folder(state, *configs, folder / "ours", TOKENIZER, dtype=torch.float32)
    export = [sys.executable, "convert.py", "export", folder / "ours", folder / "theirs", "--layout=transformers"]
    subprocess.run(export, cwd=TOKENIZER.parent.parent, check=True, capture_output=True)
    return InternVLForConditionalGeneration.from_pretrained(folder / "theirs", dtype=dtype).to(device), folder / "ours"

temporary = functools.cache(tempfile.TemporaryDirectory)

def vs_hf(cfg, device, name, size, dtype, compiled=False):
    """Both sides train everything with AdamW, in the row's arithmetic; theirs takes a right-padded batch and keeps no
    cache. Losses and gradients must agree in fp32; at 2B, for the memory, those of the first sample."""
    (samples, tiles), (model, optimizer) = random_samples(size), build(size, "sft", dtype, device)
    peer, _ = export_and_load(model.state_dict(), SIZES[size][:2], torch.float32, device)
    peer.train()
    def losses_of(samples, tiles):
        batch, (tokens, labels) = pack(samples, tiles, device), padded(samples)
        supervised, mask = int((labels != IGNORE).sum()), torch.tensor([[len(t)] for t, _ in samples])
        inputs = {name: x.to(device) for name, x in dict(
            input_ids=tokens, attention_mask=torch.arange(tokens.shape[1]) < mask, pixel_values=normalize(tiles),
            labels=F.pad(labels[:, :-1], (1, 0), value=IGNORE)).items()}                        # they shift themselves
        return dict(ours=lambda: model(**batch) / supervised,
                    transformers=lambda f=peer: f(**inputs, use_cache=False).loss)
    losses = losses_of(samples, tiles)
    few = losses_of(samples[:1], tiles[:SIZES[size][3]]) if size == "2b" else losses
    ours, theirs = ([(loss := few[side]()), torch.autograd.grad(loss, m.get_parameter(p + "k_proj.weight"))[0]]
                    for side, m, p in (("ours", model, "language_model.model.layers.0.self_attn."),
                                       ("transformers", peer, "model.language_model.layers.0.self_attn.")))
    assert (off := error(ours, theirs)) <= 1e-4, f"loss or gradient differ by {off:.2g} in fp32"     # test_parity's
    if device.type == "cuda":
        compile_blocks(model)
        losses["transformers, cudnn"] = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
                                                    set_priority=True)(losses["transformers"])
    if cfg.compiled and compiled:
        losses["transformers, compiled"] = functools.partial(losses["transformers"], torch.compile(peer))
    adam = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=True)
    sides = {side: functools.partial(step, loss, optimizer if side == "ours" else adam, dtype, device)
             for side, loss in losses.items()}
    yield from compare(name, sides, cfg, device, float(len(samples)), "samples/s", error=off)

# ---- decode ----------------------------------------------------------------------------------------------------------
TINY = VisionConfig(112, dim=192, n_layers=4, n_heads=3, ffn_dim=768), LLMConfig(8192, 384, 10, 6, 2, 64, 1024)

def decode(cfg, device, name, dtype):
    """tiny: 64 tokens of one answer about one tile. batched: 64 answers of 16 tokens, against one after the other."""
    image, g, n = image_token_id(TOKENIZER), torch.Generator().manual_seed(0), 64
    tiles = torch.randint(0, 256, (n, 1, 3, 112, 112), generator=g).byte()
    prompts = [[image] * TINY[0].tokens_per_tile + torch.randint(0, 1000, (20 + i,), generator=g).tolist()
               for i in range(n)]
    peer, folder = export_and_load(VLM(*TINY, image).init_weights(0, std=0.06).state_dict(), TINY, dtype, device)
    model, ids = load_folder(folder, device, dtype)[0].eval(), torch.tensor(prompts[:1], device=device)
    ours = lambda i, j, tokens: generate(model, prompts[i:j], tiles[i:j], tokens, set())
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                  pixel_values=normalize(tiles[0].to(device), dtype), do_sample=False, suppress_tokens=[image])
    sides = {"ours": lambda: ours(0, 1, n),
             "transformers": lambda: peer.generate(**inputs)[:, ids.shape[1]:].tolist()}
    if name.startswith("batched"):
        sides = {"ours": lambda: ours(0, n, 16), "one by one": lambda: [ours(i, i + 1, 16)[0] for i in range(n)]}
    same = [a == b for pair in zip(*(f() for f in sides.values())) for a, b in zip(*pair)]              # token by token
    assert all(same) or dtype != torch.float32, f"{same.count(False)} of {len(same)} tokens differ in fp32"
    yield from compare(name, sides, cfg, device, float(n), "prompts/s" if "batched" in name else "tokens/s",
                       same_tokens=sum(same) / len(same))

# ---- pack ------------------------------------------------------------------------------------------------------------
def length_file(n=60000):
    """A Source of n samples: 12 % text alone, 33 % with one tile, 55 % with 2 to 10 and a thumbnail, log-normal text;
    1,232 tokens and 3.9 tiles on average. The pictures have sizes that give these tiles."""
    rng, grids = np.random.default_rng(0), np.arange(2, 11)
    kind, drawn = rng.random(n), rng.choice(grids, n, p=(19 - grids) / sum(19 - grids))
    grid = np.where(kind < 0.12, 0, np.where(kind < 0.45, 1, drawn))
    rows, images = np.zeros(n, index.ROW), np.zeros(n, index.IMAGE)
    rows["tokens"] = np.maximum(16, rng.lognormal(math.log(235) - 0.32, 0.8, n))
    rows["n_images"], rows["first_image"] = grid > 0, np.arange(n)
    images["width"], images["height"] = 448 * grid - rng.integers(0, 50, n), 448
    return types.SimpleNamespace(name="lengths", path="", rows=rows, images=images, repeat=1, weight=0, max_tiles=0,
                                 meta=dict(bad=[], digest=""))

def knapsack(tokens, tiles, T, N):
    """nanoVLM's published method: of a buffer of 64 packs' tokens the longest first into the emptiest of
    ceil(tokens / T) + 5 packs; what fits into none opens another."""
    buffer, packs, a = np.cumsum(tokens) // (64 * T), [], 0
    for b in [*np.flatnonzero(np.diff(buffer)) + 1, len(tokens)]:
        bins = [[0, 0, []] for _ in range(-(-sum(tokens[a:b]) // T) + 5)]
        for i in sorted(range(a, b), key=lambda i: -tokens[i]):
            if not (fit := [x for x in bins if x[0] + tokens[i] <= T and x[1] + tiles[i] <= N]):
                bins += (fit := [[0, 0, []]])
            emptiest = min(fit, key=lambda x: x[0])
            emptiest[:] = emptiest[0] + tokens[i], emptiest[1] + tiles[i], emptiest[2] + [i]
        packs, a = packs + [x[2] for x in bins if x[2]], b
    return packs

def batches_of_8(samples, *_):
    return [range(i, min(i + 8, len(samples))) for i in range(0, len(samples), 8)]

def packing(cfg, device, name, T, N):
    """fill: tokens over room. straggler_8ranks: FLOPs of a step's busiest rank over the mean of 8, 2B fine-tuning, mean
    over steps. plan_us_per_sample: CPU time, ours from the index on, the others' from lengths on."""
    packs = packing.Packs([length_file()], None, "", tile_size=448, tokens_per_tile=256, tokens_per_pack=T,
                       tiles_per_pack=N, packs_per_step=8)
    order, results = packing.permute(np.arange(packs.n), packs.n, packs.seed, 0), {}
    tokens, tiles = (x.tolist() for x in packs.plan_samples(order)[1:])
    at = dict(zip(order.tolist(), range(packs.n)))
    def ours(*_):
        planned = []
        for w in range(-(-packs.n // packs.window)): planned += packs.plan_window(0, w, len(planned) % 8)[0]
        return planned
    for side, plan in {"ours": ours, "knapsack": knapsack, "padded 8": batches_of_8}.items():
        times = []
        for _ in range(cfg.rounds if side == "ours" else 1):
            start = time.process_time()
            planned = plan(tokens, tiles, T, N)
            times.append((time.process_time() - start) / packs.n * 1e6)
        if side == "ours": planned = [[at[row] for _, row, _ in p.samples] for p in planned]
        assert sorted(itertools.chain(*planned)) == [*range(packs.n)], f"{side}: a sample was lost or doubled"
        lengths = [[tokens[i] for i in p] for p in planned]
        if side == "padded 8": lengths = [[max(n)] * len(n) for n in lengths]
        flops = np.array([train_flops(VisionConfig(), LLMConfig(), sum(tiles[i] for i in p), n, sum(n) // 10)
                          for p, n in zip(planned, lengths)])
        steps = flops[:len(flops) // 8 * 8].reshape(-1, 8)                                      # (steps, ranks)
        room = sum(map(sum, lengths)) if side == "padded 8" else T * len(planned)
        results[side] = sum(tokens) / room, (steps.max(1) / steps.mean(1)).mean(), median(times)
    more, own = f"_{name}" * (name != "8k"), results.pop("ours")
    for k, (row, unit) in enumerate(((f"fill_{name}", "of the room"), (f"straggler_8ranks{more}", "max / mean"),
                                     (f"plan_us_per_sample{more}", "us"))):
        for peer, theirs in results.items():
            yield dict(row=row, value=float(own[k]), unit=unit, peer=peer, peer_value=float(theirs[k]),
                       ratio=float(own[k] / theirs[k]) ** (1 if k == 0 else -1))

# ---- image, loader ---------------------------------------------------------------------------------------------------
def photo(seed, width=1024, height=768):
    """JPEG bytes of blurred noise, about 0.2 MB as a photo of this size has."""
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    noise.resize((width, height), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=90)
    return file.getvalue()

def image_path(cfg, device, name):
    """1024x768 JPEG -> 6 tiles of 448 and a thumbnail, uint8, on one thread. Pillow: the same with its resize alone.
    transformers: its GotOcr2 processor, which InternVL's configuration names, from Pillow's picture to fp32 pixels."""
    torch.set_num_threads(1)
    def pillow(jpeg):
        image, s = images_module.load_image(jpeg), 448
        big, small = (np.array(image.resize(size, Image.Resampling.BICUBIC)) for size in ((3 * s, 2 * s), (s, s)))
        tiles = [big[y:y + s, x:x + s] for y in (0, s) for x in (0, s, 2 * s)] + [small]
        return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).contiguous()
    jpegs = [photo(i) for i in range(4)]
    sides = {"ours": lambda jpeg: images_module.make_tiles(images_module.load_image(jpeg), 1, 6), "Pillow": pillow}
    with contextlib.suppress(ImportError):
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
        process = GotOcr2ImageProcessorPil(size=dict(height=448, width=448), min_patches=1, max_patches=6,
                                           crop_to_patches=True, image_mean=[*images_module.MEAN], image_std=[*images_module.STD])
        sides["transformers"] = lambda jpeg: process(images_module.load_image(jpeg), return_tensors="pt")["pixel_values"]
    most = max((sides["ours"](jpeg).int() - pillow(jpeg).int()).abs().max().item() for jpeg in jpegs)
    picture = images_module.load_image(jpegs[0])
    parts = sides | {"decoding alone": images_module.load_image, "tiles alone": lambda _: images_module.make_tiles(picture, 1, 6)}
    times = {side: [] for side in parts}
    for i in range(cfg.rounds * 4):
        for side, f in parts.items():
            start = time.process_time()                         # of this process: neighbours do not count
            f(jpegs[i % 4])
            times[side].append(time.process_time() - start)
    mine, *rates = [(side, 1 / median(t)) for side, t in times.items()]
    for side, rate in rates:
        yield dict(row=name, value=mine[1], unit="images per CPU s", peer=side, peer_value=rate, ratio=mine[1] / rate,
                   most_off_pillow=most)

def loader(cfg, device, name, workers):
    """Packs of 8,192 tokens from 64 such photos with a caption each, decoded, tiled and batched by two workers, beside
    what one H200 takes at 50 % strict MFU in 2B fine-tuning: 15 samples of 2,048 tokens with 7 tiles a second
    (alignment: 29)."""
    tokenizer, rates = tokenizer_module.Tokenizer(TOKENIZER), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(64):
            Path(folder, f"{i:02d}.jpg").write_bytes(photo(i))
            Path(folder, f"{i:02d}.txt").write_text("a photo of nothing in particular, " * 24)
        sources = sources_module.open_sources(folder, tokenizer, "sailvl-chat")
        packs = packing.Packs(sources, tokenizer, "sailvl-chat", tile_size=448, tokens_per_tile=256, max_tiles=6)
        batches = iter(data.make_loader(packs, num_workers=workers))
        for _ in range(4 * workers + 1): next(batches)                                          # what was fetched ahead
        for _ in range(cfg.rounds):
            start, n = time.perf_counter(), 0
            while time.perf_counter() - start < 3: n += next(batches)["size"]["samples"]
            rates.append(n / (time.perf_counter() - start))
        del batches
    yield dict(row=name, value=median(rates), unit="images/s", peer="need of one H200", peer_value=15.0,
               ratio=median(rates) / 15)

def parts(device):
    """{part: (function, {row: what the function takes after the row's name})}; a function yields its rows."""
    cuda, fp32, bf16 = device.type == "cuda", torch.float32, torch.bfloat16
    size, kinds = "2b" if cuda else "toy", dict(fp32=fp32, bf16=bf16)
    steps = [(size, stage) for stage in STAGES] + ([("2b_mix", "alignment"), ("2b", "sft", "selective"),
                                                    ("8b", "advance", "selective")] if cuda else [("7m_mix", "sft")])
    return {"attn": (attn, ATTN[device.type]), "ce": (ce, dict(ce_frozen=[False], ce_trains=[True])),
            "train": (train, {"_".join(step): step for step in steps}),
            "stages": (stages, {s: [s] for s in ([size] if cuda else [size, "25m"])}),
            "warmup": (warmup, {"2b_mix": ["2b_mix"]} if cuda else {size: [size]}),
            "vs-hf": (vs_hf, {row: more for row, more in {
                "2b_bf16": ("2b", bf16), "7m_fp32": ("7m", fp32, True), "7m_bf16": ("7m", bf16, True),
                "25m_bf16": ("25m", bf16), "2b_bf16_compiled": ("2b", bf16, True)}.items() if cuda or more[0] != "2b"}),
            "pack": (packing, {"8k": (8192, 48), "16k": (16384, 64), "8k_28_tiles": (8192, 28),
                               "16k_56_tiles": (16384, 56)}),
            "image": (image_path, dict(images_per_s_core=[])),
            "loader": (loader, dict(loader_2_workers=[2], loader_1_worker=[1])),
            "decode": (decode, {f"{row}_{kind}": [kinds[kind]] for row in ("tiny", "batched") for kind in kinds})}

def main():
    cfg = Config()
    names = {name: name for name in parts(torch.device("cpu"))}
    usage = f"python -m bench {'|'.join(names)} [--rounds=N --rows=a,b --device=cpu]"
    part, flags = subcommand(names, usage, cfg)
    configure(cfg, flags)
    device = distributed.setup_distributed(cfg.device).device
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # of `timeout`: what there is gets reported
    function, table = parts(device)[part]
    wanted = {name: more for name, more in table.items() if name.startswith(tuple(cfg.rows.split(",")))}
    if not wanted: raise ValueError(f"--rows={cfg.rows}: no such row; there are {', '.join(table)}")
    rows, failed, slow = [], [], device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    try:
        for name, more in wanted.items():
            if slow and "bf16" in name and not cfg.rows:
                print(f"{name}: not run, this CPU has no bf16 products and needs minutes a step; --rows={name} runs it")
                continue
            try:
                for row in function(cfg, device, name, *more):
                    rows.append(row)
                    print(*(f"{k} {show(v)}" for k, v in row.items()), sep=", ", flush=True)
            except Exception as e:                              # the other rows still count
                failed.append(name)
                print(f"{name} FAILED: {type(e).__name__}: {str(e).strip()[:500]}", flush=True)
            gc.collect()                                        # before the next is built
    finally:
        report(rows, device)
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    run_script(main)
