"""What megatron-core and torch load at import and no run of ours uses: put off to first use.

`import megatron.core` costs three times the CPU of `import torch`, in every process of every rank. Each cause is
handled where its module is imported, by a hook that importing `oryx_megatron.platform` installs. The packages whose
modules import megatron-core import it in their `__init__`, so it is there first. For megatron-core 0.16.1 and torch
2.11 to 2.13; tests/unit/test_startup.py fails when one of them no longer loads what is put off here.

| imported by | loads | put off to |
|---|---|---|
| megatron.core.jit: `jit_fuser` is torch.compile | torch._dynamo, torch._inductor | the first call of a fused function beside a GPU; on a CPU they run as written |
| torch.distributed.tensor: five names of symbolic_shapes | sympy | a tensor of unknown shape |
| torch.optim: steps and methods that dynamo must not trace | torch._dynamo | nothing traces where dynamo is not loaded |
| megatron.core.timers: its own TensorBoard writer | tensorboard | never: our own writes TensorBoard's files |
| DeepSpeed 0.19.8's Muon: three functions compiled | torch._dynamo, torch._inductor | their first call |
| nccl_allocator, unified_memory: torch's C++ builder | setuptools | a build |

On GPUs the same functions are compiled by the same torch.compile as before.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
BUILDER = "torch.utils.cpp_extension"
_stand_ins: dict[str, Any] = {}


class _StandIn(ModuleType):
    """Stands for a module while another imports names of it; what it cannot stand for it takes from the original."""

    def __init__(self, name: str, offered: Callable[[str], Any]) -> None:
        super().__init__(name)
        self._offered = offered

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._offered(name)


def late(name: str) -> ModuleType:
    """Module `name`, imported when something of it is used: for commands whose --help should not wait for torch."""
    return _StandIn(name, lambda attribute: getattr(importlib.import_module(name), attribute))


@contextlib.contextmanager
def _instead(name: str, module: ModuleType | None) -> Iterator[None]:
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


def _symbolic(name: str) -> Any:
    """A function of symbolic_shapes that loads it when called; its exception as one that nothing raises until then."""
    if name not in _stand_ins:
        if name.islower():

            def function(*args: Any, **kwargs: Any) -> Any:
                return getattr(importlib.import_module(SYMBOLIC_SHAPES), name)(*args, **kwargs)

            _stand_ins[name] = function
        elif name == "GuardOnDataDependentSymNode":
            _stand_ins[name] = type(name, (Exception,), {})
        else:
            sys.modules.pop(SYMBOLIC_SHAPES, None)
            return getattr(importlib.import_module(SYMBOLIC_SHAPES), name)
    return _stand_ins[name]


@contextlib.contextmanager
def _without_sympy(module: ModuleType) -> Iterator[None]:
    with _instead(SYMBOLIC_SHAPES, _StandIn(SYMBOLIC_SHAPES, _symbolic)):
        yield


@contextlib.contextmanager
def _with_the_originals(module: ModuleType) -> Iterator[None]:
    """Once symbolic_shapes is loaded, whoever has a stand-in gets the original."""
    yield
    ours = {id(stand_in): name for name, stand_in in _stand_ins.items()}
    for user in [user for name, user in sys.modules.items() if name.startswith("torch.distributed.")]:
        for key, value in list(vars(user).items()):
            if id(value) in ours:
                setattr(user, key, getattr(module, ours[id(value)]))


@contextlib.contextmanager
def _without_tensorboard(module: ModuleType) -> Iterator[None]:
    with _instead("torch.utils.tensorboard", None):
        yield


def _builder(name: str) -> Any:
    """Of torch's C++ builder: its function as one that loads it, and what it says of CUDA where that is known."""
    import torch

    if name == "load_inline":
        return lambda *args, **kwargs: getattr(importlib.import_module(BUILDER), name)(*args, **kwargs)
    if name == "CUDA_HOME" and torch.version.cuda is None:
        return None
    sys.modules.pop(BUILDER, None)
    return getattr(importlib.import_module(BUILDER), name)


@contextlib.contextmanager
def _with_a_late_builder(module: ModuleType) -> Iterator[None]:
    import torch.utils

    stand_in = _StandIn(BUILDER, _builder)
    if BUILDER not in sys.modules:  # nccl_allocator reaches it through torch.utils, when it builds
        torch.utils.cpp_extension = stand_in  # type: ignore[attr-defined]
    with _instead(BUILDER, stand_in):
        yield


@contextlib.contextmanager
def _with_late_compilation(module: ModuleType) -> Iterator[None]:
    yield
    module.jit_fuser = compiled_on_first_use  # type: ignore[attr-defined]


def compiled_on_first_use(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled by torch.compile at its first call beside a GPU; as it is on a CPU.

    megatron-core's fused activations are a GPU matter: compiling them takes minutes and a C++ compiler on a CPU.
    """

    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function) if torch.cuda.is_available() else function

    return _made_on_first_use(function, compiled)


def _made_on_first_use(function: Callable[..., Any], make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
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


@contextlib.contextmanager
def _with_a_late_compiler(module: ModuleType) -> Iterator[None]:
    """DeepSpeed's Muon: its functions are compiled as it says, when they are called."""
    compiler = importlib.import_module("deepspeed.runtime.compiler")
    original = compiler.compile

    def compile(**options: Any) -> Callable[..., Any]:
        return lambda function: _made_on_first_use(function, lambda: original(**options)(function))

    compiler.compile = compile  # type: ignore[attr-defined]
    try:
        yield
    finally:
        compiler.compile = original  # type: ignore[attr-defined]


@contextlib.contextmanager
def _with_untraced_optimizers(module: ModuleType) -> Iterator[None]:
    """torch.optim loads dynamo only to tell it what not to trace: not before there is a dynamo."""
    yield
    for name in ("zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        _untraced(getattr(module.Optimizer, name))
    for optimizer in (module.Adam, module.AdamW, module.SGD):
        step = vars(optimizer).get("step")  # AdamW inherits Adam's
        if hasattr(step, "__wrapped__") and not hasattr(step, "hooked"):
            optimizer.step = _unbroken(step)


def _untraced(method: Callable[..., Any]) -> None:
    """Fill the place where torch's `_disable_dynamo` keeps what it calls instead of the method."""
    function: Any = getattr(method, "__wrapped__", None)
    if function is None or hasattr(function, "__dynamo_disable"):
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if getattr(function, "__dynamo_disable", None) is call:
            delattr(function, "__dynamo_disable")  # torch makes its own from now on
        return method(*args, **kwargs)

    setattr(function, "__dynamo_disable", call)


def _unbroken(step: Any) -> Callable[..., Any]:
    """An optimizer's step without torch's breaks of dynamo's graph, as long as there is no dynamo to make a graph."""

    @functools.wraps(step.__wrapped__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return step(self, *args, **kwargs)
        import torch

        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return call


_AROUND: dict[str, Callable[[ModuleType], contextlib.AbstractContextManager[None]]] = {
    "megatron.core.jit": _with_late_compilation,
    "megatron.core.timers": _without_tensorboard,
    "megatron.core.nccl_allocator": _with_a_late_builder,
    "megatron.core.inference.unified_memory": _with_a_late_builder,
    "torch.distributed.tensor": _without_sympy,
    SYMBOLIC_SHAPES: _with_the_originals,
    "deepspeed.runtime.zero.muon.original_muon": _with_a_late_compiler,
    "torch.optim": _with_untraced_optimizers,
}


class _Finder:
    """Finds the modules above as Python does, and runs them inside of what is said above."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        around = _AROUND.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if around else None
        if around is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with around(module):
                run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the hook in place; harmless when called again. What is loaded already is handled where that still helps."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
        if loaded := sys.modules.get("torch.optim"):
            with _with_untraced_optimizers(loaded):
                pass
