"""Decides whether two answers carry the same version of an object, so that a download may go on where it stopped.

No optional header is trusted to do it for us: Supabase Storage ignores If-Range and sends bytes of the new object,
which would be appended to those of the old one. So each answer is compared with the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

import httpx

_CONTENT_RANGE = re.compile(r"^bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+|\*)$")


@dataclass(frozen=True)
class ObjectVersion:
    """What an answer says of the object that it carries. None for what it does not say.

    `total_bytes` is the whole object's size, `first_byte` the position at which this answer's body begins."""

    etag: str | None
    last_modified: str | None
    total_bytes: int | None
    first_byte: int | None
    # A date with a resolution of one second tells versions apart only once that second is over.
    is_dated: bool = False

    @property
    def strong_etag(self) -> str | None:
        """The tag if equal ones mean equal bytes."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def can_be_continued(self) -> bool:
        """Whether a later answer can prove that it carries the same version."""
        return self.etag is not None or (self.is_dated and self.total_bytes is not None)

    def difference(self, later: ObjectVersion, offset: int) -> str | None:
        """Says why the body of `later` does not continue this version at `offset`. None if it does."""
        if later.first_byte != offset:
            return "the server sent another part than the one it was asked for"
        if not self.can_be_continued:
            return "nothing proves that the file is still the same"
        if self.etag is not None:
            # Compared without W/: a proxy in between may weaken a tag. The bytes that it passes on are the same.
            is_same = later.etag is not None and later.etag.removeprefix("W/") == self.etag.removeprefix("W/")
        else:
            is_same = later.last_modified is not None and later.total_bytes is not None
        if (
            not is_same
            or _differ(self.last_modified, later.last_modified)
            or _differ(self.total_bytes, later.total_bytes)
        ):
            return "the file changed while it was read"
        return None


def version_of(response: httpx.Response) -> ObjectVersion:
    """Reads the version from the head of a 200 or 206."""
    etag, modified = response.headers.get("etag") or None, response.headers.get("last-modified") or None
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        # Offsets count compressed bytes, and what we have is unpacked.
        return ObjectVersion(None, None, None, 0 if response.status_code == 200 else None)
    dated = _is_settled(modified, response.headers.get("date"))
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        return ObjectVersion(etag, modified, int(length) if length.isdigit() else None, 0, dated)
    part = _CONTENT_RANGE.match(response.headers.get("content-range", "").strip())
    if part is None:
        return ObjectVersion(etag, modified, None, None, dated)
    total = int(part["total"]) if part["total"] != "*" else None
    return ObjectVersion(etag, modified, total, int(part["first"]), dated)


def _differ(first: object | None, second: object | None) -> bool:
    return first is not None and second is not None and first != second


def _is_settled(modified: str | None, sent: str | None) -> bool:
    """Whether the answer was sent at least a second after the object's last change (RFC 9110, 8.8.2.2)."""
    modified_at, sent_at = _instant(modified), _instant(sent)
    return modified_at is not None and sent_at is not None and (sent_at - modified_at).total_seconds() >= 1


def _instant(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text) if text else None
    except ValueError:
        return None
