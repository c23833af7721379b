"""Deploy SAEViT, a convolution + sparse-attention vision model, from PyTorch to one verified library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saevit_tvm.support.version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from saevit_tvm.runtime.engine import load


def __getattr__(name: str) -> Any:
    # Loading an artifact must not pay for the compiler, nor the version for the runtime.
    if name == "load":
        from saevit_tvm.runtime.engine import load

        return load
    raise AttributeError(f"module 'saevit_tvm' has no attribute '{name}'")
