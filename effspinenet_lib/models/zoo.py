"""Every model by name: `create_model`, `create_backbone`, `list_models`.

A scale-permuted model is an entry of `specs.MODELS`. Any other is one function below under
`@model(name, image sizes by task, tables of the paper)`, whose keyword arguments are the model's
options. The path of a resource distribution (a JSON file) can be given for a model's name.
"""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from effspinenet_lib.errors import CheckpointError, DataError, UnknownName, UserError
from effspinenet_lib.files import read_json, write_json
from effspinenet_lib.models.anchors import ANCHOR_SIZE
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.dense import (
    DROPOUT,
    Classifier,
    PyramidSegmentationHead,
    Segmenter,
    pyramid_classification_head,
)
from effspinenet_lib.models.fpn import BiFPN, FeaturePyramid, TimmFeatures
from effspinenet_lib.models.layers import (
    ACTIVATIONS,
    NORM_EPSILON,
    NORM_MOMENTUM,
    PyramidBackbone,
)
from effspinenet_lib.models.mask_rcnn import MaskRCNN
from effspinenet_lib.models.mobile_fpn import (
    NASFPN,
    MnasFPN,
    mnasnet_a1_features,
    mobilenetv3_features,
)
from effspinenet_lib.models.released_specs import HEAD_LAYERS as RELEASED_HEAD_LAYERS
from effspinenet_lib.models.released_specs import RELEASED, ReleasedSpec
from effspinenet_lib.models.retinanet import DetectionSettings, RetinaNet
from effspinenet_lib.models.scale_permuted import EffSpineNet, MobileSpineNet, SpineNet
from effspinenet_lib.models.specs import (
    MODELS,
    SCALES,
    SEGMENTATION_SIZE,
    SPINENET_49,
    TASKS,
    BackboneSpec,
    ModelSpec,
    Scale,
    SpineNetSpec,
    backbone_spec,
    betas_text,
    check_betas,
    parse_betas,
)
from effspinenet_lib.models.ssd import SharedTower, SSDLite
from effspinenet_lib.models.weights import load_into, load_weights

DISTRIBUTION_SUFFIX = ".json"
DISTRIBUTION_FORMAT = "eff-spinenet-distribution-1"

# (task, classes, options) -> model with fresh weights.
Build = Callable[..., TaskModel]


@dataclass(frozen=True)
class Entry:
    """What the zoo knows of a model.

    Attributes:
        name: how it is asked for.
        image_sizes: task -> side of the square input in pixels that the paper gives it; the
            tasks that it can do.
        tables: items of the paper that have it.
        build: makes it of a task, a number of classes and options.
        note: what its cost rests on, or why it misses the printed one.
    """

    name: str
    image_sizes: Mapping[str, int]
    tables: tuple[str, ...]
    build: Build
    note: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """Names of the options and their defaults."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_BASELINES: dict[str, Entry] = {}


def model(
    name: str, image_sizes: Mapping[str, int], tables: tuple[str, ...], note: str = ""
) -> Callable[[Build], Build]:
    """Register the function below as the builder of a model; the arguments are `Entry`'s."""

    def register(build: Build) -> Build:
        _BASELINES[name] = Entry(name, dict(image_sizes), tables, build, note)
        return build

    return register


# ---- asking for a model


def list_models() -> dict[str, tuple[str, ...]]:
    """Names of the models, each with the tables of the paper that have it."""
    tables = {spec.name: spec.tables for spec in MODELS.values()}
    tables.update({entry.name: entry.tables for entry in _BASELINES.values()})
    return dict(sorted(tables.items()))


def create_model(
    name: str,
    task: str = "detection",
    num_classes: int | None = None,
    weights: str | Path | None = None,
    **options: Any,
) -> TaskModel:
    """Build a model with fresh weights, or with those of a file; in training mode.

    Args:
        name: one of `list_models()`, or the path of a distribution.
        task: `detection`, `instances` (detection with masks), `classification` or
            `segmentation` (semantic).
        num_classes: classes, without background but for `segmentation`, where it is a class of
            its own; None takes the file's, or the benchmark's of the paper: 90, 90, 1000 and 21.
        weights: a file that `effspinenet train` or `convert` wrote; its options are the defaults.
        options: `known_options` lists them; for the scale-permuted models `space_to_depth`,
            `weighted_fusion`, `squeeze_excitation`, `activation`, `stochastic_depth`, `dropout`,
            `coarse_levels`, `anchor_size`, `betas`.

    Returns:
        Images and targets in, losses in training, predictions in evaluation.

    Raises:
        UnknownName: the model, task or option is not known, or the model is not made for the
            task; the message lists near names.
        UserError: `num_classes` is not positive, or an option has an invalid value.
        CheckpointError: the weights cannot be read, or are of another model or task.
    """
    if weights is not None:
        state, facts = load_weights(weights)
        if (facts["model"], facts["task"]) != (name, task):
            raise CheckpointError(
                f"{weights}: is of {facts['model']}, {facts['task']}, not of {name}, {task}"
            )
        model = create_model(
            name, task, num_classes or facts["num_classes"], **{**facts["options"], **options}
        )
        load_into(model, state, f"{weights} (model {name})")
        return model
    name, checked = check_model(name, task, options)
    classes = TASKS[task] if num_classes is None else num_classes
    if classes < 1:
        raise UserError(f"num_classes is {classes}; a model needs at least one class")
    return model_entry(name).build(task, classes, **checked)


def create_backbone(name: str, **options: Any) -> TorchvisionBackbone:
    """Build a model's backbone with fresh weights, for torchvision's or your own heads.

    Args:
        name: a model for detection with outputs P3 to P7 (or P3 to P6).
        options: as of `create_model`.

    Returns:
        A module that maps images [N, 3, H, W] to an ordered dict of features "P3" to "P7",
        [N, out_channels, ceil(H / 2**level), ceil(W / 2**level)]. Where the backbone's outputs
        differ in dimension, the model's own 1x1 convolutions bring them to one.

    Raises:
        UnknownName: the model or option is not known.
        UserError: an option has an invalid value, or the model has no feature pyramid.
    """
    detector = create_model(name, "detection", 1, **options)
    if not isinstance(detector, RetinaNet):
        raise UserError(f"{name} has no feature pyramid; take a model with outputs P3 to P7")
    return TorchvisionBackbone(detector)


class TorchvisionBackbone(nn.Module):
    """A backbone as torchvision's detectors take it: see `create_backbone`."""

    def __init__(self, detector: RetinaNet) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.lateral = detector.lateral
        self.out_channels = detector.head_dim

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images [N, 3, H, W] to features by level, "P3" first."""
        features = self.backbone(images).items()
        return OrderedDict(
            (f"P{level}", lateral(feature))
            for lateral, (level, feature) in zip(self.lateral, features, strict=True)
        )


def model_entry(name: str) -> Entry:
    """What the zoo knows of a model.

    Raises:
        UnknownName: no such model; the message lists near names.
        DataError: the path of a distribution that cannot be read.
    """
    name, _ = resolve_model(name, {})
    if name in _BASELINES:
        return _BASELINES[name]
    if name not in MODELS:
        raise UnknownName("model", name, list_models())
    spec = MODELS[name]
    scale = SCALES[spec.scale]
    sizes = {
        "detection": scale.input_size,
        "instances": scale.input_size,
        "classification": scale.classification_size,
        "segmentation": SEGMENTATION_SIZE,
    }
    return Entry(name, sizes, spec.tables, partial(_scale_permuted, spec), _NOTES.get(name, ""))


def default_image_size(name: str, task: str = "detection") -> int:
    """Image side in pixels that the paper gives a model for a task.

    Raises:
        UnknownName: no such model, or the model is not made for the task.
    """
    sizes = model_entry(name).image_sizes
    if task not in sizes:
        raise UnknownName(f"task of {name}" if task in TASKS else "task", task, sizes)
    return sizes[task]


def known_options(name: str) -> tuple[str, ...]:
    """Names of the options that `create_model` takes for a model."""
    return tuple(model_entry(name).options)


def check_model(name: str, task: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check what `create_model` is given, without building anything.

    Returns:
        The listed model that the name stands for, and its options.

    Raises:
        UnknownName: the model, task or option is not known, or the model is not made for the
            task; the message lists near names.
        UserError: an option has an invalid value.
    """
    name, resolved = resolve_model(name, options)
    default_image_size(name, task)
    known = model_entry(name).options
    for option, value in resolved.items():
        if option not in known:
            raise UnknownName("model option", option, known)
        _check_option(option, value, known[option])
    return name, resolved


def _check_option(option: str, value: Any, default: Any) -> None:
    """Refuse a value that would build another network than was meant."""
    if option == "activation":
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnknownName("activation", str(value), ACTIVATIONS)
        return
    if option == "betas":
        if not isinstance(value, str):
            raise UserError(f"model option betas is {value!r}; write it as 10-10-5-...")
        if value:
            parse_betas(value)
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if option == "output_stride":
        valid, wanted = is_number and value in ATROUS_RATES, "8 or 16"
    elif option == "anchor_size":
        valid, wanted = is_number and value > 0, "a positive number"
    elif isinstance(default, float):  # a rate
        valid, wanted = is_number and 0 <= value < 1, "a number from 0 to below 1"
    elif isinstance(default, bool) or default is None:
        valid, wanted = isinstance(value, bool) or value is default, "true or false"
    else:
        valid, wanted = is_number and isinstance(value, int) and value >= 1, "a positive number"
    if not valid:
        raise UserError(f"model option {option} is {value!r}; it must be {wanted}")


# ---- resource distributions as files


@dataclass(frozen=True)
class Distribution:
    """A resource distribution (section 3.3) and the scale that it is built at.

    Attributes:
        name: for people.
        model: scale-permuted model whose distribution it replaces; gives the scale.
        betas: of the 18 blocks (Equation 4).
        origin: where it comes from and what is known of it, as JSON types.
    """

    name: str
    model: str
    betas: tuple[int, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def feature_dims(self) -> list[int]:
        """Feature dimensions of the 18 blocks at the scale D0, as Table 1 prints them."""
        return [block.feature_dim for block in backbone_spec(self.betas).blocks]

    @property
    def backbone(self) -> BackboneSpec:
        """The backbone at the scale of `model`."""
        return backbone_spec(self.betas, SCALES[MODELS[self.model].scale])


def write_distribution(path: str | os.PathLike[str], distribution: Distribution) -> None:
    """Write a distribution as JSON, atomically.

    Raises:
        UserError: the name does not end in `.json`, or the file cannot be written.
    """
    if not is_distribution(path):
        raise UserError(f"{path}: the file of a distribution must end in {DISTRIBUTION_SUFFIX}")
    values = {
        "format": DISTRIBUTION_FORMAT,
        "name": distribution.name,
        "model": distribution.model,
        "betas": list(distribution.betas),
        "feature_dims": distribution.feature_dims,
        "origin": dict(distribution.origin),
    }
    write_json(path, values)


def read_distribution(path: str | os.PathLike[str]) -> Distribution:
    """Read what `write_distribution` wrote.

    Raises:
        DataError: the file is missing or invalid, or its betas do not give its dimensions.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != DISTRIBUTION_FORMAT:
        raise DataError(f"{path}: not a resource distribution (format {DISTRIBUTION_FORMAT})")
    try:
        betas, origin = check_betas(values["betas"]), values.get("origin", {})
        distribution = Distribution(str(values["name"]), str(values["model"]), betas, origin)
        stated = values["feature_dims"]
    except KeyError as error:
        raise DataError(f"{path}: invalid distribution: it has no {error}") from error
    except (TypeError, UserError) as error:
        raise DataError(f"{path}: invalid distribution: {error}") from error
    if not isinstance(origin, dict):
        raise DataError(f"{path}: invalid distribution: its origin is no object")
    if distribution.model not in MODELS:
        raise UnknownName(f"scale-permuted model of {path}", distribution.model, MODELS)
    if distribution.feature_dims != stated:
        raise DataError(
            f"{path}: its betas give the dimensions {distribution.feature_dims}, it states "
            f"{stated}; correct the file, or export it again"
        )
    return distribution


def is_distribution(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is the path of a distribution."""
    return Path(name).suffix == DISTRIBUTION_SUFFIX


def resolve_model(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The listed model and the options that a name and its options stand for.

    The path of a distribution becomes its model with its betas, so that nothing depends on
    where the file lies; any other name stays.

    Raises:
        DataError: a path that holds no distribution.
        UserError: betas are given together with a distribution.
    """
    if not is_distribution(name):
        return name, dict(options)
    if "betas" in options:
        raise UserError(f"{name} has betas of its own; give the option betas to a listed model")
    distribution = read_distribution(name)
    return distribution.model, {**options, "betas": betas_text(distribution.betas)}


# ---- Eff-SpineNet and SP-EfficientNet (section 4)

_NOTES: dict[str, str] = {
    "eff_spinenet_d0": (
        "Parameters: the authors' network has 3.75 M, printed are 3.6 M; Table 3's D1, which is "
        "the same with repeats, is met. No rule was found that gives both."
    ),
    "sp_efficientnet_b0": (
        "2.34 B and 4.59 M by the authors' count, printed are 2.4 B and 4.4 M; unexplained, as "
        "D0's parameters are."
    ),
    "eff_spinenet_d1": (
        "By the authors' count 5.92 B (Table 3 prints 6.0) and 0.694 B (Table 10 prints 0.70)."
    ),
    "eff_spinenet_m1": (
        "By the authors' count 0.482 B, printed are 0.51 B. With 16 channels in block 2, where the "
        "rule gives 8, it is 0.507 B."
    ),
}


_COARSE_LEVEL = 6  # section 5.2: P6 and P7 are the ones too coarse at small inputs


def _scale_permuted(
    spec: ModelSpec,
    task: str,
    num_classes: int,
    *,
    space_to_depth: bool | None = None,
    weighted_fusion: bool = True,
    squeeze_excitation: bool = True,
    activation: str = "swish",
    stochastic_depth: float = 0.2,
    dropout: float = DROPOUT,
    coarse_levels: bool = True,
    anchor_size: float = ANCHOR_SIZE,
    betas: str = "",
) -> TaskModel:
    """A scale-permuted backbone under the head of a task.

    Args:
        spec: distribution and scale.
        task: of the model.
        num_classes: of the head.
        space_to_depth: see `EffSpineNet`; None: the paper's, false for classification alone
            (Table 10's costs) and true else.
        weighted_fusion: see `EffSpineNet`, as are the next three.
        squeeze_excitation: likewise.
        activation: likewise.
        stochastic_depth: likewise.
        dropout: rate before the linear layer of the classifier.
        coarse_levels: whether the classifier's mean has P6 and P7 (section 4.2); P3 to P5 alone
            test section 5.2's reason for the lower accuracy.
        anchor_size: side over stride of the smallest anchor of the one-stage detector.
        betas: of the 18 blocks (Equation 4), such as `10-10-5-...`, in place of the model's own
            distribution; empty: its own.
    """
    scale = SCALES[spec.scale]
    if space_to_depth is None:
        space_to_depth = task != "classification"
    backbone = EffSpineNet(
        backbone_spec(parse_betas(betas) if betas else spec.betas, scale),
        space_to_depth,
        weighted_fusion,
        squeeze_excitation,
        activation,
        stochastic_depth,
    )
    head, dims = (scale.head_dim, scale.head_layers), backbone.feature_dims
    if task == "detection":
        return RetinaNet(backbone, num_classes, *head, activation, anchor_size)
    if task == "instances":
        return MaskRCNN(backbone, num_classes, *head, scale.box_fc_dim, activation)
    if task == "classification":
        if not coarse_levels:
            dims = {level: dim for level, dim in dims.items() if level < _COARSE_LEVEL}
            backbone.freeze_unused(dims)
        return Classifier(
            backbone, pyramid_classification_head(dims, num_classes, activation, dropout)
        )
    return Segmenter(backbone, PyramidSegmentationHead(dims, num_classes, *head, activation))


# ---- the authors' released detectors: the Model Garden's arithmetic


def _released(
    spec: ReleasedSpec, task: str, num_classes: int, *, stochastic_depth: float = 0.2
) -> TaskModel:
    """A released detector with fresh weights; `effspinenet convert` fills it."""
    backbone: PyramidBackbone
    if isinstance(spec.backbone, SpineNetSpec):
        backbone = SpineNet(spec.backbone, spec.activation, stochastic_depth, released=True)
    else:
        backbone = MobileSpineNet(spec.backbone, spec.activation, stochastic_depth)
    return RetinaNet(
        backbone,
        num_classes,
        spec.head_dim,
        RELEASED_HEAD_LAYERS,
        spec.activation,
        settings=DetectionSettings(candidates_by_class=True),
        separable=spec.separable,
        background=True,
    )


for _spec in RELEASED.values():
    if isinstance(_spec.backbone, BackboneSpec):
        model(_spec.name, {"detection": _spec.image_size}, ())(partial(_released, _spec))


# ---- Table 3: one-stage detectors

# EfficientNet of each scale; EfficientDet's and EfficientNet-FPN's sizes and head dimensions are
# Eff-SpineNet's of this scale (Table 2; EfficientDet's paper, Table 1).
_EFFICIENTNETS = {"D0": "efficientnet_b0", "D1": "efficientnet_b1", "D2": "efficientnet_b2"}
_BIFPN_REPEATS = {"D0": 3, "D1": 4, "D2": 5}  # EfficientDet's paper, Table 1
# EfficientDet's code: anchors of 4 strides. The ratios are RetinaNet's, rounded there to 1.4 x 0.7.
_EFFICIENTDET_ANCHOR_SIZE = 4.0
# RetinaNet's dense heads; 640 pixels by SpineNet's paper and the released configs.
_DENSE_SIZE, _DENSE_DIM = 640, 256
_dense_retinanet = partial(
    RetinaNet, head_dim=_DENSE_DIM, head_layers=4, separable=False, biased=False
)
_SWISH = "swish"  # section 5.1.1: all models of Table 3


def _efficientnet_fpn(
    scale: Scale,
    task: str,
    num_classes: int,
    *,
    stochastic_depth: float = 0.2,
    anchor_size: float = ANCHOR_SIZE,
) -> TaskModel:
    """FPN with separable convolutions on EfficientNet, under the authors' heads."""
    features = TimmFeatures(_EFFICIENTNETS[scale.id], stochastic_depth=stochastic_depth)
    pyramid = FeaturePyramid(features, scale.head_dim, _SWISH, separable=True)
    head = (scale.head_dim, scale.head_layers, _SWISH, anchor_size)
    return RetinaNet(pyramid, num_classes, *head, project=False)


def _efficientdet(
    scale: Scale,
    task: str,
    num_classes: int,
    *,
    stochastic_depth: float = 0.2,
    anchor_size: float = _EFFICIENTDET_ANCHOR_SIZE,
) -> TaskModel:
    """EfficientDet as its paper and code have it, biases and anchors included.

    This library's are two things: hard suppression in place of the soft one, and the initial
    weights of the heads.
    """
    features = TimmFeatures(_EFFICIENTNETS[scale.id], stochastic_depth=stochastic_depth)
    pyramid = BiFPN(features, scale.head_dim, _BIFPN_REPEATS[scale.id], _SWISH)
    head = (scale.head_dim, scale.head_layers, _SWISH, anchor_size)
    return RetinaNet(pyramid, num_classes, *head, project=False)


for _id, _name in _EFFICIENTNETS.items():
    _sizes = {"detection": SCALES[_id].input_size}
    model(f"{_name}_fpn", _sizes, ("table-03",))(partial(_efficientnet_fpn, SCALES[_id]))
    model(f"efficientdet_{_id.lower()}", _sizes, ("table-03",))(partial(_efficientdet, SCALES[_id]))


@model("resnet50_fpn", {"detection": _DENSE_SIZE}, ("table-03", "table-04"))
def _resnet50_fpn(
    task: str, num_classes: int, *, stochastic_depth: float = 0.2, activation: str = _SWISH
) -> TaskModel:
    """RetinaNet's FPN, P6 from P5 (Model Garden); `relu` in the first columns of Table 4."""
    features = TimmFeatures("resnet50", activation=activation, stochastic_depth=stochastic_depth)
    pyramid = FeaturePyramid(features, _DENSE_DIM, activation, separable=False)
    return _dense_retinanet(pyramid, num_classes, activation=activation, project=False)


@model("spinenet_49", {"detection": _DENSE_SIZE}, ("table-03",))
def _spinenet_49(
    task: str, num_classes: int, *, stochastic_depth: float = 0.2, released: bool = False
) -> TaskModel:
    """SpineNet-49; `released` for the Model Garden's arithmetic, into which its weights fit."""
    if released:
        return _released(
            RELEASED["spinenet_49"], task, num_classes, stochastic_depth=stochastic_depth
        )
    backbone = SpineNet(SPINENET_49, _SWISH, stochastic_depth)
    return _dense_retinanet(backbone, num_classes)


# ---- Table 7: mobile detectors, all at 320x320
#
# The SSDLite detectors predict 91 columns, 90 classes and the background, as the released ones.
# The others predict 90 independent classes and no background; the released ones have a 91st
# column, which costs under 0.3 %.

_MOBILE = ({"detection": 320}, ("table-07",))  # every comparator's own paper
_MOBILENETV2 = "mobilenetv2_100"
_RELU = "relu"  # of RetinaNet's branches and of FPN's P7
_LITE_LAYERS = 4  # RetinaNet's paper; released configs of FPNLite and MnasFPN
_FPN_DIM = 128  # released config of FPNLite at 320x320
_NAS_FPN_DIM = 64  # NAS-FPN's paper has 48 or 64 channels in its mobile models
_NAS_FPN_REPEATS = 15  # fitted to both printed costs
# Table 7 has the AP of the model that MnasFPN's paper scales by this factor.
_MNAS_FPN_WIDTH = 0.7
_MNAS_HEAD_DIM = 48  # the released config's 64, scaled by the same factor and rounded


_lite_retinanet = partial(RetinaNet, activation=_RELU, project=False, biased=False)


@model(
    "mobilenetv2_fpn",
    *_MOBILE,
    note=(
        "The row's channels and anchors are not known. 128 channels and one tower of 4 layers, as "
        "in FPNLite's released config, with 9 anchors: 1.01 B, 2.15 M (-2.5 %). That config's 6 "
        "anchors and C5 of 1280 channels: 0.99 B, 2.64 M (+20 %)."
    ),
)
def _mobilenetv2_fpn(
    task: str,
    num_classes: int,
    *,
    stochastic_depth: float = 0.0,
    anchor_size: float = ANCHOR_SIZE,
) -> TaskModel:
    """FPNLite on a MobileNetV2: separable convolutions, one tower for both branches."""
    extractor = TimmFeatures(_MOBILENETV2, stochastic_depth=stochastic_depth)
    pyramid = FeaturePyramid(extractor, _FPN_DIM, _RELU, separable=True)
    tower = SharedTower(pyramid, _FPN_DIM, _LITE_LAYERS)
    return _lite_retinanet(tower, num_classes, _FPN_DIM, 0, anchor_size=anchor_size)


@model(
    "mobilenetv2_nas_fpn",
    *_MOBILE,
    note=(
        "The wiring of NAS-FPNLite is not known. Here NAS-FPN's 7 published cells with separable "
        "convolutions and 64 channels; 15 repeats and a dense 3x3 convolution for P6 were fitted "
        "to both costs: 0.99 B, 2.63 M. With 3 repeats 0.82 B (-16 %), 2.23 M (-15 %); with 7 "
        "0.88 B (-11 %), 2.36 M (-10 %). A cost fit: it takes part in no comparison of accuracy."
    ),
)
def _mobilenetv2_nas_fpn(
    task: str,
    num_classes: int,
    *,
    stochastic_depth: float = 0.0,
    repeats: int = _NAS_FPN_REPEATS,
    anchor_size: float = ANCHOR_SIZE,
) -> TaskModel:
    """NAS-FPNLite on a MobileNetV2; `repeats` of its 7 cells. So deep a pyramid learns slowly."""
    extractor = TimmFeatures(_MOBILENETV2, stochastic_depth=stochastic_depth)
    pyramid = NASFPN(extractor, _NAS_FPN_DIM, repeats)
    return _lite_retinanet(
        pyramid, num_classes, _NAS_FPN_DIM, _LITE_LAYERS, anchor_size=anchor_size
    )


@model(
    "mobilenetv2_mnasfpn",
    *_MOBILE,
    note=(
        "The row's AP is that of MnasFPN's paper at 0.7 of its width; the channels of the "
        "predictor at this width are not known. 48 of them: 0.52 B (-1.0 %), 1.24 M (-4.1 %); 64: "
        "0.57 B (+7 %), 1.26 M. At full width 0.92 B, 2.46 M; the released config states 0.92 B, "
        "2.5 M."
    ),
)
def _mobilenetv2_mnasfpn(
    task: str, num_classes: int, *, anchor_size: float = ANCHOR_SIZE
) -> TaskModel:
    """MnasFPN on a MobileNetV2, both at 0.7 of their width."""
    tower = SharedTower(MnasFPN(_MNAS_FPN_WIDTH), _MNAS_HEAD_DIM, _LITE_LAYERS)
    return _lite_retinanet(tower, num_classes, _MNAS_HEAD_DIM, 0, anchor_size=anchor_size)


@model("mobilenetv3_small_ssdlite", *_MOBILE)
def _mobilenetv3_small_ssdlite(task: str, num_classes: int) -> TaskModel:
    """SSDLite on a MobileNetV3-Small of reduced tail."""
    return SSDLite(mobilenetv3_features("small"), num_classes)


@model("mobilenetv3_large_ssdlite", *_MOBILE)
def _mobilenetv3_large_ssdlite(task: str, num_classes: int) -> TaskModel:
    """SSDLite on a MobileNetV3-Large of reduced tail."""
    return SSDLite(mobilenetv3_features("large"), num_classes)


@model("mnasnet_a1_ssdlite", *_MOBILE)
def _mnasnet_a1_ssdlite(task: str, num_classes: int, *, stochastic_depth: float = 0.0) -> TaskModel:
    """SSDLite on a MnasNet-A1."""
    return SSDLite(mnasnet_a1_features(stochastic_depth), num_classes)


# ---- Tables 10 and 11: EfficientNet, and DeepLabv3 on two backbones

# Image side (Table 10), and dropout before the classifier (EfficientNet's code).
_CLASSIFIERS = {
    "efficientnet_b0": (224, 0.2),
    "efficientnet_b1": (240, 0.2),
    "efficientnet_b2": (260, 0.3),
}
# Side of the crops that DeepLabv3's and MobileNetV2's papers train and measure on; Table 11, which
# carries their costs over, names a size for Eff-SpineNet alone.
_DEEPLAB = ({"segmentation": 513}, ("table-11",))
DEEPLAB_DIM = 256  # channels of the pooling's branches (DeepLabv3's paper, section 3.3)
# Dilation rates of the pooling's three 3x3 branches by output stride (DeepLabv3's paper).
ATROUS_RATES: dict[int, tuple[int, ...]] = {16: (6, 12, 18), 8: (12, 24, 36)}


def _efficientnet(
    name: str, task: str, num_classes: int, *, stochastic_depth: float = 0.0
) -> TaskModel:
    network: Any = timm.create_model(
        name,
        num_classes=num_classes,
        drop_rate=_CLASSIFIERS[name][1],
        drop_path_rate=stochastic_depth,
        bn_eps=NORM_EPSILON,
        bn_momentum=NORM_MOMENTUM,
    )
    head, network.classifier = network.classifier, nn.Identity()
    return Classifier(network, head)


for _name, (_side, _) in _CLASSIFIERS.items():
    model(_name, {"classification": _side}, ("table-10",))(partial(_efficientnet, _name))


class DeepLabHead(nn.Module):
    """Atrous spatial pyramid pooling and a 1x1 prediction layer (DeepLabv3).

    torchvision's own head has a 3x3 convolution between them, which the printed parameters of
    MobileNetV2's paper leave no room for.

    Args:
        inputs: channels of the coarsest features.
        num_classes: classes, the background among them.
        rates: dilation of the 3x3 branches; without any, a 1x1 and the image pooling remain.
    """

    def __init__(self, inputs: int, num_classes: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.pooling = ASPP(inputs, rates, DEEPLAB_DIM)
        self.predict = nn.Conv2d(DEEPLAB_DIM, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Map features, the coarsest last [N, inputs, H, W], to logits [N, num_classes, H, W]."""
        logits: Tensor = self.predict(self.pooling(features[-1]))
        return logits


@model(
    "mobilenetv2_deeplabv3",
    *_DEEPLAB,
    note=(
        "At 513 pixels 2.74 B, printed 2.8 B; at 512 pixels 2.60 B (-7 %). MobileNetV2's paper "
        "prints 2.75 B and 2.11 M parameters for this network, without 3x3 pooling branches and "
        "without the layer from 320 to 1280 channels; here 2.11 M."
    ),
)
def _mobilenetv2_deeplabv3(task: str, num_classes: int, *, output_stride: int = 16) -> TaskModel:
    """MobileNetV2's paper, Table 7: no 3x3 pooling branches, on the features of 320 channels."""
    return _deeplab("mobilenetv2_100", num_classes, output_stride, ())


@model(
    "resnet101_deeplabv3",
    *_DEEPLAB,
    note=(
        "At 513 pixels 78.2 B at output stride 16 and 253.3 B at 8; printed are 81.0 B and 8. "
        "MobileNetV2's paper prints 81.0 B, 80.49 mIOU and 58.16 M parameters for stride 16, so "
        "the 8 is taken for an error and 16 is the default. The stem of three 3x3 convolutions is "
        "recovered from the 58.16 M; with a 7x7 one it is 71.1 B (-12 %) and 58.04 M."
    ),
)
def _resnet101_deeplabv3(task: str, num_classes: int, *, output_stride: int = 16) -> TaskModel:
    """DeepLabv3's paper, without its multi-grid, which costs nothing."""
    return _deeplab("resnet101s", num_classes, output_stride, ATROUS_RATES[output_stride])


def _deeplab(name: str, num_classes: int, stride: int, rates: tuple[int, ...]) -> TaskModel:
    backbone: Any = timm.create_model(
        name, features_only=True, output_stride=stride, out_indices=(-1,)
    )
    inputs = backbone.feature_info.channels()[-1]
    return Segmenter(backbone, DeepLabHead(inputs, num_classes, rates))
