"""Formats that are known in the field and not read here: each is refused by its name, with how to convert it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from training.data.formats.faults import BadRow

ONE_LINE_EACH = "write each on a line of its own: `jq -c . FILE > data.jsonl`"
_ROW = '{{"messages": [{{"role": "user", "content": {question}}}, {{"role": "assistant", "content": {answer}}}]}}'
PANDAS = 'export it from pandas by df.to_json("data.jsonl", orient="records", lines=True)'
PREFERENCE = (
    "training on preferences is not supported; to learn the preferred answers, give each as messages of its own"
)
BEDROCK = 'this is Bedrock\'s format: write the words themselves as "content", and "system" as the first message'

# A question and its answer under these keys, and who calls them so. The first pair that a row has names it.
_QUESTION_AND_ANSWER: tuple[tuple[str, str, str], ...] = (
    ("instruction", "output", "Alpaca"),
    ("instruction", "response", "Dolly"),
    ("instruction", "answer", ""),
    ("prompt", "completion", "prompt and completion"),
    ("prompt", "response", ""),
    ("prompt", "answer", ""),
    ("prompt", "output", ""),
    ("question", "answer", ""),
    ("question", "answers", ""),
    ("question", "response", ""),
    ("problem", "solution", ""),
    ("query", "response", ""),
    ("query", "answer", ""),
    ("input", "output", ""),
    ("input", "target", ""),
    ("inputs", "targets", ""),
    ("user", "assistant", ""),
    ("human", "assistant", ""),
    ("source", "target", ""),
)
_PREFERENCES = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
)
# A whole file in one object: its rows stand under one of these.
_ROWS_KEYS = ("data", "rows", "train", "examples", "items", "records", "dataset", "samples", "instances")


def refuse_known(row: Any) -> None:
    """Raises BadRow if the row, or the whole document, has the shape of a format that is known but not read."""
    if isinstance(row, list):
        _refuse_list(row)
    elif isinstance(row, str) and holds_json(row):
        raise BadRow("JSON inside of a JSON string: it was encoded twice", "write the objects themselves, a line each")
    elif isinstance(row, dict):
        _refuse_preferences(row)
        _refuse_conversations(row)
        _refuse_services(row)
        _refuse_tables(row)
        _refuse_questions(row)


def _refuse(what: str, hint: str) -> None:
    raise BadRow(f"{what} is not supported", hint)


def _refuse_list(row: list[Any]) -> None:
    if row and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in row):
        raise BadRow("a bare list of messages", 'put each list into an object: {"messages": [...]}')


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    for better, worse in _PREFERENCES:
        if has(row, better) and has(row, worse):
            _refuse(f"a preference pair ({better}, {worse})", PREFERENCE)
    if has(row, "prompt") and has(row, "completion") and isinstance(row.get("label"), bool):
        _refuse("an answer with a verdict (prompt, completion, label)", PREFERENCE)


def _refuse_conversations(row: Mapping[str, Any]) -> None:
    for key in ("conversations", "conversation"):
        turns = row.get(key)
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
            continue
        if turns[0].keys() & {"from", "value"}:
            _refuse(
                "ShareGPT's format (from, value)",
                f"rename {key} to messages, from to role (human to user, gpt to assistant) and value to content",
            )
        if "role" in turns[0]:
            raise BadRow(f"the messages are under the key {key!r}", f'rename the key {key!r} to "messages"')
        if "training_pairs" in turns[0]:
            raise BadRow(
                "a whole brightrun-lora-v4 document in one row", "submit each such document as a file of its own"
            )
    if has(row, "contents") and isinstance(row["contents"], list):
        _refuse(
            "Gemini's format (contents, parts)",
            'write each of contents as {"role": …, "content": its text}, with assistant for model, under "messages"',
        )
    if {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys():
        raise BadRow(
            "a single message, not a conversation",
            'put the messages of a conversation into one line: {"messages": [...]}',
        )


def _refuse_services(row: Mapping[str, Any]) -> None:
    """What the APIs of the field take and answer."""
    body = row.get("body")
    if isinstance(body, dict) and "messages" in body:
        _refuse(
            "a request of OpenAI's batch API",
            "keep the messages and add the answer: `jq -c '{messages: .body.messages}'`",
        )
    if "custom_id" in row and isinstance(row.get("response"), dict):
        _refuse("a result of OpenAI's batch API", "put the answer behind the messages of its request")
    if isinstance(row.get("choices"), list):
        _refuse("an answer of a chat API (choices)", "put the answer behind the messages of its request")
    if isinstance(row.get("output"), list) or isinstance(row.get("input"), list):
        _refuse(
            "the format of OpenAI's Responses API (input, output)",
            'write input and output as one list of "messages", the instructions as its first with the role system',
        )
    if "statusCode" in row and ("error" in row or "message" in row):
        raise BadRow("an error that a server answered, not a dataset", "check the dataset URL and submit again")
    if "input_ids" in row:
        _refuse(
            "text that is tokenised already (input_ids)", "give the conversations as text: tokens are of one model only"
        )


def _refuse_questions(row: Mapping[str, Any]) -> None:
    for question, answer, name in _QUESTION_AND_ANSWER:
        if question in row and answer in row:
            keys = f"({question}, {answer})"
            whose = f"{name}'s format {keys}" if name in ("Alpaca", "Dolly") else f"a pair of {question} and {answer}"
            extra = next((key for key in ("input", "context") if has(row, key) and key not in (question, answer)), None)
            asked = f"{question} and {extra}" if extra else question
            _refuse(whose, "write each row as " + _ROW.format(question=asked, answer=answer))
    if "text" in row:
        _refuse(
            "plain text (text)", "only conversations can be trained on: " + _ROW.format(question='"…"', answer='"…"')
        )


def _refuse_tables(row: Mapping[str, Any]) -> None:
    if isinstance(row.get("columns"), list) and isinstance(row.get("data"), list):
        _refuse('a table exported by pandas (orient="split")', PANDAS)
    if isinstance(row.get("schema"), dict) and isinstance(row.get("data"), list):
        _refuse('a table exported by pandas (orient="table")', PANDAS)
    values = list(row.values())
    if values and all(isinstance(value, dict) for value in values):
        if all(key.isdecimal() for key in row):
            _refuse('a table exported by pandas (orient="index")', PANDAS)
        if all(value and all(key.isdecimal() for key in value) for value in values):
            _refuse('a table exported by pandas (orient="columns")', PANDAS)
    for key in _ROWS_KEYS:
        rows = row.get(key)
        if isinstance(rows, list) and (not rows or isinstance(rows[0], dict)):
            inner = ".row" if rows and "row" in rows[0] else ""
            _refuse(
                f"one object with its rows under {key!r}",
                f"write each row on a line: `jq -c '.{key}[]{inner}' FILE > data.jsonl`",
            )


def has(row: Mapping[str, Any], key: str) -> bool:
    """True if the row says something under this key: exports write null or nothing where there is nothing."""
    return row.get(key) not in (None, "", [], {})


def holds_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
