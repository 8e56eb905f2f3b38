"""A loopback server that speaks only Postgres' startup protocol and refuses each login with a given message.

As the protocol's documentation says: a request for TLS is answered N, a startup message by an ErrorResponse."""

from __future__ import annotations

import socket
import struct
import threading

_SSL_REQUEST = 80877103
_GSS_REQUEST = 80877104


class PretendedPooler:
    """Use as a context manager. `refusal` is SQLSTATE and message; None never answers at all; bytes are sent as is."""

    def __init__(self, refusal: tuple[str, str] | bytes | None) -> None:
        self._refusal = refusal
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._open: list[socket.socket] = []

    def __enter__(self) -> PretendedPooler:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for one in self._open:
            one.close()
        self._thread.join(10)

    @property
    def dsn(self) -> str:
        return f"postgresql://training_daemon.abcdef:of-this-test@127.0.0.1:{self.port}/postgres"

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._open.append(client)
            client.settimeout(10)
            try:
                self._refuse(client)
            except OSError:
                continue

    def _refuse(self, client: socket.socket) -> None:
        if self._refusal is None:
            return
        while True:
            head = client.recv(8, socket.MSG_WAITALL)
            if len(head) < 8:
                return
            length, code = struct.unpack("!II", head)
            if isinstance(self._refusal, bytes):
                client.sendall(self._refusal)
                break
            if code in (_SSL_REQUEST, _GSS_REQUEST):
                client.sendall(b"N")
                continue
            client.recv(length - 8, socket.MSG_WAITALL)
            state, message = self._refusal
            fields = b"".join(
                name + text.encode() + b"\0"
                for name, text in ((b"S", "FATAL"), (b"V", "FATAL"), (b"C", state), (b"M", message))
            )
            client.sendall(b"E" + struct.pack("!I", len(fields) + 5) + fields + b"\0")
            break
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            continue
