"""What an imported graph computes, without compiling it: plain operators by PyTorch, whatever is not by TVM itself.

It is there to compare the import with the original. So nothing is in the table that TVM could understand otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from torch import Tensor
from tvm import relax

from saevit_tvm import targets
from saevit_tvm.compiler.importers.errors import reason
from saevit_tvm.support.errors import CompileError

Values = dict[relax.Var, Any]


def evaluate(mod: tvm.IRModule, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What `main` gives. No value is kept longer than it is read."""
    func = mod["main"]
    bindings = [binding for block in func.body.blocks for binding in block.bindings]
    last = {var: at for at, binding in enumerate(bindings) for var in relax.analysis.free_vars(binding.value)}
    for result in relax.analysis.free_vars(func.body.body):
        last[result] = len(bindings)
    values: Values = {}
    for at, (var, value) in enumerate(_steps(mod, inputs, values)):
        values[var] = value
        for each in [each for each in values if last.get(each, at) <= at]:
            del values[each]
    found = _value(func.body.body, values, _Compiled(mod))
    return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]


def variables(mod: tvm.IRModule, inputs: Sequence[np.ndarray]) -> dict[str, Any]:
    """The value of every variable of `main`: a tensor, or a tuple of tensors."""
    values: Values = {}
    for var, value in _steps(mod, inputs, values):
        values[var] = value
    return {var.name: value for var, value in values.items()}


def _steps(mod: tvm.IRModule, inputs: Sequence[np.ndarray], values: Values) -> Iterator[tuple[relax.Var, Any]]:
    """One value after the other, computed from those that the caller has kept."""
    func, compiled = mod["main"], _Compiled(mod)
    values |= {var: torch.from_numpy(np.ascontiguousarray(x)) for var, x in zip(func.params, inputs, strict=True)}
    for block in func.body.blocks:
        for binding in block.bindings:
            try:
                with torch.no_grad():
                    value = _value(binding.value, values, compiled)
            except Exception as error:
                name = getattr(getattr(binding.value, "op", None), "name", "an operator")
                raise CompileError(
                    f"TVM cannot compute '{name}' as this model has it: {reason(error)}; "
                    "replace that part of the model and try again."
                ) from error
            yield binding.var, value


def plain_value(expr: Any) -> Any:
    """Of what is neither a variable nor computed."""
    if isinstance(expr, tvm.ir.GenericConst):
        return torch.from_numpy(np.array(expr.value.numpy()))
    if isinstance(expr, relax.Tuple):
        return tuple(map(plain_value, expr.fields))
    if isinstance(expr, relax.ShapeExpr):
        return [int(extent) for extent in expr.values]
    return int(expr) if hasattr(expr, "__int__") else getattr(expr, "value", expr)


def _value(expr: Any, values: Values, compiled: _Compiled) -> Any:
    if isinstance(expr, relax.Var):
        return values[expr]
    if isinstance(expr, relax.Tuple):
        return tuple(_value(each, values, compiled) for each in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _value(expr.tuple_value, values, compiled)[int(expr.index)]
    if isinstance(expr, relax.Call):
        args = [_value(each, values, compiled) for each in expr.args]
        rule = RULES.get(expr.op.name.removeprefix("relax.")) if isinstance(expr.op, tvm.ir.Op) else None
        found = NotImplemented if rule is None else rule(args, expr.attrs)
        return _by_tvm(expr, args, compiled) if found is NotImplemented else found
    return plain_value(expr)


# By TVM ----------------------------------------------------------------------


class _Compiled(dict[Any, Any]):
    """Operators that TVM has compiled; loops that an importer has written itself are functions of the module."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__()
        self.mod = mod


def _by_tvm(call: relax.Call, args: list[Any], compiled: _Compiled) -> Any:
    """One operator, compiled for this CPU as TVM lowers it."""
    tensors = [at for at, each in enumerate(args) if _is_data(each)]
    flat = [each for at in tensors for each in (args[at] if isinstance(args[at], tuple) else (args[at],))]
    key = (
        str(call.op),
        str(call.attrs),
        str([(tuple(e.shape), e.dtype) for e in flat]),
        str([args[at] for at in range(len(args)) if at not in tensors]),
    )
    if key not in compiled:
        compiled[key] = _compiled(call, args, tensors, compiled.mod)
    found = compiled[key](*[tvm.runtime.tensor(each.contiguous().numpy()) for each in flat])
    return _torch(found)


def _is_data(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value))


def _torch(found: Any) -> Any:
    if hasattr(found, "numpy"):
        return torch.from_numpy(np.array(found.numpy()))
    return tuple(_torch(each) for each in found)


def _compiled(call: relax.Call, args: list[Any], tensors: list[int], mod: tvm.IRModule) -> Any:
    from saevit_tvm.compiler.legalize import OPERATORS

    def variable(value: Tensor) -> relax.Var:
        return relax.Var("x", relax.TensorType(list(value.shape), str(value.dtype).removeprefix("torch.")))

    given = list(call.args)
    params: list[relax.Var] = []
    for at in tensors:
        fresh = [variable(each) for each in (args[at] if isinstance(args[at], tuple) else (args[at],))]
        given[at] = relax.Tuple(fresh) if isinstance(args[at], tuple) else fresh[0]
        params += fresh
    loops = {each: mod[each] for each in given if isinstance(each, tvm.ir.GlobalVar)}
    builder = relax.BlockBuilder(tvm.IRModule(loops))
    with builder.function("main", params):
        with builder.dataflow():
            value = builder.emit_output(builder.emit(relax.Call(call.op, given, call.attrs, call.ty_args)))
        builder.emit_func_output(value)
    alone = relax.transform.LegalizeOps(OPERATORS)(relax.transform.DecomposeOpsForInference()(builder.get()))
    # It runs for a few inputs: to make it fast would take longer.
    target = tvm.target.Target(targets.native().tvm | {"opt-level": 1})
    with tvm.transform.PassContext(opt_level=1):
        return relax.VirtualMachine(relax.build(alone, target), tvm.cpu())["main"]


# By PyTorch ------------------------------------------------------------------

Rule = Callable[[list[Any], Any], Any]


def _plain(function: Callable[..., Any]) -> Rule:
    return lambda args, _: function(*args)


def _axes(attrs: Any) -> list[int]:
    return [int(axis) for axis in attrs.axis]


def _reduced(function: Callable[..., Any]) -> Rule:
    def rule(args: list[Any], attrs: Any) -> Any:
        axes = list(range(args[0].dim())) if attrs.axis is None else _axes(attrs)
        return function(args[0], dim=axes, keepdim=bool(attrs.keepdims))

    return rule


def _conv2d(args: list[Any], attrs: Any) -> Any:
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "OIHW"):
        return NotImplemented
    above, left, below, right = (int(each) for each in attrs.padding)
    padded = F.pad(args[0], (left, right, above, below))
    numbers = {name: [int(each) for each in getattr(attrs, name)] for name in ("strides", "dilation")}
    return F.conv2d(padded, args[1], None, numbers["strides"], 0, numbers["dilation"], int(attrs.groups))


def _conv2d_transpose(args: list[Any], attrs: Any) -> Any:
    above, left, below, right = (int(each) for each in attrs.padding)
    if (attrs.data_layout, attrs.kernel_layout) != ("NCHW", "IOHW") or (above, left) != (below, right):
        return NotImplemented
    named = {"stride": attrs.strides, "output_padding": attrs.output_padding, "dilation": attrs.dilation}
    deconvolution: Callable[..., Tensor] = F.conv_transpose2d
    numbers = {name: [int(each) for each in values] for name, values in named.items()}
    return deconvolution(*args, padding=(above, left), groups=int(attrs.groups), **numbers)


def _layer_norm(args: list[Any], attrs: Any) -> Any:
    axes, x = [int(axis) % args[0].dim() for axis in attrs.axes], args[0]
    if axes != list(range(x.dim() - len(axes), x.dim())) or not (attrs.center and attrs.scale):
        return NotImplemented
    return F.layer_norm(x, x.shape[axes[0] :], args[1], args[2], float(attrs.epsilon))


def _batch_norm(args: list[Any], attrs: Any) -> Any:
    x, gamma, beta, mean, variance = args
    if attrs.axis != 1 or not (attrs.center and attrs.scale):
        return NotImplemented
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(attrs.epsilon)), mean, variance


def _split(args: list[Any], attrs: Any) -> Any:
    x, axis = args[0], int(attrs.axis)
    parts = attrs.indices_or_sections
    if hasattr(parts, "__len__"):
        return tuple(torch.tensor_split(x, [int(each) for each in parts], axis))
    return NotImplemented if x.shape[axis] % int(parts) else tuple(torch.chunk(x, int(parts), axis))


def _part(args: list[Any], attrs: Any) -> Any:
    x, axes, begin, end, *steps = args
    where = [slice(None)] * x.dim()
    for axis, first, last, step in zip(axes, begin, end, steps[0] if steps else [1] * len(axes), strict=True):
        where[axis % x.dim()] = slice(first, last, step)
        if step < 1:
            return NotImplemented
    return x[tuple(where)]


def _product(args: list[Any], attrs: Any) -> Any:
    """Of the type that is asked for, if any is."""
    found = torch.matmul(*args)
    wanted = str(attrs.out_dtype or "").removeprefix("T.")
    return found.to(getattr(torch, wanted, found.dtype))


def _squeeze(args: list[Any], attrs: Any) -> Any:
    return torch.squeeze(args[0]) if attrs.axis is None else torch.squeeze(args[0], _axes(attrs))


def _expand(args: list[Any], attrs: Any) -> Any:
    rank = args[0].dim() + len(attrs.axis)
    for axis in sorted(int(each) % rank for each in attrs.axis):
        args[0] = args[0].unsqueeze(axis)
    return args[0]


def _permuted(args: list[Any], attrs: Any) -> Any:
    order = range(args[0].dim())[::-1] if attrs.axes is None else [int(axis) for axis in attrs.axes]
    return args[0].permute(*order)


def _clipped(args: list[Any], attrs: Any) -> Any:
    return torch.clamp(args[0], float(args[1]), float(args[2])).to(args[0].dtype)


DIRECT: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in ("abs", "ceil", "cos", "erf", "exp", "floor", "log", "rsqrt", "sigmoid")},
    **{name: getattr(torch, name) for name in ("sin", "sqrt", "square", "tan", "tanh", "where", "isnan", "isfinite")},
    **{name: getattr(torch, name) for name in ("logical_and", "logical_not", "logical_or", "maximum", "minimum")},
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "power": torch.pow,
    "negative": operator.neg,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
    "nn.relu": F.relu,
    "nn.gelu": F.gelu,
    "nn.silu": F.silu,
    "reshape": torch.reshape,
    "broadcast_to": torch.broadcast_to,
}
RULES: dict[str, Rule] = {
    **{name: _plain(function) for name, function in DIRECT.items()},
    "astype": lambda args, attrs: args[0].to(getattr(torch, str(attrs.dtype))),
    "batch_norm": _batch_norm,
    "clip": _clipped,
    "concat": lambda args, attrs: torch.cat(args[0], int(attrs.axis)),
    "expand_dims": _expand,
    "matmul": _product,
    "mean": _reduced(torch.mean),
    "sum": _reduced(torch.sum),
    "max": _reduced(torch.amax),
    "min": _reduced(torch.amin),
    "nn.batch_norm": _batch_norm,
    "nn.conv2d": _conv2d,
    "nn.conv2d_transpose": _conv2d_transpose,
    "nn.layer_norm": _layer_norm,
    "nn.softmax": lambda args, attrs: F.softmax(args[0], int(attrs.axis)),
    "permute_dims": _permuted,
    "split": _split,
    "squeeze": _squeeze,
    "strided_slice": _part,
}
