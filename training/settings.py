"""Settings of a run and of a stage."""
from dataclasses import dataclass
from dataclasses import fields
from typing import Literal

from configurator import setting


# ---- settings -------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Stage:
    """One stage of a run. A learning rate of 0 freezes the module."""
    steps: int = setting(1000, at_least=1)  # optimizer updates in this stage
    data: str = setting("", files=True)  # sources as name=path pairs separated by commas; "": the run's
    lr_vision: float = 0.0  # peak learning rate of the ViT; 0: frozen
    lr_projector: float = 0.0  # of the projector
    lr_llm: float = 0.0  # of the language model
    warmup_steps: int = 0  # linear warm-up, in steps
    min_lr_ratio: float = 0.0  # the cosine ends at this share of the peak
    weight_decay: float = 0.01  # on matrices only
    drop_path: float = 0.0  # stochastic depth of the ViT, linear over its depth

@dataclass(slots=True)
class RunConfig:
    """What every training run can set; train.Config and sft.Config add their model and their stages."""
    out_dir: str = "out/run"  # the run folder: log.jsonl, config.json, checkpoints/, bad_samples.jsonl, loss.png
    data: str = setting("", files=True)  # sources as name=path pairs separated by commas
    val_data: str = setting("", files=True)  # held-out sources, of which a loss is computed as well
    val_every: int = setting(500, at_least=1)  # steps between validations, when there are val_data
    val_packs: int = setting(32, at_least=1)  # packs of one validation, on all ranks together
    init_from: str = ""  # model folder to start from; "": random weights
    tokenizer: str = ""  # folder of the tokenizer, when init_from is empty
    template: str = ""  # prompt template; "": the folder's, else sailvl-chat
    stages: str = ""  # names of the stages to run, in order, separated by commas
    seed: int = 1234  # of weights, data order and stochastic depth
    init_std: float = 0.02  # of random matrices, where no folder gives weights
    max_steps: int = 0  # caps each stage; 0: no cap
    # input
    tokens_per_pack: int = setting(8192, at_least=1)  # tokens of one pack = one micro-batch of one rank
    max_tiles_per_pack: int = setting(48, at_least=1)  # tiles of one pack, the ViT's batch
    min_tiles: int = setting(1, at_least=1)  # tiles per image, at least
    max_tiles: int = 12  # tiles per image, at most, the thumbnail not counted
    thumbnail: bool = True  # add the whole picture as a last tile when there are several
    image_as: Literal["pixels", "blank", "words"] = "pixels"  # blank: gray, a control; words: toy cells, for its LLM
    cell_labels: Literal["none", "also", "only"] = "none"  # toy: each visual token predicts a word of its own cell
    shuffle: bool = True  # False: samples in the order of the files
    pad_packs: bool = False  # fill each pack up with unsupervised tokens: one shape for torch.compile
    num_workers: int = 2  # processes per rank that decode and tile
    # optimization
    grad_accum_steps: int = setting(1, at_least=1)  # micro-batches per step and rank; a run that goes on on other ranks keeps its batch
    loss_weight: Literal["token", "sample", "sqrt"] = "token"  # a supervised token weighs 1, 1/n or 1/sqrt(n)
    embed_noise: float = 0.0  # noise on what enters projector and LLM, grows to this share of its size in half a stage
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    eps: float = 1e-8  # AdamW
    grad_clip: float = 1.0  # global gradient norm; 0: no clipping
    # machine
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where there is one, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the arithmetic; auto: bfloat16 on cuda, else float32
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: weights copied or sharded over ranks
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile per block; auto: on cuda only
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute all but the dear parts; or all
    threads: int = 0  # CPU threads of one rank; 0: PyTorch's choice
    timeout_s: int = setting(600, at_least=1)  # a step that hangs this long ends the run; last_step/ then says where
    # saving and showing
    save_every: int = setting(1000, at_least=1)  # steps between checkpoints
    keep: int = setting(2, at_least=1)  # newest checkpoints kept, at least 2
    save_async: bool = True  # write checkpoints beside the training, from a copy, where there is memory for one
    resume: Literal["auto", "strict", "never"] = "auto"  # go on from the newest good checkpoint; the newest; refuse
    track: Literal["none", "tensorboard", "wandb"] = "none"  # who gets the log as well, if it is installed
    print_every: int = setting(10, at_least=1)  # steps per printed line
    mfu_assumed: float = 0.4  # for the days that --dry_run shows
    dry_run: bool = False  # print what would run, on 8 GPUs or on WORLD_SIZE=n of them, and stop

def named_stages(cfg):
    """[(name, Stage), ...] of cfg.stages, in order. Raises ValueError naming the stages there are."""
    known = {f.name: getattr(cfg, f.name) for f in fields(cfg) if isinstance(getattr(cfg, f.name), Stage)}
    names = cfg.stages.replace(" ", "").split(",")
    for name in set(names) - known.keys():
        raise ValueError(f"--stages: unknown stage {name!r}, choose from {', '.join(known)}")
    return [(name, known[name]) for name in names]

def stage_steps(cfg, stage):
    return min(stage.steps, cfg.max_steps or stage.steps)
