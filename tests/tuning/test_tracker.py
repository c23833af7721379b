"""The tracker's protocol: whatever arrives, in whatever pieces, is a message or one sentence."""

from __future__ import annotations

import json
import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saevit_tvm.measure import tracker
from saevit_tvm.measure.tracker import MAGIC, Frames, Tracker, TrackerError

values = st.recursive(
    st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


def frame(value: object) -> bytes:
    data = json.dumps(value).encode()
    return struct.pack("<i", len(data)) + data


@pytest.mark.slow
@given(values.filter(lambda value: value is not None), st.lists(st.integers(1, 40)))
def test_a_message_may_come_in_any_pieces(value: object, sizes: list[int]) -> None:
    data, frames, found = frame(value), Frames("it"), None
    for size in [*sizes, len(data)]:
        piece, data = data[:size], data[size:]
        if piece:
            assert found is None
            found = frames.feed(piece)
    assert found == value


@given(st.lists(st.binary(min_size=1), min_size=1))
def test_what_is_no_tracker_is_told_in_one_sentence(pieces: list[bytes]) -> None:
    frames = Frames("it")
    try:
        for piece in pieces:
            frames.feed(piece)
    except TrackerError as error:
        assert "\n" not in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", *(MAGIC + frame(x) for x in ([0, []], {"a": 1}, [1, {}]))]
)
def test_another_service_at_the_address(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            client.recv(100)
            client.sendall(answer)
            client.recv(100)
            client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TrackerError, match=r"RPC tracker at|is no RPC tracker"):
            Tracker("127.0.0.1", server.getsockname()[1]).queues()
        thread.join()


def test_a_silent_host_does_not_hang_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TrackerError, match=r"does not answer \(no answer in time\)"),
    ):
        Tracker("127.0.0.1", server.getsockname()[1]).summary()
