"""Rows of `serving`: serve.py with 8 clients at once, and the first text of a stream.

The server is a process of its own, as its users start it.
"""
import concurrent.futures
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch

from bench.decoding import TINY_LLM, TINY_VISION
from bench.measure import compare_sides, seconds_per_call
from bench.samples import TOKENIZER_FOLDER
from generate import Assistant
from model import VLM
from model_config import config_json
from weights import image_token_id, save_folder

N_CLIENTS = 8
ANSWER_TOKENS = 32  # of an answer
CPU = torch.device("cpu")  # what this process waits for is no work of its own


def serving_rows(cfg, device, name):
    """8_clients: tokens/s, beside the same questions one after the other. first_text: milliseconds
    until the first text of a streamed answer, beside Assistant.stream, which sample.py calls."""
    with tempfile.TemporaryDirectory() as folder:
        model = VLM(TINY_VISION, TINY_LLM, image_token_id(TOKENIZER_FOLDER))
        state = model.init_weights(0, std=0.06).state_dict()
        config = config_json(TINY_VISION, TINY_LLM, torch.float32)
        save_folder(state, config, f"{folder}/model", TOKENIZER_FOLDER)
        with server(f"{folder}/model", device) as address:
            if name == "8_clients":
                yield from client_rows(cfg, name, address)
            else:
                yield first_text_row(cfg, name, address, f"{folder}/model", device)


@contextlib.contextmanager
def server(folder, device):
    """serve.py of a model folder -> its address."""
    command = [sys.executable, "serve.py", f"--model={folder}", "--port=0", "--dtype=float32",
               f"--device={device.type}", f"--batch_size={N_CLIENTS}"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, text=True,
                               stdout=subprocess.PIPE, env=os.environ | threads)
    try:
        line = process.stdout.readline()  # "model: http://127.0.0.1:PORT/"
        assert "http" in line, "serve.py did not start"
        yield line.partition(": ")[2].strip()
    finally:
        process.terminate()
        process.communicate()


def open_answer(address, question, **more):
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": ANSWER_TOKENS, **more}
    call = urllib.request.Request(f"{address}v1/chat/completions", json.dumps(body).encode(),
                                  {"Content-Type": "application/json"})
    return urllib.request.urlopen(call, timeout=600)


def client_rows(cfg, name, address):
    questions = [f"What is {i}?" for i in range(N_CLIENTS)]

    def ask(question):
        with open_answer(address, question) as answer:
            whole = json.load(answer)
        return whole["choices"][0]["message"]["content"], whole["usage"]["completion_tokens"]

    def at_once():
        return list(pool.map(ask, questions))

    def one_by_one():
        return [ask(question) for question in questions]

    with concurrent.futures.ThreadPoolExecutor(N_CLIENTS) as pool:
        answers = at_once()
        assert answers == one_by_one(), "answers differ with what runs beside them"
        n_tokens = sum(count for _, count in answers)
        sides = {"ours": at_once, "one after the other": one_by_one}
        yield from compare_sides(name, sides, cfg.rounds, CPU, float(n_tokens), "tokens/s")


def first_text_row(cfg, name, address, folder, device):
    question = "What is a circle?"
    assistant = Assistant(folder, device, torch.float32, max_new_tokens=ANSWER_TOKENS)

    def ours():
        with open_answer(address, question, stream=True) as events:
            for line in events:
                if b'"content": "' in line and b'"content": ""' not in line:
                    return

    def theirs():
        next(assistant.stream(*assistant.prompt([(question, None)], [])))

    seconds = seconds_per_call({"ours": ours, "sample.py": theirs}, cfg.rounds, CPU)
    own = 1000 * seconds["ours"]
    peer = 1000 * seconds["sample.py"]
    return dict(row=name, value=own, unit="ms", peer="sample.py", peer_value=peer, ratio=peer / own)
