"""What rows, names and endpoints say is shown in a terminal, and never steers it."""
import json

import pytest
from curation_helpers import png, run, write_tar
from toy_endpoint import Endpoint

from configurator import error_line
from curation import ask
from evals import endpoint as endpoint_client
from inputs.files import printable

ATTACK = "\x1b]0;owned\x07\x1b[2K\rerror: \x9b31m\u202e\u2028\x7f"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a red cat, 红色的猫, Ünïcode", "a red cat, 红色的猫, Ünïcode"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("one\ntwo\ttab\r", "one\\ntwo\\ttab\\r"),
        ("8-bit \x9b2J", "8-bit \\x9b2J"),
        ("turned \u202e \u2066", "turned \\u202e \\u2066"),
        ("lines \u2028 \x85", "lines \\u2028 \\x85"),
        ("half \ud83d", "half \\ud83d"),
        ("no\u00a0break, wide\u3000space", "no\u00a0break, wide\u3000space"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("tag \U000e0041", "tag \\U000e0041"),
        (5, "5"),
    ],
)
def test_what_would_steer_a_terminal_is_escaped_and_all_else_stays(text, want):
    assert printable(text) == want


def test_what_is_kept_is_shown_as_it_is():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def assert_harmless(text):
    """No character in what was printed steers a terminal, but for ends of lines."""
    assert printable(text, keep="\n\r") == text, repr(text)


def test_error_lines_of_hostile_names_steer_no_terminal(tmp_path):
    assert_harmless(error_line(ValueError(f"row {ATTACK} is bad")))
    assert_harmless(error_line(FileNotFoundError(2, "No such file", f"/x/{ATTACK}")))
    folder = tmp_path / "\x1b[31m\u202e"
    write_tar(folder / "\x1b]0;x\x07.tar", [("a.txt", b"x")])
    cut = folder / "\x9b2J.tar"
    cut.write_bytes(bytes(100))
    for argv in (
        ["collect", f"--in={folder}", f"--out={tmp_path}/o"],
        ["dedup", f"--in={folder}", f"--out={tmp_path}/p"],
        ["filter", f"--in={ATTACK}.tar", f"--out={tmp_path}/q"],
    ):
        code, text = run(*argv)
        assert code == 2
        assert_harmless(text)
        assert "\\x" in text


def test_rows_with_escape_sequences_steer_no_terminal_in_any_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_client, "WAIT_S", 0.01)
    titles = []
    real = ask.tqdm

    def bar(*args, **settings):
        titles.append(settings["desc"])
        return real(*args, **settings)

    monkeypatch.setattr(ask, "tqdm", bar)
    row = {
        "id": ATTACK,
        "caption": f"a red cat {ATTACK} on a mat",
        "scores": {f"richness{ATTACK}": 3, "richness": 4},
        ATTACK: ATTACK,
    }
    members = [("\x1b[31m.json", json.dumps(row).encode()), ("\x1b[31m.png", png((1, 2, 3)))]
    write_tar(tmp_path / "in" / "\x1b[2J\u202e.tar", members)
    endpoint = Endpoint({}, 0, 0)
    endpoint.reply = lambda sha256, prompt, temperature: (f"a cat {ATTACK}", "stop")
    asking = [f"--endpoint={endpoint.url}", "--endpoint_model=m"]
    source = f"--in={tmp_path}/in"
    name = "web\x1b[31m"
    sets = f"--in={name}={tmp_path}/in/*.tar"
    for stage, *flags in (
        ["collect", source, f"--out={tmp_path}/c", "--min_side=8"],
        ["annotate", source, f"--out={tmp_path}/a", *asking],
        ["score", source, f"--out={tmp_path}/s", *asking],
        ["filter", source, f"--out={tmp_path}/f"],
        ["dedup", f"--in={tmp_path}/c", f"--out={tmp_path}/d"],
        ["report", sets, f"--out={tmp_path}/r", f"--references={tmp_path}/in"],
    ):
        _, text = run(stage, *flags)
        assert_harmless(text)
    assert "richness\\x1b]0;owned" in text  # of the report
    assert len(titles) >= 2
    for title in titles:
        assert_harmless(title)
