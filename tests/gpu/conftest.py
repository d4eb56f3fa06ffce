"""Everything here needs an NVIDIA GPU."""

from __future__ import annotations

import pytest
import torch

from oryx_megatron import platform

platform.use_kernel_cache(None)  # before any kernel's compiler is imported: a second run of these finds what is there


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU"))
