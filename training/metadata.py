"""Read the .metadata of a checkpoint, a pickle, without running what a stranger may have put there.

torch.distributed.checkpoint (DCP) describes the tensors of a checkpoint in a pickle, and loading
a pickle calls whatever it names. Here it may name DCP's own descriptions and nothing else.
"""
import functools
import pickle
import re
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from inputs.files import read_json
from training.lora import add_product

# DCP says so when it runs on one process, which is what we ask it to do.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

METADATA = ".metadata"
LORA_SCALE = "lora_scale"  # in config.json of a checkpoint with adapters: alpha / rank

# module -> the names a pickle may ask for. They are classes that only hold values, and dtypes.
DESCRIPTIONS = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # Python 3.13
}


class MetadataUnpickler(pickle._Unpickler):
    """Refuses every name that is not among DESCRIPTIONS.

    The unpickler in Python, as the one in C would let a pickle write attributes of a class, which
    the whole program then has.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        # A name with dots would reach from a class to whatever its methods can see.
        if name not in DESCRIPTIONS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def load_build(self):
        described = type(self.stack[-2])
        if not described.__module__.startswith("torch.distributed.checkpoint."):
            raise pickle.UnpicklingError(f"it fills a {described.__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class MetadataReader(dcp.FileSystemReader):
    """DCP's reader of a checkpoint folder, with the pickle read by MetadataUnpickler, once."""
    known = None  # the Metadata, when it has been read

    def read_metadata(self, *args, **kwargs):
        """The Metadata; ValueError, with the path, if the file holds anything else."""
        path = self.path / METADATA
        metadata = self.known
        try:
            if not metadata:
                with open(path, "rb") as file:
                    metadata = MetadataUnpickler(file).load()
                check_metadata(metadata)
        except OSError:
            raise
        except Exception as e:  # a damaged pickle raises all sorts of errors
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise ValueError(f"{path} is not what a checkpoint has there: {reason}") from None
        metadata.storage_meta.load_id = self.load_id
        self.known = metadata
        return metadata


def check_metadata(metadata):
    """ValueError unless all that is described are tensors in files of the same folder."""
    if type(metadata) is not Metadata:
        raise ValueError(f"it holds a {type(metadata).__name__}")
    for name, tensor in metadata.state_dict_metadata.items():
        # DCP would read anything else with a full unpickler.
        whole = type(tensor) is TensorStorageMetadata and type(tensor.size) is torch.Size
        if type(name) is not str or not whole:
            raise ValueError(f"{name!r} is not described as a tensor")
    for place in metadata.storage_data.values():
        file = place.relative_path
        if type(file) is not str or not re.fullmatch(r"__\d+_\d+\.distcp", file):
            raise ValueError(f"it names the file {file!r}")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{file} is encoded in a way that is not used here")


# ---- the weights alone, on one process -----------------------------------------------------------


def is_checkpoint(folder):
    return (Path(folder) / METADATA).is_file()


@functools.lru_cache(1)
def weights_reader(folder):
    """One reader for all weights of a checkpoint: its description is read once."""
    return MetadataReader(folder)


def described_weights(folder):
    """{name in the checkpoint: TensorStorageMetadata} of the weights; moments are left out."""
    described = weights_reader(str(folder)).read_metadata().state_dict_metadata
    return {name: about for name, about in described.items() if name.startswith("model.")}


def read_weight(folder, name):
    """A whole weight of a checkpoint, whatever number of ranks has written it."""
    about = described_weights(folder)[name]
    tensor = torch.empty(about.size, dtype=about.properties.dtype)
    try:
        dcp.load({name: tensor}, storage_reader=weights_reader(str(folder)), no_dist=True)
    except dcp.CheckpointException as e:
        first_failure, _ = next(iter(e.failures.values()))
        raise ValueError(f"{folder} cannot be read: {first_failure}") from None
    return tensor


def merged_weight(folder, name):
    """A weight of a checkpoint as the end of its stage would write it: its adapter is merged."""
    weight = read_weight(folder, name)
    linear = name.removesuffix(".weight")
    if f"{linear}.lora_A" not in described_weights(folder):
        return weight
    A = read_weight(folder, f"{linear}.lora_A")
    B = read_weight(folder, f"{linear}.lora_B")
    return add_product(weight, A, B, read_json(Path(folder) / "config.json", dict)[LORA_SCALE])
