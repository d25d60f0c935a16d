"""data.py show and preview with the config of a training."""


import pytest
from rows import ROOT
from test_eval import make_model_folder

import configurator
import data
import train
from inputs import pack_flags
from inputs.tokenizer import Tokenizer

FLAGS = ["--min_tiles=2", "--max_tiles=4", "--tokens_per_pack=300", "--max_tiles_per_pack=20",
         "--grad_accum_steps=2"]


@pytest.fixture
def config(tmp_path):
    """A config of a training from a model folder, with what its stages set."""
    model = make_model_folder(tmp_path / "model")
    lines = [f'init_from = "{model}"', "import math", "instruction.steps = int(math.sqrt(9))",
             "preference.lr_llm = 1e-5", "dtype = 'float32'"]
    lines += [flag.removeprefix("--") for flag in FLAGS]
    path = tmp_path / "my_config.py"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_show_and_preview_plan_the_packs_of_a_training_config(config, tmp_path):
    file = str(ROOT / "examples" / "internvl.jsonl")
    cfg = data.Config()
    configurator.configure(cfg, pack_flags.training_flags([str(config)]))
    shown = data.open_dataset(cfg, [file])
    assert cfg.tokenizer == str(tmp_path / "model")

    run = train.Config(data=file)
    configurator.configure(run, [f"--init_from={cfg.tokenizer}", f"--data={file}", *FLAGS])
    run.template = "sailvl-chat"
    vision = train.VisionConfig(image_size=28)
    tokenizer = Tokenizer(cfg.tokenizer)
    trained = data.stage_dataset(run, train.Stage(), tokenizer, vision, run.grad_accum_steps)
    assert shown.packs.settings == trained.packs.settings
    assert shown.packs.fingerprint == trained.packs.fingerprint
    assert shown.packs.plan_window(0, 0) == trained.packs.plan_window(0, 0)


def test_a_flag_is_stronger_than_the_config_and_the_seed_is_that_of_training(config):
    cfg = data.Config()
    configurator.configure(cfg, [*pack_flags.training_flags([str(config)]), "--max_tiles=3"])
    assert (cfg.max_tiles, cfg.tokens_per_pack, cfg.tiles_per_pack) == (3, 300, 20)
    assert cfg.seed == train.Config().seed and cfg.packs_per_step == 2
    assert pack_flags.training_flags([]) == []


def test_every_config_of_the_program_is_taken():
    for path in sorted((ROOT / "config").glob("*.py")):
        configurator.configure(data.Config(), pack_flags.training_flags([str(path)]))


def test_a_file_that_is_no_config_is_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("max_tiles = \n")
    with pytest.raises(ValueError, match="broken.py: SyntaxError: .*no config of train.py or"):
        pack_flags.training_flags([str(path)])
    path.write_text("max_tiles = 'many'\n")
    with pytest.raises(ValueError, match="max_tiles"):
        configurator.configure(data.Config(), pack_flags.training_flags([str(path)]))
