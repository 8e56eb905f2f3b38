"""Paths in this repository, for tests that start programs or read files."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DOUBLES = ROOT / "tests" / "doubles"
SCRIPTED_TRAINER = DOUBLES / "scripted_trainer.py"
SCRIPTED_DAEMON = DOUBLES / "scripted_daemon.py"
COMMAND_LINE = DOUBLES / "command_line.py"
TRAINER_PYTHON = DOUBLES / "trainer_python.py"
FORKING_PYTHON = DOUBLES / "forking_python.py"
REAL_DAEMON = DOUBLES / "real_daemon.py"
