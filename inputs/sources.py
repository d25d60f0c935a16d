"""--data=... -> sources."""
import glob
import os
import re
import sys
from pathlib import Path

from inputs.chat import TEMPLATES
from inputs.files import read_json
from inputs.index import Source

# InternVL's keys of a meta entry (facts of its documentation) and two of ours: weight, share of the samples; sha256
META = dict(annotation=(str,), root=(str,), repeat_time=(int, float), length=(int,), data_augment=(bool,),
            max_dynamic_patch=(int,), weight=(int, float), sha256=(str,))

def expand_pattern(path):
    """The paths of a pattern with `*` or `{000..012}`; what is there as it is written goes first (`[1].jsonl`)."""
    if os.path.exists(path): return [path]
    if braces := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path):
        before, first, last, after = braces.groups()
        return [f"{before}{i:0{len(first)}d}{after}" for i in range(int(first), int(last) + 1)]
    return sorted(glob.glob(path)) or [path]

def expand_paths(spec):
    """Yield (name or "", path) of comma-separated `path` or `name=path`, patterns filled in; `year=2026/*.jsonl` is a
    path where there are such files."""
    for entry in filter(None, map(str.strip, spec.split(","))):
        name, paths = "", expand_pattern(entry)
        if "=" in entry and not any(map(os.path.exists, paths)):
            name, path = entry.split("=", 1)
            paths = expand_pattern(path)
        yield from ((name, Path(path)) for path in paths)

def open_sources(spec, tokenizer, template, image_as="pixels"):
    """Sources of `--data`: comma-separated `path` or `name=path`; a path may be .jsonl, .json (LLaVA array or InternVL
    meta), .tar, a folder of captioned images, or a pattern with `*` or `{000..012}`."""
    if template not in TEMPLATES:
        raise ValueError(f"--template={template}: unknown, choose from {', '.join(TEMPLATES)}")
    sources, reading = [], (tokenizer, template, image_as)
    for name, path in expand_paths(spec):
        if path.suffix.lower() != ".json" or not path.is_file() or open(
                path, encoding="utf-8-sig").read(99).lstrip()[:1] != "{":
            sources.append(Source(name or path.stem, path, *reading))
            continue
        for key, item in read_json(path).items():                      # InternVL meta: paths as written, else beside it
            here = lambda p: p if os.path.exists(p) else path.parent / p
            entry = item if isinstance(item, dict) else {key: item}
            good = lambda k, v: type(v) in META.get(k, ()) and (type(v) is str or v >= 0)
            wrong = [k for k, v in entry.items() if not good(k, v)] or {"annotation"} - entry.keys()
            if wrong:
                raise ValueError(f"{path}: {key}: {[*wrong][0]} is missing, unknown, negative or of a wrong type; "
                                 f"there are {', '.join(META)}, annotation being the path of its rows")
            if item.get("data_augment"):
                print(f"{path}: {key}: data_augment is not done here, pictures stay as they are", file=sys.stderr)
            more = dict(repeat=float(item.get("repeat_time", 1)), max_tiles=item.get("max_dynamic_patch", 0),
                        weight=item.get("weight", 0), sha256_of_file=item.get("sha256", ""))
            sources.append(Source(key, here(item["annotation"]), *reading, here(item.get("root") or ""), **more))
            if item.get("length", n := len(sources[-1].rows)) != n:
                print(f"{path}: {key}: length says {item['length']} rows, there are {n}", file=sys.stderr)
    if not sources:
        raise ValueError("no data: give --data=PATH (.jsonl, .json, .tar, a folder, or a pattern)")
    return sources
