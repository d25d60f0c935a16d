"""Stage filter: drop captions below thresholds, and some of those with stock phrases."""
import numpy as np

from curation.balance import random_rank
from curation.rows import row_caption, row_scores
from curation.shards import all_inputs_hash, read_records
from curation.stages import run_stage
from curation.text import caption_words, ngram_keys, repeated_share, script_share

# Counters of 4-grams. Some 4-grams share a counter; where a 4-gram is common, few do.
NGRAM_COUNTERS = 2**22
# What is read of a row. What passes is trained on, so that a row has to be readable there.
FILTER_FIELDS = ("id", "caption", "scores", "dialogue")
# The settings that decide what filter lets through.
FILTER_SETTINGS = ("min_richness", "min_alignment", "min_words", "max_words", "max_repetition",
                   "script", "min_script", "max_ngram_share", "seed")


def filter_captions(cfg):
    """Drop captions that fail a threshold; with --max_ngram_share also thin out stock phrases.

    A caption whose most common 4-gram occurs in a share s of all captions stays with probability
    max_ngram_share / s.
    """
    if cfg.min_words > cfg.max_words:
        raise ValueError(f"min_words={cfg.min_words} is more than max_words={cfg.max_words}; "
                         "change one of them")

    shares = np.zeros(NGRAM_COUNTERS)

    def prepare(ranks, inputs, missing):
        shares[:] = ngram_shares(cfg, ranks, inputs)

    def process(shard, counts):
        for record in read_records(shard, FILTER_FIELDS):
            reason = record.reason or caption_problem(cfg, record.row)
            if not reason and cfg.max_ngram_share:
                highest = shares[ngram_counters(record.row)].max(initial=0)
                # Not the ranks of select: it has kept the rows with low ones.
                rank = random_rank(f"filter {cfg.seed}", record.row["id"])
                if rank * highest > cfg.max_ngram_share:
                    reason = "homogeneous"
            yield record._replace(reason=reason)

    settings = {name: getattr(cfg, name) for name in FILTER_SETTINGS}
    # With --max_ngram_share a shard depends on all the others.
    needs_all = bool(cfg.max_ngram_share)
    run_stage(cfg, "filter", process, prepare if needs_all else None, **settings,
              inputs=all_inputs_hash(cfg) if needs_all else None)


def caption_problem(cfg, row):
    """The first reason against the caption of a checked row, or None."""
    text = row_caption(row)
    scores = row_scores(row)
    for name, least in (("richness", cfg.min_richness), ("alignment", cfg.min_alignment)):
        if least and name not in scores:
            return "not_scored"
        if least and scores[name] < least:
            return f"low_{name}"
    n_words = len(caption_words(text))
    if n_words < cfg.min_words:
        return "too_short"
    if n_words > cfg.max_words:
        return "too_long"
    if repeated_share(text) > cfg.max_repetition:
        return "repetitive"
    if script_share(text, cfg.script) < cfg.min_script:
        return "other_script"
    return None


def ngram_counters(row):
    """The numbers of the counters of a caption's 4-grams, each once."""
    keys = ngram_keys([caption_words(row_caption(row))], 4)
    return np.unique(keys & np.uint64(NGRAM_COUNTERS - 1))


def ngram_shares(cfg, ranks, inputs):
    """Share of all captions that have a 4-gram, by counter: (NGRAM_COUNTERS,) float64."""
    counts = np.zeros(NGRAM_COUNTERS, np.int64)
    n_captions = 0
    for shard in ranks.deal(inputs):
        for record in read_records(shard, FILTER_FIELDS, with_pictures=False):
            if not record.reason and not caption_problem(cfg, record.row):
                counts[ngram_counters(record.row)] += 1
                n_captions += 1
    n_captions = ranks.sum(np.array([n_captions]))[0]
    return ranks.sum(counts) / max(1, n_captions)
