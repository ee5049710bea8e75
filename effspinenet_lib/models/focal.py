"""The focal loss of a batch, with its gradient computed beside it.

For 8 images at 512x512 and 90 classes a tensor of the logits' shape holds 35 million numbers. As a
chain of torch's operations the loss keeps several for the gradient; here it keeps one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from effspinenet_lib.native import write_focal_slopes

# Numbers computed at once on a processor: a few tensors of 1 MB stay in its cache (our choice).
CACHED = 2**18


def focal_loss_sum(
    logits: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Sum of the focal loss of independent classes (RetinaNet), in float32.

    Args:
        logits: [N, A, C].
        classes: int64 [N, A], the class of each anchor; negative where it has none.
        kept: bool [N, A], the anchors that count; all that have a class do.
        alpha: weight of the classes that are there; the others have one minus it.
        gamma: power of what is missing to the right probability.

    Returns:
        A scalar. It can be differentiated once, by the logits.
    """
    summed: Tensor = _FocalLossSum.apply(logits, classes, kept, alpha, gamma)
    return summed


class _FocalLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float
    ) -> Tensor:
        width = logits.shape[-1]
        rows = logits.detach().reshape(-1, width).contiguous()
        slopes = torch.empty_like(rows)
        given = rows, classes.flatten(), kept.flatten(), alpha, gamma, slopes
        found = write_focal_slopes(*given)
        ctx.save_for_backward(slopes.view(logits.shape))
        return _in_pieces(*given) if found is None else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient, None, None, None, None


def _in_pieces(
    rows: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float, slopes: Tensor
) -> Tensor:
    """What `write_focal_slopes` does, by torch."""
    # a device with memory of its own takes all at once
    piece = max(1, CACHED // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    sums = [
        _write_slopes(slope, row.float(), wanted, counted, alpha, gamma)
        for slope, row, wanted, counted in zip(
            slopes.split(piece),
            rows.split(piece),
            classes[:, None].split(piece),
            kept[:, None].split(piece),
            strict=True,
        )
    ]
    return torch.stack(sums).sum()


def _write_slopes(
    slopes: Tensor, logits: Tensor, classes: Tensor, kept: Tensor, alpha: float, gamma: float
) -> Tensor:
    """The loss of [R, C] logits; writes its derivative by them to `slopes`."""
    loss, slope = _loss_of_absent(logits, kept * (1 - alpha), gamma)
    column = classes.clamp(min=0)
    found, rise = _loss_of_absent(-logits.gather(1, column), alpha, gamma)
    there = classes >= 0
    loss.scatter_(1, column, found.where(there, loss.gather(1, column)))
    slope.scatter_(1, column, (-rise).where(there, slope.gather(1, column)))
    slopes.copy_(slope)
    return loss.sum()


def _loss_of_absent(logits: Tensor, weight: Tensor | float, gamma: float) -> tuple[Tensor, Tensor]:
    """Loss of what should be absent, weight p^gamma -log(1 - p), and its derivative."""
    surprise = F.softplus(logits)  # -log(1 - p)
    log_p = logits - surprise
    slope = (-surprise).exp_().mul_(surprise).mul_(gamma).add_(log_p.exp())
    factor = log_p.mul_(gamma).exp_().mul_(weight)
    return surprise.mul_(factor), slope.mul_(factor)
