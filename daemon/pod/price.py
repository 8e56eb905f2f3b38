"""The price of the pod we run on, asked of RunPod and kept current."""

from __future__ import annotations

import asyncio

import structlog

from daemon.chores import worked
from daemon.pod.runpod_api import API, Key, RunPod, RunPodError

log = structlog.get_logger()


PRICE_SECONDS = 3600.0


# The first job waits for the first answer, so that its cost is right from its first second.
PRICE_CALL_SECONDS = 5.0


PRICE_RETRY_SECONDS = 60.0


class PodPrice:
    """What RunPod charges for a card of this pod an hour; None until it is known, or on a host that is no pod."""

    def __init__(self, pod_id: str | None, keys: list[Key], api: str = API) -> None:
        self._pod_id = pod_id
        self._keys = keys
        self._api = api
        self._fault: str | None = None
        self.per_gpu_hour: float | None = None

    async def run(self) -> None:
        """Keep it current until cancelled; the first reading is the caller's."""
        while self._pod_id is not None:
            await asyncio.sleep(PRICE_RETRY_SECONDS if self.per_gpu_hour is None else PRICE_SECONDS)
            await self.read()
            worked()

    async def read(self) -> None:
        """Ask once; what was known stays where no answer comes."""
        if self._pod_id is None:
            return
        try:
            async with RunPod(self._keys, api=self._api, call_seconds=PRICE_CALL_SECONDS) as runpod:
                pod = await runpod.read_pod(self._pod_id)
        except RunPodError as error:
            # Once is enough for a reader: a key that lacks the right will lack it every minute.
            say = log.debug if str(error.fault) == self._fault else log.warning
            say("pod_price_unknown", fault=error.fault, error=str(error))
            self._fault = str(error.fault)
            return
        self._fault = None
        if pod.price_per_gpu_hour != self.per_gpu_hour:
            log.info("pod_price", per_gpu_hour=pod.price_per_gpu_hour, gpu_type=pod.gpu_type, gpus=pod.gpu_count)
        self.per_gpu_hour = pod.price_per_gpu_hour
