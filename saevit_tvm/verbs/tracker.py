"""doctor --rpc: what an RPC tracker sees, for whoever wonders why a board gets no work."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from saevit_tvm.measure.tracker import Tracker
from saevit_tvm.support.errors import UsageError

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[^\s/:\[\]]+):(?P<port>\d{1,5})")


def tracker(address: str) -> dict[str, Any]:
    """Its servers by key, how many of them are free, and how many requests wait."""
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise UsageError(
            f"--rpc '{address}' is not understood: give the tracker's HOST:PORT, such as 192.168.1.5:9190."
        )
    asked = Tracker(found["host"].strip("[]"), int(found["port"]))
    queues, servers = asked.look()
    return {
        "tracker": asked.name,
        "keys": [{"key": key, "busy": queue.busy} | asdict(queue) for key, queue in queues.items()],
        "servers": [{"key": key, "address": where} for key, where in servers],
    }
