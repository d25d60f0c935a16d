"""Records of tars: training and curation read one and the same text, and lose none in silence."""
import json

import pytest
from curation_helpers import dropped_rows, png, run_well, write_tar
from rows import sources_of
from toy_endpoint import read_shards

from inputs.dialogue import conversation


def pictures():
    """Names and bytes of pictures, all different."""
    for k in range(100):
        yield png((k, 2 * k, 9), (70, 70))


def members_of(records):
    """Tar members of {record: [(suffix, bytes), ...]}, with a picture first in each."""
    members = []
    for (name, files), picture in zip(records.items(), pictures(), strict=False):
        suffix = ".JPG" if name.isupper() else ".jpg"
        members.append((name + suffix, picture))
        members += [(name + ending, content) for ending, content in files]
    return members


def training_texts(path):
    """Row -> its text, or why it is unreadable, as training sees a tar."""
    (source,) = sources_of(path)
    bad = {entry["row"]: entry["reason"] for entry in source.meta["bad"]}
    texts = []
    for i in range(len(source.rows)):
        texts.append(bad.get(i) or conversation(source.row(i))[1][0][1])
    return texts


def curated_texts(folder, out):
    """{record: its text} as collect keeps it, {record: reason} of those that it drops."""
    run_well("collect", f"--in={folder}", f"--out={out}")
    kept = {row["source_id"]: row["caption"] for row in read_shards(out)}
    return kept, {row["id"]: row["reason"] for row in dropped_rows(out)}


# What a record holds beside its picture -> its text; None: it is ambiguous and therefore refused.
TEXTS = {
    "UPPER": ([(".TXT", b"in upper case")], "in upper case"),
    "JASON": ([(".JSON", b'{"caption": "upper json"}')], "upper json"),
    "null": ([(".txt", b"beside null"), (".json", b'{"caption": null}')], "beside null"),
    "blank": ([(".txt", b"beside blank"), (".json", b'{"caption": "  "}')], "beside blank"),
    "absent": ([(".json", b'{"url": "u"}'), (".txt", b"beside none")], "beside none"),
    "bom": ([(".txt", b"\xef\xbb\xbfwith bom")], "with bom"),
    "bom2": ([(".txt", b"\xef\xbb\xbfbom too"), (".json", b"{}")], "bom too"),
    "own": ([(".txt", b"the json\n"), (".json", b'{"caption": "the json"}')], "the json"),
    "other": ([(".txt", b"its text"), (".json", b'{"text": "its text"}')], "its text"),
    "two": ([(".a.txt", b"first"), (".b.txt", b"second")], None),
    "case": ([(".txt", b"first"), (".TXT", b"second")], None),
    "jsons": ([(".json", b'{"caption": "first"}'), (".meta.json", b"{}")], None),
    "same": ([(".txt", b"first"), (".txt", b"first, corrected")], None),
    "photos": ([(".jpg", png((1, 2, 3), (70, 70))), (".txt", b"two of one name")], None),
}


@pytest.mark.parametrize("name", TEXTS)
def test_curation_reads_the_same_text_of_a_record_as_training_and_names_what_is_ambiguous(
    tmp_path, name
):
    files, want = TEXTS[name]
    path = write_tar(tmp_path / "in" / "t.tar", members_of({name: files}))
    (trained,) = training_texts(path)
    kept, dropped = curated_texts(tmp_path / "in", tmp_path / "c")
    if want is None:
        assert " in one record" in trained
        assert kept == {} and dropped == {name: "bad_record"}
    else:
        assert trained == want
        assert kept == {name: want} and dropped == {}


@pytest.mark.parametrize("key", ["caption", "text"])
def test_two_captions_that_differ_are_refused_in_tars_and_in_folders(tmp_path, key):
    row = json.dumps({key: "of the json"}).encode()
    files = {"a": [(".txt", b"of the txt"), (".json", row)]}
    path = write_tar(tmp_path / "in" / "t.tar", members_of(files))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in members_of(files):
        (folder / name).write_bytes(content)
    for source in (path, folder):
        (reason,) = training_texts(source)
        assert reason == "the .txt and the caption in the .json differ; keep one of them"
    for k, source in enumerate((path, folder)):
        kept, dropped = curated_texts(source, tmp_path / f"c{k}")
        assert kept == {} and list(dropped.values()) == ["bad_row"]


def test_the_files_of_a_folder_are_read_as_those_of_a_tar(tmp_path):
    for name, content in zip("abc", pictures(), strict=False):
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "a.json").write_text('{"width": 70}')
    (tmp_path / "a.txt").write_text("beside a row without a caption")
    (tmp_path / "b.json").write_text('{"caption": "B.", "image": "c.png"}')
    (tmp_path / "c.json").write_text('{"caption": "C.", "image": "photos/c.png"}')
    first, other, own = training_texts(tmp_path)
    assert first == "beside a row without a caption" and own == "C."
    assert other.startswith("b.json names c.png")


def test_of_several_pictures_a_record_says_which_are_meant(tmp_path):
    """photo.jpg beside photo.mask.png: its caption is of one of them, and nobody says of which."""
    first, second, *_ = pictures()
    members = []
    for key, row in (("a", {"caption": "A."}), ("b", {"caption": "B.", "image": "b.jpg"})):
        members += [(f"{key}.jpg", first), (f"{key}.mask.png", second)]
        members.append((f"{key}.json", json.dumps(row).encode()))
    path = write_tar(tmp_path / "in" / "t.tar", members)
    reason, text = training_texts(path)
    assert reason.startswith("2 pictures (a.jpg, a.mask.png)") and text == "B."
    kept, dropped = curated_texts(tmp_path / "in", tmp_path / "c")
    assert kept == {"b": "B."} and dropped == {"a": "bad_row"}


def test_a_key_that_stands_twice_in_a_row_and_a_txt_that_is_no_utf8_are_named(tmp_path):
    twice = b'{"caption": "first", "caption": "second"}'
    files = {"a": [(".json", twice)], "b": [(".txt", "Bär".encode("latin1"))]}
    path = write_tar(tmp_path / "t.tar", members_of(files))
    key, text = training_texts(path)
    assert "the key caption stands twice" in key
    assert "a .txt that is not UTF-8 text" in text


def test_dots_in_names_do_not_make_one_sample_of_two(tmp_path):
    members = members_of({"photo.2024.01": [(".txt", b"one")], "photo.2024.02": [(".txt", b"two")]})
    path = write_tar(tmp_path / "in" / "dots.tar", members)
    (reason,) = training_texts(path)
    assert "2 .txt in one record (photo.2024.01.txt, photo.2024.02.txt)" in reason
    kept, dropped = curated_texts(tmp_path / "in", tmp_path / "c")
    assert kept == {} and dropped == {"photo": "bad_record"}


def test_pictures_come_in_the_order_of_the_row_and_only_those_it_names(tmp_path):
    row = {"image": ["x.2.png", "x.0.png"], "caption": "second, then the first"}
    members = [(f"x.{k}.png", png((k, 0, 0), (70 + k, 70))) for k in range(3)]
    members.append(("x.json", json.dumps(row).encode()))
    path = write_tar(tmp_path / "in" / "t.tar", members)
    (source,) = sources_of(path)
    assert source.images["width"].tolist() == [72, 70]
    run_well("filter", f"--in={tmp_path}/in", f"--out={tmp_path}/f")
    (source,) = sources_of(f"{tmp_path}/f/t.tar")
    assert source.images["width"].tolist() == [72, 70]
