"""Whatever fails, no row, event, callback or stored file that a user reads names a folder of the host, or the host.

The folders have names that no text of ours contains. The rows are read as the user reads them, all tables and columns.
"""

from __future__ import annotations

import io
import json
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.daemon_process import REAL, DaemonProcess
from tests.lifecycle.queue import Queue, write_model_folder
from tests.paths import ROOT
from tests.tiny_models import conversation

ODD = ("mödels+1", "wörk d'or", "störage (2)", "hüb", "spëcial")
NOWHERE = "http://127.0.0.1:9/hook"


class Tenant:
    """The folders of a host, and what the owner of its jobs can see of them."""

    def __init__(self, queue: Queue, folder: Path) -> None:
        self.queue = queue
        self.models, self.work, self.storage, self.cache, self.special = (folder / name for name in ODD)
        for place in (self.models, self.work, self.storage, self.cache, self.special):
            place.mkdir()
        queue.folder = folder
        (folder / "storage").symlink_to(self.storage)

    def daemon(self, folder: Path, command: tuple[str, ...] | None = None, **settings: Any) -> DaemonProcess:
        given = {"models_dir": self.models, "work_dir": self.work, "storage_dir": self.storage} | settings
        daemon = DaemonProcess(self.queue.dsn, folder, **({"command": command} if command else {}), **given)
        daemon.environment |= {"HF_HOME": str(self.cache), "MODEL_PATH": str(self.special)}
        return daemon

    def insert(self, model: str = "acme/tiny", **what: Any) -> UUID:
        hyperparameters = {"base_model": model} | what.pop("hyperparameters", {})
        return self.queue.insert(hyperparameters=hyperparameters, callback_url=NOWHERE, max_attempts=1, **what)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Everything that the user can read: each row of each table, by his own rights, and each stored object."""
        with self.queue.connect() as connection, connection.transaction():
            columns = connection.execute(
                "SELECT table_name, array_agg(quote_ident(column_name::text)) AS names FROM information_schema.columns "
                "WHERE table_schema = 'public' AND has_column_privilege('authenticated', "
                "format('%I.%I', table_schema, table_name), column_name, 'SELECT') GROUP BY table_name"
            ).fetchall()
            # The body of a callback goes to the owner's server.
            told = connection.execute("SELECT payload AS row FROM training_callbacks").fetchall()
            connection.execute(
                "SELECT set_config('role', 'authenticated', true), set_config('request.jwt.claims', %s, true)",
                (json.dumps({"sub": str(self.queue.user_id), "role": "authenticated"}),),
            )
            for table in columns:
                names = ", ".join(table["names"])
                query = f"SELECT to_jsonb(one) AS row FROM (SELECT {names} FROM {table['table_name']}) AS one"
                rows = connection.execute(query.encode()).fetchall()
                yield from ((table["table_name"], json.dumps(row["row"], ensure_ascii=False)) for row in rows)
        yield from (("callback", json.dumps(row["row"], ensure_ascii=False)) for row in told)
        for file in (self.storage / "lora-models").rglob("*"):
            if file.is_file():
                yield from _contents(file)

    def leaks(self) -> list[str]:
        forbidden = [*ODD, *(json.dumps(name)[1:-1] for name in ODD), str(self.work.parent)]
        if not platform.node().isalpha():
            forbidden.append(platform.node())
        found = []
        for where, text in self.texts():
            for name in forbidden:
                if name in text:
                    place = text.index(name)
                    found.append(f"{where}: …{text[max(0, place - 150) : place + 60]}…")
        return found


def _contents(file: Path) -> Iterator[tuple[str, str]]:
    yield file.name, file.read_bytes().decode("utf-8", "replace")
    if file.name.endswith(".tar.gz"):
        with tarfile.open(file) as archive:
            for member in archive:
                yield f"{file.name}: {member.name}", f"{member.name} {member.uname} {member.gname}"
                content = archive.extractfile(member) or io.BytesIO()
                yield f"{file.name}: {member.name}", content.read().decode("utf-8", "replace")


@pytest.fixture
def tenant(queue: Queue, tmp_path: Path) -> Tenant:
    (tmp_path / "höst").mkdir()
    return Tenant(queue, tmp_path / "höst")


def test_whatever_the_trainer_says_no_folder_of_the_host_reaches_the_tenant(tenant: Tenant, tmp_path: Path) -> None:
    write_model_folder(tenant.models / "acme" / "tiny")
    write_model_folder(tenant.models / "acme" / "half")
    (tenant.models / "acme" / "half" / "model.safetensors").write_bytes(b"cut")
    model, work = tenant.models / "acme" / "tiny" / "tokenizer.json", tenant.work / "x" / "dataset"
    frames = f'Traceback\n  File "{tenant.special}/lib/python3.12/site-packages/torch/a.py", line 3\nOSError: {model}'
    warning = f"{tenant.cache}/hub/models--acme--tiny: UserWarning on {platform.node()}"
    full = {"code": "disk_full", "message": f"the disk is full: No space left on device: {str(work)!r}",
            "hint": f"free space in {tenant.work}, then submit again", "stack": frames}  # fmt: skip
    memory = {"code": "out_of_memory", "message": f"CUDA out of memory, see {model}", "hint": "reduce batch_size",
              "stack": frames}  # fmt: skip
    noise = [
        ["print", warning],
        ["say", "notice", {"code": "odd", "message": f"read again from {model}", "data": {"where": [str(work)]}}],
    ]
    sample = [
        "say",
        "sample",
        {"when": "before", "prompt": "What is /etc/ssh/config?", "answer": "A file in /etc/ssh/x."},
    ]
    with tenant.daemon(tmp_path, slots=2) as daemon:
        jobs = {
            "disk_full": tenant.insert(script=[*noise, ["say", "failed", full], ["exit", 1]]),
            "out_of_memory": tenant.insert(script=[*noise, ["say", "failed", memory], ["exit", 1]]),
            "internal": tenant.insert(script=[["print", frames], ["exit", 3]]),
            "model_not_found": tenant.insert("acme/none"),
            "model_incomplete": tenant.insert("acme/half"),
        }
        done = tenant.insert(script=[*noise, sample, ["steps", 3, 0.0]])
        rows = {code: tenant.queue.wait_for(job, "failed") for code, job in jobs.items()}
        tenant.queue.wait_for(done, "completed")
    assert {code: row["error_code"] for code, row in rows.items()} == {code: code for code in jobs}
    assert tenant.leaks() == []
    # What happened and what to do, in one column; the advice again in its own.
    for row in rows.values():
        assert row["error_message"].endswith(f" {row['error_hint']}"), row["error_message"]
    assert rows["disk_full"]["error_message"] == (
        "The disk is full: No space left on device: the work folder. Free space in the work folder, then submit again."
    )
    assert 'File "torch/a.py", line 3' in rows["disk_full"]["error_stack"]
    notices = [
        one["message"] for one in tenant.queue.select("SELECT message FROM notifications WHERE type = 'job_failed'")
    ]
    assert sorted(notices) == sorted(row["error_message"] for row in rows.values())
    # The owner's own words stay.
    (told,) = [one for one in tenant.queue.events(done) if one["kind"] == "sample"]
    assert told["data"]["prompt"] == "What is /etc/ssh/config?"
    # The operator's log has all of it.
    (said,) = daemon.logged("attempt_failed", code="disk_full")
    assert str(work) in said["message"] and str(model) in said["stack"] and warning in said["stack"]
    assert str(model) in daemon.logged("story_redacted", kind="odd")[0]["message"]
    assert str(tenant.models) in daemon.logged("attempt_failed", code="model_not_found")[0]["stack"]


@pytest.mark.system
@pytest.mark.timeout(420)
def test_the_real_trainer_fails_in_its_own_ways_and_names_no_folder(tenant: Tenant, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from tests.tiny_models import make_model

    whole = make_model(tenant.models / "acme" / "tiny", "llama")

    def spoilt(name: str) -> Path:
        folder = tenant.models / "acme" / name
        folder.mkdir()
        for file in whole.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    def corrected(folder: Path, **values: object) -> None:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))

    (spoilt("cut") / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-9])
    (spoilt("mute") / "tokenizer.json").write_text('{"version": "1.0"}')
    corrected(spoilt("strange"), model_type="from_the_moon", architectures=["MoonForCausalLM"])
    corrected(spoilt("headless"), num_attention_heads=0, head_dim=None)
    endless = spoilt("endless") / "model.safetensors"
    save_file({name: torch.full_like(one, torch.inf) for name, one in load_file(endless).items()}, endless)

    good = [json.dumps(conversation(number)) for number in range(8)]
    with tenant.daemon(tmp_path, command=REAL) as daemon:
        jobs = {
            "cut": tenant.insert("acme/cut", lines=good),
            "mute": tenant.insert("acme/mute", lines=good),
            "strange": tenant.insert("acme/strange", lines=good),
            "headless": tenant.insert("acme/headless", lines=good),
            "endless": tenant.insert("acme/endless", lines=good),
            "unreadable": tenant.insert(lines=["{", "not JSON"]),
            "forgotten": tenant.insert(lines=good, storage_path="gone.jsonl"),
        }
        done = tenant.insert(lines=good, hyperparameters={"num_epochs": 1, "lora_rank": 4, "max_length": 128})
        rows = {name: tenant.queue.wait_for(job, "failed", seconds=170) for name, job in jobs.items()}
        tenant.queue.wait_for(done, "completed", seconds=170)
    codes = {name: row["error_code"] for name, row in rows.items()}
    assert codes == {
        "cut": "model_incomplete", "mute": "model_incomplete", "strange": "model_unsupported", "headless": "internal",
        "endless": "non_finite_loss", "unreadable": "dataset_invalid", "forgotten": "dataset_unreachable",
    }, {name: row["error_message"] for name, row in rows.items()}  # fmt: skip
    assert tenant.leaks() == []
    for row in rows.values():
        assert row["error_message"].endswith(row["error_hint"]) and "Traceback" not in row["error_message"]
        assert len(row["error_message"]) < 700 and "huggingface.co" not in row["error_message"], row["error_message"]
    (said,) = daemon.logged("attempt_failed", code="internal")
    assert str(ROOT / "training") in said["stack"] and 'File "training/' in rows["headless"]["error_stack"]
