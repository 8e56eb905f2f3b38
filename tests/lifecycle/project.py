"""A Supabase project as the daemon sees it: a queue, Storage and a callback receiver, real servers on loopback."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from tests.daemon_process import DaemonProcess
from tests.doubles.receiver import Receiver
from tests.doubles.storage import StorageDouble
from tests.lifecycle.queue import Queue

SECRET = "whsec_" + base64.b64encode(b"marked-callback-secret-of-the-test").decode()


@dataclass
class Project:
    queue: Queue
    storage: StorageDouble
    receiver: Receiver
    folder: Path

    def daemon(self, name: str = "daemon", **settings: Any) -> DaemonProcess:
        daemon = self.queue.daemon(
            self.folder,
            name=name,
            storage="supabase",
            callback_secrets=SECRET,
            allowed_hosts=self.receiver.host,
            lease_seconds=1.5,
            **settings,
        )
        daemon.environment |= {"SUPABASE_URL": self.storage.url, "SUPABASE_SERVICE_ROLE_KEY": self.storage.key}
        return daemon

    def insert(
        self,
        script: list[list[Any]] | None = None,
        *,
        lines: Sequence[str] | None = None,
        user_id: UUID | None = None,
        **columns: Any,
    ) -> UUID:
        """A job whose dataset lies in the project's storage, there before its row as the app has it."""
        name = f"{uuid4()}.jsonl"
        content = lines if lines is not None else [json.dumps({"script": script} if script else {"messages": []})]
        path = f"{user_id or self.queue.user_id}/{name}"
        self.storage.put("lora-datasets", path, ("\n".join(content) + "\n").encode())
        return self.queue.insert(storage_path=name, user_id=user_id, callback_url=self.receiver.url, **columns)

    async def wait_for(self, job: UUID, status: str, seconds: float = 40.0) -> dict[str, Any]:
        return await asyncio.to_thread(self.queue.wait_for, job, status, seconds=seconds)

    async def endings(self, job: UUID, event: str = "job.completed") -> list[Any]:
        def of_job(received: list[Any]) -> list[Any]:
            return [one for one in received if one.payload["job_id"] == str(job) and one.payload["event"] == event]

        return of_job(await self.receiver.wait_for(lambda received: bool(of_job(received)), seconds=20))

    async def tidied(self) -> None:
        """Until no object is noted any more as one that a row may not name."""
        async with asyncio.timeout(60):
            while self.queue.select("SELECT job_id FROM training_uploads"):
                await asyncio.sleep(0.05)

    def objects(self) -> set[str]:
        return self.storage.names("lora-models")
