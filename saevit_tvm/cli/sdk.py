"""saevit-tvm sdk: all that a C or C++ project needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from saevit_tvm.cli.console import Console
from saevit_tvm.cli.options import artifact_argument, common, folder


@click.command(
    "sdk",
    short_help="Make a folder for C and C++.",
    help="Write a folder with all that a C or C++ project needs to run an artifact: header, libraries, an example "
    "that builds with make, CMake and pkg-config files.",
)
@artifact_argument
@click.option("--out", type=folder, required=True, help="The folder; new, empty, or an SDK that is replaced.")
@click.option(
    "--flavour",
    default="static",
    show_default=True,
    help="static: objects, no runtime library; shared: the artifact and TVM's runtime; or both.",
)
@click.option("--weights", help="The file its weights came from, where they came from a file (static).")
@click.option("--store", type=folder, help="Where the tuned records are that it was built with (static).")
@click.option("--no-cache", is_flag=True, help="Make it, though the same was made before and is kept.")
@common
def command(as_json: bool, no_cache: bool, **options: Any) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.sdk import SdkOptions, sdk

    result = sdk(SdkOptions(reuse=not no_cache, **options), console.say)
    for warning in result["warnings"]:
        console.say(f"warning: {warning}")
    console.object(result)
    out = Path(result["sdk"])
    again = ", as it was made before: nothing has changed since" if result["reused"] else ""
    console.line(
        f"sdk       {out} ({sum((out / file).stat().st_size for file in result['files']) / 1e6:.1f} MB){again}"
    )
    for flavour, proof in result["verification"].items():
        deviation = f"largest deviation {proof['max_abs_error']:.2g}" if proof["passed"] else "not run here"
        how = "; ".join(filter(None, (proof["proof"], proof.get("note"))))
        console.line(f"{flavour:9} linked into a C program: {deviation} (proof: {how})")
    console.line(f"next      cd {out} && make")
