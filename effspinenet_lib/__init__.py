"""Eff-SpineNet: scale-permuted backbones of MBConv blocks with a learned resource distribution.

The names below are loaded when they are first used, so that `import effspinenet_lib` stays
fast and works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effspinenet_lib.models.cost import Cost, measure_cost
    from effspinenet_lib.models.zoo import create_backbone, create_model, list_models

__version__ = "0.1.0"

_HOMES = {
    "Cost": "effspinenet_lib.models.cost",
    "measure_cost": "effspinenet_lib.models.cost",
    "create_backbone": "effspinenet_lib.models.zoo",
    "create_model": "effspinenet_lib.models.zoo",
    "list_models": "effspinenet_lib.models.zoo",
}

__all__ = [
    "Cost",
    "__version__",
    "create_backbone",
    "create_model",
    "list_models",
    "measure_cost",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
