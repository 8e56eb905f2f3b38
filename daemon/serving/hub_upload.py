"""Uploads one adapter folder to the Hugging Face hub, as its own process: `python -m daemon.serving.hub_upload`.

It is a process for the reasons of daemon.base_model.hub_download, and so that the token reaches no library of ours: one
JSON order on stdin, one JSON line as the answer. Everything goes into one commit, on top of the commit that was looked
at: two pushes at once never mix. The same adapter again changes nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from daemon.network.hub_process import keep_token_at_the_hub
from training.death_signal import end_with_parent

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

# Says in the repository whose adapter it holds.
MARKER = "brightrun.json"
MARKER_FORMAT = 1
MAX_MARKER_BYTES = 1_000_000
# Our manifest names the job's prompts and settings: it stays in the project's own storage.
LEFT_OUT = (MARKER, "manifest.json", ".gitattributes")
# The hub makes this file itself in each new repository.
OF_THE_HUB = {".gitattributes"}
# For one read or write; the hub answers a commit of many files after minutes.
TIMEOUT_SECONDS = 300.0
SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Push:
    """What to upload and where to. `replace`: over what the repository holds already. `public`: create it for everyone
    to see, or allow that it is."""

    repository: str
    folder: str
    job_id: str
    adapter_sha256: str
    token: str
    public: bool = False
    replace: bool = False


@dataclass(frozen=True)
class Pushed:
    """The repository holds the adapter. Not `changed`: it did already."""

    repository: str
    url: str
    commit: str
    private: bool
    changed: bool
    kind: Literal["pushed"] = "pushed"


@dataclass(frozen=True)
class NotPushed:
    """`why` decides what happens next: only `away` may pass. `occupied`, `public`: the repository is not as needed."""

    why: Literal["away", "offline", "refused", "token", "occupied", "public"]
    message: str
    kind: Literal["not_pushed"] = "not_pushed"


def upload(push: Push, endpoint: str | None = None) -> Pushed | NotPushed:
    """Creates the repository if it is not there, looks at what it holds, and commits the folder.

    The endpoint is that of HF_ENDPOINT if not given."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    api = HfApi(endpoint, token=push.token)
    try:
        try:
            api.model_info(push.repository)
        except RepositoryNotFoundError:
            # One that we may not see answers the same: then this is refused.
            api.create_repo(push.repository, private=not push.public, exist_ok=True)
        return _commit(api, push)
    except OfflineModeIsEnabled:
        return NotPushed("offline", "HF_HUB_OFFLINE is set on this host, so that it must not talk to the hub")
    except HfHubHTTPError as error:
        return _refusal(push, error)
    except LocalEntryNotFoundError:
        return NotPushed("away", "the hub cannot be reached")
    except RuntimeError as error:
        # A file did not get to the hub's object store.
        cause = error.__cause__
        return (
            _refusal(push, cause) if isinstance(cause, HfHubHTTPError) else NotPushed("away", _short(push, str(error)))
        )
    except ValueError as error:
        # The library's own checks: a name, the card's metadata, an answer that is not the hub's.
        return NotPushed("refused", _short(push, str(error)))


def _commit(api: HfApi, push: Push) -> Pushed | NotPushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    info = api.model_info(push.repository)
    there = {file.rfilename for file in info.siblings or []}
    if not info.private and not push.public:
        return NotPushed(
            "public", f"the repository {push.repository} is public, and the adapter was not to be published"
        )
    marker = _read_marker(api, push, info.sha or "main") if MARKER in there else None
    if (fault := _occupied(push, there, marker)) is not None:
        return fault
    folder = Path(push.folder)
    names = sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and not file.is_symlink()
    )
    names = [name for name in names if name not in LEFT_OUT]
    ours = {"format": MARKER_FORMAT, "job_id": push.job_id, "adapter_sha256": push.adapter_sha256, "files": names}
    text = json.dumps(ours, indent=2, sort_keys=True).encode() + b"\n"
    # What an earlier push has left there and this adapter does not have.
    stale = sorted((set((marker or {}).get("files", [])) & there) - {*names, *LEFT_OUT})
    done = api.create_commit(
        push.repository,
        [
            *(CommitOperationAdd(name, folder / name) for name in names),
            CommitOperationAdd(MARKER, text),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ],
        commit_message=f"Adapter of job {push.job_id}",
        # The hub refuses the commit if somebody else was faster.
        parent_commit=info.sha,
    )
    url = f"{api.endpoint}/{push.repository}"
    return Pushed(push.repository, url, done.oid, bool(info.private), changed=done.oid != info.sha)


def _read_marker(api: HfApi, push: Push, revision: str) -> dict[str, Any] | None:
    """Returns the marker, or None if it is none of ours."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(api.hf_hub_download(push.repository, MARKER, revision=revision, local_dir=scratch)).read_bytes()
    try:
        marker = json.loads(text[:MAX_MARKER_BYTES])
        return {"job_id": str(marker["job_id"]), "files": [str(name) for name in marker["files"]]}
    except (ValueError, KeyError, TypeError):
        return None


def _occupied(push: Push, there: set[str], marker: dict[str, Any] | None) -> NotPushed | None:
    """Nothing that is not this job's is overwritten unless that was asked for."""
    if push.replace or (marker is not None and marker["job_id"] == push.job_id):
        return None
    if marker is not None:
        return NotPushed("occupied", f"the repository {push.repository} holds the adapter of job {marker['job_id']}")
    # They are not listed: with a token for everybody, they may be none of the job's owner's business.
    if there - OF_THE_HUB:
        return NotPushed("occupied", f"the repository {push.repository} holds files that are not an adapter of ours")
    return None


def _refusal(push: Push, error: HfHubHTTPError) -> NotPushed:
    status = error.response.status_code
    said = _short(push, error.server_message or "")
    its_words = f" ({said})" if said else ""
    match status:
        case 401:
            return NotPushed(
                "token", f"the hub does not accept the token, or it may not see {push.repository}{its_words}"
            )
        case 402 | 403:
            return NotPushed("token", f"the token may not write to {push.repository}{its_words}")
        case 404:
            return NotPushed("token", f"the hub has no {push.repository} that this token may write to{its_words}")
        case 408 | 409 | 412 | 429:
            return NotPushed("away", f"the hub answered HTTP {status}{its_words}")
        case _ if status >= 500:
            return NotPushed("away", f"the hub answered HTTP {status}{its_words}")
        case _:
            return NotPushed("refused", f"the hub refused the adapter with HTTP {status}{its_words}")


def _short(push: Push, text: str) -> str:
    words = " ".join(text.replace(push.token, "…").replace(push.folder, "the folder").split())
    return words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1] + "…"


def main() -> int:
    # End with the daemon: without it, no process waits for the answer.
    end_with_parent()
    # What the library reads when it is imported: the order's token and no other one; and the plain HTTP upload. With
    # the package hf_xet another program would hold the token, and choose by itself where it goes.
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    answer: Pushed | NotPushed
    try:
        keep_token_at_the_hub(TIMEOUT_SECONDS)
        answer = upload(Push(**order))
    # The outermost place of this process: the hub's client raises what its HTTP library raises, and KeyError and the
    # like where an answer is not the hub's.
    except Exception as error:  # noqa: BLE001
        # By name: it is httpx's or httpx2's, by the version of the client.
        is_network = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
        what = "the hub cannot be reached" if is_network else "the hub's client failed"
        answer = NotPushed("away", f"{what} ({type(error).__name__})")
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()
    return 0 if isinstance(answer, Pushed) else 1


if __name__ == "__main__":
    sys.exit(main())
