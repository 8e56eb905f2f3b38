"""Whether a write was sent by the dashboard's own page, and not by another site through the user's browser."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header

from daemon.gateway.job_rows import Refused


def _sent_by_the_page(
    x_dashboard: Annotated[str, Header()] = "", sec_fetch_site: Annotated[str, Header()] = "same-origin"
) -> None:
    """Refuses writes that another site made the browser send: it cannot set this header, nor hide its origin."""
    if x_dashboard != "1" or sec_fetch_site != "same-origin":
        raise Refused(403, "Only the dashboard page may send this request.", "Callers with a key use /cancel and /run.")


SENT_BY_THE_PAGE = [Depends(_sent_by_the_page)]
