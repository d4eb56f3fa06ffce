"""Helpers for tests of this package and of code built on it. The library itself never imports them."""

from oryx_megatron.testing.distributed import run_distributed

__all__ = ["run_distributed"]
