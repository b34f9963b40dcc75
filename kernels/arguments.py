"""What an operation takes: one table for each, checked in the same way before its kernel and its reference.

A kernel reads memory as its source says, whatever the tensors are: a wrong dtype, a transposed argument or a
gap between rows would give wrong results or corrupt memory, and nobody would know.
"""

from collections.abc import Mapping
from types import CodeType
from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.limits import HEAD_DIM_MOST, HEAD_DIM_STEP

ELEMENT = None
"""In place of a dtype: bfloat16, float16 or float32, the same for all such arguments of a call."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CHUNK_BYTES = 16
_MOST_REMEMBERED = 4096  # of an operation; a longer context or another batch is a new signature


class Argument(NamedTuple):
    """One tensor of a call."""

    name: str
    """As the caller would write it, such as ``resident.rows``."""
    dtype: torch.dtype | None
    shape: str
    """Sizes between spaces: numbers, names, and expressions such as ``sinks+recent+capacity``. A name has one
    value in all arguments of a call."""
    dense: int | None = None
    """How many of the last dimensions must be contiguous; None for all."""
    chunks: bool = False
    """Whether the kernel moves 16 bytes at a time, so that on a GPU rows must start at multiples of that."""
    optional: bool = False
    """Whether it may be None."""
    anywhere: bool = False
    """Whether it may be CPU memory that the GPU shares, beside arguments on the GPU."""


class Rule(NamedTuple):
    """What must hold for the sizes of a call."""

    condition: str
    """An expression of sizes."""
    reason: str
    """The rest of a sentence that begins with "because"."""
    gpu: bool = False
    """Whether only the kernel needs it, and not its reference."""


HEAD_DIM = Rule(
    f"head_dim % {HEAD_DIM_STEP} == 0 and head_dim <= {HEAD_DIM_MOST}",
    "kernels take rows in such units",
    gpu=True,
)
GROUPED = Rule("query_heads % kv_heads == 0", "each KV head serves as many query heads")


class _Size(NamedTuple):
    value: int
    source: str  # name of the argument that has it


class Signature:
    """The arguments of an operation.

    Args:
        operation: its name.
        arguments: its tensors, in the order in which ``check`` gets them.
        rules: what must hold beyond that.
    """

    def __init__(self, operation: str, arguments: tuple[Argument, ...], rules: tuple[Rule, ...] = ()) -> None:
        self.operation, self.arguments, self.rules = operation, arguments, rules
        self._shapes = [argument.shape.split() for argument in arguments]
        self._code: dict[str, CodeType] = {
            text: compile(text, f"<{operation}>", "eval")
            for text in (*(size for shape in self._shapes for size in shape), *(r.condition for r in rules))
        }
        self._passed: set[tuple[object, ...]] = set()

    def check(self, *tensors: Tensor | None, **sizes: int) -> None:
        """Refuse tensors that the operation cannot take.

        It looks at no data, so it may be called while a CUDA graph is captured. It remembers what has passed,
        so that a later call with the same shapes, strides, dtypes and sizes takes a few microseconds.

        Args:
            tensors: one for each of ``arguments``.
            sizes: the integers of the call that its shapes and rules speak of.

        Raises:
            TypeError: an argument is not a tensor, or of another dtype.
            ValueError: it has another shape, gaps, the wrong alignment or device, or a rule is broken.
        """
        try:
            key = (
                *[
                    t
                    if t is None
                    else (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.is_cpu or t.device)
                    for t in tensors
                ],
                *sizes.values(),
            )
        except AttributeError:
            key = ()  # something is not a tensor
        if key not in self._passed:
            self._check(tensors, sizes)
            if len(self._passed) >= _MOST_REMEMBERED:
                self._passed.clear()
            self._passed.add(key)
        if tensors[0] is not None and not tensors[0].is_cpu:
            for argument, tensor in zip(self.arguments, tensors, strict=True):
                if argument.chunks and tensor is not None and tensor.data_ptr() % _CHUNK_BYTES:
                    raise ValueError(
                        f"{self.operation}: {argument.name} starts at address {tensor.data_ptr():#x}, and on "
                        f"a GPU it must start at a multiple of {_CHUNK_BYTES}."
                    )

    def _check(self, tensors: tuple[Tensor | None, ...], given: Mapping[str, int]) -> None:
        present = []
        for argument, tensor in zip(self.arguments, tensors, strict=True):
            if isinstance(tensor, Tensor):
                present.append((argument, tensor))
            elif tensor is not None or not argument.optional:
                kind = type(tensor).__name__
                raise TypeError(f"{self.operation}: {argument.name} is of type {kind}, and must be a tensor.")
        self._check_dtypes(present)
        self._check_devices(present)
        sizes = self._check_shapes(present, given)
        for argument, tensor in present:
            self._check_strides(argument, tensor)
        gpu = not present[0][1].is_cpu
        for rule in self.rules:
            if (gpu or not rule.gpu) and not self._value(rule.condition, sizes):
                raise ValueError(
                    f"{self.operation}: {rule.condition} must hold{' on a GPU' if rule.gpu else ''}, because "
                    f"{rule.reason}; {self._explain(rule.condition, sizes)}."
                )

    def _check_dtypes(self, present: list[tuple[Argument, Tensor]]) -> None:
        element: tuple[str, torch.dtype] | None = None
        for argument, tensor in present:
            allowed = _FLOATS if argument.dtype is ELEMENT else (argument.dtype,)
            if tensor.dtype not in allowed:
                names = " or ".join(_dtype(dtype) for dtype in allowed)
                raise TypeError(
                    f"{self.operation}: {argument.name} is {_dtype(tensor.dtype)}, and must be {names}."
                )
            if argument.dtype is ELEMENT:
                element = element or (argument.name, tensor.dtype)
                if tensor.dtype != element[1]:
                    raise TypeError(
                        f"{self.operation}: {argument.name} is {_dtype(tensor.dtype)}, and must be "
                        f"{_dtype(element[1])} as {element[0]} is."
                    )

    def _check_devices(self, present: list[tuple[Argument, Tensor]]) -> None:
        first, device = present[0][0].name, present[0][1].device
        for argument, tensor in present:
            if tensor.device != device and not (argument.anywhere and tensor.is_cpu):
                raise ValueError(
                    f"{self.operation}: {argument.name} is on {tensor.device}, and must be on {device} as "
                    f"{first} is."
                )

    def _check_shapes(
        self, present: list[tuple[Argument, Tensor]], given: Mapping[str, int]
    ) -> dict[str, _Size]:
        sizes = {name: _Size(value, name) for name, value in given.items()}
        shapes = dict(zip(self.arguments, self._shapes, strict=True))
        for argument, tensor in present:
            if tensor.dim() != len(shapes[argument]):
                raise self._wrong_shape(argument, tensor, sizes)
            for text, size in zip(shapes[argument], tensor.shape, strict=True):
                if text.isidentifier() and sizes.setdefault(text, _Size(size, argument.name)).value != size:
                    raise self._wrong_shape(argument, tensor, sizes)
        for argument, tensor in present:
            for text, size in zip(shapes[argument], tensor.shape, strict=True):
                if self._value(text, sizes) != size:
                    raise self._wrong_shape(argument, tensor, sizes)
        return sizes

    def _wrong_shape(self, argument: Argument, tensor: Tensor, sizes: Mapping[str, _Size]) -> ValueError:
        wanted = f"[{', '.join(argument.shape.split())}]"
        explained = self._explain(argument.shape.replace(" ", ","), sizes, besides=argument.name)
        return ValueError(
            f"{self.operation}: {argument.name} has the shape {list(tensor.shape)}, and must have {wanted}"
            f"{explained and ', where '}{explained}."
        )

    def _check_strides(self, argument: Argument, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        dims, shape, strides = tensor.dim(), tensor.shape, tensor.stride()
        dense = dims if argument.dense is None else argument.dense
        step = 1
        for dim in reversed(range(dims - dense, dims)):
            if shape[dim] != 1 and strides[dim] != step:
                which = "it" if dense == dims else f"its last {dense} dimensions" if dense > 1 else "its rows"
                raise ValueError(
                    f"{self.operation}: {argument.name} has the shape {list(shape)} with strides "
                    f"{list(strides)}, and {which} must be contiguous."
                )
            step *= shape[dim]
        if argument.chunks and not tensor.is_cpu:
            for dim in range(dims - dense):
                if shape[dim] != 1 and strides[dim] * tensor.itemsize % _CHUNK_BYTES:
                    raise ValueError(
                        f"{self.operation}: {argument.name} has strides {list(strides)}, and on a GPU these "
                        f"must be multiples of {_CHUNK_BYTES} bytes."
                    )

    def _value(self, text: str, sizes: Mapping[str, _Size]) -> int:
        # the expressions are those of the tables in this package
        value: int = eval(self._code[text], {}, {name: size.value for name, size in sizes.items()})
        return value

    def _explain(self, text: str, sizes: Mapping[str, _Size], besides: str = "") -> str:
        """The sizes of which a text speaks, and which arguments have them."""
        names = compile(text, "<sizes>", "eval").co_names
        known = [(name, sizes[name]) for name in names if name in sizes and sizes[name].source != besides]
        return " and ".join(
            f"{name} is {size.value}" + (f" as in {size.source}" if size.source != name else "")
            for name, size in known
        )


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
