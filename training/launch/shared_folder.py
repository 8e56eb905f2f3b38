"""The folder that the launcher and its ranks share: the spec, the wish to stop, what each rank failed of."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from training.events import ErrorCode, Failed
from training.spec import JobSpec


class RankFailure(BaseModel):
    """What a rank had to say at its end. `at` is the kernel's monotonic clock, which all processes of a host share."""

    model_config = ConfigDict(frozen=True)

    rank: int
    at: float
    failed: Failed


@dataclass(frozen=True)
class RankFolder:
    folder: Path

    @classmethod
    def lay(cls, folder: Path, spec: JobSpec) -> RankFolder:
        """An empty desk with the spec on it."""
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
        """The first rank has said `adapter_saved`."""
        return (self.folder / "finished").exists()

    def note_finished(self) -> None:
        (self.folder / "finished").touch()

    def leave_failure(self, rank: int, failed: Failed, at: float) -> None:
        report = RankFailure(rank=rank, at=at, failed=failed)
        (self.folder / f"failed-{rank}.json").write_text(report.model_dump_json(), encoding="utf-8")

    def cause(self) -> Failed | None:
        """The failure that came first, if any was written down.

        One with a name counts before an `internal` one: a rank whose neighbour has gone fails of that, and may be
        quicker to say so.
        """
        reports = []
        for path in self.folder.glob("failed-*.json"):
            try:
                reports.append(RankFailure.model_validate_json(path.read_text(encoding="utf-8")))
            except (OSError, ValidationError):
                continue  # it was killed while it wrote
        first = min(reports, key=lambda report: (report.failed.code is ErrorCode.INTERNAL, report.at), default=None)
        return None if first is None else first.failed
