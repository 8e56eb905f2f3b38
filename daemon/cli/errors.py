"""Reports a command's failure: one line, what to do next, an exit status."""

from __future__ import annotations

import sys

from daemon.errors import EXIT_UNFIT, DatabaseAway, HostFault, HostUnfit, JobError, TrainerError

EXIT_FAILED = 1
# Click's own status for arguments that it does not understand; a wrong value is the same kind of mistake.
EXIT_USAGE = 2
# The status with which a shell reports SIGINT.
EXIT_INTERRUPTED = 130


class CommandFailed(TrainerError):
    """A failure that the user can fix or must know about. Shown without a traceback; contains no secret."""

    def __init__(self, message: str, hint: str | None = None, *, exit_status: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_status = exit_status


class Misused(CommandFailed):
    """The command's arguments are wrong: an id of no job, a file that does not exist."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint, exit_status=EXIT_USAGE)


def report_failure(error: TrainerError) -> int:
    """Prints to stderr what went wrong and what to do; returns the exit status for programs."""
    from daemon.sentence import as_sentence
    from daemon.terminal.sanitize import plain, plain_lines

    match error:
        case HostFault():
            # The user of a command here is the operator, who needs the path.
            words, hint = plain(error.for_the_operator), None
        case JobError():
            words, hint = plain(error.for_the_operator), error.hint
        case CommandFailed():
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
