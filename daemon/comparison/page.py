"""A comparison as one HTML file to send or to upload: no script, nothing loaded from elsewhere, every word as text."""

from __future__ import annotations

from html import escape
from pathlib import Path

from daemon.comparison.results import Answer, Comparison, HeldOut, Prompt
from daemon.terminal.format import count
from daemon.terminal.sanitize import plain, plain_lines

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#e6e5e0, #292c31); --muted: light-dark(#66645e, #9b9b97); }
body { max-width: 1200px; margin: 0 auto; padding: 32px 20px; font: 15px/1.5 system-ui, sans-serif;
  background: light-dark(#fafaf8, #101113); color: light-dark(#1b1b19, #ececea); }
h1 { font-size: 22px; } h2 { margin-top: 36px; font-size: 16px; } h3 { margin: 0; font-size: 13px; font-weight: 500; }
h3, .muted { color: var(--muted); }
table { border-collapse: collapse; } th, td { padding: 5px 24px 5px 0; text-align: right; }
th:first-child { text-align: left; font-weight: 400; } tbody tr { border-top: 1px solid var(--line); }
section { margin: 16px 0; padding: 16px 20px; border: 1px solid var(--line); border-radius: 10px; }
.asked { font-weight: 600; } p { margin: 2px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; gap: 20px 32px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); }
.reference { margin-top: 14px; padding-top: 12px; border-top: 1px dashed var(--line); color: var(--muted); }
"""
# Even if a word of a model became markup, it could neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(comparison: Comparison, file: Path) -> None:
    """Writes the file, whole or not at all. Raises OSError."""
    beside = file.with_name(file.name + ".part")
    try:
        beside.write_text(page_of(comparison), encoding="utf-8", errors="replace")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def page_of(comparison: Comparison) -> str:
    names = [contestant.name for contestant in comparison.contestants]
    title = f"{', '.join(names)} of {comparison.base_model}"
    options = comparison.options
    how = "greedy answers" if not options["temperature"] else f"temperature {options['temperature']:g}"
    about = [
        "prompts that the jobs held out" if comparison.prompts_are_held_out else "prompts of a file",
        f"{how} in at most {options['max_tokens']} tokens",
        "base model in 4 bits" if options["quantize"] else "base model in its own precision",
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f'<h1>{_text(title)}</h1>\n<div class="muted">{_text(" · ".join(about))}</div>',
            *(f'<p class="muted">{_text(note)}</p>' for note in comparison.notes),
            *_losses(comparison, names),
            *_judged(comparison),
            "<h2>Answers</h2>",
            *(_prompt(prompt, names) for prompt in comparison.prompts),
            "</body>\n</html>\n",
        ]
    )


def _losses(comparison: Comparison, names: list[str]) -> list[str]:
    common = comparison.common
    sets = [common] if common is not None and comparison.is_one_set else comparison.sets
    if not sets:
        return []
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    rows = [
        f"<tr><th>{_text(_name_of(held_out, names))}</th>"
        + "".join(f"<td>{_number(held_out.losses.get(who))}</td>" for who in range(len(names)))
        + "</tr>"
        for held_out in sets
    ]
    unknown = [names[who] for who in common.unknown] if common is not None else []
    return [
        "<h2>Held-out loss</h2>",
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
        '<p class="muted">Losses compare within a line only.</p>' if len(sets) > 1 else "",
        f'<p class="muted">Not known whether these were trained on it: {_text(", ".join(unknown))}.</p>'
        if unknown
        else "",
    ]


def _name_of(held_out: HeldOut, names: list[str]) -> str:
    whose = "the same for all" if held_out.of is None else f"held out by {names[held_out.of]}"
    return f"{whose}: {count(held_out.answers, 'answer')} of {count(held_out.conversations, 'conversation')}"


def _judged(comparison: Comparison) -> list[str]:
    if not comparison.judged:
        return []
    lines = [
        f"<p>Judge {_text(judged['judge'])}, {_text(' and '.join(judged['pair']))}: {_text(judged['words'])}</p>"
        for judged in comparison.judged
    ]
    return ["<h2>Preferred</h2>", *lines]


def _prompt(prompt: Prompt, names: list[str]) -> str:
    *earlier, last = prompt.turns
    before = "".join(f'<p class="muted">{_text(turn["role"])}: {_lines(turn["content"])}</p>' for turn in earlier)
    answers = "".join(
        f"<div><h3>{_text(name)}</h3>{_answer(answer)}</div>"
        for name, answer in zip(names, prompt.answers, strict=True)
    )
    reference = ""
    if prompt.reference is not None:
        reference = f'<div class="reference"><h3>in the data</h3><p>{_lines(prompt.reference)}</p></div>'
    asked = f'<p class="asked">{_lines(last["content"])}</p>'
    return f'<section>{before}{asked}<div class="answers">{answers}</div>{reference}</section>'


def _answer(answer: Answer | None) -> str:
    if answer is None:
        return '<p class="muted">–</p>'
    cut = ' <span class="muted">… (cut)</span>' if answer.cut else ""
    return f"<p>{_lines(answer.text) or '(nothing)'}{cut}</p>"


def _number(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.4f}"


def _text(value: object) -> str:
    return escape(plain(value))


def _lines(value: str) -> str:
    return escape(plain_lines(value).strip())
