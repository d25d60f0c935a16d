"""Texts of captions: words, diversity, agreement with references, what is wrong with one, a page that shows them.

Source of the measures: SAIL-VL (arXiv 2501.05952) compares caption sets by unique n-grams, nouns, verbs and adjectives.
"""
import collections, functools, hashlib, html, importlib, re
from pathlib import Path

import numpy as np

CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*")
SCRIPTS = {"latin": r"[A-Za-z\u00c0-\u024f]", "cjk": f"[{CJK}]", "cyrillic": r"[\u0400-\u04ff]",
           "arabic": r"[\u0600-\u06ff]", "devanagari": r"[\u0900-\u097f]"}
TAGS = {"nouns": "NN", "verbs": "VB", "adjectives": "JJ"}              # the first two letters of Penn Treebank tags

def words(text):
    """Lower-case words; a Chinese, Japanese or Korean character is a word of its own."""
    return WORD.findall(text.lower())

@functools.lru_cache(2 ** 16)
def word_key(word):
    """A 64-bit number that depends on nothing but the word."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")

def ngram_keys(lists, n):
    """A 64-bit key of every n-gram of lists of words."""
    flat = np.fromiter((word_key(word) for words in lists for word in words), np.uint64)
    owner = np.repeat(np.arange(len(lists)), [*map(len, lists)])
    m, keys = max(0, len(flat) - n + 1), np.zeros(max(0, len(flat) - n + 1), np.uint64)
    for k in range(n): keys = (keys ^ flat[k:k + m]) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(k)   # wraps around
    return keys[owner[:m] == owner[n - 1:n - 1 + m]]                     # an n-gram is inside one list

def repetition(text, n=3):
    """Share of a caption's n-grams that were there before: 0 where none repeats, near 1 in a loop."""
    listed = words(text)
    grams = [*zip(*(listed[k:] for k in range(n)))]
    return 1 - len({*grams}) / len(grams) if grams else 0.0

def script_share(text, script):
    """Share of the letters that are of this script, 1 for a text without letters."""
    letters = [c for c in text if c.isalpha()]
    return sum(bool(re.match(SCRIPTS[script], c)) for c in letters) / len(letters) if letters else 1.0

def tagger():
    """A function from words to (word, tag) pairs, nltk's, and how it is called; None and why where there is none."""
    try:
        nltk = importlib.import_module("nltk")
        nltk.pos_tag(["a"])
        return nltk.pos_tag, f"nltk {nltk.__version__}"
    except ImportError:
        return None, "n-grams only: for nouns, verbs and adjectives pip install nltk"
    except LookupError:
        return None, "n-grams only: nltk has no tagger yet: python -m nltk.downloader averaged_perceptron_tagger_eng"

def statistics(texts, tag=None):
    """The diversity table of a set of captions: counts of captions, words, unique n-grams, equal captions, lengths."""
    lists = [words(t) for t in texts]
    lengths = np.array([*map(len, lists)] or [0])
    out = {"captions": len(texts), "words": int(lengths.sum()), "mean_words": round(float(lengths.mean()), 2),
           "words_5_50_95": [int(q) for q in np.percentile(lengths, (5, 50, 95))],
           "equal_to_another": len(texts) - len({*texts})}
    out |= {f"unique_{n}grams": len(np.unique(ngram_keys(lists, n))) for n in (1, 2, 3, 4)}
    if tag:
        found = {(word, kind[:2]) for listed in lists for word, kind in tag(listed)}
        out |= {f"unique_{name}": sum(kind == short for _, kind in found) for name, short in TAGS.items()}
    return out

def agreement(texts, references, tag=None):
    """Mean precision, recall and F1 (0 to 1) of the words of captions against those of their references, each as often
    as it is there; with a tagger also of sets of nouns and of adjectives: the objects and attributes of CAPTURE (arXiv
    2405.19092) as far as tags go. Its relations, synonyms, soft matches need a scene-graph parser and are left out."""
    def overlap(have, want):
        hits = sum((have & want).values())
        p, r = hits / max(1, have.total()), hits / max(1, want.total())
        return np.array([p, r, 2 * p * r / (p + r) if hits else 0.0])
    readings = {"words": lambda text: collections.Counter(words(text))}
    for name in ("nouns", "adjectives") if tag else ():
        readings[name] = lambda text, kind=TAGS[name]: collections.Counter(
            {word for word, found in tag(words(text)) if found[:2] == kind})
    return {name: dict(zip(("precision", "recall", "f1"), np.mean(
        [overlap(read(a), read(b)) for a, b in zip(texts, references)], 0).round(4).tolist()))
        for name, read in readings.items()} if texts else {}

def page(sets, tables, shown, note):
    """A self-contained page: tables of numbers, {title: {row: {column: value}}}, then pictures with the captions of
    each set side by side. sets: {name: {id: caption}}; shown: {id: data URI of a picture}. All text is escaped."""
    style_file = Path(__file__).resolve().parent.parent / "evals" / "style.css"
    style = f"<style>{style_file.read_text(encoding='utf-8')}</style>"
    cell = lambda tag, value: f"<{tag}>{html.escape(str(value))}</{tag}>"
    out = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Captions</title>{style}<h1>Captions</h1>"]
    out.append(cell("p", note))
    for title, rows in tables.items():
        columns = [*dict.fromkeys(c for row in rows.values() for c in row)]
        out.append(cell("h2", title) + "<table><tr>" + "".join(cell("th", c) for c in ["", *columns]) + "</tr>")
        out += ["<tr>" + "".join(cell("td", v) for v in [name, *(row.get(c, "") for c in columns)]) + "</tr>"
                for name, row in rows.items()]
        out.append("</table>")
    out.append("<h2>Pictures</h2><div class=cards>")
    for key, uri in shown.items():
        said = "".join(f"<div><span class=soft>{html.escape(name)}</span> {html.escape(texts.get(key, '(none)'))}</div>"
                       for name, texts in sets.items())
        out.append(f'<div class="card free"><div class=shot><img src="{uri}" alt=""></div>'
                   f"<div class=text>{said}</div></div>")
    return "\n".join([*out, "</div></html>"]).encode("utf-8", "replace").decode()
