"""The MIME types of what attempts and deliveries store, and whether a bucket takes them."""

from __future__ import annotations

import mimetypes

# What is stored: archive; weights, log and the other files of an export; configuration and manifest; chart.
STORED_TYPES = ("application/gzip", "application/octet-stream", "application/json", "image/png")


def type_of(object_path: str) -> str:
    if object_path.endswith(".tar.gz"):
        return "application/gzip"
    if object_path.endswith(".jsonl"):
        return "application/octet-stream"
    guessed = mimetypes.guess_type(object_path)[0]
    # A bucket that lists its types has these and no others: the text files of an exported model are bytes to it.
    return guessed if guessed in STORED_TYPES else "application/octet-stream"


def takes(allowed: list[str] | None, kind: str) -> bool:
    """Whether a bucket with this list takes an upload in one request.

    As the server reads it: an entry is a type, or `type/*`; `*/*` is the type named `*`, which nothing has. An empty
    list refuses resumable uploads alone, which the probe finds (daemon.storage.unfinished_uploads)."""
    return not allowed or any(entry in (kind, f"{kind.partition('/')[0]}/*") for entry in allowed)
