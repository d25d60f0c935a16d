"""Speed beside what one would use instead: same inputs, same process, parity first, then medians of interleaved rounds.

    python bench.py decode        # tokens/s of one answer against transformers' generate, prompts/s of many against one

Prints device and versions, a markdown table and, on the last line, the same rows as JSON: row, value, unit and, beside
a peer, peer, peer_value, ratio (ours over theirs, above 1 is better). Weights and prompts are random.
"""
import importlib.metadata, itertools, json, re, subprocess, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import common
from configurator import configure, launch
from model import LLMConfig, VLM, generate
from vision import VisionConfig, normalize
from weights import image_token_id, load_folder, save_folder

TOKENIZER = Path(__file__).resolve().parent / "config" / "toy_tokenizer"

@dataclass(slots=True)
class Config:
    device: str = "auto"  # auto: cuda where there is one, else cpu
    rounds: int = 7  # interleaved rounds, of which the median counts
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
    rates = {name: work / seconds for name, seconds in seconds_per_call(sides, cfg.rounds, device).items()}
    return [dict(row=row, value=rates["ours"], unit=unit, peer=name, peer_value=rate, ratio=rates["ours"] / rate) | more
            for name, rate in rates.items() if name != "ours"]

def report(rows, device):
    packages = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = [f"{n} {packages[n]}" for n in ("torch", "triton", "transformers", "flash-attn") if n in packages]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1] if sys.platform == "linux" else "CPU"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print("", f"{name}, {torch.get_num_threads()} CPU threads, {', '.join(versions)}", "", sep="\n")
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    show = lambda x: (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}") if isinstance(x, float) else str(x)
    for line in columns, ["---"] * len(columns), *([show(row.get(c, "")) for c in columns] for row in rows):
        print(f"| {' | '.join(line)} |")
    print(json.dumps(rows))

# ---- decode ----------------------------------------------------------------------------------------------------------
TINY = VisionConfig(112, dim=192, n_layers=4, n_heads=3, ffn_dim=768), LLMConfig(8192, 384, 10, 6, 2, 64, 1024)

def decode(cfg, device, wanted):
    """tiny: 64 tokens of one answer about one tile. batched: 64 answers of 16 tokens, against one after the other."""
    from transformers import InternVLForConditionalGeneration
    image, g, rows, n = image_token_id(TOKENIZER), torch.Generator().manual_seed(0), [], 64
    tiles = torch.randint(0, 256, (n, 1, 3, 112, 112), generator=g).byte()
    prompts = [[image] * TINY[0].tokens_per_tile + torch.randint(0, 1000, (20 + i,), generator=g).tolist()
               for i in range(n)]
    kinds = dict(fp32=torch.float32, bf16=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        state = VLM(*TINY, image).init_weights(0, std=0.06).state_dict()
        save_folder(state, *TINY, f"{folder}/ours", TOKENIZER, dtype=torch.float32)
        subprocess.run([sys.executable, "convert.py", "export", f"{folder}/ours", f"{folder}/theirs",
                        "--layout=transformers"], cwd=TOKENIZER.parent.parent, check=True, capture_output=True)
        for name, dtype in wanted({f"{row}_{kind}": kinds[kind] for row in ("tiny", "batched") for kind in kinds}):
            model = load_folder(f"{folder}/ours", device, dtype)[0].eval()
            peer = InternVLForConditionalGeneration.from_pretrained(f"{folder}/theirs", dtype=dtype).to(device)
            ours = lambda i, j, tokens: generate(model, prompts[i:j], tiles[i:j], tokens, set())
            ids = torch.tensor(prompts[:1], device=device)
            inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                          pixel_values=normalize(tiles[0].to(device), dtype), do_sample=False, suppress_tokens=[image])
            sides = {"ours": lambda: ours(0, 1, n),
                     "transformers": lambda: peer.generate(**inputs)[:, ids.shape[1]:].tolist()}
            if name.startswith("batched"):
                sides = {"ours": lambda: ours(0, n, 16),
                         "one by one": lambda: [ours(i, i + 1, 16)[0] for i in range(n)]}
            same = [a == b for pair in zip(*(f() for f in sides.values())) for a, b in zip(*pair)]      # token by token
            rows += compare(name, sides, cfg, device, float(n), "prompts/s" if "batched" in name else "tokens/s",
                            same_tokens=sum(same) / len(same))
    return rows

def main():
    parts = {"decode": decode}
    if len(sys.argv) < 2 or sys.argv[1] not in parts:
        raise ValueError(f"write bench.py {'|'.join(parts)} [--rounds=N --rows=a,b --device=cpu]")
    configure(cfg := Config(), sys.argv[2:])
    device = common.setup_distributed(cfg.device).device
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    wanted = lambda rows: [(n, x) for n, x in rows.items() if n.startswith(tuple(cfg.rows.split(",")))]
    report(parts[sys.argv[1]](cfg, device, wanted), device)

if __name__ == "__main__":
    launch(main)
