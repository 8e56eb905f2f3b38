"""Takes this host's folders and its name out of what a job's owner can read: rows, events, callbacks, stored files.

Our own messages name none. Those of libraries and of the operating system do: they belong in the operator's log, where
they are written as they are.
"""

from __future__ import annotations

import json
import platform
import re
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from daemon.settings import Settings, quantized_dir

# Not inside a word, a URL or a longer path.
_BEFORE = r"(?P<quote>['\"]?)(?:(?<![\w.~%/-])|(?<=file://))(?=/)"
_NAME = r"[^\s'\"<>|:;,()\[\]{}`\\/]+"
_REST = rf"(?:/(?P<rest>(?:{_NAME}/)*(?:{_NAME})?))?(?![\w-])(?P=quote)"
# Where libraries lie: what follows names the module. In a traceback a quote ends the path, and it may contain spaces.
_PACKAGES = r"/(?:(?:site|dist)-packages|python3\.\d+)/(?!(?:site|dist)-packages/)"
_FRAME = re.compile(rf"(?<=File \")[^\"\n]*?{_PACKAGES}")
_LIBRARY = re.compile(rf"(?<![\w.~%/-])(?:/{_NAME})*{_PACKAGES}")
_ANY_PATH = re.compile(rf"{_BEFORE}/(?:{_NAME}/)+(?P<rest>{_NAME})?(?P=quote)")
_FILE = re.compile(r"[\w+@~-][\w.+@~-]*\.\w{1,16}")
# A plain word may be part of a sentence that does not mean the host.
_PLAIN_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Redaction:
    """`folders`: each with the words that stand for it; what has none is code, whose files keep their place in it.
    `names`: those of this host."""

    folders: tuple[tuple[Path, str], ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings, names: Iterable[str | None] = ()) -> Redaction:
        """Knows the settings' folders, where code and temporary files lie, and the host by its own name and `names`."""
        models, cache = "the models folder", "the model cache"
        folders: list[tuple[Path | None, str]] = [
            (settings.work_dir, "the work folder"),
            (quantized_dir(settings), models),
            (settings.models_dir, models),
            (settings.model_path, models),
            (settings.hf_home, cache),
            (settings.transformers_cache, cache),
            (settings.storage_dir, "the storage folder"),
            (Path.home(), "the home folder"),
            (Path(tempfile.gettempdir()), "a temporary folder"),
            (Path(__file__).parents[1], ""),
            *((Path(place), "") for place in sysconfig.get_paths().values()),
        ]
        host = platform.node()
        return cls(
            tuple((folder, words) for folder, words in folders if folder is not None),
            tuple(dict.fromkeys(name for name in (host, host.partition(".")[0], *names) if name)),
        )

    def text(self, text: str) -> str:
        """Returns a sentence without paths and names. Of a path, only the name of the file is kept."""
        return self._hide(text, self._hosts_in_sentences)

    def stack(self, text: str) -> str:
        """Returns a traceback or a log without paths and names. Each frame names its file inside its package."""
        return self._hide(text, self._hosts)

    def value(self, value: Any) -> Any:
        """Returns JSON with each of its texts as a sentence."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            return [self.value(item) for item in value]
        return value

    def _hide(self, text: str, hosts: re.Pattern[str] | None) -> str:
        if "/" in text:
            text = _FRAME.sub("", text)
            if self._known is not None:
                text = self._known.sub(self._in_words, text)
            text = _LIBRARY.sub("", text)
            text = _ANY_PATH.sub(lambda found: _in_words(found["rest"], "a folder of the host"), text)
        return text if hosts is None else hosts.sub("the host", text)

    @cached_property
    def _words(self) -> dict[str, str]:
        """Each known folder as it may be written, the longest first: one may lie in another."""
        found: dict[str, str] = {}
        for folder, words in self.folders:
            for path in (folder.absolute(), folder.resolve()):
                # The root of the file system says nothing, and is part of every path.
                if len(path.parts) > 1:
                    found |= {written: found.get(written, words) for written in _written(str(path))}
        return dict(sorted(found.items(), key=lambda item: -len(item[0])))

    @cached_property
    def _known(self) -> re.Pattern[str] | None:
        if not self._words:
            return None
        folders = "|".join(re.escape(folder) for folder in self._words)
        return re.compile(f"{_BEFORE}(?P<folder>{folders}){_REST}")

    def _in_words(self, found: re.Match[str]) -> str:
        words = self._words[found["folder"]]
        if words:
            return _in_words(found["rest"], words)
        quote = found["quote"]
        return f"{quote}{found['rest'] or ''}{quote}" or "the service's code"

    @cached_property
    def _hosts(self) -> re.Pattern[str] | None:
        return _any_of(name for name in self.names if len(name) > 2 and name != "localhost")

    @cached_property
    def _hosts_in_sentences(self) -> re.Pattern[str] | None:
        return _any_of(name for name in self.names if len(name) > 2 and not _PLAIN_WORD.fullmatch(name))


def _in_words(rest: str | None, folder: str) -> str:
    """`tokenizer.json in the models folder`. A full stop after the path ends the sentence and is kept."""
    rest = rest or ""
    path = rest.rstrip(".")
    name = path.rpartition("/")[2]
    return (f"{name} in {folder}" if _FILE.fullmatch(name) else folder) + rest[len(path) :]


def _written(path: str) -> Iterator[str]:
    """The path as it stands in a message: plain, in Python's and JSON's quotes, in a URL."""
    yield from (path, repr(path)[1:-1], ascii(path)[1:-1], json.dumps(path)[1:-1], quote(path))


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    found = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{found})(?![\w-])") if found else None
