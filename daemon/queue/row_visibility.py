"""Whether the daemon sees the rows that there are.

Row security hides rows without a word: a queue whose jobs are hidden looks like an empty one. So an idle host as well
compares, now and then, what it sees with what there is, and says whose fault it is and what to do.
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

# A few rows by primary key: cheap, and soon enough for who has just made a policy.
SIGHT_SECONDS = 10.0
HIDDEN = "hidden rows"
UNPREPARED = "database"


@dataclass(frozen=True)
class VisibilityReport:
    """How many of a few rows of each table are there and hidden from us. `can_tell` False: nobody could say."""

    can_tell: bool
    tables: str
    hidden: Mapping[str, int]


@dataclass(frozen=True)
class HidingPolicy:
    """A policy that can keep rows of a table from the daemon; None: no policy lets it see the table."""

    relation: str
    policy: str | None
    verb: str
    condition: str | None


class RowVisibility:
    """The statements that row security cannot filter. Raises what Database raises."""

    def __init__(self, database: Database) -> None:
        self._statements = FencedStatements(database)

    async def read_row_visibility(self) -> VisibilityReport:
        """Whether rows are hidden from us."""
        return VisibilityReport(**(await self._statements.run("read_row_visibility", {}))[0])

    async def read_hiding_policies(self) -> list[HidingPolicy]:
        """Whose fault that may be."""
        return [HidingPolicy(**row) for row in await self._statements.run("read_hiding_policies", {})]

    async def may_come_back(self, job_id: UUID) -> bool:
        """Whether somebody may still want what lies on a volume of this job. True where that cannot be told now."""
        try:
            found = await self._statements.find_job(job_id)
        except (DatabaseAway, HostUnfit, StatementRefused):
            return True
        return not found.can_tell or (found.job_exists and found.state not in FINAL)


async def watch_row_visibility(visibility: RowVisibility, troubles: Troubles) -> None:
    """Keep the troubles of hidden rows, and of tables and rights that are missing, true until cancelled."""
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
    """Whether rows are hidden from us now, or may be and nobody could tell."""
    sight = await visibility.read_row_visibility()
    return bool(sight.hidden) or (not sight.can_tell and bool(await visibility.read_hiding_policies()))


async def what_is_hidden(visibility: RowVisibility) -> str | None:
    """In words what is hidden from us, by which policy, and what to do; None when we see everything."""
    sight = await visibility.read_row_visibility()
    if sight.can_tell and not sight.hidden:
        return None
    return in_words(sight, await visibility.read_hiding_policies())


def in_words(sight: VisibilityReport, policies: list[HidingPolicy]) -> str | None:
    """None where nothing is hidden: we see each row that was looked up, or no policy could hide one."""
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
    """What the operator does about one policy."""
    if policy.policy is None:
        return f"no policy lets training_daemon see all of {policy.relation}: see the operator's guide on row security"
    name = f'"{policy.policy}"'
    return f"policy {name} binds it: ALTER POLICY {name} ON public.{policy.relation} TO authenticated"
