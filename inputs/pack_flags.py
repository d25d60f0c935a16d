"""Settings of packs that come from elsewhere: a model's config.json, the config of a training."""
import builtins
import types

# Name in a config of train.py or sft.py -> the setting of data.py.
PACK_SETTINGS = {
    "tokenizer": "tokenizer", "init_from": "tokenizer", "template": "template",
    "min_tiles": "min_tiles", "max_tiles": "max_tiles", "thumbnail": "thumbnail",
    "tokens_per_pack": "tokens_per_pack", "max_tiles_per_pack": "tiles_per_pack", "seed": "seed",
    "shuffle": "shuffle", "grad_accum_steps": "packs_per_step"}
# Of data.py and of packing.PackSettings alike.
SHARED_SETTINGS = (
    "min_tiles", "thumbnail", "tokens_per_pack", "tiles_per_pack", "seed", "shuffle",
    "packs_per_step")
# Of a training, where they are others than those of data.py.
TRAINING_SEED = 1234


class Assigned(dict):
    """What a config file assigns. A name such as `alignment`, whose fields it sets, is made up."""

    def __missing__(self, name):
        if hasattr(builtins, name):
            raise KeyError(name)
        self[name] = types.SimpleNamespace()
        return self[name]


def training_flags(paths):
    """The flags of data.py that give the packs of training configs; later files win."""
    if not paths:
        return []
    flags = {"seed": TRAINING_SEED}
    for path in paths:
        assigned = Assigned()
        try:
            with open(path, encoding="utf-8") as file:
                exec(compile(file.read(), path, "exec"), {}, assigned)
        except Exception as e:
            raise ValueError(f"{path}: {type(e).__name__}: {e}; it is no config of train.py or "
                             "sft.py") from None
        for name, value in assigned.items():
            if name in PACK_SETTINGS and value != "":
                flags[PACK_SETTINGS[name]] = value
    return [f"--{name}={value}" for name, value in flags.items()]


def read_number(section, name, default, most):
    """A number of a section of a model's config.json; ValueError if it is none or out of range."""
    value = section.get(name) if isinstance(section, dict) else "no section"
    value = default if value is None else value
    if type(value) not in {int, type(default)} or not 0 < value <= most:
        raise ValueError(f"config.json of --tokenizer: {name} = {repr(value)[:40]} must be above 0 "
                         f"and at most {most:,}; copy it again")
    return value
