"""saevit-tvm verify: does an artifact compute what PyTorch computes?"""

from __future__ import annotations

from pathlib import Path

import click

from saevit_tvm.cli.console import Console, flipped
from saevit_tvm.cli.options import artifact_argument, common
from saevit_tvm.support.errors import ParityError, TargetError


@click.command(
    "verify",
    short_help="Compare an artifact with PyTorch.",
    help="Compare an artifact with the PyTorch model it was built from.",
)
@artifact_argument
@click.option("--weights", help="The file its weights came from, where they came from a file.")
@click.option("--device", metavar="rpc://HOST:PORT/KEY", help="Run it on a device behind this RPC tracker.")
@common
def command(artifact: Path, weights: str | None, device: str | None, as_json: bool) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.verify import verify

    result = verify(artifact, weights, device)
    console.object(result)
    if result["proof"] == "none":
        raise TargetError(f"not verified: {result['note']}")
    if not result["passed"]:
        raise ParityError(
            f"'{artifact}' deviates from its model by {_figure(result['max_abs_error'])} "
            f"({_figure(result['max_rel_error'])} of the largest value, "
            f"{result['tolerance']:g} allowed){flipped(result)}: build it again."
        )
    recorded = result["reference"] == "recorded"
    origin = "the answers recorded when it was built" if recorded else result["reference"]
    console.line(
        f"{artifact}: passed against {origin}, on {result['machine']}, {result['inputs']} random inputs; "
        f"largest deviation {result['max_abs_error']:.2g} (relative {result['max_rel_error']:.2g}, "
        f"{result['tolerance']:g} allowed){flipped(result)}"
    )
    if result["note"]:
        console.line(f"not against the model itself: {result['note']}")


def _figure(value: float | None) -> str:
    return "NaN or infinity" if value is None else f"{value:.3g}"
