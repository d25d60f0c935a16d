"""Ask a model about images: one question, a whole folder, or a chat.

    python sample.py --model=out/demo/model --image=a.jpg --prompt="What is written here?"    # stdout: the answer
    python sample.py --model=DIR --image=a.jpg --image=b.jpg --prompt="Compare <image> with <image>."
    python sample.py --model=DIR --image=photos/ --prompt="Describe the image." --out=answers.jsonl
    python sample.py --model=DIR --image=questions.jsonl --out=answers.jsonl     # rows {"image": ..., "prompt": ...}
    python sample.py --model=DIR                                                 # chat
"""
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from tqdm import tqdm
from typing import Literal

import configurator
from generate import Assistant
from inputs.images import IMAGE_SUFFIXES
from training.distributed import compute_dtype, setup_distributed

HELP = "/image PATH adds a picture, /tiles N limits later ones (0: as at first), /reset starts anew, Ctrl-D ends"

@dataclasses.dataclass(slots=True)
class Config:
    model: str = ""                       # model folder
    image: tuple[str, ...] = ()           # picture, may repeat; with --out a folder of pictures or a .jsonl
    prompt: str = ""                      # the question; empty opens a chat
    out: str = ""                         # answers of a folder or .jsonl go to this .jsonl
    max_new_tokens: int = 1024            # longest answer
    temperature: float = 0.0              # 0 takes the likeliest token
    top_p: float = 1.0                    # sample among the likeliest tokens of this total probability
    top_k: int = 0                        # sample among so many tokens; 0 = all
    seed: int = 0                         # of the sampling
    max_tiles: int = 0                    # most tiles of a picture, thumbnail not counted; 0 = as the model folder says
    batch_size: int = configurator.setting(16, at_least=1)  # questions answered together, with --out
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # auto: bfloat16 on a GPU, float32 elsewhere
    device: Literal["auto", "cuda", "cpu"] = "auto"           # auto: cuda where there is one

def note(text): print(text, file=sys.stderr)

def load(cfg):
    """The Assistant of a run; refuses missing pictures before the model is loaded."""
    for path in cfg.image:
        if not os.path.isfile(path) and not cfg.out:
            raise ValueError(f"{path}: no such picture; a folder of them needs --out=answers.jsonl too")
    device = setup_distributed(cfg.device).device
    names = ("max_tiles", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return Assistant(cfg.model, device, compute_dtype(cfg.dtype, device), **{k: getattr(cfg, k) for k in names})

def questions(cfg):
    """--image, a folder or a .jsonl of {"image": path, list of paths or absent, "prompt"} -> (rows, base folder)."""
    source, rows = Path(cfg.image[0] if len(cfg.image) == 1 else "none"), []
    if source.is_dir():
        found = [path for path in sorted(source.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        base, lines = Path(), [json.dumps({"image": str(path)}) for path in found]
    elif source.suffix == ".jsonl":
        base, lines = source.parent, source.read_bytes().split(b"\n")
    else:
        raise ValueError("--out needs one folder or one .jsonl as --image")
    for number, line in enumerate(lines, 1):
        if not line.strip(): continue
        try:
            rows.append(row := {**json.loads(line)})
        except (ValueError, TypeError) as e:
            raise ValueError(f"{source} line {number}: not a JSON object: {e}") from e
        row["prompt"] = row.get("prompt") or cfg.prompt
        if not row["prompt"]:
            raise ValueError(f"{source} line {number} has no prompt; give one for all with --prompt=...")
    if not rows: raise ValueError(f"{source}: nothing to ask; it needs pictures ({', '.join(IMAGE_SUFFIXES)}) or rows")
    return rows, base

def batch(cfg):
    """Answer every question of a folder or .jsonl; rows of --out are the questions with `answer`, or with `error`."""
    (rows, base), assistant, good = questions(cfg), load(cfg), []
    def prompts():                                                     # made when a place among the rows is free
        for row in rows:
            images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or []
            try:
                prompt = assistant.prompt([(row["prompt"], None)], [assistant.tiles(base / path) for path in images])
            except (ValueError, OSError) as e:
                row["error"] = configurator.error_line(e)
                note(f"{row.get('image')}: {row['error']}")
            else:
                good.append(row)
                yield prompt
    with open(cfg.out + ".partial", "w", encoding="utf-8") as f:
        answers = assistant.answer_each(prompts(), batch_size=cfg.batch_size)
        for number, text in tqdm(answers, desc="answers", total=len(rows), disable=None): good[number]["answer"] = text
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(cfg.out + ".partial", cfg.out)
    note(f"wrote {len(good)} answers to {cfg.out}, {len(rows) - len(good)} failed")

def chat(assistant, cfg):
    """Read questions from stdin until it ends; only answers go to stdout."""
    turns, seen, new = [], [], [assistant.tiles(path) for path in cfg.image]   # dialogue, its pictures, newer ones
    own = assistant.max_tiles
    note(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            command, _, value = line.partition(" ")
            if command == "/image" and value:
                new.append(assistant.tiles(os.path.expanduser(value.strip(" '\""))))
                note(f"{value}: {(n := len(new[-1]))} tile{'s' * (n > 1)}, "
                     f"{n * assistant.model.vision.tokens_per_tile} tokens")
            elif command == "/tiles" and value.isdigit():
                assistant.max_tiles = int(value) or own
                note(f"at most {assistant.max_tiles} tiles from the next picture on")
            elif command == "/reset":
                turns, seen, new = [], [], []
                note("a new dialogue, without pictures")
            elif command.startswith("/"):
                note(HELP)
            elif line:
                question, said = "<image>\n" * len(new) * ("<image>" not in line) + line, ""
                prompt = assistant.prompt([*turns, (question, None)], seen + new)
                with contextlib.suppress(KeyboardInterrupt):           # stops the answer, not the chat
                    for piece in assistant.stream(*prompt):
                        print(piece, end="", flush=True)
                        said += piece
                print()
                turns, seen, new = [*turns, (question, said)], seen + new, []
        except EOFError:
            return
        except (ValueError, OSError) as e:
            note(f"error: {configurator.error_line(e)}")

def main():
    configurator.configure(cfg := Config())
    if cfg.out: return batch(cfg)
    assistant = load(cfg)
    if not cfg.prompt: return chat(assistant, cfg)
    pieces = assistant.stream(*assistant.prompt([(cfg.prompt, None)], [assistant.tiles(path) for path in cfg.image]))
    for piece in pieces if sys.stdout.isatty() else ["".join(pieces)]:   # to a file or pipe it goes whole or not at all
        print(piece, end="", flush=True)
    print()

if __name__ == "__main__":
    configurator.run_script(main)
