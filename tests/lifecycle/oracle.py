"""The chaos run's judge: an audit trigger records every row version, and rules of its own find what must not be.

It shares no line with the code under test and knows only the tables. Each client says who it is by a setting of its
session, `audit.host` (in its connection URL); the trigger records it beside role, transaction and clock.

    python tests/lifecycle/oracle.py DSN --install
    python tests/lifecycle/oracle.py DSN --storage FOLDER --processes-of FOLDER
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Nothing of the code under test is on the path, nor this folder, whose queue.py hides the standard library's.
    sys.path.pop(0)

import argparse
import hashlib
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

INSTALL = """
CREATE SCHEMA audit;
CREATE TABLE audit.versions (
    n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    transaction text NOT NULL DEFAULT pg_current_xact_id()::text,
    relation text NOT NULL,
    operation text NOT NULL,
    role text,
    host text,
    job_id uuid,
    before jsonb,
    after jsonb,
    lease_epoch bigint
);
CREATE FUNCTION audit.record() RETURNS trigger LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = '' AS $$
DECLARE
    old_row jsonb := CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) END;
    new_row jsonb := CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) END;
    job_column text := CASE TG_TABLE_NAME WHEN 'training_jobs' THEN 'id' ELSE 'job_id' END;
    job uuid := (coalesce(new_row, old_row) ->> job_column)::uuid;
BEGIN
    INSERT INTO audit.versions (relation, operation, role, host, job_id, before, after, lease_epoch)
    VALUES (
        TG_TABLE_NAME, TG_OP, current_setting('role', true), current_setting('audit.host', true), job, old_row, new_row,
        (SELECT lease.epoch FROM public.training_leases AS lease WHERE lease.job_id = job)
    );
    RETURN NULL;
END
$$;
"""
TABLES = (
    "training_jobs", "training_leases", "metrics_points", "training_events", "training_uploads", "training_deliveries",
)  # fmt: skip

# Written down from the design's table of moves, not read from the code.
HELD = {"initializing", "running"}
FINAL = {"completed", "failed", "cancelled"}
MOVES = {
    ("queued", "initializing"), ("initializing", "running"),
    *((held, end) for held in HELD for end in ("completed", "failed", "cancelled", "queued")),
    ("queued", "cancelled"), ("failed", "queued"), ("cancelled", "queued"),
}  # fmt: skip
EXPORTS = {"merged", "gguf", "transformers4"}
# Story lines that a change of state writes itself; every other line is the lease holder's own word.
ANNOUNCED = {
    "queued", "claimed", "started", "completed", "failed", "cancelled", "resubmitted", "released", "reaped", "retrying",
    "delivery",
}  # fmt: skip
# Who is not a daemon says so by this name. Cancels and resubmits are theirs.
APP = "app"
# Its scripted trainer stamps each number that it reports with the epoch it was started under.
STAMPED_MODEL = "tiny"


@dataclass(frozen=True)
class Violation:
    rule: str
    job: str
    words: str
    version: int | None = None

    def __str__(self) -> str:
        return f"{self.rule}: job {self.job}, version {self.version}: {self.words}"


Row = dict[str, Any]


def install(dsn: str) -> None:
    """Record every version of these tables from now on."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(INSTALL.encode())
        for table in TABLES:
            connection.execute(
                f"CREATE TRIGGER zz_audit AFTER INSERT OR UPDATE OR DELETE ON public.{table} "
                f"FOR EACH ROW EXECUTE FUNCTION audit.record()".encode()
            )


class History:
    """What was recorded, and who had the right to write what."""

    def __init__(self, versions: list[Row]) -> None:
        self.versions = versions
        self.by_transaction: dict[str, list[Row]] = defaultdict(list)
        # Who claimed: the session that inserted the lease of a job and epoch.
        self.holder: dict[tuple[str, int], str | None] = {}
        self.claims: Counter[tuple[str, int]] = Counter()
        self.lease_ends: Counter[tuple[str, int]] = Counter()
        self.stamped: set[str] = set()
        for version in versions:
            self.by_transaction[version["transaction"]].append(version)
            if version["relation"] == "training_leases":
                lease = (version["job_id"], (version["after"] or version["before"])["epoch"])
                if version["operation"] == "INSERT":
                    self.holder[lease] = version["host"]
                    self.claims[lease] += 1
                elif version["operation"] == "DELETE":
                    self.lease_ends[lease] += 1
            elif (version["relation"], version["operation"]) == ("training_jobs", "INSERT") and _is_stamped(
                version["after"]
            ):
                self.stamped.add(version["job_id"])

    def of(self, relation: str) -> Iterator[Row]:
        return (version for version in self.versions if version["relation"] == relation)

    def ended_lease(self, version: Row) -> Row | None:
        """The lease of this job that ended in the same transaction."""
        for other in self.by_transaction[version["transaction"]]:
            if (other["relation"], other["operation"], other["job_id"]) == (
                "training_leases",
                "DELETE",
                version["job_id"],
            ):
                return other
        return None

    def lease_now(self, version: Row) -> int | None:
        """The epoch that this job's lease had when the version was written."""
        if version["lease_epoch"] is not None:
            return int(version["lease_epoch"])
        ended = self.ended_lease(version)
        return None if ended is None else int(ended["before"]["epoch"])


def judge_moves(history: History) -> Iterator[Violation]:
    """Legal moves only; a terminal state is left by the app's resubmit alone; one completion a job."""
    completions: Counter[str] = Counter()
    for version in history.of("training_jobs"):
        if version["operation"] != "UPDATE":
            continue
        job, old, new = version["job_id"], version["before"], version["after"]
        move = (old["status"], new["status"])
        completions[job] += move[1] == "completed" != move[0]
        if move[0] != move[1] and move not in MOVES:
            yield Violation("illegal move", job, f"{move[0]} to {move[1]} by {version['host']}", version["n"])
        if move[0] in FINAL and move[1] == "queued" and version["host"] != APP:
            yield Violation("terminal state left", job, f"{move[0]} to queued by {version['host']}", version["n"])
        rise = new["lease_epoch"] - old["lease_epoch"]
        if rise != (move == ("queued", "initializing")):
            yield Violation("epoch", job, f"{old['lease_epoch']} to {new['lease_epoch']} at {move}", version["n"])
        if old["status"] == "completed" and any(
            old[name] != new[name] for name in ("status", "adapter_path", "adapter_sha256", "lease_epoch", "progress")
        ):
            yield Violation("completed job changed", job, f"by {version['host']}", version["n"])
    yield from (Violation("completed twice", job, f"{count} times") for job, count in completions.items() if count > 1)


def judge_job_writers(history: History) -> Iterator[Violation]:
    """Whatever a daemon writes to a job it writes as the holder of the job's present epoch."""
    for version in history.of("training_jobs"):
        host = version["host"]
        if version["operation"] != "UPDATE" or host == APP:
            continue
        job, old, new, n = version["job_id"], version["before"], version["after"], version["n"]
        epoch, move = new["lease_epoch"], (old["status"], new["status"])
        holder = history.holder.get((job, epoch))
        changed = {name for name in new if new[name] != old[name]} - {"updated_at"}
        if move == ("queued", "queued"):
            # Due by the clock, or set aside by whoever met a refusal of the database's when he claimed it.
            if not changed <= {"due", "held"}:
                yield Violation("stale write", job, f"{host} changed {sorted(changed)} of a queued job", n)
        elif move[0] in HELD and move[1] in {"queued", "failed"} and new["error_code"] == "worker_lost":
            yield from _judge_reap(history, version)
        elif holder != host:
            yield Violation("stale write", job, f"{host} changed {sorted(changed)} at epoch {epoch} of {holder}", n)
        elif move[0] in FINAL and not (
            move == ("cancelled", "cancelled") and changed <= {"current_cost", "final_cost"}
        ):
            yield Violation("stale write", job, f"{host} changed {sorted(changed)} of a job that was {move[0]}", n)
        elif move[0] in HELD and move[1] not in HELD:
            ended = history.ended_lease(version)
            if ended is None or ended["before"]["epoch"] != epoch:
                yield Violation("ending without its lease", job, f"{move} at epoch {epoch} by {host}", n)
        stamp = _stamp(new["current_metrics"])
        if job in history.stamped and move[1] in HELD and "current_metrics" in changed and stamp not in {None, epoch}:
            yield Violation("stale numbers", job, f"epoch {stamp}'s numbers under epoch {epoch}", n)


def _judge_reap(history: History, version: Row) -> Iterator[Violation]:
    ended = history.ended_lease(version)
    if ended is None or ended["before"]["epoch"] != version["after"]["lease_epoch"]:
        yield Violation("reaped without its lease", version["job_id"], f"by {version['host']}", version["n"])


def judge_leases(history: History) -> Iterator[Violation]:
    """A lease is made once, renewed by its holder, and ended by its holder or after it ran out."""
    for lease, count in history.claims.items():
        if count > 1:
            yield Violation("epoch claimed twice", lease[0], f"epoch {lease[1]}")
        if history.lease_ends[lease] != 1:
            yield Violation("lease ended other than once", lease[0], f"epoch {lease[1]}: {history.lease_ends[lease]}")
    for version in history.of("training_leases"):
        if version["operation"] == "INSERT":
            continue
        job, old, host = version["job_id"], version["before"], version["host"]
        holder = history.holder.get((job, old["epoch"]))
        if version["operation"] == "UPDATE":
            if host != holder or version["after"]["epoch"] != old["epoch"]:
                yield Violation(
                    "stale write", job, f"{host} renewed the lease {old['epoch']} of {holder}", version["n"]
                )
        elif host != holder and datetime.fromisoformat(old["expires_at"]) >= version["at"]:
            yield Violation(
                "lease taken", job, f"{host} ended the living lease {old['epoch']} of {holder}", version["n"]
            )


# What a reaper, any host, says of a lease that it could not end.
NOT_TAKEN_BACK = "the database refuses to take the job back from its lost host: "


def judge_points_and_story(history: History) -> Iterator[Violation]:
    """Points and story lines are written by the lease's holder, under the lease's epoch, with its own numbers."""
    for version in history.of("metrics_points"):
        job, epoch = version["job_id"], history.lease_now(version)
        if epoch is None or history.holder.get((job, epoch)) != version["host"]:
            yield Violation("stale point", job, f"{version['operation']} by {version['host']} at {epoch}", version["n"])
        elif version["after"] is not None and job in history.stamped and _stamp(version["after"]) != epoch:
            yield Violation("stale numbers", job, f"a point of {_stamp(version['after'])} under {epoch}", version["n"])
    for version in history.of("training_events"):
        line = version["after"]
        if line is None or line["kind"] in ANNOUNCED or line["data"].get("code") == "side_table_failed":
            continue
        job, epoch = version["job_id"], history.lease_now(version)
        if line["kind"] == "set_aside" and epoch is None:
            continue
        if line["kind"] == "notice" and line["message"].startswith(NOT_TAKEN_BACK) and epoch == line["epoch"]:
            continue
        if epoch != line["epoch"] or history.holder.get((job, line["epoch"])) != version["host"]:
            words = f"{line['kind']!r} of epoch {line['epoch']} by {version['host']} at {epoch}"
            yield Violation("stale story", job, words, version["n"])


def judge_uploads(history: History) -> Iterator[Violation]:
    """What may lie in the bucket is noted by the holder of the epoch that it is noted under; anybody may sweep."""
    for version in history.of("training_uploads"):
        note = version["after"]
        if note is None or note["kind"] in EXPORTS:
            continue
        holder = history.holder.get((version["job_id"], note["epoch"]))
        if holder != version["host"]:
            words = f"{version['host']} noted a {note['kind']} at epoch {note['epoch']} of {holder}"
            yield Violation("stale upload", version["job_id"], words, version["n"])


def judge_deliveries(history: History) -> Iterator[Violation]:
    """What follows a job is written down as it completes, and done once, by the holder of its lock."""
    holders: dict[str, str | None] = {}
    # Who holds which claim now, or did until this transaction.
    held: dict[tuple[str, str, int], str | None] = {}
    for version in history.versions:
        job, host, n = version["job_id"], version["host"], version["n"]
        old, new = version["before"], version["after"]
        is_export = version["relation"] == "training_uploads" and new is not None and new["kind"] in EXPORTS
        if is_export and held.get((job, new["kind"], new["epoch"])) != host:
            yield Violation("stale upload", job, f"{host} noted {new['kind']} of claim {new['epoch']}", n)
        if version["relation"] != "training_deliveries" or new is None:
            continue
        if old is None:
            if not any(
                other["relation"] == "training_jobs" and other["after"]["status"] == "completed"
                for other in history.by_transaction[version["transaction"]]
            ):
                yield Violation("delivery without a completion", job, f"{new['kind']} by {host}", n)
            continue
        if host == APP:
            # It may ask for a delivery again.
            continue
        token, earlier = new["lock_token"], old["lock_token"]
        if new["claims"] < old["claims"] or new["attempts"] < old["attempts"] - 1:
            yield Violation("delivery counted back", job, f"{new['kind']} by {host}", n)
        if old["state"] in {"done", "failed"}:
            yield Violation("delivery done again", job, f"{new['kind']} was {old['state']}, by {host}", n)
        elif token is not None and token != earlier:
            holders[token] = host
            held = {claim: of for claim, of in held.items() if claim[:2] != (job, new["kind"])}
            held[job, new["kind"], new["claims"]] = host
            if earlier is not None and datetime.fromisoformat(old["locked_until"]) > version["at"]:
                yield Violation("delivery taken", job, f"{host} took {new['kind']} of {holders.get(earlier)}", n)
            if earlier is not None and new["claims"] != old["claims"] + 1:
                yield Violation("delivery taken", job, f"{new['kind']} kept the names of a lost claim", n)
        elif holders.get(earlier or "") != host:
            yield Violation("stale delivery", job, f"{host} wrote {new['state']} of {holders.get(earlier or '')}", n)


def judge_delivered(jobs: list[Row], deliveries: list[Row], storage: Path | None) -> Iterator[Violation]:
    """Each completed job has what it asked for, all of it has ended, and what is done lies in the store."""
    found = {(str(row["job_id"]), row["kind"]): row for row in deliveries}
    for job in jobs:
        name, completed = str(job["id"]), job["status"] == "completed"
        asked = set((job["hyperparameters"] or {}).get("exports", ())) if completed else set()
        if (had := {kind for other, kind in found if other == name}) != asked:
            yield Violation("other deliveries than asked for", name, f"{sorted(had)}, asked for {sorted(asked)}")
    for (name, kind), row in found.items():
        if row["state"] not in {"done", "failed"} or row["lock_token"] is not None:
            yield Violation("delivery not ended", name, f"{kind} is {row['state']}")
        elif row["state"] == "failed" and not row["error_message"]:
            yield Violation("delivery failed without a word", name, kind)
        elif row["state"] == "done" and storage is not None:
            promised = {row["result"]["manifest"]: row["result"]["manifest_sha256"]} | {
                f"{row['result']['path']}/{file}": facts["sha256"] for file, facts in row["result"]["files"].items()
            }
            for path, sha256 in promised.items():
                if not (storage / path).is_file():
                    yield Violation("export missing", name, path)
                elif hashlib.sha256((storage / path).read_bytes()).hexdigest() != sha256:
                    yield Violation("export differs", name, path)


def _is_stamped(job: Row) -> bool:
    return (job["hyperparameters"] or {}).get("base_model") == STAMPED_MODEL


def _stamp(numbers: Row | None) -> int | None:
    value = (numbers or {}).get("throughput")
    return None if value is None else int(float(value))


def judge_end(history: History, jobs: list[Row], leases: list[Row]) -> Iterator[Violation]:
    """Everything has ended, nothing escaped the audit, and the story tells of each ending once."""
    last = {version["job_id"]: version["after"] for version in history.of("training_jobs")}
    for lease in leases:
        yield Violation("lease left", str(lease["job_id"]), f"epoch {lease['epoch']}")
    endings = Counter(
        (version["job_id"], version["after"]["kind"])
        for version in history.of("training_events")
        if version["operation"] == "INSERT"
    )
    for job in jobs:
        name = str(job["id"])
        if job["status"] not in FINAL:
            yield Violation("not ended", name, f"{job['status']}, attempt {job['attempt']}")
        if (last[name]["status"], last[name]["lease_epoch"]) != (job["status"], job["lease_epoch"]):
            yield Violation("unrecorded change", name, f"now {job['status']} at {job['lease_epoch']}")
        lives = 1 + endings[name, "resubmitted"]
        told = sum(endings[name, kind] for kind in FINAL)
        if job["status"] in FINAL and told != lives:
            yield Violation("endings", name, f"{told} endings told in {lives} lives")


def judge_adapters(history: History, jobs: list[Row], storage: Path) -> Iterator[Violation]:
    """What a completed row promises lies in the store, bit by bit, and is the winner's own.

    The winner may have trained nothing: its story says that it took over what an earlier attempt had finished."""
    adopted = {
        (version["job_id"], version["after"]["epoch"])
        for version in history.of("training_events")
        if version["operation"] == "INSERT" and version["after"]["kind"] == "adapter_adopted"
    }
    for job in jobs:
        if job["status"] != "completed":
            continue
        name, path = str(job["id"]), storage / job["adapter_path"]
        if not path.is_file():
            yield Violation("adapter missing", name, job["adapter_path"])
            continue
        content = path.read_bytes()
        if (hashlib.sha256(content).hexdigest(), len(content)) != (job["adapter_sha256"], job["adapter_bytes"]):
            yield Violation("adapter differs", name, f"{len(content)} bytes, promised {job['adapter_bytes']}")
        if _is_stamped(job):
            with tarfile.open(path) as archive:
                weights = next(member for member in archive.getmembers() if member.name.endswith(".safetensors"))
                file = archive.extractfile(weights)
                assert file is not None
                epoch = job["lease_epoch"]
                its_own = range(1, epoch) if (name, epoch) in adopted else (epoch,)
                if file.read() not in {f"epoch {one}".encode() * 16 for one in its_own}:
                    yield Violation("somebody else's adapter", name, f"not of epoch {epoch}")


def judge_processes(folder: Path) -> Iterator[Violation]:
    """No process is left that was started with this folder as its home."""
    mark = f"HOME={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes().split(b"\0"):
                command = environ.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()
                yield Violation("process left", "-", f"{environ.parent.name}: {command}")
        except OSError:
            continue  # it has ended meanwhile, or is somebody else's


@dataclass(frozen=True)
class Verdict:
    violations: list[Violation]
    counts: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        found = "\n".join(str(violation) for violation in self.violations[:40]) or "no violation"
        return f"{counts}\n{found}"


def judge(dsn: str, *, storage: Path | None = None, processes_of: Path | None = None) -> Verdict:
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        versions = connection.execute("SELECT * FROM audit.versions ORDER BY n").fetchall()
        jobs = connection.execute("SELECT * FROM public.training_jobs").fetchall()
        leases = connection.execute("SELECT * FROM public.training_leases").fetchall()
        deliveries = connection.execute("SELECT * FROM public.training_deliveries").fetchall()
    for version in versions:
        version["job_id"] = str(version["job_id"])
    history = History(versions)
    violations = [
        *judge_moves(history),
        *judge_job_writers(history),
        *judge_leases(history),
        *judge_points_and_story(history),
        *judge_uploads(history),
        *judge_deliveries(history),
        *judge_delivered(jobs, deliveries, storage),
        *judge_end(history, jobs, leases),
        *(judge_adapters(history, jobs, storage) if storage else ()),
        *(judge_processes(processes_of) if processes_of else ()),
    ]
    moves = Counter(
        version["after"]["kind"]
        for version in history.of("training_events")
        if version["operation"] == "INSERT" and version["after"]["kind"] in ANNOUNCED
    )
    counts = {"row versions": len(versions), "jobs": len(jobs), "leases": len(history.claims)}
    counts |= {f"{state} deliveries": count for state, count in Counter(row["state"] for row in deliveries).items()}
    return Verdict(violations, counts | dict(sorted(moves.items())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dsn")
    parser.add_argument("--install", action="store_true", help="record from now on, instead of judging")
    parser.add_argument("--storage", type=Path, help="root of the folder storage: check the adapters")
    parser.add_argument("--processes-of", type=Path, help="no process with this home may be left")
    given = parser.parse_args()
    if given.install:
        install(given.dsn)
        return 0
    verdict = judge(given.dsn, storage=given.storage, processes_of=given.processes_of)
    print(verdict)
    return 1 if verdict.violations else 0


if __name__ == "__main__":
    sys.exit(main())
