"""RMS norms, computed in fp32 (fp64 for fp64 input)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from oryx_megatron.hf.recurrences_oryx import wide
from oryx_megatron.ops import backends


@backends.dispatched("norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension; x [..., n], weight [n] -> [..., n] in x's format."""
    to = wide(x.dtype)
    return F.rms_norm(x.to(to), weight.shape, weight.to(to), eps).to(x.dtype)


@backends.dispatched("norm")
def gated_rms_norm(o: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(o) · weight · SiLU(gate), the mixer's output norm (Oryx, arXiv 2605.28769, eq. 2).

    o, gate [..., P], weight [P] -> [..., P] in o's format; without gate the norm alone.
    """
    to = wide(o.dtype)
    y = F.rms_norm(o.to(to), weight.shape, weight.to(to), eps)
    if gate is not None:
        y = y * F.silu(gate.to(to))
    return y.to(o.dtype)
