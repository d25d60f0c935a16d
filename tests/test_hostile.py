"""Files from strangers: nothing in them runs, nothing is written elsewhere, each is refused."""

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GB = 10**9


class Payload:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


def model_folder(path, tensors=None):
    """A good tiny model folder, or one whose model.safetensors is these bytes."""
    from small_model import tiny
    from test_convert import save

    save(path, tiny())
    if tensors is not None:
        (path / "model.safetensors").write_bytes(tensors)
    return path


def safetensors(header, data=b"", size=None):
    text = json.dumps(header).encode()
    return (size or len(text)).to_bytes(8, "little") + text + data


def hostile_models(folder):
    """Yield (name, model folder): each has to be refused by convert.py check."""
    nested = "[" * 100_000 + "]" * 100_000
    yield (
        "a pickle called model.safetensors",
        model_folder(folder / "m1", pickle.dumps(Payload(folder / "RAN"))),
    )
    one = model_folder(folder / "m2")
    (one / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (one / name).write_bytes(pickle.dumps(Payload(folder / "RAN")))
    yield "pickles in the place of safetensors", one
    long = model_folder(folder / "m3", safetensors({}, size=200_000_000))
    os.truncate(long / "model.safetensors", 200_000_100)
    yield "a header of 200 MB", long

    def entry(a, b):
        return {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}

    yield (
        "overlapping tensors",
        model_folder(
            folder / "m4", safetensors({"a": entry(0, 64), "b": entry(32, 96)}, bytes(96))
        ),
    )
    yield (
        "a tensor beyond the end",
        model_folder(folder / "m5", safetensors({"a": entry(0, 10 * GB)}, bytes(96))),
    )
    yield (
        "a negative or absurd shape",
        model_folder(
            folder / "m6",
            safetensors(
                {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 96]}}, bytes(96)
            ),
        ),
    )
    for k, name in enumerate(("config.json", "model.safetensors.index.json")):
        deep = model_folder(folder / f"m{7 + k}")
        (deep / name).write_text(nested)
        yield f"a nested {name}", deep
    for k, file in enumerate(("../m2/model.safetensors", "/etc/passwd")):
        away = model_folder(folder / f"m{9 + k}")
        (away / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        yield f"an index that points to {file}", away
    for k, (section, key, value) in enumerate(
        (
            ("llm_config", "num_hidden_layers", 10**6),
            ("vision_config", "image_size", 10**9),
            ("", "downsample_ratio", 1e-9),
        )
    ):
        big = model_folder(folder / f"m{11 + k}")
        config = json.loads((big / "config.json").read_text())
        (config[section] if section else config)[key] = value
        (big / "config.json").write_text(json.dumps(config))
        yield f"{key} {value}", big


def hostile_tar(path, picture):
    """One good record among members that point elsewhere."""
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", **kw):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in kw.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        for name in ("../out", "/tmp/out", "a/../../out"):
            add(f"{name}.txt", b"text")
            add(f"{name}.png", picture)
        add("link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("hard.txt", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        add("device.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add("fifo.txt", type=tarfile.FIFOTYPE)
        add("deep.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
        add("deep.png", picture)
        add("good.txt", b"a red square")
        add("good.png", picture)
    return path


def attacks(folder):
    """Yield (name, function, words).

    The function must raise ValueError or OSError with these words, or return.
    """
    from rows import packs_of, picture, sources_of

    from inputs.images import load_image
    from inputs.tokenizer import Tokenizer
    from weights import load_folder

    for name, path in hostile_models(folder):
        yield name, lambda path=path: load_folder(path), ""
    deep = folder / "words"
    deep.mkdir()
    (deep / "vocab.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    yield "a nested vocabulary", lambda: Tokenizer(deep), "vocab.json is not valid JSON"
    yield (
        "a pickle as a picture",
        lambda: load_image(pickle.dumps(Payload(folder / "RAN"))),
        "not a picture",
    )
    (folder / "rows").mkdir()
    for name in ("rows.pt", "rows.bin"):
        (folder / "rows" / name).write_bytes(pickle.dumps(Payload(folder / "RAN")))
        yield (
            f"{name} as data",
            lambda name=name: packs_of(f"{folder}/rows/{name}"),
            "no usable sample",
        )
    turns = [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "Fine."}]
    fine = {"conversations": turns}
    (folder / "rows" / "deep.jsonl").write_text(
        "[" * 100_000 + "]" * 100_000 + "\n" + json.dumps(fine) + "\n"
    )
    (folder / "rows" / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    yield (
        "a nested array",
        lambda: sources_of(f"{folder}/rows/deep.json"),
        "not valid JSON",
    )

    def nested_row():
        (source,) = sources_of(f"{folder}/rows/deep.jsonl")
        assert len(source.rows) == 2 and [bad["row"] for bad in source.meta["bad"]] == [0]
        raise ValueError("quarantined " + source.meta["bad"][0]["reason"])

    yield "a nested row", nested_row, "quarantined RecursionError"

    def tar():
        (source,) = sources_of(str(hostile_tar(folder / "rows" / "members.tar", picture())))
        good = [
            source.row(i).get("caption")
            for i in range(len(source.rows))
            if source.rows[i]["tokens"] >= 0
        ]
        assert good == ["text"] * 3 + ["a red square"], (
            good
        )  # names are names: bytes are read in place
        raise ValueError("quarantined " + "; ".join(bad["reason"] for bad in source.meta["bad"]))

    yield "a tar with names, links and devices that point elsewhere", tar, "quarantined"
    huge = tarfile.TarInfo("huge.txt")
    huge.size = 10 * GB
    (folder / "rows" / "huge.tar").write_bytes(huge.tobuf() + bytes(2048))
    yield (
        "a member of 10 GB",
        lambda: sources_of(f"{folder}/rows/huge.tar"),
        "no whole tar",
    )


def report(folder):
    """Every attack in this process -> JSON rows [name, seconds, extra MB, message or None]."""
    import torch

    torch.set_num_threads(1)
    from PIL import Image

    Image.init()
    rows, peak = [], lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, attack, words in attacks(Path(folder)):
        start, before, message = time.process_time(), peak(), None
        try:
            attack()
        except (ValueError, OSError) as e:
            message = str(e)
        rows.append([name, time.process_time() - start, peak() - before, message, words])
    print(json.dumps(rows))


def test_hostile_files_are_refused_quickly_and_nothing_in_them_runs(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    away = [
        Path(folder) / f"out.{kind}"
        for folder in ("/tmp", "/", ROOT, ROOT.parent)
        for kind in ("txt", "png")
    ]
    before = [path for path in away if path.exists()]
    done = subprocess.run(
        [sys.executable, __file__, inside],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 21
    for name, seconds, extra, message, words in rows:
        assert message and words in message, (name, message)
        assert seconds < 2 and extra < 200, (name, seconds, extra)
    assert not (inside / "RAN").exists()  # 0 payloads executed
    assert [p.name for p in tmp_path.iterdir()] == ["inside"] and not [*inside.glob("out*")]
    assert before == [path for path in away if path.exists()]


@pytest.mark.parametrize("k", range(13))
def test_a_hostile_model_folder_gets_one_line_from_convert_check(tmp_path, k):
    from test_convert import run

    name, folder = list(hostile_models(tmp_path))[k]
    done = run("check", folder)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ), name
    assert str(folder) in done.stderr and not done.stdout


if __name__ == "__main__":
    report(sys.argv[1])
