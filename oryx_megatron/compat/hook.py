"""Acts around the import of another package's modules, however they come to be imported.

`import megatron.core` costs three times the CPU of `import torch`, in every process of every rank. Each cause is
handled where its module is imported, by a hook. The packages whose modules import megatron-core import
`oryx_megatron.platform` in their `__init__`, so the hook is there first.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], contextlib.AbstractContextManager[None]]
"""Entered with a new module before it is executed, left after."""


class StandIn(ModuleType):
    """Stands for a module while another imports names of it; what it cannot stand for it takes from the original.

    For a package only where it `is_package`: importing a module of it asks `offered` for its `__path__`.
    """

    def __init__(self, name: str, offered: Callable[[str], Any], *, is_package: bool = False) -> None:
        super().__init__(name)
        self._offered, self._is_package = offered, is_package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not (name == "__path__" and self._is_package):
            raise AttributeError(name)
        return self._offered(name)


def original(name: str) -> ModuleType:
    """Module `name` itself, imported if it is not; no stand-in."""
    if isinstance(sys.modules.get(name), StandIn):
        del sys.modules[name]
    return importlib.import_module(name)


def late(name: str) -> ModuleType:
    """Module `name`, imported when something of it is used: for commands whose --help should not wait for torch."""
    return StandIn(name, lambda attribute: getattr(importlib.import_module(name), attribute))


@contextlib.contextmanager
def instead(name: str, module: ModuleType | None) -> Iterator[None]:
    """Let imports of `name` find `module` meanwhile, or fail with None; nothing where it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module  # type: ignore[assignment]  # None: Python finds no such module
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            del sys.modules[name]


def made_on_first_use(function: Callable[..., Any], make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """What `make` gives at the first call; inside of another compiled function the plain one, part of its graph."""
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not made:
            made.append(make())
        return made[0](*args, **kwargs)

    return call


def _execute_when_used(module: ModuleType, run: Callable[[ModuleType], None]) -> None:
    """Let `run` execute a package when a name of it is asked for; imports of modules in it do without."""

    def of_package(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        vars(module).pop("__getattr__", None)
        run(module)
        return getattr(module, name)

    module.__getattr__ = of_package  # type: ignore[method-assign]


class _Finder:
    """Finds the modules of `around` as Python does, and executes them inside of what is said there."""

    around: Mapping[str, Around] = {}
    when_used: Sequence[str] = ()

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in cls.around and name not in cls.when_used:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            if name in cls.when_used:
                _execute_when_used(module, run)
            else:
                with cls.around[name](module):
                    run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(around: Mapping[str, Around], when_used: Sequence[str] = ()) -> None:
    """Put the hook in place; harmless when called again. What is loaded already is handled where that still helps.

    Packages of `when_used` have an `__init__` that only imports from the modules beside it: it is executed when one of
    its names is asked for.
    """
    if _Finder not in sys.meta_path:
        _Finder.around, _Finder.when_used = around, when_used
        sys.meta_path.insert(0, _Finder)
        for name in ("torch.optim", "megatron.core.transformer.moe.moe_utils"):
            if (loaded := sys.modules.get(name)) and name in around:
                with around[name](loaded):
                    pass
