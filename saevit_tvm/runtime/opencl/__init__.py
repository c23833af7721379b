"""OpenCL for TVM's runtime as pip installs it, which has none.

`plugin/` is a small C++ library that registers the device and the loader of its kernels; it is compiled once, where
it is first needed, and finds the driver when it runs. `driver` only asks the driver what there is.
"""

from saevit_tvm.runtime.opencl.driver import Device, available, devices
from saevit_tvm.runtime.opencl.plugin import OPENCL, activate

__all__ = ["OPENCL", "Device", "activate", "available", "devices"]
