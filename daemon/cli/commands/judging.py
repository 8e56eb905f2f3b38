"""A judge for `compare`: asked on the terminal's behalf, its verdicts counted by pair."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemon.comparison.judge import Judgement
    from daemon.comparison.results import Comparison


def check_judge(url: str | None, model: str | None, rubric: str | None) -> None:
    """Raises Misused for options that do not belong together, before hours are spent on answers."""
    from daemon.cli.errors import Misused

    if url is None:
        if model is not None or rubric is not None:
            raise Misused("there is no judge", "give its address with --judge, such as https://api.openai.com/v1")
        return
    if model is None:
        raise Misused("the judge has no model", "name it with --judge-model")
    if not url.startswith(("https://", "http://")):
        raise Misused(f"the judge's address {url[:80]!r} is no http address", "write it as https://api.openai.com/v1")


def ask_judge(comparison: Comparison, url: str, model: str, rubric: str | None) -> Judgement:
    """Asks about all pairs in both orders. What it says is counted in `comparison.judged`."""
    from daemon.cli.commands.models import model_settings
    from daemon.comparison.judge import Judge
    from daemon.terminal.console import console

    key = model_settings().judge_key
    judge = Judge(url, model, key.get_secret_value() if key is not None else None, _text_of(rubric))
    with console(stderr=True).status(f"asking {model} …") as status:
        judgement = asyncio.run(
            judge.judge(comparison, lambda done, total: status.update(f"{model}: {done} of {total} pairs judged …"))
        )
    comparison.judged = counted(comparison, judgement)
    for count, words in (
        (judgement.turned_over, "the judge preferred by the order in which it saw the answers: counted as ties"),
        (judgement.unread, "the judge gave no verdict in one order or both: not counted"),
    ):
        if count:
            comparison.notes.append(f"On {count} of {judgement.asked} pairs {words}.")
    if judgement.failure is not None:
        comparison.notes.append(f"The judge was not asked about all pairs: {judgement.failure}.")
    return judgement


def counted(comparison: Comparison, judgement: Judgement) -> list[dict[str, Any]]:
    """Counts the verdicts by pair, with words on how far chance goes."""
    from daemon.comparison.tally import Vote, count_votes

    names = [contestant.name for contestant in comparison.contestants]
    told = []
    for one, two in sorted({(verdict.one, verdict.two) for verdict in judgement.verdicts}):
        of_pair = [verdict for verdict in judgement.verdicts if (verdict.one, verdict.two) == (one, two)]
        tally = count_votes(Vote(verdict.number, verdict.choice) for verdict in of_pair)
        votes = {names[one]: tally.votes["one"], names[two]: tally.votes["two"], "tie": tally.votes["tie"]}
        words = tally.in_words(names[one], names[two])
        told.append({"judge": judgement.model, "pair": [names[one], names[two]], "votes": votes, "words": words})
    return told


def _text_of(rubric: str | None) -> str | None:
    """The rubric itself, or the text of the file that it names."""
    from daemon.cli.errors import CommandFailed

    if rubric is None or not _is_file(rubric):
        return rubric
    try:
        return Path(rubric).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandFailed(f"the rubric {rubric} cannot be read: {error}") from error


def _is_file(rubric: str) -> bool:
    try:
        return Path(rubric).is_file()
    except OSError:  # longer than a file's name may be
        return False
