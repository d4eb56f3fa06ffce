"""Everything here needs an NVIDIA GPU."""

from __future__ import annotations

import os

import pytest
import torch

from oryx_megatron import platform


def _spread() -> None:
    """pytest -n N: each worker begins with another of the GPUs, before CUDA counts them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if worker.isdecimal() and len(devices) > 1:
        first = int(worker) % len(devices)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices[first:] + devices[:first])


_spread()
platform.use_kernel_cache(None)  # before any kernel's compiler is imported: a second run of these finds what is there


LONGEST = ("test_from_training_to_hugging_face", "test_two_gpus", "test_gated_delta_rule[fla-640", "test_new_plans")
"""What these names begin with takes a minute or more. They come first, so that no worker of `-n N` ends on one."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not ("gpu" in item.path.parts and item.name.startswith(LONGEST)))
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))
            if isinstance(item, pytest.Function) and "fp32" in item.fixturenames:
                # --dist loadgroup: those that compare with one curve go to one worker, which computes it once.
                item.add_marker(pytest.mark.xdist_group(f"fp32-{item.callspec.params['fp32']}"))
