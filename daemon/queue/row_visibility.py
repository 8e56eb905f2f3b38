"""Whether the daemon can see the rows that exist.

Row security hides rows without an error: a queue whose jobs are hidden looks like an empty one. So even an idle host
compares, now and then, what it sees with what exists, and reports which policy hides rows and how to change it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

import structlog

from daemon.chores import worked
from daemon.database.connection import Database
from daemon.errors import DatabaseAway, DatabaseUnprepared, HostUnfit, StatementRefused
from daemon.queue.fenced_statements import FencedStatements
from daemon.queue.states import FINAL
from daemon.troubles import Troubles

log = structlog.get_logger()

# A few rows by primary key: cheap, and soon enough for an operator who has just created a policy.
SIGHT_SECONDS = 10.0
HIDDEN = "hidden rows"
UNPREPARED = "database"


@dataclass(frozen=True)
class VisibilityReport:
    """How many rows of a small sample of each table exist but are hidden from us. `can_tell` False: it is unknown."""

    can_tell: bool
    tables: str
    hidden: Mapping[str, int]


@dataclass(frozen=True)
class HidingPolicy:
    """A policy that can hide rows of a table from the daemon; `policy` None: no policy lets it see the table."""

    relation: str
    policy: str | None
    verb: str
    condition: str | None


class RowVisibility:
    """The statements that row security cannot filter. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self._statements = FencedStatements(database)

    async def read_row_visibility(self) -> VisibilityReport:
        """Checks whether rows are hidden from us."""
        return VisibilityReport(**(await self._statements.run("read_row_visibility", {}))[0])

    async def read_hiding_policies(self) -> list[HidingPolicy]:
        """Lists the policies that may hide them."""
        return [HidingPolicy(**row) for row in await self._statements.run("read_hiding_policies", {})]

    async def may_come_back(self, job_id: UUID) -> bool:
        """Whether a volume's files of this job may still be needed. True if that is unknown now."""
        try:
            found = await self._statements.find_job(job_id)
        except (DatabaseAway, HostUnfit, StatementRefused):
            return True
        return not found.can_tell or (found.job_exists and found.state not in FINAL)


async def watch_row_visibility(visibility: RowVisibility, troubles: Troubles) -> None:
    """Keeps the troubles of hidden rows, and of missing tables and grants, up to date until cancelled."""
    while True:
        try:
            hidden = await what_is_hidden(visibility)
        except (DatabaseUnprepared, HostUnfit, StatementRefused) as error:
            troubles.begin(UNPREPARED, str(error))
        except DatabaseAway as error:
            log.debug("sight_not_checked", error=str(error))
        else:
            worked()
            troubles.end(UNPREPARED)
            if hidden is None:
                troubles.end(HIDDEN)
            else:
                troubles.begin(HIDDEN, hidden)
        await asyncio.sleep(SIGHT_SECONDS)


async def is_blind(visibility: RowVisibility) -> bool:
    """Whether rows are hidden from us now, or may be, which is unknown."""
    sight = await visibility.read_row_visibility()
    return bool(sight.hidden) or (not sight.can_tell and bool(await visibility.read_hiding_policies()))


async def what_is_hidden(visibility: RowVisibility) -> str | None:
    """Describes what is hidden from us, by which policy, and what to do; None when we see everything."""
    sight = await visibility.read_row_visibility()
    if sight.can_tell and not sight.hidden:
        return None
    return in_words(sight, await visibility.read_hiding_policies())


def in_words(sight: VisibilityReport, policies: list[HidingPolicy]) -> str | None:
    """Describes what is hidden; None if nothing is: we see each sampled row, or no policy could hide one."""
    if sight.can_tell:
        if not sight.hidden:
            return None
        tables = sorted(sight.hidden)
        policies = [policy for policy in policies if policy.relation in tables] or policies
        seen = f"Row security hides rows of {', '.join(tables)} from training_daemon"
    elif policies:
        tables = sorted({policy.relation for policy in policies})
        seen = f"Row security may hide rows of {', '.join(tables)} from training_daemon, and from their owner as well"
    else:
        return None
    cures = "; ".join(cure(policy) for policy in policies) or "see pg_policies for what hides them"
    return f"{seen}. {cures}. Until then jobs wait, running ones go on, and nothing is taken for deleted."


def cure(policy: HidingPolicy) -> str:
    """Returns what the operator should do about one policy."""
    if policy.policy is None:
        return f"no policy lets training_daemon see all of {policy.relation}: see the operator's guide on row security"
    name = f'"{policy.policy}"'
    return f"policy {name} binds it: ALTER POLICY {name} ON public.{policy.relation} TO authenticated"
