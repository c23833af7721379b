"""Does a CUDA target compute in float16 what PyTorch computes? Asked where there is no NVIDIA GPU.

    python benchmarks/cuda_float16.py [--model saevit_micro] [--target cuda-sm_90] [--batch 17] [--image-size 32]

The kernels are those of the target with its tilings, but what tensor cores do is written out as loops and arithmetic
is in float32: the first OpenCL device runs them (PoCL, on this CPU). What is stored is float16 all the same. Not
shown: what tensor cores themselves compute, and the depthwise sums, which a GPU keeps in float16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

OPENCL = {"kind": "opencl", "host": {"kind": "llvm"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="saevit_micro")
    parser.add_argument("--target", default="cuda-sm_90")
    parser.add_argument("--batch", type=int, default=17)
    parser.add_argument("--image-size", type=int, default=32)
    options = parser.parse_args()
    found = compared(options.model, options.target, options.batch, options.image_size)
    print(
        f"{options.model}, batch {options.batch}, {found['kernels']} kernels of {options.target}, {found['tensor']} of "
        f"them on tensor cores: deviation {found['deviation']:.2e} of the largest value"
    )
    sys.exit(found["deviation"] >= found["tolerance"])


def compared(model: str, target: str, batch: int, image_size: int) -> dict[str, Any]:
    """How many kernels there are, on tensor cores or not, and the deviation of what they compute together."""
    from saevit_tvm import targets
    from saevit_tvm.compiler import opencl, pipeline
    from saevit_tvm.models.sources import open_model
    from saevit_tvm.verbs import parity
    from schedules.gpu.devices import limits_of, written_out

    source, chosen = open_model(model, batch=batch, image_size=image_size), targets.get(target)
    limits = written_out(limits_of(chosen.tvm))
    made = opencl.scheduled(source, chosen, None, pipeline._Dump(None), "float16", limits)
    (x,) = parity.random_inputs(source.input_shape, 1)
    with tempfile.TemporaryDirectory() as folder, opencl.generating_kernels(limits):
        answers = _run(made.module, x, Path(folder) / "kernels.so")
    return {
        "kernels": made.counts["total"],
        "tensor": sum(name.name_hint.startswith("tensor_conv") for name in made.module.get_global_vars()),
        "deviation": parity.deviation([answers], [source.reference(x)]).max_rel_error,
        "tolerance": parity.TOLERANCE["float16"],
    }


def _run(module: Any, x: Any, library: Path) -> list[Any]:
    """The outputs of a scheduled module, by the first OpenCL device."""
    import tvm
    from tvm import relax

    from saevit_tvm.compiler import pipeline
    from saevit_tvm.runtime import opencl
    from saevit_tvm.verbs.parity import as_list

    target = tvm.target.Target(OPENCL)
    planned = pipeline.run(module, pipeline.virtual_machine(), target)
    relax.build(planned, target, relax_pipeline=None).export_library(str(library))
    opencl.activate()
    device = tvm.runtime.device("opencl", 0)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), [device, tvm.runtime.device("cpu")])
    outputs = machine["main"](tvm.runtime.tensor(x, device))
    return [output.numpy() for output in as_list(outputs if hasattr(outputs, "numpy") else list(outputs))]


if __name__ == "__main__":
    main()
