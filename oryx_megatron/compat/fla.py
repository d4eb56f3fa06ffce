"""fla (0.6) and flash_qla (0.1): what their import loads that no run uses, most of its time.

| patch | why |
|---|---|
| `AROUND`: fla loads its layers and models, and they transformers and mamba_ssm | left out, as where fla-core is installed alone; `import fla.layers` still works |
| `AROUND`: fla.ops loads the kernels of forty recurrences | put off until a name of fla.ops itself is used |
| `AROUND`: fla.modules.activations.ops compiles seven functions at import, flash_qla two | loads inductor; put off to their first call |
| `AROUND`: both keep functions from dynamo | loads it; put off until something else does |
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from types import ModuleType

from oryx_megatron.compat.hook import Around, instead
from oryx_megatron.compat.torch import late_compile, late_disable


@contextlib.contextmanager
def _without_layers(module: ModuleType) -> Iterator[None]:
    with contextlib.ExitStack() as left_out:
        if _core_stands_alone():
            for name in ("fla.layers", "fla.models"):
                left_out.enter_context(instead(name, None))
        yield


def _core_stands_alone() -> bool:
    """Whether this fla does without its layers; before 0.6 its import fails then."""
    try:
        major, minor, *_ = importlib.metadata.version("fla-core").split(".")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False
    return (int(major), int(minor)) >= (0, 6)


@contextlib.contextmanager
def _late(module: ModuleType) -> Iterator[None]:
    with late_compile(module), late_disable(module):
        yield


AROUND: dict[str, Around] = {
    "fla": _without_layers,
    "fla.ops.gated_delta_rule": _late,
    "fla.modules.activations.ops": _late,
    "flash_qla": _late,
}
WHEN_USED = ("fla.ops",)
