"""A directory shared by the launcher and its ranks: the spec, the stop request, and each rank's failure."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from training.events import ErrorCode, RunFailed
from training.spec import JobSpec


class RankFailure(BaseModel):
    """How a rank failed. `at` is the kernel's monotonic clock, which all processes of a host share."""

    model_config = ConfigDict(frozen=True)

    rank: int
    at: float
    failed: RunFailed


@dataclass(frozen=True)
class RankFolder:
    folder: Path

    @classmethod
    def lay(cls, folder: Path, spec: JobSpec) -> RankFolder:
        """Creates an empty shared folder with the spec in it."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        return cls(folder)

    def spec(self) -> JobSpec:
        return JobSpec.model_validate_json((self.folder / "spec.json").read_text(encoding="utf-8"))

    @property
    def stop_is_wished(self) -> bool:
        return (self.folder / "stop").exists()

    def request_stop(self) -> None:
        (self.folder / "stop").touch()

    @property
    def is_finished(self) -> bool:
        """True once the first rank has reported `adapter_saved`."""
        return (self.folder / "finished").exists()

    def note_finished(self) -> None:
        (self.folder / "finished").touch()

    def leave_failure(self, rank: int, failed: RunFailed, at: float) -> None:
        report = RankFailure(rank=rank, at=at, failed=failed)
        (self.folder / f"failed-{rank}.json").write_text(report.model_dump_json(), encoding="utf-8")

    def cause(self) -> RunFailed | None:
        """Returns the failure that came first, if any was written.

        A specific error code comes before `internal`: a rank whose neighbour has gone fails with `internal`, and may be
        quicker.
        """
        reports = []
        for path in self.folder.glob("failed-*.json"):
            try:
                reports.append(RankFailure.model_validate_json(path.read_text(encoding="utf-8")))
            except (OSError, ValidationError):
                continue  # it was killed while writing
        first = min(reports, key=lambda report: (report.failed.code is ErrorCode.INTERNAL, report.at), default=None)
        return None if first is None else first.failed
