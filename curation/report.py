"""Stage report: sets of captions side by side, as numbers and as a page with pictures."""
import collections
import contextlib
import html
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from curation import text
from curation.rows import is_number, row_caption, row_scores
from curation.shards import InputShard, find_input_shards, read_records
from inputs import files
from inputs.images import load_image, picture_uri

# What is read of a row.
REPORT_FIELDS = ("id", "caption", "scores")
STYLE_FILE = Path(__file__).parent.parent / "evals" / "style.css"


@dataclass
class CaptionSets:
    """What the report knows of the sets in --in."""
    captions: dict = field(default_factory=lambda: collections.defaultdict(dict))  # {set: {id: }}
    histograms: dict = field(default_factory=dict)  # {"set, score": {1: rows, ..., 5: rows}}
    left_out: collections.Counter = field(default_factory=collections.Counter)  # rows, by reason
    pictures: dict = field(default_factory=dict)  # {id: data URI}, some of the first set


def report_captions(cfg):
    """Write report.html and report.json, and print the numbers.

    --in=name=shards,... Diversity of each set, histograms of its scores, and its agreement with
    the captions in --references.
    """
    tag, note = text.load_tagger()
    references = read_references(cfg)
    sets = read_caption_sets(cfg)
    if sets.left_out:
        note += f"; rows left out: {dict(sets.left_out)}"
    agreements = agreement_table(sets, references, tag)
    tables = {"Diversity": {}}
    for name, captions in sets.captions.items():
        tables["Diversity"][name] = text.diversity(list(captions.values()), tag)
    if sets.histograms:
        tables["Scores"] = sets.histograms
    if agreements:
        tables["Agreement"] = agreements

    out = Path(cfg.out or "out/captions")
    out.mkdir(parents=True, exist_ok=True)
    page = caption_page(sets, tables, note, pair_cards(cfg))
    files.write_atomic(out / "report.html", page)
    numbers = json.dumps({"note": note, **tables}, indent=1)
    files.write_atomic(out / "report.json", numbers + "\n")

    for title, rows in tables.items():
        for name, row in rows.items():
            line = ", ".join(f"{k} {v}" for k, v in row.items())
            print(f"{title} {files.printable(name)}: {line}")
    if references and not agreements:
        note += "; no caption has an id of the references"
    print(f"{note}\nwrote {out / 'report.html'} and {out / 'report.json'}")


def read_references(cfg):
    """{id: caption} of the rows in --references."""
    if not cfg.references:
        return {}
    references = {}
    for shard in find_input_shards(cfg, cfg.references):
        for record in read_records(shard, REPORT_FIELDS, with_pictures=False):
            if not record.reason:
                references[record.row["id"]] = row_caption(record.row)
    return references


def read_caption_sets(cfg):
    """Read all captions and scores, and the first --pictures pictures of the first set."""
    sets = CaptionSets()
    shards = find_input_shards(cfg)
    for shard in tqdm(shards, desc="report", unit="shard", disable=None):
        for record in read_records(shard, REPORT_FIELDS):
            if record.reason:
                sets.left_out[record.reason] += 1
                continue
            captions = sets.captions[shard.origin]
            key = record.row["id"]
            if key in captions:  # in shards that curate.py has not made
                key = f"{shard.name}/{key}"
            captions[key] = row_caption(record.row)
            count_scores(sets.histograms, shard.origin, row_scores(record.row))
            wanted = len(sets.pictures) < cfg.pictures and shard.origin == shards[0].origin
            if wanted and record.pictures:
                with contextlib.suppress(ValueError):
                    image = load_image(next(iter(record.pictures.values())))
                    sets.pictures[key] = picture_uri(image)
    return sets


def count_scores(histograms, set_name, scores):
    """Count a row's scores of 1 to 5 in {"set, score": {1: rows, ..., 5: rows}}, in place."""
    for name, value in scores.items():
        if is_number(value) and value in range(1, 6):
            empty = dict.fromkeys(range(1, 6), 0)
            histograms.setdefault(f"{set_name}, {name}", empty)[value] += 1


def agreement_table(sets, references, tag):
    """{"set, words": {"captions", "precision", "recall", "f1"}} for captions with a reference."""
    table = {}
    for name, captions in sets.captions.items():
        ids = [key for key in captions if key in references]
        texts = [captions[key] for key in ids]
        wanted = [references[key] for key in ids]
        for what, values in text.agreement(texts, wanted, tag).items():
            table[f"{name}, {what}"] = {"captions": len(ids), **values}
    return table


# ---- the page ------------------------------------------------------------------------------------


def caption_page(sets, tables, note, pairs):
    """A self-contained HTML page: tables, pairs, then pictures with the captions of each set.

    tables: {title: {row: {column: value}}}. pairs: cards of pair_cards. All text is escaped.
    """
    style = STYLE_FILE.read_text("utf-8")
    page = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Captions</title>"
            f"<style>{style}</style><h1>Captions</h1>"]
    page.append(html_cell("p", note))
    for title, rows in tables.items():
        page.append(html_cell("h2", title) + html_table(rows))
    if pairs:
        page.append("<h2>Pairs at the threshold of dedup</h2><div class=cards>")
        page += [*pairs, "</div>"]
    page.append("<h2>Pictures</h2><div class=cards>")
    for key, uri in sets.pictures.items():
        page.append(html_card(sets, key, uri))
    page.append("</div></html>")
    # A lone surrogate, which JSON may hold, has no UTF-8.
    return "\n".join(page).encode("utf-8", "replace").decode()


def pair_cards(cfg):
    """HTML of the pairs nearest to the threshold of the dedup in --pairs, at most --pictures."""
    if not cfg.pairs:
        return []
    path = Path(cfg.pairs) / "near_pairs.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"--pairs={cfg.pairs} has no near_pairs.jsonl: give a folder that "
                                "dedup has written")
    cards = []
    for line in path.read_text("utf-8").splitlines()[: cfg.pictures]:
        pair = json.loads(line)
        shots = []
        for file, number in pair.pop("records"):
            if not Path(file).exists():
                raise FileNotFoundError(f"{file} is gone: --pairs shows the pictures that dedup "
                                        "read, so keep its input until you have looked")
            records = read_records(InputShard("", Path(file)))
            record = next(itertools.islice(records, number, None))
            image = load_image(next(iter(record.pictures.values())))
            shots.append(f'<div class=shot><img src="{picture_uri(image)}" alt=""></div>')
        said = "merged: " if pair["margin"] >= 0 else "not merged: "
        said += ", ".join(f"{name} {value}" for name, value in pair.items())
        cards.append(f'<div class="card free">{"".join(shots)}{html_cell("p", said)}</div>')
    return cards


def html_cell(tag, value):
    return f"<{tag}>{html.escape(str(value))}</{tag}>"


def html_row(tag, values):
    return "<tr>" + "".join(html_cell(tag, value) for value in values) + "</tr>"


def html_table(rows):
    """{row: {column: value}} as a table; a row that lacks a column is empty there."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["<table>" + html_row("th", ["", *columns])]
    for name, row in rows.items():
        lines.append(html_row("td", [name, *(row.get(column, "") for column in columns)]))
    return "\n".join([*lines, "</table>"])


def html_card(sets, key, uri):
    """One picture with the captions that each set has for it."""
    lines = []
    for name, captions in sets.captions.items():
        caption = html.escape(captions.get(key, "(none)"))
        lines.append(f"<div><span class=soft>{html.escape(name)}</span> {caption}</div>")
    return (f'<div class="card free"><div class=shot><img src="{uri}" alt=""></div>'
            f"<div class=text>{''.join(lines)}</div></div>")
