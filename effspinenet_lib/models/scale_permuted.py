"""The scale-permuted backbone, built from a specification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models.layers import (
    ACTIVATIONS,
    MBConv,
    PyramidBackbone,
    Resample,
    SumFusion,
    WeightedFusion,
    conv_norm,
    initialise,
    make_activation,
)
from effspinenet_lib.models.specs import (
    MINIMUM_IMAGE_SIZE,
    STEM_BLOCKS,
    BackboneSpec,
    BlockSpec,
    Wiring,
    level_side,
)

IMAGE_CHANNELS = 3
STEM_KERNEL = 3
STEM_LEVEL = 1
RELEASED_BLOCKS = 16  # behind the stem, in the released code's lists of blocks


@dataclass(frozen=True)
class BackboneOptions:
    """What Tables 4 and 9 switch.

    Attributes:
        space_to_depth: resample down by space-to-depth (Figure 2) or by depthwise convolutions;
            None is what fits the task's cost columns: true, but false for classification.
        weighted_fusion: Equation 1, or a plain sum.
        squeeze_excitation: in every MBConv, or in none.
        activation: `swish` or `relu`.
        stochastic_depth: drop rate of the last block; it grows linearly with depth. 0.2 is the
            released config's; the paper names the method only.
    """

    space_to_depth: bool | None = None
    weighted_fusion: bool = True
    squeeze_excitation: bool = True
    activation: str = "swish"
    stochastic_depth: float = 0.2

    def __post_init__(self) -> None:
        """Refuse values that would build another network than was meant.

        Raises:
            UserError: a switch is neither true nor false, or a drop rate is out of range.
            UnknownName: the activation is not known.
        """
        for name in ("space_to_depth", "weighted_fusion", "squeeze_excitation"):
            value = getattr(self, name)
            unset = name == "space_to_depth" and value is None
            if not unset and not isinstance(value, bool):
                raise UserError(f"model option {name} is {value!r}; it must be true or false")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise UnknownName("activation", str(self.activation), ACTIVATIONS)
        rate = self.stochastic_depth
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise UserError(
                f"model option stochastic_depth is {rate!r}; it must be a number from 0 to below 1"
            )


class ScalePermutedNetwork(PyramidBackbone):
    """Stem, blocks wired as a specification says, outputs P3 to P7: what SpineNets share.

    Args:
        spec: levels, wiring and feature dimensions.
        stem: what stands before block 1.
        groups: for each block its layers; those of the stem blocks change level and dimension.
        fusions: for each block behind the stem, what makes one input of its inputs.
    """

    def __init__(
        self,
        spec: Wiring,
        stem: nn.Module,
        groups: Iterable[nn.Module],
        fusions: Iterable[BlockFusion],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.feature_dims = {level: block.feature_dim for level, block in spec.outputs.items()}
        self.stem = stem
        self.groups = nn.ModuleList(groups)
        fused = (str(block.index) for block in spec.blocks[STEM_BLOCKS:])
        self.fusions = nn.ModuleDict(dict(zip(fused, fusions, strict=True)))
        initialise(self)

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
        features = [self.stem(images)]
        for block, group in zip(self.spec.blocks, self.groups, strict=True):
            if block.index <= STEM_BLOCKS:
                features.append(group(features[block.index - 1]))
                continue
            size = (level_side(height, block.level), level_side(width, block.level))
            fused = self.fusions[str(block.index)](
                {index: features[index] for index in all_inputs(self.spec, block)}, size
            )
            features.append(group(fused))
        return {level: features[block.index] for level, block in self.spec.outputs.items()}


class ScalePermutedBackbone(ScalePermutedNetwork):
    """The network of MBConv blocks: 18 groups wired as Table 1's topology.

    Args:
        spec: levels, wiring, feature dimensions and repeats.
        options: the switches of the ablation tables.
    """

    def __init__(self, spec: BackboneSpec, options: BackboneOptions | None = None) -> None:
        options = options or BackboneOptions()
        super().__init__(
            spec,
            conv_norm(
                IMAGE_CHANNELS, spec.stem_dim, STEM_KERNEL, stride=2, activation=options.activation
            ),
            [_mbconv_group(spec, block, options) for block in spec.blocks],
            [_mbconv_fusion(spec, block, options) for block in spec.blocks[STEM_BLOCKS:]],
        )
        self.options = options


def entry(spec: BackboneSpec, block: BlockSpec) -> tuple[int, int]:
    """Input channels and stride of a block; only the stem blocks change level or dimension."""
    if block.index > STEM_BLOCKS:
        return block.feature_dim, 1
    before = spec.blocks[block.index - 2] if block.index > 1 else None
    stride = 2 ** (block.level - (before.level if before else STEM_LEVEL))
    return before.feature_dim if before else spec.stem_dim, stride


def _mbconv_group(spec: BackboneSpec, block: BlockSpec, options: BackboneOptions) -> nn.Sequential:
    """Make the MBConv layers of a block."""
    inputs, stride = entry(spec, block)
    return nn.Sequential(
        *(
            MBConv(
                inputs if repeat == 0 else block.feature_dim,
                block.feature_dim,
                block.kernel,
                stride if repeat == 0 else 1,
                spec.expansion_ratio,
                spec.squeeze_ratio if options.squeeze_excitation else None,
                options.activation,
                drop_rate(spec, block, options.stochastic_depth),
            )
            for repeat in range(block.repeats)
        )
    )


def _mbconv_fusion(spec: BackboneSpec, block: BlockSpec, options: BackboneOptions) -> BlockFusion:
    sources = [spec.blocks[index - 1] for index in all_inputs(spec, block)]
    resample = {
        source.index: Resample(
            source.feature_dim,
            source.level,
            block.feature_dim,
            block.level,
            options.space_to_depth is not False,
        )
        for source in sources
    }
    return BlockFusion(resample, options.weighted_fusion, options.activation)


class BlockFusion(nn.Module):
    """Resample a block's inputs to its level and dimension, fuse them, activate.

    Args:
        resample: for the number of each input block a module that maps its features and the
            target's (height, width) to what is fused.
        weighted: by Equation 1, or a plain sum.
        activation: `swish` or `relu`.
    """

    def __init__(self, resample: Mapping[int, nn.Module], weighted: bool, activation: str) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({str(index): layer for index, layer in resample.items()})
        self.fuse = WeightedFusion(len(resample)) if weighted else SumFusion()
        self.activation = make_activation(activation)

    def forward(self, features: dict[int, Tensor], size: tuple[int, int]) -> Tensor:
        """Fuse input features, keyed by block number, into [N, feature_dim, *size]."""
        return self.activation(
            self.fuse([self.resample[str(index)](f, size) for index, f in features.items()])
        )


def all_inputs(spec: Wiring, block: BlockSpec) -> tuple[int, ...]:
    """Numbers of the blocks that a block fuses: its inputs, then the idle blocks it takes up."""
    return block.inputs + spec.extra_inputs.get(block.index, ())


def drop_rate(spec: Wiring, block: BlockSpec, last: float) -> float:
    """Stochastic depth of a block: linear in its number, `last` at the last block."""
    return last * block.index / len(spec.blocks)


def released_drop_rate(block: BlockSpec, last: float) -> float:
    """Stochastic depth in the released code: none in the stem blocks, `last` at the 16th behind.

    SpineNet-49 has 15 blocks behind its stem here. The released code counts one more, whose
    output at level 2 nothing uses.
    """
    return last * max(0, block.index - STEM_BLOCKS) / RELEASED_BLOCKS


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
