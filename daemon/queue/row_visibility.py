"""Whether the daemon sees the rows that there are.

Row security hides rows without a word: a queue whose jobs are hidden looks like an empty one. So an idle host as well
compares, now and then, what it sees with what there is, and says whose fault it is and what to do.
"""

from __future__ import annotations

import asyncio

import structlog

from daemon.chores import worked
from daemon.errors import DatabaseAway, DatabaseUnprepared, HostUnfit, StatementRefused
from daemon.queue.store import HidingPolicy, Sight, SqlJobStore
from daemon.troubles import Troubles

log = structlog.get_logger()

# A few rows by primary key: cheap, and soon enough for who has just made a policy.
SIGHT_SECONDS = 10.0
HIDDEN = "hidden rows"
UNPREPARED = "database"


async def watch_sight(store: SqlJobStore, troubles: Troubles) -> None:
    """Keep the troubles of hidden rows, and of tables and rights that are missing, true until cancelled."""
    while True:
        try:
            hidden = await what_is_hidden(store)
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


async def is_blind(store: SqlJobStore) -> bool:
    """Whether rows are hidden from us now, or may be and nobody could tell."""
    sight = await store.read_sight()
    return bool(sight.hidden) or (not sight.can_tell and bool(await store.read_hiding_policies()))


async def what_is_hidden(store: SqlJobStore) -> str | None:
    """In words what is hidden from us, by which policy, and what to do; None when we see everything."""
    sight = await store.read_sight()
    if sight.can_tell and not sight.hidden:
        return None
    return in_words(sight, await store.read_hiding_policies())


def in_words(sight: Sight, policies: list[HidingPolicy]) -> str | None:
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
