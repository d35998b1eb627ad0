"""What a peer says on a connection, kept."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from kvmtool.formats import gdb_session

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Recorder:
    def __init__(self, connection, heard: bytearray) -> None:
        self._connection, self._heard = connection, heard

    def recv(self, size: int) -> bytes:
        data = self._connection.recv(size)
        self._heard += data
        return data

    def __getattr__(self, name: str):
        return getattr(self._connection, name)


@contextlib.contextmanager
def recorded() -> Iterator[bytearray]:
    """All bytes that connections made meanwhile receive."""
    heard, connect = bytearray(), gdb_session.socket.create_connection
    gdb_session.socket.create_connection = lambda *to: _Recorder(connect(*to), heard)
    try:
        yield heard
    finally:
        gdb_session.socket.create_connection = connect
