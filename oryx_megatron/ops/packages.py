"""Backends of the separate steps: causal-conv1d's convolution, flash-linear-attention's gated norm.

They serve where the mixer is not fused: when decoding, and for models that the fused kernels decline.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import segments
from oryx_megatron.ops import backends
from oryx_megatron.ops.layout import isolates
from oryx_megatron.ops.reference import causal_conv, gated_rms_norm


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: Literal["silu"] | None = None,
    initial: Tensor | None = None,
    documents: Tensor | None = None,
    final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`causal_conv` by causal-conv1d, in channels-last layout; what it does not know goes to the reference."""
    strided = x.stride(-1) != 1 or any(stride % 8 for stride in x.stride()[:2])
    if (isolates(documents) and (final or initial is not None)) or x.shape[1] < weight.shape[1] or x.shape[2] % 8:
        reference = backends.reference_of(causal_conv)
        return reference(x, weight, activation=activation, initial=initial, documents=documents, final=final)
    from causal_conv1d import causal_conv1d_fn

    number = None
    if isolates(documents):
        number = segments(documents, x.shape[1], x.device).int().expand(x.shape[0], -1).contiguous()
    if initial is not None:  # the kernel wants channels last here too
        initial = initial.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    out = causal_conv1d_fn(
        (x.contiguous() if strided else x).transpose(1, 2),
        weight.to(x.dtype),
        seq_idx=number,
        initial_states=initial,
        return_final_states=final,
        activation=activation,
    )
    y, window = out if final else (out, None)
    return y.transpose(1, 2), None if window is None else window.contiguous()


def _gated_norm(o: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm` by flash-linear-attention."""
    if gate is None:
        return backends.reference_of(gated_rms_norm)(o, gate, weight, eps)
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    return rms_norm_gated(o.contiguous(), gate.contiguous(), weight, None, eps=eps)


for _part, _function, _package, _call in (
    ("convolution", "causal_conv", "causal_conv1d", _causal_conv1d),
    ("norm", "gated_rms_norm", "fla", _gated_norm),
):
    backends.register(_part, _function, _package, _call, missing=backends.package_on_gpu(_package), rank=10)
