"""`eval.py score`: a predictions file -> its score, without a model."""
import dataclasses
import sys
from typing import Literal

import configurator
from evals.endpoint import connect_judge
from evals.files import read_tsv
from evals.own import OWN_SCORERS, choose_benchmarks
from evals.score import never_right_warning, score_rows
from evals.table import PAPER_PROTOCOL, protocol_hash


@dataclasses.dataclass(slots=True)
class ScoreConfig:
    benchmark: str = ""  # name in evals/table.py, or a .tsv or .jsonl of your own
    # of a file of your own: choice|yes_no|exact|contains|anls|relaxed|judge; auto: by what is there
    scorer: Literal["auto", *OWN_SCORERS] = "auto"
    predictions: str = ""  # .tsv with the benchmark's columns and `prediction`
    protocol: str = PAPER_PROTOCOL  # sailvl-2024-12 | vlmevalkit-2026-08
    judge: str = ""  # OpenAI-compatible endpoint, http://.../v1; its key: JUDGE_API_KEY
    judge_model: str = ""  # the judge's name there


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def score_file(argv):
    """`eval.py score`: a predictions file -> {"benchmark", "score", "details", "protocol", ...}.

    Where the score is None, "reason" says why.
    """
    cfg = ScoreConfig()
    configurator.configure(cfg, argv)
    if not (cfg.benchmark and cfg.predictions):
        raise ValueError("give --benchmark=NAME and --predictions=FILE.tsv")
    chosen = choose_benchmarks(cfg.benchmark, cfg.protocol, cfg.scorer)
    if len(chosen) != 1:
        raise ValueError(f"--benchmark={cfg.benchmark} names {len(chosen)}; give one, and the file "
                         "with its predictions")
    b, = chosen.values()
    rows, _ = read_tsv(cfg.predictions, ("prediction", *b.columns))
    judge = connect_judge(cfg.judge, cfg.judge_model, f"{cfg.predictions}.judge.jsonl")
    try:
        score, details = score_rows(b, rows, judge)
    except ValueError as e:
        raise ValueError(f"{cfg.predictions}: {e}") from None
    warning = never_right_warning(b, rows)
    if warning:
        warn(warning)
    result = {"benchmark": b.name, "score": score}
    if score is None:
        result["reason"] = details["reason"]
    return result | {
        "details": details,
        "judge": cfg.judge_model or None,
        "protocol": protocol_hash([b]),
        "protocol_name": cfg.protocol,
    }
