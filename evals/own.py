"""Questions of one's own: a .tsv or .jsonl file becomes a benchmark like those of evals/table.py.

    python eval.py --model=DIR --benchmarks=my.tsv,MME --data_dir=LMUData [--scorer=exact]

A .tsv has the columns of VLMEvalKit's custom files: index, question, answer, image (base64) or
image_path, and A, B, C, ... for choices. A line of a .jsonl has question, answer and image.
"""
from pathlib import Path

from evals.files import QUESTION_FILES, read_benchmark
from evals.results import RESULT_KEYS
from evals.score import never_right
from evals.scorers import (
    anls,
    as_list,
    contains,
    exact_match,
    graded,
    multiple_choice,
    options,
    relaxed_accuracy,
    yes_no,
)
from evals.table import OWN, PROTOCOLS, Benchmark, parse_benchmarks

# The words of --scorer.
OWN_SCORERS = {
    "choice": multiple_choice, "yes_no": yes_no, "exact": exact_match, "contains": contains,
    "anls": anls, "relaxed": relaxed_accuracy, "judge": graded}


def is_own(word):
    """Whether a word of --benchmarks is a file and not the name of a benchmark."""
    return Path(word).suffix.lower() in QUESTION_FILES


def choose_benchmarks(text, protocol, scorer="auto", prompt="plain"):
    """Comma list of names and files of one's own -> benchmarks by name, as parse_benchmarks.

    scorer, prompt: of the files.
    """
    words = [word.strip() for word in text.split(",")]
    if scorer != "auto" and not any(map(is_own, words)):
        raise ValueError(f"--scorer={scorer} is for files of your own, and --benchmarks={text} "
                         "names none; leave it out, or give the path of a .tsv or .jsonl")
    chosen = {}
    for word in words:
        if not is_own(word):
            chosen |= parse_benchmarks(word, protocol)
            continue
        b = own_benchmark(word, scorer, prompt)
        if b.name in chosen:
            raise ValueError(f"{word}: there is another benchmark {b.name!r} in --benchmarks; "
                             "rename the file")
        chosen[b.name] = b
    return chosen


def own_benchmark(path, scorer="auto", prompt="plain"):
    """A file of one's own as a Benchmark, after a look at all of its rows but their pictures.

    scorer: a word of OWN_SCORERS; auto: choice where there are options, yes_no where these are
    all answers, else exact. ValueError names the row and column of what cannot be scored.
    """
    name = Path(path).stem
    check_own_name(path, name)
    rows, _ = read_benchmark(path)
    word = fitting_scorer(rows) if scorer == "auto" else scorer
    rule = OWN_SCORERS[word]
    judge = {multiple_choice: "optional", yes_no: "optional", graded: "required"}
    b = Benchmark(
        name=name, group=OWN, prompt="mcq" if word == "choice" else prompt,
        scorer=rule, judge=judge.get(rule, "no"),
        tiles=0, max_new_tokens=1024, jpeg=False, recent=rule in (multiple_choice, yes_no),
        path=str(path),
    )
    problems = [(row, own_row_problem(b, row)) for row in rows]
    problems = [(row, problem) for row, problem in problems if problem]
    if problems:
        row, problem = problems[0]
        more = f"; {len(problems) - 1} more rows have a fault" if len(problems) > 1 else ""
        raise ValueError(f"{path} row {row['index']}, {problem} (--scorer={word}){more}")
    return b


def check_own_name(path, name):
    """ValueError if the results of a file would stand where something else stands."""
    known = {b.name for table in PROTOCOLS.values() for b in table.values()}
    known |= {b.file for table in PROTOCOLS.values() for b in table.values()}
    if name in known:
        raise ValueError(f"{path}: {name} is a benchmark of evals/table.py; ask it with "
                         f"--data_dir={Path(path).parent} --benchmarks={name}, or rename the file")
    if name in RESULT_KEYS:
        raise ValueError(f"{path}: results.json has something else under {name!r}; rename the "
                         "file")


def fitting_scorer(rows):
    """The word of OWN_SCORERS for rows, by what is there."""
    if any(options(row) for row in rows):
        return "choice"
    answers = {row["answer"].strip().lower() for row in rows}
    return "yes_no" if answers <= {"yes", "no"} else "exact"


def own_row_problem(b, row):
    """Column and fault of a row whose answer could never be right, "" if it could."""
    answer = row["answer"]
    if not row["question"].strip():
        return "column 'question': it is empty"
    if not "".join(as_list(answer)).strip():
        return "column 'answer': it is empty, so that no answer is right"
    if b.scorer is multiple_choice:
        return choice_problem(answer, options(row))
    if b.scorer is yes_no and answer.strip().lower() not in ("yes", "no"):
        return f"column 'answer': {answer[:40]!r} is neither yes nor no"
    if never_right(b, [row]):
        return f"column 'answer': nothing matches {answer[:40]!r}"
    return ""


def choice_problem(answer, choices):
    """What is wrong with the answer to a question with these options {letter: text}."""
    if not choices:
        return "columns 'A', 'B', ...: they are empty, so that there is nothing to choose"
    if answer in choices:
        return ""
    meant = [letter for letter, text in choices.items()
             if answer.strip().lower() in (letter.lower(), text.strip().lower())]
    hint = f"; write {meant[0]}" if len(meant) == 1 else ""
    return (f"column 'answer': {answer[:40]!r} is no letter of an option "
            f"({', '.join(choices)}){hint}")
