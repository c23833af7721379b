"""Between TVM's objects and the plain JSON of records: kernels, traces, and traces replayed on kernels."""

from __future__ import annotations

import base64
import zlib
from typing import Any


def plain(value: Any) -> Any:
    """TVM's containers and numbers as Python's own, ready for JSON."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "value"):  # IntImm and FloatImm
        return value.value
    return [plain(item) for item in value]


def module_key(module: Any) -> str:
    """Equal for equal kernels, whatever they are called: the text of the spec, or the structural hash without one."""
    from tvm.s_tir.meta_schedule.utils import shash2hex

    from schedules.kernels import key

    return key(module) or shash2hex(module)


def as_text(module: Any) -> str:
    import tvm

    return str(tvm.ir.save_json(module))


def pack_module(module: Any) -> str:
    return base64.b64encode(zlib.compress(as_text(module).encode(), 9)).decode()


def unpack_module(text: str) -> Any:
    import tvm

    return tvm.ir.load_json(zlib.decompress(base64.b64decode(text)).decode())


def workload(module: Any) -> Any:
    """MetaSchedule's wrapping of a kernel."""
    from tvm.s_tir.meta_schedule.database import Workload

    return Workload(module)


def unpack_workload(text: str) -> Any | None:
    """MetaSchedule's workload; None when it was written by a TVM that this one does not understand."""
    try:
        return workload(unpack_module(text))
    except Exception:  # whatever the reader trips over, the record is of no use here
        return None


def apply(workload: Any, trace: list[Any]) -> Any | None:
    """The workload scheduled by the trace; None when the trace does not apply (any more)."""
    from tvm.s_tir import Schedule
    from tvm.s_tir.schedule import Trace

    from schedules.registry import outdated

    schedule = Schedule(workload.mod, error_render_level="none")
    try:
        Trace.apply_json_to_schedule(trace, schedule)
    except Exception:  # replaying raises whatever the schedule primitive at fault raises
        return None
    return None if outdated(schedule.mod["main"]) else schedule


def as_record(workload: Any, schedule: Any, seconds: float) -> Any:
    from tvm.s_tir.meta_schedule.database import TuningRecord

    return TuningRecord(schedule.trace, workload, [seconds])


def as_source(schedule: Any) -> Any:
    """MetaSchedule's candidate for measurement."""
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo
    from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate

    return MeasureCandidate(schedule, ArgInfo.from_entry_func(schedule.mod, True))
