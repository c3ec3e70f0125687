"""One decorator: what it decorates is called directly in eager mode, and is a registered operator for compilers.

`torch.compile`, `torch.export` and fake tensors see an operator, and of its results shape and type. An operator made in
Python costs several times the host time of a direct call (`python -m benchmarks overhead`), so that eager mode does
without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from ..neighborhood import Neighborhood, read

_SCHEMA = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str", Neighborhood: "str"}


def operator(name: str, fake: Callable, looked_into: Callable[..., bool] = lambda *_: False) -> Callable:
    """Decorate a function, so that it is `torch.ops.tvae_kernels.<name>` for whatever traces a call of it.

    Its arguments are annotated as tensors, numbers, neighbourhoods and named tuples of these; the operator takes the
    fields of a tuple one by one and the text of a neighbourhood. Its result is a tensor or a tuple of them, of which
    those annotated as `Tensor | None` have two dimensions or more.

    Args:
        name: of the operator.
        fake: given the same arguments, returns tensors of the shape and type of the results, contiguous.
        looked_into: given the same arguments, whether a compiler had better trace what the function does.

    Returns:
        The decorator. The function's `operator` is the way through the operator, whatever runs.

    """

    def decorate(function: Callable) -> Callable:
        kinds = get_type_hints(function)
        returned = kinds.pop("return")
        single = returned is Tensor
        optional = [kind is not Tensor for kind in get_args(returned)]

        def results(found, prepare=lambda x: x) -> tuple[Tensor, ...] | Tensor:
            """Return an operator's results are tensors, never None: an empty one stands for what there is not."""
            if single:
                return prepare(found)
            device = found[0].device
            nothing = torch.empty(0, dtype=torch.float32, device=device)
            return tuple(nothing.clone() if x is None else prepare(x) for x in found)

        arguments = ", ".join(part for argument, kind in kinds.items() for part in _schema(argument, kind))
        registered = torch.library.custom_op(
            f"tvae_kernels::{name}",
            lambda *flat: results(function(*_packed(kinds, list(flat))), _own),
            mutates_args=(),
            schema=f"({arguments}) -> " + ("Tensor" if single else f"({', '.join(['Tensor'] * len(optional))})"),
        )
        registered.register_fake(lambda *flat: results(fake(*_packed(kinds, list(flat)))))

        def through(*arguments):
            found = registered(*_flat(arguments))
            if single:
                return found
            return tuple([None if maybe and x.ndim == 1 else x for x, maybe in zip(found, optional, strict=True)])

        @wraps(function)
        def call(*arguments):
            if (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()) and not looked_into(*arguments):
                return through(*arguments)
            return function(*arguments)

        call.operator, call.registered = through, registered
        return call

    return decorate


def _own(x: Tensor) -> Tensor:
    """Return a result as compilers are told that it is: contiguous, in memory which it shares with no other."""
    if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@cache
def _fields(kind: type) -> dict[str, type]:
    """Return the fields of a named tuple by name; none of anything else."""
    return get_type_hints(kind) if hasattr(kind, "_fields") else {}


def _schema(name: str, kind) -> list[str]:
    """Return the arguments of an operator that one of a function becomes."""
    if _fields(kind):
        return [part for field in _fields(kind).items() for part in _schema(*field)]
    for other in get_args(kind):  # `Tensor | None`
        if other is not type(None):
            return [f"{_SCHEMA[other]}? {name}"]
    return [f"{_SCHEMA[kind]} {name}"]


def _flat(arguments: tuple) -> list:
    """Return the arguments of an operator from those of the function."""
    flat = []
    for x in arguments:
        if isinstance(x, tuple):
            flat += _flat(x)
        else:
            flat.append(x.text if isinstance(x, Neighborhood) else x)
    return flat


def _packed(kinds: dict, flat: list) -> list:
    """Return the arguments of the function from those of the operator, which are taken from the list."""
    packed = []
    for kind in kinds.values():
        if _fields(kind):
            packed.append(kind(*_packed(_fields(kind), flat)))
        else:
            x = flat.pop(0)
            packed.append(read(x) if kind is Neighborhood else x)
    return packed
