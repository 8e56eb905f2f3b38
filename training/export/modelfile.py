"""A Modelfile for `ollama create`: which file to take, how a chat becomes text, and where an answer ends.

Ollama does not run a model's own chat template. It takes one of Go's templates: of those it knows, the one whose Jinja
original resembles that in the file most, or none. So the Go template is written here. What the Jinja template does is
read off its renderings: the texts between two messages. A template that cannot be put together from such texts is left
out, and the Modelfile says so. There is none for an adapter: Ollama no longer takes any.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from typing import Any

from training.data.template.rendering import Message, Renderer, TemplateRefuses
from training.data.template.turn_end import find_turn_end
from training.failures import TrainingFailed

# Words that no template contains and no template trims.
_SYSTEM, _ASKED, _ANSWERED, _AGAIN, _REPLIED, _LAST = (f"⟦{number}⟧" for number in range(6))


@dataclass(frozen=True)
class Texts:
    """What a template writes around messages. None if it takes no system message."""

    before_user: str
    user_to_assistant: str
    assistant_to_user: str
    # After the last message, up to where the model answers.
    prompt: str
    before_system: str | None = None
    system_to_user: str | None = None


def modelfile(
    tokenizer: Any,
    stops: Collection[int],
    file: str,
    *,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Returns the text of a Modelfile for a whole model in the same folder. `stops`: the tokens that end generation.
    `options`: what the chat template is told, as in training."""
    lines = [f"FROM ./{file}"]
    if tokenizer.chat_template:
        try:
            render = Renderer(tokenizer).told(options or {})
        except TrainingFailed:
            render = None
        texts = texts_of(render) if render else None
        if texts is None or '"""' in (template := go_template(_without_bos(texts, tokenizer))):
            lines += [
                "",
                "# The chat template of this model cannot be written as one of Ollama's. Without a TEMPLATE here,",
                "# Ollama takes the most similar of those it knows, or none. llama.cpp's server runs the real one.",
            ]
        else:
            lines += ["", *_about_dates(tokenizer, options or {}), f'TEMPLATE """{template}"""']
        end = find_turn_end(render, tokenizer, stops) if render else None
        marks = [*(end.marks if end else ()), *([tokenizer.eos_token] if tokenizer.eos_token else [])]
        lines += ["", *(f'PARAMETER stop "{mark}"' for mark in dict.fromkeys(marks) if '"' not in mark)]
    return "\n".join(lines) + "\n"


def _about_dates(tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
    """A template may tell the model today's date; Go's templates here only tell that of the export."""
    days = (date(2001, 2, 3), date(2024, 11, 30))
    before, after = (texts_of(Renderer(tokenizer, day).told(options)) for day in days)
    return [] if before == after else ["# The date in this template is the day of the export."]


def texts_of(render: Renderer) -> Texts | None:
    """Reads the texts off a template's renderings, and proves them on longer ones. None if they do not suffice."""
    try:
        before, after_user, after_answer, prompt = _between(render, ("user", "assistant", "user"))
        texts = Texts(before, after_user, after_answer, prompt)
    except (TemplateRefuses, ValueError):
        return None
    try:
        before_system, after_system, _ = _between(render, ("system", "user"))
        with_system = Texts(before, after_user, after_answer, prompt, before_system, after_system)
        if _holds(render, with_system, ("system", "user", "assistant", "user", "assistant", "user")):
            texts = with_system
    except (TemplateRefuses, ValueError):
        pass
    chats = (("user",), ("user", "assistant", "user", "assistant", "user"))
    return texts if all(_holds(render, texts, chat) for chat in chats) else None


def go_template(texts: Texts) -> str:
    """Returns the template for Ollama. Everything outside of braces is text, line breaks included."""
    system = ""
    if texts.before_system is not None and texts.system_to_user is not None:
        system = (
            f'{{{{ if eq .Role "system" }}}}{_text(texts.before_system)}{{{{ .Content }}}}{_text(texts.system_to_user)}'
            "{{ else "
        )
    first = f"{{{{ if eq $i 0 }}}}{_text(texts.before_user)}{{{{ end }}}}" if texts.before_user else ""
    after = f"{{{{ if $last }}}}{_text(texts.prompt)}{{{{ else }}}}{_text(texts.user_to_assistant)}{{{{ end }}}}"
    return (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + (system or "{{ ")
        + f'if eq .Role "user" }}}}{first}{{{{ .Content }}}}{after}'
        + '{{ else if eq .Role "assistant" }}{{ .Content }}'
        + f"{{{{ if not $last }}}}{_text(texts.assistant_to_user)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def _between(render: Renderer, roles: tuple[str, ...]) -> list[str]:
    """Returns the texts before, between and after messages of these roles. Raises ValueError unless each shows once."""
    marks = _marks(roles)
    rest = render(_messages(roles), prompt=True)
    parts = []
    for mark in marks:
        part, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(f"{mark} is not shown once")
        parts.append(part)
    return [*parts, rest]


def _holds(render: Renderer, texts: Texts, roles: tuple[str, ...]) -> bool:
    try:
        rendered = render(_messages(roles), prompt=True)
    except TemplateRefuses:
        return False
    between = {
        ("system", "user"): texts.system_to_user,
        ("user", "assistant"): texts.user_to_assistant,
        ("assistant", "user"): texts.assistant_to_user,
    }
    marks = _marks(roles)
    text = (texts.before_system if roles[0] == "system" else texts.before_user) or ""
    for mark, pair in zip(marks, pairwise(roles), strict=False):
        text += mark + (between[pair] or "")
    return rendered == text + marks[-1] + texts.prompt


def _messages(roles: tuple[str, ...]) -> list[Message]:
    return [Message(role, mark) for role, mark in zip(roles, _marks(roles), strict=True)]  # type: ignore[arg-type]


def _marks(roles: tuple[str, ...]) -> tuple[str, ...]:
    marks = (_ASKED, _ANSWERED, _AGAIN, _REPLIED, _LAST)
    return ((_SYSTEM, *marks) if roles[0] == "system" else marks)[: len(roles)]


def _without_bos(texts: Texts, tokenizer: Any) -> Texts:
    """Ollama puts the first token before each text itself if the file says so (`add_bos_token`)."""
    bos = tokenizer.bos_token
    if not bos or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return texts
    return replace(
        texts,
        before_user=texts.before_user.removeprefix(bos),
        before_system=None if texts.before_system is None else texts.before_system.removeprefix(bos),
    )


def _text(text: str) -> str:
    """Text in a Go template: only braces mean something else."""
    return text.replace("{{", '{{ "{{" }}')
