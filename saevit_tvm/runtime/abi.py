"""TVM's stable C ABI, as much of it as an engine needs: two libraries, packed functions, tensors.

The Python packages `tvm` and `tvm_ffi` are only located, never imported: they bring PyTorch and the compiler
with them, which takes seconds. Offsets and type codes are those of `tvm/ffi/c_api.h` and `dlpack.h`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.support.errors import ArtifactError

CPU = 1

_NONE, _INT, _BOOL, _RAW_STRING, _FIRST_OBJECT = 0, 1, 2, 8, 64
_TENSOR, _ARRAY = 70, 71
_OBJECT_HEADER = 24  # reference counts, type index, deleter
_DTYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}


class _Value(ctypes.Structure):
    """TVMFFIAny: a type index and eight bytes that hold a number or a pointer."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("bits", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Sequence(ctypes.Structure):
    """The head of TVMFFISeqCell, which an array object holds."""

    _fields_ = (("data", ctypes.POINTER(_Value)), ("size", ctypes.c_int64))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


@cache
def _ffi() -> ctypes.CDLL:
    """libtvm_ffi, with TVM's runtime loaded behind it: what that registers is then found by name."""
    ffi = ctypes.CDLL(str(library_path("tvm_ffi")), mode=ctypes.RTLD_GLOBAL)
    ffi.TVMFFIObjectDecRef.argtypes = [ctypes.c_void_p]
    ffi.TVMFFIObjectIncRef.argtypes = [ctypes.c_void_p]
    ffi.TVMFFITensorFromDLPack.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    ffi.TVMFFIFunctionCall.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    ctypes.CDLL(str(library_path("tvm", "tvm_runtime")), mode=ctypes.RTLD_GLOBAL)
    return ffi


def library_path(package: str, name: str | None = None) -> Path:
    """Where the installed wheels keep one of their libraries."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "lib" / f"lib{name or package}.so"
        if path.is_file():
            return path
    raise ArtifactError(f"lib{name or package}.so is not installed: 'pip install apache-{package.replace('_', '-')}'.")


_device_is_lost = False  # then nothing on it can be given back: TVM would end the process for trying


class Object:
    """A reference to an object of TVM's, given back when Python forgets it."""

    __slots__ = ("__weakref__", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        if not _device_is_lost:
            _ffi().TVMFFIObjectDecRef(self.handle)

    @property
    def references(self) -> int:
        """How many hold the object, this one included."""
        return ctypes.c_uint32.from_address(self.handle).value

    def _cell(self, structure: Any) -> Any:
        return structure.from_address(self.handle + _OBJECT_HEADER)


class Function(Object):
    """A packed function: takes and returns numbers, strings and objects."""

    def __call__(self, *arguments: Any) -> Any:
        # The encoded strings must live until the call is over: TVM gets pointers to them.
        arguments = tuple(item.encode() if isinstance(item, str) else item for item in arguments)
        values = (_Value * len(arguments))(*map(_to_value, arguments))
        result = _Value()
        if _ffi().TVMFFIFunctionCall(self.handle, values, len(arguments), ctypes.byref(result)):
            raise _raised()
        return _from_value(result)


class Tensor(Object):
    """A dense tensor. On the CPU, NumPy sees its memory through `__array_interface__` and keeps it alive."""

    @property
    def device(self) -> int:
        return self._cell(_DLTensor).device_type

    def fetch(self) -> np.ndarray:
        """A copy of the values, from whatever device they are on."""
        cell = self._cell(_DLTensor)
        kind = {code: letter for letter, code in _DTYPE_CODES.items()}[cell.code]
        array = np.empty(tuple(cell.shape[: cell.ndim]), f"<{kind}{cell.bits // 8}")
        copy(self, lend(array))
        return array

    @property
    def __array_interface__(self) -> dict[str, Any]:
        cell = self._cell(_DLTensor)
        kind = {code: letter for letter, code in _DTYPE_CODES.items()}[cell.code]
        return {
            "version": 3,
            "shape": tuple(cell.shape[: cell.ndim]),
            "typestr": f"<{kind}{cell.bits // 8}",
            "data": (cell.data + cell.byte_offset, False),
        }


class Array(Object):
    """A tuple of results."""

    def items(self) -> list[Any]:
        cell = self._cell(_Sequence)
        values = [cell.data[index] for index in range(cell.size)]
        for value in values:
            if value.type_index >= _FIRST_OBJECT:
                _ffi().TVMFFIObjectIncRef(value.bits)
        return [_from_value(value) for value in values]


def lend(array: np.ndarray) -> Tensor:
    """A tensor in the memory of a contiguous array, which lives until TVM has let go of it."""
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    managed = _DLManagedTensor(
        _DLTensor(
            data=array.ctypes.data,
            device_type=CPU,
            ndim=array.ndim,
            code=_DTYPE_CODES[array.dtype.kind],
            bits=array.dtype.itemsize * 8,
            lanes=1,
            shape=shape,
        ),
        None,
        ctypes.cast(_give_back, ctypes.c_void_p).value,
    )
    address, handle = ctypes.addressof(managed), ctypes.c_void_p()
    _lent[address] = (managed, shape, array)
    if _ffi().TVMFFITensorFromDLPack(address, 0, 1, ctypes.byref(handle)):
        del _lent[address]
        raise _raised()
    return Tensor(handle.value or 0)


_lent: dict[int, tuple[Any, ...]] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _give_back(address: int) -> None:
    del _lent[address]


def copy(source: Tensor, destination: Tensor) -> None:
    """Copy the values of one tensor into another of its shape, from any device to any."""
    global_function("runtime.TVMTensorCopyFromTo")(source, destination)


def to_device(tensor: Tensor, device: int) -> Tensor:
    """A copy on the first device of a kind."""
    return global_function("vm.builtin.to_device")(tensor, device, 0)


def global_function(name: str) -> Function:
    """A function that TVM's runtime registers under this name."""
    function = find_global_function(name)
    if function is None:
        raise ArtifactError(f"the installed TVM runtime has no '{name}': reinstall apache-tvm.")
    return function


def find_global_function(name: str) -> Function | None:
    """The same, or None where nothing has this name."""
    text = ctypes.create_string_buffer(name.encode())
    key, handle = _Bytes(ctypes.addressof(text), len(name)), ctypes.c_void_p()
    status = _ffi().TVMFFIFunctionGetGlobal(ctypes.byref(key), ctypes.byref(handle))
    return None if status or not handle.value else Function(handle.value)


def module_function(module: Object, name: str) -> Function:
    """A function of a loaded module."""
    function = global_function("ffi.ModuleGetFunction")(module, name, False)
    if function is None:
        raise ArtifactError(f"the library has no function '{name}': saevit-tvm did not build it.")
    return function


class Listener(Function):
    """A function of ours that TVM may call: it hears numbers and strings, and None for anything else."""

    __slots__ = ("_heard",)

    def __init__(self, hear: Callable[..., None]) -> None:
        def heard(_self: int, values: Any, count: int, _result: int) -> int:
            hear(*map(_lent_value, values[:count]))
            return 0

        self._heard = _HEARD(heard)  # lives as long as this
        handle = ctypes.c_void_p()
        if _ffi().TVMFFIFunctionCreate(None, self._heard, None, ctypes.byref(handle)):
            raise _raised()
        super().__init__(handle.value or 0)


_HEARD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Value), ctypes.c_int32, ctypes.c_void_p)


def _lent_value(value: _Value) -> int | str | None:
    """An argument that stays TVM's."""
    if value.type_index == _RAW_STRING:
        return ctypes.string_at(value.bits).decode()
    return value.bits if value.type_index in (_INT, _BOOL) else None


def _to_value(argument: Any) -> _Value:
    if isinstance(argument, Object):
        kind = ctypes.c_int32.from_address(argument.handle + 8).value
        return _Value(kind, 0, argument.handle)
    if isinstance(argument, bytes):
        return _Value(_RAW_STRING, 0, ctypes.cast(ctypes.c_char_p(argument), ctypes.c_void_p).value or 0)
    if isinstance(argument, bool):
        return _Value(_BOOL, 0, argument)
    return _Value(_INT, 0, argument)


def _from_value(value: _Value) -> Any:
    """The Python side of a value that is owned: a reference in it moves into the result."""
    if value.type_index == _NONE:
        return None
    if value.type_index < _FIRST_OBJECT:
        return value.bits
    wrappers = {68: Function, _TENSOR: Tensor, _ARRAY: Array}
    return wrappers.get(value.type_index, Object)(value.bits)


def _raised() -> ArtifactError:
    """The error that the last call left behind, in one line."""
    handle = ctypes.c_void_p()
    _ffi().TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    error = Object(handle.value or 0)
    kind, message = (
        ctypes.string_at(part.data, part.size).decode(errors="replace")
        for part in error._cell(_Bytes * 2)  # the error cell begins with its kind and its message
    )
    sentence = " ".join(message.split())
    from saevit_tvm.runtime.cuda.errors import LOST, of_words  # that package needs this module

    if known := of_words(f"{kind}: {sentence}"):
        global _device_is_lost
        _device_is_lost |= known == LOST
        return ArtifactError(f"{known}.")
    if kind == "OpenCLError":  # our own plugin's, and meant for the user
        return ArtifactError(sentence)
    return ArtifactError(f"TVM's runtime failed with {kind}: {sentence}")
