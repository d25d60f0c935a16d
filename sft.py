"""Supervised fine-tuning, a curriculum of rising complexity: knowledge, instruction, preference.

Everything trains. The loop is train.py's; only the settings differ. Examples:

    python sft.py config/toy_sft.py                                  # CPU, about a minute
    python sft.py config/sft_2b.py config/sft_one_gpu.py --init_from=SAIL-VL-2B --data=my.jsonl
    torchrun --nproc_per_node=8 sft.py config/sft_2b.py --init_from=out/pretrain_2b/advance \\
        --knowledge.data=k.json --instruction.data=i.json --preference.data=p.json
"""
from dataclasses import dataclass, field

from configurator import run_script
from model import LLMConfig
from train import run
from training.settings import RunConfig, Stage
from vision import VisionConfig


def all_parts(lr):
    return field(default_factory=lambda: Stage(lr_vision=lr, lr_projector=lr, lr_llm=lr))


@dataclass(slots=True)
class Config(RunConfig):
    stages: str = "knowledge,instruction,preference"  # run in this order
    vision: VisionConfig = field(default_factory=VisionConfig)  # a preset name, or field by field
    llm: LLMConfig = field(default_factory=LLMConfig)  # a preset name, or field by field
    knowledge: Stage = all_parts(4e-5)
    instruction: Stage = all_parts(4e-5)
    preference: Stage = all_parts(4e-5)


def main():
    run(Config())


if __name__ == "__main__":
    run_script(main)
