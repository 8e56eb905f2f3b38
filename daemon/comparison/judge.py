"""A model as judge, at any endpoint with OpenAI's chat completions.

Each pair is asked twice, with the answers in both orders, because models prefer what stands first or last: only a
preference that survives the exchange counts, else it is a tie. Its verdicts are kept apart from people's votes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import httpx

from daemon.comparison.record import Verdict
from daemon.comparison.results import Comparison, Prompt
from daemon.comparison.rubric import DEFAULT_RUBRIC, Side, messages_of, read_verdict
from daemon.comparison.tally import Choice
from daemon.errors import TrainerError
from daemon.network.endpoint_client import CredentialWithheld, endpoint_client
from daemon.network.retry_after import is_page, is_transient, retry_after_seconds, said_by_page

PATH = "/chat/completions"
TIMEOUT = httpx.Timeout(180.0, connect=10.0)
AT_ONCE = 4
TRIES = 6
FIRST_WAIT_SECONDS = 1.0
# A quota that is full for longer is full for today.
LONGEST_WAIT_SECONDS = 120.0
_SHOWN_CHARACTERS = 300
_KEPT_CHARACTERS = 2000


class JudgeFailed(TrainerError):
    """The judge cannot be asked: the endpoint refuses, or does not answer. Holds no key."""


@dataclass
class Judgement:
    """What a judge said. `turned_over`: pairs in which the order decided; `unread`: pairs without a verdict in both
    orders. `failure`: why not all pairs were asked."""

    model: str
    verdicts: list[Verdict] = field(default_factory=list)
    turned_over: int = 0
    unread: int = 0
    failure: str | None = None

    @property
    def asked(self) -> int:
        """Pairs that were asked about in both orders."""
        return len(self.verdicts) + self.unread


class Judge:
    """`url` is the endpoint's base, such as https://api.openai.com/v1; `rubric` says what is better."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        rubric: str | None = None,
        *,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self._url = url.rstrip("/") if url.rstrip("/").endswith(PATH) else url.rstrip("/") + PATH
        self._model = model
        self._key = key
        self._rubric = rubric or DEFAULT_RUBRIC
        self._first_wait_seconds = first_wait_seconds
        # Some models refuse it; then they are asked without.
        self._options: dict[str, Any] = {"temperature": 0}

    async def judge(
        self, comparison: Comparison, on_progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> Judgement:
        """Judges every pair of contestants on every prompt. A failure ends it; what was said until then is kept."""
        judgement = Judgement(self._model)
        pairs = [
            (number, prompt, one, two)
            for number, prompt in enumerate(comparison.prompts, start=1)
            for one, two in combinations(range(len(comparison.contestants)), 2)
        ]
        waiting, done = iter(pairs), 0

        async def work(client: httpx.AsyncClient) -> None:
            nonlocal done
            for number, prompt, one, two in waiting:
                if judgement.failure is not None:
                    return
                try:
                    self._settle(judgement, number, one, two, await self._both_orders(client, prompt, one, two))
                except JudgeFailed as failed:
                    judgement.failure = judgement.failure or str(failed)
                    return
                done += 1
                on_progress(done, len(pairs))

        async with endpoint_client(self._url, timeout=TIMEOUT) as client:
            await asyncio.gather(*(work(client) for _ in range(AT_ONCE)))
        judgement.verdicts.sort(key=lambda verdict: (verdict.number, verdict.one, verdict.two))
        return judgement

    def _settle(self, judgement: Judgement, number: int, one: int, two: int, said: tuple[str, str]) -> None:
        """Makes one choice of what was said in both orders; `two` stood first in the second."""
        first = _choice(read_verdict(said[0]), turned=False)
        second = _choice(read_verdict(said[1]), turned=True)
        if first is None or second is None:
            judgement.unread += 1
            return
        judgement.turned_over += first != second
        choice: Choice = first if first == second else "tie"
        words = {
            "one_first": {"choice": first, "text": said[0][:_KEPT_CHARACTERS]},
            "two_first": {"choice": second, "text": said[1][:_KEPT_CHARACTERS]},
        }
        judgement.verdicts.append(Verdict(number, one, two, self._model, choice, words))

    async def _both_orders(self, client: httpx.AsyncClient, prompt: Prompt, one: int, two: int) -> tuple[str, str]:
        texts = [answer.text if (answer := prompt.answers[who]) is not None else "" for who in (one, two)]
        return await self._ask(client, prompt, *texts), await self._ask(client, prompt, *reversed(texts))

    async def _ask(self, client: httpx.AsyncClient, prompt: Prompt, first: str, second: str) -> str:
        """Returns what the judge says. Raises JudgeFailed."""
        messages = messages_of(prompt.turns, prompt.reference, first, second, self._rubric)
        wait = self._first_wait_seconds
        for tried in range(1, TRIES + 1):
            options = self._options
            try:
                response = await client.post(
                    self._url,
                    json={"model": self._model, "messages": messages, **options},
                    headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                )
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, CredentialWithheld) as error:
                raise JudgeFailed(f"the judge's address cannot be used: {error}") from None
            except httpx.HTTPError as error:
                fault, asked = f"the judge does not answer ({type(error).__name__})", 0.0
            else:
                if response.status_code == httpx.codes.OK:
                    return self._text_of(response)
                if response.status_code == httpx.codes.BAD_REQUEST and options and "temperature" in response.text:
                    # Another request, which is on its way, may be refused for the same.
                    self._options = {}
                    continue
                fault = f"the judge refused with {response.status_code}: {self._words_of(response)}"
                if not is_transient(response.status_code):
                    raise JudgeFailed(fault)
                asked = retry_after_seconds(response)
            if tried == TRIES or asked > LONGEST_WAIT_SECONDS:
                break
            # Spread out: several requests were refused together.
            await asyncio.sleep(max(asked, wait * random.uniform(0.5, 1.0)))  # noqa: S311 - spreads load, guards nothing
            wait = min(wait * 2, LONGEST_WAIT_SECONDS)
        later = f"; it says to wait {asked:.0f} s" if asked > LONGEST_WAIT_SECONDS else f" in {tried} tries"
        raise JudgeFailed(fault + later)

    def _text_of(self, response: httpx.Response) -> str:
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise JudgeFailed(
                "the judge's answer is not that of chat completions: is this the address of an OpenAI-compatible API, "
                "with /v1 at its end?"
            ) from None
        return text if isinstance(text, str) else ""

    def _words_of(self, response: httpx.Response) -> str:
        """Returns the server's words without our key, which some servers repeat."""
        if is_page(response):
            return said_by_page(response.status_code)
        try:
            found: Any = response.json()
        except ValueError:
            found = response.text
        if isinstance(found, dict):
            error = found.get("error", found)
            found = error.get("message", error) if isinstance(error, dict) else error
        words = " ".join(str(found).split()).rstrip(".") or response.reason_phrase
        return (words.replace(self._key, "…") if self._key else words)[:_SHOWN_CHARACTERS]


def _choice(side: Side | None, *, turned: bool) -> Choice | None:
    if side is None:
        return None
    if side == "TIE":
        return "tie"
    return "two" if (side == "B") != turned else "one"
