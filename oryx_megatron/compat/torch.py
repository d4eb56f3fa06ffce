"""torch (2.11 to 2.13): on a CPU under megatron-core, and imports of its own that nothing here uses.

| patch | why |
|---|---|
| `install_cpu` | megatron-core allocates with `device="cuda"` and `torch.cuda.current_device()`, compares `Tensor.type()` with `"torch.cuda.FloatTensor"`, and keeps its random states in CUDA generators: all that goes to the CPU, process-wide and once |
| `torch.cuda.is_available` is False there | with PYTORCH_NVML_BASED_CUDA_CHECK, which DeepSpeed sets, a CUDA build of torch takes the single device that `install_cpu` counts for a GPU |
| `AROUND`: torch.distributed.tensor loads sympy for five names of symbolic_shapes | put off to a tensor of unknown shape |
| `AROUND`: torch.optim loads dynamo (and inductor) to say what it must not trace | nothing traces where dynamo is not loaded |
| `run_backward`: `torch.autograd.grad` and `.backward` load sympy to compare the shape of a gradient that is given | this does not compare |
| `late_builder`: torch's C++ builder loads setuptools | put off to a build |
| `late_compile`: `@torch.compile` loads dynamo and inductor where it is written | put off to the function's first call |
| `forget_compiled`: a function that met two widths is compiled for any | megatron-core's fused SwiGLU takes 2.8 times as long then: a second model, of other widths, starts anew |
| `late_disable`: so does `@torch.compiler.disable` dynamo | nothing traces where dynamo is not loaded |
| `without_dynamo`: TransformerEngine loads it to say what it must not trace | said when something else loads it |
| `never_restart` | torchrun's agent restarts ranks whatever they exited with, and reports each of their ends in some 30 lines |
| `store_of_start` | torchrun's agent keeps one store over all restarts (PyTorch issue 135712) |

Nothing of `install_cpu` is touched when a GPU is present, so no GPU run can depend on it.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from oryx_megatron.compat.hook import Around, StandIn, instead, made_on_first_use, original

if TYPE_CHECKING:
    from datetime import timedelta

    from torch import Tensor
    from torch.distributed import Store

DYNAMO = "torch._dynamo"
COMPTIME = "torch._dynamo.comptime"
SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
BUILDER = "torch.utils.cpp_extension"
FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "eye"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
_installed = False
_stand_ins: dict[str, Any] = {}

# ----------------------------------------------------------------------------------------------------------- on a CPU


class _NoStream:
    """Stands for a CUDA stream or event: the CPU runs everything in order, so waiting is already done."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def cpu_installed() -> bool:
    """True once `install_cpu` has redirected CUDA calls in this process."""
    return _installed


def install_cpu() -> None:
    """Redirect what is asked of CUDA to the CPU; harmless when called again.

    Raises:
        RuntimeError: a GPU is present, where megatron-core must not be redirected.
    """
    import torch

    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("the CPU platform must not be installed on a machine with a GPU")
    if _installed:
        return
    _redirect_devices()
    _redirect_random_states()
    _redirect_tensors()
    _installed = True


def _nothing() -> Callable[..., None]:
    """A new function each time: torch's compiler refuses one object under several names."""
    return lambda *args, **kwargs: None


def _redirect_devices() -> None:
    import torch

    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        setattr(cuda, name, _nothing())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing())
    cuda.Stream = cuda.Event = _NoStream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.device_count = lambda: 1
    cuda.is_available = lambda: False


def _redirect_random_states() -> None:
    import torch

    cuda: Any = torch.cuda

    def get_rng_state(device: object = "cuda") -> Any:
        return torch.get_rng_state()

    def set_rng_state(state: Any, device: object = "cuda") -> None:
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state, module.manual_seed = get_rng_state, set_rng_state, manual_seed
    cuda.default_generators = _EveryIndex(torch.default_generator)
    cuda._lazy_call = lambda function, **kwargs: function()
    # megatron-core binds these two by name at import, which may have happened already.
    if bound := sys.modules.get("megatron.core.tensor_parallel.random"):
        bound._lazy_init, bound._lazy_call = cuda._lazy_init, cuda._lazy_call  # type: ignore[attr-defined]


class _EveryIndex:
    """A sequence whose every element, for any index or device, is the CPU generator."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __getitem__(self, index: object) -> Any:
        return self.generator


def _redirect_tensors() -> None:
    import torch

    cpu = torch.device("cpu")
    tensor: Any = torch.Tensor
    original_type = tensor.type

    def type_name(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.")
        return original_type(self, dtype, *args, **kwargs)

    def is_cuda(value: object) -> bool:
        if isinstance(value, str):
            return value == "cuda" or value.startswith("cuda:")
        return isinstance(value, torch.device) and value.type == "cuda"

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            if is_cuda(kwargs.get("device")):
                kwargs["device"] = cpu
            if len(args) > 1 and is_cuda(args[1]):
                args = (args[0], cpu, *args[2:])
            if kwargs.get("pin_memory"):  # nothing pins memory where no device reads it
                kwargs["pin_memory"] = False
            return function(*args, **kwargs)

        return redirected

    tensor.type = type_name
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor.to = on_cpu(tensor.to)


# ------------------------------------------------------------------------------------------------------------ imports


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
    with instead(SYMBOLIC_SHAPES, StandIn(SYMBOLIC_SHAPES, _symbolic)):
        yield


@contextlib.contextmanager
def _with_the_originals(module: ModuleType) -> Iterator[None]:
    """Once symbolic_shapes is loaded, whoever has a stand-in gets the original."""
    yield
    ours = {id(stand_in): name for name, stand_in in _stand_ins.items()}
    theirs = ("torch.distributed.", "transformer_engine.")
    for user in [user for name, user in sys.modules.items() if name.startswith(theirs)]:
        for key, value in list(vars(user).items()):
            if id(value) in ours:
                setattr(user, key, getattr(module, ours[id(value)]))


def _builder(name: str) -> Any:
    """Of torch's C++ builder: its function as one that loads it, and what it says of CUDA where that is known."""
    import torch

    if name == "load_inline":
        return lambda *args, **kwargs: getattr(importlib.import_module(BUILDER), name)(*args, **kwargs)
    if name == "CUDA_HOME" and (torch.version.cuda is None or not torch.cuda.is_available()):
        return None
    sys.modules.pop(BUILDER, None)
    return getattr(importlib.import_module(BUILDER), name)


@contextlib.contextmanager
def late_compile(module: ModuleType) -> Iterator[None]:
    """`@torch.compile(…)` in the module compiles at the first call."""
    import torch

    original = torch.compile

    def compile(function: Any = None, **options: Any) -> Any:
        if function is None:
            return lambda function: compile(function, **options)
        return made_on_first_use(function, lambda: original(function, **options))

    torch.compile = compile  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


def run_backward(output: Tensor, gradient: Tensor, inputs: Sequence[Tensor] = ()) -> tuple[Tensor | None, ...]:
    """The backward pass of `output` with a gradient of its shape; into `.grad`, or for `inputs` alone as the result."""
    import torch

    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        (output,), (gradient,), False, False, tuple(inputs), allow_unreachable=True, accumulate_grad=not inputs
    )


def forget_compiled() -> None:
    """Let torch.compile begin anew, as in a new process, which has met no sizes."""
    if _has_dynamo():
        sys.modules[DYNAMO].reset()


def _has_dynamo() -> bool:
    module = sys.modules.get(DYNAMO)
    return module is not None and not isinstance(module, StandIn)


def _disabled_late(from_dynamo: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable` whose functions are those `from_dynamo` once there is one, and themselves until then."""

    def disable(function: Any = None, *args: Any, **options: Any) -> Any:
        if function is None:
            return lambda function: disable(function, *args, **options)
        if not isinstance(function, FunctionType):
            return from_dynamo(function, *args, **options)
        made: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if not _has_dynamo():
                return function(*given, **named)
            if not made:
                made.append(from_dynamo(function, *args, **options))
            return made[0](*given, **named)

        return call

    return disable


@contextlib.contextmanager
def late_disable(module: ModuleType) -> Iterator[None]:
    """`@torch.compiler.disable` in the module, and in those that it imports, keeps from dynamo once there is one."""
    import torch

    own = torch.compiler.disable
    torch.compiler.disable = _disabled_late(own)
    try:
        yield
    finally:
        torch.compiler.disable = own


class _Settings:
    """Stands for `torch._dynamo.config`: what is set here is set there when dynamo is loaded."""


_settings = _Settings()
_constant: list[Callable[..., Any]] = []


def _dynamo(name: str) -> Any:
    """What a module asks of dynamo when it is imported; for all else dynamo is loaded."""
    if name == "config":
        return _settings
    if name == "disable":
        return _disabled_late(lambda *args, **options: _load_dynamo().disable(*args, **options))
    if name == "assume_constant_result":
        return _remember_constant
    return getattr(_load_dynamo(), name)


def _remember_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    _constant.append(function)
    return function


def _load_dynamo() -> ModuleType:
    for name in (COMPTIME, SYMBOLIC_SHAPES):  # it takes from them itself
        if sys.modules.get(name) is None or isinstance(sys.modules[name], StandIn):
            sys.modules.pop(name, None)
    return original(DYNAMO)


@contextlib.contextmanager
def without_dynamo(module: ModuleType) -> Iterator[None]:
    """Around modules that load dynamo only to say what it must not trace, and sympy for sizes that it does not know."""
    with contextlib.ExitStack() as around:
        if DYNAMO not in sys.modules:
            around.enter_context(instead(COMPTIME, None))
            around.enter_context(instead(DYNAMO, StandIn(DYNAMO, _dynamo, is_package=True)))
            around.enter_context(_without_sympy(module))
        around.enter_context(late_disable(module))
        yield


@contextlib.contextmanager
def _with_what_was_said(module: ModuleType) -> Iterator[None]:
    yield
    for name, value in vars(_settings).items():
        setattr(module.config, name, value)
    for function in _constant:
        module.assume_constant_result(function)


@contextlib.contextmanager
def late_builder(module: ModuleType) -> Iterator[None]:
    """Around modules that import torch's C++ builder and may never build."""
    import torch.utils

    stand_in = StandIn(BUILDER, _builder)
    if BUILDER not in sys.modules:  # nccl_allocator reaches it through torch.utils, when it builds
        torch.utils.cpp_extension = stand_in  # type: ignore[attr-defined]
    with instead(BUILDER, stand_in):
        yield


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
        if DYNAMO not in sys.modules:
            return function(*args, **kwargs)
        if getattr(function, "__dynamo_disable", None) is call:
            delattr(function, "__dynamo_disable")  # torch makes its own from now on
        return method(*args, **kwargs)

    setattr(function, "__dynamo_disable", call)


def _unbroken(step: Any) -> Callable[..., Any]:
    """An optimizer's step without torch's breaks of dynamo's graph, as long as there is no dynamo to make a graph."""

    @functools.wraps(step.__wrapped__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if DYNAMO in sys.modules:
            return step(self, *args, **kwargs)
        import torch

        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return call


AROUND: dict[str, Around] = {
    "torch.distributed.tensor": _without_sympy,
    SYMBOLIC_SHAPES: _with_the_originals,
    "torch.optim": _with_untraced_optimizers,
    DYNAMO: _with_what_was_said,
}

# ----------------------------------------------------------------------------------------------------------- torchrun


def store_of_start(start: str, timeout: timedelta) -> Store | None:
    """torchrun's store under the name of this start: in the bare one, ranks would find the addresses of the dead.

    Its agent keeps one store over all restarts (PyTorch issue 135712; still so in 2.13). None without such an agent.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    return PrefixStore(f"start {start}", store)


# ----------------------------------------------------------------------------------------------------- torchrun's agent


def never_restart(code: int) -> None:
    """Let torchrun's agents of this process end when a rank exited with `code`, whatever restarts are left.

    Of that exit, and of the ends that it brings to other ranks, nothing is logged: such a rank has said what is wrong.
    """
    from torch.distributed.launcher import api

    class Agent(api.LocalElasticAgent):
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.is_failed() and any(failure.exitcode == code for failure in result.failures.values()):
                self._remaining_restarts = 0
            return result

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (
            text.startswith(f"failed (exitcode: {code}) ") or "closing signal" in text or " via signal " in text
        )

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(wanted)
