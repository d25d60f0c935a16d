"""Typed configuration in three layers: dataclass defaults < config/*.py files, in order < --key=value flags.

    origins = configure(cfg := Config())  # python train.py config/toy.py --seed=7 --llm=toy --llm.n_layers=4

A config file is plain Python; every name it assigns must be a field of the dataclass (names that start with "_" are
scratch, modules may be imported). A nested dataclass is set field by field with dots, `alignment.steps = 10`, and,
where it has PRESETS, as a whole by the name of one of them, `llm = "qwen2.5-1.5b"`. Whatever does not fit is a
ConfigError whose one line says what to write instead.
"""
import ast, contextlib, dataclasses, difflib, inspect, re, sys, traceback, types, typing

class ConfigError(ValueError):
    """A command line or config file that does not fit the dataclass; the message is one line for the user."""

# ---- fields and types -----------------------------------------------------------------------------------------------
EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a string",
            tuple: "a tuple of strings"}

def leaves(cfg, prefix=""):
    """(dotted name, owner, field name, type) of every field; a nested dataclass has type None, then come its fields."""
    assert not hasattr(cfg, "__dict__"), f"{type(cfg).__name__}: use @dataclass(slots=True), or typing errors go unseen"
    for f in dataclasses.fields(cfg):
        nested = dataclasses.is_dataclass(value := getattr(cfg, f.name))
        yield prefix + f.name.rstrip("_"), cfg, f.name, None if nested else f.type    # in_ is --in
        if nested: yield from leaves(value, f"{prefix}{f.name}.")

def resolved(cfg):
    """Flat dict {dotted name: value} of the whole configuration, as it goes into config.json."""
    return {name: getattr(owner, attr) for name, owner, attr, tp in leaves(cfg) if tp is not None}

def cast(value, tp, where, text=False):
    """Return `value` as type `tp`, or refuse. `text` marks the raw string of a command line, which is parsed first."""
    if typing.get_origin(tp) is typing.Literal:
        if value in (words := typing.get_args(tp)): return value
        raise ConfigError(f"{where} must be one of {', '.join(words)}, got {value!r}{nearest(value, words)}")
    tp = typing.get_origin(tp) or tp  # tuple[str, ...]: tuple
    if text and tp is tuple:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    elif text and tp is not str:
        with contextlib.suppress(ValueError, SyntaxError): value = ast.literal_eval(value)  # else refused below
    if (tp, type(value)) == (float, int) or (tp is int and type(value) is float and value.is_integer()):
        value = tp(value)  # so that 1e6 steps may be written; nan != nan is refused next
    if type(value) is not tp or value != value or tp is tuple and any(type(part) is not str for part in value):
        raise ConfigError(f"{where} must be {EXPECTED[tp]}, got {value!r}")
    return value

def nearest(name, names):
    """', did you mean ...?' for the closest of `names`, '' when none is close; llm.n_layers also counts as n_layers."""
    known = {n.rpartition(".")[2]: n for n in names} | {n: n for n in names}
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {known[close[0]]!r}?" if close else ""

# ---- files and flags ------------------------------------------------------------------------------------------------
def configure(cfg, argv=None):
    """Apply config files, then flags, to the dataclass instance `cfg` in place. Returns {dotted name: origin},
    "default", "FILE:LINE" or "command line", with the preset's name where one was used. Raises ConfigError.
    `--help` prints all keys with type, value and comment and exits with 0. Every script takes `--debug=...`."""
    argv = sys.argv[1:] if argv is None else argv
    table = {name: field for name, *field in leaves(cfg)}  # name -> owner, field name, type
    origins = dict.fromkeys(resolved(cfg), "default")

    def put(key, value, where, origin):
        if key not in table:
            raise ConfigError(f"{where}: unknown name {key!r}{nearest(key, table)} (--help lists all names)")
        owner, attr, tp = table[key]
        if tp is not None:
            value = cast(value, tp, f"{where}: {key}", text=origin == "command line")
            if type(value) is tuple and origins[key] == origin == "command line":
                value = getattr(owner, attr) + value  # a repeated flag adds
            if key.split(".")[-1] in SOURCES and origins[key] == origin == "command line":  # bash's work on a{0..9}
                raise ConfigError(f"more than one --{key}: put it in quotes, --{key}='A-{{000..099}}.tar,B.jsonl'")
            setattr(owner, attr, value)
            origins[key] = origin
            return
        nested = getattr(owner, attr)
        presets, first = getattr(nested, "PRESETS", {}), dataclasses.fields(nested)[0].name
        if value not in list(presets):
            raise ConfigError(f"{where}: {key} has no preset {value!r}{nearest(value, presets)} (there are "
                              f"{', '.join(presets) or 'none'}); or set {key} field by field, {key}.{first} = ...")
        for name, fresh, field, _ in leaves(type(nested)(**presets[value]), key + "."):
            setattr(nested, field, getattr(fresh, field))
            origins[name] = f"{origin} ({key} = {value!r})"

    if {"-h", "--help"} & set(argv):
        print_help(table)
        raise SystemExit(0)
    for arg in argv:  # the form of every word first, so that `--seed 3` is not blamed on the 3
        if not re.match(r"--[\w.]+=|[^-].*\.py$", arg):
            flag = arg.strip("-").partition("=")[0] or "key"
            raise ConfigError(f"{arg}: not understood; write a flag as --{flag}=value, a config file as NAME.py")
    for path in (arg for arg in argv if not arg.startswith("-")): run_file(path, cfg, put)
    flags = [arg for arg in argv if arg.startswith("-") and arg not in ("--debug=True", "--debug=False")]  # launch's
    for flag in sorted(flags, key=lambda flag: "." in flag.partition("=")[0]):  # a preset before the fields it sets
        put(*flag[2:].split("=", 1), flag, "command line")
    for key, value in resolved(cfg).items():
        least = key in AT_LEAST_ONE or key.endswith(".steps")
        if isinstance(value, (int, float)) and value < least:
            raise ConfigError(f"{origins[key]}: {key}={value} must be at least {least:d}")
    return origins

# files, patterns of which may have braces
SOURCES = "data val_data in references".split()
# no number may be negative; these may not be 0 either
AT_LEAST_ONE = set("""tokens_per_pack max_tiles_per_pack min_tiles grad_accum_steps save_every val_every val_packs
    print_every keep timeout_s rounds batch_size batch_tokens llm.n_heads llm.n_kv_heads llm.dim llm.head_dim
    shard_size clusters workers vision.image_size vision.patch_size vision.dim vision.n_heads
    vision.downsample""".split())

class View:
    """A nested dataclass as a config file sees it: reads pass through, assignments are checked and applied at once."""
    def __init__(self, obj, prefix, assign): vars(self).update(_obj=obj, _prefix=prefix, _assign=assign)
    def __getattr__(self, name): return getattr(self._obj, name)
    def __setattr__(self, name, value): self._assign(self._prefix + name, value)

class Names(dict):
    """The globals of a config file: assignments of public names, modules apart, are checked and applied at once."""
    def __init__(self, cfg, assign):
        super().__init__({f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)})
        self.update({k: View(v, f"{k}.", assign) for k, v in self.items() if dataclasses.is_dataclass(v)})
        self.cfg, self.assign = cfg, assign

    def __setitem__(self, name, value):
        if not (name.startswith("_") or isinstance(value, types.ModuleType)):
            self.assign(name, value)
            value = self[name] if isinstance(self[name], View) else getattr(self.cfg, name)
        super().__setitem__(name, value)

def run_file(path, cfg, put):
    """Execute one config file; anything that goes wrong in it is a ConfigError with file and line."""
    def assign(key, value):
        frame = sys._getframe(2)  # the config file
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        put(key, value, where, where)

    with open(path, encoding="utf-8") as f: text = f.read()
    try:
        exec(compile(text, path, "exec"), Names(cfg, assign))
    except ConfigError:
        raise
    except Exception as e:
        lines = [1, *(frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path)]
        if isinstance(e, SyntaxError) and e.filename == path: lines.append(e.lineno)
        raise ConfigError(f"{path}:{lines[-1]}: {type(e).__name__}: {e}") from e

def print_help(table):
    """Print every key with its type, value and the comment that stands beside the field in the source."""
    sources = {cls: "\n".join(inspect.getsource(base) for base in cls.__mro__[:-1])  # the last is object
               for cls in {type(owner) for owner, _, _ in table.values()}}
    print("usage: python SCRIPT.py [config/FILE.py ...] [--key=value ...] [--debug=True]\n")
    for name, (owner, attr, tp) in table.items():
        value = getattr(owner, attr)
        if tp is not None:
            comments = re.findall(rf"^\s+{attr}\s*:[^#\n]*#\s*(.+)$", sources[type(owner)], re.MULTILINE)
            print(f"{f'--{name}={value!r}':40s} {inspect.formatannotation(tp):12s} {''.join(comments[:1])}".rstrip())
        elif hasattr(value, "PRESETS"):
            print(f"{f'--{name}=PRESET':40s} {'|'.join(value.PRESETS)}")

# ---- the one place where errors become messages ---------------------------------------------------------------------
KILLED = "DataLoader worker"           # so PyTorch's word begins that a data worker was killed

def told(error):
    """An error that a user caused, in one line."""
    file = getattr(error, "filename", None)
    text = " ".join((f"{file}: {error.strerror}" if file else str(error) or type(error).__name__).split())
    if isinstance(error, ModuleNotFoundError): text += f": pip install {error.name}"
    return text + " Was there memory left? Try fewer --num_workers" * text.startswith(KILLED)

def launch(main):
    """Run a script's main(). A user's error (ValueError, OSError) becomes one line on stderr and exit code 2, as do a
    package that is not installed and a data worker that was killed, which PyTorch raises wherever the program is;
    Ctrl-C exit code 130; `--debug=True` shows the traceback. Other exceptions are bugs and pass through."""
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, KeyboardInterrupt) as e:
        if "--debug=True" in sys.argv or isinstance(e, RuntimeError) and not str(e).startswith(KILLED): raise
        interrupted = isinstance(e, KeyboardInterrupt)
        print("interrupted" if interrupted else f"error: {told(e)}", file=sys.stderr)
        sys.exit(130 if interrupted else 2)
