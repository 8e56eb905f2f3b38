"""What is forked is to a test as what is started: its output, its environment, its end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.daemon_process import alive, eventually
from tests.forked_process import Forker
from tests.forked_python import forked_python

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


STARTED = """
import os, signal, sys, time

if __name__ == "__main__":
    print(sys.argv[1:], os.environ["WORD"], os.getcwd(), sys.stdin.readline().strip(), flush=True)
    os.write(int(sys.argv[-1]), b"told " + str(os.getpid()).encode())
    os.close(int(sys.argv[-1]))
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(75))
    print("ready", flush=True)
    if os.environ["WORD"] == "wait":
        time.sleep(60)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("python") / "script.py"
    script.write_text(STARTED)
    return forked_python(str(script))


@pytest.mark.parametrize(
    ("word", "number", "status"),
    [("end", None, 3), ("wait", signal.SIGTERM, 75), ("wait", signal.SIGKILL, -signal.SIGKILL)],
)
def test_what_a_program_starts_by_the_forking_python_has_its_files_its_signals_and_its_end(
    python: Path, tmp_path: Path, word: str, number: signal.Signals | None, status: int
) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(
        [python, "-m", "training", str(writing)],
        env={"WORD": word}, cwd=tmp_path, pass_fds=[writing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        os.close(writing)
        assert started.stdin is not None and started.stdout is not None
        started.stdin.write("a line\n")
        started.stdin.flush()
        assert started.stdout.readline() == f"['-m', 'training', '{writing}'] {word} {tmp_path} a line\n"
        told = os.read(reading, 100).decode()
        assert os.read(reading, 100) == b"", "its stand-in keeps the file open"
        os.close(reading)
        assert started.stdout.readline() == "ready\n"
        pid = int(told.removeprefix("told "))
        if number is not None:
            os.kill(started.pid, number)
        assert started.wait(20) == status
        eventually(lambda: not alive(pid))


def test_the_forking_python_is_the_usual_one_for_everything_else(python: Path) -> None:
    said = subprocess.run(
        [python, "-c", "import psycopg, sys; print(sys.argv)", "x"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "['-c', 'x']\n", said.stderr
