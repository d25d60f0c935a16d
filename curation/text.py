"""Measures of captions as texts: words, n-grams, repetition, script, diversity, agreement.

Source of the measures: SAIL-VL (arXiv 2501.05952) compares caption sets by unique n-grams, nouns,
verbs and adjectives.
"""
import collections
import functools
import hashlib
import importlib
import re
import unicodedata

import numpy as np

CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
CAPTION_WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*")
# A character of each script that --script may name.
SCRIPTS = {
    "latin": r"[A-Za-z\u00c0-\u024f]",
    "cjk": f"[{CJK}]",
    "cyrillic": r"[\u0400-\u04ff]",
    "arabic": r"[\u0600-\u06ff]",
    "devanagari": r"[\u0900-\u097f]",
}
# What ends a sentence: Latin, Chinese and Japanese, Arabic, Urdu, Hindi, Burmese, Khmer, Amharic,
# Armenian.
STOPS = ".!?…‥。．｡！？؟۔।॥။។።։"
# May follow a stop: quotes, marks of Markdown; by their categories brackets, blanks and emojis.
CLOSING_MARKS = "\"'*_`~"
CLOSING_KINDS = ("Pe", "Pf", "Pi", "Zs", "Cc", "Cf", "Mn", "So", "Sk")
# The first two letters of Penn Treebank tags.
WORD_CLASSES = {"nouns": "NN", "verbs": "VB", "adjectives": "JJ"}
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio (Knuth)


# ---- words and n-grams ---------------------------------------------------------------------------


def caption_words(text):
    """Lower-case words of a text. A Chinese, Japanese or Korean character is a word of its own."""
    return CAPTION_WORD.findall(text.lower())


@functools.lru_cache(2**16)
def word_key(word):
    """A 64-bit number that depends on nothing but the word."""
    digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def ngram_keys(lists, n):
    """A 64-bit key, uint64, of every n-gram of lists of words. No n-gram spans two lists."""
    keys_of_words = (word_key(word) for words in lists for word in words)
    flat = np.fromiter(keys_of_words, np.uint64)
    owner = np.repeat(np.arange(len(lists)), [len(words) for words in lists])
    count = max(0, len(flat) - n + 1)
    keys = np.zeros(count, np.uint64)
    for k in range(n):
        # uint64 wraps around, which is what a hash wants.
        keys = (keys ^ flat[k : k + count]) * HASH_MULTIPLIER + np.uint64(k)
    same_list = owner[:count] == owner[n - 1 : n - 1 + count]
    return keys[same_list]


def repeated_share(text, n=3):
    """Share of a caption's n-grams that occurred before: 0 if none repeats, near 1 in a loop."""
    words = caption_words(text)
    ngrams = [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]
    if not ngrams:
        return 0.0
    return 1 - len(set(ngrams)) / len(ngrams)


def script_share(text, script):
    """Share of the letters that belong to this script; 1 for a text without letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 1.0
    of_script = re.compile(SCRIPTS[script])
    return sum(1 for letter in letters if of_script.match(letter)) / len(letters)


def ends_with_a_stop(text):
    """Whether a text ends in a full stop or the like; quotes and brackets may follow it."""
    for character in reversed(text):
        if character in STOPS:
            return True
        if character not in CLOSING_MARKS:
            if unicodedata.category(character) not in CLOSING_KINDS:
                return False
    return False


# ---- sets of captions ----------------------------------------------------------------------------


def load_tagger():
    """(a function from words to (word, tag) pairs, its name); (None, the reason) without nltk."""
    try:
        nltk = importlib.import_module("nltk")
        nltk.pos_tag(["a"])
        return nltk.pos_tag, f"nltk {nltk.__version__}"
    except ImportError:
        return None, "n-grams only: for nouns, verbs and adjectives pip install nltk"
    except LookupError:
        return None, ("n-grams only: nltk has no tagger yet: "
                      "python -m nltk.downloader averaged_perceptron_tagger_eng")


def diversity(texts, tag=None):
    """Diversity of a set of captions, {column: number}: words, lengths, unique n-grams and words.

    tag: a tagger as load_tagger gives it, for unique nouns, verbs and adjectives.
    """
    lists = [caption_words(text) for text in texts]
    lengths = np.array([len(words) for words in lists] or [0])
    table = {
        "captions": len(texts),
        "words": int(lengths.sum()),
        "mean_words": round(float(lengths.mean()), 2),
        "words_5_50_95": [int(q) for q in np.percentile(lengths, (5, 50, 95))],
        "equal_to_another": len(texts) - len(set(texts)),
    }
    for n in (1, 2, 3, 4):
        table[f"unique_{n}grams"] = len(np.unique(ngram_keys(lists, n)))
    if tag:
        tagged = {(word, kind[:2]) for words in lists for word, kind in tag(words)}
        for name, kind in WORD_CLASSES.items():
            table[f"unique_{name}"] = sum(1 for _, found in tagged if found == kind)
    return table


def agreement(texts, references, tag=None):
    """Mean precision, recall and F1 (0 to 1) of captions against their references.

    Returns {"words": {"precision", "recall", "f1"}}, words counted as often as they occur. With a
    tagger also "nouns" and "adjectives", as sets: the objects and attributes of CAPTURE (arXiv
    2405.19092) as far as tags go. Its relations, synonyms and soft matches need a scene-graph
    parser and are left out.
    """
    if not texts:
        return {}
    means = {}
    for name in ("words", "nouns", "adjectives") if tag else ("words",):
        scores = []
        for text, reference in zip(texts, references, strict=True):
            found = count_words(text, name, tag)
            wanted = count_words(reference, name, tag)
            scores.append(overlap_scores(found, wanted))
        mean = np.mean(scores, 0).round(4).tolist()
        means[name] = dict(zip(("precision", "recall", "f1"), mean, strict=True))
    return means


def count_words(text, name, tag):
    """A Counter of the words of a text; of its nouns or adjectives, each counts once."""
    words = caption_words(text)
    if name == "words":
        return collections.Counter(words)
    kind = WORD_CLASSES[name]
    return collections.Counter({word for word, found in tag(words) if found[:2] == kind})


def overlap_scores(found, wanted):
    """Precision, recall and F1, a (3,) array, of one Counter of words against another."""
    hits = (found & wanted).total()
    precision = hits / max(1, found.total())
    recall = hits / max(1, wanted.total())
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return np.array([precision, recall, f1])
