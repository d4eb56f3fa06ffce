"""megatron-core's MLP with the choice of less memory between its two products."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from oryx_megatron.model.config import OryxTransformerConfig
from oryx_megatron.ops import fused


class FusedMLP(MLP):
    """megatron-core's MLP with SwiGLU, which under `recompute_swiglu` keeps the activation's input but not its output.

    The output is 8/3 of the residual stream a layer; to compute it again takes a hundredth of a step.
    """

    config: OryxTransformerConfig

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **unused: Any) -> tuple[Tensor, None]:
        """[s, b, d] → [s, b, d] (sharded as the input), and no bias."""
        x, _ = self.linear_fc1(hidden_states)
        y = self.activation_func(x)
        output, bias = self.linear_fc2(y)
        if self.config.recompute_swiglu and output.requires_grad:
            fused.discard_swiglu(y, x, output)
        return output, bias
