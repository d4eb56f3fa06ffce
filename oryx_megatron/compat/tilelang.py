"""tilelang (0.1.15): kernels are compiled one after the other, each when it is first called.

| patch | why |
|---|---|
| `side_by_side` | those of the gated delta rule take a minute and more in turn, and are independent; `par_compile` of tilelang wants all arguments beforehand |

Its compiler runs in threads (as in its own `par_compile`), nvcc in processes of them.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)

MOST_WORKERS = 16
"""More than a step has kernels."""
_ALONE = threading.Lock()


class _Pending:
    """Stands for a kernel that is being compiled: called, it leaves its outputs as they are."""

    def __init__(self, kernel: Future[Any]) -> None:
        self.kernel = kernel

    def __call__(self, *tensors: Any, **more: Any) -> None:
        pass


@contextlib.contextmanager
def side_by_side(workers: int = 0) -> Iterator[None]:
    """Inside, kernels compute nothing; at the end all that were called are compiled, side by side.

    Their outputs keep whatever memory held: call only what is called again afterwards. Kernels that return their
    outputs are compiled at once, as outside. One that does not compile is compiled again when it is next called, and
    fails there. Without tilelang, and for a second thread inside at the same time, nothing changes.

    Args:
        workers: Threads that compile; 0: one for each core that this process may use.
    """
    if importlib.util.find_spec("tilelang") is None or not _ALONE.acquire(blocking=False):
        yield
        return
    import tilelang
    import torch
    from tilelang.jit import JITImpl

    original, met = JITImpl.compile, {}
    device = torch.cuda.current_device()  # each thread has its own
    pool = ThreadPoolExecutor(
        workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS),
        initializer=lambda: torch.cuda.set_device(device),
    )

    def compile_later(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.mode != "lazy" or kernel.out_idx is not None or kernel.debug_root_path:
            return original(kernel, *args, **kwargs)
        program = kernel.get_tir(*args, **kwargs)  # here: its builder of programs is not made for threads
        met[id(kernel)] = kernel
        same = ("out_idx", "execution_backend", "target", "target_host", "verbose", "pass_configs", "compile_flags")
        return _Pending(pool.submit(tilelang.compile, program, **{name: getattr(kernel, name) for name in same}))

    JITImpl.compile = compile_later
    try:
        yield
    finally:
        JITImpl.compile = original
        for kernel in met.values():
            _settle(kernel)
        pool.shutdown()
        _ALONE.release()


def _settle(kernel: Any) -> None:
    """Put what was compiled in the place of what stood for it."""
    kernel._call_form_cache.clear()
    for key, pending in list(kernel._kernel_cache.items()):
        if isinstance(pending, _Pending):
            del kernel._kernel_cache[key]
            try:
                kernel._kernel_cache[key] = pending.kernel.result()
            except Exception:
                log.debug("a kernel did not compile beside others", exc_info=True)
