"""Typed configuration in three layers: dataclass defaults < config/*.py files, in order < --key=value flags, in order.

    origins = configure(cfg := Config())  # python train.py config/toy.py --seed=7 --llm=toy --llm.n_layers=4

A config file is plain Python; every name it assigns must be a field of the dataclass (names that start with "_" are
scratch, modules may be imported). A nested dataclass is set field by field with dots, `alignment.steps = 10`, and,
where it has PRESETS, as a whole by the name of one of them, `llm = "qwen2.5-1.5b"`. Whatever does not fit is a
ConfigError whose one line says what to write instead.
"""
import ast, dataclasses, difflib, inspect, os, re, sys, traceback, types, typing

class ConfigError(ValueError):
    """A command line or config file that does not fit the dataclass; the message is one line for the user."""

# ---- fields and types -----------------------------------------------------------------------------------------------
EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a string",
            tuple: "a tuple of strings"}

def leaves(cfg, prefix=""):
    """(dotted name, owner, field name, type) of every field; a nested dataclass has type None, then come its fields."""
    assert not hasattr(cfg, "__dict__"), f"{type(cfg).__name__}: use @dataclass(slots=True), or typing errors go unseen"
    hints = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        nested = dataclasses.is_dataclass(value := getattr(cfg, f.name))
        yield prefix + f.name, cfg, f.name, None if nested else hints[f.name]
        if nested: yield from leaves(value, f"{prefix}{f.name}.")

def resolved(cfg):
    """Flat dict {dotted name: value} of the whole configuration, as it goes into config.json."""
    return {name: getattr(owner, attr) for name, owner, attr, tp in leaves(cfg) if tp is not None}

def cast(value, tp, where, text=False):
    """Return `value` as type `tp`, or refuse. `text` marks the raw string of a command line, which is parsed first."""
    if isinstance(tp, types.UnionType):  # X | None
        if value is None or (text and value == "None"): return None
        tp = next(a for a in typing.get_args(tp) if a is not types.NoneType)
    if typing.get_origin(tp) is typing.Literal:
        if value in (words := typing.get_args(tp)): return value
        raise ConfigError(f"{where} must be one of {', '.join(words)}, got {value!r}{nearest(value, words)}")
    tp = typing.get_origin(tp) or tp  # tuple[str, ...]: tuple
    if text and tp in (bool, int, float):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # the refusal below reports it
    if tp is tuple and type(value) in (str, list):
        value = tuple(part.strip() for part in value.split(",") if part.strip()) if type(value) is str else tuple(value)
    if (tp, type(value)) == (float, int) or (tp is int and type(value) is float and value.is_integer()):
        value = tp(value)  # so that 1e6 steps may be written
    parts = value if type(value) is tuple else ()
    if type(value) is not tp or value != value or any(type(part) is not str for part in parts):  # !=: not a number
        raise ConfigError(f"{where} must be {EXPECTED[tp]}, got {value!r}")
    return value

def nearest(name, names):
    """', did you mean ...?' for the closest of `names`, judged whole, then by the last part; '' when none is close."""
    tails = {n.rpartition(".")[2]: n for n in names}  # "n_layer" for "llm.n_layers"
    close = difflib.get_close_matches(str(name), names, n=1) or [
        tails[tail] for tail in difflib.get_close_matches(str(name).rpartition(".")[2], tails, n=1)]
    return f", did you mean {close[0]!r}?" if close else ""

# ---- files and flags ------------------------------------------------------------------------------------------------
def configure(cfg, argv=None):
    """Apply config files, then flags, to the dataclass instance `cfg` in place. Returns {dotted name: origin},
    "default", "FILE:LINE" or "command line", with the preset's name where one was used. Raises ConfigError.
    `--help` prints all keys with type, value and comment and exits with 0. Every script takes `--debug=...`."""
    argv = sys.argv[1:] if argv is None else argv
    table = {name: field for name, *field in leaves(cfg)}  # name -> owner, field name, type
    origins = {name: "default" for name in resolved(cfg)}

    def put(key, value, where, origin, text=False):
        if key not in table:
            raise ConfigError(f"{where}: unknown name {key!r}{nearest(key, table)} (--help lists all names)")
        owner, attr, tp = table[key]
        if tp is None:
            return put_preset(key, getattr(owner, attr), value, where, origin)
        value = cast(value, tp, f"{where}: {key}", text)
        if type(value) is tuple and origins[key] == origin == "command line":
            value = getattr(owner, attr) + value  # a repeated flag adds
        setattr(owner, attr, value)
        origins[key] = origin

    def put_preset(key, nested, preset, where, origin):
        presets = getattr(type(nested), "PRESETS", None)
        if presets is None:
            raise ConfigError(f"{where}: set {key} field by field, {key}.{dataclasses.fields(nested)[0].name} = ...")
        if preset not in list(presets):
            raise ConfigError(f"{where}: {key} has no preset {preset!r}{nearest(preset, presets)} "
                              f"(there are {', '.join(presets)})")
        for name, fresh, attr, _ in leaves(type(nested)(**presets[preset]), key + "."):
            if origins[name] == origin == "command line":
                raise ConfigError(f"{where}: write --{key}={preset} before --{name}=..., it sets that too")
            setattr(nested, attr, getattr(fresh, attr))
            origins[name] = f"{origin} ({key} = {preset!r})"

    for arg in argv:  # the form of every word first, so that `--seed 3` is not blamed on the 3
        if arg in ("-h", "--help"):
            print_help(table)
            raise SystemExit(0)
        if arg.startswith("-") and not re.match(r"--[\w.]+=", arg):
            raise ConfigError(f"{arg}: write a flag as --{arg.lstrip('-').partition('=')[0] or 'key'}=value")
        if not arg.startswith("-") and not arg.endswith(".py"):
            raise ConfigError(f"{arg}: not understood; flags look like --key=value, config files end in .py")
    for path in (arg for arg in argv if not arg.startswith("-")):
        run_file(path, cfg, put)
    for arg in (arg for arg in argv if arg.startswith("-")):
        key, _, value = arg[2:].partition("=")
        if key == "debug" and key not in table:
            cast(value, bool, arg, text=True)
        else:
            put(key, value, arg, "command line", text=True)
    return origins

class View:
    """A nested dataclass as a config file sees it: reads pass through, assignments are checked and applied at once."""
    def __init__(self, obj, prefix, assign): vars(self).update(_obj=obj, _prefix=prefix, _assign=assign)
    def __getattr__(self, name): return getattr(self._obj, name)
    def __setattr__(self, name, value): self._assign(self._prefix + name, value)

class Names(dict):
    """The local names of a config file: assignments of public ones are checked and applied, then all go to `scope`."""
    def __init__(self, scope, cfg, assign):
        self.scope, self.cfg, self.assign = scope, cfg, assign

    def __setitem__(self, name, value):
        if not (name.startswith("_") or isinstance(value, types.ModuleType)):
            self.assign(name, value)
            value = self.scope[name] if isinstance(self.scope[name], View) else getattr(self.cfg, name)
        self.scope[name] = value

def run_file(path, cfg, put):
    """Execute one config file; anything that goes wrong in it is a ConfigError with file and line."""
    def assign(key, value):
        frame = sys._getframe(2)  # of this file, or of one that it executes
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        put(key, value, where, where)

    if not os.path.isfile(path):
        raise ConfigError(f"{path}: there is no such config file")
    scope = {"__file__": path, "__name__": "config"}
    for name in (f.name for f in dataclasses.fields(cfg)):
        value = getattr(cfg, name)
        scope[name] = View(value, name + ".", assign) if dataclasses.is_dataclass(value) else value
    try:
        with open(path, encoding="utf-8") as f: code = compile(f.read(), path, "exec")
        exec(code, scope, Names(scope, cfg, assign))
    except ConfigError:
        raise
    except Exception as e:
        lines = [1, *(frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path)]
        if isinstance(e, SyntaxError) and e.filename == path: lines.append(e.lineno)
        raise ConfigError(f"{path}:{lines[-1]}: {type(e).__name__}: {e}") from e

def print_help(table):
    """Print every key with its type, value and the comment that stands beside the field in the source."""
    comments = {}  # dataclass -> {field: comment}, with those of its bases
    for cls in {type(owner) for owner, _, _ in table.values()}:
        source = "\n".join(inspect.getsource(base) for base in cls.__mro__[-2::-1])  # object has none
        comments[cls] = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", source, re.MULTILINE))
    print("usage: python SCRIPT.py [config/FILE.py ...] [--key=value ...]\n")
    for name, (owner, attr, tp) in table.items():
        value = getattr(owner, attr)
        if tp is not None:
            literal = typing.get_origin(tp) is typing.Literal
            kind = "|".join(typing.get_args(tp)) if literal else getattr(tp, "__name__", str(tp))
            left = f"--{name}={value!r}" if type(value) is str else f"--{name}={value}"
            print(f"{left:40s} {kind:12s} {comments[type(owner)].get(attr, '')}".rstrip())
        elif hasattr(type(value), "PRESETS"):
            print(f"{f'--{name}=PRESET':40s} {'|'.join(type(value).PRESETS)}")

# ---- the one place where errors become messages ---------------------------------------------------------------------
def launch(main):
    """Run a script's main(). A user's error (ValueError, OSError) becomes one line on stderr and exit code 2, Ctrl-C
    exit code 130; `--debug=True` shows the traceback. Other exceptions are bugs and pass through."""
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as e:
        if "--debug=True" in sys.argv: raise
        if isinstance(e, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        message = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename and e.strerror else str(e)
        print("error:", " ".join(message.split()) or type(e).__name__, file=sys.stderr)
        sys.exit(2)
