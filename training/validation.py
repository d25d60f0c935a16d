"""Losses on held-out data: of all of them together, and of each source where there are several."""
import collections
import re

from data import PackedDataset, held_out, stage_dataset
from inputs.packing import Packs
from training import metrics


def held_out_sets(cfg, stage, tokenizer, vision, dist):
    """{name of a validation loss: PackedDataset} of --val_data; {} if there is none.

    ValueError if the data cannot be used: now, and not at step val_every.
    """
    sets = {}
    if not cfg.val_data:
        return sets
    whole = stage_dataset(cfg, stage, tokenizer, vision, 1, cfg.val_data)
    sets["val_loss"] = whole
    for name, sources in sources_by_name(whole.packs.sources).items():
        packs = Packs(sources, whole.packs.settings)
        part = PackedDataset(packs, tokenizer, cfg.template, cfg.image_as, cfg.loss_weight)
        sets[f"val_loss/{name}"] = part
    for dataset in sets.values():
        next(held_out(dataset, 1, dist))
    return sets


def sources_by_name(sources):
    """{name: its sources}, {} if all have the same; shards differ in a number at the end alone."""
    groups = collections.defaultdict(list)
    for source in sources:
        groups[re.sub(r"[-_.]*\d+$", "", source.name) or source.name].append(source)
    return groups if len(groups) > 1 else {}


def validate(model, sets, n_packs, dist):
    """{name of a validation loss: the mean over n_packs of its data}, of held_out_sets."""
    return {name: metrics.validation_loss(model, held_out(dataset, n_packs, dist), dist)
            for name, dataset in sets.items()}
