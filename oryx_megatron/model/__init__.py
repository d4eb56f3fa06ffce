"""The Oryx model as megatron-core modules."""

import oryx_megatron.platform  # noqa: F401 - before megatron-core: it defers imports that nothing here uses
from oryx_megatron.model.build import build_meta, build_model
from oryx_megatron.model.mixer import OryxMixer
from oryx_megatron.model.sequence import LayerState, SequenceInfo

__all__ = ["LayerState", "OryxMixer", "SequenceInfo", "build_meta", "build_model"]
