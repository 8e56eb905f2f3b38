"""What a command says when it cannot do what was asked: one line, a way on, an exit status."""

from __future__ import annotations

import sys

from daemon.errors import EXIT_UNFIT, DatabaseAway, HostFault, HostUnfit, JobError, TrainerError

EXIT_FAILED = 1
# Click's own status for words that it does not understand; a wrong value is the same kind of mistake.
EXIT_USAGE = 2
# As a shell reports an end by SIGINT.
EXIT_INTERRUPTED = 130


class CommandFailed(TrainerError):
    """The user can mend it, or must know it. Shown without a traceback; carries no secret."""

    def __init__(self, message: str, hint: str | None = None, *, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_status = exit_status


class Misused(CommandFailed):
    """The words of the command are wrong: an id that names no job, a file that is not there."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint, exit_status=EXIT_USAGE)


def report_failure(error: TrainerError) -> int:
    """Say on stderr what went wrong and what to do; return the exit status that says it to a program."""
    from daemon.sentence import as_sentence
    from daemon.terminal.sanitize import plain, plain_lines

    match error:
        case HostFault():
            # Whoever runs a command here is the operator: the path is what he needs.
            words, hint = plain(error.detail), None
        case CommandFailed() | JobError():
            words, hint = plain(error.message), error.hint
        case DatabaseAway():
            words = plain(f"the database does not answer: {error}")
            hint = "see that the server runs, and that DATABASE_URL leads to it"
        case _:
            words, hint = plain_lines(error), None
    way_on = f"  → {as_sentence(plain(hint))}\n" if hint else ""
    sys.stderr.write(f"brightrun-trainer: {as_sentence(words)}\n{way_on}")
    match error:
        case CommandFailed():
            return error.exit_status
        case HostUnfit():
            return EXIT_UNFIT
        case _:
            return EXIT_FAILED
