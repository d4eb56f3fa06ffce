"""Checkpoints: megatron-core's distributed format plus a manifest that describes the run."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
from oryx_megatron.checkpoint.manager import CheckpointManager
from oryx_megatron.checkpoint.manifest import Manifest, read_manifest
from oryx_megatron.checkpoint.state import check_whole, load_model_weights
from oryx_megatron.checkpoint.store import find_checkpoint, list_checkpoints

__all__ = [
    "CheckpointManager",
    "Manifest",
    "check_whole",
    "find_checkpoint",
    "list_checkpoints",
    "load_model_weights",
    "read_manifest",
]
