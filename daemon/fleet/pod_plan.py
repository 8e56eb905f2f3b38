"""What the fleet may start: one pod as RunPod's API takes it, and the GPU types that it may have.

{"pod":  {"image": "…", "disk": 50, "mounts": {…}, "env": {…}},        body of POST /v2/pods
 "gpus": [{"id": "NVIDIA H100 80GB HBM3", "memory_gb": 80, "max_pods": 2}, …]}   tried in this order
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from daemon.errors import HostUnfit

NAME_PREFIX = "brightrun-"
_PLAIN_PATH = re.compile(r"[\w./~-]{1,200}\.json|/[\w./~-]{1,200}")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|DATABASE_URL|AUTHORIZATION", re.IGNORECASE)


class GpuKind(BaseModel):
    """A GPU type that a pod may have. `memory_gb` is per GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    count: int = Field(default=1, ge=1, le=8)
    memory_gb: float | None = Field(default=None, gt=0)
    max_pods: int | None = Field(default=None, ge=0)


class FleetPlan(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    pod: dict[str, Any]
    gpus: tuple[GpuKind, ...] = Field(min_length=1)

    @field_validator("pod")
    @classmethod
    def _pod_is_ours_to_complete(cls, pod: dict[str, Any]) -> dict[str, Any]:
        if not pod.get("image") and not pod.get("templateId"):
            raise ValueError("needs an image (or a templateId)")
        taken = sorted({"name", "gpu", "cpu"} & pod.keys())
        if taken:
            raise ValueError(f"the fleet fills in {', '.join(taken)}: leave it out, and list the GPUs under gpus")
        return pod

    def body(self, name: str, kind: GpuKind) -> dict[str, Any]:
        return {**self.pod, "name": name, "gpu": {"id": kind.id, "count": kind.count}}

    @property
    def secrets(self) -> Iterator[str]:
        """Values of the pod's env that no output may contain, recognised by their names."""
        for name, value in (self.pod.get("env") or {}).items():
            if isinstance(value, str) and _SECRET_NAME.search(name) and not value.startswith("{{"):
                yield value

    @property
    def ends_itself(self) -> bool:
        """Whether the pod's env tells it to end itself when idle. A RunPod template may do so too; we cannot see it."""
        return "TRAINER_IDLE_MINUTES" in (self.pod.get("env") or {}) or "templateId" in self.pod


def read_plan(given: str | None) -> FleetPlan:
    """Parses TRAINER_FLEET_POD: JSON, or the path of a file with it. Raises HostUnfit, which lists every fault."""
    if not given:
        raise HostUnfit("the fleet needs TRAINER_FLEET_POD: the pod to start, as JSON or a file (operator's guide)")
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            # Anything that is not a plain path may be the quoted plan itself, with secrets in its env.
            what = given if _PLAIN_PATH.fullmatch(given) else "what it holds is neither JSON nor the path of a file:"
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise HostUnfit(f"TRAINER_FLEET_POD: {what} cannot be read: {why}") from None
    try:
        return FleetPlan.model_validate(json.loads(text))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise HostUnfit(f"TRAINER_FLEET_POD is not JSON: {error}") from error
        # Values may be secrets: show fields and messages only.
        faults = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False)]
        raise HostUnfit("TRAINER_FLEET_POD is not usable:\n" + "\n".join(faults)) from None
