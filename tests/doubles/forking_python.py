"""Stands where a program starts a Python: what needs the trainer's libraries runs in a process that has them already.

`forking_python.py SOCKET ARGUMENT…`, as tests/forked_python.py lays it out. It asks the tests at that socket to fork
the process, passes on its files and the signals that it gets, and ends as that process ends. Anything else becomes the
Python that was wanted. Standard library only, started without site packages: it takes 15 ms.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

FORKED = {
    "training",
    "training.adapter.chat_process",
    "training.base.gguf_import",
    "training.base.make_quantized_copy",
    "training.comparison",
    "training.export",
}
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    address, *arguments = sys.argv[1:]
    if arguments[:1] != ["-m"] or arguments[1] not in FORKED:
        os.execv(sys.executable, [sys.executable, *arguments])
    files = [file for name in os.listdir("/proc/self/fd") if _is_inherited(file := int(name))]  # noqa: PTH208
    tests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tests.connect(address)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    for number in _PASSED_ON:
        signal.signal(number, lambda got, _frame: tests.send(str(got).encode()))
    folder = os.getcwd()  # noqa: PTH109 - pathlib would take as long to import as all the rest
    order = {"environment": dict(os.environ), "folder": folder, "files": files, "arguments": arguments}
    socket.send_fds(tests, [json.dumps(order).encode()], files)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    # Otherwise whoever reads what the process writes would not see its end.
    for file in files:
        os.close(file)
    status = int(tests.recv(100) or 70)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_inherited(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:
        return False  # the one that listed them


if __name__ == "__main__":
    main()
