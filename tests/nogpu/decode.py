"""Decoding with CUDA graphs on a card that does nothing: the 2B answers two prompts.

    python tests/nogpu/decode.py OUT

Here a CUDA graph is strict: what waits for the card, or copies from memory that is not pinned,
cannot be captured. The last line is JSON.
"""
import contextlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
import card  # noqa: E402
import torch  # noqa: E402

import generate as generate_file  # noqa: E402
import model as model_file  # noqa: E402
from vision import VisionConfig  # noqa: E402

IMAGE = 151667  # <IMG_CONTEXT>
HELD = Path(__file__).parent / "held.json"
SHORT = 8  # new tokens
LONG = 24


def answer(model, new_tokens):
    """Two prompts, one with a tile -> (what the card was asked for, waits)."""
    tile = torch.zeros(1, 3, model.vision.image_size, model.vision.image_size, dtype=torch.uint8)
    with_tile = [IMAGE] * model.vision.tokens_per_tile + [1, 2, 3]
    prompts = [with_tile, [1, 2, 3, 4]]
    card.counts()
    card.syncs.clear()
    card.watch_syncs(True)
    generate_file.generate(model, prompts, [tile, None], new_tokens, stop_ids=set())
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


def main():
    card.pretend_results(model_file)
    pretend_tokens()
    with torch.device("meta"):
        model = model_file.VLM(VisionConfig(), model_file.LLMConfig(), IMAGE).to(torch.bfloat16)
    model.to_empty(device="cuda").eval()
    model.requires_grad_(False)

    with torch.inference_mode():
        answer(model, SHORT)  # what is made once
        short, short_waits = answer(model, SHORT)
        long, long_waits = answer(model, LONG)
    more = LONG - SHORT  # tokens of each row
    nodes = short.get("nodes of captures", 0)
    waits = (long_waits - short_waits) / more
    launches = (card.kernels(long) - card.kernels(short)) / more
    faults = [name for name in long if name.startswith(("forbidden", "refused"))]
    if not nodes:
        faults.append("no CUDA graph was captured")
    if waits > 1:
        faults.append(f"{waits:.1f} waits for the card a token; one is enough")
    held = json.loads(HELD.read_text()).get("decode")
    if held and nodes > held["kernels"]:
        faults.append(f"a step has {nodes} kernels, held.json holds {held['kernels']}")
    says = (f"a step of the 2B is one CUDA graph of {nodes} kernels; beside it {launches:.1f} "
            f"launches and {waits:.1f} waits a token; {torch.cuda.max_memory_reserved() / 1e9:.1f} "
            "GB reserved")
    print(json.dumps({"faults": faults, "says": says}))


main()
