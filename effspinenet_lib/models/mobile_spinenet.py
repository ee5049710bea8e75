"""Mobile SpineNet: the mobile scale-permuted network that the authors released."""

from __future__ import annotations

from torch import nn

from effspinenet_lib.models.layers import MBConv, Resample, conv_norm
from effspinenet_lib.models.scale_permuted import (
    IMAGE_CHANNELS,
    STEM_KERNEL,
    BlockFusion,
    ScalePermutedNetwork,
    all_inputs,
    entry,
    released_drop_rate,
)
from effspinenet_lib.models.specs import STEM_BLOCKS, BackboneSpec, BlockSpec


class MobileSpineNet(ScalePermutedNetwork):
    """The blocks of a `ScalePermutedBackbone`, put together as in the released code.

    It differs in what Table 9 calls resampling and fusion (depthwise convolutions with an
    activation each, plain sums), in its padding, in squeeze-and-excitation and in the drop rates.

    Args:
        spec: levels, wiring and feature dimensions; one layer a block.
        activation: `hard_swish` or `swish`.
        stochastic_depth: drop rate of the last block; it grows linearly with depth.
    """

    def __init__(self, spec: BackboneSpec, activation: str, stochastic_depth: float) -> None:
        super().__init__(
            spec,
            conv_norm(
                IMAGE_CHANNELS, spec.stem_dim, STEM_KERNEL, 2, activation=activation, same=True
            ),
            [_block(spec, block, activation, stochastic_depth) for block in spec.blocks],
            [_fusion(spec, block, activation) for block in spec.blocks[STEM_BLOCKS:]],
        )


def _block(spec: BackboneSpec, block: BlockSpec, activation: str, last_rate: float) -> MBConv:
    inputs, stride = entry(spec, block)
    return MBConv(
        inputs,
        block.feature_dim,
        block.kernel,
        stride,
        spec.expansion_ratio,
        spec.squeeze_ratio,
        activation,
        released_drop_rate(block, last_rate),
        released=True,
    )


def _fusion(spec: BackboneSpec, block: BlockSpec, activation: str) -> BlockFusion:
    """Sum the resampled inputs and, as it is, an idle block of the same level and dimension."""
    resample: dict[int, nn.Module] = {}
    for index in all_inputs(spec, block):
        source = spec.blocks[index - 1]
        ends = (source.feature_dim, source.level, block.feature_dim, block.level)
        released = activation if index in block.inputs else None
        resample[index] = Resample(*ends, space_to_depth=False, released=released)
    return BlockFusion(resample, weighted=False, activation=activation)
