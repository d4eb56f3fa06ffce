"""tilelang (0.1.15): kernels are compiled one after the other, each when it is first called.

| patch | why |
|---|---|
| `side_by_side` | those of the gated delta rule take minutes in turn, and are independent; `par_compile` of tilelang wants all arguments beforehand, and its threads wait for each other: the compiler holds Python's lock |

Each kernel is compiled in a process of its own, which leaves it in tilelang's cache on disk.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

LONGEST = 600
"""Seconds after which a process that compiles a kernel is taken for stuck, and ends."""
_ALONE = threading.Lock()


class _Pending:
    """Stands for a kernel that is being compiled: called, it leaves its outputs as they are."""

    def __init__(self, process: int, compile: Callable[[], Any]) -> None:
        self.process = process
        self.compile = compile

    def __call__(self, *tensors: Any, **more: Any) -> None:
        pass


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Inside, kernels compute nothing; at the end all that were called are compiled, side by side.

    Their outputs keep whatever memory held: call only what is called again afterwards. Kernels that return their
    outputs are compiled at once, as outside. One that does not compile is compiled again when it is next called, and
    fails there. Without tilelang or its cache, and for a second thread inside at the same time, nothing changes.
    """
    if importlib.util.find_spec("tilelang") is None or not _ALONE.acquire(blocking=False):
        yield
        return
    import tilelang
    from tilelang.backend.target import determine_target
    from tilelang.jit import JITImpl

    original, met = JITImpl.compile, {}

    def compile_later(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.mode != "lazy" or kernel.out_idx is not None or kernel.debug_root_path:
            return original(kernel, *args, **kwargs)
        program = kernel.get_tir(*args, **kwargs)
        met[id(kernel)] = kernel
        same = ("out_idx", "execution_backend", "target_host", "verbose", "pass_configs", "compile_flags")
        options = {name: getattr(kernel, name) for name in same}
        # Here: a process made of this one cannot ask CUDA for the GPU's kind.
        options["target"] = determine_target(kernel.target or tilelang.env.get_default_target(), return_object=True)

        def compile() -> Any:
            return tilelang.compile(program, **options)

        return _Pending(_in_a_process(compile), compile)

    if tilelang.env.is_cache_enabled():
        JITImpl.compile = compile_later
    try:
        yield
    finally:
        JITImpl.compile = original
        for kernel in met.values():
            _settle(kernel)
        _ALONE.release()


def _in_a_process(work: Callable[[], Any]) -> int:
    """Do it in a copy of this process, which has all that was imported; its number."""
    process = os.fork()
    if process:
        return process
    status = 1  # the first to call this kernel compiles it itself, and fails with the reason
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # not as the training command handles them
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(LONGEST)
        work()
        status = 0
    finally:
        os._exit(status)


def _settle(kernel: Any) -> None:
    """Put what was compiled in the place of what stood for it."""
    kernel._call_form_cache.clear()
    for key, pending in list(kernel._kernel_cache.items()):
        if isinstance(pending, _Pending):
            del kernel._kernel_cache[key]
            _, status = os.waitpid(pending.process, 0)
            if status:
                log.debug("a kernel did not compile beside others")
                continue
            try:
                kernel._kernel_cache[key] = pending.compile()
            except Exception:
                log.debug("a kernel that was compiled does not load", exc_info=True)
