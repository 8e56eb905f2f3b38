"""A model's tokenizer in GGUF: words, their kinds, merges or scores, special tokens, chat template.

Everything is read from the tokenizer as transformers builds it, which is what the adapter was trained with. llama.cpp
splits text by rules of its own, chosen by name: `tokenizer.ggml.pre`. Its converter finds the name by what a tokenizer
makes of one long text; here the expressions that the tokenizer itself carries are compared, so that a grown vocabulary
keeps its name, and an unknown expression is refused instead of approximated.
"""

from __future__ import annotations

import json
import re
from typing import Any

from training.data.template.rendering import Renderer
from training.data.template.turn_end import find_turn_end
from training.data.tokenizer import load_tokenizer, stop_tokens
from training.export.gguf_families import refused
from training.files.model_folder import ModelFolder

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT4 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LETTERS = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The expression by which a tokenizer splits text, and llama.cpp's name of it.
_EXPRESSIONS = {
    _GPT4 % "": "qwen2",
    _GPT4 % "{1,3}": "llama-bpe",
    _LETTERS % ("", "") + r"|\p{N}" + _REST: "tekken",
    _LETTERS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _REST: "gpt-4o",
}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"


def add_vocabulary(writer: Any, folder: ModelFolder, size: int) -> Any:
    """Adds the tokenizer of a model's folder to a GGUFWriter, filled up to `size` words (the rows of the embeddings).

    Returns the tokenizer. Raises TrainingFailed(model_unsupported) if llama.cpp would split text in another way."""
    import gguf

    tokenizer: Any = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused("this model's tokenizer has no tokenizer.json form, from which the vocabulary is read")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise refused(f"a tokenizer of the kind {model.get('type')} cannot be written here")
    words, kinds = _words(parts, model, size, gguf)
    if _kind_of_splitting(parts, "ByteLevel"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_expression_name(parts, model))
        writer.add_token_list(words)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in _merges(model)])
    else:
        if not model.get("byte_fallback"):
            raise refused("a tokenizer that is neither byte-level nor of SentencePiece's kind cannot be written here")
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(words)
        writer.add_token_scores(_scores(model, words))
        writer.add_token_types(kinds)
        writer.add_add_space_prefix(_prefixes_space(parts, tokenizer))
    _add_special_tokens(writer, folder, tokenizer)
    return tokenizer


def _words(parts: dict[str, Any], model: dict[str, Any], size: int, gguf: Any) -> tuple[list[str], list[int]]:
    by_number = {number: word for word, number in model["vocab"].items()}
    added = {token["id"]: token for token in parts.get("added_tokens", ())}
    if max((*by_number, *added)) >= size:
        raise refused(f"the tokenizer has words beyond the {size} rows of the model's embeddings")
    words, kinds = [], []
    for number in range(size):
        kind = gguf.TokenType.NORMAL
        if (token := added.get(number)) is not None:
            word = token["content"]
            if token["special"]:
                kind = gguf.TokenType.CONTROL
            else:
                # llama.cpp looks for these in plain text, before it replaces spaces.
                kind, word = gguf.TokenType.USER_DEFINED, word.replace(_SPACE, " ")
        elif number in by_number:
            word = by_number[number]
            if model.get("byte_fallback") and _BYTE.fullmatch(word):
                kind = gguf.TokenType.BYTE
        else:
            word, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        if model.get("byte_fallback") and word == model.get("unk_token"):
            kind = gguf.TokenType.UNKNOWN
        words.append(word)
        kinds.append(int(kind))
    return words, kinds


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    # Written as one text with a space by older versions of tokenizers.
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]


def _scores(model: dict[str, Any], words: list[str]) -> list[float]:
    """llama.cpp joins the pair whose joint word scores highest; the tokenizer the pair whose merge comes first. So a
    word's score is its place among the merges. Words that no merge makes are never looked for."""
    places: dict[str, int] = {}
    for place, (left, right) in enumerate(_merges(model)):
        places.setdefault(left + right, place)
    return [-float(places.get(word, len(places))) for word in words]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence."""
    if not part:
        return []
    nested = part.get("pretokenizers") or part.get("normalizers") or part.get("processors")
    return [step for each in nested for step in _steps(each)] if nested else [part]


def _kind_of_splitting(parts: dict[str, Any], kind: str) -> dict[str, Any] | None:
    return next((step for step in _steps(parts.get("pre_tokenizer")) if step["type"] == kind), None)


def _expression_name(parts: dict[str, Any], model: dict[str, Any]) -> str:
    by_bytes = _kind_of_splitting(parts, "ByteLevel") or {}
    if by_bytes.get("add_prefix_space"):
        raise refused("this tokenizer puts a space before each text, which llama.cpp does not do for byte-level words")
    expressions, digits = [], False
    for step in _steps(parts.get("pre_tokenizer")):
        match step["type"]:
            case "Split":
                pattern = step["pattern"]
                expressions.append(pattern.get("Regex") or re.escape(pattern.get("String", "")))
            case "Digits" if step.get("individual_digits"):
                digits = True
            case "ByteLevel":
                pass
            case other:
                raise refused(f"llama.cpp has no counterpart of this tokenizer's step {other}")
    if by_bytes.get("use_regex") and not expressions:
        return "smollm" if digits else "gpt-2"
    if len(expressions) == 1 and not digits and not by_bytes.get("use_regex") and expressions[0] in _EXPRESSIONS:
        name = _EXPRESSIONS[expressions[0]]
        # The same expression; the name also says whether a whole word is taken before merges are tried.
        return "dbrx" if name == "llama-bpe" and not model.get("ignore_merges") else name
    raise refused(f"llama.cpp does not know the expression by which this tokenizer splits text: {expressions}")


def _prefixes_space(parts: dict[str, Any], tokenizer: Any) -> bool:
    """Whether llama.cpp is to put a space before a text, and before what follows a special token: it knows no other.

    A tokenizer with the scheme `first` puts one before the text only. Chats begin with a special token, so no text of
    a chat gets one."""
    for step in _steps(parts.get("normalizer")):
        if step["type"] == "Prepend":
            return True
    metaspace = _kind_of_splitting(parts, "Metaspace")
    scheme = (metaspace or {}).get("prepend_scheme", "never")
    return scheme == "always" or (scheme == "first" and not tokenizer.chat_template)


def _add_special_tokens(writer: Any, folder: ModelFolder, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(int(number))
    # What the tokenizer does, not what its settings say: both have been wrong in published models.
    tokens = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and tokens[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and tokens[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
        # llama.cpp stops at the end of a text, and at one end of a turn beside it: where the template's answers end.
        stops = stop_tokens(folder)
        end = find_turn_end(Renderer(tokenizer), tokenizer, stops)
        ends = [*([end.stop] if end else []), *sorted(stops)]
        if other := [token for token in ends if token != tokenizer.eos_token_id]:
            writer.add_eot_token_id(other[0])
