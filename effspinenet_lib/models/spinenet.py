"""SpineNet (arXiv 1912.05027): the scale-permuted network of residual and bottleneck blocks."""

from __future__ import annotations

from timm.layers.create_act import get_act_layer
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from effspinenet_lib.models.extractors import set_norms
from effspinenet_lib.models.layers import Resample, conv_norm, max_pool
from effspinenet_lib.models.scale_permuted import (
    IMAGE_CHANNELS,
    BlockFusion,
    ScalePermutedNetwork,
    all_inputs,
    drop_rate,
    released_drop_rate,
)
from effspinenet_lib.models.specs import STEM_BLOCKS, ResidualBlockSpec, SpineNetSpec

STEM_KERNEL = 7  # ResNet's stem
KERNEL = 3  # of the strided convolution


class SpineNet(ScalePermutedNetwork):
    """ResNet's stem, blocks wired by a specification, outputs P3 to P7 of the blocks' dimensions.

    Args:
        spec: levels, wiring, kinds and dimensions of the blocks.
        activation: `swish` (the released config's and section 5.1.1's) or `relu`.
        stochastic_depth: drop rate of the last block; it grows linearly with depth.
        released: compute as the released code does: padding as in TensorFlow, drop rates counted
            from the first block behind the stem.
    """

    def __init__(
        self,
        spec: SpineNetSpec,
        activation: str,
        stochastic_depth: float,
        released: bool = False,
    ) -> None:
        super().__init__(
            spec,
            nn.Sequential(
                conv_norm(
                    IMAGE_CHANNELS,
                    spec.stem_dim,
                    STEM_KERNEL,
                    stride=2,
                    activation=activation,
                    same=released,
                ),
                max_pool(released),
            ),
            [
                _residual_block(
                    block,
                    spec.stem_dim if block.index == 1 else block.feature_dim,
                    activation,
                    released_drop_rate(block, stochastic_depth)
                    if released
                    else drop_rate(spec, block, stochastic_depth),
                )
                for block in spec.blocks
            ],
            [_fusion(spec, block, activation, released) for block in spec.blocks[STEM_BLOCKS:]],
        )
        set_norms(self)


class AlphaResample(nn.Module):
    """SpineNet's resampling: reduce the channels, change the resolution, expand the channels.

    A 1x1 convolution to `reduced` channels; down by a 3x3 convolution of stride 2, then max
    pooling for what remains, or up by nearest-neighbour to the target's exact sides; a 1x1
    convolution to the target's channels. Norm and activation follow each convolution, but the
    last has no activation. Blocks of one level and dimension are resampled too (released code).

    Args:
        inputs: input channels.
        input_level: of the features.
        outputs: output channels.
        output_level: of the result.
        reduced: channels between the 1x1 convolutions.
        activation: `swish` or `relu`.
        same: pad as TensorFlow does, see `layers.conv_norm`.
    """

    def __init__(
        self,
        inputs: int,
        input_level: int,
        outputs: int,
        output_level: int,
        reduced: int,
        activation: str,
        same: bool = False,
    ) -> None:
        super().__init__()
        self.reduce = conv_norm(inputs, reduced, activation=activation)
        down: list[nn.Module] = []
        if output_level > input_level:
            down.append(conv_norm(reduced, reduced, KERNEL, 2, activation=activation, same=same))
            down += [max_pool(same) for _ in range(output_level - input_level - 1)]
        self.down = nn.Sequential(*down)
        self.upsample = output_level < input_level
        self.expand = conv_norm(reduced, outputs)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map features [N, inputs, h, w] to [N, outputs, *size]; `size` is the target's."""
        features = self.down(self.reduce(features))
        if self.upsample:
            features = F.interpolate(features, size=size, mode="nearest")
        return self.expand(features)


def _residual_block(
    block: ResidualBlockSpec, inputs: int, activation: str, rate: float
) -> nn.Module:
    """ResNet's block; where its input has another dimension, a 1x1 convolution is the shortcut."""
    make = Bottleneck if block.bottleneck else BasicBlock
    return make(
        inputs,
        block.filters,
        downsample=None if inputs == block.feature_dim else conv_norm(inputs, block.feature_dim),
        act_layer=get_act_layer(activation),
        drop_path=StochasticDepth(rate, mode="row"),
    )


def _fusion(
    spec: SpineNetSpec, block: ResidualBlockSpec, activation: str, same: bool
) -> BlockFusion:
    """Sum the resampled inputs and, as it is, an idle block of the same level and dimension."""
    resample: dict[int, nn.Module] = {}
    for index in all_inputs(spec, block):
        source = spec.blocks[index - 1]
        ends = (source.feature_dim, source.level, block.feature_dim, block.level)
        resample[index] = (
            AlphaResample(*ends, int(source.filters * spec.resample_alpha), activation, same)
            if index in block.inputs
            else Resample(*ends, space_to_depth=False)
        )
    return BlockFusion(resample, weighted=False, activation=activation)
