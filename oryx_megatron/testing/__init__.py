"""Helpers for tests of this package and of code built on it. The library itself never imports them."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
from oryx_megatron.testing.distributed import run_distributed

__all__ = ["run_distributed"]
