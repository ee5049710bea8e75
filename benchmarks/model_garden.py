"""The released detectors as the TensorFlow Model Garden builds and runs them.

Needs tf-models-official; `make parity` installs it into an environment of its own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import torchvision  # noqa: F401 - loaded after TensorFlow it crashes the process

# isort: split
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from official.core import exp_factory
from official.modeling import optimization
from official.vision.configs import retinanet as configs
from official.vision.ops import anchor, preprocess_ops
from official.vision.tasks.retinanet import RetinaNetTask

from benchmarks.seeded import Arrays, seeded_state
from effspinenet_lib.models.anchors import BOX_CODE
from effspinenet_lib.models.released import BOX_ORDER, create_released, match_variables
from effspinenet_lib.models.released_specs import ReleasedSpec
from effspinenet_lib.models.specs import OUTPUT_LEVELS

# Lists that Keras keeps in a layer beside the attributes that a checkpoint names.
BESIDE = {
    "_metrics",
    "_trainable_weights",
    "_non_trainable_weights",
    "_inbound_nodes_value",
    "_outbound_nodes_value",
    "_inbound_nodes",
    "_outbound_nodes",
}
LEVELS = tuple(map(str, OUTPUT_LEVELS))
# From this library's order of axes to TensorFlow's; see `models.released`.
TO_KERNEL, TO_DEPTHWISE = (2, 3, 1, 0), (2, 3, 0, 1)


def build_task(spec: ReleasedSpec, image_size: int) -> RetinaNetTask:
    """The experiment's task with the settings of the model's published configuration.

    Without stochastic depth, so that a training step can be compared, and without synchronised
    norms: one device has nothing to synchronise, and in a head they take the variance as the
    mean square less the squared mean, whose rounding moves SpineNet-49's box loss by 4e-5.
    """
    config: Any = exp_factory.get_exp_config(spec.experiment).task
    assert isinstance(config, configs.RetinaNetTask)
    model = config.model
    model.input_size = [image_size, image_size, 3]
    model.norm_activation.activation = spec.activation
    model.norm_activation.use_sync_bn = False
    model.head.num_filters = spec.head_dim
    backbone = model.backbone.get()
    backbone.model_id = spec.name.removeprefix("mobile_").removeprefix("spinenet_").upper()
    backbone.stochastic_depth_drop_rate = 0.0
    return RetinaNetTask(config)


class GardenModel:
    """A released detector in TensorFlow with seeded weights.

    Every tensor that `seeded` draws is put into the variable that the converter
    takes it from; a wrong match shows as outputs that differ.
    """

    def __init__(self, spec: ReleasedSpec, image_size: int, seed: int) -> None:
        self.image_size = image_size
        self.task = build_task(spec, image_size)
        self.model = self.task.build_model()
        self.model(tf.zeros([1, image_size, image_size, 3]), training=True)  # makes the head
        model = create_released(spec.name)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        drawn = seeded_state(shapes, seed)
        self.variables = self._variables()
        names = {path: variable.name.split(":")[0] for path, variable in self.variables.items()}
        for name, source in match_variables(model, names, "the Model Garden's model").items():
            value = drawn[name]
            if source.boxes:
                value = value.reshape(-1, BOX_CODE, *value.shape[1:])[:, np.argsort(BOX_ORDER)]
                value = value.reshape(-1, *value.shape[2:])
            if value.ndim > 1:
                depthwise = "depthwise_kernel" in source.path
                value = value.transpose(TO_DEPTHWISE if depthwise else TO_KERNEL)
            self.variables[source.path].assign(value)

    def _variables(self) -> dict[str, Any]:
        """Variables by the path that a checkpoint gives them."""
        found: dict[str, Any] = {}
        known = {id(variable) for variable in self.model.variables}

        def walk(path: str, thing: Any) -> None:
            if id(thing) in known:
                found[path] = thing
            elif isinstance(thing, (list, tuple)):
                for number, item in enumerate(thing):
                    walk(f"{path}/{number}", item)
            elif isinstance(thing, tf.Module):
                for name, item in vars(thing).items():
                    if not name.startswith("_self") and name not in BESIDE:
                        walk(f"{path}/{name}", item)

        weighted = [layer for layer in self.model.backbone.layers if layer.weights]
        for number, layer in enumerate(weighted):
            walk(f"backbone/layer_with_weights-{number}", layer)
        walk("head", self.model.head)
        if len(found) != len(known):
            raise RuntimeError(f"found {len(found)} of {len(known)} variables")
        return found

    def outputs(self, images: NDArray[np.float32]) -> Arrays:
        """Levels, head outputs and detections for images [N, 3, S, S], in this library's layout.

        `level_3` [N, C, H, W]; `class_3` [N, A, classes]; `box_3` [N, A, 4] as x, y, width,
        height; `boxes` [N, 100, 4] as x1 y1 x2 y2, `scores`, `labels` from 0 and `count`.
        """
        inputs = tf.constant(images.transpose(0, 2, 3, 1))
        shape = tf.constant([[self.image_size, self.image_size]] * len(images), tf.float32)
        features = self.model.backbone(inputs, training=False)
        result = self.model(inputs, image_shape=shape, training=False)
        arrays: Arrays = {}
        for level in LEVELS:
            arrays[f"level_{level}"] = features[level].numpy().transpose(0, 3, 1, 2)
            logits, codes = result["cls_outputs"][level], result["box_outputs"][level]
            classes = self.task.task_config.model.num_classes
            arrays[f"class_{level}"] = logits.numpy().reshape(len(images), -1, classes)
            by_anchor = codes.numpy().reshape(len(images), -1, BOX_CODE)
            arrays[f"box_{level}"] = by_anchor[..., BOX_ORDER]
        corners = result["detection_boxes"].numpy()
        arrays["boxes"] = corners[..., [1, 0, 3, 2]]
        arrays["scores"] = result["detection_scores"].numpy()
        arrays["labels"] = result["detection_classes"].numpy() - 1  # 0 is the background
        arrays["count"] = result["num_detections"].numpy()
        return arrays

    def losses(
        self,
        images: NDArray[np.float32],
        objects: list[tuple[NDArray[np.float32], NDArray[np.int64]]],
    ) -> dict[str, float]:
        """Losses of one training step: focal, and box with its weight.

        Args:
            images: [N, 3, S, S].
            objects: for each image boxes [M, 4] as x1 y1 x2 y2, and labels [M] from 0.
        """
        settings = self.task.task_config.model.anchor
        anchors = anchor.Anchor(
            min_level=3,
            max_level=7,
            num_scales=settings.num_scales,
            aspect_ratios=settings.aspect_ratios,
            anchor_size=settings.anchor_size,
            image_size=(self.image_size, self.image_size),
        ).multilevel_boxes
        columns: list[list[Any]] = [[], [], [], []]
        for boxes, classes in objects:
            labeled = anchor.AnchorLabeler(0.5, 0.5).label_anchors(
                anchors,
                tf.constant(boxes[:, [1, 0, 3, 2]]),
                tf.constant(classes[:, None] + 1, tf.int32),
            )
            for column, value in zip(columns, (*labeled[:2], *labeled[3:]), strict=True):
                column.append(value)
        classes_by_level, boxes_by_level = (
            {level: tf.stack([value[level] for value in column]) for level in LEVELS}
            for column in columns[:2]
        )
        targets = {
            "cls_targets": classes_by_level,
            "box_targets": boxes_by_level,
            "cls_weights": tf.stack(columns[2]),
            "box_weights": tf.stack(columns[3]),
        }
        outputs = self.model(tf.constant(images.transpose(0, 2, 3, 1)), training=True)
        _, focal, box, _ = self.task.build_losses(outputs, targets)
        weight = self.task.task_config.losses.box_loss_weight
        return {"classification": float(focal), "box": weight * float(box)}

    def save(self, folder: Path, step: int = 1, averages: bool = False) -> Path:
        """Write a checkpoint as the Model Garden's trainer does; with moving averages or not.

        With averages the variables themselves are zero, so that only a reader that takes the
        averages finds the seeded weights.
        """
        schedule = {
            "optimizer": {"type": "sgd", "sgd": {"momentum": 0.9}},
            "learning_rate": {"type": "constant", "constant": {"learning_rate": 0.1}},
        }
        if averages:
            schedule["ema"] = {"average_decay": 0.9998, "trainable_weights_only": False}
        config = optimization.OptimizationConfig(schedule)
        factory = optimization.OptimizerFactory(config)
        optimizer = factory.build_optimizer(factory.build_learning_rate())
        if averages:
            optimizer.shadow_copy(self.model)
            for variable in self.model.variables:
                optimizer.get_slot(variable, "average").assign(variable)
                variable.assign(tf.zeros_like(variable))
        checkpoint = tf.train.Checkpoint(
            global_step=tf.Variable(step, dtype=tf.int64),
            model=self.model,
            optimizer=optimizer,
            **self.model.checkpoint_items,
        )
        return Path(checkpoint.write(str(folder / f"ckpt-{step}")))


def preprocess(picture: NDArray[np.uint8], image_size: int) -> NDArray[np.float32]:
    """A picture uint8 [H, W, 3] as the Model Garden's evaluation feeds it: [3, S, S]."""
    image = preprocess_ops.normalize_image(tf.constant(picture))
    size = [image_size, image_size]
    fitted, _ = preprocess_ops.resize_and_crop_image(
        image, size, preprocess_ops.compute_padded_size(size, 2**7), 1.0, 1.0
    )
    return fitted.numpy().transpose(2, 0, 1)
