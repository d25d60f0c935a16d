"""What a stage leaves at its end: a model folder, with adapters merged and beside it."""
from training import lora
from training.adapter import adapter_files
from training.checkpoint_folder import stage_config
from training.distributed import say
from training.run_folder import write_finished
from weights import save_folder


def write_result(run, name, weights, source, tokenizer_dir, trained):
    """Write the model folder of stage `name`, rank 0 alone.

    weights: {name: whole tensor} of distributed.full_state; source: the ModelFolder that the stage
    began from; trained: the Trained of the stage.
    """
    if not run.dist.is_main:
        return
    cfg = run.cfg
    files = {}
    if trained.vision_rank or trained.llm_rank:
        weights, adapters = lora.merge_adapters(weights, cfg.lora_alpha / cfg.lora_rank)
        whole = {
            "ViT": trained.vision and not trained.vision_rank,
            "projector": trained.projector,
            "language model": trained.llm and not trained.llm_rank,
        }
        trained_whole = ", ".join(part for part, on in whole.items() if on)
        files = adapter_files(adapters, cfg, source, trained_whole)
        if trained_whole:
            say(run.dist, f"{name}: {trained_whole} trained without adapters, so adapter/ is not "
                          "the whole result; the model folder is")
    config = stage_config(cfg, source)
    save_folder(weights, config, run.out / name, tokenizer_dir, files)
    write_finished(run.out, name, True)
