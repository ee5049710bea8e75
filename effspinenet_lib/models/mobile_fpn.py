"""The pyramids of Table 7's mobile detectors: NAS-FPN, MnasFPN, and SSDLite's six levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.layers.helpers import make_divisible
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import retrieve_out_channels
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.ops import Conv2dNormActivation

from effspinenet_lib.models.fpn import ExtractedPyramid, TimmFeatures, overlapping_pool
from effspinenet_lib.models.layers import (
    PyramidBackbone,
    SeparableConv,
    conv_norm,
    initialise,
    make_norm,
    set_norms,
    upsample,
)
from effspinenet_lib.models.specs import MINIMUM_IMAGE_SIZE, OUTPUT_LEVELS

SSD_LEVELS = (4, 5, 6, 7, 8, 9)
COARSEST_STAGE = 5
# MobileNet's rounding of scaled channels.
MOBILENET_MULTIPLE = 8
# Where the stages C3, C4 and C5 end in torchvision's MobileNetV2.
MOBILENETV2_ENDS = {3: 7, 4: 14, 5: 18}
# Number of the block of torchvision's MobileNetV3 that goes to stride 32.
MOBILENETV3_SPLITS = {"small": 9, "large": 13}


@dataclass(frozen=True)
class MergingCell:
    """One cell of NAS-FPN: two features merged, activation, separable convolution, norm.

    Attributes:
        level: of the output.
        attention: merge by global attention, or by a sum.
        inputs: two features by number: 0 to 4 are P3 to P7, and each cell's output is the next.
        unused: features of the same level that no cell consumes, which are added.
    """

    level: int
    attention: bool
    inputs: tuple[int, int]
    unused: tuple[int, ...] = ()


# The 7 cells that NAS-FPN's search found (released code). The last five are P3 to P7.
NAS_FPN_CELLS = (
    MergingCell(4, True, (1, 3)),
    MergingCell(4, False, (1, 5)),
    MergingCell(3, False, (0, 6)),
    MergingCell(4, False, (6, 7)),
    MergingCell(5, True, (7, 8), unused=(2,)),
    MergingCell(7, True, (6, 9), unused=(4,)),
    MergingCell(6, True, (9, 10)),
)


class NASFPN(ExtractedPyramid):
    """NAS-FPN with separable convolutions on P3 to P7, its 7 cells repeated.

    P3 to P5 start as 1x1 convolutions of C3 to C5, P6 as a dense 3x3 convolution of stride 2 of
    C5 (RetinaNet's; recovered from the parameters that are printed), P7 as P6 pooled (released
    code).

    Args:
        extractor: gives C3 to C5.
        dim: channels of all features.
        repeats: how often the 7 cells follow each other.
    """

    def __init__(self, extractor: TimmFeatures, dim: int, repeats: int) -> None:
        super().__init__(extractor, OUTPUT_LEVELS, dim)
        stages = extractor.feature_dims
        self.lateral = nn.ModuleDict({str(lv): conv_norm(dims, dim) for lv, dims in stages.items()})
        self.coarser = conv_norm(stages[COARSEST_STAGE], dim, kernel=3, stride=2)
        self.repeats = nn.ModuleList(NASFPNCells(dim) for _ in range(repeats))
        for layers in (self.lateral, self.coarser, self.repeats):
            initialise(layers)

    def pyramid(self, stages: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute P3 to P7 of C3 to C5."""
        pyramid = {level: self.lateral[str(level)](stage) for level, stage in stages.items()}
        pyramid[6] = self.coarser(stages[COARSEST_STAGE])
        pyramid[7] = F.max_pool2d(pyramid[6], 2, ceil_mode=True)
        for cells in self.repeats:
            pyramid = cells(pyramid)
        return pyramid


class NASFPNCells(nn.Module):
    """The 7 merging cells of NAS-FPN, from a pyramid to a pyramid of one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(inplace=True), SeparableConv(dim, dim, bias=False), make_norm(dim)
            )
            for _ in NAS_FPN_CELLS
        )

    def forward(self, pyramid: dict[int, Tensor]) -> dict[int, Tensor]:
        """Map features P3 to P7 [N, dim, H, W] by level to new ones of the same sides."""
        features = [pyramid[level] for level in OUTPUT_LEVELS]
        levels = list(OUTPUT_LEVELS)
        for spec, cell in zip(NAS_FPN_CELLS, self.cells, strict=True):
            size = pyramid[spec.level].shape[-2:]
            # The coarser of the two first: it is attention's gate.
            order = sorted(spec.inputs, key=levels.__getitem__, reverse=True)
            coarse, fine = (
                _resample(features[number], spec.level - levels[number], size) for number in order
            )
            merged = coarse + (
                fine * coarse.amax((2, 3), keepdim=True).sigmoid() if spec.attention else fine
            )
            for number in spec.unused:
                merged = merged + features[number]
            features.append(cell(merged))
            levels.append(spec.level)
        outputs = slice(-len(OUTPUT_LEVELS), None)
        return dict(sorted(zip(levels[outputs], features[outputs], strict=True)))


def _resample(features: Tensor, levels: int, size: torch.Size) -> Tensor:
    """Go up so many levels by max pooling, or down by nearest-neighbour upsampling to a size."""
    if levels < 0:
        return upsample(features, size)
    return F.max_pool2d(features, 2**levels, ceil_mode=True) if levels else features


@dataclass(frozen=True)
class ExpandingBlock:
    """One block of MnasFPN: an inverted bottleneck that merges two features.

    Attributes:
        inputs: two features by number: 0 to 3 are P3 to P6, and each block's output is the next.
        level: of the output.
        kernel: side of the depthwise kernel.
        expansion: channels in between.
    """

    inputs: tuple[int, int]
    level: int
    kernel: int
    expansion: int


# MnasFPN's cell (released code). The last four are P3 to P6.
MNAS_FPN_LEVELS = (3, 4, 5, 6)
MNAS_FPN_CELL = (
    ExpandingBlock((1, 2), 4, 3, 256),
    ExpandingBlock((0, 4), 3, 3, 128),
    ExpandingBlock((5, 4), 4, 3, 128),
    ExpandingBlock((4, 3), 5, 5, 128),
    ExpandingBlock((4, 3), 6, 3, 96),
)
MNAS_FPN_REPEATS = 4  # released code
MNAS_FPN_DIM = 48  # released config


class MobileNetV2Features(nn.Module):
    """The stages C3 to C5 of torchvision's MobileNetV2, which takes any width.

    Args:
        width: factor on all channels.

    Attributes:
        feature_dims: level to channels, finest first.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        layers = torchvision.models.mobilenet_v2(width_mult=width, norm_layer=make_norm).features
        starts = (0, *MOBILENETV2_ENDS.values())
        self.stages = nn.ModuleList(
            layers[start:end] for start, end in zip(starts, MOBILENETV2_ENDS.values(), strict=False)
        )
        self.feature_dims = {
            level: layers[end - 1].out_channels for level, end in MOBILENETV2_ENDS.items()
        }

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Map images [N, 3, H, W] to level: [N, feature_dims[level], H / 2**level, ...]."""
        stages: dict[int, Tensor] = {}
        features = images
        for level, stage in zip(self.feature_dims, self.stages, strict=True):
            stages[level] = features = stage(features)
        return stages


class MnasFPN(ExtractedPyramid):
    """MnasFPN on P3 to P6 of a MobileNetV2, both of one width.

    P6 is C5 pooled and brought to the dimension by a 1x1 convolution; the first cell takes C3
    to C5 as they are (released code).

    Args:
        width: factor on the channels of the backbone and of the cells.
    """

    def __init__(self, width: float) -> None:
        extractor = MobileNetV2Features(width)
        dim = make_divisible(MNAS_FPN_DIM * width, MOBILENET_MULTIPLE)
        super().__init__(extractor, MNAS_FPN_LEVELS, dim)
        stages = extractor.feature_dims
        self.coarser = conv_norm(stages[COARSEST_STAGE], dim)
        self.cells = nn.ModuleList(
            MnasFPNCell((*stages.values(), dim) if cell == 0 else (dim,) * 4, dim, width)
            for cell in range(MNAS_FPN_REPEATS)
        )
        initialise(self.coarser)
        initialise(self.cells)

    def pyramid(self, stages: dict[int, Tensor]) -> dict[int, Tensor]:
        """Compute P3 to P6 of C3 to C5."""
        pyramid = {**stages, 6: self.coarser(overlapping_pool(stages[COARSEST_STAGE], 1))}
        for cell in self.cells:
            pyramid = cell(pyramid)
        return pyramid


class MnasFPNCell(nn.Module):
    """Five inverted bottlenecks; a cell's input is added to its output of the same shape.

    An input is expanded by a 1x1 convolution before it is upsampled, or after it is pooled,
    whichever is cheaper. Nothing is activated but the expanded features (MnasFPN's paper).

    Args:
        inputs: channels of P3 to P6.
        dim: channels of the outputs.
        width: factor on the blocks' expansions.
    """

    def __init__(self, inputs: Sequence[int], dim: int, width: float) -> None:
        super().__init__()
        dims = [*inputs, *(dim for _ in MNAS_FPN_CELL)]
        self.expand, self.project = nn.ModuleList(), nn.ModuleList()  # two and one a block
        for block in MNAS_FPN_CELL:
            wide, kernel = make_divisible(block.expansion * width, MOBILENET_MULTIPLE), block.kernel
            self.expand.extend(conv_norm(dims[number], wide) for number in block.inputs)
            depthwise = nn.Conv2d(wide, wide, kernel, 1, kernel // 2, groups=wide, bias=False)
            self.project.append(
                nn.Sequential(nn.ReLU6(inplace=True), depthwise, conv_norm(wide, dim))
            )

    def forward(self, pyramid: dict[int, Tensor]) -> dict[int, Tensor]:
        """Map features P3 to P6 by level to [N, dim, H, W] of the same sides."""
        features = [pyramid[level] for level in MNAS_FPN_LEVELS]
        levels = list(MNAS_FPN_LEVELS)
        expansions = iter(self.expand)
        for block, project in zip(MNAS_FPN_CELL, self.project, strict=True):
            size = pyramid[block.level].shape[-2:]
            first, second = (
                _expand(next(expansions), features[number], block.level - levels[number], size)
                for number in block.inputs
            )
            features.append(project(first + second))
            levels.append(block.level)
        outputs = dict(zip(MNAS_FPN_LEVELS, features[-len(MNAS_FPN_LEVELS) :], strict=True))
        return {
            level: output + pyramid[level] if output.shape == pyramid[level].shape else output
            for level, output in outputs.items()
        }


def _expand(conv: nn.Module, features: Tensor, levels: int, size: torch.Size) -> Tensor:
    """Go up so many levels, or down to a size, convolving at the smaller of the resolutions."""
    if levels > 0:
        return conv(overlapping_pool(features, levels))
    return upsample(conv(features), size) if levels else conv(features)


class SSDLiteFeatures(PyramidBackbone):
    """SSDLite's six levels, of strides 16 to 512: two of a backbone, four of extra layers.

    The first is the expansion within the block that goes to stride 32 (MobileNetV2's paper).

    Args:
        blocks: the backbone, in the form torchvision's extractor takes.
        split: number of the block that goes to stride 32.
    """

    def __init__(self, blocks: nn.Sequential, split: int) -> None:
        super().__init__()
        self.network = SSDLiteFeatureExtractorMobileNet(blocks, split, make_norm)
        dims = retrieve_out_channels(self.network, (MINIMUM_IMAGE_SIZE, MINIMUM_IMAGE_SIZE))
        self.feature_dims = dict(zip(SSD_LEVELS, dims, strict=True))

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Map images [N, 3, H, W] to level: [N, dim, ceil(H / 2**level), ceil(W / 2**level)]."""
        return dict(zip(SSD_LEVELS, self.network(images).values(), strict=True))


def mobilenetv3_features(size: str) -> SSDLiteFeatures:
    """SSDLite's levels on a MobileNetV3, `small` or `large`.

    The channels from C4 to C5 are halved (MobileNetV3's paper, section 6.3).
    """
    make = getattr(torchvision.models, f"mobilenet_v3_{size}")
    layers = make(reduced_tail=True, norm_layer=make_norm).features
    return SSDLiteFeatures(layers, MOBILENETV3_SPLITS[size])


def mnasnet_a1_features(stochastic_depth: float) -> SSDLiteFeatures:
    """SSDLite's levels on a MnasNet-A1, up to its 1x1 convolution to 1280 channels."""
    network: Any = timm.create_model("semnasnet_100", drop_path_rate=stochastic_depth)
    blocks = [block for stage in network.blocks for block in stage]
    split = max(i for i, block in enumerate(blocks) if block.conv_dw.stride != (1, 1))
    blocks[split] = _SplitBlock(blocks[split])
    last = Conv2dNormActivation(
        network.conv_head.in_channels, network.conv_head.out_channels, 1, norm_layer=make_norm
    )
    layers = nn.Sequential(nn.Sequential(network.conv_stem, network.bn1), *blocks, last)
    set_norms(layers)
    return SSDLiteFeatures(layers, split + 1)


class _SplitBlock(nn.Module):
    """A strided block of timm as torchvision's extractor splits it: the expansion, the rest."""

    use_res_connect = False

    def __init__(self, block: Any) -> None:
        super().__init__()
        expansion = nn.Sequential(block.conv_pw, block.bn1)
        self.block = nn.Sequential(
            expansion, block.conv_dw, block.bn2, block.se, block.conv_pwl, block.bn3
        )
