"""Stages annotate, recaption, score and sft-quality: a model is asked about every row.

The model is an OpenAI-compatible endpoint or a model folder. Replies are kept in OUT/replies/, so
that no question is paid for twice, whatever is killed.
"""
import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from curation.local_model import LocalModel, load_assistant, model_key
from curation.rows import SCORE_NAMES, row_caption, row_scores, without_surrogates
from curation.shards import PostponedShard, read_records
from curation.stages import cost_in_dollars, run_stage
from curation.text import ends_with_a_stop
from curation.watch import CONTROL_ROW, ReplyWatch, UselessReplies, control_picture
from evals.endpoint import ATTEMPTS, ChatClient, reply_key
from inputs.dialogue import conversation
from inputs.files import printable

REFUSAL = re.compile(
    r"\W*((i['’]?m|i am) (sorry|unable|not able)|sorry|i (can['’]?t|cannot|won['’]?t)\b"
    r"|很?抱歉|对不起)", re.IGNORECASE)


class Question(NamedTuple):
    """What a model is asked about a row."""
    prompt_name: str  # the file in --prompts that the text was made of
    text: str


# ---- what is asked -------------------------------------------------------------------------------


def prompt_texts(cfg, names):
    """{name: text} of the prompts in --prompts."""
    folder = Path(cfg.prompts or Path(__file__).with_name("prompts"))
    return {name: (folder / f"{name}.txt").read_text("utf-8").strip() for name in names}


def escape_images(text):
    """A text in which no "<image>" is left that would stand for a picture."""
    return text.replace("<image>", "< image >")


class CaptionTask:
    """Ask for a caption; annotate also stores the dialogue that a captioner is trained on."""
    needs_picture = True
    fields = ("id", "alt_text", "by")  # what is read of a row
    score_names = ()

    def __init__(self, cfg, stage):
        self.stage = stage
        self.mode = cfg.mode
        self.ending = cfg.ending
        self.prompts = prompt_texts(cfg, ("caption", "recaption"))

    def question(self, row):
        alt_text = row.get("alt_text") or ""
        name = "recaption" if self.mode == "recaption" and alt_text else "caption"
        return Question(name, self.prompts[name].replace("{alt_text}", escape_images(alt_text)))

    def is_valid(self, reply):
        return bool(reply.strip())

    def is_stump(self, reply):
        """Whether a valid reply has no end; some engines stop at a comma and call it whole."""
        return self.ending == "stop" and not ends_with_a_stop(reply)

    def store(self, row, reply, question):
        """Put a valid reply into the row."""
        if row.get("caption") not in (None, "", row.get("alt_text")):
            row["caption_before"] = row["caption"]
        row["caption"] = reply.strip()
        row["mode"] = question.prompt_name
        # These belong to the caption before.
        row.pop("scores", None)
        row.pop("conversations", None)
        if self.stage == "annotate":
            row["conversations"] = [
                {"from": "human", "value": "<image>\n" + question.text},
                {"from": "gpt", "value": row["caption"]},
            ]


class ScoreTask:
    """Ask for scores of 1 to 5: of a caption, or of the dialogue of a training row."""

    def __init__(self, cfg, stage):
        self.name = "score" if stage == "score" else "sft_quality"
        self.needs_picture = self.name == "score"
        self.score_names = SCORE_NAMES[self.name]
        self.prompts = prompt_texts(cfg, (self.name,))
        self.fields = ["id", "scores", "by"]  # what is read of a row
        if "{caption}" in self.prompts[self.name]:
            self.fields.append("caption")
        if self.name == "sft_quality":
            self.fields.append("dialogue")

    def question(self, row):
        dialogue = ""
        if self.name == "sft_quality":
            _, turns = conversation(row)
            dialogue = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in turns)
        text = self.prompts[self.name]
        if "{caption}" in text:
            text = text.replace("{caption}", row_caption(row))
        text = text.replace("{conversation}", dialogue)
        return Question(self.name, escape_images(text))

    def is_valid(self, reply):
        return read_scores(reply, self.score_names) is not None

    def is_stump(self, reply):
        return False

    def store(self, row, reply, question):
        """Put valid scores into the row, beside those it has."""
        row["scores"] = {**row_scores(row), **read_scores(reply, self.score_names)}


def read_scores(text, names):
    """{name: 1 to 5} of a reply with one line `name: N` for each name; None for any other reply."""
    scores = {}
    lines = text.strip().splitlines()
    for line in lines:
        match = re.fullmatch(r"(\w+): ([1-5])", line.strip().lower())
        if not match:
            return None
        scores[match[1]] = int(match[2])
    complete = len(lines) == len(names) and set(scores) == set(names)
    return scores if complete else None


# ---- asking --------------------------------------------------------------------------------------


def write_captions(cfg, stage):
    """Caption every picture; stage: annotate or recaption."""
    ask_rows(cfg, stage, CaptionTask(cfg, stage))


def judge_rows(cfg, stage):
    """Let a judge score every row; stage: score or sft-quality."""
    ask_rows(cfg, stage, ScoreTask(cfg, stage))


def ask_rows(cfg, stage, task):
    """Run a stage that asks a model about every row; task: a CaptionTask or ScoreTask."""
    if bool(cfg.model) == bool(cfg.endpoint):
        raise ValueError(f"{stage} asks a model: give --model=FOLDER, or --endpoint=URL and "
                         "--endpoint_model=NAME")
    model = model_key(cfg.model) if cfg.model else cfg.endpoint_model
    hashes = {}
    for name, text in task.prompts.items():
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    asker = Asker(cfg, stage, task, model, hashes, ReplyWatch(cfg.endpoint))
    run_stage(cfg, stage, asker.process, model=model, prompts=hashes,
              max_new_tokens=cfg.max_new_tokens, mode=cfg.mode, max_tiles=cfg.max_tiles,
              ending=cfg.ending)


@dataclass
class Asker:
    """Asks one model the questions of one task."""
    cfg: object
    stage: str
    task: object  # CaptionTask or ScoreTask
    model: str  # name in the rows and in the log of replies
    prompt_hashes: dict
    watch: ReplyWatch

    @functools.cached_property
    def assistant(self):
        return load_assistant(self.cfg)

    def open_client(self, shard):
        """Who answers the questions about a shard."""
        cfg = self.cfg
        cache = Path(cfg.out) / "replies" / f"{shard.name}.jsonl"
        if cfg.model:
            return LocalModel(cfg, self.assistant, self.model, cache)
        return ChatClient(cfg.endpoint, self.model, cache, cfg.threads, cfg.max_new_tokens,
                          refusable=True)

    def process(self, shard, counts):
        """Yield every record of a shard with its reply, or with the reason why it has none."""
        records = list(read_records(shard, self.task.fields))
        client = self.open_client(shard)
        questions = self.make_questions(records)
        try:
            self.ask(client, records, questions, shard.name)
            if questions and not self.cfg.model:
                self.watch.end_shard(shard.name, functools.partial(self.control_problem, client))
        except (UselessReplies, PostponedShard):
            self.forget_useless(client.replies, records, questions)
            raise

        # Everything in the log was paid for, also by processes that were killed.
        entries = [*client.replies.known.values(), *client.replies.forgotten]
        for kind in ("prompt_tokens", "completion_tokens"):
            counts[kind] = sum(entry["usage"].get(kind, 0) for entry in entries)
        counts["replies"] = len(entries)
        counts.update(client.counts)
        for record in records:
            if not record.reason:
                for name in self.task.score_names:
                    counts[f"sum {name}"] += record.row["scores"][name]
        yield from records

    def make_questions(self, records):
        """{number of a record: Question}. The records that get none get a reason, in place."""
        questions = {}
        for i, record in enumerate(records):
            reason = record.reason
            if not reason and not record.pictures and self.task.needs_picture:
                reason = "no_picture"
            if not reason:
                question = self.task.question(record.row)
                text = without_surrogates(question.text)
                questions[i] = question._replace(text=text)
            records[i] = record._replace(reason=reason)
        return questions

    def ask(self, client, records, questions, title):
        """Ask all questions, equal ones once, and put the replies into the records, in place."""
        groups = self.group_equal(records, questions)
        jobs = []
        for group in groups:
            first = group[0]
            pictures = list(records[first].pictures.values())
            jobs.append((questions[first].text, self.task.is_valid, pictures))

        spent = 0.0
        with tqdm(total=len(questions), desc=printable(title), leave=False, disable=None) as bar:
            for k, entry in client.each(jobs):
                if entry:
                    spent += cost_in_dollars(self.cfg, entry["usage"])
                for i in groups[k]:
                    records[i] = self.take_reply(records[i], questions[i], entry)
                    bar.set_postfix({**client.counts, "dollars": round(spent, 2)}, refresh=False)
                    bar.update()
                if not self.cfg.model:
                    first = records[groups[k][0]]
                    self.watch.note(first.reason, len(groups), str(first.row.get("why") or ""))

    def control_problem(self, client):
        """Why the endpoint's reply about CONTROL_ROW is of no use; None: the rows are at fault."""
        question = self.task.question(dict(CONTROL_ROW)).text
        pictures = [control_picture()] if self.task.needs_picture else []
        try:
            return self.problem(client.first_valid(question, self.task.is_valid, pictures))
        finally:
            # Tomorrow's answer may be another.
            for temperature in ATTEMPTS:
                key = reply_key(self.model, question, temperature, pictures)
                if key in client.replies.known:
                    client.replies.forget(key)

    def forget_useless(self, replies, records, questions):
        """Let the questions of a shard that have useless replies alone be asked again."""
        for i, question in questions.items():
            pictures = list(records[i].pictures.values())
            keys = [reply_key(self.model, question.text, t, pictures) for t in ATTEMPTS]
            entries = [replies.known[key] for key in keys if key in replies.known]
            if not any(self.is_usable(entry) for entry in entries):
                for entry in entries:
                    replies.forget(entry["key"])

    def is_usable(self, entry):
        return not self.problem(entry) and self.task.is_valid(entry["reply"])

    def problem(self, entry):
        """Why a reply is not taken, or None."""
        reason = reply_problem(entry)
        return "stump" if not reason and self.task.is_stump(entry["reply"]) else reason

    def group_equal(self, records, questions):
        """Lists of the numbers of records with the same question about the same pictures."""
        groups = {}
        for i, question in questions.items():
            key = reply_key(self.model, question.text, 0, records[i].pictures.values())
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def take_reply(self, record, question, entry):
        """The record with a reply in its row, or with the reason why the reply is none.

        entry: the reply's entry in the log, None if no attempt was valid.
        """
        row = record.row
        reason = self.problem(entry)
        if not reason:
            self.task.store(row, entry["reply"], question)
        elif entry and entry.get("why"):
            row["why"] = entry["why"]
        elif reason == "stump":
            row["why"] = f"it ends so: {entry['reply'].strip()[-40:]}"
        row["by"] = {**(row.get("by") or {}), self.stage: self.model}
        row["prompt_sha256"] = self.prompt_hashes[question.prompt_name]
        return record._replace(reason=reason)


def reply_problem(entry):
    """Why no task takes a reply, or None."""
    if entry is None:
        return "no_valid_reply"
    finish = str(entry["finish"])
    if finish.startswith("http_"):  # the endpoint refused the picture
        return finish
    if finish == "content_filter" or REFUSAL.match(entry["reply"]):
        return "refused"
    if finish == "length":
        return "cut_off"
    return None
