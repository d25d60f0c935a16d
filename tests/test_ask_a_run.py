"""A run is asked while it trains: checkpoints as model folders, the best one, validation losses."""

import collections
import json
import shutil

import pytest
import torch
from command_line import run as run_script
from safetensors.torch import load_file
from test_train import ROOT, argv, log, run
from torch import nn

import convert
import eval as evaluation
import sample
import sft
import train
import weights
from training import checkpoint, limits, metrics, plot
from training.checkpoint_folder import model_folder
from training.distributed import ALONE

PICTURE = str(ROOT / "examples" / "images" / "5.jpg")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """The folder of a run with a checkpoint at each of its four steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--save_every=1", "--keep=9", "--alignment.lr_vision=1e-3"]
        run(train, argv(out, shards, *flags, stages=("alignment",)), patch)
    return out


def step(out, number):
    return out / "checkpoints" / f"step_{number:08d}"


def ask(model):
    argv = ["sample.py", f"--model={model}", f"--image={PICTURE}", "--prompt=What?",
            "--max_new_tokens=20", "--temperature=5", "--seed=3", "--device=cpu"]
    return run_script(sample.main, argv)


def test_the_last_checkpoint_is_the_model_folder_of_the_stage_to_the_bit(trained, tmp_path):
    code, text, errors = run_script(
        convert.main, ["convert.py", "export", step(trained, 4), tmp_path / "a"])
    assert code == 0, errors
    convert.export(str(trained / "alignment"), str(tmp_path / "b"), "internvl")
    a = load_file(tmp_path / "a" / "model.safetensors")
    b = load_file(tmp_path / "b" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("config.json", "added_tokens.json", "vocab.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_a_checkpoint_with_adapters_is_the_merged_model_of_its_stage(tmp_path, shards,
                                                                     monkeypatch):
    out = tmp_path / "run"
    run(train, argv(out, shards, "--save_every=1", "--alignment.lr_llm=1e-2", "--lora_rank=4",
                    stages=("alignment",)), monkeypatch)
    convert.export(str(step(out, 4)), str(tmp_path / "a"), "internvl")
    convert.export(str(out / "alignment"), str(tmp_path / "b"), "internvl")
    a = load_file(tmp_path / "a" / "model.safetensors")
    b = load_file(tmp_path / "b" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert ask(step(out, 4))[:2] == ask(out / "alignment")[:2]

    path = step(out, 4) / "config.json"
    config = json.loads(path.read_text())
    config.pop("lora_scale")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="how adapters are merged; let the run go on"):
        weights.load_folder(str(step(out, 4)))


def test_sample_answers_from_a_checkpoint_from_a_run_and_from_the_stage_alike(trained):
    stage = ask(trained / "alignment")
    assert stage[0] == 0 and stage[1].strip(), stage
    for model in (step(trained, 4), trained):
        code, text, errors = ask(model)
        assert (code, text) == stage[:2]
        assert f"{step(trained, 4)}: 4 steps into stage alignment" in errors
    assert ask(step(trained, 1))[0] == 0


def test_eval_scores_a_checkpoint_and_names_it(trained, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"question": "What?", "answer": "x"}\n')
    flags = [f"--benchmarks={tmp_path}/my.jsonl", f"--out_dir={tmp_path}/out", "--device=cpu",
             "--max_new_tokens=3"]
    code, _, errors = run_script(evaluation.main, ["eval.py", f"--model={trained}", *flags])
    assert code == 0, errors
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"] == str(step(trained, 4)) and results["model_sha256"]
    # Another checkpoint is another model: nothing of the first one's answers is used.
    run_script(evaluation.main, ["eval.py", f"--model={step(trained, 1)}", *flags])
    other = json.loads((tmp_path / "out" / "results.json").read_text())
    assert other["model_sha256"] != results["model_sha256"]


def test_a_damaged_checkpoint_is_refused_by_name_and_a_run_gives_the_one_before(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    file = step(out, 4) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, text, errors = ask(step(out, 4))
    assert code == 2 and len(errors.splitlines()) == 1
    assert f"damaged checkpoint {step(out, 4)}: __0_0.distcp has changed" in errors
    code, text, errors = ask(out)
    assert code == 0 and "trying the one before" in errors
    assert f"{step(out, 3)}: 3 steps into stage alignment" in errors


def test_a_run_without_a_checkpoint_names_its_model_folders(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for path in (out / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    code, _, errors = ask(out)
    assert code == 2 and f"its model folders: {out}/alignment" in errors


def test_a_checkpoint_from_before_is_refused_with_what_to_do(trained, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step_00000004"
    shutil.copytree(step(trained, 4), path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["config.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match="from before checkpoints held config.json; let the run"):
        model_folder(str(path))


# ---- nothing is filled or saved by halves --------------------------------------------------------


def test_a_fill_that_leaves_a_parameter_without_a_value_names_it(trained):
    model, about = weights.open_folder(str(trained / "alignment"))
    del about.tensors["mlp1.1.bias"]
    with pytest.raises(ValueError, match="no stored tensor fills mlp1.1.bias; "):
        weights.fill(model.to_empty(device="cpu"), about.tensors)
    model, about = weights.open_folder(str(trained / "alignment"))
    model.register_parameter("gate", nn.Parameter(torch.empty(1)))
    with pytest.raises(ValueError, match="no stored tensor fills gate; "):
        weights.fill(model.to_empty(device="cpu"), about.tensors)


def test_a_save_that_would_drop_a_parameter_names_it_and_writes_nothing(trained, tmp_path):
    model, config = weights.load_folder(str(trained / "alignment"))
    state = model.state_dict() | {"gate": torch.ones(1)}
    with pytest.raises(ValueError, match="not written, for config.json has no place for gate; "):
        weights.save_folder(state, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the best checkpoint -------------------------------------------------------------------------


class Model(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.optimizer = torch.optim.AdamW(self.parameters())
        for p in self.parameters():
            p.grad = torch.zeros_like(p)


def train_on(saver, losses, start=0):
    """Steps with these validation losses, with a checkpoint after each."""
    model = Model()
    for number in range(start + len(losses)):
        model.optimizer.step()
        if number < start:
            continue
        progress = train.Progress("s", step=number + 1)
        best = saver.lowest("s", losses[number - start]).get("best")
        saver.save(number + 1, model, model.optimizer, progress, True, best)


def numbers(out):
    return [int(path.name[5:]) for path in checkpoint.checkpoints_in(out)]


def test_the_checkpoint_of_the_lowest_validation_loss_is_never_pruned(tmp_path):
    saver = checkpoint.Saver(tmp_path, ALONE, keep=2, keep_best=True)
    train_on(saver, [3.0, 1.0, 2.0, float("nan"), 2.5])
    assert numbers(tmp_path) == [2, 4, 5]
    # A resumed run knows it, and a better one takes its place.
    saver = checkpoint.Saver(tmp_path, ALONE, keep=2, keep_best=True)
    train_on(saver, [1.5, 1.2], start=5)
    assert numbers(tmp_path) == [2, 6, 7]
    train_on(saver, [0.5, 0.7, 0.6], start=7)
    assert numbers(tmp_path) == [8, 9, 10]
    # Without the setting all is as it was; what is best stays where it is.
    train_on(checkpoint.Saver(tmp_path, ALONE, keep=2), [0.1, 0.1], start=10)
    assert numbers(tmp_path) == [8, 11, 12]


def test_a_run_saves_its_best_step_says_so_and_draws_validation_by_source(
    tmp_path, shards, monkeypatch, capsys
):
    out = tmp_path / "run"
    text = tmp_path / "text.jsonl"
    row = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A."}]}
    text.write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i in range(9)))
    flags = ["--keep_best=True", "--val_every=1", "--save_every=100", "--print_every=1",
             f"--val_data=pictures={shards},{text}", "--val_packs=2"]
    run(train, argv(out, shards, *flags, stages=("alignment",)), monkeypatch)
    rows = log(out)
    lowest = min(rows, key=lambda one: one["val_loss"])
    assert all(one.keys() >= {"val_loss", "val_loss/pictures", "val_loss/text"} for one in rows)
    assert [one["step"] for one in rows if "best" in one][-1] == lowest["step"]
    assert json.loads((out / "checkpoints" / "best").read_text()) == {
        "checkpoint": f"step_{lowest['step']:08d}", "stage": "alignment",
        "val_loss": lowest["val_loss"]}
    assert "lowest so far, this checkpoint is kept" in metrics.format_step(lowest)
    assert lowest["step"] in numbers(out)
    assert model_folder(str(out / "checkpoints" / "best")) == str(step(out, lowest["step"]))
    lines = plot.loss_curves(rows)["alignment"]
    assert lines.keys() == {"loss", "val_loss", "val_loss/pictures", "val_loss/text"}


def test_loss_png_has_a_logarithmic_axis_and_a_line_for_each_validation_loss(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self.axes[0]))
    rows = [{"stage": s, "step": i, "loss": 2.0 / i, "val_loss": 3.0 / i, "val_loss/a": 1.0}
            for s in ("one", "two") for i in range(1, 9)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    ax, = drawn
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_yscale() == "log"
    assert labels == ["one", "validation", "validation/a", "two"]


def test_keep_best_without_held_out_data_is_refused(tmp_path, shards, monkeypatch):
    arguments = argv(tmp_path / "run", shards, "--keep_best=True")
    monkeypatch.chdir(ROOT)
    code, _, errors = run_script(train.main, ["train.py", *arguments])
    assert code == 2 and "there is no val_data; give --val_data=PATH" in errors


def test_the_file_best_stands_for_its_checkpoint_and_says_when_that_is_gone(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(step(trained, 2), folder / "step_00000002")
    record = {"checkpoint": "step_00000002", "stage": "alignment", "val_loss": 1.0}
    (folder / "best").write_text(json.dumps(record))
    assert ask(folder / "best")[:2] == ask(step(trained, 2))[:2]
    shutil.rmtree(folder / "step_00000002")
    code, text, errors = ask(folder / "best")
    assert code == 2 and text == ""
    assert errors == (f"error: {folder}/best names no checkpoint that is there; give the run "
                      "folder, for its newest one\n")


@pytest.mark.parametrize("steps, val_every, refused", [(4, 4, True), (4, 500, True), (4, 2, False)])
def test_keep_best_with_one_validation_to_choose_from_is_refused(steps, val_every, refused):
    cfg = train.Config(keep_best=True, val_data="x", val_every=val_every)
    stages = [("alignment", train.Stage(steps=steps))]
    origins = collections.defaultdict(lambda: "command line")
    if refused:
        with pytest.raises(ValueError, match=f"alignment.steps={steps}; set --val_every=1"):
            limits.check_together(cfg, origins, stages)
    else:
        limits.check_together(cfg, origins | {"lora_rank": "default", "lora_alpha": "default",
                                              "lora_vision": "default"}, stages)


@pytest.mark.parametrize("files", [
    ["config/sft_2b.py", "config/sft_lora.py"],
    ["config/sft_8b.py", "config/sft_lora.py", "config/sft_lora_8b.py"],
    ["config/sft_2b.py", "config/sft_one_gpu.py"],
])
def test_the_recipes_for_own_rows_validate_often_enough_to_keep_the_best(files, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--val_data=examples/internvl.jsonl", "--keep_best=True", "--init_from="]
    plan = ["--dry_run=True", "--data=examples/internvl.jsonl"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    code, _, errors = run_script(sft.main, ["sft.py", *files, *flags, *plan])
    assert code == 0, errors
