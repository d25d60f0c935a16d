"""What the model sees of some data: its exact text, and its tiles and packs as a page."""
import html
import itertools
import re

import numpy as np

from inputs.chat import IGNORE, render
from inputs.files import write_atomic
from inputs.images import Image, picture_uri
from inputs.packing import REASON, Pack

STYLE = """
body { font: 14px sans-serif; margin: 2em }
div { background: #eee; height: 20px; display: flex }
i { display: block }
pre { white-space: pre-wrap }
mark { background: #bfb }
img { margin: 1px }
"""
IMAGE_RUN = re.compile("(<IMG_CONTEXT>)+")


def marked_text(row, dataset, n_tiles):
    """([(text, whether it is supervised)], tokens, supervised tokens) of a row.

    Runs of visual tokens are shortened.
    """
    ids, labels = render(row, dataset.tokenizer, dataset.template, n_tiles,
                         dataset.packs.settings.tokens_per_tile)
    # A label is about the token that follows.
    supervised = np.roll(labels, 1) != IGNORE
    parts = []
    for target, run in itertools.groupby(range(len(ids)), lambda t: supervised[t]):
        text = dataset.tokenizer.decode([ids[t] for t in run], skip_special=False)
        parts.append((IMAGE_RUN.sub(shorten, text), target))
    return parts, len(ids), supervised.sum()


def shorten(match):
    n = len(match[0]) // len(match[1])
    return f"<IMG_CONTEXT x {n}>"


def show_samples(dataset, n):
    """Print the exact text of the first n samples, supervised tokens in [[ ]]."""
    packs = dataset.packs
    samples, tokens, _ = packs.plan_samples(np.arange(min(n, packs.n)))
    for (s, i, n_tiles), planned in zip(samples, tokens, strict=True):
        source = packs.sources[s]
        if planned < 0:
            print(f"--- row {i + 1}: {REASON[planned]}; "
                  f"try: python data.py check {source.path}")
            continue
        row = source.row(i)
        parts, n_tokens, supervised = marked_text(row, dataset, n_tiles)
        print(f"--- row {i + 1}, id {row['id']}: {n_tokens} tokens, {supervised} supervised, "
              f"tiles {list(n_tiles)}")
        print("".join(f"[[{text}]]" if target else text for text, target in parts))


def preview_packs(dataset, n, out):
    """Write a page of the first n packs that needs no other file beside it.

    First the packs as bars of their documents, then the samples: their tiles in the order the
    model gets them, thumbnail last, and their text, supervised tokens marked.
    """
    packs = dataset.packs
    planned, dropped = packs.plan_window(0, 0)
    bars = []
    shown = []
    for number, pack in enumerate(planned[:n], 1):
        documents = []
        for k, sample in enumerate(pack.samples):
            batch = dataset[Pack([sample])]
            n_tokens = batch["size"]["tokens"]
            share = 100 * n_tokens / packs.settings.tokens_per_pack
            title = html.escape(f"{batch['ids'] or batch['bad']}: {n_tokens} tokens, "
                                f"{sum(sample[2])} tiles")
            style = f"width:{share:.2f}%;background:hsl({47 * k % 360} 60% 70%)"
            documents.append(f'<i style="{style}" title="{title}"></i>')
            shown.append(f"<h3>pack {number}: {title}</h3>"
                         + sample_html(dataset, sample, batch))
        bars.append(bar_html(number, pack, packs.settings, documents))
    body = "\n".join(bars + shown)
    write_atomic(out, '<!doctype html><meta charset="utf-8"><title>packs</title>'
                      f"<style>{STYLE}</style>{body}\n")
    print(f"{out}: {len(bars)} packs, {len(shown)} samples; in no pack: {dropped or 'none'}")


def bar_html(number, pack, settings, documents):
    """One pack as a line of numbers and a bar of its documents."""
    fill = pack.tokens / settings.tokens_per_pack
    return (f"<p>pack {number}: {len(pack.samples)} documents, "
            f"{pack.tokens} of {settings.tokens_per_pack} tokens ({fill:.1%}), "
            f"{pack.tiles} of {settings.tiles_per_pack} tiles</p>"
            f"<div>{''.join(documents)}</div>")


def sample_html(dataset, sample, batch):
    """The tiles and the marked text of a sample; batch: it alone."""
    pictures = []
    for tile in batch["tiles"]:
        image = Image.fromarray(tile.permute(1, 2, 0).numpy())
        pictures.append(f'<img src="{picture_uri(image.resize((112, 112)))}">')
    texts = []
    if batch["ids"]:  # else it could not be read
        s, i, n_tiles = sample
        parts, _, _ = marked_text(dataset.packs.sources[s].row(i), dataset, n_tiles)
        for text, target in parts:
            text = html.escape(text)
            texts.append(f"<mark>{text}</mark>" if target else text)
    return f"{''.join(pictures)}<pre>{''.join(texts)}</pre>"
