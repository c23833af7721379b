"""The process a runtime has for itself: it converts a model, or answers whenever the parent says so.

Orders and replies are JSON lines on what were stdin and stdout; whatever the runtime prints goes to stderr.
Time counts from before numpy is imported, so that the first answer costs what it costs a fresh process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevit_tvm.support.child import die_with_parent, leave_network
from saevit_tvm.verbs import peers
from saevit_tvm.verbs.peers.base import read_example


def main() -> None:
    """Read the one order on the command line and obey."""
    leave_network()
    die_with_parent()  # not before: other credentials make the system forget it
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.loads(sys.argv[1])

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    peer = peers.get(order["peer"])
    try:
        if order["do"] == "convert":
            peer.convert(Path(order["model"]), Path(order["example"]), Path(order["folder"]))
            reply(size=peer.size(Path(order["folder"])))
        else:
            serve(peer, order, reply)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reply(error=lines[0].rstrip(".")[:300])
        raise


def serve(peer: peers.Peer, order: dict[str, Any], reply: Any) -> None:
    """Load, answer once, then take turns until stdin closes."""
    start = time.perf_counter()
    import numpy as np

    inputs = read_example(Path(order["example"]))
    answer = peer.load(Path(order["folder"]), order["threads"])
    outputs = answer(*inputs)
    first = time.perf_counter() - start
    np.savez(order["outputs"], *outputs)
    reply(first_ms=first * 1e3, version=peer.version())
    for line in sys.stdin:
        reply(**turn(lambda: answer(*inputs), **json.loads(line)))


def turn(answer: Callable[[], Any], warm: int, runs: int | None, seconds: float) -> dict[str, Any]:
    """Some unmeasured answers, then `runs` measured ones, or as many as fit into `seconds` (at least one)."""
    for _ in range(warm):
        answer()
    times: list[float] = []
    begin, cpu = time.perf_counter(), time.process_time()
    while True:
        before = time.perf_counter()
        answer()
        now = time.perf_counter()
        times.append((now - before) * 1e3)
        if len(times) >= runs if runs else now - begin >= seconds:
            break
    return {"times": times, "cores": (time.process_time() - cpu) / (time.perf_counter() - begin)}


if __name__ == "__main__":
    main()
