"""Ask a model about images: one question, a whole folder, or a chat.

    python sample.py --model=out/demo/model --image=a.jpg --prompt="What is written here?"    # stdout: the answer
    python sample.py --model=DIR --image=a.jpg --image=b.jpg --prompt="Compare <image> with <image>."
    python sample.py --model=DIR --image=photos/ --prompt="Describe the image." --out=answers.jsonl
    python sample.py --model=DIR --image=questions.jsonl --out=answers.jsonl     # rows {"image": ..., "prompt": ...}
    python sample.py --model=DIR                                                 # chat

Shape letters: N tiles, T tokens of a prompt.
"""
import dataclasses, itertools, json, os, sys
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common, configurator
from data import Tokenizer, chat_ids
from model import generate, generate_stream
from vision import load_image, make_tiles
from weights import load_folder

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
HELP = "/image PATH adds a picture, /tiles N sets the most tiles of the next one, /reset starts anew, Ctrl-D ends"


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
    min_tiles: int = 1                    # fewest tiles of a picture
    max_tiles: int = 0                    # most tiles of a picture, thumbnail not counted; 0 = as the model folder says
    template: str = ""                    # chat template; empty = as the model folder says
    batch_size: int = 16                  # questions answered together, with --out
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"    # auto: bfloat16 on a GPU, float32 elsewhere
    device: str = "auto"                  # auto | cpu | cuda
    debug: bool = False                   # show the traceback of an error


class Assistant:
    """A loaded model folder with the settings of a run; the one place where words and pictures become ids and tiles."""

    def __init__(self, cfg):
        if not cfg.model:
            raise ValueError("give a model folder with --model=DIR")
        for path in cfg.image:                                         # before the model is loaded
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such picture")
            if os.path.isdir(path) and not cfg.out:
                raise ValueError(f"{path} is a folder; give --out=answers.jsonl as well to ask about all its pictures")
        device = common.setup_distributed(cfg.device).device
        self.cfg, self.tokenizer = cfg, Tokenizer(cfg.model)
        self.model, folder = load_folder(cfg.model, device, common.compute_dtype(cfg.dtype, device))
        self.model.eval()
        self.template = cfg.template or folder.get("template", "sailvl-chat")
        self.max_tiles, self.thumbnail = cfg.max_tiles or folder["max_dynamic_patch"], folder["use_thumbnail"]

    def tiles(self, path):
        """Picture file -> tiles (N, 3, s, s) uint8."""
        image, size = load_image(path), self.model.vision.image_size
        return make_tiles(image, self.cfg.min_tiles, self.max_tiles, size, self.thumbnail)

    def prompt(self, turns, tiles):
        """[(question, answer), ..., (question, None)] and each picture's tiles -> (ids (T,), tiles (N, 3, s, s))."""
        vision = self.model.vision
        ids = chat_ids(self.tokenizer, self.template, turns, [len(t) for t in tiles], vision.tokens_per_tile)
        none = torch.zeros(0, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
        return ids, torch.cat([none, *tiles])

    def settings(self):
        cfg = self.cfg
        return dict(max_new_tokens=cfg.max_new_tokens, stop_ids={self.tokenizer.eos_id}, temperature=cfg.temperature,
                    top_p=cfg.top_p, top_k=cfg.top_k, seed=cfg.seed)

    def answers(self, prompts):
        """[(ids, tiles), ...] -> answers, all generated together."""
        ids = generate(self.model, [p for p, _ in prompts], [t for _, t in prompts], **self.settings())
        return [self.tokenizer.decode(one, skip_special=True).strip() for one in ids]

    def stream(self, ids, tiles):
        """Yield the answer piece by piece; a character of several tokens comes when it is whole."""
        said, shown = [], ""
        for token in itertools.chain(generate_stream(self.model, ids, tiles, **self.settings()), [None]):
            said += [] if token is None else [token]
            text = self.tokenizer.decode(said, skip_special=True).lstrip()
            text = text.rstrip() if token is None else text.rstrip("\ufffd").rstrip()      # closing spaces stay unsaid
            if len(text) > len(shown):
                yield text[len(shown):]
                shown = text


# ---- one question, a batch, a chat -------------------------------------------------------------------------------

def ask(assistant, cfg):
    """Print the answer, nothing else, on stdout; as it comes when that is a terminal."""
    ids, tiles = assistant.prompt([(cfg.prompt, None)], [assistant.tiles(path) for path in cfg.image])
    if sys.stdout.isatty():
        for piece in assistant.stream(ids, tiles):
            print(piece, end="", flush=True)
        print()
    else:
        print(*assistant.answers([(ids, tiles)]))

def questions(cfg):
    """--image, a folder or a .jsonl of {"image": path, list of paths or absent, "prompt"} -> (rows, base folder)."""
    path = Path(cfg.image[0]) if len(cfg.image) == 1 else None
    if path is None or not (path.is_dir() or path.suffix == ".jsonl"):
        raise ValueError("--out needs one folder or one .jsonl as --image")
    if path.is_dir():
        rows = [{"image": str(p)} for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURES]
    else:
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            try:
                rows += [dict(json.loads(line))] if line.strip() else []
            except (ValueError, TypeError) as e:
                raise ValueError(f"{path} line {number}: not a JSON object: {e}") from e
    for number, row in enumerate(rows, 1):
        row["prompt"] = row.get("prompt") or cfg.prompt
        if not row["prompt"]:
            raise ValueError(f"{path} row {number} has no prompt; give one for all with --prompt=...")
    if not rows:
        raise ValueError(f"{path}: nothing to ask; it needs pictures ({', '.join(PICTURES)}) or rows")
    return rows, Path() if path.is_dir() else path.parent

def batch(cfg):
    """Answer every question of a folder or .jsonl; rows of --out are the questions with `answer`, or with `error`."""
    (rows, base), failed, assistant = questions(cfg), 0, Assistant(cfg)
    with open(cfg.out + ".partial", "w", encoding="utf-8") as f:
        for start in tqdm(range(0, len(rows), cfg.batch_size), desc="answers", unit="batch", disable=None):
            good = []
            for row in (chunk := rows[start:start + cfg.batch_size]):
                images = row.get("image") or []
                try:
                    tiles = [assistant.tiles(base / path) for path in ([images] if isinstance(images, str) else images)]
                    good.append((row, assistant.prompt([(row["prompt"], None)], tiles)))
                except (ValueError, OSError) as e:
                    row["error"] = str(e)
                    failed += 1
                    print(f"{images}: {e}", file=sys.stderr)
            for (row, _), text in zip(good, assistant.answers([p for _, p in good]) if good else [], strict=True):
                row["answer"] = text
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk)
    os.replace(cfg.out + ".partial", cfg.out)
    print(f"wrote {len(rows) - failed} answers to {cfg.out}" + f", {failed} failed" * bool(failed), file=sys.stderr)

def chat(assistant, cfg):
    """Read questions from stdin until it ends; only answers go to stdout."""
    say = lambda text: print(text, file=sys.stderr)
    turns, seen, new = [], [], []                                      # dialogue, its pictures, pictures added since

    def add(path):
        new.append(assistant.tiles(path))
        say(f"{path}: {len(new[-1])} tiles, {len(new[-1]) * assistant.model.vision.tokens_per_tile} tokens")

    for path in cfg.image:
        add(path)
    say(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        try:
            if command == "/image" and value:
                add(os.path.expanduser(value.strip().strip("'\"")))
            elif command == "/tiles" and value.strip().isdigit() and int(value) >= cfg.min_tiles:
                assistant.max_tiles = int(value)
                say(f"at most {value} tiles from the next picture on")
            elif command == "/reset":
                turns, seen, new = [], [], []
                say("a new dialogue, without pictures")
            elif command.startswith("/"):
                say(HELP)
            elif line:
                turns.append(("<image>\n" * len(new) * ("<image>" not in line) + line, None))
                said = ""
                try:
                    for piece in assistant.stream(*assistant.prompt(turns, seen + new)):
                        print(piece, end="", flush=True)
                        said += piece
                except KeyboardInterrupt:                              # stops the answer, not the chat
                    pass
                except BaseException:
                    turns.pop()
                    raise
                print()
                turns[-1], seen, new = (turns[-1][0], said), seen + new, []
        except (ValueError, OSError) as e:
            say(f"error: {e}")


def main():
    configurator.configure(cfg := Config())
    if cfg.out:
        batch(cfg)
    elif cfg.prompt:
        ask(Assistant(cfg), cfg)
    else:
        chat(Assistant(cfg), cfg)


if __name__ == "__main__":
    configurator.launch(main)
