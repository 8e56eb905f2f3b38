"""A large adapter arrives whole and once, whatever happens on its way, and is never in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.storage.upload_ordeal import DONE, KILLED, WAITS, survive


@pytest.mark.parametrize(("megabytes", "cuts"), [(30, 2), pytest.param(200, 10, marks=pytest.mark.system)])
async def test_an_upload_survives_cuts_a_kill_a_changed_key_and_an_expiry(
    tmp_path: Path, megabytes: int, cuts: int
) -> None:
    survived = await survive(tmp_path, megabytes, cuts)
    assert survived.endings == (KILLED, WAITS, DONE), (tmp_path / "uploading.log").read_text()
    assert survived.whole
    assert survived.begun == 2, "only the expiry begins it anew: a changed key leaves what has arrived"
    assert survived.cuts == cuts
    # What was sent before the expiry, the file, and once more each chunk that was disturbed.
    assert survived.sent_chunks <= 1.75 * survived.chunks + cuts + 4
    assert 0 < survived.peak_mib < 100
    assert survived.left_behind == ()
