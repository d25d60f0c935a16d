"""The pickle of a checkpoint is read without running what a stranger has put there."""

import io
import json
import os
import pathlib
import pickle
import struct

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stand_in import ALL, build, save
from torch.distributed.checkpoint import filesystem, metadata

from inputs.files import file_hash
from training import checkpoint
from training.metadata import MetadataReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def op(module, name):
    """The opcode that puts MODULE.NAME on the stack, as protocols before 4 have it."""
    return f"c{module}\n{name}\n".encode()


def stack_op(module, name):
    """The same as protocol 4 has it, where a name may have dots."""
    words = b""
    for word in (module, name):
        words += b"\x8c" + struct.pack("B", len(word)) + word.encode()
    return b"\x80\x04" + words + b"\x93"


def file_of_torch_save(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def touch(marker):
    return f"touch {marker}"


def described(**storage):
    """Metadata of one tensor that lies where `storage` says."""
    size = torch.Size([1])
    chunk = metadata.ChunkStorageMetadata(torch.Size([0]), size)
    tensor = metadata.TensorStorageMetadata(metadata.TensorProperties(), size, [chunk])
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 1} | storage
    index = metadata.MetadataIndex("a", torch.Size([0]))
    return metadata.Metadata({"a": tensor}, None, {index: filesystem._StorageInfo(**place)})


HOSTILE = {
    "os.system": lambda m: pickle.dumps(Call(os.system, touch(m))),
    "eval": lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')")),
    "exec": lambda m: pickle.dumps(Call(exec, f"open({str(m)!r}, 'w')")),
    "open": lambda m: pickle.dumps(Call(open, str(m), "w")),
    "getattr": lambda m: pickle.dumps(
        Call(getattr, Call(__import__, "os"), "system")
    ),
    "a chain of dots": lambda m: stack_op("torch.distributed.checkpoint.filesystem", "os.system")
    + pickle.dumps((touch(m),))[2:-1] + b"R.",
    "dots of a class": lambda m: stack_op("pathlib", "PosixPath.touch")
    + pickle.dumps((pathlib.PosixPath(m),))[2:-1] + b"R.",
    "a module beside": lambda m: op("torch.distributed.checkpoint.filesystem", "os")
    + b".",
    "old class opcode": lambda m: b"(" + b"S'" + touch(m).encode() + b"'\n" + b"ios\nsystem\n.",
    "torch.load": lambda m: pickle.dumps(
        Call(torch.load, io.BytesIO(file_of_torch_save(Call(os.system, touch(m)))))
    ),
    "a file of torch.save": lambda m: file_of_torch_save(Call(os.system, touch(m))),
    "a storage": lambda m: pickle.dumps(
        Call(torch.storage._load_from_bytes, file_of_torch_save(Call(os.system, touch(m))))
    ),
    "inside metadata": lambda m: pickle.dumps(
        metadata.Metadata({"a": Call(os.system, touch(m))}, None, {})
    ),
    "a persistent id": lambda m: b"Pos.system\n.",
    "an attribute of a class": lambda m: op("pathlib", "PosixPath")
    + b"N}S'exists'\n" + op("torch", "Size") + b"s\x86b.",
    "a class written over": lambda m: op("torch.distributed.checkpoint.metadata", "Metadata")
    + b"N}S'x'\nNs\x86b.",
    "bytes, which DCP reads with a full unpickler": lambda m: pickle.dumps(
        metadata.Metadata({"a": metadata.BytesStorageMetadata()}, None, {})
    ),
    "a file elsewhere": lambda m: pickle.dumps(described(relative_path="../../secret")),
    "an absolute file": lambda m: pickle.dumps(described(relative_path="/etc/passwd")),
    "an encoding": lambda m: pickle.dumps(described(transform_descriptors=["zip"])),
    "a number": lambda m: pickle.dumps(5),
    "a list in place of tensors": lambda m: pickle.dumps(metadata.Metadata([1], None, {})),
    "no file": lambda m: b"",
    "half a file": lambda m: pickle.dumps(described())[:-40],
    "a string that is longer than the file": lambda m: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00",
    "deep nesting": lambda m: b"(" * 100_000 + b"t" * 100_000 + b".",
}


def rewrite(path, name, content):
    """Replace a file of a checkpoint and make the manifest agree, as a stranger could."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = [len(content), file_hash(path / name)]
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save(folder, step, *build(ALL))
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_runs_nothing_and_the_checkpoint_before_is_used(
    run_folder, tmp_path, capfd, kind
):
    marker = tmp_path / "marker"
    path = run_folder / "checkpoints/step_00000002"
    rewrite(path, ".metadata", HOSTILE[kind](marker))
    assert checkpoint.find_checkpoint(run_folder).name == "step_00000001"
    told = capfd.readouterr().out
    assert told.startswith(f"WARNING: DAMAGED CHECKPOINT {path}: ") and told.count("\n") == 1
    assert f"{path}/.metadata is not what a checkpoint has there" in told
    with pytest.raises(ValueError, match="not what a checkpoint has there"):
        checkpoint.load_checkpoint(path, *build(ALL))
    assert not marker.exists()
    assert pathlib.PosixPath.exists is pathlib.Path.exists
    assert not hasattr(metadata.Metadata, "x")


def test_hostile_tensors_run_nothing_either(tmp_path):
    save(tmp_path, 1, *build(ALL))
    path = tmp_path / "checkpoints/step_00000001"
    marker = tmp_path / "marker"
    content = file_of_torch_save(Call(os.system, touch(marker)))
    rewrite(path, "__0_0.distcp", content + bytes(50_000))
    with pytest.raises(ValueError, match="step_00000001 cannot be read"):
        checkpoint.load_checkpoint(path, *build(ALL))
    assert not marker.exists()


def test_a_real_description_is_read_as_torch_itself_reads_it(tmp_path):
    save(tmp_path, 1, *build(ALL))
    path = tmp_path / "checkpoints/step_00000001"
    ours = MetadataReader(path).read_metadata()
    theirs = dcp.FileSystemReader(path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data
