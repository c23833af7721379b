"""TVM's RPC tracker as a client sees it: what devices there are, and a place in the queue for one.

TVM's own client waits for ever on a host that has gone silent; everything here ends within `SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
from dataclasses import dataclass
from typing import Any

from saevit_tvm.support.errors import TuningError, UsageError

SECONDS = 10.0
MAGIC = struct.pack("<i", 0x2F271)
MOST_BYTES = 1 << 24
_SUCCESS, _REQUEST, _SUMMARY = 0, 4, 6


_ADDRESS = re.compile(r"rpc://(?P<host>\[[0-9A-Fa-f:]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5})/(?P<key>[^\s/:\"\\]+)")


def rpc_address(text: str) -> tuple[str, int, str]:
    """Host, port and key of `rpc://HOST:PORT/KEY`."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise UsageError(f"'{text}' is not understood: give rpc://HOST:PORT/KEY, such as rpc://192.168.1.5:9190/rpi4.")
    return found["host"].strip("[]"), int(found["port"]), found["key"]


class TrackerError(TuningError):
    """The tracker cannot be reached, or it is none."""


@dataclass(frozen=True)
class Device:
    """A server that the tracker has lent; `match_key` is good for one session."""

    host: str
    port: int
    match_key: str


@dataclass(frozen=True)
class Queue:
    """The servers of one key, and who waits for them."""

    servers: int
    free: int
    pending: int

    @property
    def busy(self) -> int:
        return max(0, self.servers - self.free)


class Tracker:
    """The tracker at an address. Each call is a connection of its own: the tracker may be started anew at any time."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @property
    def name(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def request(self, key: str) -> Request:
        """Queue for a device."""
        return Request(self, self._opened([_REQUEST, key, "", 1]))

    def summary(self) -> dict[str, Any]:
        """What the tracker itself says of its servers and queues."""
        with self._opened([_SUMMARY]) as connection:
            answer = Frames(self.name)
            try:
                while (said := answer.feed(connection.recv(1 << 16))) is None:
                    pass
            except OSError as error:
                raise self._lost(error) from error
        if not (isinstance(said, list) and len(said) == 2 and said[0] == _SUCCESS and isinstance(said[1], dict)):
            raise no_tracker(self.name)
        return said[1]

    def queues(self) -> dict[str, Queue]:
        """By key; those that nobody serves and nobody waits for are left out."""
        return self.look()[0]

    def require(self, key: str) -> Queue:
        """The queue of a key, or one sentence on what there is in its place."""
        queues = self.queues()
        if key in queues and queues[key].servers:
            return queues[key]
        others = ", ".join(f"{other} ({queue.servers})" for other, queue in queues.items() if queue.servers)
        hint = f"it has {others}: check the key." if others else "it has none at all: start one on the board."
        raise TrackerError(f"the tracker at {self.name} has no server with the key '{key}'; {hint}")

    def look(self) -> tuple[dict[str, Queue], list[tuple[str, str]]]:
        """The queues, and each server's key and address."""
        summary = self.summary()
        try:
            servers = [(_key(server), ":".join(map(str, server["addr"]))) for server in summary["server_info"]]
            waiting = {key: (int(line["free"]), int(line["pending"])) for key, line in summary["queue_info"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise no_tracker(self.name) from error
        keys = [key for key, _ in servers]
        queues = {key: Queue(keys.count(key), *waiting.get(key, (0, 0))) for key in sorted({*keys, *waiting})}
        return {key: queue for key, queue in queues.items() if queue.servers or queue.pending}, sorted(servers)

    def _opened(self, message: list[Any]) -> socket.socket:
        data = json.dumps(message).encode()
        try:
            connection = socket.create_connection((self.host, self.port), SECONDS)
        except OSError as error:
            raise TrackerError(
                f"no RPC tracker answers at {self.name} ({_reason(error)}): check the address, "
                "or start one with 'python -m tvm.exec.rpc_tracker'."
            ) from error
        try:
            connection.sendall(MAGIC)  # and no more: the tracker takes what comes first for the whole greeting
            if connection.recv(len(MAGIC), socket.MSG_WAITALL) != MAGIC:
                raise no_tracker(self.name)
            connection.sendall(struct.pack("<i", len(data)) + data)
        except OSError as error:
            connection.close()
            raise self._lost(error) from error
        except TrackerError:
            connection.close()
            raise
        return connection

    def _lost(self, error: OSError) -> TrackerError:
        return TrackerError(f"the RPC tracker at {self.name} does not answer ({_reason(error)}): look after it.")


class Request:
    """A place in the queue. The connection holds it: closing gives it up."""

    def __init__(self, tracker: Tracker, connection: socket.socket) -> None:
        self._name, self._connection = tracker.name, connection
        self._frames = Frames(tracker.name)
        connection.setblocking(False)

    def fileno(self) -> int:
        return self._connection.fileno()

    def granted(self) -> Device | None:
        """The device, once it is our turn."""
        with contextlib.suppress(BlockingIOError):
            answer = self._frames.feed(self._receive())
            if answer is not None:
                return self._device(answer)
        return None

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(1 << 16)
        except BlockingIOError:
            raise
        except OSError as error:
            raise TrackerError(
                f"the RPC tracker at {self._name} is gone ({_reason(error)}): start it again."
            ) from error

    def _device(self, answer: Any) -> Device:
        try:
            status, (host, port, match_key) = answer
            if status == _SUCCESS:
                return Device(str(host), int(port), str(match_key))
        except (TypeError, ValueError):
            pass
        raise no_tracker(self._name)

    def close(self) -> None:
        self._connection.close()


class Frames:
    """A message of the tracker's, in whatever pieces it arrives: its length, then JSON."""

    def __init__(self, name: str) -> None:
        self._name, self._data = name, bytearray()

    def feed(self, piece: bytes) -> Any | None:
        """The message, once it is complete."""
        if not piece:
            raise TrackerError(f"the RPC tracker at {self._name} hung up: is it one, and of this TVM?")
        self._data += piece
        if len(self._data) < 4:
            return None
        (length,) = struct.unpack("<i", self._data[:4])
        if not 0 < length <= MOST_BYTES:
            raise no_tracker(self._name)
        if len(self._data) < 4 + length:
            return None
        try:
            return json.loads(bytes(self._data[4 : 4 + length]))
        except ValueError as error:
            raise no_tracker(self._name) from error


def no_tracker(name: str) -> TrackerError:
    return TrackerError(f"what answers at {name} is no RPC tracker: check the port (a tracker's is 9190 by default).")


def _key(server: dict[str, Any]) -> str:
    return str(server["key"]).removeprefix("server:")


def _reason(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error) or "no reason given"
