"""Typed configuration in three layers: dataclass defaults < config/*.py files, in order < --key=value flags, in order.

    cfg = Config()
    origins = configure(cfg)              # python train.py config/toy.py --seed=7 --llm=toy --llm.n_layers=4

A config file is plain Python; every name it assigns must be a field of the dataclass (names that start with "_" are
scratch, modules may be imported). A nested dataclass is set field by field with dots, `alignment.steps = 10`, and,
where it has PRESETS, as a whole by the name of one of them, `llm = "qwen2.5-1.5b"`. Whatever does not fit is a
ConfigError, a ValueError whose one line says what to write instead.
"""

import ast, dataclasses, difflib, inspect, re, sys, types, typing

class ConfigError(ValueError):
    """A command line or config file that does not fit the dataclass; the message is one line for the user."""

# ---- the dataclass as a flat table ----------------------------------------------------------------------------------

def leaves(cfg, prefix=""):
    """Yield (dotted name, owner, field name, type) for every field; a nested dataclass has type None, then its
    fields."""
    assert not hasattr(cfg, "__dict__"), f"{type(cfg).__name__}: use @dataclass(slots=True), or typing errors go unseen"
    hints = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        value, name = getattr(cfg, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            yield name, cfg, f.name, None
            yield from leaves(value, name + ".")
        else:
            yield name, cfg, f.name, hints[f.name]

def resolved(cfg):
    """Flat dict {dotted name: value} of the whole configuration, as it goes into config.json."""
    return {name: getattr(owner, attr) for name, owner, attr, tp in leaves(cfg) if tp is not None}

def type_name(tp):
    if typing.get_origin(tp) is typing.Literal:
        return "|".join(map(str, typing.get_args(tp)))
    return {bool: "True|False", tuple[str, ...]: "str,str,..."}.get(tp) or getattr(tp, "__name__", str(tp))

def cast(value, tp, where, text=False):
    """Return `value` as type `tp`, or refuse. `text` marks a raw command-line string, which is parsed first."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    if origin in (typing.Union, types.UnionType):  # X | None
        if value is None or (text and value == "None"):
            return None
        return cast(value, next(a for a in args if a is not types.NoneType), where, text)
    if origin is typing.Literal:
        for a in args:
            if (str(a) == value) if text else (type(a) is type(value) and a == value):
                return a
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, got {value!r}{nearest(value, args)}")
    if origin is tuple:  # tuple[str, ...]
        if type(value) is str:
            value = [part.strip() for part in value.split(",") if part.strip()]
        if type(value) not in (list, tuple) or any(type(part) is not str for part in value):
            raise ConfigError(f"{where} must be a tuple of strings, got {value!r}")
        return tuple(value)
    if text and tp is bool:
        value = {"True": True, "False": False}.get(value, value)
    elif text and tp is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # the refusal below reports it
    if tp is float and type(value) is int:
        value = float(value)
    if tp is int and type(value) is float and value.is_integer():  # so that 1e6 steps may be written
        value = int(value)
    if type(value) is not tp or value != value:  # the second half: not a number
        expected = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}.get(tp, str(tp))
        raise ConfigError(f"{where} must be {expected}, got {value!r}")
    return value

def nearest(name, names):
    """', did you mean ...?' for the closest of `names`, judged whole and by the last part; '' when none is close."""
    known = {str(n): str(n) for n in names}
    close = difflib.get_close_matches(str(name), known, n=1)
    if not close:  # "n_layer" for "llm.n_layers"
        tails = {n.rpartition(".")[2]: n for n in known}
        close = [tails[t] for t in difflib.get_close_matches(str(name).rpartition(".")[2], tails, n=1)]
    return f", did you mean {close[0]!r}?" if close else ""

# ---- files and flags ------------------------------------------------------------------------------------------------

class View:
    """What a config file sees under the name of a nested dataclass: reads pass through, assignments are checked."""

    def __init__(self, obj, prefix, put):
        self.__dict__.update(_obj=obj, _prefix=prefix, _put=put)

    def __getattr__(self, name):
        value = getattr(self._obj, name)
        return View(value, f"{self._prefix}{name}.", self._put) if dataclasses.is_dataclass(value) else value

    def __setattr__(self, name, value):
        self._put(self._prefix + name, value, sys._getframe(1).f_lineno)

class Names(dict):
    """The local namespace of one config file: each assignment of a public name is checked and applied at once."""

    def __init__(self, scope, put):
        self.scope, self.put = scope, put

    def __setitem__(self, name, value):
        if name.startswith("_") or isinstance(value, types.ModuleType):
            self.scope[name] = value
        else:
            self.scope[name] = self.put(name, value, sys._getframe(1).f_lineno)

def configure(cfg, argv=None):
    """Apply config files, then flags, to the dataclass instance `cfg` in place.

    Returns {dotted name: origin}, origin being 'default', 'FILE:LINE' or 'command line', with the preset's name where
    one was used. Raises ConfigError. `--help` prints every key with type, value and comment and exits with 0.
    `--debug=...` is understood for every script (see `launch`), whether or not `cfg` has such a field.
    """
    table = {name: (owner, attr, tp) for name, owner, attr, tp in leaves(cfg)}
    origins = {name: "default" for name, (_, _, tp) in table.items() if tp is not None}
    argv = sys.argv[1:] if argv is None else argv

    def put(key, value, where, origin, text=False):
        if key not in table:
            raise ConfigError(f"{where}: unknown name {key!r}{nearest(key, table)} (--help lists all names)")
        owner, attr, tp = table[key]
        if tp is None:
            return put_preset(key, getattr(owner, attr), value, where, origin)
        value = cast(value, tp, f"{where}: {key}", text)
        if typing.get_origin(tp) is tuple and origins[key] == origin == "command line":
            value = getattr(owner, attr) + value  # a repeated flag adds
        setattr(owner, attr, value)
        origins[key] = origin
        return value

    def put_preset(key, nested, preset, where, origin):
        presets = getattr(type(nested), "PRESETS", None)
        if presets is None:
            raise ConfigError(f"{where}: set {key} field by field, {key}.{dataclasses.fields(nested)[0].name} = ...")
        if type(preset) is not str or preset not in presets:
            raise ConfigError(f"{where}: {key} has no preset {preset!r}{nearest(preset, presets)} "
                              f"(there are {', '.join(presets)})")
        fresh = type(nested)(**presets[preset])
        for name, owner, attr, tp in leaves(fresh, key + "."):
            if origins.get(name) == origin == "command line":
                raise ConfigError(f"{where}: write --{key}={preset} before --{name}=..., it sets that too")
            if tp is not None:
                setattr(table[name][0], attr, getattr(owner, attr))
                origins[name] = f"{origin} ({key} = {preset!r})"
        return View(nested, key + ".", None)

    for arg in argv:  # the form of every word first, so that `--seed 3` is not blamed on the 3
        if arg in ("-h", "--help"):
            print_help(table)
            raise SystemExit(0)
        if arg.startswith("-") and not re.match(r"--[\w.]+=", arg):
            raise ConfigError(f"{arg}: write a flag as --{arg.lstrip('-').partition('=')[0] or 'key'}=value")
        if not arg.startswith("-") and not arg.endswith(".py"):
            raise ConfigError(f"{arg}: not understood; flags look like --key=value, config files end in .py")

    for path in (arg for arg in argv if not arg.startswith("-")):
        def put_line(key, value, line, path=path):
            value = put(key, value, f"{path}:{line}", f"{path}:{line}")
            return View(value._obj, value._prefix, put_line) if isinstance(value, View) else value

        scope = {"__file__": path, "__name__": "config"}
        for name, (owner, attr, tp) in table.items():
            if "." not in name:
                value = getattr(owner, attr)
                scope[name] = View(value, name + ".", put_line) if tp is None else value
        run_file(path, scope, Names(scope, put_line))

    for arg in (arg for arg in argv if arg.startswith("-")):
        key, _, value = arg[2:].partition("=")
        if key == "debug":
            cast(value, bool, arg, text=True)
        if key != "debug" or "debug" in table:
            put(key, value, arg, "command line", text=True)
    return origins

def run_file(path, scope, names):
    """Execute one config file; anything that goes wrong in it is a ConfigError with file and line."""
    try:
        with open(path, encoding="utf-8") as f:
            code = compile(f.read(), path, "exec")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such config file") from None
    except (SyntaxError, ValueError) as e:  # ValueError: NUL bytes, not UTF-8
        raise ConfigError(f"{path}:{getattr(e, 'lineno', None) or 1}: {getattr(e, 'msg', None) or e}") from None
    try:
        exec(code, scope, names)
    except ConfigError:
        raise
    except Exception as e:
        line, tb = 1, e.__traceback__
        while tb is not None:  # the last frame that lies in the file itself
            line, tb = (tb.tb_lineno if tb.tb_frame.f_code.co_filename == path else line), tb.tb_next
        raise ConfigError(f"{path}:{line}: {type(e).__name__}: {e}") from e

def print_help(table):
    """Print every key with its type, value and the comment that stands beside the field in the source."""
    comments = {}
    for cls in {c for owner, _, _ in table.values() for c in type(owner).__mro__ if dataclasses.is_dataclass(c)}:
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):
            continue  # typed at a prompt: no source
        for name, comment in re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", source, re.MULTILINE):
            comments[cls, name] = comment
    print("usage: python SCRIPT.py [config/FILE.py ...] [--key=value ...]\n")
    for name, (owner, attr, tp) in table.items():
        value = getattr(owner, attr)
        comment = next((comments[c, attr] for c in type(owner).__mro__ if (c, attr) in comments), "")
        if tp is not None:
            left = f"--{name}={value!r}" if type(value) is str else f"--{name}={value}"
            print(f"{left:40s} {type_name(tp):12s} {comment}".rstrip())
        elif hasattr(type(value), "PRESETS"):
            print(f"{f'--{name}=PRESET':40s} {'|'.join(type(value).PRESETS)}")

# ---- the one place where errors become messages ---------------------------------------------------------------------

def launch(main):
    """Run a script's main(). A user's error (ValueError, OSError) becomes one line on stderr and exit code 2, Ctrl-C
    exit code 130; `--debug=True` on the command line shows the traceback. Other exceptions are bugs and pass
    through."""
    try:
        main()
    except KeyboardInterrupt:
        if "--debug=True" in sys.argv:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as e:
        if "--debug=True" in sys.argv:
            raise
        message = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename and e.strerror else str(e)
        print("error:", " ".join(message.split()) or type(e).__name__, file=sys.stderr)
        sys.exit(2)
