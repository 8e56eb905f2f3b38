"""The dashboard's routes: the page and its files, login, logout, the event stream, a job's details, cancel and retry.

The page is static and contains no data; rows arrive as JSON and go into the document as text. The policy
below makes the browser enforce that: no script, style or request from elsewhere, and no assignment of
markup at all (Trusted Types).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Annotated, Literal
from uuid import UUID

import structlog
from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, Field

from daemon.errors import JobDelayed, JobFailed
from daemon.gateway.access.keys import KeyRing
from daemon.gateway.access.sessions import COOKIE, COOKIE_PATH, SESSION_SECONDS, Sessions, cookie_value
from daemon.gateway.dashboard.broadcaster import Feed, TooManyWatchers
from daemon.gateway.dashboard.comparisons import Voters, add_comparisons
from daemon.gateway.dashboard.own_page import SENT_BY_THE_PAGE
from daemon.gateway.dashboard.sse import EventStream
from daemon.gateway.dashboard.state import plain
from daemon.gateway.job_rows import GatewayRows, Refused, unknown_job
from daemon.report.trained_with import asked_and_used, setting_in_words
from daemon.settings import Settings
from daemon.storage.interface import LocalFile
from daemon.storage.open import open_storage

log = structlog.get_logger()

# More than a wide screen has pixels for.
CURVE_POINTS = 1500
STORY_EVENTS = 2000

PAGE_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # The browser revalidates by ETag, so a new version shows immediately.
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

JobId = Annotated[UUID, Path()]


class Login(BaseModel):
    key: Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    etag: str


def add_dashboard(app: FastAPI, settings: Settings, rows: GatewayRows, feed: Feed, sessions: Sessions) -> None:
    """Adds the dashboard's routes. They serve its page only, and are not part of the documented API."""
    _add_files(app)
    ring = KeyRing([key.get_secret_value() for key in settings.gateway_keys])
    _add_session(app, ring, sessions)
    _add_stream(app, feed, sessions)
    _add_reads(app, rows)
    _add_writes(app, rows)
    _add_downloads(app, settings, rows)
    add_comparisons(app, rows, Voters(ring, sessions))


def _add_files(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return RedirectResponse("/dashboard", headers={"Cache-Control": "no-store"})

    @app.get("/dashboard", include_in_schema=False)
    async def page(request: Request) -> Response:
        return _file_answer(request, "index.html")

    @app.get("/dashboard/static/{name:path}", include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        return _file_answer(request, name)


def _add_session(app: FastAPI, ring: KeyRing, sessions: Sessions) -> None:
    @app.post("/dashboard/login", include_in_schema=False, dependencies=SENT_BY_THE_PAGE)
    async def login(request: Request, login: Login) -> Response:
        place = ring.find(f"Bearer {login.key}")
        if place is None:
            log.warning("dashboard_login_refused", client=request.client.host if request.client else None)
            raise Refused(
                401, "This key is not one of the gateway's.", "The operator sets the keys in TRAINER_GATEWAY_KEYS."
            )
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE,
            sessions.open(place),
            max_age=SESSION_SECONDS,
            path=COOKIE_PATH,
            secure=_came_by_https(request),
            httponly=True,
            samesite="strict",
        )
        return answer

    @app.get("/dashboard/session", include_in_schema=False)
    async def session() -> Response:
        """Answers 204 to a signed-in user; the gate answers everyone else."""
        return Response(status_code=204)

    @app.post("/dashboard/logout", include_in_schema=False, dependencies=SENT_BY_THE_PAGE)
    async def logout(request: Request) -> Response:
        sessions.end(cookie_value(request.headers.get("cookie", "")))
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path=COOKIE_PATH, secure=_came_by_https(request), httponly=True, samesite="strict")
        return answer


def _add_stream(app: FastAPI, feed: Feed, sessions: Sessions) -> None:
    @app.get("/dashboard/stream", include_in_schema=False)
    async def stream(request: Request, last_event_id: Annotated[str, Header(max_length=64)] = "") -> Response:
        """Streams events for as long as the session lasts; a caller who sends a key has no session."""
        cookie = "" if "authorization" in request.headers else cookie_value(request.headers.get("cookie", ""))
        try:
            client = feed.join(last_event_id, lambda: not cookie or sessions.find(cookie) is not None)
        except TooManyWatchers:
            raise Refused(503, "Too many dashboards are open.", "Close some, or try again in a minute.") from None
        return EventStream(client, feed.leave)


def _add_reads(app: FastAPI, rows: GatewayRows) -> None:
    @app.get("/dashboard/jobs/{job_id}", include_in_schema=False)
    async def job(job_id: JobId) -> Response:
        """Answers one job with its row, spec, events and curve: four reads when a job is opened."""
        ids = [job_id]
        parameters = {"ids": ids, "states": None, "user_id": None, "model": None, "limit": 1}
        lines, details, story, curve = await asyncio.gather(
            rows.fetch("list_jobs", parameters, "reads"),
            rows.fetch("read_job", {"job_id": job_id}, "reads"),
            rows.fetch("read_story", {"ids": ids, "after": 0, "limit": STORY_EVENTS}, "reads"),
            rows.fetch("read_curves", {"ids": ids, "most": CURVE_POINTS}, "reads"),
        )
        if not lines or not details:
            raise unknown_job()
        whole = {
            "job": lines[0] | details[0],
            "settings": [
                (name, setting_in_words(asked), setting_in_words(used))
                for name, asked, used in asked_and_used(
                    details[0]["hyperparameters"], details[0]["gpu_config"], details[0]["trained_with"]
                )
            ],
            "story": story,
            "curve": {
                "points": [(row["step"], row["loss"]) for row in curve],
                "validation": [
                    (row["step"], row["validation_loss"]) for row in curve if row["validation_loss"] is not None
                ],
            },
        }
        return JSONResponse(plain(whole), headers={"Cache-Control": "no-store"})


def _add_writes(app: FastAPI, rows: GatewayRows) -> None:
    @app.post("/dashboard/jobs/{job_id}/{move}", include_in_schema=False, dependencies=SENT_BY_THE_PAGE)
    async def move(job_id: JobId, move: Literal["cancel", "retry"]) -> Response:
        """Cancels or retries a job. The database's functions decide; a refusal has their message."""
        await (rows.cancel(job_id) if move == "cancel" else rows.retry(job_id))
        log.info("job_cancelled" if move == "cancel" else "job_resubmitted", job_id=str(job_id), by="dashboard")
        return Response(status_code=204)


def _add_downloads(app: FastAPI, settings: Settings, rows: GatewayRows) -> None:
    @app.get("/dashboard/jobs/{job_id}/files/{name}", include_in_schema=False)
    async def download(job_id: JobId, name: Annotated[str, Path(pattern="^[a-z_]{1,40}$")]) -> Response:
        """Downloads a file of a completed job: from a folder through the gateway, from Supabase by a signed URL."""
        found = await rows.fetch("read_artifact", {"job_id": job_id, "name": name}, "reads")
        if not found:
            raise Refused(404, "The job has no such file.", "Only a completed job has files.")
        bucket, path = found[0]["bucket"], found[0]["path"]
        storage = open_storage(settings)
        try:
            source = await storage.open_dataset(bucket, path)
        except JobFailed:
            raise Refused(
                404,
                f"the object {bucket}/{path} is not in this gateway's storage.",
                "The gateway needs the GPU hosts' storage settings: SUPABASE_URL and its key, or the same folder.",
            ) from None
        except JobDelayed as error:
            raise Refused(503, "The storage does not answer.", "Try again in a minute.") from error
        finally:
            await storage.close()
        filename = f"{str(job_id)[:8]}-{PurePosixPath(path).name}"
        if isinstance(source, LocalFile):
            return FileResponse(
                source.path,
                media_type="application/octet-stream",
                filename=filename,
                headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
            )
        # Supabase takes the file's name from `download`. The URL contains the signature, so it is never a referrer.
        headers = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        return RedirectResponse(f"{source.url}&download={filename}", headers=headers)


def _came_by_https(request: Request) -> bool:
    # A proxy that terminates TLS sets this header; a caller who forges it only loses his own cookie.
    return request.url.scheme == "https" or request.headers.get("x-forwarded-proto", "").startswith("https")


def _file_answer(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise Refused(404, "There is no such file.")
    headers = {**PAGE_HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.kind, headers=headers)


@cache
def _files() -> Mapping[str, _File]:
    """Reads all of static/ once (a few hundred kilobytes), by path. Nothing else is served."""
    found: dict[str, _File] = {}

    def collect(folder: Traversable, prefix: str) -> None:
        for item in folder.iterdir():
            if item.is_dir():
                collect(item, f"{prefix}{item.name}/")
            elif (kind := _TYPES.get(PurePosixPath(item.name).suffix)) is not None:
                content = item.read_bytes()
                found[prefix + item.name] = _File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:20]}"')

    collect(resources.files("daemon.gateway.dashboard") / "static", "")
    return found
