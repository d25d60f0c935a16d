"""curation/report.py and text.py: the numbers are those counted by hand, the page is safe."""
import json

from curation_helpers import png, run, run_well, write_tar

from curation import text

TEXTS = ["A red cat.", "a red cat", "a <b>blue</b> dog & a red cat"]


def collect_captions(folder, name, captions):
    members = []
    for i, caption in enumerate(captions):
        members.append((f"{i}.png", png((i, 0, 0), (70, 70))))
        members.append((f"{i}.txt", caption.encode()))
    write_tar(folder / name / "0.tar", members)
    run_well("collect", f"--in={name}={folder}/{name}", f"--out={folder}/{name}_c")


def test_numbers_are_those_counted_by_hand_and_the_page_escapes_text(tmp_path, monkeypatch):
    collect_captions(tmp_path, "one", TEXTS)
    collect_captions(tmp_path, "two", ["a red dog"] * 3)
    sets = f"--in=one={tmp_path}/one_c,two={tmp_path}/two_c"
    numbers = run_well("report", sets, f"--references={tmp_path}/one_c", f"--out={tmp_path}/r")
    _, printed = run("report", sets, f"--references={tmp_path}/one", f"--out={tmp_path}/r1")
    assert "no caption has an id" in printed

    # Words: a red cat | a red cat | a b blue b dog a red cat
    one = numbers["Diversity"]["one"]
    assert [one[f"unique_{n}grams"] for n in (1, 2, 3, 4)] == [6, 7, 6, 5]
    assert one["words"] == 14 and one["equal_to_another"] == 0
    assert numbers["Diversity"]["two"]["equal_to_another"] == 2
    assert numbers["Agreement"]["one, words"]["f1"] == 1.0
    # a red dog: 2 of 3 words twice, then 3 of 3 of 8
    two = numbers["Agreement"]["two, words"]
    assert two["precision"] == round((2 / 3 + 2 / 3 + 1) / 3, 4)
    assert two["recall"] == round((2 / 3 + 2 / 3 + 3 / 8) / 3, 4)
    assert "n-grams only" in numbers["note"] or "nltk" in numbers["note"]

    page = (tmp_path / "r" / "report.html").read_text()
    assert "&lt;b&gt;blue&lt;/b&gt; dog &amp;" in page and "<b>blue" not in page
    assert page.count("data:image") == 3

    kinds = {"cat": "NN", "dog": "NNS", "red": "JJ", "blue": "JJ"}

    def tag(words):
        return [(word, kinds.get(word, "DT")) for word in words]

    monkeypatch.setattr(text, "load_tagger", lambda: (tag, "a tagger made for this test"))
    run_well("report", sets, f"--out={tmp_path}/r2")
    one = json.loads((tmp_path / "r2" / "report.json").read_text())["Diversity"]["one"]
    assert [one[f"unique_{kind}"] for kind in ("nouns", "verbs", "adjectives")] == [2, 0, 2]
