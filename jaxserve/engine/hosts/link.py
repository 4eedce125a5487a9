"""A connection between two hosts that notices soon when the other one is gone."""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time

from jaxserve.engine.hosts.messages import Alive, Message, decode, encode

logger = logging.getLogger(__name__)

_LENGTH = struct.Struct("!Q")
_MOST_BYTES = 1 << 30  # of one message
BEAT_SECONDS = 1.0
LOST_SECONDS = 6.0  # without a byte from the other side, of hosts that serve
LOST_SECONDS_AT_START = 120.0  # of hosts that build programs, whose threads may have to wait for each other


class LinkLostError(Exception):
    """The other host is gone, or says what it should not."""


class Link:
    """Messages over TCP, in order.  Sends from any thread; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError if the other side is gone already; the socket is closed then."""
        self._patience = LOST_SECONDS
        sock.settimeout(LOST_SECONDS)
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.peer = str(sock.getpeername()[0]).removeprefix("::ffff:")  # address of the other side
        except OSError:
            sock.close()
            raise
        self._socket = sock
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="host-beat", daemon=True)
        self._beats.start()

    def be_patient(self) -> None:
        """Both sides build their programs now: see LOST_SECONDS_AT_START."""
        self._bear(LOST_SECONDS_AT_START)

    def be_prompt(self) -> None:
        """Both sides are ready: see LOST_SECONDS."""
        self._bear(LOST_SECONDS)

    def send(self, message: Message) -> None:
        """Raises LinkLostError."""
        data = encode(message)
        try:
            with self._sending:
                self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except OSError as error:
            raise LinkLostError(_told(error)) from error

    def receive(self) -> Message:
        """The next message that says something.  Raises LinkLostError."""
        while True:
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if length > _MOST_BYTES:
                raise LinkLostError(f"it announced a message of {length} bytes")
            try:
                message = decode(bytes(self._read(length)))
            except ValueError as error:
                raise LinkLostError(f"it sent what is no message: {error}") from error
            if not isinstance(message, Alive):
                return message

    def close(self) -> None:
        """Say no more.  Closing twice is fine."""
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was not connected any more
        self._socket.close()

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            self._await_bytes()
            try:
                num_read = self._socket.recv_into(view)
            except OSError as error:
                raise LinkLostError(_told(error)) from error
            if not num_read:
                raise LinkLostError("it closed the connection")
            view = view[num_read:]
        return data

    def _await_bytes(self) -> None:
        """Until there is something to read, or an end.  Raises LinkLostError."""
        begun = time.monotonic()
        # Often, and not in one call: whoever waits must see at once that there is less patience now.
        while not self._arrivals.poll(BEAT_SECONDS * 1000):
            if time.monotonic() - begun > self._patience:
                raise LinkLostError(f"it has said nothing for {self._patience:g} s")

    def _bear(self, seconds: float) -> None:
        """Take the other side for lost after so many seconds."""
        self._patience = seconds
        self._socket.settimeout(seconds)  # of what is sent

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            try:
                self.send(Alive())
            except LinkLostError:
                return  # whoever receives finds out, too


def _told(error: OSError) -> str:
    return f"the connection is broken ({error.strerror or error})"
