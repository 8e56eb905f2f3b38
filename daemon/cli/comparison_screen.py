"""Shows a comparison on a terminal: each prompt with all answers side by side, readable at 80 columns; the losses."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from daemon.comparison.results import BASE, Comparison, HeldOut, Prompt
from daemon.terminal.console import columns_table, console, facts_table
from daemon.terminal.format import count
from daemon.terminal.sanitize import plain, plain_lines

# Below this, a column holds no sentence: answers go one below the other.
_NARROWEST_COLUMN = 24


def show_comparison(comparison: Comparison) -> None:
    screen = console()
    for number, prompt in enumerate(comparison.prompts, start=1):
        _show_prompt(comparison, number, prompt)
    _show_losses(comparison)
    for judged in comparison.judged:
        pair = " and ".join(map(plain, judged["pair"]))
        screen.print(Text.assemble((f"judge {plain(judged['judge'])}, {pair}: ", "dim"), plain(judged["words"])))
    options = comparison.options
    how = "greedily" if not options["temperature"] else f"at temperature {options['temperature']:g}"
    bits = "4 bits" if options["quantize"] else "its own precision"
    from_where = "held-out prompts" if comparison.prompts_are_held_out else "prompts of the file"
    screen.print(
        Text(
            f"{plain(comparison.base_model)} in {bits}; {count(len(comparison.prompts), 'prompt')} ({from_where}), "
            f"answered {how} in at most {options['max_tokens']} tokens",
            style="dim",
        )
    )
    for note in comparison.notes:
        screen.print(Text(f"note: {plain(note)}", style="yellow"))


def _show_prompt(comparison: Comparison, number: int, prompt: Prompt) -> None:
    screen = console()
    screen.print(Text(f"{number}/{len(comparison.prompts)}", style="dim"))
    for turn in prompt.turns:
        role = "you" if turn["role"] == "user" else turn["role"]
        style = "bold" if turn is prompt.turns[-1] else "dim"
        screen.print(Text.assemble((f"{role} › ", "dim"), (plain_lines(turn["content"]).strip(), style)))
    names = [plain(contestant.name) for contestant in comparison.contestants]
    texts = [_answer(prompt, who) for who in range(len(names))]
    if screen.width // len(names) >= _NARROWEST_COLUMN:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for name in names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*texts)
    else:
        table = facts_table()
        for name, text in zip(names, texts, strict=True):
            table.add_row(name, text)
    screen.print(table)
    if prompt.reference is not None:
        screen.print(Text(f"in the data: {plain_lines(prompt.reference).strip()}", style="dim"))
    screen.print()


def _answer(prompt: Prompt, who: int) -> Text:
    answer = prompt.answers[who]
    if answer is None:
        return Text("–", style="dim")
    text = Text(plain_lines(answer.text).strip() or "(nothing)", style="" if who == BASE else "green")
    return text.append(" … (cut)", "dim") if answer.cut else text


def _show_losses(comparison: Comparison) -> None:
    screen, common = console(), comparison.common
    if not comparison.sets:
        screen.print(Text("no held-out loss: no held-out conversations are known", style="dim"))
        return
    with_own = not (common is not None and comparison.is_one_set)
    table = columns_table()
    table.add_column("HELD-OUT LOSS")
    if common is not None:
        table.add_column("SAME FOR ALL", justify="right")
    if with_own:
        table.add_column("ITS OWN SET", justify="right")
        table.add_column("BASE THERE", justify="right")
    for who, contestant in enumerate(comparison.contestants):
        cells = [plain(contestant.name)]
        if common is not None:
            cells.append(_loss(common, who))
        if with_own:
            own = comparison.own_of(who)
            cells += ["–", "–"] if own is None else [_loss(own, who), _loss(own, BASE)]
        table.add_row(*cells)
    screen.print(table)
    if common is not None:
        screen.print(Text(_about(common, "held out by all" if with_own else "held out"), style="dim"))
        if common.unknown:
            who_else = ", ".join(plain(comparison.contestants[who].name) for who in common.unknown)
            screen.print(Text(f"not known whether these were trained on it: {who_else}", style="yellow"))
    elif len(comparison.contestants) > 2:
        screen.print(Text("no conversation is held out by all: these losses do not compare", style="yellow"))


def _loss(held_out: HeldOut, who: int) -> str:
    loss = held_out.losses.get(who)
    return "–" if loss is None else f"{loss:.4f}"


def _about(held_out: HeldOut, what: str) -> str:
    conversations, tokens = count(held_out.conversations, "conversation"), f"{held_out.tokens:,} tokens"
    return f"{what}: {count(held_out.answers, 'answer')} of {conversations}, {tokens}"
