"""Distributed pretraining of Oryx language models: one model, two mixers, any token in either.

`from oryx_megatron import load_run, train, load_model, generate, export, Dataset, ModePlan` (docs/api.md); each loads
what it needs at its first use.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oryx_megatron.api import Dataset, ModePlan, Trained, export, generate, load_model, load_run, train

__version__ = "0.2.0"
__all__ = ["Dataset", "ModePlan", "Trained", "__version__", "export", "generate", "load_model", "load_run", "train"]

# python -m oryx_megatron.…, but for the doctor and the command `oryx`, which look for themselves
if sys.argv[:1] == ["-m"] and not {"oryx_megatron", "oryx_megatron.doctor"} & set(sys.orig_argv):
    from oryx_megatron import environment

    environment.check()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    # `train` is a package too, which the import system puts here: it is callable (train/__init__.py).
    return (
        importlib.import_module(f"{__name__}.train")
        if name == "train"
        else getattr(importlib.import_module(f"{__name__}.api"), name)
    )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
