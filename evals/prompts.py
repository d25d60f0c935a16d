"""What a model is asked about a row, and what a judge is asked about an answer.

The wording of questions is that of build_prompt and build_multi_choice_prompt in VLMEvalKit's
vlmeval/vlm/sail_vl.py. The judge's prompts are our own.
"""
import re

from evals.scorers import graded, mathvista, mmmu, multiple_choice, options, yes_no

SHORT_ANSWER = "Answer the question using a single word or phrase."
# What follows the question, by kind of prompt. Multiple choice (mcq) has its own below.
TAIL = {
    "plain": "",
    "short": "\n" + SHORT_ANSWER,
    "mme": " " + SHORT_ANSWER,
    "yes_no": " Please answer yes or no. " + SHORT_ANSWER,
}
MCQ = {"en": "Answer with the option's letter from the given choices directly.",
       "zh": "请直接回答选项字母。"}
OPEN = {"en": "Answer the question directly.", "zh": "请直接回答问题。"}

_ASK_OPTION = (
    "{question}\n{options}\n\nSomeone answered: {prediction}\n\nWhich option does that mean? "
    "Reply with its letter alone, or with Z if it means none of them.")
# Scorer -> what a judge is asked where that scorer can read nothing.
JUDGE_PROMPTS = {
    multiple_choice: _ASK_OPTION,
    yes_no: (
        "{question}\nThe answer was: {prediction}\n\nDoes that mean yes or no? Reply yes, no or "
        "unknown."),
    mathvista: (
        "{question}\n\nSomeone answered: {prediction}\n\nReply with the final answer alone, as "
        "{form}"),
    graded: (
        "Question: {question}\nReference: {answer}\nAnswer: {prediction}\n\nHow right is the "
        "answer, 0.0 to 1.0 in steps of 0.1? <AND> joins parts that must all be there, <OR> parts "
        "of which one is enough. Reply with the number alone."),
    mmmu: _ASK_OPTION,
}


def build_prompt(kind, row, n_images=1):
    """Row -> text: the question and TAIL[kind]; for mcq hint, question, options, what is wanted.

    Several images come first and are counted (reorganize_prompt of sail_vl.py).
    """
    lines = []
    if n_images > 1:
        lines = [f"Image-{i + 1}: <image>" for i in range(n_images)]
    if kind != "mcq":
        return "\n".join([*lines, row["question"] + TAIL[kind]])
    text = [row["question"]]
    if row.get("hint"):
        text.insert(0, row["hint"])
    text += [f"{letter}. {option}" for letter, option in options(row).items()]
    is_chinese = re.search("[\u4e00-\u9fff]", "".join(text))
    wanted = MCQ if options(row) else OPEN
    return "\n".join([*lines, *text, wanted["zh" if is_chinese else "en"]])


def placeholder_problem(kind, row, n_images):
    """What is wrong with the `<image>` that a row writes for its pictures, "" if nothing is."""
    n = build_prompt(kind, row, n_images).count("<image>")
    if n in (0, n_images):
        return ""
    columns = ", ".join(repr(name) for name, cell in row.items() if "<image>" in cell)
    n_written = n - n_images if n_images > 1 else n
    return (f"row {row['index']}, column {columns}: <image> is written {n_written} times, its "
            f"pictures are {n_images}; remove it, for pictures come first by themselves")


def judge_prompt(scorer, row):
    """What a judge is asked about the prediction of a row that `scorer` cannot read."""
    # An open question of MMMU gets the options that its scorer makes of it.
    choices = options(row) or {"A": row["answer"], "B": "Other Answers"}
    listed = "\n".join(f"{letter}. {text}" for letter, text in choices.items())
    forms = {"integer": "an integer", "float": "a number"}
    form = forms.get(row.get("answer_type"), "the letter of the option")
    fields = {"prediction": "", **row, "options": listed, "form": form}
    return JUDGE_PROMPTS[scorer].format_map(fields)
