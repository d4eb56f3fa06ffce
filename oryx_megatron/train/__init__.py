"""Training: step, loop, optimizer and schedule, callbacks, evaluation. `python -m oryx_megatron.train RUN.yaml`.

The package can be called: `oryx_megatron.train(run)` is `oryx_megatron.api.train`.
"""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses

# isort: split
import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """`from oryx_megatron import train` gives this package once it is imported, and a function is wanted."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return importlib.import_module(f"{__package__.partition('.')[0]}.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
