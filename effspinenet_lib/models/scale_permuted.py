"""Scale-permuted backbones: Eff-SpineNet, and the authors' Mobile SpineNet and SpineNet.

All three are a stem, blocks wired as a specification says, and the outputs P3 to P7. A block fuses
its resampled inputs (`BlockFusion`), then runs its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from timm.layers.create_act import get_act_layer
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from effspinenet_lib.errors import UserError
from effspinenet_lib.models.layers import (
    DEPTHWISE_KERNEL,
    MBConv,
    PyramidBackbone,
    Resample,
    SumFusion,
    WeightedFusion,
    conv_norm,
    initialise,
    make_activation,
    max_pool,
    set_norms,
    upsample,
)
from effspinenet_lib.models.specs import (
    MINIMUM_IMAGE_SIZE,
    BackboneSpec,
    BlockSpec,
    ResidualBlockSpec,
    SpineNetSpec,
    Wiring,
    level_side,
)

IMAGE_CHANNELS = 3
STEM_KERNEL = 3
RESNET_STEM_KERNEL = 7
STEM_LEVEL = 1
MOBILE_GATING = ("relu", "hard_sigmoid")  # Model Garden's squeeze-and-excitation
# The Model Garden counts 16 blocks behind the stem: one more than is used, at level 2.
MODEL_GARDEN_BLOCKS = 16


class BlockFusion(nn.Module):
    """Resample a block's inputs to its level and dimension, fuse them, activate.

    Args:
        resample: for the number of each input block a module that maps its features and the
            target's (height, width) to what is fused.
        idle: numbers of the idle blocks that are taken in as they are.
        weighted: by Equation 1, or a plain sum.
        activation: of the result.
    """

    def __init__(
        self,
        resample: Mapping[int, nn.Module],
        idle: tuple[int, ...],
        weighted: bool,
        activation: str,
    ) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({str(index): layer for index, layer in resample.items()})
        self.idle = idle
        self.fuse = WeightedFusion(len(resample) + len(idle)) if weighted else SumFusion()
        self.activation = make_activation(activation)

    def forward(self, features: Mapping[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Fuse the inputs among `features`, by block number, into [N, feature_dim, *size]."""
        resampled = [layer(features[int(index)], size) for index, layer in self.resample.items()]
        idle = [features[index] for index in self.idle]
        return self.activation(self.fuse([*resampled, *idle]))


class ScalePermutedNetwork(PyramidBackbone):
    """Stem, blocks wired as a specification says, outputs P3 to P7.

    A block that no other takes in is computed and counted, as in the authors' code, but not
    trained: it has no gradient.

    Args:
        spec: levels, wiring and feature dimensions.
        group: makes the layers of a block; those of the stem blocks change level and dimension.
        resample: makes what brings the features of a block to those of another.
        stem: makes what stands before block 1.
        weighted: fuse by Equation 1, or by a plain sum.
        activation: behind each fusion.
    """

    def __init__(
        self,
        spec: Wiring,
        group: Callable[[Any], nn.Module],
        resample: Callable[[Any, Any], nn.Module],
        stem: Callable[[], nn.Module],
        weighted: bool,
        activation: str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.feature_dims = {level: block.feature_dim for level, block in spec.outputs.items()}
        groups = [group(block) for block in spec.blocks]
        fusions = {}
        for block in spec.blocks[spec.stem_blocks :]:
            inputs = {index: resample(spec.blocks[index - 1], block) for index in block.inputs}
            idle = spec.extra_inputs.get(block.index, ())
            fusions[str(block.index)] = BlockFusion(inputs, idle, weighted, activation)
        self.stem = stem()
        self.groups = nn.ModuleList(groups)
        self.fusions = nn.ModuleDict(fusions)
        initialise(self)
        self.freeze_unused(self.feature_dims)

    def freeze_unused(self, levels: Collection[int]) -> None:
        """Let blocks that the outputs of these levels do not depend on have no gradient."""
        inputs: dict[int, set[int]] = {0: set()}  # of the stem
        inputs.update({block.index: {*block.inputs} for block in self.spec.blocks})
        for index, idle in self.spec.extra_inputs.items():
            inputs[index].update(idle)
        needed, ahead = set(), {self.spec.outputs[level].index for level in levels}
        while ahead:
            needed |= ahead
            ahead = set().union(*(inputs[index] for index in ahead)) - needed
        for index in inputs.keys() - needed:
            self.groups[index - 1].requires_grad_(False)
            self.fusions[str(index)].requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Compute the feature pyramid.

        Args:
            images: [N, 3, H, W], normalised; any H and W of at least 64.

        Returns:
            Level to features [N, feature_dims[level], ceil(H / 2**level), ceil(W / 2**level)].

        Raises:
            UserError: a side is under 64 pixels.
        """
        height, width = images.shape[-2:]
        check_image_size(height, width)
        features = {0: self.stem(images)}
        for block, group in zip(self.spec.blocks, self.groups, strict=True):
            if block.index <= self.spec.stem_blocks:
                fused = features[block.index - 1]
            else:
                size = (level_side(height, block.level), level_side(width, block.level))
                fused = self.fusions[str(block.index)](features, size)
            features[block.index] = group(fused)
        return {level: features[block.index] for level, block in self.spec.outputs.items()}


class EffSpineNet(ScalePermutedNetwork):
    """The authors' network of MBConv blocks, with Equation 1.

    Args:
        spec: levels, wiring, feature dimensions and repeats.
        space_to_depth: resample down by space-to-depth (Figure 2), or by strided depthwise
            convolutions alone (Table 9, and classification).
        weighted_fusion: Equation 1, or a plain sum (Table 9).
        squeeze_excitation: in every MBConv, or in none (Table 4).
        activation: `swish`, or `relu` (Table 4).
        stochastic_depth: drop rate of the last block; it grows linearly over the blocks behind the
            stem, which has none. The paper names the method, the authors' configs have 0.2.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        space_to_depth: bool = True,
        weighted_fusion: bool = True,
        squeeze_excitation: bool = True,
        activation: str = "swish",
        stochastic_depth: float = 0.2,
    ) -> None:
        squeeze = spec.squeeze_ratio if squeeze_excitation else None
        behind = len(spec.blocks) - spec.stem_blocks

        def group(block: BlockSpec) -> nn.Module:
            inputs, stride = _entry(spec, block)
            rate = _drop_rate(spec, block, stochastic_depth, behind)
            entries = [(inputs, stride)] + [(block.feature_dim, 1)] * (block.repeats - 1)
            return nn.Sequential(
                *(
                    MBConv(
                        inputs,
                        block.feature_dim,
                        block.kernel,
                        stride,
                        spec.expansion_ratio,
                        squeeze,
                        activation,
                        rate,
                    )
                    for inputs, stride in entries
                )
            )

        def resample(source: BlockSpec, block: BlockSpec) -> nn.Module:
            return Resample(*_ends(source, block), space_to_depth, activation)

        def stem() -> nn.Module:
            return conv_norm(IMAGE_CHANNELS, spec.stem_dim, STEM_KERNEL, 2, activation=activation)

        super().__init__(spec, group, resample, stem, weighted_fusion, activation)


class MobileSpineNet(ScalePermutedNetwork):
    """Mobile SpineNet as the Model Garden has it: a relative of the paper's network.

    Block 3 is fused, resampling is plain, inputs are summed, paddings are TensorFlow's.

    Args:
        spec: levels, wiring and feature dimensions; one layer a block.
        activation: `hard_swish` or `swish`.
        stochastic_depth: drop rate of the last block; it grows linearly with depth.
    """

    def __init__(self, spec: BackboneSpec, activation: str, stochastic_depth: float) -> None:
        def group(block: BlockSpec) -> nn.Module:
            inputs, stride = _entry(spec, block)
            return MBConv(
                inputs,
                block.feature_dim,
                block.kernel,
                stride,
                spec.expansion_ratio,
                spec.squeeze_ratio,
                activation,
                _drop_rate(spec, block, stochastic_depth, MODEL_GARDEN_BLOCKS),
                MOBILE_GATING,
                same=True,
            )

        def resample(source: BlockSpec, block: BlockSpec) -> nn.Module:
            return Resample(*_ends(source, block), False, activation, same=True)

        def stem() -> nn.Module:
            return conv_norm(
                IMAGE_CHANNELS, spec.stem_dim, STEM_KERNEL, 2, activation=activation, same=True
            )

        super().__init__(spec, group, resample, stem, False, activation)


class SpineNet(ScalePermutedNetwork):
    """SpineNet (arXiv 1912.05027): ResNet's stem, residual and bottleneck blocks.

    Args:
        spec: levels, wiring, kinds and dimensions of the blocks.
        activation: `swish` (the Model Garden's config and section 5.1.1) or `relu`.
        stochastic_depth: drop rate of the last block; it grows linearly with depth.
        released: compute as the Model Garden does: TensorFlow's padding, its count of blocks.
    """

    def __init__(
        self,
        spec: SpineNetSpec,
        activation: str,
        stochastic_depth: float,
        released: bool = False,
    ) -> None:
        behind = MODEL_GARDEN_BLOCKS if released else len(spec.blocks) - spec.stem_blocks

        def group(block: ResidualBlockSpec) -> nn.Module:
            dim = block.feature_dim
            inputs = spec.stem_dim if block.index == 1 else dim
            rate = _drop_rate(spec, block, stochastic_depth, behind)
            make = Bottleneck if block.bottleneck else BasicBlock
            return make(
                inputs,
                block.filters,
                downsample=None if inputs == dim else conv_norm(inputs, dim),
                act_layer=get_act_layer(activation),
                drop_path=StochasticDepth(rate, mode="row"),
            )

        def resample(source: ResidualBlockSpec, block: ResidualBlockSpec) -> nn.Module:
            reduced = int(source.filters * spec.resample_alpha)
            return AlphaResample(*_ends(source, block), reduced, activation, released)

        def stem() -> nn.Module:
            conv = conv_norm(
                *(IMAGE_CHANNELS, spec.stem_dim, RESNET_STEM_KERNEL, 2),
                activation=activation,
                same=released,
            )
            return nn.Sequential(conv, max_pool(released))

        super().__init__(spec, group, resample, stem, False, activation)
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
            down.append(
                conv_norm(reduced, reduced, DEPTHWISE_KERNEL, 2, activation=activation, same=same)
            )
            down += [max_pool(same) for _ in range(output_level - input_level - 1)]
        self.down = nn.Sequential(*down)
        self.upsample = output_level < input_level
        self.expand = conv_norm(reduced, outputs)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map features [N, inputs, h, w] to [N, outputs, *size]; `size` is the target's."""
        features = self.down(self.reduce(features))
        if self.upsample:
            features = upsample(features, size)
        return self.expand(features)


def _ends(source: BlockSpec, block: BlockSpec) -> tuple[int, int, int, int]:
    """Input channels and level, output channels and level of a resampling."""
    return source.feature_dim, source.level, block.feature_dim, block.level


def _entry(spec: BackboneSpec, block: BlockSpec) -> tuple[int, int]:
    """Input channels and stride of a block; only the stem blocks change level or dimension."""
    if block.index > spec.stem_blocks:
        return block.feature_dim, 1
    if block.index == 1:
        return spec.stem_dim, 2 ** (block.level - STEM_LEVEL)
    before = spec.blocks[block.index - 2]
    return before.feature_dim, 2 ** (block.level - before.level)


def _drop_rate(spec: Wiring, block: BlockSpec, last: float, behind: int) -> float:
    """Stochastic depth of a block: none in the stem, then linear, `last` at the `behind`-th."""
    return last * max(0, block.index - spec.stem_blocks) / behind


def check_image_size(height: int, width: int) -> None:
    """Refuse an image too small for P7.

    Raises:
        UserError: a side is under 64 pixels.
    """
    if min(height, width) < MINIMUM_IMAGE_SIZE:
        raise UserError(
            f"image size {height}x{width} is too small: P7 has a stride of 128, so each side "
            f"must be at least {MINIMUM_IMAGE_SIZE} pixels"
        )
