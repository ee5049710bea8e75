"""What each part of the authors' network is worth to its costs, one changed at a time.

    python -m benchmarks.cost_parts      # writes results/cost/parts.csv, some minutes

Every own #FLOPs and #Params cell of the paper is counted again by the authors' rule with one part
of the network, or of the rule, replaced by another reading of the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from effspinenet_lib.experiments.cost_table import printed_cells, rounds_to, row_options
from effspinenet_lib.models import dense, layers, mask_rcnn, retinanet, scale_permuted, specs, zoo
from effspinenet_lib.models.cost import Cost, measure_cost
from effspinenet_lib.results.paper import RESULTS_DIR
from effspinenet_lib.results.tables import COST_UNITS, write_table

CLOSE_PERCENT = 3.0
BLOCK_3 = 2  # its place in the topology

Change = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Part:
    """One part and its other reading.

    Attributes:
        name: of the part.
        change: from what, to what.
        applied: makes models be built, or counted, so.
        options: of `create_model`, by task.
        count: attribute of `Cost` that is compared.
    """

    name: str
    change: str
    applied: Change = contextlib.nullcontext
    options: dict[str, dict[str, Any]] | None = None
    classes: int | None = None
    count: str = "authors_count"


def _set(module: Any, name: str, value: Any) -> Change:
    return lambda: patch.object(module, name, value)


def _fused_block_3() -> AbstractContextManager[Any]:
    topology = list(specs.TOPOLOGY)
    level, _, is_output = topology[BLOCK_3]
    topology[BLOCK_3] = (level, (1, 2), is_output)
    return patch.object(specs, "TOPOLOGY", tuple(topology))


def _rounded_first(betas: tuple[int, ...], multiplier: float = 1.0) -> tuple[int, ...]:
    return tuple(specs.round_dim(multiplier * dim) for dim in _feature_dims(betas))


_feature_dims = specs.feature_dims


class _Pooled(layers.Resample):
    """Max pooling in place of the depthwise convolution."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        kept = [layer for layer in self.layers[:-1] if not isinstance(layer, nn.Sequential)]
        steps = args[3] - args[1]
        pools = [layers.max_pool() for _ in range(steps - 1)] if kept else []
        if kept:
            self.layers = nn.Sequential(*kept, *pools, self.layers[-1])


class _Bare(layers.Resample):
    """No norm and activation behind space-to-depth."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if len(self.layers) and isinstance(self.layers[0], layers.SpaceToDepth):
            self.layers = nn.Sequential(self.layers[0], *self.layers[3:])


class _SmallKernel(layers.Resample):
    """A kernel of 3 for every factor."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for sequence in self.layers:
            conv = sequence[0] if isinstance(sequence, nn.Sequential) else None
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (5, 5):
                channels, stride = conv.in_channels, conv.stride[0]
                sequence[0] = nn.Conv2d(
                    channels, channels, 3, stride, 1, groups=channels, bias=False
                )


class _Identity(layers.Resample):
    """Nothing between blocks of one level and dimension."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        inputs, input_level, outputs, output_level = args[:4]
        if (inputs, input_level) == (outputs, output_level):
            self.layers = nn.Sequential()


def _unbiased(head: Any) -> Any:
    class Unbiased(head):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "biased": False})

    return Unbiased


class _DensePredictor(retinanet.RetinaNet):
    """A plain 3x3 prediction layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for head in (self.class_head, self.box_head):
            last = head.last_conv
            head.predict = layers.dense_conv(last.in_channels, last.out_channels, bias=True)


class _SharedNorms(retinanet.RetinaNet):
    """One norm a layer for all levels."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for head in (self.class_head, self.box_head):
            shared = list(head.norms[: head.layers])
            head.norms = nn.ModuleList(shared * (len(head.norms) // head.layers))


class _LongProposals(mask_rcnn.ProposalHead):
    """Three convolutions in the proposal branch, as the text may be read."""

    def __init__(self, dim: int, *args: Any) -> None:
        super().__init__(dim, *args)
        more = [
            nn.Sequential(
                layers.SeparableConv(dim, dim, bias=True), layers.make_norm(dim), nn.SiLU()
            )
            for _ in range(2)
        ]
        self.conv = nn.Sequential(*more, self.conv)


class _SeparableSegmentation(dense.PyramidSegmentationHead):
    """A separable 3x3 prediction."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        last = self.subnet[-1]
        self.subnet[-1] = layers.SeparableConv(last.in_channels, last.out_channels, bias=True)


PARTS = (
    Part("the authors' network", "as this library builds it"),
    Part("counting", "multiply-adds of convolutions and linear layers alone", count="multi_adds"),
    Part("stem", "16 channels, not 8", _set(specs, "STEM_DIM", 16)),
    Part("block 3", "fused from blocks 1 and 2, not chained behind block 2", _fused_block_3),
    Part(
        "dimensions",
        "rounded before they are scaled, not once",
        _set(specs, "feature_dims", _rounded_first),
    ),
    Part("rounding", "to multiples of 4, not 8", _set(specs, "DIM_MULTIPLE", 4)),
    Part("depthwise in resampling", "max pooling", _set(scale_permuted, "Resample", _Pooled)),
    Part(
        "norm behind space-to-depth",
        "neither norm nor activation",
        _set(scale_permuted, "Resample", _Bare),
    ),
    Part("kernel of 5", "3 for every factor", _set(scale_permuted, "Resample", _SmallKernel)),
    Part("1x1 at equal shape", "none", _set(scale_permuted, "Resample", _Identity)),
    Part("idle block", "not taken in", _set(specs.Wiring, "extra_inputs", {})),
    Part("fusion", "a plain sum, not Equation 1", options={"*": {"weighted_fusion": False}}),
    Part(
        "resampling for classification",
        "space-to-depth",
        options={"classification": {"space_to_depth": True}},
    ),
    Part("biases of the heads", "none", _set(zoo, "RetinaNet", _unbiased(retinanet.RetinaNet))),
    Part("prediction layer", "a dense 3x3 convolution", _set(zoo, "RetinaNet", _DensePredictor)),
    Part("norms of the heads", "shared by the levels", _set(zoo, "RetinaNet", _SharedNorms)),
    Part("classes", "80 for detection, not 90", classes=80),
    Part(
        "proposal branch",
        "three convolutions, not one",
        _set(mask_rcnn, "ProposalHead", _LongProposals),
    ),
    Part(
        "prediction of segmentation",
        "separable 3x3, not 1x1",
        _set(zoo, "PyramidSegmentationHead", _SeparableSegmentation),
    ),
)


def count_part(part: Part) -> dict[str, Any]:
    """How well the own cells are met with one part changed: a record of `cost/parts.csv`."""
    known: dict[tuple[Any, ...], Cost] = {}
    deviations: dict[str, float] = {}
    met = 0
    for cell in printed_cells():
        if cell["model"] not in specs.MODELS:
            continue
        name, task = cell["model"], cell["task"]
        changed = part.options or {}
        options = {**changed.get("*", {}), **changed.get(task, {})}
        options |= row_options(cell["item"], cell["row"])
        classes = part.classes if task == "detection" else None
        key = (name, task, tuple(options.items()))
        if key not in known:
            with part.applied(), torch.device("meta"):
                model = zoo.create_model(name, task, classes, **options)
                known[key] = measure_cost(model, zoo.default_image_size(name, task))
        metric = cell["metric"]
        attribute = part.count if metric == "multi_adds" else metric
        counted = getattr(known[key], attribute) / COST_UNITS[metric][0]
        number = int(cell["item"].removeprefix("table-"))
        label = (
            f"Table {number}, {cell['row']}, {'#FLOPs' if metric == 'multi_adds' else '#Params'}"
        )
        deviations[label] = 100 * (counted / cell["value"] - 1)
        met += rounds_to(counted, cell)
    worst = max(deviations, key=lambda label: abs(deviations[label]))
    sizes = np.abs(list(deviations.values()))
    return {
        "part": part.name,
        "change": part.change,
        "cells_as_printed": int(met),
        "cells_within_3_percent": int((sizes <= CLOSE_PERCENT).sum()),
        "cells": len(deviations),
        "mean_deviation_percent": round(float(sizes.mean()), 2),
        "worst_cell": worst,
        "worst_deviation_percent": round(deviations[worst], 1),
    }


def main(path: Path = RESULTS_DIR / "cost" / "parts.csv") -> None:
    """Count every part and write the table."""
    write_table(path, "cost_part", [count_part(part) for part in tqdm(PARTS, "parts")])
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
