"""Typed run and model configs: schema, loading with overrides, validation. No torch.

`python -m oryx_megatron.config` prints the reference of all fields.
"""

from oryx_megatron.config.loading import (
    from_dict,
    is_run,
    load_model,
    load_run,
    map_paths,
    preset_names,
    to_dict,
    to_yaml,
)
from oryx_megatron.config.places import told_with_place
from oryx_megatron.config.schema import ModelConfig, ModesConfig, RunConfig
from oryx_megatron.config.validate import Layout, check_model, validate

__all__ = [
    "Layout",
    "ModelConfig",
    "ModesConfig",
    "RunConfig",
    "check_model",
    "from_dict",
    "is_run",
    "load_model",
    "load_run",
    "map_paths",
    "preset_names",
    "to_dict",
    "to_yaml",
    "told_with_place",
    "validate",
]
