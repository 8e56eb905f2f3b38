"""A library of datasets and specs that must fail, each with its code and the words that a user must see."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any


def _chat(*turns: tuple[str, Any], **more: Any) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more})


_GOOD = _chat(("user", "What colour is the cat?"), ("assistant", "Red."))
_PAIR = {"current_user_input": "Hello?", "target_response": "Hello.", "conversation_history": []}
_TURNS = {"conversation_id": "1", "turns": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
_DEEP = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"

# name: (content of the file, words that the message must contain)
DATASETS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("the dataset is empty",)),
    "only blank lines": (b"\n\n  \n", ("the dataset is empty",)),
    "only a byte order mark": (b"\xef\xbb\xbf", ("the dataset is empty",)),
    "latin-1": (_GOOD.encode() + b'\n{"messages": "caf\xe9"}\n', ("line 2", "not UTF-8", "0xe9")),
    "utf-16": (_GOOD.encode("utf-16"), ("UTF-16",)),
    "gzip": (gzip.compress(_GOOD.encode()), ("gzip",)),
    "zip": (b"PK\x03\x04rest", ("zip",)),
    "parquet": (b"PAR1rest", ("parquet",)),
    "pdf": (b"%PDF-1.7", ("PDF",)),
    "zero bytes": (_GOOD.encode() + b"\n\x00\x00\n", ("line 2", "zero byte")),
    "csv": (b"question,answer\na,b\n", ("none of the 2 rows", "not JSON")),
    "plain words": (b"hello there", ("line 1", "not JSON")),
    "one broken line": (f"{_GOOD}\n{_GOOD[:-5]}\n{_GOOD}".encode(), ("1 row of the dataset", "line 2", "not JSON")),
    "broken first line": (f"{_GOOD[:-5]}\n{_GOOD}".encode(), ("line 1", "not JSON")),
    "twelve broken lines": (
        "\n".join('{"x": ' * number for number in range(1, 13)).encode(),
        ("12 rows", "line 10", "and 2 more"),
    ),
    "two objects in a line": ((_GOOD + _GOOD).encode(), ("line 1", "several JSON values")),
    "trailing comma": (b'{"messages": [],}', ("line 1", "not JSON")),
    "single quotes": (b"{'messages': []}", ("line 1", "not JSON")),
    "NaN in a number": (_chat(("user", "q"), ("assistant", "a"), score=float("nan")).encode(), ("NaN is not JSON",)),
    "infinity in a number": (b'{"messages": [], "score": Infinity}', ("Infinity is not JSON",)),
    "a key twice": (b'{"messages": [], "messages": []}', ("'messages' appears twice",)),
    "nested too deeply": (_DEEP.encode(), ("line 1",)),
    "an array of nothing": (b"[]", ("holds no example",)),
    "a broken array": (b'[{"messages": []},', ("cannot be read", "not JSON")),
    "an array of strings": (b'["a", "b"]', ("none of the 2 rows", "must be a JSON object, got text")),
    "a line that is a number": (b"42", ("line 1", "must be a JSON object, got a number")),
    "a line that is null": (b"null", ("line 1", "got null")),
    "an unknown format": (b'{"anweisung": "a", "antwort": "b"}', ("no known format", "'anweisung'", "expected")),
    "an empty object": (b"{}", ("no known format", "none")),
    "plain text completion": (b'{"text": "a long story"}', ("plain text",)),
    "sharegpt": (b'{"conversations": [{"from": "human", "value": "q"}]}', ("ShareGPT",)),
    "messages is a string": (b'{"messages": "hi"}', ("'messages' must be a list, got text",)),
    "messages is empty": (b'{"messages": []}', ("'messages' is empty",)),
    "messages is null": (b'{"messages": null}', ("'messages' must be a list, got null",)),
    "a message is a string": (b'{"messages": ["hi"]}', ("messages[1] must be an object",)),
    "a role is missing": (b'{"messages": [{"content": "q"}]}', ("messages[1] has no role",)),
    "a role of ShareGPT": (_chat(("human", "q"), ("gpt", "a")).encode(), ("unknown role 'human'", "'user'")),
    "a role is a number": (_chat((1, "q")).encode(), ("unknown role 1",)),  # type: ignore[arg-type]
    "a tool's answer": (
        _chat(("user", "q"), ("tool", "x"), ("assistant", "a")).encode(),
        ("messages[2]", "the role 'tool'"),
    ),
    "content is missing": (b'{"messages": [{"role": "user"}]}', ("messages[1].content is missing",)),
    "content is null": (_chat(("user", None), ("assistant", "a")).encode(), ("messages[1].content is missing",)),
    "content is a number": (_chat(("user", 7), ("assistant", "a")).encode(), ("must be text, got a number",)),
    "content is an image": (
        _chat(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a")).encode(),
        ("content[1]", "'image_url', not text"),
    ),
    "an empty answer": (_chat(("user", "q"), ("assistant", "  ")).encode(), ("messages[2].content is empty",)),
    "an empty question": (_chat(("user", ""), ("assistant", "a")).encode(), ("messages[1].content is empty",)),
    "half a surrogate pair": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}',
        ("surrogate",),
    ),
    "only a system message": (_chat(("system", "s")).encode(), ("no assistant message", "system")),
    "only a user message": (_chat(("user", "q")).encode(), ("no assistant message", "user")),
    "only an assistant message": (_chat(("assistant", "a")).encode(), ("there is no message before",)),
    "a system message in the middle": (
        _chat(("user", "q"), ("system", "s"), ("assistant", "a")).encode(),
        ("system message is not the first message",),
    ),
    "formats mixed": (
        f"{_GOOD}\n{json.dumps(_TURNS)}".encode(),
        ("line 2", "format turns", "began as messages"),
    ),
    "turns without an answer": (
        json.dumps({"turns": [{"role": "user", "content": "q"}]}).encode(),
        ("no assistant message",),
    ),
    "turns is an object": (b'{"turns": {"a": "q"}}', ("'turns' must be a list, got an object",)),
    "a pair without a question": (json.dumps({"target_response": "a"}).encode(), ("current_user_input is missing",)),
    "a pair whose target is a list": (
        json.dumps({**_PAIR, "target_response": ["a"]}).encode(),
        ("target_response[1] must be an object", "got text"),
    ),
    "a pair whose target is empty": (
        json.dumps({**_PAIR, "target_response": " "}).encode(),
        ("target_response is empty",),
    ),
    "a pair with a broken history": (
        json.dumps({**_PAIR, "conversation_history": [{"turn": 1}]}).encode(),
        ("conversation_history[1] has no role",),
    ),
    "only a _meta line": (b'{"_meta": {"format": "x"}}', ("holds no example", "_meta")),
    "only null targets": (
        json.dumps({**_PAIR, "target_response": None}).encode(),
        ("holds no example", "target_response is null"),
    ),
    "a v4 document without conversations": (
        json.dumps({"training_file_metadata": {}, "conversations": []}).encode(),
        ("conversations", "empty"),
    ),
    "a v4 document without pairs": (
        json.dumps({"conversations": [{"conversation_metadata": {}}]}).encode(),
        ("conversation 1", "training_pairs"),
    ),
    "a v4 pair that is broken": (
        json.dumps({"conversations": [{"training_pairs": [_PAIR, {"target_response": 1}]}]}).encode(),
        ("conversation 1, pair 2",),
    ),
}


@dataclass(frozen=True)
class BadRow:
    """Hyperparameters and gpu_config of a row, and the fields that the error must name."""

    hyperparameters: object
    fields: tuple[str, ...]
    gpu_config: object = None


ROWS: dict[str, BadRow] = {
    "not an object": BadRow([], ("hyperparameters",)),
    "null": BadRow(None, ("hyperparameters",)),
    "a learning rate of words": BadRow({"learning_rate": "fast"}, ("hyperparameters.learning_rate",)),
    "a learning rate of zero": BadRow({"learning_rate": 0}, ("hyperparameters.learning_rate",)),
    "a negative learning rate": BadRow({"learning_rate": -1e-4}, ("hyperparameters.learning_rate",)),
    "a learning rate that is not a number": BadRow({"learning_rate": float("nan")}, ("hyperparameters.learning_rate",)),
    "an infinite learning rate": BadRow({"learning_rate": float("inf")}, ("hyperparameters.learning_rate",)),
    "a batch of none": BadRow({"batch_size": 0}, ("hyperparameters.batch_size",)),
    "a batch and a half": BadRow({"batch_size": 1.5}, ("hyperparameters.batch_size",)),
    "no epochs": BadRow({"epochs": 0}, ("hyperparameters.epochs",)),
    "a thousand epochs": BadRow({"num_epochs": 1000}, ("hyperparameters.num_epochs",)),
    "a rank of zero": BadRow({"rank": 0}, ("hyperparameters.rank",)),
    "dropout of everything": BadRow({"dropout": 1.0}, ("hyperparameters.dropout",)),
    "a model by path": BadRow({"base_model": "/etc/passwd"}, ("hyperparameters.base_model",)),
    "a model outside": BadRow({"base_model": "../../x"}, ("hyperparameters.base_model",)),
    "an alpha of zero": BadRow({"lora_alpha": 0}, ("hyperparameters.lora_alpha",)),
    "targets that are a word": BadRow({"target_modules": "q_proj"}, ("hyperparameters.target_modules",)),
    "an empty target": BadRow({"target_modules": [""]}, ("hyperparameters.target_modules.0",)),
    "a negative seed": BadRow({"seed": -1}, ("hyperparameters.seed",)),
    "a length of one": BadRow({"max_length": 1}, ("hyperparameters.max_length",)),
    "everything at once": BadRow(
        {"learning_rate": 9, "batch_size": -1, "epochs": "x"},
        ("hyperparameters.learning_rate", "hyperparameters.batch_size", "hyperparameters.epochs", "gpu_config.count"),
        {"count": 0},
    ),
}
