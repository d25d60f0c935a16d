"""Questions of one's own: files as benchmarks, their scorers, samples of a file."""

import base64
import json

import pytest
from benchmark_rows import picture, write_tsv
from command_line import run
from test_eval import ROOT, make_model_folder

import eval as evaluation
from evals import files, own, scorers, table
from evals.results import RESULT_KEYS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("own") / "model")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask(model, out, benchmarks, *more):
    """-> (exit code, stdout, stderr, results.json)."""
    argv = ["eval.py", f"--model={model}", f"--benchmarks={benchmarks}", f"--out_dir={out}",
            "--device=cpu", "--max_new_tokens=3", *more]
    code, text, errors = run(evaluation.main, argv)
    path = out / "results.json"
    return code, text, errors, json.loads(path.read_text()) if path.exists() else None


def row(**cells):
    return {"index": "1", "question": "What?", "answer": "red", **cells}


def test_the_example_is_asked_beside_a_benchmark_and_reported_by_category(model, tmp_path):
    write_tsv(tmp_path / "toy_ocr.tsv", [row(image=picture())])
    example = ROOT / "examples" / "questions.jsonl"
    code, text, errors, results = ask(
        model, tmp_path / "out", f"{example},toy_ocr", f"--data_dir={tmp_path}")
    assert code == 0, errors
    assert results["n"] == {"questions": 8, "toy_ocr": 1}
    assert results["groups"].keys() == {"own", "toy"}
    assert results["scorers"]["questions"] == "yes_no"
    assert results["details"]["questions"]["categories"].keys() == {"there", "not there"}
    assert results["chance"]["questions"] == 50.0
    for said in ("questions", "scorer yes_no", "  there", "  not there", "toy_ocr"):
        assert f"\n{said}" in text or f"  {said}" in text
    # The answers are a file like any other: they can be scored again, and cannot be asked twice.
    argv = ["eval.py", "score", f"--benchmark={example}",
            f"--predictions={tmp_path / 'out' / 'questions.tsv'}"]
    code, text, errors = run(evaluation.main, argv)
    assert code == 0 and json.loads(text)["score"] == results["questions"], errors
    assert "questions" in json.loads((tmp_path / "out" / "results.json").read_text())["n"]


@pytest.mark.parametrize("rows, scorer", [
    ([row(answer="A", A="red", B="blue")], scorers.multiple_choice),
    ([row(answer="Yes"), row(index="2", answer="no ")], scorers.yes_no),
    ([row(answer="Yes"), row(index="2", answer="maybe")], scorers.exact_match),
    ([row()], scorers.exact_match),
])
def test_the_scorer_is_chosen_by_what_is_there(tmp_path, rows, scorer):
    b = own.own_benchmark(write_tsv(tmp_path / "my.tsv", rows))
    assert b.scorer is scorer and b.name == "my" and b.group == "own"
    assert b.prompt == ("mcq" if scorer is scorers.multiple_choice else "plain")


@pytest.mark.parametrize("word, right, wrong", [
    ("exact", "Red. ", "It is red"),
    ("contains", "It is RED, I think", "It is reddish"),
    ("anls", "redd", "blue"),
    ("relaxed", "red", "reddish"),
])
def test_each_scorer_of_own_questions_reads_answers_in_its_own_way(tmp_path, word, right, wrong):
    b = own.own_benchmark(write_tsv(tmp_path / "my.tsv", [row()]), word)
    assert b.scorer(right, row())[1] and not b.scorer(wrong, row())[1]


def test_every_one_of_several_references_is_right_and_a_text_with_brackets_is_one(tmp_path):
    path = write_lines(tmp_path / "my.jsonl", [
        {"question": "Which?", "answer": ["red", "crimson"]},
        {"question": "Which?", "answer": "[1, 2]"},
        {"question": "How many?", "answer": 7},
        {"question": "Which?", "answer": "红色"}])
    rows, _ = files.read_benchmark(path)
    for scorer in (scorers.exact_match, scorers.contains):
        said = ["crimson", "[1, 2]", "7", "红色"]
        assert all(scorer(text, one)[1] for text, one in zip(said, rows, strict=True)), scorer
        assert not scorer("1", rows[1])[1] and not scorer("17", rows[2])[1]
    assert scorers.contains("是红色的", rows[3])[1]


def test_pictures_of_a_jsonl_are_paths_and_data_uris(tmp_path):
    (tmp_path / "a.png").write_bytes(base64.b64decode(picture(size=(20, 20))))
    uri = f"data:image/png;base64,{picture(size=(30, 30))}"
    path = write_lines(tmp_path / "my.jsonl", [
        {"question": "q", "answer": "x", "image": "a.png"},
        {"question": "q", "answer": "x", "image": [uri, uri], "id": "b"},
        {"question": "q", "answer": "x", "image": ["a.png", "a.png"]},
        {"question": "q", "answer": "x"}])
    got = files.read_rows(path, own.own_benchmark(path))
    assert [one["index"] for one, _ in got] == ["1", "b", "3", "4"]
    sizes = [[files.open_picture(one, place).size[0] for place in places] for one, places in got]
    assert sizes == [[20], [30, 30], [20, 20], []]


REFUSED = [
    ([row(answer="D", A="red", B="blue")], "row 1, column 'answer': 'D' is no letter of an option "
                                           "(A, B)"),
    ([row(answer="blue", A="red", B="blue")], "(A, B); write B"),
    ([row(answer="b", A="red", B="blue")], "(A, B); write B"),
    ([row(answer="A", A="red", B="blue"), row(index="x", A="", B="")],
     "row x, columns 'A', 'B', ...: they are empty"),
    ([row(answer=" ")], "row 1, column 'answer': it is empty"),
    ([row(question=" ")], "row 1, column 'question': it is empty"),
    ([row(), row(index="2", answer=" "), row(index="3", answer="")],
     "row 2, column 'answer': it is empty, so that no answer is right (--scorer=exact); 1 more"),
]


@pytest.mark.parametrize("rows, message", REFUSED)
def test_references_that_can_never_match_are_refused_with_the_row(tmp_path, rows, message):
    path = write_tsv(tmp_path / "my.tsv", rows)
    with pytest.raises(ValueError) as e:
        own.own_benchmark(path)
    assert str(e.value).startswith(f"{path} row ") and message in str(e.value)


def test_answers_that_are_neither_yes_nor_no_are_refused_where_yes_no_is_asked_for(tmp_path):
    path = write_tsv(tmp_path / "my.tsv", [row(answer="yes"), row(index="7", answer="true")])
    with pytest.raises(ValueError, match="row 7, column 'answer': 'true' is neither yes nor no"):
        own.own_benchmark(path, "yes_no")


@pytest.mark.parametrize("line, message", [
    ('{"question": "q"}', "line 2 has no field 'answer'"),
    ('{"conversations": []}', "line 2 has no field 'question'"),
    ('{"question": "q", "answer": true}', "line 2, field 'answer': true is no text or number"),
    ('{"question": "q", "answer": null}', "line 2, field 'answer': null is no text or number"),
    ('{"question": "q", "answer": "A", "options": ["a"]}', "line 2, field 'options': "),
    ('{"question": "q", "answer": "A", "image": {"bytes": ""}}', "line 2, field 'image': "),
    ('{"question": "q", "answer": "A", "id": "1"}', "line 2: index '1' stands twice"),
    ("[1]", "line 2: no object"),
    ('{"question"', "line 2: not valid JSON"),
])
def test_a_line_that_is_no_question_is_refused_by_line_and_field(tmp_path, line, message):
    path = tmp_path / "my.jsonl"
    path.write_text(f'{{"question": "q", "answer": "a"}}\n{line}\n')
    with pytest.raises(ValueError) as e:
        own.own_benchmark(path)
    assert str(e.value).startswith(f"{path} ") and message in str(e.value)


@pytest.mark.parametrize("name, more, message", [
    ("MME.tsv", [], "--benchmarks=MME, or rename the file"),
    ("chance.tsv", [], "results.json has something else under 'chance'"),
    ("gone.tsv", [], "gone.tsv: no such file"),
    ("my.csv", [], "the path of a .tsv or .jsonl of your own"),
    ("my.xlsx", [], "an Excel file; make a .tsv of it"),
    ("my.tsv,{}/b/my.tsv", [], "there is another benchmark 'my' in --benchmarks; rename"),
    ("toy_ocr", ["--scorer=exact"], "--scorer=exact is for files of your own"),
    ("my.tsv", ["--scorer=judge"], "--scorer=judge needs --judge=URL and --judge_model=NAME"),
    ("my.tsv", ["--out_dir={}"], "would be written over this file; choose another --out_dir"),
])
def test_files_and_flags_that_do_not_fit_are_one_line(model, tmp_path, name, more, message):
    (tmp_path / "b").mkdir()
    for path in ("my.tsv", "MME.tsv", "chance.tsv", "my.csv", "my.xlsx", "b/my.tsv"):
        write_tsv(tmp_path / path, [row()])
    more = [flag.format(tmp_path) for flag in more]
    word = name if name == "toy_ocr" else f"{tmp_path}/{name}".format(tmp_path)
    code, text, errors, results = ask(model, tmp_path / "out", word, f"--data_dir={tmp_path}",
                                      *more)
    assert code == 2 and message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_limit_takes_a_sample_spread_over_the_file_always_the_same_and_says_so(tmp_path, capsys):
    rows = [row(index=str(i)) for i in range(1000)]
    path = write_tsv(tmp_path / "my.tsv", rows)
    b = own.own_benchmark(path)
    got = [int(one["index"]) for one, _ in files.read_rows(path, b, 10)]
    assert [i // 100 for i in got] == list(range(10)) and len({i % 100 for i in got}) > 5
    assert "my: 10 of 1000 questions are asked, spread over the file" in capsys.readouterr().out
    assert got == [int(one["index"]) for one, _ in files.read_rows(path, b, 10)]
    assert len(files.read_rows(path, b, 5000)) == len(files.read_rows(path, b, 0)) == 1000


@pytest.mark.parametrize("name, cells, together", [
    ("MMBench_DEV", [{"index": str(i % 4 + 1_000_000 * (i // 4)), "A": "a", "B": "b"}
                     for i in range(12)], 3),
    ("MME", [{"index": str(i), "category": "OCR", "image_path": f"{i // 2}.png"}
             for i in range(12)], 2),
    ("HallusionBench", [{"index": f"VS_x_y_{i // 3}_{i % 3}_0", "l2-category": "x"}
                        for i in range(12)], 3),
])
def test_a_sample_keeps_together_what_counts_together(tmp_path, name, cells, together):
    rows = [row(image=picture(), **{"category": "", **cell}) for cell in cells]
    path = write_tsv(tmp_path / f"{name}.tsv", rows)
    b = table.find_benchmark(name)
    got = files.read_rows(path, b, 2)
    assert len(got) == 2 * together


def test_results_have_no_name_that_a_file_could_take(model, tmp_path):
    """Whatever stands beside the scores is refused as the name of a file."""
    path = write_tsv(tmp_path / "my.tsv", [row()])
    flags = ["--controls=True", f"--untrained={model}", f"--trained_blind={model}"]
    code, _, errors, results = ask(model, tmp_path / "out", path, *flags)
    assert code == 0 and results.keys() - {"my"} <= RESULT_KEYS, errors
