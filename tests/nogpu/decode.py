"""Decoding with CUDA graphs on a card that does nothing: the 2B and the 8B answer two prompts.

    python tests/nogpu/decode.py OUT

Here a CUDA graph is strict: what waits for the card, or copies from memory that is not pinned,
cannot be captured. The last line is JSON.
"""
import contextlib
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402
import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import decoding  # noqa: E402
import generate as generate_file  # noqa: E402
import model as model_file  # noqa: E402
from vision import VisionConfig  # noqa: E402

IMAGE = 151667  # <IMG_CONTEXT>
HELD = Path(__file__).parent / "held.json"
SHORT = 8  # new tokens
LONG = 24
MODELS = {"2B": "qwen2.5-1.5b", "8B": "qwen2.5-7b"}


def answer(model, new_tokens, compiled):
    """Two prompts, one with a tile -> (what the card was asked for, waits)."""
    tile = torch.zeros(1, 3, model.vision.image_size, model.vision.image_size, dtype=torch.uint8)
    with_tile = [IMAGE] * model.vision.tokens_per_tile + [1, 2, 3]
    prompts = [with_tile, [1, 2, 3, 4]]
    card.counts()
    card.syncs.clear()
    card.watch_syncs(True)
    generate_file.generate(model, prompts, [tile, None], new_tokens, stop_ids=set(),
                           compiled=compiled)
    card.watch_syncs(False)
    return card.counts(), sum(card.syncs.values())


def pretend_tokens():
    """read_tokens waits for the card, but no kernel has written what it reads there."""
    real = generate_file.read_tokens

    def read_tokens(model, tokens, finite):
        with contextlib.suppress(ValueError):
            real(model, tokens, finite)
        return [0] * len(tokens)

    generate_file.read_tokens = read_tokens


def build(preset):
    """A whole model of this language model, as generate.Assistant leaves it."""
    llm = model_file.LLMConfig(**model_file.LLMConfig.PRESETS[preset])
    with torch.device("meta"):
        model = model_file.VLM(VisionConfig(), llm, IMAGE).to(torch.bfloat16)
    model.to_empty(device="cuda").eval().requires_grad_(False)
    decoding.join_weights(model)
    return model


def measure(model, name, compiled, faults):
    """One model, compiled or not -> what is to be said of it."""
    start = time.perf_counter()
    answer(model, SHORT, compiled)  # what is made once
    seconds = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    short, short_waits = answer(model, SHORT, compiled)
    long, long_waits = answer(model, LONG, compiled)
    more = LONG - SHORT  # tokens of each row
    nodes = short.get("nodes of captures", 0)
    waits = (long_waits - short_waits) / more
    launches = (card.kernels(long) - card.kernels(short)) / more
    how = f"the {name} {'compiled' if compiled else 'eager'}"
    faults += [f"{how}: {kind}" for kind in long if kind.startswith(("forbidden", "refused"))]
    if not nodes:
        faults.append(f"{how}: no CUDA graph was captured")
    if waits > 1:
        faults.append(f"{how}: {waits:.1f} waits for the card a token; one is enough")
    if counters["stats"]["unique_graphs"] > graphs:
        faults.append(f"{how}: graphs were compiled after the first answer")
    held = json.loads(HELD.read_text()).get("decode", {})
    most = held.get(f"{name} compiled" if compiled else f"{name} eager", nodes)
    if nodes > most:
        faults.append(f"{how}: a step has {nodes} kernels, held.json holds {most}")
    return (f"{how}: a CUDA graph of {nodes} kernels, beside it {launches:.1f} launches and "
            f"{waits:.1f} waits a token, the first answer after {seconds:.0f} s, "
            f"{graphs} compiled graphs")


def main():
    card.pretend_results(model_file)
    pretend_tokens()
    faults = []
    says = []
    with torch.inference_mode():
        for name, preset in MODELS.items():
            model = build(preset)
            for compiled in (False, True):
                torch._dynamo.reset()
                counters.clear()
                decoding.compiler.cache_clear()
                says.append(measure(model, name, compiled, faults))
            del model
    says.append(f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved at most")
    print(json.dumps({"faults": faults, "says": "; ".join(says)}))


main()
