"""Kernels of tilelang compiled side by side, by its CPU target: needs tilelang and a C compiler, no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oryx_megatron import compat

# Its classes are patched; the version that they are known of is the one of configs/install.
tilelang = pytest.importorskip("tilelang", reason="needs tilelang: .ci/python-3.12 installs it")
from tilelang import language as T  # noqa: E402
from tilelang.jit import JITImpl, JITKernel  # noqa: E402
from tilelang.language.kernel import Kernel  # noqa: E402

BLOCK = 64
SIZES = (64, 128, 192)


@pytest.fixture(autouse=True)
def alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes from a cache, and a machine without a GPU has device 0."""
    tilelang.disable_cache()
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads that compiled a kernel, each time one did."""
    threads: list[int] = []
    original = tilelang.compile

    def compile(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.get_ident())
        return original(*args, **kwargs)

    monkeypatch.setattr(tilelang, "compile", compile)
    return threads


def adder(**options: Any) -> Callable[..., Any]:
    """A function of a size that gives the kernel B = A + 1."""

    @tilelang.jit(target="c", **options)
    def add(size: int) -> Any:
        @T.prim_func
        def main(A: T.Tensor((size,), "float32"), B: T.Tensor((size,), "float32")):
            with Kernel(size // BLOCK) as block:
                for i in T.serial(BLOCK):
                    B[block * BLOCK + i] = A[block * BLOCK + i] + 1.0

        return main

    return add


def test_kernels_compute_nothing_inside_and_all_afterwards(compiled: list[int]) -> None:
    add = adder()
    a, b = torch.arange(192.0), torch.zeros(192)
    with compat.tilelang.side_by_side(workers=3):
        for size in SIZES * 2:  # a kernel that was met is not compiled twice
            add(size)(a[:size], b[:size])
        assert not b.any()
    assert len(compiled) == len(SIZES)
    assert threading.get_ident() not in compiled
    for size in SIZES:
        b.zero_()
        add(size)(a[:size], b[:size])
        assert torch.equal(b[:size], a[:size] + 1)
        assert not b[size:].any()
    assert len(compiled) == len(SIZES)  # nothing was left to compile


def test_a_kernel_that_returns_its_output_is_compiled_at_once() -> None:
    add = adder(out_idx=[-1])
    with compat.tilelang.side_by_side(workers=2):
        assert torch.equal(add(64)(torch.arange(64.0)), torch.arange(64.0) + 1)


def test_a_kernel_that_does_not_compile_fails_where_it_is_called_next(monkeypatch: pytest.MonkeyPatch) -> None:
    add = adder(compile_flags=["--no-such-flag"])
    with compat.tilelang.side_by_side(workers=2):
        add(64)(torch.zeros(64), torch.zeros(64))
    assert add._kernel_cache == {}
    with pytest.raises(RuntimeError, match="no-such-flag"):
        add(64)
    monkeypatch.setattr(add, "compile_flags", None)
    b = torch.zeros(64)
    add(64)(torch.zeros(64), b)
    assert torch.equal(b, torch.ones(64))


def test_an_error_inside_is_the_callers() -> None:
    add = adder()

    def fails() -> None:
        with compat.tilelang.side_by_side(workers=2):
            add(64)(torch.zeros(64), torch.zeros(64))
            raise ZeroDivisionError

    original = JITImpl.compile
    with pytest.raises(ZeroDivisionError):
        fails()
    assert JITImpl.compile is original
    b = torch.zeros(64)
    add(64)(torch.zeros(64), b)
    assert torch.equal(b, torch.ones(64))


def test_one_at_a_time() -> None:
    """A second one inside changes nothing, and the first puts things back."""
    original = JITImpl.compile
    with compat.tilelang.side_by_side():
        first = JITImpl.compile
        with compat.tilelang.side_by_side():
            assert JITImpl.compile is first
        assert JITImpl.compile is first
    assert JITImpl.compile is original


def test_its_compiler_still_takes_kernels_in_turn() -> None:
    """Without the patch a call returns a kernel that is compiled."""
    add = adder()
    assert all(isinstance(add(size), JITKernel) for size in SIZES)
