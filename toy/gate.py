"""The gate of the toy language base: does it answer the toy questions from words alone?

    python -m toy.gate --model=toy/llm --data_dir=shards/toy

What it cannot answer from exact words, no model with this base can answer from pictures. Prints the
score of each benchmark and the mean.

Shapes: T tokens of a pack of prompts, M visual tokens.
"""
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, run_script, setting
from evals.files import read_rows
from evals.prompts import build_prompt
from evals.score import score_rows
from evals.table import TOY
from inputs.chat import join_segments, place_images, segments
from inputs.tokenizer import Tokenizer
from model import packed
from toy.bases import TEMPLATE, load_base
from toy.words import cell_ids

PROMPTS_AT_ONCE = 64


@dataclass(slots=True)
class Config:
    model: str = setting("toy/llm", filled=True)  # model folder of a language model
    data_dir: str = setting("shards/toy", filled=True)  # folder of the toy benchmarks
    limit: int = setting(0, at_most=10**9)  # only the first rows of each benchmark; 0: all


def word_prompt(row, question, tokenizer):
    """A benchmark row -> (ids (T,), ids of the words of its cells (M, 2))."""
    picture = row["cells"].split("|")
    images = [[tokenizer.image_id] * len(picture)]
    turns = place_images([(question, None)], n_images=1)
    ids, _ = join_segments(segments(tokenizer, TEMPLATE, turns, images))
    return ids, cell_ids({"cells": [picture]}, tokenizer)


@torch.no_grad()
def greedy_answers(model, prompts, max_new_tokens, eos_id):
    """[(ids, cells), ...] -> the ids of each answer, without the end.

    All prompts that are not done go through the model in one pack, and all is computed again for
    each token: a toy model needs no cache.
    """
    answers = [[] for _ in prompts]
    waiting = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        documents = [prompts[i][0] + answers[i] for i in waiting]
        ends = np.cumsum([len(document) for document in documents])
        positions = np.concatenate([np.arange(len(document)) for document in documents])
        cells = np.concatenate([prompts[i][1] for i in waiting])
        batch = {
            "tokens": torch.tensor(list(itertools.chain(*documents))),
            "cells": torch.from_numpy(cells),
        }
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
        last = torch.from_numpy(ends - 1)
        h = model.language_model.hidden(
            model.embed(batch), torch.from_numpy(positions), packed(cu_seqlens), rows=last)
        chosen = model.language_model.head(h).argmax(-1).tolist()
        for i, token in zip(waiting, chosen, strict=True):
            answers[i].append(token)
        waiting = [i for i in waiting if answers[i][-1] != eos_id]
        if not waiting:
            break
    return [[token for token in answer if token != eos_id] for answer in answers]


def answer_from_words(b, rows, model, tokenizer):
    """The rows of a toy benchmark -> the rows with `prediction`."""
    answered = []
    for start in tqdm(range(0, len(rows), PROMPTS_AT_ONCE), desc=b.name):
        some = rows[start:start + PROMPTS_AT_ONCE]
        prompts = [word_prompt(row, build_prompt(b.prompt, row), tokenizer) for row in some]
        answers = greedy_answers(model, prompts, b.max_new_tokens, tokenizer.eos_id)
        for row, ids in zip(some, answers, strict=True):
            text = tokenizer.decode(ids).strip()
            if b.period:
                text = text.removesuffix(".")
            answered.append(row | {"prediction": text})
    return answered


def main():
    cfg = Config()
    configure(cfg)
    tokenizer = Tokenizer(cfg.model)
    model = load_base(cfg.model, tokenizer).eval()
    if model.vision:
        raise ValueError(f"{cfg.model} sees pictures; the gate is for a language model alone")
    scores = {}
    for name, b in TOY.items():
        pairs = read_rows(Path(cfg.data_dir) / f"{name}.tsv", b, cfg.limit)
        answered = answer_from_words(b, [row for row, _ in pairs], model, tokenizer)
        scores[name], _ = score_rows(b, answered)
    for name, score in scores.items():
        print(f"{name:12s} {score:5.1f}")
    print(f"{'mean':12s} {sum(scores.values()) / len(scores):5.1f}")


if __name__ == "__main__":
    run_script(main)
