"""The 2B at full size: a synthetic folder of the released names, shapes and files, end to end.

    python -m pytest -s tests/test_full_size.py

Needs 14 GB of disk, 10 GB of memory and the Qwen tokenizer. Each command runs in a process of its
own; its seconds and its peak memory are printed. Loading may take 1.15 times the weights. All is
bf16 but the last test.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # when it is run as a script, see step()
SHARED = ROOT.parent / "shared"  # ../shared is an optional folder of test data
QWEN = SHARED / "tokenizer" / "qwen2"
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not QWEN.exists(), reason="needs the Qwen tokenizer in ../shared"),
]
PARAMETERS = 2_089_762_304


def step(*argv, limit=None):
    """Run a command in a process of its own, print seconds and peak memory -> stdout.

    limit: GB it may take.
    """
    start = time.time()
    out = Path(os.environ["TMPDIR"]) / "stdout"
    with open(out, "w") as file:
        process = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * 1024 / 1e9
    text = out.read_text()
    words = " ".join(Path(str(a)).name for a in argv[:4])
    print(f"\n{words}: {time.time() - start:.0f} s, {peak:.2f} GB\n{text}", end="")
    assert process.returncode == 0 and peak <= (limit or peak)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("full_size")
    os.environ["TMPDIR"] = str(out)
    step(__file__, "write", out / "vit", out / "llm")
    step("convert.py", "assemble", f"--vision={out}/vit", f"--llm={out}/llm", f"--out={out}/2b")
    for name in ("vit", "llm"):
        (out / name / "model.safetensors").unlink()
    return out / "2b"


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_2b_is_written_checked_loaded_asked_exported_and_comes_back_bit_for_bit(folder):
    size = (folder / "model.safetensors").stat().st_size
    assert 0 <= size - 2 * PARAMETERS < 100_000  # 4.18 GB and a header
    assert (folder / "added_tokens.json").stat().st_size == 790  # as released
    text = step("convert.py", "check", folder, limit=1)
    assert (
        "685 tensors in 1 file" in text and "<IMG_CONTEXT>: 151667, template: sailvl-chat" in text
    )
    step(__file__, "load", folder)
    photo = min((SHARED / "data" / "photos" / "images").iterdir())
    answer = step(
        "sample.py",
        f"--model={folder}",
        f"--image={photo}",
        "--prompt=What is in the picture?",
        "--dtype=bfloat16",
        "--max_new_tokens=8",
        "--max_tiles=2",
    )
    assert answer.strip()
    step("convert.py", "export", folder, folder.with_name("internvl"))
    step("convert.py", "check", folder.with_name("internvl"), limit=1)
    assert sha256(folder / "model.safetensors") == sha256(
        folder.with_name("internvl") / "model.safetensors"
    )
    (folder.with_name("internvl") / "model.safetensors").unlink()


def test_transformers_loads_the_2b_with_every_key_and_gives_the_same_greedy_tokens(folder):
    pytest.importorskip(
        "transformers", reason="transformers is the oracle; pip install -r requirements-dev.txt"
    )
    hf = folder.with_name("transformers")
    step("convert.py", "export", folder, hf, "--layout=transformers")
    assert "missing 0, unexpected 0, 781 tensors" in step(__file__, "transformers", hf)
    (hf / "model.safetensors").unlink()
    assert "same 16 greedy tokens" in step(__file__, "shallow", folder, folder.with_name("shallow"))


def test_the_8b_at_reduced_depth_gives_the_same_greedy_tokens_as_transformers(folder):
    pytest.importorskip(
        "transformers", reason="transformers is the oracle; pip install -r requirements-dev.txt"
    )
    assert "same 16 greedy tokens" in step(
        __file__, "shallow_8b", folder, folder.with_name("shallow_8b")
    )


# ---- what runs in processes of its own ----------------------------------------------------------


def random_model(vision, llm, seed):
    from model import VLM

    with torch.device("meta"):
        vlm = VLM(vision, llm, 151667).to(torch.bfloat16)
    return vlm.to_empty(device="cpu").init_weights(seed)


def write(vit, llm):
    """A random InternViT-300M and Qwen2.5-1.5B as released, but untied as in SAIL-VL-2B."""
    import shutil

    from inputs.tokenizer import SPECIAL_TOKENS
    from model import LLMConfig
    from model_config import config_json
    from vision import VisionConfig
    from weights import save_folder

    vlm = random_model(VisionConfig(), LLMConfig(), 0)
    for f in ("vocab.json", "merges.txt"):
        shutil.copyfile(QWEN / f, os.environ["TMPDIR"] + "/" + f)
    (Path(os.environ["TMPDIR"]) / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class="Qwen2Tokenizer",
                eos_token="<|im_end|>",
                pad_token="<|endoftext|>",
                model_max_length=131072,
                added_tokens_decoder={
                    151643 + i: dict(content=token, special=i < 14)
                    for i, token in enumerate(SPECIAL_TOKENS[:22])
                },
            )
        )
    )
    save_folder(vlm.state_dict(), config_json(vlm.vision, None), vit)
    save_folder(vlm.state_dict(), config_json(None, vlm.llm), llm, os.environ["TMPDIR"])


def load(folder):
    import resource

    from weights import load_folder

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    before = peak()
    start = time.time()
    vlm, _ = load_folder(folder)
    weights = sum(p.nbytes for p in vlm.parameters()) / 1e9
    print(
        f"loading: {time.time() - start:.1f} s, "
        f"{peak() - before:.2f} GB beside {before:.2f} GB of imports, "
        f"{(peak() - before) / weights:.3f} times the weights of {weights:.2f} GB"
    )
    assert peak() - before < 1.15 * weights


def transformers(folder):
    from transformers import InternVLForConditionalGeneration

    model, info = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as f:
        missing, unexpected = (len(info[f"{side}_keys"]) for side in ("missing", "unexpected"))
        print(f"missing {missing}, unexpected {unexpected}, {len(f.keys())} tensors")
    assert not any(info.values()), info
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS


def shallow(folder, out):
    """The first two layers of each part, against transformers on the exported copy."""
    from model_config import config_json
    from weights import load_folder, save_folder

    vlm, _ = load_folder(folder)
    vlm.vision.n_layers = vlm.llm.n_layers = 2
    save_folder(vlm.state_dict(), config_json(vlm.vision, vlm.llm), out, folder)
    del vlm
    compare(out)


def shallow_8b(folder, out):
    from model import LLMConfig
    from model_config import config_json
    from vision import VisionConfig
    from weights import save_folder

    vision, llm = VisionConfig(n_layers=2), LLMConfig(**LLMConfig.PRESETS["qwen2.5-7b"])
    llm.n_layers = 1
    save_folder(random_model(vision, llm, 1).state_dict(), config_json(vision, llm), out, folder)
    compare(out)


def compare(folder):
    """Greedy tokens about a real photo in fp32: ours of the folder, transformers' of its export."""
    from transformers import InternVLForConditionalGeneration

    from convert import export
    from generate import Assistant, generate
    from inputs.images import normalize

    export(folder, Path(folder).with_name("shallow_hf"), "transformers")
    mine = Assistant(folder, "cpu", torch.float32, max_tiles=2, max_new_tokens=16)
    tiles = mine.tiles(min((SHARED / "data" / "photos" / "images").iterdir()))
    ids, tiles = mine.prompt([("What is in the picture?", None)], [tiles])
    mine.settings["stop_ids"] = set()
    (ours,) = generate(mine.model, [ids], [tiles], **mine.settings)
    del mine  # one model in memory at a time
    model = InternVLForConditionalGeneration.from_pretrained(
        Path(folder).with_name("shallow_hf"), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = model.generate(
            input_ids=torch.tensor([ids]),
            pixel_values=normalize(tiles),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=-1,
            attention_mask=torch.ones(1, len(ids)),
        )
    assert ours == theirs[0, -16:].tolist(), (ours, theirs[0, -16:].tolist())
    print(f"same {len(ours)} greedy tokens after {len(ids)} of a prompt with {len(tiles)} tiles")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
    globals()[sys.argv[1]](*sys.argv[2:])
