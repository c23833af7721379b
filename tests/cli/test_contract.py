"""What every command promises: help, names, exit statuses, and one JSON object on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import saevit_tvm
from saevit_tvm.runtime.manifest import schema

jsonschema = pytest.importorskip("jsonschema")
COMMANDS = ["models", "targets", "tune", "build", "verify", "bench", "run", "sdk", "logs", "rpc-server", "doctor"]


def test_help_names_every_command_and_imports_nothing_heavy(cli):
    done = cli("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split()[0] for line in done.stdout.split("Commands:\n")[1].splitlines()] == COMMANDS
    code = (
        "import sys; from saevit_tvm.cli import app, guard; app._register();"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'numpy', 'onnx', 'rich', 'jsonschema'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli, command):
    done = cli(command, "--help")
    assert done.returncode == 0 and f"saevit-tvm {command}" in done.stdout and "--json" in done.stdout


def test_without_arguments_it_shows_the_help(cli):
    assert cli().stdout == cli("--help").stdout


def test_version(cli):
    assert cli("--version").stdout == f"saevit-tvm {saevit_tvm.__version__}\n"


def test_unknown_command_lists_and_points_at_the_nearest(cli, refused):
    refused(cli("biuld"), 2, "unknown command 'biuld'", *COMMANDS, "did you mean 'build'?")


def test_unknown_option_points_at_the_nearest(cli, refused):
    refused(cli("build", "--modle", "x"), 2, "unknown option '--modle'", "did you mean '--model'?")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["verify"], ["Missing argument 'ARTIFACT'", "saevit-tvm verify --help"]),
        (["run", __file__], ["Missing argument 'IMAGE...'"]),
        (["build", "--batch", "two"], ["'two' is no number of pictures"]),
        (["tune", "--trials", "0"], ["--trials"]),
        (["bench", "a.so", "--seconds", "0"], ["--seconds"]),
    ],
)
def test_wrong_usage_is_one_sentence(cli, args, words, refused):
    refused(cli(*args), 2, *words)


@pytest.mark.slow
def test_models_and_targets_for_scripts(cli):
    for name in ("models", "targets"):
        done = cli(name, "--json")
        assert done.returncode == 0 and done.stderr == ""
        jsonschema.validate(json.loads(done.stdout), schema(name))


@pytest.mark.slow
def test_models_and_targets_for_people(cli):
    assert [line.split()[0] for line in cli("models").stdout.splitlines()][1:4] == [
        "saevit_micro",
        "saevit_xs",
        "saevit_s",
    ]
    assert "timm:resnet18" in cli("models").stdout
    table = cli("targets").stdout
    assert "native" in table and "x86-64-v3" in table and "x86-64-v4" in table


def test_debug_shows_the_traceback_wherever_it_stands(cli):
    for args in (["--debug", "build", "--dtype", "x"], ["build", "--dtype", "x", "--debug"]):
        done = cli(*args)
        assert done.returncode == 2 and "Traceback" in done.stderr and "UsageError" in done.stderr


def test_a_bug_says_that_it_is_one(tmp_path):
    code = (
        "import saevit_tvm.cli.guard as g, sys\n"
        "def work(guard): raise ZeroDivisionError('of all things\\nand more')\n"
        "sys.exit(g.Guard().run(work))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "saevit-tvm: this is a bug in saevit-tvm (ZeroDivisionError: of all things): "
        "run the same command with --debug for the traceback, and report it.\n"
    )


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_drama(tmp_path):
    shell = f"'{sys.executable}' -m saevit_tvm targets --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.strip() == "141"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_an_error(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "saevit_tvm", "targets"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("saevit-tvm: ") and "No space left" in done.stderr


def on_a_terminal(*words: str, stream: str, **options: Any) -> str:
    """What a command writes to a terminal."""
    import pty

    main, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "saevit_tvm", *words], **{stream: terminal}, **options)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # the last one who had it has closed it
        while part := os.read(main, 4096):
            text += part
    os.close(main)
    process.wait()
    return text.decode()


@pytest.mark.slow
def test_on_a_terminal_there_is_a_table():
    text = on_a_terminal("targets", stream="stdout")
    assert "rpi5" in text and "─" in text


@pytest.mark.slow
def test_a_build_shows_its_progress_by_kernel(tmp_path):
    """In a line that is overwritten, and is gone when it is done."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(1, 3, 8, 8),)), tmp_path / "net.pt2")
    line = ("build", "--model", "net.pt2", "--no-cache", "--json")
    text = on_a_terminal(*line, stream="stderr", stdout=subprocess.DEVNULL, cwd=tmp_path)
    steps = re.findall(r"\x1b\[2K(phase \w+|kernel \d+ of \d+: \w+)\r(?!\n)", text)
    phases = [step.removeprefix("phase ") for step in steps if step.startswith("phase")]
    assert phases == ["import", "simplify", "regions", "layout", "kernels", "schedules"]
    kernels = [re.match(r"kernel (\d+) of (\d+)", step) for step in steps[len(phases) :]]
    assert [int(each[1]) for each in kernels] == list(range(1, int(kernels[0][2]) + 1)) and len(kernels) > 1
    shown = [line.rpartition("\x1b[2K")[2] for line in text.split("\r\n")]
    assert shown[0].startswith("compiling net.pt2") and shown[1].startswith("linking")
    (tmp_path / "net.pt2").write_bytes(b"nothing")
    failed = on_a_terminal("build", "--model", "net.pt2", stream="stderr", cwd=tmp_path)
    assert failed.rpartition("\x1b[2K")[2].startswith("saevit-tvm: 'net.pt2' is not a readable .pt2")
