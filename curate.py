"""From raw pictures to a scored, deduplicated caption set, stage by stage (SAIL-Caption).

    python curate.py collect   --in='web=laion/*.tar,photos.jsonl' --out=shards/collected
    python curate.py dedup     --in=shards/collected --out=shards/unique
    python curate.py select    --in=shards/unique --out=shards/picked --n=100000
    python curate.py annotate  --in=shards/picked --out=shards/reference \\
        --endpoint=http://HOST/v1 --endpoint_model=NAME
    python sft.py config/captioner.py --init_from=MODEL_FOLDER --data='shards/reference/*.tar'
    python curate.py recaption --in=shards/unique --out=shards/captions \\
        --model=out/captioner/instruction
    python curate.py score     --in=shards/captions --out=shards/scored \\
        --endpoint=http://HOST/v1 --endpoint_model=NAME
    python curate.py filter    --in=shards/scored --out=shards/final \\
        --min_richness=3 --min_alignment=3
    python curate.py report    --in=before=shards/unique,after=shards/final --out=out/captions

    python curate.py plan      --n=300e6 --ranks=128 --picture_kb=100   # hours, memory, disk
    python curate.py sft-quality --in=train.jsonl ...    # as score, for training rows
    python curate.py quick | composition | incremental   # choose training data: curation/tiers.py

Each stage reads shards and writes shards, one for one: KEY.jpg as it came, and KEY.json with id,
alt_text, caption, scores and more, which train.py and sft.py read as training data. A dropped row
is a line with its reason in OUT/dropped/. A shard is written whole or not at all. Start a command
again and it resumes. Under torchrun, on one or many machines, the ranks share the work of a stage.
"""
from dataclasses import dataclass
from typing import Literal

from configurator import configure, run_script, setting, subcommand
from curation.ask import judge_rows, write_captions
from curation.balance import select_balanced
from curation.collect import collect_pictures
from curation.dedup import drop_near_duplicates
from curation.filter import filter_captions
from curation.plan import print_curation_plan
from curation.report import report_captions
from curation.tiers import run_tier
from inputs.images import MAX_TILES


@dataclass(slots=True)
class Config:
    in_: str = setting("", files=True)  # tars, folders, .jsonl, .json; name=path,...
    out: str = ""  # folder to write
    seed: int = setting(0, at_most=2**32 - 1)  # of all random choices
    workers: int = setting(4, at_least=1, at_most=256)  # threads that decode pictures
    # rows of a shard, if the input is no tar
    shard_size: int = setting(1000, at_least=1, at_most=10**6)

    # collect
    min_side: int = setting(64, at_most=10**6)  # collect: least pixels of the shorter side
    # collect: largest ratio of the longer side to the shorter
    max_aspect: float = setting(8.0, at_least=1, at_most=1e6)

    # dedup, select
    # dedup: pictures, captions, either of them, or what the ViT of --model sees
    by: Literal["image", "text", "both", "embedding"] = "image"
    # dedup: most bits of 128 by which hashes differ of pictures that are compared
    distance: int = setting(20, at_most=128)
    # dedup: least share of the edges of a picture that its near-duplicate has
    found: float = setting(0.9, above=0, at_most=1)
    # dedup: least share of word 3-grams common to near-duplicate captions
    jaccard: float = setting(0.8, above=0, at_most=1)
    # dedup: least cosine of the vectors of near-duplicates, --by=embedding
    cosine: float = setting(0.95, above=0, at_most=1)
    # select: rows to take; quick, composition, incremental: rows of a mix (0: all)
    n: int = setting(1000, at_most=10**10)
    # select: clusters of --model's ViT features, or hashes
    clusters: int = setting(64, at_least=1, at_most=10**6)

    # annotate, recaption, score, sft-quality
    endpoint: str = ""  # OpenAI-compatible http://.../v1, several with commas; key: JUDGE_API_KEY
    endpoint_model: str = ""  # the model's name there
    model: str = ""  # a model folder in place of an endpoint
    mode: Literal["caption", "recaption"] = "recaption"  # recaption: the prompt has the alt-text
    # annotate, recaption: a caption must end in a full stop or the like
    ending: Literal["stop", "any"] = "stop"
    # folder of the prompts, "": curation/prompts beside this file; a row has the sha256 of its own
    prompts: str = ""
    threads: int = setting(8, at_least=1, at_most=1024)  # requests to an endpoint at a time
    # longest reply; a reply that is cut off is dropped
    max_new_tokens: int = setting(512, at_least=1, at_most=2**17)
    # pictures answered together by a model folder
    batch_size: int = setting(64, at_least=1, at_most=2**16)
    # tiles of a picture for a model folder; 0: its own limit
    max_tiles: int = setting(0, at_most=MAX_TILES)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of a model folder
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the decoder; auto: on a GPU
    price_in: float = setting(0.0, at_most=1e6)  # dollars for a million prompt tokens
    price_out: float = setting(0.0, at_most=1e6)  # dollars for a million answer tokens

    # filter
    min_richness: float = setting(0.0, at_most=5)  # filter: least judge score; 0: not checked
    min_alignment: float = setting(0.0, at_most=5)  # filter: least judge score; 0: not checked
    min_words: int = setting(3, at_most=10**6)  # filter: fewest words of a caption
    max_words: int = setting(400, at_most=10**6)  # filter: most words of a caption
    # filter: largest share of word 3-grams that occurred before
    max_repetition: float = setting(0.3, at_most=1)
    script: Literal["latin", "cjk", "cyrillic", "arabic", "devanagari"] = "latin"  # filter: wanted
    min_script: float = setting(0.5, at_most=1)  # filter: share of letters in it
    # filter: share of captions that may have one 4-gram; 0: any
    max_ngram_share: float = setting(0.0, at_most=1)

    # report
    references: str = setting("", files=True)  # report: shards whose captions count as correct
    pictures: int = setting(60, at_most=10**6)  # report: pictures on the page
    pairs: str = ""  # report: folder of dedup whose pairs at the threshold are shown

    # plan
    ranks: int = setting(1, at_least=1, at_most=10**6)  # plan: processes of one core each
    picture_kb: float = setting(100.0, above=0, at_most=1e6)  # plan: mean size of a picture
    compared: float = setting(1.0, at_most=1e3)  # plan: comparisons of dedup for each picture

    # quick, composition, incremental
    stage: str = "instruction"  # quick, composition, incremental: the stage of sft.py to train
    sft: str = "config/sft_2b.py"  # the same: flags of sft.py
    eval: str = "--benchmarks=all --data_dir=LMUData"  # the same: flags of eval.py
    run: bool = False  # the same: run the commands instead of printing them


CURATION_STAGES = ("collect", "dedup", "select", "annotate", "recaption", "score", "filter",
                   "report", "plan", "sft-quality", "quick", "composition", "incremental")


def run_named_stage(cfg, stage):
    if stage == "collect":
        collect_pictures(cfg)
    elif stage == "dedup":
        drop_near_duplicates(cfg)
    elif stage == "select":
        select_balanced(cfg)
    elif stage in ("annotate", "recaption"):
        write_captions(cfg, stage)
    elif stage in ("score", "sft-quality"):
        judge_rows(cfg, stage)
    elif stage == "filter":
        filter_captions(cfg)
    elif stage == "report":
        report_captions(cfg)
    elif stage == "plan":
        print_curation_plan(cfg)
    else:
        run_tier(cfg, stage)


def main():
    cfg = Config()
    usage = f"python curate.py {'|'.join(CURATION_STAGES)} --in=... --out=...; --help lists flags"
    stage, flags = subcommand({name: name for name in CURATION_STAGES}, usage, cfg)
    configure(cfg, flags or ["--help"])
    run_named_stage(cfg, stage)


if __name__ == "__main__":
    run_script(main)
