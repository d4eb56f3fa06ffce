"""Kernels of tilelang compiled side by side, by its CPU target: needs tilelang and a C compiler, no GPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oryx_megatron import compat

# Its classes are patched; the version that they are known of is the one of configs/install.
tilelang = pytest.importorskip("tilelang", reason="needs tilelang: .ci/python-3.12 installs it")
from tilelang import language as T  # noqa: E402
from tilelang.cache import _dispatch_map  # noqa: E402
from tilelang.jit import JITImpl, JITKernel  # noqa: E402
from tilelang.language.kernel import Kernel  # noqa: E402

BLOCK = 64
SIZES = (64, 128, 192)


@pytest.fixture(autouse=True)
def alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own."""
    monkeypatch.setattr(tilelang.env, "TILELANG_CACHE_DIR", str(tmp_path))
    for cache in _dispatch_map.values():
        monkeypatch.setattr(cache, "_memory_cache", {})
        cache._create_dirs()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of kernels that this process compiled, not found in the cache."""
    sizes: list[int] = []
    original = JITKernel._compile_and_create_adapter

    def compile(kernel: JITKernel, program: Any, out_idx: Any) -> Any:
        sizes.append(int(program.buffer_map[program.params[0]].shape[0]))
        return original(kernel, program, out_idx)

    monkeypatch.setattr(JITKernel, "_compile_and_create_adapter", compile)
    return sizes


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
    with compat.tilelang.side_by_side():
        for size in SIZES * 2:  # a kernel that was met is not compiled twice
            add(size)(a[:size], b[:size])
        assert not b.any()
    for size in SIZES:
        b.zero_()
        add(size)(a[:size], b[:size])
        assert torch.equal(b[:size], a[:size] + 1)
        assert not b[size:].any()
    assert not compiled  # but in processes of their own
    add(256)(torch.zeros(256), torch.zeros(256))
    assert compiled == [256]


def test_a_kernel_that_returns_its_output_is_compiled_at_once() -> None:
    add = adder(out_idx=[-1])
    with compat.tilelang.side_by_side():
        assert torch.equal(add(64)(torch.arange(64.0)), torch.arange(64.0) + 1)


def test_a_kernel_that_does_not_compile_fails_where_it_is_called_next(monkeypatch: pytest.MonkeyPatch) -> None:
    add = adder(compile_flags=["--no-such-flag"])
    with compat.tilelang.side_by_side():
        add(64)(torch.zeros(64), torch.zeros(64))
    assert add._kernel_cache == {}
    with pytest.raises(RuntimeError, match="no-such-flag"):
        add(64)
    monkeypatch.setattr(add, "compile_flags", None)
    b = torch.zeros(64)
    add(64)(torch.zeros(64), b)
    assert torch.equal(b, torch.ones(64))


def test_without_its_cache_kernels_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch, compiled: list[int]) -> None:
    monkeypatch.setenv("TILELANG_DISABLE_CACHE", "1")
    with compat.tilelang.side_by_side():
        b = torch.zeros(64)
        adder()(64)(torch.zeros(64), b)
        assert torch.equal(b, torch.ones(64))
    assert compiled == [64]


def test_a_process_that_dies_leaves_its_kernel_to_this_one(
    monkeypatch: pytest.MonkeyPatch, compiled: list[int]
) -> None:
    add = adder()
    here, original = os.getpid(), tilelang.compile

    def killed(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(tilelang, "compile", killed)
    with compat.tilelang.side_by_side():
        add(64)(torch.zeros(64), torch.zeros(64))
    b = torch.zeros(64)
    add(64)(torch.zeros(64), b)
    assert torch.equal(b, torch.ones(64))
    assert compiled == [64]


def test_a_kernel_that_does_not_load_fails_where_it_is_called_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the next one inside."""
    here, original = os.getpid(), tilelang.compile

    def compile(*args: Any, **kwargs: Any) -> Any:
        if os.getpid() == here:
            raise OSError("the cache is gone")
        return original(*args, **kwargs)

    add = adder()
    with monkeypatch.context() as gone:
        gone.setattr(tilelang, "compile", compile)
        with compat.tilelang.side_by_side():
            for size in SIZES:
                add(size)(torch.zeros(size), torch.zeros(size))
    assert add._kernel_cache == {}
    with compat.tilelang.side_by_side():
        b = torch.zeros(64)
        add(64)(torch.zeros(64), b)
        assert not b.any()
    add(64)(torch.zeros(64), b)
    assert torch.equal(b, torch.ones(64))


def test_an_error_inside_is_the_callers() -> None:
    add = adder()

    def fails() -> None:
        with compat.tilelang.side_by_side():
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


def test_what_another_process_compiles_is_waited_for(compiled: list[int], tmp_path: Any) -> None:
    """Of two that meet a kernel at once one compiles it; a process that dies in its turn leaves it to the other."""
    turns = os.memfd_create("turns")
    log = tmp_path / "log"
    add = adder()
    here, original = os.getpid(), JITKernel._compile_and_create_adapter

    def slow(kernel: JITKernel, program: Any, out_idx: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{'run' if os.getppid() == here else 'ahead'}\n")
        time.sleep(1)
        if os.getppid() != here and int(program.buffer_map[program.params[0]].shape[0]) == SIZES[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(kernel, program, out_idx)

    begun, begin = os.pipe()
    ahead = os.fork()
    JITKernel._compile_and_create_adapter = slow
    try:
        compat.tilelang.take_turns(turns)
        if ahead == 0:
            with compat.tilelang.side_by_side() as failed:
                for size in SIZES[:2]:
                    add(size)(torch.zeros(size), torch.zeros(size))
                while not log.exists() or len(log.read_text().split()) < 2:
                    time.sleep(0.01)
                os.write(begin, b"!")
            os._exit(len(failed))
        os.read(begun, 1)
        with compat.tilelang.side_by_side() as failed:
            for size in SIZES[:2]:
                add(size)(torch.zeros(size), torch.zeros(size))
    finally:
        JITKernel._compile_and_create_adapter = original
        compat.tilelang.take_turns(None)
    assert failed == []
    assert os.waitstatus_to_exitcode(os.waitpid(ahead, 0)[1]) == 1
    assert log.read_text().split() == ["ahead", "ahead", "run"]
    for size in SIZES[:2]:
        b = torch.zeros(size)
        add(size)(torch.zeros(size), b)
        assert torch.equal(b, torch.ones(size))
    assert not compiled


def test_its_compiler_still_takes_kernels_in_turn() -> None:
    """Without the patch a call returns a kernel that is compiled."""
    add = adder()
    assert all(isinstance(add(size), JITKernel) for size in SIZES)
