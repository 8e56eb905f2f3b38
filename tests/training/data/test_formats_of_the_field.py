"""Files as they are found in the field: each is understood, or refused by its name with advice.

A row of a table is one file: what it holds, and what a user must read about it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.app_data import write_app_data
from training.data.formats.faults import join_places, list_faults
from training.data.formats.read_dataset import Reading, read_conversations
from training.data.remarks import remarks_on
from training.failures import TrainingFailed
from training.preflight.check import check_dataset

_Q = {"role": "user", "content": "q"}
_A = {"role": "assistant", "content": "a"}


def _chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages or (_Q, _A)), **more}


def _jsonl(*rows: Any) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _parts(*parts: Any) -> dict[str, Any]:
    return _chat(_Q, {"role": "assistant", "content": list(parts)})


_PAIR = {"current_user_input": "q", "target_response": "a", "conversation_history": []}
_ALPACA = {"instruction": "i", "input": "", "output": "o"}
_SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
_TEXT = {"type": "text", "text": "a"}
_CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
_GOOD = json.dumps(_chat()).encode()

# name: (content of the file, words of the message, words of the hint)
REFUSED: dict[str, tuple[bytes, tuple[str, ...], tuple[str, ...]]] = {
    # Keys that change what a row teaches.
    "tool calls beside words": (
        _jsonl(_chat(_Q, {**_A, "tool_calls": _CALL})),
        ("line 1", "messages[2] carries 'tool_calls'"),
        ("not supported yet",),
    ),
    "tool calls alone": (
        _jsonl(_chat(_Q, {"role": "assistant", "content": None, "tool_calls": _CALL})),
        ("'tool_calls'",),
        ("leave these conversations out",),
    ),
    "a function call": (_jsonl(_chat(_Q, {**_A, "function_call": {"name": "f"}})), ("'function_call'",), ("tool",)),
    "tools of a row": (
        _jsonl(_chat(tools=[{"type": "function"}])),
        ("'tools' is given beside messages",),
        ("tool",),
    ),
    "a tool's answer": (_jsonl(_chat(_Q, {"role": "tool", "content": "x"}, _A)), ("the role 'tool'",), ("tool calls",)),
    "a function's answer": (
        _jsonl(_chat(_Q, {"role": "function", "content": "x"}, _A)),
        ("'function'",),
        ("tool calls",),
    ),
    "a developer": (_jsonl(_chat({"role": "developer", "content": "x"}, _Q, _A)), ("'developer'",), ("system",)),
    "images of a row": (
        _jsonl(_chat({"role": "user", "content": "<image>q"}, _A, images=["x.png"])),
        ("'images'",),
        ("text",),
    ),
    "audio of a message": (
        _jsonl(_chat({**_Q, "audio": {"id": "1"}}, _A)),
        ("messages[1] carries 'audio'",),
        ("text",),
    ),
    "reasoning_content": (_jsonl(_chat(_Q, {**_A, "reasoning_content": "r"})), ("'reasoning_content'",), ("<think>",)),
    "thinking": (_jsonl(_chat(_Q, {**_A, "thinking": "r"})), ("'thinking'",), ("remove it",)),
    "a channel of gpt-oss": (
        _jsonl(_chat(_Q, {**_A, "channel": "analysis"}, _A)),
        ("channel 'analysis'",),
        ("reasoning",),
    ),
    "messages beside a preference": (
        _jsonl(_chat(chosen=_A, rejected=_A)),
        ("'chosen' is given beside messages",),
        ("preferences",),
    ),
    "a rejected answer beside messages": (
        _jsonl(_chat(rejected_response="x")),
        ("'rejected_response'",),
        ("preferences",),
    ),
    "a verdict": (_jsonl(_chat(kto_tag=False)), ("'kto_tag'",), ("preferences",)),
    "a system text beside the messages": (_jsonl(_chat(system="s")), ("'system' is given",), ("first in the list",)),
    "documents beside the messages": (_jsonl(_chat(documents=[{"text": "d"}])), ("'documents'",), ("chat template",)),
    "arguments of the template": (
        _jsonl(_chat(chat_template_kwargs={"x": 1})),
        ("'chat_template_kwargs'",),
        ("template",),
    ),
    "a weight of a row": (_jsonl(_chat(weight=0.5)), ("'weight' is given",), ("weight: 0",)),
    "a weight of a half": (
        _jsonl(_chat(_Q, {**_A, "weight": 0.5})),
        ("messages[2].weight must be 0 or 1, got 0.5",),
        (),
    ),
    "a weight of words": (_jsonl(_chat(_Q, {**_A, "weight": "0"})), ("must be 0 or 1, got '0'",), ()),
    "a user's words to train on": (_jsonl(_chat({**_Q, "train": True}, _A)), ("messages[1].train",), ("only answers",)),
    "only answers of weight 0": (_jsonl(_chat(_Q, {**_A, "weight": 0})), ("1 × every answer has weight 0",), ()),
    "two contents in a row": (
        _jsonl(_chat(turns=[_Q, _A])),
        ("both 'messages' and 'turns' are given",),
        ("keep only",),
    ),
    "tool calls in a pair's history": (
        _jsonl({**_PAIR, "conversation_history": [_Q, {**_A, "tool_calls": _CALL}]}),
        ("conversation_history[2] carries 'tool_calls'",),
        ("tool calls",),
    ),
    "images of a pair": (_jsonl({**_PAIR, "images": ["x"]}), ("'images' is given beside target_response",), ("text",)),
    # Content in parts.
    "a part of null": (_jsonl(_parts({"type": "text", "text": None})), ("content[1].text must be text, got null",), ()),
    "a part of a number": (_jsonl(_parts({"type": "text", "text": 5})), ("content[1].text", "got a number"), ()),
    "a part with its words elsewhere": (
        _jsonl(_parts({"type": "text", "content": "a"})),
        ("content[1] has no 'text'",),
        (),
    ),
    "such a part beside a good one": (
        _jsonl(_parts(_TEXT, {"type": "text", "content": "b"})),
        ("line 1", "messages[2].content[2] has no 'text'"),
        (),
    ),
    "an image beside words": (_jsonl(_parts(_TEXT, {"type": "image_url"})), ("content[2]", "'image_url'"), ("text",)),
    "a part of an unknown type": (_jsonl(_parts({"type": "poem", "text": "a"})), ("of the type 'poem', not text",), ()),
    "a part of Responses": (
        _jsonl(_parts({"type": "output_text", "text": "a"})),
        ("'output_text'",),
        ('"type": "text"',),
    ),
    "a part that is a string": (_jsonl(_parts("a")), ("content[1] must be an object", "got text"), ()),
    "a part without a type": (
        _jsonl(_parts({"text": "a"})),
        ("content[1] has no type", "Bedrock"),
        ('"type": "text"',),
    ),
    "a part that is not to be trained on": (
        _jsonl(_parts(_TEXT, {**_TEXT, "weight": 0})),
        ("'weight'",),
        ("whole message",),
    ),
    "no part at all": (_jsonl(_parts()), ("messages[2].content must be text, got a list",), ()),
    # Roles.
    "a role with a capital": (_jsonl(_chat({**_Q, "role": "User"}, _A)), ("'User' (did you mean 'user'?)",), ()),
    "a role of five megabytes": (_jsonl(_chat({**_Q, "role": "x" * 5_000_000}, _A)), ("unknown role 'xxx", "…"), ()),
    "a role that is a list": (_jsonl(_chat({**_Q, "role": ["x"] * 1000}, _A)), ("unknown role a list",), ()),
    "a message of ShareGPT": (
        _jsonl(_chat({"from": "human", "value": "q"})),
        ("under 'value'",),
        ("role and content",),
    ),
    # Formats that are known and not read.
    "ShareGPT on one line": (_jsonl(_SHAREGPT), ("line 1: ShareGPT's format",), ("rename", "gpt to assistant")),
    "ShareGPT on many lines": (
        _jsonl(*[_SHAREGPT] * 50),
        ("none of the 50 rows of the dataset can be used: ShareGPT's format (from, value) is not supported",),
        ("rename",),
    ),
    "ShareGPT in an array": (json.dumps([_SHAREGPT] * 2).encode(), ("can be used: ShareGPT's",), ("rename",)),
    "ShareGPT over several lines": (
        json.dumps(_SHAREGPT, indent=1).encode(),
        ("cannot be used: ShareGPT's format",),
        ("rename",),
    ),
    "conversations with roles": (
        _jsonl({"conversations": [_Q, _A]}),
        ("under the key 'conversations'",),
        ('to "messages"',),
    ),
    "Alpaca": (_jsonl(_ALPACA), ("Alpaca's format (instruction, output)",), ('"content": instruction',)),
    "Alpaca with an input": (_jsonl({**_ALPACA, "input": "x"}), ("Alpaca",), ("instruction and input",)),
    "Alpaca in an array": (
        json.dumps([_ALPACA] * 3, indent=1).encode(),
        ("can be used: Alpaca's",),
        ("messages",),
    ),
    "Dolly": (_jsonl({"instruction": "i", "context": "c", "response": "r"}), ("Dolly's format",), ("and context",)),
    "prompt and completion": (
        _jsonl({"prompt": "p", "completion": "c"}),
        ("a pair of prompt and completion",),
        ("messages",),
    ),
    "text": (_jsonl({"text": "t"}), ("plain text",), ("only conversations",)),
    "question and answer": (_jsonl({"question": "q", "answer": "a"}), ("question and answer",), ("messages",)),
    "query and response": (_jsonl({"query": "q", "response": "a"}), ("query and response",), ("messages",)),
    "preferences of TRL": (
        _jsonl({"prompt": "p", "chosen": "c", "rejected": "r"}),
        ("preference pair",),
        ("preferred",),
    ),
    "preferences of OpenAI": (
        _jsonl({"input": {"messages": [_Q]}, "preferred_output": [_A], "non_preferred_output": [_A]}),
        ("preference pair (preferred_output, non_preferred_output)",),
        ("preferred",),
    ),
    "preferences of LLaMA-Factory": (_jsonl({**_SHAREGPT, "chosen": _A, "rejected": _A}), ("preference pair",), ()),
    "verdicts of TRL": (_jsonl({"prompt": "p", "completion": "c", "label": False}), ("a verdict",), ("preferred",)),
    "Gemini": (
        _jsonl({"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}),
        ("Gemini's format",),
        ("assistant for model",),
    ),
    "Bedrock": (
        _jsonl({"schemaVersion": "bedrock-conversation-2024", **_chat({"role": "user", "content": [{"text": "q"}]})}),
        ("'schemaVersion'",),
        ("Bedrock",),
    ),
    "Responses": (_jsonl({"input": [_Q], "output": [{"type": "message"}]}), ("Responses API",), ("instructions",)),
    "a batch request": (_jsonl({"custom_id": "1", "method": "POST", "body": _chat(_Q)}), ("batch API",), ("jq",)),
    "a batch result": (_jsonl({"custom_id": "1", "response": {"body": {}}}), ("a result of OpenAI's batch",), ()),
    "an answer of a chat API": (_jsonl({"id": "x", "choices": [{"message": _A}]}), ("choices",), ("messages",)),
    "tokens": (_jsonl({"input_ids": [1, 2], "labels": [1, 2]}), ("tokenised already",), ("text",)),
    "a message a line": (_jsonl(_Q, _A), ("can be used: a single message",), ("one line",)),
    "a list of messages a line": (
        _jsonl([_Q, _A], [_Q, _A]),
        ("can be used: a bare list of messages",),
        ('{"messages"',),
    ),
    "one list of messages": (_jsonl([_Q, _A]), ("can be used: a single message",), ("messages",)),
    "an array of lists of messages": (
        json.dumps([[_Q, _A]]).encode(),
        ("item 1: a bare list of messages",),
        ("object",),
    ),
    "rows encoded twice": (_jsonl(json.dumps(_chat())), ("encoded twice",), ("objects themselves",)),
    "messages encoded twice": (_jsonl({"messages": json.dumps([_Q, _A])}), ("encoded twice",), ("list itself",)),
    "one object over several lines": (
        json.dumps(_chat(), indent=2).encode(),
        ("one JSON object over several",),
        ("jq -c",),
    ),
    "objects over several lines": ((json.dumps(_chat(), indent=2) * 2).encode(), ("several JSON values",), ("jq -c",)),
    "objects on one line": (_GOOD * 3, ("line 1", "one after the other"), ("jq -c",)),
    "an object with a fault over several lines": (
        json.dumps(_chat(), indent=2).replace('"a"', "a").encode(),
        ("the JSON document cannot be read", "line 9"),
        ("correct",),
    ),
    "rows under data": (_jsonl({"data": [_chat()]}), ("its rows under 'data'",), ("jq -c '.data[]'",)),
    "rows under data over several lines": (
        json.dumps({"data": [_chat()]}, indent=1).encode(),
        ("'data'",),
        (".data[]",),
    ),
    "rows of a viewer": (_jsonl({"rows": [{"row_idx": 0, "row": _chat()}]}), ("'rows'",), ("jq -c '.rows[].row'",)),
    "pandas by columns": (_jsonl({"messages": {"0": [_Q, _A]}}), ("exported by pandas",), ('orient="records"',)),
    "pandas by columns, of Alpaca": (
        _jsonl({"instruction": {"0": "i"}, "output": {"0": "o"}}),
        ("pandas",),
        ("orient",),
    ),
    "pandas by index": (_jsonl({"0": _chat(), "1": _chat()}), ("pandas",), ("orient",)),
    "pandas split": (_jsonl({"columns": ["messages"], "index": [0], "data": [[[_Q, _A]]]}), ("pandas",), ("orient",)),
    "a v4 document a line": (
        _jsonl(*[{"conversations": [{"training_pairs": [_PAIR]}]}] * 2),
        ("can be used: a whole brightrun-lora-v4 document",),
        ("file of its own",),
    ),
    "an error of a server": (
        _jsonl({"statusCode": "404", "error": "not_found"}),
        ("an error that a server",),
        ("URL",),
    ),
    # Files that are no JSON.
    "UTF-16 without a mark": (_GOOD.decode().encode("utf-16-le"), ("UTF-16",), ("UTF-8",)),
    "UTF-16, the other way round": (_GOOD.decode().encode("utf-16-be"), ("UTF-16",), ("UTF-8",)),
    "UTF-32": (_GOOD.decode().encode("utf-32"), ("UTF-32",), ("UTF-8",)),
    "UTF-32 without a mark": (_GOOD.decode().encode("utf-32-be"), ("UTF-32",), ("UTF-8",)),
    "zstd": (b"(\xb5/\xfd\x00", ("zstd",), ("unpack",)),
    "a tar archive": (b"a.jsonl".ljust(257, b"\0") + b"ustar", ("tar",), ("unpack",)),
    "Arrow": (b"ARROW1\0\0", ("Arrow",), ("to_json",)),
    "HTML": (b"<!DOCTYPE html>\n<html>", ("an HTML page",), ("URL",)),
    "XML": (b"<?xml version='1.0'?><Error/>", ("XML",), ("URL",)),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS",), ("git lfs pull",)),
    "Python's notation": (b"{'messages': []}\n{'messages': []}", ("not JSON",), ("json.dumps",)),
    # Legal JSON at its limits.
    "a number of 5,000 digits": (b'{"messages": [], "n": ' + b"1" * 5000 + b"}", ("line 1", "too many digits"), ()),
    "such a number in an array": (
        b"[" + _GOOD + b',\n{"n": ' + b"1" * 5000 + b"}]",
        ("item 2 (line 2)", "too many digits"),
        (),
    ),
    "a float without end": (b'{"messages": [], "n": 1e999}', ("line 1", "the number 1e999 is too large"), ()),
    "deep in an array": (
        b"[" + _GOOD + b"," + b"[" * 100_000 + b"]" * 100_000 + b"]",
        ("item 2", "nested too deeply"),
        (),
    ),
    "a key twice in an array": (b'[{"a": 1, "a": 2}]', ("item 1 (line 1)", "'a' appears twice"), ()),
    "half a character in a role": (
        b'{"messages": [{"role": "\\ud83d", "content": "q"}]}',
        ("line 1", "half a surrogate pair (\\ud83d)"),
        (),
    ),
    "half a character in a key": (_GOOD + b'\n{"\\uDE00": 1}', ("line 2", "half a surrogate pair"), ()),
}

_PAIR_METADATA = {
    "id": "1",
    "turn_number": 1,
    "emotional_context": {"x": 1},
    "training_metadata": {},
    "response_strategy": {},
}

# name: (content of the file, which of its turns are trained on, what is said of keys)
UNDERSTOOD: dict[str, tuple[bytes, list[bool], dict[str, int]]] = {
    "weight 0 and 1": (
        _jsonl(_chat(_Q, {**_A, "weight": 0}, _Q, {**_A, "weight": 1})),
        [False, False, False, True],
        {},
    ),
    "the last answer of weight 0": (_jsonl(_chat(_Q, _A, _Q, {**_A, "weight": 0})), [False, True], {}),
    "train of Axolotl": (
        _jsonl(_chat(_Q, {**_A, "train": False}, _Q, {**_A, "train": True})),
        [False, False, False, True],
        {},
    ),
    "loss of ms-swift": (_jsonl(_chat({**_Q, "loss": False}, {**_A, "loss": None})), [False, True], {}),
    "a weight of 1 on a row": (_jsonl(_chat(weight=1.0)), [False, True], {}),
    "what an API leaves empty": (
        _jsonl(
            _chat(
                _Q, {**_A, "tool_calls": None, "function_call": None, "refusal": None, "annotations": [], "audio": None}
            )
        ),
        [False, True],
        {},
    ),
    "what a table leaves empty": (_jsonl(_chat(tools=[], images=None, chosen=None, system="")), [False, True], {}),
    "an id and where it is from": (_jsonl(_chat(id="1", source="web", metadata={"x": 1})), [False, True], {}),
    "messages and _meta": (_jsonl(_chat(_meta={"v": 1})), [False, True], {}),
    "a pair and _meta": (_jsonl({**_PAIR, "_meta": {}}), [False, True], {}),
    "keys that mean nothing": (
        _jsonl(_chat(score=5, topic="x"), _chat(score=5)),
        [False, True],
        {"score": 2, "topic": 1},
    ),
    "a name": (_jsonl(_chat({**_Q, "name": "Ann"}, _A)), [False, True], {"name of a message": 1}),
    "citations": (_jsonl(_parts({**_TEXT, "citations": [1]})), [False, True], {"citations of a content part": 1}),
    "parts of text": (_jsonl(_parts(_TEXT, {**_TEXT, "cache_control": {"type": "x"}})), [False, True], {}),
    "what the app knows of a pair": (_jsonl({**_PAIR, **_PAIR_METADATA}), [False, True], {}),
    "what the app knows of a turn": (
        _jsonl(
            {**_PAIR, "conversation_history": [{**_Q, "content": "before", "emotional_state": 1}, {**_A, "turn": 1}]}
        ),
        [False, False, False, True],
        {},
    ),
    "a history that is misspelt": (
        _jsonl({**_PAIR, "conversation_histroy": [_Q]}),
        [False, True],
        {"conversation_histroy": 1},
    ),
    "marks of joined files": (b"\xef\xbb\xbf" + _GOOD + b"\n\xef\xbb\xbf" + _GOOD, [False, True], {}),
    "a character in two halves": (
        b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}, {"role": "assistant", "content": "a"}]}',
        [False, True],
        {},
    ),
    "an emoji's name in text": (_jsonl(_chat({**_Q, "content": "\\ud83d is half"}, _A)), [False, True], {}),
}


def _file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_by_its_name_and_with_advice(name: str, tmp_path: Path) -> None:
    content, words, advice = REFUSED[name]
    with pytest.raises(TrainingFailed) as refused:
        read_conversations(_file(tmp_path, content))
    error = refused.value
    assert error.code == "dataset_invalid" and not error.transient
    assert [word for word in words if word not in error.message] == [], error.message
    assert [word for word in advice if word not in error.hint] == [], error.hint
    assert len(error.message) < 500 and 0 < len(error.hint) < 500
    f"{error.message} {error.hint}".encode()
    assert check_dataset(tmp_path / "data.jsonl").errors[0]["message"] == error.message


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_understood_is_trained_as_it_says(name: str, tmp_path: Path) -> None:
    content, trained, unused = UNDERSTOOD[name]
    reading = read_conversations(_file(tmp_path, content))
    assert [turn.trained for turn in reading.conversations[0].turns] == trained
    assert reading.unused_keys == unused


def _read(tmp_path: Path, *rows: Any) -> Reading:
    return read_conversations(_file(tmp_path, _jsonl(*rows)))


@pytest.mark.parametrize("app_format", ["messages", "pairs", "turns", "v4"])
def test_the_apps_own_files_hold_no_key_that_is_unknown(app_format: Any, tmp_path: Path) -> None:
    reading = read_conversations(write_app_data(tmp_path / "data", app_format))
    assert reading.conversations
    assert reading.unused_keys == {}


def test_unused_keys_are_told_in_one_remark_with_counts(tmp_path: Path) -> None:
    (remark,) = remarks_on(
        _read(tmp_path, _chat(score=5, mood="x"), _chat({**_Q, "content": "r", "name": "Ann"}, _A, score=1))
    )
    assert remark.code == "unused_keys"
    assert remark.message.endswith("not trained on: score (2 ×), mood (1 ×), name of a message (1 ×)")
    assert remark.data == {"score": 2, "mood": 1, "name of a message": 1}


def test_a_thousand_unused_keys_fill_no_screen(tmp_path: Path) -> None:
    (remark,) = remarks_on(_read(tmp_path, _chat(**{f"{number}" * 500: 1 for number in range(1000)})))
    assert len(remark.message) < 1500 and "and 988 more" in remark.message


def test_words_without_an_answer_are_counted(tmp_path: Path) -> None:
    reading = _read(tmp_path, _chat(_Q, _A, _Q), _chat({**_Q, "content": "r"}, _A))
    assert [len(conversation.turns) for conversation in reading.conversations] == [2, 2]
    (remark,) = remarks_on(reading)
    assert remark.code == "unanswered_messages" and remark.message.startswith("1 of 2 conversations end")


def test_answers_that_are_not_to_be_trained_on_are_counted(tmp_path: Path) -> None:
    (remark,) = remarks_on(_read(tmp_path, _chat(_Q, {**_A, "weight": 0}, _Q, _A)))
    assert remark.code == "excluded_answers" and remark.data == {"answers": 1}


def test_a_reason_is_told_once_with_all_its_lines() -> None:
    faults = [(f"line {number}", "is empty") for number in (3, 5, 6, 7, 12)] + [("line 4", "is not")]
    assert list_faults(faults) == "lines 3, 5 to 7 and 12: is empty; line 4: is not"


def test_a_reason_beside_good_rows_names_its_lines(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as refused:
        _read(tmp_path, _ALPACA, _chat(), *[_ALPACA] * 3, 5)
    assert refused.value.message == (
        "5 rows of the dataset cannot be used: lines 1 and 3 to 5: Alpaca's format (instruction, output) is not "
        "supported; line 6: must be a JSON object, got a number"
    )
    assert refused.value.hint.endswith("; correct or remove the named lines and submit again")


def test_the_list_of_lines_ends_somewhere() -> None:
    assert join_places(f"line {number}" for number in range(1, 40, 2)).endswith("13, 15 and 12 more")
    places = ["conversation 1, pair 2", "conversation 1, pair 3", "conversation 4, pair 1", "the file"]
    assert join_places(places) == "conversation 1, pairs 2 to 3, conversation 4, pair 1, the file"
