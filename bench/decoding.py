"""Rows of `decode`: tokens/s of one answer beside transformers', prompts/s of many beside one."""
import torch

from bench.measure import compare_sides
from bench.samples import TOKENIZER_FOLDER
from bench.training import export_for_transformers
from generate import generate
from inputs.images import normalize
from model import VLM, LLMConfig
from vision import VisionConfig
from weights import image_token_id, load_folder

TINY_VISION = VisionConfig(112, dim=192, n_layers=4, n_heads=3, ffn_dim=768)
TINY_LLM = LLMConfig(8192, 384, 10, 6, 2, 64, 1024)
N_PROMPTS = 64
ONE_ANSWER_TOKENS = 64
BATCHED_ANSWER_TOKENS = 16


def decoding_rows(cfg, device, name, dtype):
    """tiny: 64 tokens of one answer about one tile. batched: 64 answers of 16 tokens, beside one
    after the other."""
    image = image_token_id(TOKENIZER_FOLDER)
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (N_PROMPTS, 1, 3, 112, 112), generator=generator).byte()
    prompts = []
    for i in range(N_PROMPTS):
        text = torch.randint(0, 1000, (20 + i,), generator=generator).tolist()
        prompts.append([image] * TINY_VISION.tokens_per_tile + text)
    state = VLM(TINY_VISION, TINY_LLM, image).init_weights(0, std=0.06).state_dict()
    peer, folder = export_for_transformers(state, TINY_VISION, TINY_LLM, dtype, device)
    model = load_folder(folder, device, dtype)[0].eval()

    def ours(first, last, n_tokens):
        return generate(model, prompts[first:last], tiles[first:last], n_tokens, set())

    ids = torch.tensor(prompts[:1], device=device)
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids),
        pixel_values=normalize(tiles[0].to(device), dtype),
        max_new_tokens=ONE_ANSWER_TOKENS, min_new_tokens=ONE_ANSWER_TOKENS,
        do_sample=False, suppress_tokens=[image])

    def theirs():
        return peer.generate(**inputs)[:, ids.shape[1]:].tolist()

    def one_by_one():
        return [ours(i, i + 1, BATCHED_ANSWER_TOKENS)[0] for i in range(N_PROMPTS)]

    if name.startswith("batched"):
        sides = {"ours": lambda: ours(0, N_PROMPTS, BATCHED_ANSWER_TOKENS),
                 "one by one": one_by_one}
        unit = "prompts/s"
        work = N_PROMPTS
    else:
        sides = {"ours": lambda: ours(0, 1, ONE_ANSWER_TOKENS), "transformers": theirs}
        unit = "tokens/s"
        work = ONE_ANSWER_TOKENS

    # token by token
    same = []
    answers = [function() for function in sides.values()]
    for our_answer, their_answer in zip(*answers, strict=True):
        same += [a == b for a, b in zip(our_answer, their_answer, strict=False)]
    if dtype == torch.float32:
        assert all(same), f"{same.count(False)} of {len(same)} tokens differ in fp32"
    for row in compare_sides(name, sides, cfg.rounds, device, float(work), unit):
        yield row | dict(same_tokens=sum(same) / len(same))
