"""What a run will cost: --dry_run=True prints modules, memory, FLOPs, tokens and days.

Letters: C width, H query heads, K key/value heads, D head dim.
"""
import torch

from model import VLM, train_flops
from model_config import read_configs
from training.optim import RATES, peak_rate, print_stage_table

# The sample that a plan is made for: 6 tiles and a thumbnail, and an answer.
TOKENS = 2048
TILES = 7
SUPERVISED = 192

GPU_TFLOPS = 989  # of an H100, dense bf16; see PEAK_TFLOPS of metrics.py


def activation_bytes(vision, llm, tokens, tiles, trained, checkpointing="none"):
    """Bytes that one micro-batch keeps from its forward pass for its backward pass.

    trained: whether ViT, projector and LLM train. The blocks count, with an fp32 residual stream,
    bf16 matmuls and the fused kernels of a GPU. The head does not: its logits come in chunks (0.6
    GB). Counted from what autograd saves per row and block: the stream and the inputs of norms,
    matmuls (for the gradients of their weights), attention and activation functions.
    checkpointing "full" keeps the inputs of the blocks and, for a moment, all of one block;
    "selective", an estimate, the outputs of matmuls and attention.
    """
    kept_bytes = 0
    one_block = 0  # that is computed again, all of it

    C, H, K, D = llm.dim, llm.n_heads, llm.n_kv_heads, llm.head_dim
    qkv = 2 * (H + 2 * K) * D
    attention_out = 2 * H * D
    log_sums = 4 * H
    heads = qkv + attention_out + log_sums
    if llm.qwen3:  # the norms of queries and keys compute in fp32
        heads += 4 * (H + K) * (D + 1)
    if trained[2]:
        whole = 12 * C + heads + 8 * llm.ffn_dim + 8
    else:
        whole = 8 * C + heads + 6 * llm.ffn_dim + 8
    per_row = {"none": whole, "selective": 8 * C + heads + 4 * llm.ffn_dim, "full": 4 * C}
    kept_bytes += tokens * llm.n_layers * per_row[checkpointing]
    one_block = max(one_block, tokens * whole)

    if vision and trained[0]:
        C, H = vision.dim, vision.n_heads
        rows = tiles * vision.rows_per_tile
        if vision.kind == "aimv2":
            whole = 20 * C + 8 * vision.ffn_dim + 4 * H + 8
            selective = 16 * C + 4 * vision.ffn_dim + 4 * H
        else:
            whole = 24 * C + 4 * vision.ffn_dim + 4 * H + 16
            selective = 16 * C + 2 * vision.ffn_dim + 4 * H
        per_row = {"none": whole, "selective": selective, "full": 4 * C}
        kept_bytes += rows * vision.n_layers * per_row[checkpointing]
        one_block = max(one_block, rows * whole)

    return kept_bytes if checkpointing == "none" else kept_bytes + one_block


def weight_copy_bytes(model, trainable, sharded):
    """Bytes of the bf16 copies of weights that a step holds at a time.

    Those that autocast makes of what trains; with FSDP the two largest units and the head.
    """
    if not sharded:
        return 2 * trainable
    llm = model.language_model
    units = [*llm.model.layers, llm.model.embed_tokens, llm.lm_head]
    sizes = sorted(sum(p.numel() for p in unit.parameters()) for unit in units)
    return 2 * sum(sizes[-3:])


def print_plan(cfg, stages, world):
    """Print the plan of all stages of a run for `world` GPUs; the model is built without memory.

    Memory: 16 bytes for each trainable parameter (fp32 master, gradient and two Adam moments), 2
    for each frozen one; --parallel=fsdp divides both by the ranks. To these come bf16 copies of
    weights and the activations of the fullest pack. FLOPs are strict (model.train_flops), for packs
    full of samples as above. Days: at cfg.mfu_assumed of GPU_TFLOPS.
    """
    vision, llm = cfg.vision, cfg.llm
    if cfg.init_from:
        vision, llm, _ = read_configs(cfg.init_from)
    if llm is None:
        raise ValueError(f"{cfg.init_from} is a vision encoder alone; "
                         "convert.py assemble joins it with the rest")
    with torch.device("meta"):
        model = VLM(vision, llm, 0)
    days = sum(print_stage_plan(cfg, name, stage, model, world) for name, stage in stages)
    tensors = sum(1 for _ in model.parameters())
    parameters = sum(p.numel() for p in model.parameters())
    gpus = "GPU" if world == 1 else "GPUs"
    print(f"{tensors} tensors, {parameters:,} parameters; {days:.3g} days in all on {world} {gpus}")


def print_stage_plan(cfg, name, stage, model, world):
    """Print the plan of one stage; returns its days."""
    vision, llm = model.vision, model.llm
    sharded = cfg.parallel == "fsdp"
    rows = print_stage_table(name, model, stage)
    trainable = sum(row.trainable for row in rows)
    frozen = sum(row.parameters for row in rows) - trainable
    trained = tuple(peak_rate(stage, module) > 0 for module in RATES)

    # time
    pack = cfg.tokens_per_pack
    tokens = min(TOKENS, pack)
    tiles = max(1, min(TILES, tokens // vision.tokens_per_tile))
    samples = pack // tokens * cfg.grad_accum_steps * world  # of one step
    flops = samples * train_flops(vision, llm, tiles, [tokens], SUPERVISED, trained)
    step_tokens = samples * tokens
    days = stage.steps * flops / world / (cfg.mfu_assumed * GPU_TFLOPS * 1e12) / 86400

    # memory per GPU
    state = (16 * trainable + 2 * frozen) / (world if sharded else 1)
    copies = weight_copy_bytes(model, trainable, sharded)
    most_tiles = min(cfg.max_tiles_per_pack, pack // vision.tokens_per_tile)
    checkpointing = cfg.activation_checkpointing
    activations = activation_bytes(vision, llm, pack, most_tiles, trained, checkpointing)
    in_all = state + copies + activations

    print(f"    {stage.steps:,} steps x {step_tokens:,} tokens = "
          f"{stage.steps * step_tokens / 1e9:.3g}B tokens; {flops / 1e12:,.6g} TFLOP per step")
    print(f"    weights, gradients and moments: {state / 1e9:.1f} GB per GPU "
          f"({world} x {cfg.parallel}), bf16 copies: {copies / 1e9:.1f} GB, "
          f"activations at {most_tiles} tiles (checkpointing {checkpointing}): "
          f"{activations / 1e9:.1f} GB, in all: {in_all / 1e9:.1f} GB")
    print(f"    {days:.3g} days at {100 * cfg.mfu_assumed:.0f} % of {GPU_TFLOPS} TFLOP/s")
    return days
