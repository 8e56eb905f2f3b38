"""The TypeScript of the docs: types that are current, an example that type-checks, a verification that verifies."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from daemon.report.webhook import message_body, signed_headers, signing_keys
from tests.docs.database_types import TYPES, generated
from tests.docs.npm import installed
from tests.paths import ROOT
from tests.postgres import AppDatabase

pytestmark = pytest.mark.system

EXAMPLE = ROOT / "docs" / "examples" / "nextjs"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(range(32, 64))).decode()


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its pinned packages beside it."""
    wanted = json.loads((EXAMPLE / "package.json").read_text())
    packages = installed(wanted["dependencies"] | wanted["devDependencies"], optional=False)
    folder = tmp_path_factory.mktemp("nextjs") / "example"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", ".next"))
    (folder / "node_modules").symlink_to(packages)
    return folder


def tsc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "node_modules" / ".bin" / "tsc"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)


def test_the_types_are_those_of_the_migrations(database: AppDatabase) -> None:
    assert TYPES.read_text() == generated(database.dsn), "run `make types`"


def test_the_example_type_checks(example: Path) -> None:
    checked = tsc(example, "--noEmit")
    assert checked.returncode == 0, checked.stdout


def test_the_type_check_would_see_a_misspelt_column(example: Path) -> None:
    wrong = example / "lib" / "wrong.ts"
    wrong.write_text(
        "import type { Client } from './supabase/types'\n"
        "export const misspelt = (supabase: Client) => supabase.from('training_jobs').insert({ userid: 'x' })\n"
    )
    try:
        checked = tsc(example, "--noEmit")
    finally:
        wrong.unlink()
    assert checked.returncode != 0 and "userid" in checked.stdout


@dataclass(frozen=True)
class Message:
    headers: dict[str, str]
    body: str


def message(*secrets: str, at: float | None = None) -> Message:
    """A message as the daemon sends it, signed with each of the secrets."""
    payload = {"job_id": "j", "event": "job.completed", "sequence": 7, "state": "completed", "note": "Grüße, 你好"}
    body = message_body(payload)
    keys = signing_keys([SecretStr(secret) for secret in secrets])
    return Message(signed_headers(keys, "msg-1", int(time.time() if at is None else at), body), body.decode())


@pytest.fixture(scope="module")
def verifier(example: Path) -> Path:
    """The example's verification, compiled for Node, and a script that reads one message and prints the answer."""
    out = example / "out"
    compiled = tsc(
        example, "lib/verify-callback.ts", "--ignoreConfig", "--outDir", str(out), "--module", "nodenext",
        "--target", "es2022", "--types", "node", "--strict", "--skipLibCheck",
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout
    script = out / "read.mjs"
    script.write_text(
        "import { verifyCallback } from './verify-callback.js'\n"
        "import { readFileSync } from 'node:fs'\n"
        "const { body, headers, secret } = JSON.parse(readFileSync(0, 'utf8'))\n"
        "try {\n"
        "  console.log(JSON.stringify({ accepted: verifyCallback(body, new Headers(headers), secret) }))\n"
        "} catch (error) {\n"
        "  console.log(JSON.stringify({ refused: error.message }))\n"
        "}\n"
    )
    return script


def read(verifier: Path, body: str, headers: Mapping[str, str], secret: str = SECRET) -> dict[str, object]:
    given = json.dumps({"body": body, "headers": dict(headers), "secret": secret})
    run = subprocess.run(["node", str(verifier)], input=given, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(run.stdout))


def test_node_accepts_what_the_daemon_signed(verifier: Path) -> None:
    sent = message(SECRET)
    assert read(verifier, sent.body, sent.headers) == {"accepted": json.loads(sent.body)}


def test_node_accepts_either_secret_while_they_are_changed(verifier: Path) -> None:
    sent = message(OTHER_SECRET, SECRET)
    assert "accepted" in read(verifier, sent.body, sent.headers)
    assert "accepted" in read(verifier, sent.body, sent.headers, OTHER_SECRET)


def test_node_refuses_what_was_tampered_with(verifier: Path) -> None:
    sent = message(SECRET)
    assert read(verifier, sent.body.replace("completed", "failed"), sent.headers) == {"refused": "wrong signature"}
    other_id = sent.headers | {"webhook-id": "msg-2"}
    assert read(verifier, sent.body, other_id) == {"refused": "wrong signature"}
    assert read(verifier, sent.body, sent.headers, OTHER_SECRET) == {"refused": "wrong signature"}
    empty = sent.headers | {"webhook-signature": "v1,"}
    assert read(verifier, sent.body, empty) == {"refused": "wrong signature"}


def test_node_refuses_what_is_old_or_unsigned(verifier: Path) -> None:
    old = message(SECRET, at=time.time() - 3600)
    assert read(verifier, old.body, old.headers) == {"refused": "signed too long ago"}
    nonsense = old.headers | {"webhook-timestamp": "yesterday"}
    assert read(verifier, old.body, nonsense) == {"refused": "signed too long ago"}
    unsigned = message()
    assert read(verifier, unsigned.body, unsigned.headers) == {"refused": "not a signed callback"}


def test_node_follows_a_job_and_its_story_without_a_gap(example: Path) -> None:
    out = example / "watched"
    compiled = tsc(
        example, "lib/watch.ts", "--ignoreConfig", "--outDir", str(out), "--module", "esnext",
        "--moduleResolution", "bundler", "--target", "es2022", "--strict", "--skipLibCheck",
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout
    # Node wants the ending that a bundler adds.
    watch = out / "watch.js"
    watch.write_text(watch.read_text().replace("'./merge'", "'./merge.js'"))
    command = ["node", "--test", str(ROOT / "tests" / "docs" / "watch.test.mjs")]
    run = subprocess.run(
        command, env=os.environ | {"LIB": str(out)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_example_believes_no_unchecked_session_and_holds_no_secret_key() -> None:
    files = [path for path in EXAMPLE.rglob("*.ts*") if not {"node_modules", ".next"} & {*path.parts}]
    code = {path.relative_to(EXAMPLE): re.sub(r"//.*", "", path.read_text()) for path in files}
    assert len(code) > 10
    assert [path for path, text in code.items() if re.search("getSession|SECRET_KEY|service_role", text)] == []


def test_every_typescript_block_of_the_docs_is_part_of_the_checked_example() -> None:
    page = (ROOT / "docs" / "for-app-developers.md").read_text()
    blocks = re.findall(r"```tsx?\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 5
    files = [path.read_text() for path in EXAMPLE.rglob("*.ts*") if "node_modules" not in path.parts]
    for block in blocks:
        assert any(block in text for text in files), f"not in docs/examples/nextjs:\n{block}"
