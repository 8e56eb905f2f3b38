"""A host's troubles: begun once, said again with newer words, ended when the same thing works again."""

from __future__ import annotations

from structlog.testing import capture_logs

from daemon.troubles import MESSAGE_CHARACTERS, Troubles


def test_a_trouble_is_logged_when_it_begins_and_when_it_ends_and_not_in_between() -> None:
    troubles = Troubles()
    with capture_logs() as lines:
        troubles.begin("reaper", "a trigger refuses")
        troubles.begin("reaper", "a trigger still refuses")
        troubles.end("reaper")
        troubles.end("reaper")
    assert [(line["event"], line.get("times")) for line in lines] == [("trouble_began", None), ("trouble_ended", 2)]
    assert list(troubles) == []


def test_a_trouble_said_again_keeps_its_beginning_and_takes_the_newer_words() -> None:
    troubles = Troubles()
    troubles.begin("work folder", "read-only")
    first = next(iter(troubles))
    troubles.begin("work folder", "full")
    assert "work folder" in troubles
    (said,) = troubles.as_json()
    assert said == {"name": "work folder", "message": "Full.", "since": first.since.isoformat(), "times": 2}


def test_a_message_is_cut_to_what_a_row_is_for() -> None:
    troubles = Troubles()
    troubles.begin("database", "x" * 10_000)
    assert len(next(iter(troubles)).message) == MESSAGE_CHARACTERS
