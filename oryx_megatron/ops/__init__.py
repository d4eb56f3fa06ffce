"""Mixer kernels, one function each: a reference in plain torch, and faster backends chosen by `backends.select`."""

from oryx_megatron.ops import fused, packages
from oryx_megatron.ops.attend import attend
from oryx_megatron.ops.layout import TokenLayout
from oryx_megatron.ops.reference import (
    Rope,
    causal_conv,
    gated_delta_rule,
    gated_rms_norm,
    mode_attention,
    rms_norm,
    rope_of,
    rotary,
    ssd,
)
from oryx_megatron.ops.scans import delta_scan, ssd_scan

__all__ = [
    "Rope",
    "TokenLayout",
    "attend",
    "causal_conv",
    "delta_scan",
    "fused",
    "gated_delta_rule",
    "gated_rms_norm",
    "mode_attention",
    "packages",
    "rms_norm",
    "rope_of",
    "rotary",
    "ssd",
    "ssd_scan",
]
