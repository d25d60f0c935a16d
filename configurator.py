"""Typed configuration in three layers: dataclass defaults < config/*.py files < --key=value flags.

    cfg = Config()
    origins = configure(cfg)  # python train.py config/toy.py --seed=7 --llm=toy --llm.n_layers=4

A config file is plain Python. Every name it assigns must be a field of the dataclass, except
modules and names that start with "_". A nested dataclass is set field by field with dots,
`alignment.steps = 10`. If it has PRESETS, the name of one sets it as a whole,
`llm = "qwen2.5-1.5b"`. Whatever does not fit is a ConfigError whose one line says what to write.
"""
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
import sys
import traceback
import types
import typing
from operator import ge, gt, le, lt

from inputs.files import file_problem, printable
from inputs.patience import DataGone


class ConfigError(ValueError):
    """A command line or config file that does not fit; the message is one line for the user."""


# ---- fields and types ----------------------------------------------------------------------------

EXPECTED = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple: "a tuple of strings",
}


def setting(default, at_least=0, at_most=None, above=None, below=None, files=False, filled=False):
    """A field of a Config with rules of its own.

    at_least, at_most, above, below: the range of a number. A slip of the hand is refused by name
    then, and does not hang or fail far from here. files: the value names files. A repeated flag is
    refused then: bash has made several of an unquoted --data=a-{0..9}.tar; the last would count.
    filled: a text that may not be empty.
    """
    at_least = None if above is not None else at_least
    ends = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    return dataclasses.field(default=default, metadata=dict(range=ends, files=files, filled=filled))


HOLDS = {"at least": ge, "above": gt, "at most": le, "below": lt}


def range_problem(field, value):
    """What the number of a field must be, as text; "" if it is."""
    ends = field.metadata.get("range", {"at least": 0})
    ends = {word: end for word, end in ends.items() if end is not None}
    if all(HOLDS[word](value, end) for word, end in ends.items()):
        return ""
    return "must be " + " and ".join(f"{word} {end:,}" for word, end in ends.items())


class Slot(typing.NamedTuple):
    """One name that a user can set, and where its value is kept."""
    owner: object  # the dataclass instance, the whole configuration or a part of it
    field: dataclasses.Field
    nested: bool  # a dataclass of its own, with fields below it

    @property
    def value(self):
        return getattr(self.owner, self.field.name)


def walk(cfg, prefix=""):
    """Yield (dotted name, Slot) of every field; the fields of a nested dataclass follow it."""
    kind = type(cfg).__name__
    if hasattr(cfg, "__dict__"):
        raise TypeError(f"{kind}: use @dataclass(slots=True), or it hides typos")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        nested = dataclasses.is_dataclass(value)
        name = prefix + field.name.rstrip("_")  # the field in_ is the flag --in
        yield name, Slot(cfg, field, nested)
        if nested:
            yield from walk(value, f"{name}.")


def resolved(cfg):
    """The whole configuration as a flat dict {dotted name: value}, as config.json holds it."""
    return {name: slot.value for name, slot in walk(cfg) if not slot.nested}


def cast(value, kind, where):
    """Return `value` as the type `kind` of its field, or refuse it."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        hint = nearest(value, choices)
        raise ConfigError(f"{where} must be one of {', '.join(choices)}, got {value!r}{hint}")

    kind = typing.get_origin(kind) or kind  # tuple[str, ...] -> tuple
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e6 steps may be written so
    fits = type(value) is kind and value == value  # nan is not equal to itself
    if kind is tuple and fits:
        fits = all(type(part) is str for part in value)
    if not fits:
        raise ConfigError(f"{where} must be {EXPECTED[kind]}, got {value!r}")
    return value


def parse(text, kind):
    """The value that a flag's text stands for. What is no literal stays text; cast refuses it."""
    if typing.get_origin(kind) is typing.Literal or kind is str:
        return text
    if (typing.get_origin(kind) or kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def nearest(name, names):
    """", did you mean ...?" for the closest of `names`, "" when none is close.

    The last part of a dotted name counts too: n_layers finds llm.n_layers.
    """
    known = {n.rpartition(".")[2]: n for n in names}
    known.update({n: n for n in names})
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {known[close[0]]!r}?" if close else ""


# ---- files and flags -----------------------------------------------------------------------------

FLAGS_ORIGIN = "command line"


def configure(cfg, argv=None):
    """Apply config files, then flags, to the dataclass instance `cfg` in place.

    Returns {dotted name: origin}: "default", "FILE:LINE" or "command line", with the preset's name
    where one was used. Raises ConfigError. `--help` prints all settings and exits with 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = Settings(cfg)
    if "-h" in argv or "--help" in argv:
        print_help(settings.slots)
        raise SystemExit(0)

    # Check the form of every word first, so that `--seed 3` is not blamed on the 3.
    for word in argv:
        if not re.match(r"--[\w.]+=|[^-].*\.py$", word):
            flag = word.strip("-").partition("=")[0] or "key"
            raise ConfigError(f"{word}: not understood; write a flag as --{flag}=value, "
                              f"a config file as NAME.py")

    for word in argv:
        if not word.startswith("-"):
            run_file(word, settings)
    debug = ("--debug=True", "--debug=False")  # run_script reads these
    flags = [word for word in argv if word.startswith("-") and word not in debug]
    # A preset comes before the fields it sets, in whatever order they stand.
    for flag in sorted(flags, key=lambda flag: "." in flag.partition("=")[0]):
        name, _, text = flag.removeprefix("--").partition("=")
        settings.put_flag(name, text, flag)
    settings.check_limits()
    return settings.origins


class Settings:
    """A configuration while files and flags are applied to it."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.slots = dict(walk(cfg))
        self.origins = {name: "default" for name in resolved(cfg)}

    def find(self, name, where):
        if name not in self.slots:
            hint = nearest(name, self.slots)
            raise ConfigError(f"{where}: unknown name {name!r}{hint} (--help lists all names)")
        return self.slots[name]

    def put_flag(self, name, text, flag):
        slot = self.find(name, flag)
        if slot.nested:
            return self.put_preset(name, text, flag, FLAGS_ORIGIN)
        value = cast(parse(text, slot.field.type), slot.field.type, f"{flag}: {name}")
        if self.origins[name] == FLAGS_ORIGIN:
            if slot.field.metadata.get("files"):
                raise ConfigError(f"more than one --{name}: put it in quotes, "
                                  f"--{name}='A-{{000..099}}.tar,B.jsonl'")
            if type(value) is tuple:
                value = slot.value + value  # a repeated flag adds to a tuple
        self.store(name, value, FLAGS_ORIGIN)

    def put(self, name, value, where):
        """Apply an assignment of a config file at where, FILE:LINE."""
        slot = self.find(name, where)
        if slot.nested:
            return self.put_preset(name, value, where, where)
        self.store(name, cast(value, slot.field.type, f"{where}: {name}"), where)

    def put_preset(self, name, value, where, origin):
        """Set a nested dataclass as a whole to the preset called value."""
        nested = self.slots[name].value
        presets = getattr(nested, "PRESETS", {})
        if value not in list(presets):
            first = dataclasses.fields(nested)[0].name
            there_are = ", ".join(presets) or "none"
            raise ConfigError(
                f"{where}: {name} has no preset {value!r}{nearest(value, presets)} (there are "
                f"{there_are}); or set {name} field by field, {name}.{first} = ...")
        fresh = type(nested)(**presets[value])
        for key, new in resolved(fresh).items():
            self.store(f"{name}.{key}", new, f"{origin} ({name} = {value!r})")

    def store(self, name, value, origin):
        slot = self.slots[name]
        setattr(slot.owner, slot.field.name, value)
        self.origins[name] = origin

    def check_limits(self):
        for name, slot in self.slots.items():
            value = slot.value
            problem = ""
            if isinstance(value, (int, float)):
                problem = range_problem(slot.field, value)
            elif value == "" and slot.field.metadata.get("filled"):
                problem = "must not be empty; is a variable unset?"
            if problem:
                raise ConfigError(f"{self.origins[name]}: {name}={str(value)[:40]} {problem}")


class View:
    """A nested dataclass as a config file sees it: an assignment is checked and applied at once."""

    def __init__(self, obj, prefix, assign):
        vars(self).update(_obj=obj, _prefix=prefix, _assign=assign)

    def __getattr__(self, name):
        return getattr(self._obj, name)

    def __setattr__(self, name, value):
        self._assign(self._prefix + name, value)


class Names(dict):
    """The globals of a config file: assigning a public name checks and applies it at once."""

    def __init__(self, cfg, assign):
        super().__init__()
        self.cfg = cfg
        self.assign = assign
        for field in dataclasses.fields(cfg):
            value = getattr(cfg, field.name)
            if dataclasses.is_dataclass(value):
                value = View(value, f"{field.name}.", assign)
            super().__setitem__(field.name, value)

    def __setitem__(self, name, value):
        if not (name.startswith("_") or isinstance(value, types.ModuleType)):
            self.assign(name, value)
            # Read it back: a preset leaves its View in place, a number may have become a float.
            value = self[name] if isinstance(self[name], View) else getattr(self.cfg, name)
        super().__setitem__(name, value)


def run_file(path, settings):
    """Execute one config file; anything that goes wrong is a ConfigError with file and line."""
    def assign(name, value):
        frame = sys._getframe(2)  # the config file's line, past this function and __setitem__
        settings.put(name, value, f"{frame.f_code.co_filename}:{frame.f_lineno}")

    with open(path, encoding="utf-8") as f:
        text = f.read()
    try:
        exec(compile(text, path, "exec"), Names(settings.cfg, assign))
    except ConfigError:
        raise
    except Exception as e:
        line = 1
        for frame in traceback.extract_tb(e.__traceback__):
            if frame.filename == path:
                line = frame.lineno
        if isinstance(e, SyntaxError) and e.filename == path:
            line = e.lineno
        raise ConfigError(f"{path}:{line}: {type(e).__name__}: {e}") from e


def print_help(slots):
    """Print every setting with its type, its value and the comment beside the field's source."""
    print("usage: python SCRIPT.py [config/FILE.py ...] [--key=value ...] [--debug=True]\n")
    for name, slot in slots.items():
        if not slot.nested:
            kind = inspect.formatannotation(slot.field.type)
            flag = f"--{name}={slot.value!r}"
            print(f"{flag:40s} {kind:12s} {field_comment(slot)}".rstrip())
        elif hasattr(slot.value, "PRESETS"):
            print(f"{f'--{name}=PRESET':40s} {'|'.join(slot.value.PRESETS)}")


@functools.cache
def class_source(cls):
    return inspect.getsource(cls)


def field_comment(slot):
    """The comment at the end of the line that defines a field, or else the line above it; or ""."""
    name = slot.field.name
    for cls in type(slot.owner).__mro__[:-1]:  # the last is object, which has no source
        for pattern in (rf"^\s+{name}\s*:[^#\n]*#\s*(.+)$", rf"^\s+# (.+)\n\s+{name}\s*:[^#\n]*$"):
            found = re.search(pattern, class_source(cls), re.MULTILINE)
            if found:
                return found[1]
    return ""


# ---- sub-commands --------------------------------------------------------------------------------

def subcommand(commands, usage, settings=None, argv=None):
    """Find the sub-command of a script: its first word that is no flag.

    commands: {word: what it stands for}. settings: the script's Config, if all commands share one.
    Returns (commands[word], all other words and flags, in their order). Raises ConfigError with
    the usage if the word is missing or unknown; --help without a word prints usage and settings.
    """
    argv = sys.argv[1:] if argv is None else argv
    at = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    if at is not None and argv[at] in commands:
        return commands[argv[at]], [*argv[:at], *argv[at + 1:]]
    if at is not None:
        hint = nearest(argv[at], commands)
        raise ConfigError(f"unknown command {argv[at]!r}{hint or ';'} usage: {usage}")
    if "-h" in argv or "--help" in argv:
        print(f"usage: {usage}")
        if settings is not None:
            print_help(dict(walk(settings)))
        raise SystemExit(0)
    raise ConfigError(f"usage: {usage}")


def split_words(argv):
    """Split what subcommand left -> (paths and other plain words, flags)."""
    words = [word for word in argv if not word.startswith("-")]
    flags = [word for word in argv if word.startswith("-")]
    return words, flags


# ---- the one place where errors become messages --------------------------------------------------

WORKER_KILLED = "DataLoader worker"  # PyTorch's message begins so when a data worker was killed


def error_line(error):
    """An error that a user caused, in one line."""
    text = file_problem(error) or str(error) or type(error).__name__
    if text.startswith("Caught ") and "Traceback" in text:
        # Of a data worker: its traceback is in the text, and the last line is what it said.
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = printable(" ".join(text.split()))
    if isinstance(error, ModuleNotFoundError):
        text += f": pip install {error.name}"
    if text.startswith(WORKER_KILLED):
        text += " Did the memory run out? Try fewer --num_workers"
    return text


def run_script(main):
    """Run a script's main() and turn errors that a user caused into one line on stderr.

    Exit code 2: ValueError, OSError, a package that is not installed, a killed data worker (a
    RuntimeError of PyTorch, raised wherever the program is). Exit code 130: Ctrl-C.
    `--debug=True` shows the traceback. Other exceptions are bugs and pass through.
    """
    for stream in (sys.stdout, sys.stderr):
        # A name of a stranger may hold what has no UTF-8, and a message ends no run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, KeyboardInterrupt) as e:
        told = isinstance(e, DataGone) or str(e).startswith(WORKER_KILLED)
        bug = isinstance(e, RuntimeError) and not told
        if bug or "--debug=True" in sys.argv:
            raise
        if isinstance(e, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        print(f"error: {error_line(e)}", file=sys.stderr)
        sys.exit(2)
