"""The gateway's statements: it inserts and reads rows, and keeps no state of its own.

It has a few connections, each for one request at a time. Other requests wait, so that a thousand callers cost the
database no more than these. We tried psycopg_pool 3.3.3 instead of the queue. It connects in the background: while
Postgres is away, a request waits for its timeout (20 s; here it is refused immediately) and does not get the reason,
such as a wrong password. After 45 s away, it served again 11 s later than this.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import structlog
from psycopg.types.json import Jsonb

from daemon.database.column_types import clean_text
from daemon.database.connection import Database
from daemon.database.statements import statement
from daemon.errors import DatabaseAway, RowsHidden, StatementRefused
from daemon.gateway.differences import notice_of
from daemon.gateway.schemas import MAX_ID_CHARACTERS, Submission, as_job_id, is_storable
from daemon.queue.states import FINAL
from daemon.settings import Settings
from training.spec import Fault, SpecInvalid, parse_row

log = structlog.get_logger()

CONNECTIONS = 4
# Shorter than any caller waits; a proxy gives up after 100 s.
STATEMENT_SECONDS = 5.0
TURN_SECONDS = 20.0


class Refused(Exception):
    """The request cannot be served. `status` is the HTTP status."""

    def __init__(self, status: int, message: str, hint: str | None = None, faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.hint = hint
        self.faults = faults


@dataclass(frozen=True)
class Standing:
    """A job's current status from its row: its state (or lost), and the status JSON of the contract."""

    job_id: UUID
    state: str
    contract: Mapping[str, Any]
    lease_expires_at: datetime | None = None

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


class GatewayRows:
    """Reads and writes job rows. Raises Refused for faults of the caller, DatabaseAway and HostUnfit like Database."""

    def __init__(self, settings: Settings) -> None:
        self._dsn = settings.database_url.get_secret_value()
        self._service_user_id = settings.service_user_id
        self._free: asyncio.LifoQueue[Database] = asyncio.LifoQueue()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[GatewayRows]:
        """Opens connections when they are first needed and closes them at the end."""
        async with AsyncExitStack() as stack:
            for _ in range(CONNECTIONS):
                database = Database(
                    self._dsn, application_name="brightrun-trainer gateway", statement_seconds=STATEMENT_SECONDS
                )
                self._free.put_nowait(await stack.enter_async_context(database))
            yield self

    async def fetch(self, name: str, parameters: Mapping[str, Any], folder: str = "queries") -> list[dict[str, Any]]:
        """Runs a statement of sql/<folder> on the next free connection."""
        try:
            database = await asyncio.wait_for(self._free.get(), TURN_SECONDS)
        except TimeoutError:
            raise DatabaseAway(f"no free connection within {TURN_SECONDS:.0f} s") from None
        try:
            rows = await database.fetch(statement(name, folder), parameters)
            database.proven = True
            return rows
        finally:
            self._free.put_nowait(database)

    async def submit(self, submission: Submission, hold_seconds: float | None = None) -> UUID:
        """Returns the job of this submission: the row it names, or a new one.

        With `hold_seconds`, daemons do not claim a new row for that long."""
        if submission.row_id is not None:
            known = await self._adopt(submission.row_id, submission.callback_url)
            if known is not None:
                return known
        if self._service_user_id is None:
            raise Refused(
                503,
                "This gateway takes jobs only from callers that insert their own rows.",
                "Send the id of a row as job_id, or let the operator set TRAINER_SERVICE_USER_ID.",
            )
        if submission.dataset_url is None:
            raise dataset_needed("there is no row with this job_id")
        try:
            parse_row(submission.hyperparameters, submission.gpu_config)
        except SpecInvalid as invalid:
            raise invalid_job(invalid) from invalid
        job = submission.model_dump(mode="json") | {"user_id": str(self._service_user_id)}
        rows = await self._call("submit_job", {"job": Jsonb(job), "hold_seconds": hold_seconds})
        return UUID(str(rows[0]["job_id"]))

    async def notice(self, submission: Submission, job_id: UUID) -> str | None:
        """Returns what the submit asks for and the job's row does not say, and adds it to the job's story."""
        rows = await self.fetch("read_submitted_job", {"job_id": job_id})
        message = notice_of(submission, rows[0]) if rows else None
        if message is not None:
            try:
                message = clean_text(message, 2_000)
                await self.fetch("tell_of_differences", {"job_id": job_id, "message": message})
            except StatementRefused as refused:
                log.warning("differences_not_told", job_id=str(job_id), error=str(refused))
        return message

    async def find(self, text: str) -> UUID:
        """Returns the job that a caller names: by its own id, or by the one that he submitted it with.

        Ids that callers chose are looked for among the jobs of the service's user only: other users have their own."""
        if (job_id := as_job_id(text)) is not None:
            return job_id
        if self._service_user_id is None or len(text) > MAX_ID_CHARACTERS or not is_storable(text):
            raise unknown_job()
        named = {"user_id": self._service_user_id, "client_job_id": text}
        found = (await self.fetch("find_client_job", named))[0]
        if found["job_id"] is not None:
            return UUID(str(found["job_id"]))
        if found["can_tell"]:
            raise unknown_job()
        raise RowsHidden("row security may hide the job from training_daemon")

    async def standing(self, job_id: UUID) -> Standing:
        rows = await self.fetch("read_job_standing", {"job_id": job_id})
        if not rows:
            raise await self._why_unknown(job_id)
        return Standing(job_id, **rows[0])

    async def cancel(self, job_id: UUID) -> None:
        """Cancels a job. Cancelling twice is no error; a job that completed or failed is refused."""
        await self._call("cancel_job", {"job_id": job_id})

    async def retry(self, job_id: UUID) -> None:
        """Restarts a failed or cancelled job from zero; any other is refused."""
        await self._call("resubmit_job", {"job_id": job_id})

    async def _adopt(self, job_id: UUID, callback_url: str | None) -> UUID | None:
        rows = await self.fetch("adopt_submission", {"job_id": job_id, "callback_url": callback_url})
        if not rows:
            if isinstance(hidden := await self._why_unknown(job_id), RowsHidden):
                raise hidden
            return None
        if rows[0]["foreign_run"]:
            raise Refused(
                409,
                f"The job is {rows[0]['state']} under an older dispatcher, which took it before this installation.",
                "Insert it again: this service runs queued rows.",
            )
        if rows[0]["held"]:
            raise Refused(
                409,
                "The job was queued before the trainer was installed and is held: another service may have run it.",
                "The operator releases such jobs with `SELECT release_held_jobs()`.",
            )
        return job_id

    async def _why_unknown(self, job_id: UUID) -> Refused | RowsHidden:
        """Refuses a job as unknown only if that is certain, because the caller then gives it up."""
        found = (await self.fetch("find_job", {"job_id": job_id}))[0]
        if found["can_tell"] and not found["job_exists"]:
            return unknown_job()
        return RowsHidden(f"the row of job {job_id} is hidden from training_daemon by row security")

    async def _call(self, name: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Like `fetch`, but turns a refusal of the database's functions into the caller's response."""
        try:
            return await self.fetch(name, parameters)
        except StatementRefused as refused:
            error = refused.__cause__
            if isinstance(error, psycopg.errors.ForeignKeyViolation):
                raise Refused(
                    503,
                    "The user that is to own this job does not exist.",
                    "The operator must set TRAINER_SERVICE_USER_ID to a user of the project.",
                ) from refused
            if isinstance(error, psycopg.DataError):
                raise Refused(
                    422,
                    f"a value does not fit into its column: {error.diag.message_primary}",
                    "Correct the value and send it again.",
                ) from refused
            # The functions raise PT400, PT404 and PT409: the last three digits are HTTP's (PostgREST's custom).
            state = refused.sqlstate or ""
            if not isinstance(error, psycopg.Error) or not state.startswith("PT"):
                raise
            if state == "PT404" and "job_id" in parameters:
                raise await self._why_unknown(parameters["job_id"]) from refused
            raise Refused(
                int(state[2:]),
                error.diag.message_primary or "the database refuses the request",
                error.diag.message_hint,
            ) from refused


def unknown_job() -> Refused:
    return Refused(404, "There is no such job.", "Use the id that the submit returned, or the job_id that you sent.")


def dataset_needed(why: str) -> Refused:
    faults = (Fault("dataset_url", f"needed: {why}"),)
    return Refused(422, "A job needs a dataset.", "Send dataset_url with the address of the file.", faults)


def invalid_job(invalid: SpecInvalid) -> Refused:
    hint = "Correct the named fields and send it again."
    return Refused(422, "The job cannot be run as it is written.", hint, tuple(invalid.faults))
