"""Supervised fine-tuning, a curriculum of rising complexity: knowledge, instruction, preference.

Everything trains. The loop is the one of train.py; only the settings differ. Examples:

    python sft.py config/toy_sft.py                         # CPU, about a minute
    python sft.py config/sft_2b.py config/sft_one_gpu.py --init_from=SAIL-VL-2B --data=my.jsonl
    torchrun --nproc_per_node=8 sft.py config/sft_2b.py --init_from=out/pretrain_2b/advance \\
        --knowledge.data=k.json --instruction.data=i.json --preference.data=p.json
"""
from dataclasses import dataclass, field

from configurator import run_script
from model import LLMConfig
from train import RunConfig, Stage, run_stages
from vision import VisionConfig


def all_modules(lr):
    """A stage that trains ViT, projector and language model at the same peak rate."""
    return field(default_factory=lambda: Stage(lr_vision=lr, lr_projector=lr, lr_llm=lr))


@dataclass(slots=True)
class Config(RunConfig):
    stages: str = "knowledge,instruction,preference"  # stages to run, in order, with commas
    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    knowledge: Stage = all_modules(4e-5)
    instruction: Stage = all_modules(4e-5)
    preference: Stage = all_modules(4e-5)


def main():
    run_stages(Config())


if __name__ == "__main__":
    run_script(main)
