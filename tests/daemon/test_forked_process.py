"""What is forked is to a test as what is started: its output, its environment, its end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.forked_process import Forker

SCRIPT = """
import os, sys, time

if __name__ == "__main__":
    print(os.environ["WORD"], sorted(os.environ), os.getcwd(), os.getsid(0) == os.getpid(), sys.stdin.read())
    match os.environ["WORD"]:
        case "exit":
            sys.exit(3)
        case "say":
            sys.exit("no")
        case "raise":
            raise ValueError("of the script")
        case "wait":
            sys.stdout.flush()
            time.sleep(60)
"""


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [("exit", 3, ""), ("say", 1, "no\n"), ("raise", 1, "ValueError: of the script\n"), ("end", 0, "")],
)
def test_it_ends_as_a_script_does_that_was_started(tmp_path: Path, word: str, status: int, said: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    forked = Forker(str(script)).start_quietly({"WORD": word}, tmp_path, tmp_path / "log")
    assert forked.wait(20) == forked.poll() == status
    output = (tmp_path / "log").read_text()
    assert f"{word} ['WORD'] {tmp_path} True" in output and said in output


def test_it_is_waited_for_and_killed_as_one_that_was_started(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    forker = Forker(str(script))
    one, other = (forker.start_quietly({"WORD": "wait"}, tmp_path, tmp_path / "log") for _ in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(0.1)
    assert one.poll() is None
    other.kill()
    one.kill()
    assert one.wait(20) == other.wait(20) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)
