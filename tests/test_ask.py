"""curation/ask.py and local_model.py: captioners and judges, endpoints and model folders."""
import json
import shutil

import pytest
from curation_helpers import (
    ROOT,
    TOY_PROMPTS,
    dropped_rows,
    make_small_collection,
    png,
    run,
    run_well,
    stage_files,
)
from rows import sources_of
from toy_endpoint import Endpoint, read_shards

from curation import ask
from evals import endpoint as endpoint_client


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint_client, "WAIT_S", 0.01)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_small_collection(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("richness: 4\nalignment: 5", {"richness": 4, "alignment": 5}),
        (" Alignment: 1 \n richness: 2\n", {"alignment": 1, "richness": 2}),
        ("richness: 4", None),
        ("richness: 4\nalignment: 6", None),
        ("richness: 4\nalignment: 5\nrichness: 4", None),
        ("richness: 4.5\nalignment: 5", None),
        ("Sure!\nrichness: 4\nalignment: 5", None),
        ("4\n5", None),
        ("", None),
        ("richness: 4\n\nalignment: 5", None),
        ("richness: 4 or 5\nalignment: 5", None),
    ],
)
def test_scores_are_read_strictly(text, want):
    assert ask.read_scores(text, ("richness", "alignment")) == want


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
def test_replies_of_a_model_folder_are_not_those_of_another_tokenizer_or_config(
    small, tmp_path, name
):
    folder, _ = small
    shutil.copytree(folder / "model", tmp_path / "model")
    argv = [
        "recaption",
        f"--in={folder}/c",
        f"--model={tmp_path}/model",
        f"--prompts={TOY_PROMPTS}",
        "--max_new_tokens=2",
        f"--out={tmp_path}/out",
    ]
    run_well(*argv)
    path = tmp_path / "model" / name
    path.write_text(path.read_text() + "\n")
    (tmp_path / "model" / "checksums.json").unlink()
    code, text = run(*argv)
    assert code == 2 and "was made with another model: write into another folder" in text


def test_our_own_captioner_writes_the_same_shards_whoever_is_killed_and_however_many_work(
    small, tmp_path, zygote
):
    folder, _ = small
    argv = [
        "recaption",
        f"--in={folder}/c",
        f"--model={folder}/model",
        f"--prompts={TOY_PROMPTS}",
        "--max_new_tokens=6",
        "--dtype=float32",
    ]
    one = tmp_path / "one"
    three = tmp_path / "three"
    first = run_well(*argv, f"--out={one}")
    codes = zygote.run("curate", [*argv, f"--out={three}"], 3, tmp_path / "printed")
    assert codes == [0, 0, 0], (tmp_path / "printed").read_text()
    assert stage_files(one) == stage_files(three)
    # Each answer was made by one of them.
    report = run_well(*argv, f"--out={three}")
    assert report["calls"] == report["replies"] == first["calls"]

    # As if killed before the first shard, in the middle of a reply.
    for path in one.glob("*.tar"):
        path.unlink()
    log = sorted((one / "replies").glob("*.jsonl"))[0]
    log.write_bytes(log.read_bytes()[:-9])
    again = run_well(*argv, f"--out={one}")
    assert again["calls"] == 1 and stage_files(one) == stage_files(three)


def test_pictures_go_to_several_endpoints_and_spend_is_what_they_say(small, tmp_path):
    folder, truth = small
    a = Endpoint(truth, 0, 0)
    b = Endpoint(truth, 0, 0)
    report = run_well(
        "annotate",
        f"--in={folder}/c",
        f"--out={tmp_path}/a",
        f"--endpoint={a.url},{b.url}",
        "--endpoint_model=m",
        "--mode=caption",
        "--price_in=1000",
        "--price_out=1000000",
    )
    assert len(a.asked) > 5 and len(b.asked) > 5
    assert len(a.asked) + len(b.asked) == report["replies"]
    prompt = (ROOT / "curation" / "prompts" / "caption.txt").read_text()
    asked = (100 + len(prompt.split())) * report["replies"]
    said = sum(len(text.split()) for text in truth.values())
    assert report["prompt_tokens"] == asked and report["completion_tokens"] == said
    assert report["dollars"] == pytest.approx(asked / 1000 + said)


@pytest.mark.parametrize("status", [400, 401])
def test_what_only_a_picture_is_to_blame_for_drops_the_picture_and_the_rest_stops_the_run(
    small, tmp_path, status
):
    folder, truth = small
    endpoint = Endpoint(truth, 0, 0)
    refused = list(truth)[10]
    endpoint.status = lambda sha256: status if sha256 == refused else 200
    flags = [f"--in={folder}/c", f"--out={tmp_path}/{status}", "--endpoint_model=m"]
    code, text = run("annotate", *flags, f"--endpoint={endpoint.url}")
    if status == 400:
        assert code == 0 and "http_400" in text, text
        [lost] = [row for row in dropped_rows(tmp_path / "400") if row["reason"] == "http_400"]
        assert lost["why"].startswith("there is no answer to")
    else:
        assert code == 2 and "HTTP 401 Unauthorized: there is no answer to" in text, text
        assert "; set JUDGE_API_KEY" in text
        assert text.count("\n") == 1, text


def test_sft_quality_scores_dialogues_of_any_source(small, tmp_path):
    _, truth = small
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    answer = {"from": "gpt", "value": "Nothing."}
    dialogue = [{"from": "human", "value": "<image>\n<image>\nWhat differs?"}, answer]
    empty = [{"from": "human", "value": ""}, answer]
    rows = []
    for i in range(3):
        rows.append({"id": f"r/{i}", "image": ["a.png", "a.png"], "conversations": dialogue})
    rows.append({"id": "empty", "image": "a.png", "conversations": empty})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def reply(sha256, prompt, temperature):
        good = "< image >" in prompt and "Question: " in prompt
        return "difficulty: 2\ncomplexity: 3\nrelevance: 5" if good else "?", "stop"

    endpoint = Endpoint(truth, 0, 0)
    endpoint.reply = reply
    flags = [f"--endpoint={endpoint.url}", "--endpoint_model=m"]
    report = run_well("sft-quality", f"--in={tmp_path}/rows.jsonl", f"--out={tmp_path}/q", *flags)
    assert report["means"] == {"difficulty": 2.0, "complexity": 3.0, "relevance": 5.0}
    assert report["calls"] == 1  # all three are alike
    assert report["dropped"] == {"bad_row": 1}
    row = next(iter(read_shards(tmp_path / "q")))
    assert row["conversations"] == dialogue
    assert row["image"] == ["row-000000.0.png", "row-000000.1.png"]
    (source,) = sources_of(f"{tmp_path}/q/*.tar")
    assert source.rows["n_images"].tolist() == [2, 2, 2]
