"""Training and inference against torchvision's RetinaNet, and what bfloat16 brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.models.detection import retinanet_resnet50_fpn

from benchmarks.pairs import Pair, time_pair
from effspinenet_lib import create_model
from effspinenet_lib.data import Batch
from effspinenet_lib.recipes import Recipe, get_recipe
from effspinenet_lib.training.loop import prepare_model, train_steps
from effspinenet_lib.training.optim import build_optimizer

INFERENCE_SIZE = 512
TRAINING_SIZE, TRAINING_BATCH, TRAINING_STEPS = 128, 16, 3


def inference() -> Pair:
    """Time one image through Eff-SpineNet-D0 and through torchvision's RetinaNet, both float32."""
    ours = create_model("eff_spinenet_d0").eval()
    peer = retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        min_size=INFERENCE_SIZE,
        max_size=INFERENCE_SIZE,
    ).eval()
    image = torch.rand(1, 3, INFERENCE_SIZE, INFERENCE_SIZE)
    return time_pair(
        f"inference, D0 against torchvision's RetinaNet, {INFERENCE_SIZE}x{INFERENCE_SIZE}",
        lambda: _infer(ours, image),
        lambda: _infer(peer, list(image)),
    )


def training() -> Pair:
    """Time training steps of Eff-SpineNet-M0 in bfloat16 and in float32."""
    recipe = get_recipe("proxy_detection").with_(batch_size=TRAINING_BATCH)
    return time_pair(
        f"training M0 at {TRAINING_SIZE}x{TRAINING_SIZE}, bfloat16 against float32",
        _trainer(recipe.with_(precision="bfloat16")),
        _trainer(recipe.with_(precision="float32", channels_last=False)),
    )


def _infer(model: nn.Module, images: Tensor | list[Tensor]) -> object:
    with torch.inference_mode():
        return model(images)


def _trainer(recipe: Recipe) -> Callable[[], object]:
    accelerator = Accelerator(cpu=True)
    model = prepare_model(create_model("eff_spinenet_m0", num_classes=8), recipe, accelerator)
    optimizer = build_optimizer(model, recipe)
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0], [70.0, 20.0, 100.0, 90.0]]),
        "labels": torch.tensor([1, 5]),
        "iscrowd": torch.zeros(2, dtype=torch.bool),
    }
    batch = Batch(
        torch.randn(TRAINING_BATCH, 3, TRAINING_SIZE, TRAINING_SIZE),
        [target] * TRAINING_BATCH,
        tuple(range(TRAINING_BATCH)),
        torch.ones(TRAINING_BATCH),
        [(TRAINING_SIZE, TRAINING_SIZE)] * TRAINING_BATCH,
    )
    batches = [batch] * TRAINING_STEPS
    return lambda: list(train_steps(model, optimizer, batches, recipe, accelerator, seed=0))


PAIRS = (inference, training)
