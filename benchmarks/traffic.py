"""Bytes that operations read and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that write their first argument without having read it.
OVERWRITING = ("copy_", "_foreach_copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_")


class Traffic(TorchDispatchMode):
    """Counts the bytes of what torch's operations read and write while it is active.

    A tensor counts once an operation that reads it, and once an operation that writes it: what
    would go to and from memory if nothing stayed in the cache between two operations. So memory
    may carry less, and more where an operation goes over a tensor several times or keeps room of
    its own. Views and what only asks for shapes count nothing, elements that a tensor repeats
    (stride 0) count once, and an operation that picks elements counts all of the tensor.

    Attributes:
        bytes: read and written so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        results = func(*args, **given)
        self.bytes += _moved(func, dict(_named(func, args, given)), _tensors(results))
        return results


def _moved(operation: Any, given: dict[str, Any], results: list[Tensor]) -> int:
    """The bytes of one operation, by its schema."""
    name = operation._schema.name.split("::")[1]
    known = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given)}
    made = [result for result in results if result.untyped_storage().data_ptr() not in known]
    if torch.Tag.inplace_view in operation.tags or "empty" in name:
        return 0
    written = [tensor for key in _written(operation, given) for tensor in _tensors(given[key])]
    if not made and not written and torch.Tag.data_dependent_output not in operation.tags:
        return 0
    unread = _unread(operation, name, given)
    read = [
        tensor for key, value in given.items() if key not in unread for tensor in _tensors(value)
    ]
    return sum(map(_bytes, read + written + made))


def _written(operation: Any, given: dict[str, Any]) -> Iterator[str]:
    """The arguments that are written; torch says so of gradients that an optimizer may scale."""
    for argument in operation._schema.arguments:
        marked = argument.alias_info is not None and argument.alias_info.is_write
        kept = argument.name == "grads" and given.get("grad_scale") is None
        if marked and not kept and argument.name in given:
            yield argument.name


def _unread(operation: Any, name: str, given: dict[str, Any]) -> set[str]:
    """The arguments that are only written, or give only a shape."""
    arguments = operation._schema.arguments
    names = {argument.name for argument in arguments if argument.is_out}
    if name in OVERWRITING or name.startswith("new_") or name.endswith("_like"):
        names.add(arguments[0].name)
    if name == "convolution_backward":
        of_input, of_weight, _ = given["output_mask"]
        names |= {key for key, needed in (("weight", of_input), ("input", of_weight)) if not needed}
    return names


def _named(
    operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        yield argument.name, value
    yield from kwargs.items()


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    elements = tensor.element_size() if tensor.numel() else 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements
