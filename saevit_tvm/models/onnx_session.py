"""onnxruntime as what an ONNX model is compared with."""

from __future__ import annotations

from typing import Any


def exact_session(model: Any) -> Any:
    """It computes what the model says, on every CPU alike."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it complains of is raised as well
    # Products of bytes are added up in sixteen bits, and cut off there, where a CPU has no instructions for more.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
