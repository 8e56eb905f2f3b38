"""Reads the hourly price of our pod from RunPod and keeps it current. What a job costs: daemon/report/cost.py."""

from __future__ import annotations

import asyncio

import structlog

from daemon.chores import worked
from daemon.pod.runpod_api import API, Key, RunPod, RunPodError

log = structlog.get_logger()


PRICE_SECONDS = 3600.0


# The first job waits for the first answer, so that its cost is right from the first second.
PRICE_CALL_SECONDS = 5.0


PRICE_RETRY_SECONDS = 60.0


class PodPrice:
    """RunPod's hourly price for one GPU of this pod. None until it is known, or if this host is not a pod."""

    def __init__(self, pod_id: str | None, keys: list[Key], api: str = API) -> None:
        self._pod_id = pod_id
        self._keys = keys
        self._api = api
        self._fault: str | None = None
        self.per_gpu_hour: float | None = None

    async def run(self) -> None:
        """Keeps the price current until cancelled. The caller does the first `read`."""
        while self._pod_id is not None:
            await asyncio.sleep(PRICE_RETRY_SECONDS if self.per_gpu_hour is None else PRICE_SECONDS)
            await self.read()
            worked()

    async def read(self) -> None:
        """Asks once; without an answer the last price stays."""
        if self._pod_id is None:
            return
        try:
            async with RunPod(self._keys, api=self._api, call_seconds=PRICE_CALL_SECONDS) as runpod:
                pod = await runpod.read_pod(self._pod_id)
        except RunPodError as error:
            # Warn once: a key that lacks the right lacks it every minute.
            say = log.debug if str(error.fault) == self._fault else log.warning
            say("pod_price_unknown", fault=error.fault, error=str(error))
            self._fault = str(error.fault)
            return
        self._fault = None
        if pod.price_per_gpu_hour != self.per_gpu_hour:
            log.info("pod_price", per_gpu_hour=pod.price_per_gpu_hour, gpu_type=pod.gpu_type, gpus=pod.gpu_count)
        self.per_gpu_hour = pod.price_per_gpu_hour
