"""From the answers of a run to results.json: the scores, their averages and how they came about."""
from evals.score import averages, chance_level, published_scores, score_rows
from evals.table import PAPER, protocol_hash

# What results.json has beside the scores of benchmarks, which stand under their names.
RESULT_KEYS = {
    "overall", "untrained", "trained_blind", "blind", "chance", "groups", "left_out", "n",
    "details", "scorers", "model", "model_sha256", "protocol", "protocol_name", "judge",
    "files_md5", "published", "limit", "dtype", "torch", "seconds"}


def run_protocol_hash(benchmarks, cfg):
    """The hash of what an evaluation with these settings asks and how it scores."""
    return protocol_hash(benchmarks, cfg.max_tiles, cfg.max_new_tokens)


def score_all(tasks, answered, judge):
    """-> ({variant: {benchmark: score}}, {benchmark: details of the model's own score})."""
    scores = {}
    details = {}
    # The model is the last variant, so that its details stay.
    for variant, rows in answered.items():
        scores[variant] = {}
        for task in tasks:
            name = task.b.name
            scores[variant][name], details[name] = score_rows(task.b, rows[name], judge)
    rows = answered["model"]
    scores["chance"] = {task.b.name: chance_level(task.b, rows[task.b.name]) for task in tasks}
    return scores, details


def build_results(tasks, failed, scores, details, cfg):
    """What results.json has of the benchmarks: tasks were answered, failed are {name: reason}."""
    names = [task.b.name for task in tasks]
    parts = {variant: {"overall": averages(s)["overall"], **s} for variant, s in scores.items()}
    model_scores = parts.pop("model")
    means = averages(scores["model"])
    asks_paper = any(name in PAPER for name in names)
    return {
        **dict.fromkeys(failed),
        **model_scores,
        **parts,
        "groups": means["groups"],
        "left_out": failed | {name: details[name]["reason"] for name in means["left_out"]},
        "n": {name: details[name]["n"] for name in names},
        "details": details,
        "scorers": {task.b.name: task.b.scorer.__name__ for task in tasks},
        "model": cfg.model,
        "protocol": run_protocol_hash([task.b for task in tasks], cfg),
        "protocol_name": cfg.protocol,
        "judge": cfg.judge_model or None,
        "files_md5": {task.b.name: task.md5 for task in tasks},
        "published": published_scores() if asks_paper else {},
        "limit": cfg.limit,
    }
