"""Benchmark files: rows, pictures, downloads."""

import base64
import dataclasses
import hashlib
import http.server
import io
import os
import random
import threading
import tracemalloc
from types import SimpleNamespace

import pytest
from benchmark_rows import picture, write_tsv
from PIL import Image

from evals import files, table

TOY_OCR = table.TOY["toy_ocr"]


def test_pictures_by_reference_by_list_and_by_path(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "p.png")
    Image.new("RGB", (11, 11)).save(tmp_path / "q.png")
    row = {"image": "", "image_path": "", "question": "q", "answer": "x"}
    rows = [
        {"index": "7", **row, "image": "9", "question": 'a\tb\n"c"'},
        {"index": "9", **row, "image": picture()},
        {"index": "8", **row, "image_path": "p.png"},
        {"index": "6", **row},
        {"index": "5", **row, "image": repr([picture(size=(20, 20)), picture(size=(30, 30))])},
        {"index": "4", **row, "image_path": "['p.png', 'q.png']"},
        {"index": "3", **row, "image": "5"},
        {"index": "2", **row, "image": "['9', '5']", "image_path": "not/there.png"},
    ]
    got = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR)
    assert [row["image"] for row, _ in got] == ["9", "9", "", "", "5", "", "5", "['9', '5']"]
    assert got[0][0]["question"] == 'a\tb\n"c"'
    sizes = [[files.open_picture(row, one).size[0] for one in pictures] for row, pictures in got]
    assert sizes == [[84], [84], [10], [], [20, 30], [10, 11], [20, 30], [84, 20, 30]]
    assert len(files.read_rows(tmp_path / "t.tsv", TOY_OCR, 2)) == 2


def test_rows_are_read_without_their_pictures(tmp_path):
    big = "A" * 2_000_000  # 60 MB of pictures
    path = write_tsv(
        tmp_path / "t.tsv",
        [{"index": i, "image": big, "question": "q", "answer": "x"} for i in range(30)],
    )
    tracemalloc.start()
    pairs = files.read_rows(path, TOY_OCR)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(pairs) == 30 and peak < 25e6, peak


def test_pictures_go_through_jpeg_as_on_vlmevalkits_disk(tmp_path):
    image = Image.effect_noise((40, 40), 90).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 40)))
    image.save(file := io.BytesIO(), "PNG")
    cell = base64.b64encode(file.getvalue()).decode()
    row = {"index": "1", "image": cell, "image_path": "", "question": "q", "answer": "x"}
    rows = [
        row,
        row | {"index": "2", "image": repr([cell, cell]), "image_path": "['a.png', 'b.jpg']"},
    ]
    (one, (place,)), (two, (png, jpg)) = files.read_rows(
        write_tsv(tmp_path / "t.tsv", rows), TOY_OCR
    )
    image.convert("RGB").save(file := io.BytesIO(), "JPEG")
    stored = Image.open(file).convert("RGB")
    assert (
        files.open_picture(one, place, True).tobytes()
        == files.open_picture(two, jpg, True).tobytes()
        == stored.tobytes()
    )
    assert (
        image.convert("RGB").tobytes()
        == files.open_picture(two, png, True).tobytes()
        != stored.tobytes()
    )
    assert files.open_picture(one, place).tobytes() not in (
        stored.tobytes(),
        image.convert("RGB").tobytes(),
    )  # on white


def test_pictures_of_vlmevalkits_protocols_stay_as_they_lie(tmp_path):
    image, exif = Image.effect_noise((20, 10), 90).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    cell = base64.b64encode((tmp_path / "turned.jpg").read_bytes()).decode()
    row = {"index": "1", "image": cell, "image_path": "", "question": "q", "answer": "x"}
    rows = [row, row | {"index": "2", "image": "", "image_path": "['turned.jpg', 'clear.png']"}]
    (one, (place,)), (two, (turned, clear)) = files.read_rows(
        write_tsv(tmp_path / "t.tsv", rows), TOY_OCR
    )
    lying = Image.open(tmp_path / "turned.jpg").convert("RGB")
    assert files.open_picture(
        two, turned, True
    ).tobytes() == lying.tobytes() and files.open_picture(two, turned).size == (10, 20)
    assert files.open_picture(two, clear, True).tobytes() == image.convert("RGB").tobytes()
    assert files.open_picture(two, clear).getextrema() == ((255, 255),) * 3
    lying.save(file := io.BytesIO(), "JPEG")
    assert (
        files.open_picture(one, place, True).tobytes() == Image.open(file).convert("RGB").tobytes()
    )
    assert files.open_picture(one, place).size == (10, 20)


def test_rows_without_a_picture_are_left_out_as_in_vlmevalkit_and_counted(tmp_path, capsys):
    row = {"image": picture(), "question": "q", "answer": "Yes", "l2-category": "x"}
    rows = [
        row | {"index": "f_0_0_1_0_0"},
        row | {"index": "f_0_0_2_0_0", "image": ""},
        row | {"index": "f_0_0_3_0_0", "image": "f_0_0_1_0_0"},
    ]
    kept = [rows[0]["index"], rows[2]["index"]]
    b = table.find_benchmark("HallusionBench")
    got = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), b)
    assert [row["index"] for row, _ in got] == kept
    assert "1 rows without a picture are left out" in capsys.readouterr().err
    assert len(files.read_rows(tmp_path / "t.tsv", TOY_OCR)) == 3 and not capsys.readouterr().err
    assert [row["index"] for row, _ in files.read_rows(tmp_path / "t.tsv", b, 2)] == kept
    with pytest.raises(ValueError, match="no rows with a picture"):
        files.read_rows(write_tsv(tmp_path / "t.tsv", [rows[1]]), b)
    write_tsv(tmp_path / "t.tsv", [{key: r[key] for key in r if key != "image"} for r in rows])
    assert (
        len(files.read_rows(tmp_path / "t.tsv", b)) == 3
    )  # a file without such a column asks without


@pytest.mark.parametrize(
    "text, message",
    [
        ("index\tquestion\n1\tq\n", "no column 'answer'"),
        ("", "an empty file"),
        ("index\tquestion\tanswer\n", "no rows under"),
        ("index\tquestion\tanswer\n1\tq\n", "line 2: not 3 columns"),
        ("index\tquestion\tanswer\n1\tq\ta\tb\n", "line 2: not 3 columns"),
        ("index\tquestion\tanswer\n1\tq\ta\n1\tq\ta\n", "line 3: index '1' stands twice"),
        ("index\tquestion\tanswer\n\tq\ta\n", "line 2: its index is empty"),
        ("index\tquestion\tanswer\n \tq\ta\n", "line 2: its index is empty"),
        ("index\timage\tquestion\tanswer\n1\t77\tq\ta\n", "'image': '77' is no row with a pic"),
        (b"index\tquestion\tanswer\n1\t\xff\xff\ta\n", "not a UTF-8"),
        ("index\tquestion\tanswer\tanswer\n1\tq\ta\tb\n", "more than 1 column 'answer'"),
        ('index\tquestion\tanswer\n1\tq\t"a\n2\tq\ta\n', "has no partner"),
        ('index\tquestion\tanswer\n1\tq\t"a', "has no partner"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        files.read_rows(path, TOY_OCR)


def test_a_line_of_tabs_that_a_spreadsheet_leaves_is_no_row(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"index\tquestion\tanswer\r\n1\tq\ta\r\n\t\t\r\n\r\n")
    rows, _ = files.read_tsv(tmp_path / "t.tsv")
    assert [row["index"] for row in rows] == ["1"]


def test_quotation_marks_that_are_fine(tmp_path):
    (tmp_path / "t.tsv").write_text(
        'index\tquestion\tanswer\n1\t5" tall\t"a\n\nb"\n\n2\t"q"\t"""a"""\n3\tq\t"a\n"'
    )
    assert [(row["question"], row["answer"]) for row in files.read_tsv(tmp_path / "t.tsv")[0]] == [
        ('5" tall', "a\n\nb"),
        ("q", '"a"'),
        ("q", "a\n"),
    ]


def test_missing_file_and_bad_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.tsv: no such file"):
        files.read_tsv(tmp_path / "none.tsv")
    rows = [
        {
            "index": "5",
            "image": base64.b64encode(b"no picture at all" * 9).decode(),
            "question": "q",
            "answer": "x",
        }
    ]
    ((row, (place,)),) = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR)
    with pytest.raises(ValueError, match="benchmark row 5"):
        files.open_picture(row, place)


def test_base64_of_urls_and_data_uris_are_pictures(tmp_path):
    rng = random.Random(0)
    image = Image.new("RGB", (30, 30))
    image.putdata([tuple(rng.randbytes(3)) for _ in range(900)])
    image.save(file := io.BytesIO(), "PNG")
    plain = base64.b64encode(file.getvalue()).decode()
    url_safe = base64.urlsafe_b64encode(file.getvalue()).decode()
    assert "-" in url_safe and "_" in url_safe
    cells = [
        plain,
        url_safe,
        url_safe.rstrip("="),
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;charset=utf-8;base64,{url_safe}",
        f"  {plain[:60]}\n{plain[60:]} ",
        repr([f"data:image/png;base64,{url_safe}"]),
    ]
    rows = [{"index": i, "image": c, "question": "q", "answer": "x"} for i, c in enumerate(cells)]
    for row, (place,) in files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR):
        assert files.open_picture(row, place).tobytes() == image.tobytes(), row


@pytest.mark.parametrize(
    "cell, message",
    [
        ("/data/pictures/of/a/benchmark/" + "very/" * 9 + "long.jpg", "'/data/pictures/of/a/'..."),
        ("data:image/png,%89PNG%0D%0A" + "%00" * 40, "is no base64 of a picture"),
        ("http://example.org/" + "a" * 60 + ".png", "is no base64 of a picture"),
        (base64.b64encode(b"no picture at all" * 9).decode(), "153 bytes"),
        ("A" * 65, "is no base64 of a picture"),
    ],
)
def test_an_image_cell_that_is_no_picture_is_named_by_row_and_column(tmp_path, cell, message):
    rows = [{"index": "5", "image": cell, "question": "q", "answer": "x"}]
    ((row, (place,)),) = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR)
    with pytest.raises(files.RowError, match="benchmark row 5, column 'image': ") as e:
        files.open_picture(row, place)
    assert message in str(e.value)


def test_a_picture_file_that_is_not_there_is_named_by_row_and_column(tmp_path):
    rows = [{"index": "5", "image_path": "not/there.png", "question": "q", "answer": "x"}]
    ((row, (place,)),) = files.read_rows(write_tsv(tmp_path / "t.tsv", rows), TOY_OCR)
    with pytest.raises(files.RowError, match="row 5, column 'image_path': .*there.png"):
        files.open_picture(row, place)


@pytest.fixture
def web():
    """A local server of the paths in `files`; `asked` are its requests.

    `cut` ends a reply after so many bytes.
    """
    files, asked, state = {}, [], SimpleNamespace(cut=None, ranges=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state.ranges else 0
            asked.append((self.path, start))
            data = files.get(self.path)
            if data is None or start >= len(data):
                return self.send_error(404 if data is None else 416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : state.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{server.server_port}/x/", files=files, asked=asked, state=state
    )
    server.shutdown()


def test_a_download_goes_on_where_it_was_cut_and_is_checked(web, tmp_path, monkeypatch):
    data = os.urandom(100_000)
    web.files["/x/MME.tsv"], web.state.cut = data, 40_000
    b = dataclasses.replace(table.find_benchmark("MME"), md5=hashlib.md5(data).hexdigest())
    with pytest.raises(ValueError, match="40000 of 100000 bytes.*run again.*MME.tsv .MD5 " + b.md5):
        files.download(b, tmp_path / "LMUData", web.url)
    web.state.cut = None
    files.download(b, tmp_path / "LMUData", web.url)
    assert (tmp_path / "LMUData" / "MME.tsv").read_bytes() == data and web.asked == [
        ("/x/MME.tsv", 0),
        ("/x/MME.tsv", 40_000),
    ]
    (tmp_path / "LMUData" / "MME.tsv").rename(
        tmp_path / "LMUData" / "MME.tsv.part"
    )  # all there, but not named
    files.download(b, tmp_path / "LMUData", web.url)
    web.state.ranges = False  # a server that knows no ranges sends all again
    (tmp_path / "LMUData" / "MME.tsv").rename(tmp_path / "LMUData" / "MME.tsv.part")
    files.download(b, tmp_path / "LMUData", web.url)
    assert [p.name for p in (tmp_path / "LMUData").iterdir()] == ["MME.tsv"]
    with pytest.raises(ValueError, match="is not that of the protocol"):
        files.download(table.find_benchmark("MME"), tmp_path, web.url)
    assert not (tmp_path / "MME.tsv").exists() and not (tmp_path / "MME.tsv.part").exists()
    with pytest.raises(ValueError, match="404.*POPE.tsv .MD5 c12f5acb"):
        files.download(table.find_benchmark("POPE"), tmp_path, web.url)
    monkeypatch.setattr(files, "ADDRESS", web.url.rstrip("/"))  # each file from its own folder
    web.files["/x/benchmarks/MMBench/MMBench_DEV_EN.tsv"] = web.files["/x/VLMEval/POPE.tsv"] = data
    for name in ("MMBench_DEV", "POPE"):
        files.download(dataclasses.replace(table.find_benchmark(name), md5=b.md5), tmp_path, "")
    assert sorted(p.name for p in tmp_path.glob("*.tsv")) == ["MMBench_DEV_EN.tsv", "POPE.tsv"]
    with pytest.raises(
        ValueError, match="--download_from=URL or put .*POPE.tsv .MD5 c12f5acb.* by hand"
    ):
        files.download(table.find_benchmark("POPE"), tmp_path, "http://127.0.0.1:9")
