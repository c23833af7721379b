"""What `--measure` and `--cluster` take, and one sentence for all else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saevit_tvm.measure import counted, local, rpc
from saevit_tvm.support.errors import UsageError
from saevit_tvm.tuning.measurers import longest_seconds, parse, rpc_address


@pytest.mark.parametrize("where", ["local", "qemu", "rpc://board:9190/rpi4", "rpc://[::1]:9190/a-b.c_d"])
def test_what_is_understood(where: str) -> None:
    assert callable(parse(where))


@pytest.mark.parametrize("cluster", ["local:1", "local:16", "ray:auto", "ray://head:10001"])
def test_clusters_that_are_understood(cluster: str) -> None:
    assert callable(parse("local", cluster))


@pytest.mark.parametrize(
    "where",
    ["", "lokal", "rpc", "rpc://", "rpc://board/rpi4", "rpc://board:9190", "rpc://board:9190/", "rpc://:9190/k",
     "rpc://board:0/k", "rpc://board:99999/k", "rpc://board:9190/two/keys", 'rpc://board:9190/a"b'],
)  # fmt: skip
def test_wrong_places(where: str) -> None:
    with pytest.raises(UsageError, match=r"not understood: give .*rpc://HOST:PORT/KEY"):
        parse(where)


@pytest.mark.parametrize("cluster", ["", "local", "local:0", "local:-1", "local:x", "ray", "ray://", "ray://head", "x"])
def test_wrong_clusters(cluster: str) -> None:
    with pytest.raises(UsageError, match=r"--cluster .* not understood: give local:N, ray:auto or ray://HOST:PORT"):
        parse("local", cluster)


def test_a_cluster_measures_by_itself() -> None:
    with pytest.raises(UsageError, match="leave out --measure"):
        parse("qemu", "local:2")


def test_a_stop_waits_for_the_slowest_measurement() -> None:
    assert longest_seconds("local") >= local.RUN_SECONDS + local.DRIVER_SECONDS  # on an OpenCL device
    assert longest_seconds("rpc://board:9190/rpi4") >= rpc.REACH_SECONDS + rpc.RUN_SECONDS
    assert longest_seconds("qemu") >= 2 * counted.RUN_SECONDS
    assert longest_seconds("local", "local:2") > longest_seconds("local")


@given(
    st.from_regex(r"[a-z0-9.-]{1,20}", fullmatch=True), st.integers(1, 65535), st.from_regex(r"[\w.-]+", fullmatch=True)
)
def test_an_address_is_taken_apart(host: str, port: int, key: str) -> None:
    assert rpc_address(f"rpc://{host}:{port}/{key}") == (host, port, key)


@given(st.text())
def test_any_text_is_an_address_or_a_sentence(text: str) -> None:
    try:
        host, port, key = rpc_address(text)
    except UsageError as error:
        assert "rpc://HOST:PORT/KEY" in str(error)
    else:
        assert host and 0 < port < 65536 and key
