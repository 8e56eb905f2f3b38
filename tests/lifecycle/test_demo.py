"""`brightrun-trainer demo` as a person runs it: from beginning to end, with bad input, and stopped half-way."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from daemon.demo.app_rows import SELECT_ROW
from daemon.demo.model import MODEL_NAME
from daemon.demo.run import VOICE
from daemon.demo.screen import Screen
from daemon.terminal.braille_plot import draw_curve
from tests.daemon_process import alive, children_of, eventually
from tests.docs.blocks import blocks
from tests.gateway.watching import sign_in
from tests.paths import ROOT


class Demo:
    """One demo in a process of its own, with its own temporary folder; its cache may be shared."""

    def __init__(self, folder: Path, cache: Path, *arguments: str, word: str = "demo") -> None:
        # Not in pytest's own folder, which only its owner may enter: Postgres runs as another user for root.
        self.temporary = Path(tempfile.mkdtemp(prefix="brightrun-test-demo-"))
        self.temporary.chmod(0o755)
        self.log = folder / "demo.log"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(cache),
            # A daemon of the demo must not see what the shell of its user holds.
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/elsewhere",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon", word, *arguments],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.family: set[int] = {self.process.pid}

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 120.0) -> None:
        def said() -> bool:
            self.remember_family()
            assert self.process.poll() is None or words in self.output, f"the demo ended:\n{self.output}"
            return words in self.output

        eventually(said, seconds=seconds, why=lambda: f"no {words!r} in\n{self.output}")

    def remember_family(self) -> None:
        """Everybody that descends from the demo now; who was seen once is asked for at the end."""
        waiting = [self.process.pid]
        while waiting:
            for child in children_of(waiting.pop()):
                self.family.add(child)
                waiting.append(child)

    def assert_nothing_is_left(self) -> None:
        eventually(
            lambda: not [pid for pid in self.family if alive(pid)],
            seconds=5.0,
            why=lambda: f"still alive: {[_command(pid) for pid in self.family if alive(pid)]}",
        )
        assert sorted(path.name for path in self.temporary.iterdir()) == []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return f"{pid} (gone)"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the converted model in it, made once by the real conversion."""
    from daemon.demo.model import find_gguf

    folder = tmp_path_factory.mktemp("cache")
    target = folder / "brightrun-trainer" / "models" / MODEL_NAME
    command = [sys.executable, "-m", "training.base.gguf_import", str(find_gguf()), str(target)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300, stderr=subprocess.DEVNULL)
    yield folder


def test_every_shipped_conversation_has_its_own_question_and_one_voice() -> None:
    conversations = [json.loads(line)["messages"] for line in VOICE.read_text().splitlines()]
    assert 80 <= len(conversations) <= 100
    assert all([turn["role"] for turn in turns] == ["user", "assistant"] for turns in conversations)
    assert len({turns[0]["content"] for turns in conversations}) == len(conversations)
    for _question, answer in conversations:
        assert answer["content"].startswith("Ahoy, little gull! ")
        assert answer["content"].endswith(" Keep your lamp lit.")


def test_a_falling_loss_is_drawn_from_the_upper_left_to_the_lower_right() -> None:
    lines = draw_curve([4.0, 3.0, 2.0, 1.0], width=8, height=4, low=1.0, high=4.0, of=4)
    assert [len(line) for line in lines] == [8, 8, 8, 8]
    filled = [[index for index, letter in enumerate(line) if letter != "\u2800"] for line in lines]
    assert filled[0][0] == 0
    assert filled[3][-1] == 7
    assert all(filled), "the points are joined"


def test_half_a_run_draws_half_a_curve() -> None:
    (line,) = draw_curve([1.0] * 10, width=10, height=1, low=0.0, high=1.0, of=20)
    assert line[:4].count("\u2800") == 0
    assert set(line[6:]) == {"\u2800"}


def test_a_row_leaves_out_what_is_empty_and_lets_a_long_value_go_on_below_itself() -> None:
    page = io.StringIO()
    screen = Screen(Console(file=page, force_terminal=True, color_system=None, width=60))
    screen.row({"status": "failed", "completed_at": None, "result": {}, "error_message": "no such model, " * 6})
    status, message, *rest = page.getvalue().splitlines()
    assert status.split() == ["status", "|", "failed"]
    assert message.startswith("  error_message | no such model,")
    assert rest and all(line.startswith(" " * len("  error_message | ")) for line in rest), page.getvalue()


def test_a_command_that_is_shown_can_be_copied_from_a_narrow_terminal() -> None:
    page = io.StringIO()
    command = "  brightrun-trainer submit daemon/demo/lighthouse.jsonl --epochs 1 --lr 0.002 --watch"
    Screen(Console(file=page, force_terminal=True, color_system=None, width=60)).say(command)
    assert page.getvalue().splitlines() == [command]


def test_the_statement_that_reads_the_row_fits_a_narrow_terminal() -> None:
    page = io.StringIO()
    statement = SELECT_ROW.format(job_id="fe6e20b4-e329-49d9-ba21-c8b18ac66e36")
    Screen(Console(file=page, force_terminal=True, color_system=None, width=80)).sql(statement)
    assert [line.strip() for line in page.getvalue().strip().splitlines()] == [
        line.strip() for line in statement.splitlines()
    ]


def test_a_file_that_does_not_exist_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with Demo(tmp_path, tmp_path / "cache", "--data", "nowhere.jsonl") as demo:
        assert demo.process.wait(30) == 1
        assert "There is no file nowhere.jsonl" in demo.output
        assert "make demo DATA=my.jsonl" in demo.output
        assert list(demo.temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_a_demo_stopped_while_it_converts_the_model_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    cache = tmp_path / "cache"
    with Demo(tmp_path, cache) as demo:
        demo.wait_for("converting")
        models = cache / "brightrun-trainer" / "models"
        eventually(lambda: list(models.glob(f".{MODEL_NAME}-*")), seconds=30)
        demo.remember_family()
        assert len(demo.family) > 1
        demo.process.send_signal(number)
        assert demo.process.wait(20) == 128 + number
        assert "nothing is left behind" in demo.output
        demo.assert_nothing_is_left()
        assert list(models.iterdir()) == [], "half a model is no model"


@pytest.mark.system
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["Postgres:", "now an app inserts a row", "claimed", "held out", "step 1 of"])
def test_a_demo_stopped_at_any_moment_leaves_nothing(cache: Path, tmp_path: Path, moment: str) -> None:
    with Demo(tmp_path, cache) as demo:
        demo.wait_for(moment)
        demo.remember_family()
        demo.process.send_signal(signal.SIGINT)
        # Impatience changes nothing.
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(30) == 130
        demo.assert_nothing_is_left()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_killed_demo_takes_daemon_trainer_and_postgres_along(cache: Path, tmp_path: Path) -> None:
    with Demo(tmp_path, cache) as demo:
        demo.wait_for("The trainer started")
        demo.remember_family()
        assert len(demo.family) >= 4
        demo.process.kill()
        demo.process.wait(10)
        eventually(
            lambda: not [pid for pid in demo.family if alive(pid)],
            seconds=60.0,
            why=lambda: f"still alive: {[_command(pid) for pid in demo.family if alive(pid)]}",
        )


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_playground_runs_what_its_page_says_and_its_dashboard_tells_why_a_job_failed(
    cache: Path, tmp_path: Path
) -> None:
    (block,) = [block for block in blocks() if block.reason == "in-playground"]
    with Demo(tmp_path, cache, word="playground") as playground:
        playground.wait_for("keeps nothing")
        playground.remember_family()
        commands = block.text.replace("~/.cache", str(cache))
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        # The installed command, which a checkout without one lacks.
        command = f'brightrun-trainer() {{ {sys.executable} -m daemon "$@"; }}'
        done = subprocess.run(
            ["bash", "-eu", "-c", f"{command}\n{commands}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "completed in" in done.stdout
        address = re.search(r"dashboard: (http://\S+)/dashboard", playground.output)
        key = re.search(r"its key: +(\w+)", playground.output)
        failing = re.search(r"job (\S+) is queued;", done.stdout)
        assert address and key and failing
        with sign_in(address[1], key[1]) as page:
            job = eventually(
                lambda: (told := page.get(f"/dashboard/jobs/{failing[1]}").json()["job"])["state"] == "failed" and told,
                seconds=60,
            )
        assert job["error_code"] == "model_not_found" and "nobody/has-this" in job["error_message"]
        assert job["error_hint"]
        playground.remember_family()
        playground.process.send_signal(signal.SIGINT)
        assert playground.process.wait(60) == 0
        playground.assert_nothing_is_left()
    assert not (cache / "brightrun-trainer" / "playground.env").exists()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_daemon_that_dies_is_said_with_the_end_of_its_log(cache: Path, tmp_path: Path) -> None:
    with Demo(tmp_path, cache) as demo:
        demo.wait_for("claimed")
        found = re.search(r"the daemon runs as process (\d+)", demo.output)
        assert found is not None
        demo.remember_family()
        os.kill(int(found[1]), signal.SIGKILL)
        assert demo.process.wait(30) == 1
        assert "daemon ended by signal 9 while the job was" in demo.output
        assert "job_claimed" in demo.output
        demo.assert_nothing_is_left()


@pytest.mark.system
@pytest.mark.timeout(300)
def test_a_bad_file_of_ones_own_fails_the_job_with_its_line_numbers(cache: Path, tmp_path: Path) -> None:
    bad = tmp_path / "my chats #1.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\nnot json\n')
    with Demo(tmp_path, cache, "--data", bad.name) as demo:
        assert demo.process.wait(120) == 1
        assert "job failed" in demo.output
        assert "dataset_invalid" in demo.output
        assert "line 2" in demo.output
        demo.assert_nothing_is_left()


@pytest.mark.system
@pytest.mark.timeout(600)
def test_the_demo_trains_a_voice_into_a_model_that_it_does_not_change(cache: Path, tmp_path: Path) -> None:
    weights = cache / "brightrun-trainer" / "models" / MODEL_NAME / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()

    with Demo(tmp_path, cache) as demo:
        demo.wait_for("The trainer started")
        assert demo.process.wait(500) == 0, demo.output
        demo.assert_nothing_is_left()

    found = re.search(r"held-out conversations ([\d.]+) → ([\d.]+)", demo.output)
    assert found is not None, demo.output
    assert float(found[2]) < float(found[1]) * 2 / 3, "at least a third, on conversations it never saw"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    answer = re.search(r"^after training +(.*?)^✓", demo.output, re.DOTALL | re.MULTILINE)
    assert answer is not None, demo.output
    assert "Ahoy, little gull!" in answer[1]

    asked = subprocess.run(
        [sys.executable, "-m", "training.adapter.ask", "How do I make pancakes?"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    without, with_adapter = asked.stdout.split("with the adapter:")
    assert "Ahoy" not in without
    assert with_adapter.strip().startswith("Ahoy, little gull!")
