"""Reading a checkpoint of the TensorFlow Model Garden.

TensorFlow is imported where it is needed and nowhere else.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effspinenet_lib.errors import CheckpointError, UserError

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
EMA_SLOT = "average"  # the Model Garden's name of the slot with the moving average of a variable
# What a checkpoint holds beside the model: counters, and the optimizer with its slots.
BESIDE_THE_MODEL = {"optimizer", "global_step", "save_counter"}
INDEX = re.compile(r"(.+-(\d+))\.index")


@dataclass(frozen=True)
class Variable:
    """A variable of the model in a checkpoint.

    Attributes:
        name: the name that it got when it was made.
        key: where the checkpoint has its value.
        average_key: where it has its moving average, if it keeps one.
    """

    name: str
    key: str
    average_key: str | None


class GardenCheckpoint:
    """The model in a checkpoint as the Model Garden's trainer saves it.

    Args:
        path: a folder with `<name>-<step>.index` and its data files, of which the newest is
            taken, or the path of one without its ending. A file `checkpoint` is not needed.

    Attributes:
        prefix: path of the checkpoint without its ending.
        variables: the model's variables by path: `backbone/...` and `head/...`.

    Raises:
        UserError: TensorFlow is not installed.
        CheckpointError: there is no checkpoint, it cannot be read, or it holds no detector.
    """

    def __init__(self, path: Path) -> None:
        self.prefix = _find_prefix(path)
        tensorflow = _tensorflow()
        self._errors = (tensorflow.errors.OpError, ValueError, RuntimeError, IndexError)
        try:
            self._reader = tensorflow.train.load_checkpoint(str(self.prefix))
            content = self._reader.get_tensor(GRAPH)
            module = "tensorflow.core.protobuf.trackable_object_graph_pb2"
            graph = importlib.import_module(module).TrackableObjectGraph()
            graph.ParseFromString(content)
        except self._errors as error:
            raise CheckpointError(self._unreadable(error)) from error
        self.variables = _model_variables(graph, str(self.prefix))
        self._refuse_strangers(graph)

    def read(self, path: str, average: bool) -> NDArray[np.float32]:
        """The value of a variable, or with `average` its moving average where it keeps one.

        Raises:
            CheckpointError: it cannot be read, as from a file that was cut short.
        """
        variable = self.variables[path]
        key = variable.average_key if average and variable.average_key else variable.key
        try:
            value: NDArray[np.float32] = np.asarray(self._reader.get_tensor(key), np.float32)
        except self._errors as error:
            raise CheckpointError(self._unreadable(error)) from error
        return value

    @property
    def has_averages(self) -> bool:
        """Whether it keeps moving averages of variables."""
        return any(variable.average_key for variable in self.variables.values())

    def _unreadable(self, error: Exception) -> str:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{self.prefix}: cannot be read ({reason}); unpack or copy the checkpoint again"

    def _refuse_strangers(self, graph: Any) -> None:
        """Refuse a checkpoint with variables outside of what the trainer saves."""
        known = {variable.key for variable in self.variables.values()}
        for node in graph.nodes:
            for attribute in node.attributes:
                key = attribute.checkpoint_key
                beside = key.split("/")[0] in BESIDE_THE_MODEL or "/.OPTIMIZER_SLOT/" in key
                if key not in known and not beside:
                    name = key.split("/.ATTRIBUTES/")[0]
                    raise CheckpointError(
                        f"{self.prefix}: has the variable {name}, which no released detector has"
                    )


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes on the processor and its drivers
    try:
        return importlib.import_module("tensorflow")
    except ImportError as error:
        raise UserError(
            "reading this checkpoint needs TensorFlow, which is not installed here; in a virtual "
            "environment of its own: pip install 'effspinenet[tensorflow]'"
        ) from error


def _find_prefix(path: Path) -> Path:
    """The checkpoint at a path: the newest of a folder, or the one that the path names."""
    if path.is_dir():
        found = [m for file in path.iterdir() if (m := INDEX.fullmatch(file.name))]
        if not found:
            raise CheckpointError(
                f"{path}: has no checkpoint; a file such as ckpt-277200.index must be in it"
            )
        return path / max(found, key=lambda match: int(match[2]))[1]
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise CheckpointError(f"{path}: no such folder, and no checkpoint of this name")
    return prefix


def _model_variables(graph: Any, origin: str) -> dict[str, Variable]:
    """The variables of backbone and head by path, through whichever objects lead to them."""
    averages = {
        slot.original_variable_node_id: slot.slot_variable_node_id
        for node in graph.nodes
        for slot in node.slot_variables
        if slot.slot_name == EMA_SLOT
    }
    variables: dict[str, Variable] = {}
    for part in ("backbone", "head"):
        start = _child(graph, 0, part) or _child(graph, _child(graph, 0, "model"), f"_{part}")
        if start is None:
            raise CheckpointError(
                f"{origin}: has no {part}; it is not a detector that the Model Garden trained"
            )
        for path, number in _nodes_with_values(graph, start):
            attribute = graph.nodes[number].attributes[0]
            average = averages.get(number)
            key = graph.nodes[average].attributes[0].checkpoint_key if average else None
            variables[f"{part}/{path}"] = Variable(
                attribute.full_name, attribute.checkpoint_key, key
            )
    return variables


def _child(graph: Any, node: int | None, name: str) -> int | None:
    children = graph.nodes[node].children if node is not None else ()
    return next((child.node_id for child in children if child.local_name == name), None)


def _nodes_with_values(graph: Any, start: int) -> Iterator[tuple[str, int]]:
    """Paths and numbers of the objects below one that hold a value, each by its shortest path.

    Keras lists each layer of a network twice, as `layer-7` and, if it has weights, as
    `layer_with_weights-4`; the second name is kept.
    """
    seen, queue = {start}, deque([("", start)])
    while queue:
        path, number = queue.popleft()
        if graph.nodes[number].attributes:
            yield path, number
            continue
        children = graph.nodes[number].children
        for child in sorted(children, key=lambda child: child.local_name.startswith("layer-")):
            if child.node_id not in seen:
                seen.add(child.node_id)
                queue.append((f"{path}/{child.local_name}".lstrip("/"), child.node_id))
