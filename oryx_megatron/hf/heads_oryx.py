"""Heads of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): each predicts one token further.

    h_t^k = layer(W [norm(embedding(x_{t+k})); norm(h_t^{k-1})])        p(x_{t+k+1}) = output(norm(h_t^k))

A head's layer has the modes of the model's last layer and reads token t in the mode that the plan of that one gives t;
behind it is a dense SwiGLU. `generate(…, speculative=…)` drafts with them (speculation_oryx.py); nothing else reads
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_oryx import OryxConfig
from .layers_oryx import OryxContext, OryxDecoderLayer, OryxRMSNorm
from .modes_oryx import LayerModes, TokenModes
from .states_oryx import TwoStates


class OryxHead(nn.Module):
    """Head number k, counted from 0."""

    def __init__(self, config: OryxConfig, k: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = OryxRMSNorm(d, eps), OryxRMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.layer = OryxDecoderLayer(config, config.num_hidden_layers + k)
        self.norm = OryxRMSNorm(d, eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, context: OryxContext, states: TwoStates | None = None
    ) -> Tensor:
        """[b, s, d] as the output layer and the next head read it.

        `embedded` [b, s, d] is of the tokens k + 1 further on, `hidden` [b, s, d] what the head before made of each
        token (the model for the first), after its last norm. `states` holds the layer's of earlier tokens.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        return self.norm(self.layer(x, context, states))


def head_modes(config: OryxConfig, modes: TokenModes | LayerModes | str, s: int) -> TokenModes:
    """Modes of s tokens in a head's layer, which reads the last layer's plan; `modes` as SlotPlan has them."""
    kind = config.modes_of(config.num_hidden_layers)
    if config.layer_modes is not None and kind != "both":
        return TokenModes.uniform(kind == "attention", s)
    own = modes.distinct[modes.of_layer[-1]] if isinstance(modes, LayerModes) else modes
    return TokenModes.uniform(own == "attention", s) if isinstance(own, str) else own
