"""tilelang (0.1.15): kernels are compiled one after the other, each when it is first called.

| patch | why |
|---|---|
| `side_by_side` | those of the gated delta rule take minutes in turn, and are independent; `par_compile` of tilelang wants all arguments beforehand, and its threads wait for each other: the compiler holds Python's lock |
| `take_turns` | two processes that meet the same kernel at once would both compile it |

Each kernel is traced and compiled in a process of its own, which leaves it in tilelang's cache on disk.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

LONGEST = 600
"""Seconds after which a process that compiles a kernel is taken for stuck, and ends."""
POLL = 0.02
"""Seconds."""
_ALONE = threading.Lock()
_turns: int | None = None


class _Pending:
    """Stands for a kernel that is being compiled: called, it leaves its outputs as they are."""

    def __init__(self, process: int, trace: Callable[[], Any], compile: Callable[[Any], Any]) -> None:
        self.process = process
        self.trace = trace
        self.compile = compile

    def __call__(self, *tensors: Any, **more: Any) -> None:
        pass


def take_turns(file: int | None) -> None:
    """Let processes compile a kernel one at a time, so that the next finds it cached: those that were given this file.

    Args:
        file: Descriptor of one that they all have open, for locks alone; None: no more turns.
    """
    global _turns
    _turns = file


@contextlib.contextmanager
def side_by_side() -> Iterator[list[str]]:
    """Inside, kernels compute nothing; at the end all that were called are compiled, side by side.

    Their outputs keep whatever memory held: call only what is called again afterwards. Kernels that return their
    outputs are compiled at once, as outside. One that does not compile is compiled again when it is next called, and
    fails there. Without tilelang or its cache, and for a second thread inside at the same time, nothing changes.

    Gives the names of kernels that did not compile, once it is left.
    """
    failed: list[str] = []
    if importlib.util.find_spec("tilelang") is None or not _ALONE.acquire(blocking=False):
        yield failed
        return
    import tilelang
    from tilelang.backend.target import determine_target
    from tilelang.jit import JITImpl

    original, met = JITImpl.compile, {}

    def compile_later(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.mode != "lazy" or kernel.out_idx is not None or kernel.debug_root_path:
            return original(kernel, *args, **kwargs)
        met[id(kernel)] = kernel
        same = ("out_idx", "execution_backend", "target_host", "verbose", "pass_configs", "compile_flags")
        options = {name: getattr(kernel, name) for name in same}
        # Here: a process made of this one cannot ask CUDA for the GPU's kind.
        options["target"] = determine_target(kernel.target or tilelang.env.get_default_target(), return_object=True)

        def trace() -> Any:
            return kernel.get_tir(*args, **kwargs)

        def compile(program: Any) -> Any:
            return tilelang.compile(program, **options)

        def work() -> None:
            with _one_at_a_time(f"{_name(kernel)} {args} {kwargs}"):
                compile(trace())

        return _Pending(_in_a_process(work), trace, compile)

    if tilelang.env.is_cache_enabled():
        JITImpl.compile = compile_later
    try:
        yield failed
    finally:
        JITImpl.compile = original
        _settle(list(met.values()), failed)
        _ALONE.release()


def _name(kernel: Any) -> str:
    function = kernel.func.orig_func
    return f"{function.__module__}.{function.__qualname__}"


@contextlib.contextmanager
def _one_at_a_time(what: str) -> Iterator[None]:
    """Alone with `what` among the processes that take turns; a process that ends, however it does, leaves its turn."""
    if _turns is not None:
        with contextlib.suppress(OSError):  # without locks in this file system each compiles, as without turns
            fcntl.lockf(_turns, fcntl.LOCK_EX, 1, zlib.crc32(what.encode()))
    yield


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


def _settle(kernels: list[Any], failed: list[str]) -> None:
    """Put what was compiled in the place of what stood for it, each kernel as soon as its process ends."""
    traced: list[tuple[Any, Any, _Pending, Any]] = []
    for kernel in kernels:
        kernel._call_form_cache.clear()
        for key, pending in list(kernel._kernel_cache.items()):
            if isinstance(pending, _Pending):
                del kernel._kernel_cache[key]
                program = None
                with contextlib.suppress(Exception):  # as in its process, whose status says so
                    program = pending.trace()  # while it compiles
                traced.append((kernel, key, pending, program))
    for kernel, key, pending, program, status in _as_they_end(traced):
        if status:
            failed.append(_name(kernel))
            log.debug("a kernel did not compile beside others: %s", failed[-1])
            continue
        try:
            kernel._kernel_cache[key] = pending.compile(program)
        except Exception:
            failed.append(_name(kernel))
            log.debug("a kernel that was compiled does not load: %s", failed[-1], exc_info=True)


def _as_they_end(traced: list[tuple[Any, Any, _Pending, Any]]) -> Iterator[tuple[Any, Any, _Pending, Any, int]]:
    """The same with the status of the kernel's process, each once that has ended."""
    while traced:
        running = []
        for kernel, key, pending, program in traced:
            ended, status = os.waitpid(pending.process, os.WNOHANG)
            if ended:
                yield kernel, key, pending, program, status
            else:
                running.append((kernel, key, pending, program))
        if len(running) == len(traced):
            time.sleep(POLL)
        traced = running
