"""Downloads one model from the Hugging Face hub, as its own process: `python -m daemon.base_model.hub_download`.

It is a process, so that a cancelled job or a shutdown ends it immediately, and so that the hub's client and
its threads stay out of the daemon's memory. It reads one JSON order from stdin (the token comes this way, not
in arguments or the environment), and answers with JSON lines: plan, then done or failed. Downloaded files
stay, and the next call continues from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from daemon.base_model.files import Marker
from daemon.network.hub_process import keep_token_at_the_hub
from training.death_signal import end_with_parent
from training.files.durable_files import sha256_of
from training.files.model_folder import CONFIG, read_config
from training.files.published_form import fault_of_form

# The files that a causal language model needs, and those that state its licence; no code, and no second format of the
# weights.
WANTED = (
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("README.md", "LICENSE", "LICENSE.md", "LICENCE", "LICENCE.md"),
)
UNWANTED = ("consolidated*.safetensors", "*/*", ".*")
# Reserved for checkpoints and everything else on the volume.
SPARE_BYTES = 2 * 1024**3
# A core hashes about 1 GB/s where the CPU has instructions for it: 160 GB take less than a minute.
HASHING_THREADS = 4


@dataclass(frozen=True)
class Order:
    """What to download, and into which folder."""

    model: str
    target: str
    token: str | None = None


@dataclass(frozen=True)
class DownloadPlan:
    """What will be downloaded: total bytes, and bytes still missing."""

    revision: str
    total_bytes: int
    missing_bytes: int
    kind: Literal["plan"] = "plan"


@dataclass(frozen=True)
class Done:
    revision: str
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class NotDone:
    """`why` decides what happens next: absent, unusable and quantised are permanent, disk and network may pass."""

    why: Literal["absent", "unusable", "quantised", "disk", "network"]
    message: str
    kind: Literal["failed"] = "failed"


def download(order: Order) -> Done | NotDone:
    """Plans, checks the disk, downloads and writes the marker. Prints the plan as soon as it is known."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    target = Path(order.target)
    keep_token_at_the_hub()
    try:
        info = HfApi(token=order.token or False).model_info(order.model, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or [] if is_wanted(file.rfilename)}
        revision = info.sha or "main"
        if not any(name.endswith(".safetensors") for name in files):
            return NotDone("unusable", f"{order.model} has no safetensors weights; pickled weights are never loaded")
        total = sum(file.size or 0 for file in files.values())
        plan = DownloadPlan(revision, total, max(total - bytes_on_disk(target), 0))
        _say(plan)
        target.mkdir(parents=True, exist_ok=True)
        # From now on the folder says which model it is, even if we are killed half-way.
        Marker(order.model, revision, complete=False).write(target)

        def fetch(names: list[str]) -> None:
            snapshot_download(
                order.model,
                revision=revision,
                local_dir=target,
                token=order.token or False,
                allow_patterns=names,
                max_workers=4,
            )

        # First what says whether the rest, hundreds of gigabytes, can be trained on.
        fetch([CONFIG])
        if (fault := fault_of_form(read_config(target), order.model)) is not None:
            return NotDone("quantised", fault)
        free = shutil.disk_usage(target).free
        if plan.missing_bytes + SPARE_BYTES > free:
            needed = f"{plan.missing_bytes / 1e9:.1f} GB (and {SPARE_BYTES / 1e9:.0f} GB to spare)"
            return NotDone("disk", f"{order.model} needs {needed}; {target} has {free / 1e9:.1f} GB left")
        fetch(sorted(files))
        hashes = {name: file.lfs.sha256 for name, file in files.items() if file.lfs is not None}
        # The hub's client goes on with a file by Range and compares no more than its size at the end.
        damaged = _remove_damaged(target, hashes)
        if damaged:
            return NotDone("network", f"{damaged[0]} did not arrive as the hub has it, and is downloaded again")
        Marker(order.model, revision, complete=True, sha256=hashes).write(target)
    except GatedRepoError:
        return NotDone("absent", f"{order.model} is gated: accept its terms on the hub and set HF_TOKEN")
    except RepositoryNotFoundError:
        return NotDone("absent", f"the hub has no model {order.model}, or HF_TOKEN may not see it")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        return NotDone("network", f"the hub answered HTTP {status}" if status else "the hub did not answer")
    except LocalEntryNotFoundError:
        return NotDone("network", "the hub cannot be reached")
    except OSError as error:
        full = error.errno is not None and "space" in (error.strerror or "")
        return NotDone("disk" if full else "network", f"{type(error).__name__}: {error.strerror or 'no answer'}")
    return Done(revision)


def _remove_damaged(folder: Path, hashes: dict[str, str]) -> list[str]:
    """Deletes the files whose bytes are not those of the hub, and returns their names."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        found = dict(zip(hashes, pool.map(lambda name: sha256_of(folder / name), hashes), strict=True))
    damaged = [name for name, expected in hashes.items() if found[name] != expected]
    for name in damaged:
        (folder / name).unlink()
    return damaged


def is_wanted(name: str) -> bool:
    return any(fnmatch(name, wanted) for wanted in WANTED) and not any(fnmatch(name, unwanted) for unwanted in UNWANTED)


def bytes_on_disk(folder: Path) -> int:
    """Bytes of a folder, including half-downloaded files."""
    total = 0
    for parent, _folders, names in os.walk(folder):
        for name in names:
            # A file may be renamed while we count.
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).stat().st_blocks * 512
    return total


def _say(answer: DownloadPlan | Done | NotDone) -> None:
    sys.stdout.write(json.dumps(asdict(answer)) + "\n")
    sys.stdout.flush()


def main() -> int:
    # End with the daemon: without it, no process waits for the answer.
    end_with_parent()
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    answer: Done | NotDone
    try:
        answer = download(Order(**order))
    # The outermost place of this process. The hub's client raises what its HTTP library raises, and KeyError and the
    # like where an answer is not the hub's.
    except Exception as error:  # noqa: BLE001
        answer = NotDone("network", f"the hub's client failed ({type(error).__name__})")
    _say(answer)
    return 0 if isinstance(answer, Done) else 1


if __name__ == "__main__":
    sys.exit(main())
