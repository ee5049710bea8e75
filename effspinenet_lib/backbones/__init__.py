"""Networks that turn images into feature pyramids."""

from effspinenet_lib.backbones.scale_permuted import BackboneOptions, ScalePermutedBackbone

__all__ = ["BackboneOptions", "ScalePermutedBackbone"]
