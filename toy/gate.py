"""The gate of the toy language base: does it answer the toy questions from words alone?

    python -m toy.gate --model=toy/llm --data_dir=shards/toy
    python -m toy.gate --model=out/llm --per_family=100 --without=steps,choice

What it cannot answer from exact words, no model with this base can answer from pictures. Prints the
score of each benchmark and the mean.

With --per_family it asks so many questions of each family (toy/families.py) about held-out boards,
and says of each whether the base knows it: a taught family from 97 % on, one that was left out
(--without) above what can be guessed from the question alone.

Shapes: T tokens of a pack of prompts, M visual tokens.
"""
import collections
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from configurator import configure, run_script, setting
from evals.files import read_rows
from evals.prompts import build_prompt
from evals.score import score_rows
from evals.scorers import last_exact
from evals.table import TOY
from inputs.chat import join_segments, place_images, segments
from inputs.files import write_atomic
from inputs.tokenizer import Tokenizer
from model import packed
from toy.bases import TEMPLATE, load_base
from toy.families import FAMILIES, check_families, family_of, form_of
from toy.records import ask_turns
from toy.steps import STEP_BOARDS, steps_turn
from toy.words import cell_ids

PROMPTS_AT_ONCE = 64
# A family is learned from this score on.
LEARNED = 97
# Questions about training boards that say what can be guessed.
N_GUESS = 10_000
# Captions are long, and no benchmark asks for one.
ASKED_FAMILIES = [family for family in FAMILIES if family != "caption"]


@dataclass(slots=True)
class Config:
    model: str = setting("toy/llm", filled=True)  # model folder of a language model
    data_dir: str = setting("shards/toy", filled=True)  # folder of the toy benchmarks
    limit: int = setting(0, at_most=10**9)  # only the first rows of each benchmark; 0: all
    per_family: int = setting(0, at_most=10**6)  # questions of each family; 0: the benchmarks
    without: str = ""  # families that the base was made without
    seed: int = setting(1, at_most=2**32 - 1)  # of the questions of families
    jsonl: str = ""  # file that gets a line for each family; "": none


def word_prompt(pictures, question, tokenizer):
    """The words of the cells of each picture -> (ids (T,), ids of these words (M, 2))."""
    images = [[tokenizer.image_id] * len(picture) for picture in pictures]
    turns = place_images([(question, None)], n_images=len(pictures))
    ids, _ = join_segments(segments(tokenizer, TEMPLATE, turns, images))
    return ids, cell_ids({"cells": pictures}, tokenizer)


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


def answers_to(prompts, max_new_tokens, model, tokenizer, name):
    """The text of the answer to each prompt."""
    said = []
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), desc=name):
        some = prompts[start:start + PROMPTS_AT_ONCE]
        answers = greedy_answers(model, some, max_new_tokens, tokenizer.eos_id)
        said += [tokenizer.decode(ids).strip() for ids in answers]
    return said


# ---- by benchmark --------------------------------------------------------------------------------

def answer_from_words(b, rows, model, tokenizer):
    """The rows of a toy benchmark -> the rows with `prediction`."""
    prompts = []
    for row in rows:
        question = build_prompt(b.prompt, row)
        prompts.append(word_prompt([row["cells"].split("|")], question, tokenizer))
    said = answers_to(prompts, b.max_new_tokens, model, tokenizer, b.name)
    if b.period:
        said = [text.removesuffix(".") for text in said]
    return [row | {"prediction": text} for row, text in zip(rows, said, strict=True)]


def print_benchmarks(cfg, model, tokenizer):
    scores = {}
    for name, b in TOY.items():
        pairs = read_rows(Path(cfg.data_dir) / f"{name}.tsv", b, cfg.limit)
        answered = answer_from_words(b, [row for row, _ in pairs], model, tokenizer)
        scores[name], _ = score_rows(b, answered)
    for name, score in scores.items():
        print(f"{name:12s} {score:5.1f}")
    print(f"{'mean':12s} {sum(scores.values()) / len(scores):5.1f}")


# ---- by family -----------------------------------------------------------------------------------

def asked_turns(rng, held_out):
    """Endless (boards, question, answer), of all families but captions."""
    while True:
        boards, turns = ask_turns(rng, "text", held_out=held_out)
        if boards[0].kind in STEP_BOARDS and len(boards) == 1:
            turns.append(steps_turn(boards[0], rng))
        for question, answer in turns:
            if family_of(question) != "caption":
                yield boards, question, answer


def family_questions(seed, n):
    """{family: n (boards, question, answer) about held-out boards}."""
    found = {family: [] for family in ASKED_FAMILIES}
    missing = set(found)
    for asked in asked_turns(random.Random(f"{seed}/gate"), held_out=True):
        family = family_of(asked[1])
        if family in missing:
            found[family].append(asked)
            if len(found[family]) == n:
                missing.remove(family)
        if not missing:
            return found


def best_guesses(seed):
    """{form of a question: its most frequent answer about training boards}."""
    counts = collections.defaultdict(collections.Counter)
    asked = asked_turns(random.Random(f"{seed}/guess"), held_out=False)
    for _, question, answer in itertools.islice(asked, N_GUESS):
        counts[form_of(question)][answer] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}


def percent_right(said, answers):
    right = [last_exact(text, {"answer": answer.rpartition(":")[2]})[1]
             for text, answer in zip(said, answers, strict=True)]
    return 100 * sum(right) / len(right)


def family_verdict(score, guess, n, left_out):
    """What a score says of a base that was made with or without a family."""
    if not left_out:
        return "taught, learned" if score >= LEARNED else f"TAUGHT, BELOW {LEARNED}"
    # Three standard errors of n guesses; one right answer is always allowed.
    error = 3 * (guess * (100 - guess) / n) ** 0.5
    return "left out, at chance" if score <= guess + max(error, 100 / n) else "LEFT OUT, YET KNOWN"


def print_families(cfg, model, tokenizer):
    left_out = cfg.without.split(",") if cfg.without else []
    check_families(left_out)
    guesses = best_guesses(cfg.seed)
    rows = []
    for family, asked in family_questions(cfg.seed, cfg.per_family).items():
        prompts = []
        for boards, question, _ in asked:
            pictures = [board.token_words() for board in boards]
            prompts.append(word_prompt(pictures, question, tokenizer))
        answers = [answer for _, _, answer in asked]
        said = answers_to(prompts, 48, model, tokenizer, family)
        score = percent_right(said, answers)
        guess = percent_right([guesses.get(form_of(question), "") for _, question, _ in asked],
                              answers)
        says = family_verdict(score, guess, len(asked), family in left_out)
        print(f"{family:12s} {score:5.1f}   chance {guess:5.1f}   {says}")
        rows.append({"family": family, "left_out": family in left_out, "questions": len(asked),
                     "score": round(score, 2), "chance": round(guess, 2), "verdict": says})
    if cfg.jsonl:
        write_atomic(cfg.jsonl, "".join(json.dumps(row) + "\n" for row in rows))


def main():
    cfg = Config()
    configure(cfg)
    tokenizer = Tokenizer(cfg.model)
    model = load_base(cfg.model, tokenizer).eval()
    if model.vision:
        raise ValueError(f"{cfg.model} sees pictures; the gate is for a language model alone")
    if cfg.per_family:
        print_families(cfg, model, tokenizer)
    else:
        print_benchmarks(cfg, model, tokenizer)


if __name__ == "__main__":
    run_script(main)
