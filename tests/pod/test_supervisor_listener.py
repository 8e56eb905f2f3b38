"""What supervisord says of its programs, and what is answered: its own protocol, spoken over two pipes."""

from __future__ import annotations

import io

from daemon.pod.supervisor_listener import Notification, listen


def message(event: str, payload: str) -> str:
    header = f"ver:3.0 server:supervisor serial:1 pool:pod poolserial:1 eventname:{event} len:{len(payload)}"
    return f"{header}\n{payload}"


def test_each_event_is_read_and_acknowledged_until_supervisord_is_gone() -> None:
    fatal = message("PROCESS_STATE_FATAL", "processname:trainer groupname:trainer from_state:BACKOFF")
    exited = message(
        "PROCESS_STATE_EXITED", "processname:gateway groupname:gateway from_state:RUNNING expected:1 pid:71"
    )
    answers = io.StringIO()
    assert list(listen(io.StringIO(fatal + exited), answers)) == [
        Notification("PROCESS_STATE_FATAL", "trainer", expected=False),
        Notification("PROCESS_STATE_EXITED", "gateway", expected=True),
    ]
    assert answers.getvalue() == "READY\nRESULT 2\nOK" * 2 + "READY\n"


def test_an_event_that_was_not_handled_is_not_acknowledged() -> None:
    answers = io.StringIO()
    next(listen(io.StringIO(message("PROCESS_STATE_FATAL", "processname:trainer")), answers))
    assert answers.getvalue() == "READY\n"


def test_only_a_trainer_that_will_not_be_restarted_is_the_end() -> None:
    assert Notification("PROCESS_STATE_FATAL", "trainer", expected=False).is_the_end
    assert Notification("PROCESS_STATE_EXITED", "trainer", expected=True).is_the_end
    assert not Notification("PROCESS_STATE_EXITED", "trainer", expected=False).is_the_end
    assert not Notification("PROCESS_STATE_EXITED", "gateway", expected=True).is_the_end
