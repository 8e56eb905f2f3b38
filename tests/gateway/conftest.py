"""A gateway of one's own for each test: the real process on a loopback port, over a fresh database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.daemon_process import DaemonProcess
from tests.lifecycle.queue import Queue
from tests.paths import ROOT
from tests.postgres import Server

KEY = "the-key-of-this-test-0123456789"
SERVE = (sys.executable, str(ROOT / "tests" / "gateway" / "serve.py"))


class Gateway(DaemonProcess):
    """As DaemonProcess; `client` speaks to it with the right key."""

    def __init__(self, queue: Queue, folder: Path, **settings: object) -> None:
        given = {
            "gateway_keys": KEY,
            "gateway_host": "127.0.0.1",
            "gateway_port": 0,
            "service_user_id": queue.user_id,
        } | settings
        super().__init__(queue.dsn, folder, name="gateway", command=SERVE, **given)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.wait_for_log('gateway_started')['port']}"

    def client(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


@pytest.fixture
def gateway(queue: Queue, tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(queue, tmp_path) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as caller:
        yield caller


@pytest.fixture(scope="module")
def shared_client(
    postgres: Server, migrated_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """One gateway for a whole file's questions that leave no trace."""
    folder = tmp_path_factory.mktemp("gateway")
    with (
        postgres.database(template=migrated_template) as name,
        Gateway(Queue(postgres.dsn(name), folder), folder, gateway_requests_per_second=1000) as running,
        running.client() as caller,
    ):
        yield caller
