"""Offline compression of Mixture-of-Experts models for llama.cpp: stats -> plan -> gguf, then the report.

As a library: the functions of `gguftool.api`, which are named as the commands are. They are loaded when they are asked for, so
that `import gguftool` takes no time.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import calibrate as calibrate
    from .api import compress as compress
    from .api import convert as convert
    from .api import doctor as doctor
    from .api import expand as expand
    from .api import inspect as inspect
    from .api import plan as plan
    from .api import prune as prune
    from .api import quantize as quantize
    from .api import refit as refit
    from .api import validate as validate
    from .api import verify as verify
    from .errors import GgufToolError as GgufToolError

__version__ = "0.2.0"

__all__ = [
    "GgufToolError", "__version__", "calibrate", "compress", "convert", "doctor", "expand", "inspect", "plan", "prune",
    "quantize", "refit", "validate", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Some commands have the name of the module behind them. Where that module is imported, the package would get it under
    that name; it keeps the function. The module itself is reached as ever: `from gguftool.plan import PrunePlan`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
