"""Every model of the library by name for `torch.hub`.

`torch.hub.load("<owner>/<repository>", "eff_spinenet_d0", task="detection", weights=FILE)` takes
what `effspinenet_lib.create_model` takes after the name.
"""

from functools import partial as _partial

from effspinenet_lib import create_model as _create_model
from effspinenet_lib import list_models as _list_models

dependencies = ["torch", "torchvision", "timm", "safetensors"]
globals().update({name: _partial(_create_model, name) for name in _list_models()})
