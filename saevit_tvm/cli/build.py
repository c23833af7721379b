"""saevit-tvm build: one verified .so and its manifest."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from saevit_tvm.cli.console import Console, flipped
from saevit_tvm.cli.options import common, cut_option, dtype_option, folder, model_options, target_option

if TYPE_CHECKING:
    from saevit_tvm.verbs.build import BuildResult

MOST_NAMED, LONGEST_NAME = 4, 32


@click.command(
    "build",
    short_help="Make a verified .so from a model.",
    help="Compile a model for a target, verify the result against PyTorch, and put it in place.",
)
@target_option
@cut_option
@model_options
@dtype_option
@click.option(
    "--input",
    "input_dtype",
    default="float32",
    show_default=True,
    help="float32, or uint8: frames of a camera, which the library itself scales, normalises and lays out.",
)
@click.option("--labels", type=folder, help="Names of the classes: a file with one a line, or a JSON list.")
@click.option("--classes", "num_classes", type=int, help="Number of classes of the head.")
@click.option("--features-only", is_flag=True, help="Give the maps of the four stages, not class scores.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights, without --weights.")
@click.option("--no-tuned", is_flag=True, help="Leave tuned records aside.")
@click.option("--store", type=folder, help="Where tuned records are.")
@click.option("--out", type=folder, default="out", show_default=True, help="Where the artifact goes.")
@click.option("--name", help="The artifact's file name; by default from model, target, batch and size.")
@click.option("--no-cache", is_flag=True, help="Build, though the same was built before and is kept.")
@click.option("--dump-ir", type=folder, help="Write the module after each phase there.")
@common
def command(as_json: bool, no_tuned: bool, no_cache: bool, **options: Any) -> None:
    console = Console(as_json)
    from saevit_tvm.verbs.build import BuildOptions, build

    result = build(BuildOptions(use_tuned=not no_tuned, reuse=not no_cache, **options), console.say)
    for warning in result.warnings:
        console.say(f"warning: {warning}")
    manifest = result.manifest
    console.object(
        {
            "artifact": str(result.artifact),
            "manifest": str(result.manifest_path),
            "size": result.artifact.stat().st_size,
            "seconds": round(result.seconds, 1),
            "reused": result.reused,
            "warnings": result.warnings,
        }
        | {key: manifest[key] for key in ("regions", "kernels", "work", "records", "verification")}
        | {"left_to_rules": result.left}
    )
    _print(console, result)


def _print(console: Console, result: BuildResult) -> None:
    artifact, manifest = result.artifact, result.manifest
    kernels, proof = manifest["kernels"], manifest["verification"]
    regions = [f"{name} {count['found']} of {count['expected']}" for name, count in manifest["regions"].items()]
    how = ", as it was built before: nothing has changed since" if result.reused else ""
    console.line(f"built     {artifact} ({artifact.stat().st_size / 1e6:.1f} MB) in {result.seconds:.0f} s{how}")
    console.line(f"manifest  {result.manifest_path}")
    console.line(f"regions   {', '.join(regions) or 'none expected in this model'}")
    console.line(
        f"kernels   {kernels['total']}: {kernels['tuned']} from tuned records, "
        f"{kernels['scheduled']} from hand-written schedules, {kernels['fallback']} from fallback rules"
    )
    console.line(f"rules     {_left(result.left)}")
    if "device_code" in manifest:
        console.line(f"device    {_compiled(manifest['device_code'])}")
    if manifest["weights"]["source"] == "random":
        console.line("weights   random: it takes the time that the model takes, and knows nothing; give --weights")
    if manifest["weights"]["source"] == "pretrained":
        console.line(f"weights   trained, {manifest['weights']['from']}")
    for source in manifest["records"]:
        console.line(f"records   {_in_words(source, kernels['total'])}")
    if proof["passed"]:
        console.line(
            f"verified  against {proof['reference']} on {proof['machine']}, {proof['inputs']} random inputs: "
            f"largest deviation {proof['max_abs_error']:.2g} "
            f"(relative {proof['max_rel_error']:.2g}, {proof['tolerance']:.2g} allowed){flipped(proof)}"
        )
    else:
        console.line("verified  no: it cannot be run here (proof: none)")
    if "arithmetic" in proof:
        found = proof["arithmetic"]
        widened = ", what is float16 in float32" if "widened" in found else ""
        console.line(
            f"emulated  its kernels on this CPU{widened}, {found['inputs']} random inputs: "
            f"largest deviation from PyTorch {found['max_abs_error']:.2g} "
            f"(relative {found['max_rel_error']:.2g}, {proof['tolerance']:.2g} allowed){flipped(found)}"
        )


def _left(left: dict[str, Any]) -> str:
    """How much of an inference runs in kernels of TVM's, and in which: those that take the most time, or are most."""
    if not left["kernels"]:
        return "nothing is left to TVM's own: all of an inference is in generated kernels"
    shares = [f"{_percent(left['multiply_adds'])} of the multiply-adds"]
    shares += [f"{_percent(left['time'])} of the time on one thread"] if left["time"] is not None else []
    measure, shown = ("calls", str) if left["time"] is None else ("time", _percent)
    by_name: Counter[str] = Counter()
    for name, kernel in left["kernels"].items():
        by_name[re.sub(r"(?<=[a-z])\d+(?=_|$)", "", name.removeprefix("fused_"))] += kernel[measure]
    most = ", ".join(f"{_brief(name)} {shown(value)}" for name, value in by_name.most_common(MOST_NAMED))
    more = f" and {len(by_name) - MOST_NAMED} others" if len(by_name) > MOST_NAMED else ""
    return f"{' and '.join(shares)} are left to TVM's own: {most}{more}"


def _brief(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _compiled(code: dict[str, Any]) -> str:
    """What was read back from the compiled kernels."""
    kernels = code["kernels"].values()
    marks = ("spill_bytes", "tensor_products", "overlaps")
    spilling, tensor, overlapping = (sum(kernel[mark] > 0 for kernel in kernels) for mark in marks)
    return (
        f"{len(kernels)} CUDA kernels for each of {', '.join(code['architectures'])}, PTX for {code['ptx']}; "
        f"at most {max(kernel['registers'] for kernel in kernels)} registers a thread and "
        f"{max(kernel['shared_bytes'] for kernel in kernels)} bytes of shared memory, {spilling} with spills, "
        f"{tensor} on tensor cores, {overlapping} begin while the one before ends"
    )


def _in_words(source: dict[str, Any], total: int) -> str:
    """Where records come from, in words: whose times they are matters as much as that there are some."""
    whose = "shipped" if source["shipped"] else "your own"
    how = "modelled, not measured" if source["modelled"] else "measured"
    near = ", near this target" if source["near"] else ""
    return f"{source['kernels']} of {total} kernels, {whose}, {how} on {source['fingerprint']}{near}"
