"""CUDA artifacts: what their code holds, which GPU there is, and what its driver's errors mean.

`fatbin` reads compiled code, `driver` asks the driver what there is, `errors` is the one table of its messages, and
`emulated` stands in for a GPU that is not there.
"""

from saevit_tvm.runtime.cuda.driver import Device, available, devices
from saevit_tvm.runtime.cuda.library import CUDA, activate, check_device, libraries, require_architecture

__all__ = ["CUDA", "Device", "activate", "available", "check_device", "devices", "libraries", "require_architecture"]
