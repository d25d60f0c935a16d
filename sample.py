"""Ask a model about images: one question, a whole folder, or a chat.

    # stdout holds nothing but the answer
    python sample.py --model=out/demo/model --image=a.jpg --prompt="What is written here?"
    python sample.py --model=DIR --image=a.jpg --image=b.jpg \\
        --prompt="Compare <image> with <image>."

    # all pictures of a folder, or rows {"image": ..., "prompt": ...}
    python sample.py --model=DIR --image=photos/ --prompt="Describe the image." --out=answers.jsonl
    python sample.py --model=DIR --image=questions.jsonl --out=answers.jsonl

    # a chat
    python sample.py --model=DIR
"""
import collections
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from configurator import configure, error_line, resolved, run_script, setting
from generate import Assistant
from inputs.dialogue import check_text
from inputs.files import check_file, json_hash, naming, read_jsonl, write_atomic
from inputs.images import IMAGE_SUFFIXES, MAX_TILES
from inputs.picture_names import image_names, picture_source
from inputs.records import UNREADABLE, parse_row
from inputs.row_keys import (
    DIALOGUE_KEYS,
    TURNS_KEYS,
    check_no_picture_is_lost,
    is_empty,
    short,
    unknown_keys,
)
from model_files import check_sizes_of_weights
from training.checkpoint_folder import model_folder
from training.distributed import compute_dtype, is_compiled, setup_distributed

HELP = ("/image PATH adds a picture, /tiles N limits later ones (0: as at first), "
        "/reset starts anew, Ctrl-D ends")


@dataclass(slots=True)
class Config:
    model: str = ""  # model folder, a run's checkpoint, or a run folder (its newest checkpoint)
    image: tuple[str, ...] = ()  # picture, may repeat; with --out a folder of pictures or a .jsonl
    prompt: str = ""  # the question; empty opens a chat
    out: str = ""  # answers of a folder or .jsonl go to this .jsonl
    max_new_tokens: int = setting(1024, at_most=2**17)  # longest answer
    temperature: float = setting(0.0, at_most=100)  # 0 takes the likeliest token
    top_p: float = setting(1.0, above=0, at_most=1)  # total probability of the tokens to draw from
    top_k: int = setting(0, at_most=2**20)  # sample among so many tokens; 0 = all
    seed: int = setting(0, at_most=2**32 - 1)  # of the sampling
    max_tiles: int = setting(0, at_most=MAX_TILES)  # of a picture; 0 = as the model folder says
    batch_size: int = setting(16, at_least=1, at_most=2**16)  # answered together, with --out
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU with --out


# Other keys that hold a question.
QUESTION_KEYS = {*DIALOGUE_KEYS, *TURNS_KEYS, "text"} - {"prompt", "answer", "response"}


def note(text):
    print(text, file=sys.stderr)


def load(cfg):
    """The Assistant of a run. Refuses missing pictures before the model is loaded."""
    for path in cfg.image:
        if not os.path.isfile(path) and not cfg.out:
            raise ValueError(f"{path}: no such picture; "
                             "a folder of them needs --out=answers.jsonl too")
    check_sizes_of_weights(cfg.model)
    device = setup_distributed(cfg.device).device
    # A single question is answered before a compiler is done.
    compiled = is_compiled(cfg.compile, device) and bool(cfg.out or cfg.compile == "on")
    return Assistant(
        cfg.model, device, compute_dtype(cfg.dtype, device), cfg.max_tiles,
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
        top_p=cfg.top_p, top_k=cfg.top_k, seed=cfg.seed, compiled=compiled)


# ---- a folder or a file of questions -------------------------------------------------------------

def read_questions(cfg):
    """The rows {"image": path, list of paths or absent, "prompt"} of --image -> (rows, folder).

    --image is a folder of pictures, or a .jsonl. Its paths start at the folder that is returned.
    A line that cannot be asked becomes a row with an "error".
    """
    source = Path(cfg.image[0] if len(cfg.image) == 1 else "none")
    if source.is_dir():
        base = Path()
        pictures = [path for path in sorted(source.iterdir())
                    if path.suffix.lower() in IMAGE_SUFFIXES]
        lines = [json.dumps({"image": str(path)}) for path in pictures]
    elif source.suffix == ".jsonl":
        base = source.parent
        lines = source.read_bytes().split(b"\n")
    else:
        raise ValueError("--out needs one folder or one .jsonl as --image")

    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = {}
        try:
            row = parse_row(line, is_text=False)
            row["prompt"] = question_of(row, cfg.prompt)
        except UNREADABLE as e:
            row["error"] = f"line {number}: {error_line(e)}"
        rows.append(row)
    if rows and all("error" in row for row in rows):
        raise ValueError(f"{source}: no row can be asked; {rows[0]['error']}")
    if not rows:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"{source}: nothing to ask; it needs pictures ({suffixes}) or rows")
    return rows, base


def question_of(row, default):
    """The question of a row, else the one for all; ValueError if there is none."""
    # Their words would be lost behind the question for all.
    others = [key for key in row if key in QUESTION_KEYS]
    if others and is_empty(row.get("prompt")):
        raise ValueError(f"{others[0]} is not read; call it prompt")
    prompt = default if is_empty(row.get("prompt")) else row["prompt"]
    if is_empty(prompt):
        raise ValueError("no prompt; give one for all with --prompt=...")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("a prompt that is no text; write a question")
    check_text(prompt, "user", "prompt")
    return prompt


def read_prompts(assistant, rows, base, asked):
    """Yield the prompt of each row and append the row to `asked`.

    A row whose pictures cannot be read gets an "error" instead. The decoder takes prompts as it
    has room, so pictures are not read before that.
    """
    for row in rows:
        try:
            names = image_names(row)
            if not names:
                check_no_picture_is_lost(row)
            tiles = [assistant.tiles(picture_source(base, name)) for name in names]
            prompt = assistant.prompt([(row["prompt"], None)], tiles)
        except UNREADABLE as e:
            row["error"] = error_line(e)
            note(f"{short(json.dumps(row.get('image')))}: {row['error']}")
            continue
        asked.append(row)
        yield prompt


def command_key(cfg):
    """A hash of all that decides answers beside their rows: the settings and the model's files."""
    settings = {name: value for name, value in resolved(cfg).items() if name != "batch_size"}
    files = sorted(Path(cfg.model).iterdir()) if os.path.isdir(cfg.model) else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json_hash([settings, stats])


def question_key(row):
    return json.dumps({name: value for name, value in row.items() if name != "answer"})


def earlier_answers(cfg, mark):
    """{question_key: answer} of a run of the same command that was interrupted.

    mark: the file that says which command has left --out unfinished. ValueError if it was another.
    """
    check_file(mark)
    if not (mark.exists() and os.path.exists(cfg.out)):
        return {}
    rows = [row for row in read_jsonl(cfg.out) if isinstance(row, dict) and "answer" in row]
    if rows and mark.read_text() != command_key(cfg):
        raise ValueError(f"{cfg.out} has answers of an interrupted run with another model or other "
                         f"settings; repeat that command, or remove {mark} to lose them")
    if rows:
        note(f"{cfg.out}: {len(rows)} answers are there already, the run goes on")
    return {question_key(row): row["answer"] for row in rows}


def json_line(row):
    """A row as a line of a file; what has no UTF-8 is escaped."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode()


def answer_file(cfg):
    """Answer every question of a folder or .jsonl.

    The rows of --out are the questions with an "answer", or with an "error". They are written as
    they come, so that a run that is killed leaves them and the same command goes on, and in their
    order at the end.
    """
    rows, base = read_questions(cfg)
    mark = Path(f"{cfg.out}.unfinished")
    known = earlier_answers(cfg, mark)
    assistant = load(cfg)
    asked = []
    unknown = collections.Counter(key for row in rows for key in unknown_keys(row))
    for key in unknown.keys() - {"prompt", "error", *QUESTION_KEYS}:
        note(f"{key}: this key of {unknown[key]} rows is not read")
    to_ask = []
    for row in rows:
        if "error" in row:
            note(f"{cfg.image[0]} {row['error']}")
        elif question_key(row) in known:
            row["answer"] = known[question_key(row)]
        else:
            to_ask.append(row)
    answered = [row for row in rows if question_key(row) in known]
    write_atomic(cfg.out, "".join(map(json_line, answered)))
    write_atomic(mark, command_key(cfg))
    try:
        with naming(cfg.out), open(cfg.out, "a", encoding="utf-8") as file:
            prompts = read_prompts(assistant, to_ask, base, asked)
            answers = assistant.answer_each(prompts, batch_size=cfg.batch_size)
            for number, text in tqdm(answers, desc="answers", total=len(to_ask), disable=None):
                asked[number]["answer"] = text
                file.write(json_line(asked[number]))
                file.flush()
    finally:
        # Where nothing was answered, nothing is left behind.
        if os.path.exists(cfg.out) and os.path.getsize(cfg.out) == 0:
            os.remove(cfg.out)
            mark.unlink(missing_ok=True)
    write_atomic(cfg.out, "".join(map(json_line, rows)))
    mark.unlink(missing_ok=True)
    n_answers = len(answered) + len(asked)
    note(f"wrote {n_answers} answers to {cfg.out}, {len(rows) - n_answers} failed")


# ---- a chat --------------------------------------------------------------------------------------

@dataclass(slots=True)
class Dialogue:
    turns: list = field(default_factory=list)  # [(question, answer), ...]
    tiles: list = field(default_factory=list)  # of each picture in these turns
    new_tiles: list = field(default_factory=list)  # of each picture for the next question


def chat(assistant, cfg):
    """Read questions from stdin until it ends. Only answers go to stdout."""
    dialogue = Dialogue(new_tiles=[assistant.tiles(path) for path in cfg.image])
    max_tiles = assistant.max_tiles
    note(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            command, _, value = line.partition(" ")
            if command == "/image" and value:
                add_picture(assistant, dialogue, value)
            elif command == "/tiles" and value.isdigit():
                assistant.max_tiles = int(value) or max_tiles
                note(f"at most {assistant.max_tiles} tiles from the next picture on")
            elif command == "/reset":
                dialogue = Dialogue()
                note("a new dialogue, without pictures")
            elif command.startswith("/"):
                note(HELP)
            elif line:
                ask(assistant, dialogue, line)
        except EOFError:
            return
        except (ValueError, OSError) as e:
            note(f"error: {error_line(e)}")


def add_picture(assistant, dialogue, path):
    path = path.strip(" '\"")  # as a terminal pastes it
    tiles = assistant.tiles(os.path.expanduser(path))
    dialogue.new_tiles.append(tiles)
    count = "1 tile" if len(tiles) == 1 else f"{len(tiles)} tiles"
    note(f"{path}: {count}, {len(tiles) * assistant.model.vision.tokens_per_tile} tokens")


def ask(assistant, dialogue, question):
    """Print the answer as it comes and add the turn to the dialogue. Ctrl-C ends the answer."""
    if "<image>" not in question:  # the new pictures come first
        question = "<image>\n" * len(dialogue.new_tiles) + question
    tiles = dialogue.tiles + dialogue.new_tiles
    prompt = assistant.prompt([*dialogue.turns, (question, None)], tiles)
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in assistant.stream(*prompt):
            print(piece, end="", flush=True)
            answer += piece
    print()
    dialogue.turns.append((question, answer))
    dialogue.tiles = tiles
    dialogue.new_tiles = []


# ---- one question --------------------------------------------------------------------------------

def answer_one(assistant, cfg):
    """Print the answer to --prompt about the pictures of --image."""
    tiles = [assistant.tiles(path) for path in cfg.image]
    pieces = assistant.stream(*assistant.prompt([(cfg.prompt, None)], tiles))
    if not sys.stdout.isatty():
        pieces = ["".join(pieces)]  # to a file or pipe the answer goes whole or not at all
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def main():
    cfg = Config()
    configure(cfg)
    cfg.model = model_folder(cfg.model)
    if cfg.out:
        answer_file(cfg)
        return
    assistant = load(cfg)
    if cfg.prompt:
        answer_one(assistant, cfg)
    else:
        chat(assistant, cfg)


if __name__ == "__main__":
    run_script(main)
