"""Steps of a network's training that C++ does in fewer passes over memory than torch.

Where it can't, with no C++ compiler or on another device than a processor, torch does them.
"""

from effspinenet_lib.native.functions import norm_activation, scale_channels, write_focal_slopes

__all__ = ["norm_activation", "scale_channels", "write_focal_slopes"]
