"""What a model folder may hold, its checksums, what writing one may replace."""

import contextlib
import errno
import io
import json
import os

import pytest
import torch
from folders import save
from safetensors.torch import load_file, save_file
from small_model import tiny

import convert
import eval as evaluation
import model_files
import sample
import weights
from inputs import files
from training import run_folder
from training.distributed import ALONE


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_folder_is_as_it_was_written_or_the_file_that_is_not_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 200_000)
    folder = save(tmp_path / "m", tiny(), tokenizer="toy/tokenizer")
    names = sorted(path.name for path in folder.iterdir() if path.name != model_files.CHECKSUMS)
    assert len(names) > 6
    run_folder.check_model_folder(folder, ALONE)
    for name in [*names, model_files.CHECKSUMS]:
        flip(folder / name)
        with pytest.raises(ValueError, match=f"{name} (has changed since|cannot be read)"):
            run_folder.check_model_folder(folder, ALONE)
        flip(folder / name)
    # a share of each of several ranks
    flip(folder / names[-1])
    found = [model_files.find_change(folder, rank, 3) for rank in range(3)]
    assert len([text for text in found if text]) == 1
    (folder / names[-1]).unlink()
    with pytest.raises(ValueError, match="is missing; copy the folder again"):
        run_folder.check_model_folder(folder, ALONE)
    (folder / model_files.CHECKSUMS).unlink()  # a folder of another program has none
    run_folder.check_model_folder(folder, ALONE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 5, "all": 5}', "\x00"])
def test_checksums_that_are_torn_are_one_line(tmp_path, text):
    folder = save(tmp_path / "m", tiny())
    (folder / model_files.CHECKSUMS).write_text(text)
    with pytest.raises(ValueError, match="m/checksums.json .*copy the folder again"):
        run_folder.check_model_folder(folder, ALONE)


@pytest.mark.parametrize("name", ["notes.txt", "adapter_model.safetensors", "model.safetensors.bak",
                                  ".git", "model-1-of-2.safetensors"])
def test_a_folder_with_files_that_are_not_ours_is_not_replaced(tmp_path, name):
    folder = save(tmp_path / "m", tiny())
    before = (folder / "model.safetensors").read_bytes()
    (folder / name).mkdir() if name == ".git" else (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=f"m also holds {name}, which would be deleted"):
        save(folder, tiny(seed=1))
    assert (folder / name).exists() and (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_model_of_another_program_is_not_replaced(tmp_path):
    """Its files may all have names that ours have too."""
    folder = save(tmp_path / "m", tiny())
    (folder / model_files.CHECKSUMS).unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match="m holds a model without checksums.json"):
        save(folder, tiny(seed=1))
    assert sorted(folder.iterdir()) == before


def test_a_link_stays_a_link_and_what_it_leads_to_is_written(tmp_path):
    real = tmp_path / "disk2/m"
    save(real, tiny())
    (tmp_path / "link").symlink_to(real)
    save(tmp_path / "link", tiny(seed=1))
    assert (tmp_path / "link").is_symlink()
    weight = weights.load_folder(real)[0].mlp1[1].weight
    assert torch.equal(weight, tiny(seed=1).mlp1[1].weight)
    (tmp_path / "new").symlink_to(tmp_path / "disk3/m")
    save(tmp_path / "new", tiny())
    assert (tmp_path / "new").is_symlink() and (tmp_path / "disk3/m/config.json").exists()


def test_names_that_only_look_like_leftovers_stay(tmp_path):
    names = [".m.tmp-notes", ".m.old-1.keep", ".m.tmp-", ".m2.tmp-1"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".m.tmp-5").write_text("a file")
    (tmp_path / ".m.old-7").mkdir()
    save(tmp_path / "m", tiny())
    assert {path.name for path in tmp_path.iterdir()} == {"m", ".m.tmp-5", *names}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
    model = tiny()
    model.mlp1[1].bias.data[0] = value
    with pytest.raises(ValueError, match="m is not written: mlp1.1.bias is not finite"):
        save(tmp_path / "m", model)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_too_large_for_the_stored_dtype_are_not_written(tmp_path):
    tensors = {"a": torch.tensor([3.4e38])}
    with pytest.raises(ValueError, match="out is not written: a is not finite in torch.bfloat16"):
        weights.write_folder(tensors, {"torch_dtype": "bfloat16"}, tmp_path / "out")


# ---- no room -------------------------------------------------------------------------------------


def full(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_copy(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "source/vocab.json")


@pytest.mark.parametrize("owner, name, fail", [
    (os, "fsync", full),
    (model_files, "file_hash", full),
    (model_files, "write_content", full),
    (weights.Path, "write_bytes", full_copy),
    (weights.Path, "mkdir", full),
])
def test_a_full_disk_names_the_folder_that_was_to_be_written(
    tmp_path, monkeypatch, owner, name, fail
):
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError) as error:
        save(tmp_path / "m", tiny(), tokenizer="toy/tokenizer")
    assert error.value.filename == str(tmp_path / "m")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_other_errors_keep_their_own(tmp_path):
    with pytest.raises(OSError) as error, files.atomic_write(tmp_path / "a.json") as file:
        file.write("x")
        full()
    assert error.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError) as error, files.atomic_write(tmp_path / "a.json"):
        open("gone.json")
    assert error.value.filename == "gone.json"


def test_checksums_are_json_that_says_its_format(tmp_path):
    folder = save(tmp_path / "m", tiny())
    content = json.loads((folder / "checksums.json").read_text())
    assert content["format"] == 1 and "model.safetensors" in content["files"]


def checked(folder):
    """What convert.py check prints, and the error it ends with or "" """
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            convert.check_folder(str(folder))
        except (ValueError, OSError) as e:
            return shown.getvalue(), str(e)
    return shown.getvalue(), ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_names_the_weights_that_are_not_finite(tmp_path, value, dtype, monkeypatch):
    monkeypatch.setattr(model_files, "READ_NUMBERS", 1000)  # so that a tensor takes several reads
    folder = save(tmp_path / "m", tiny())
    path = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    names = ("mlp1.1.bias", "language_model.model.embed_tokens.weight")
    for name in names:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / model_files.CHECKSUMS).unlink()  # a folder of another program has none
    shown, error = checked(folder)
    assert "ok:" not in shown
    assert all(name in error for name in names) and "not finite" in error and str(folder) in error


def test_check_names_a_file_that_is_not_as_it_was_written(tmp_path):
    folder = save(tmp_path / "m", tiny(vocab_size=1056), tokenizer="toy/tokenizer")
    assert checked(folder)[1] == ""
    for name in ("model.safetensors", "vocab.json"):
        before = (folder / name).read_bytes()
        if name == "vocab.json":
            (folder / name).write_bytes(before.replace(b'": 5,', b'": 5 ,'))
        else:
            (folder / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        error = checked(folder)[1]
        assert f"{folder / name} has changed since it was written; copy the folder again" in error
        (folder / name).write_bytes(before)


def test_sample_sees_weights_of_another_size_and_eval_any_changed_file(tmp_path, capsys):
    """A size takes no time to look at; eval.py hashes the files in any case, for its answers."""
    folder = save(tmp_path / "m", tiny(vocab_size=1056), tokenizer="toy/tokenizer")
    evaluation.hash_folder(folder)
    assert capsys.readouterr().err == ""
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    evaluation.hash_folder(folder)
    assert f"{path} has changed since it was written" in capsys.readouterr().err
    cfg = sample.Config(model=str(folder), device="cpu")
    with pytest.raises(ValueError, match="model.safetensors has [0-9,]+ bytes, .* when it was wri"):
        sample.load(cfg)
    (folder / model_files.CHECKSUMS).unlink()
    sample.load(cfg)


def test_checksums_of_an_earlier_version_which_have_no_sizes_are_read(tmp_path):
    folder = save(tmp_path / "m", tiny())
    content = json.loads((folder / model_files.CHECKSUMS).read_text())
    del content["sizes"]
    (folder / model_files.CHECKSUMS).write_text(json.dumps(content))
    model_files.check_sizes_of_weights(folder)
    assert model_files.find_change(folder) is None
