"""Addresses that a user can get wrong."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

MODEL = ("--model", "saevit_micro", "--image-size", "32")


@pytest.mark.parametrize("address", ["", "here", "here:", ":9190", "here:0", "here:99999", "rpc://here:9190"])
def test_doctor_wants_host_and_port(cli, address, refused):
    refused(cli("doctor", "--rpc", address), 2, "--rpc", "HOST:PORT")


def test_doctor_and_no_tracker(cli, refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refused(cli("doctor", "--rpc", f"127.0.0.1:{port}"), 1, f"no RPC tracker answers at 127.0.0.1:{port}", "start one")
    refused(cli("doctor", "--rpc", "no.such.host.invalid:9190"), 1, "no.such.host.invalid:9190", "check the address")


@pytest.mark.slow
def test_tune_wants_places_that_exist(cli, refused, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for words, status, expected in (
        (["--measure", "rpc://board"], 2, "give rpc://HOST:PORT/KEY"),
        (["--measure", "moon"], 2, "'moon' is not understood"),
        (["--cluster", "local:none"], 2, "give local:N"),
        (["--measure", f"rpc://127.0.0.1:{port}/rpi4"], 1, f"no RPC tracker answers at 127.0.0.1:{port}"),
    ):
        done = cli("tune", *MODEL, *words, "--trials", "1", "--store", tmp_path / "store")
        refused(done, status, expected)


def test_a_server_for_the_board(cli, refused, tmp_path):
    done = cli("rpc-server", "--out", "board", "--json", cwd=tmp_path)
    made = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    names = {"rpc-server", "README.txt", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so"}
    assert {path.name for path in (tmp_path / "board").iterdir()} == names
    assert made["bytes"] == sum(path.stat().st_size for path in (tmp_path / "board").iterdir())
    assert "--target native" in Path(tmp_path / made["readme"]).read_text()
    refused(cli("rpc-server", "--target", "android-arm64", cwd=tmp_path), 1, "no RPC server for target 'android-arm64'")
    refused(cli("rpc-server", "--target", "nativ", cwd=tmp_path), 2, "did you mean 'native'?")
    assert not (tmp_path / "rpc").exists()
