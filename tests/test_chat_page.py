"""The chat page of serve.py, used in a headless Chromium."""
import re
import shutil
import time

import pytest
from PIL import Image
from serving_helpers import serving
from test_eval import make_model_folder

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip("there is no chromium or google-chrome on the PATH", allow_module_level=True)

# No window, no sandbox (tests may run as root), no calls home.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-sync",
             "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("page") / "model")
    # Of random weights an answer does not end by itself.
    with serving(folder, endless=True, max_new_tokens=40) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    opened = browser.new_page()
    opened.set_default_timeout(20_000)
    asked_elsewhere = []
    home = f"http://127.0.0.1:{server.server_port}/"
    opened.on("request", lambda request: asked_elsewhere.append(request.url)
              if not request.url.startswith((home, "data:", "blob:")) else None)
    broken = []
    opened.on("pageerror", lambda error: broken.append(str(error)))
    opened.goto(home)
    yield opened
    opened.close()
    assert not asked_elsewhere and not broken


def ask(page, question):
    page.fill("#text", question)
    page.keyboard.press("Enter")


def test_a_picture_is_shown_as_the_tiles_of_the_model_and_asked_about_twice(page, server, tmp_path):
    Image.new("RGB", (84, 28), (200, 10, 10)).save(tmp_path / "a.png")
    page.set_input_files("#file", tmp_path / "a.png")
    page.wait_for_selector("#pictures .tiles img")
    tiles = server.assistant.tiles(str(tmp_path / "a.png"))
    assert page.locator("#pictures .tiles img").count() == len(tiles) > 2

    ask(page, "What is it?")
    page.locator(".tools button").first.wait_for()
    answer = page.locator(".turn:not(.mine) p").first.inner_text()
    prompt = server.assistant.prompt([("<image>\nWhat is it?", None)], [tiles])
    (expected,) = server.assistant.answers([prompt], max_new_tokens=40)
    squeeze = re.compile(r"\s+").sub
    assert squeeze(" ", answer).strip() == squeeze(" ", expected).strip()

    ask(page, "And now?")  # about the same picture
    page.locator(".tools button").nth(1).wait_for()
    turns = [(["", "\nWhat is it?"], answer), (["And now?"], None)]
    prompt = server.assistant.prompt(turns, [tiles])
    (expected,) = server.assistant.answers([prompt], max_new_tokens=40)
    second = page.locator(".turn:not(.mine) p").nth(1).inner_text()
    assert squeeze(" ", second).strip() == squeeze(" ", expected).strip()

    page.click("#anew")
    assert page.locator(".turn").count() == 0


def test_an_answer_comes_piece_by_piece_and_can_be_stopped(page, server, monkeypatch):
    step = server.assistant.texts
    monkeypatch.setattr(server.assistant, "texts", lambda tokens: slowly(step(tokens)))
    ask(page, "Tell me everything.")
    answer = page.locator(".turn:not(.mine) p")
    answer.filter(has_text=re.compile(r"\S")).wait_for()
    first = answer.inner_text()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    assert answer.inner_text().startswith(first)
    give_up = time.monotonic() + 20
    while server.engine.n_held:  # its row is free again
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_conversation_begun_anew_keeps_nothing_of_an_answer_at_work(page, server, monkeypatch):
    step = server.assistant.texts
    monkeypatch.setattr(server.assistant, "texts", lambda tokens: slowly(step(tokens)))
    ask(page, "Tell me everything.")
    page.locator(".turn:not(.mine) p").filter(has_text=re.compile(r"\S")).wait_for()
    page.fill("#text", "the next one")  # typed while the answer comes
    page.click("#anew")
    page.locator("#ask").wait_for()
    assert page.input_value("#text") == "the next one"
    with page.expect_request("**/completions") as asked:
        page.keyboard.press("Enter")
    assert len(asked.value.post_data_json["messages"]) == 1


def test_an_answer_that_is_cut_off_is_an_error_and_the_question_comes_back(page):
    page.route("**/completions", lambda route: route.fulfill(
        body='data: {"choices": [{"delta": {"content": "half"}}]}\n\n'))
    ask(page, "Tell me everything.")
    page.get_by_text("cut off. Your question is still here").wait_for()
    assert page.input_value("#text") == "Tell me everything."
    assert page.locator(".turn").count() == 0


def slowly(pieces):
    for piece in pieces:
        time.sleep(0.2)
        yield piece


def test_errors_can_be_read_and_lose_nothing(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.get_by_text("not a picture in one of the formats").wait_for()
    assert page.locator("#pictures img").count() == 0

    ask(page, "word " * 600)
    page.get_by_text("tokens; with its answer it may have").wait_for()
    assert page.input_value("#text").startswith("word word")
    assert page.locator(".turn").count() == 0


def test_the_keyboard_is_enough_and_a_phone_shows_all_of_it(page):
    page.set_viewport_size({"width": 390, "height": 800})
    seen = set()
    for _ in range(9):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.id"))
    assert {"temperature", "tiles", "anew", "text", "add", "ask"} <= seen
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
