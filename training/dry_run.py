"""What a run will cost: --dry_run=True."""
import torch

from model import VLM, train_flops
from training.optim import print_stage_table
from training.settings import stage_steps
from model_config import read_configs

TOKENS, TILES, SUPERVISED = 2048, 7, 192  # of the sample that a plan is made for: 6 tiles and a thumbnail

def activation_bytes(vision, llm, tokens, tiles, trained, checkpointing="none"):
    """What one micro-batch keeps from its forward for its backward pass, in bytes: the blocks with an fp32 residual
    stream, bf16 matmuls and the fused kernels of a GPU; not the head, whose logits come in chunks (0.6 GB).
    trained: of ViT, projector, LLM. Counted from what autograd saves, per row and block: the stream and the inputs of
    norms, matmuls (for their weights' gradients), attention, activation functions. "full" keeps the inputs of blocks
    and, for a moment, one block; "selective", an estimate, the outputs of matmuls and attention."""
    C, H, K, D, F = llm.dim, llm.n_heads, llm.n_kv_heads, llm.head_dim, llm.ffn_dim
    heads = 2 * (H + 2 * K) * D + 2 * H * D + 4 * H  # q, k, v, what attention gave, its log-sums
    whole = 12 * C + heads + 8 * F + 8 if trained[2] else 8 * C + heads + 6 * F + 8
    blocks = [(tokens, llm.n_layers, dict(none=whole, selective=8 * C + heads + 4 * F, full=4 * C), whole)]
    if vision and trained[0]:
        C, H, F = vision.dim, vision.n_heads, vision.ffn_dim
        whole = 24 * C + 4 * F + 4 * H + 16
        kept = dict(none=whole, selective=16 * C + 2 * F + 4 * H, full=4 * C)
        blocks += [(tiles * (vision.n_patches + 1), vision.n_layers, kept, whole)]
    return sum(rows * layers * kept[checkpointing] for rows, layers, kept, _ in blocks) + (
        checkpointing != "none") * max(rows * whole for rows, _, _, whole in blocks)

def print_plan(cfg, stages, world):
    """Print the plan of all stages of a run for `world` GPUs; builds the model without memory.

    Memory: fp32 master, gradient and two Adam moments for what trains (16 bytes), bf16 for what is frozen; under
    --parallel=fsdp all ranks share both; the bf16 copies that autocast makes of what trains (2 bytes), or two gathered
    units; activations of the fullest pack. FLOPs are strict (train_flops), for packs full of such samples; days
    at `mfu_assumed` of a GPU of 989 TFLOP/s."""
    vision, llm = read_configs(cfg.init_from)[:2] if cfg.init_from else (cfg.vision, cfg.llm)
    if llm is None:
        raise ValueError(f"{cfg.init_from} is a vision encoder alone; convert.py assemble joins it with the rest")
    with torch.device("meta"):
        model = VLM(None if cfg.image_as == "words" else vision, llm, 0)
    days, sharded = 0.0, cfg.parallel == "fsdp"
    for name, stage in stages:
        rows = print_stage_table(name, model, stage)
        state = sum(16 * trainable + 2 * (n - trainable) for _, n, trainable, _, _ in rows) / (world if sharded else 1)
        pack, steps = cfg.tokens_per_pack, stage_steps(cfg, stage)
        tokens = min(TOKENS, pack)
        tiles = max(1, min(TILES, tokens // vision.tokens_per_tile)) if model.vision else 0
        samples = pack // tokens * cfg.grad_accum_steps * world
        trained = tuple(lr > 0 for lr in (stage.lr_vision, stage.lr_projector, stage.lr_llm))
        flops = samples * train_flops(model.vision, model.llm, tiles, [tokens], SUPERVISED, trained)  # of one step
        stage_days = steps * flops / world / (cfg.mfu_assumed * 989e12) / 86400
        units = sorted(sum(p.numel() for p in unit.parameters()) for unit in (
            *model.language_model.model.layers, model.language_model.model.embed_tokens, model.language_model.lm_head))
        copies = 2 * (sum(units[-3:]) if sharded else sum(r[2] for r in rows))  # of the weights, in bf16
        most = min(cfg.max_tiles_per_pack, pack // vision.tokens_per_tile) if model.vision else 0
        held = activation_bytes(model.vision, model.llm, pack, most, trained, cfg.activation_checkpointing)
        print(f"    {steps:,} steps x {samples * tokens:,} tokens = {steps * samples * tokens / 1e9:.3g}B tokens; "
              f"{flops / 1e12:,.6g} TFLOP per step\n    weights, gradients and moments: {state / 1e9:.1f} GB "
              f"per GPU ({world} x {cfg.parallel}), bf16 copies: {copies / 1e9:.1f} GB, activations at {most} tiles "
              f"(checkpointing {cfg.activation_checkpointing}): {held / 1e9:.1f} GB, in all: "
              f"{(state + copies + held) / 1e9:.1f} GB\n    {stage_days:.3g} days at {100 * cfg.mfu_assumed:.0f} % of "
              "989 TFLOP/s")
        days += stage_days
    print(f"{sum(1 for _ in model.parameters())} tensors, {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{days:.3g} days in all on {world} GPU{'s' * (world > 1)}")
