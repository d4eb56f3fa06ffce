"""Mixture of experts of the Hugging Face model, in plain torch. Stands alone: it is copied into exported folders.

E experts, of which each token takes k; n tokens, d hidden size, f width of an expert's SwiGLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_oryx import OryxConfig
from .recurrences_oryx import wide

FEW = 16
"""Tokens up to which the weights of their experts are gathered, so that a decoding step waits for no number."""


class OryxExpertRouter(nn.Module):
    """Which experts a token goes to, and with what weight; computed in fp32."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__()
        moe = dict(config.moe or {})
        self.top_k, self.score = moe["top_k"], moe["score"]
        self.weight = nn.Parameter(torch.empty(moe["experts"], config.hidden_size))
        self.expert_bias = None
        if moe["bias"]:  # moved by training alone, by the load and not by a gradient
            bias = torch.zeros(moe["experts"], dtype=wide(torch.get_default_dtype()))
            self.expert_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, d] → weights [n, k] and numbers of experts [n, k]."""
        dtype = wide(x.dtype)
        logits = F.linear(x.to(dtype), self.weight.to(dtype))
        if self.score == "softmax":
            if self.top_k == 1:  # over one alone it would be constant
                return logits.softmax(-1).topk(1)
            best, experts = logits.topk(self.top_k)
            return best.softmax(-1), experts
        scores = logits.sigmoid()
        ranked = scores if self.expert_bias is None else scores + self.expert_bias.to(dtype)
        experts = ranked.topk(self.top_k).indices
        weights = scores.gather(1, experts)
        return (weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.top_k > 1 else weights), experts


class OryxExperts(nn.Module):
    """The SwiGLUs of all experts."""

    def __init__(self, config: OryxConfig) -> None:
        super().__init__()
        moe, d = dict(config.moe or {}), config.hidden_size
        experts, f = moe["experts"], moe["ffn_hidden_size"]
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(experts, d, f))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """x [n, d], weights and numbers of experts [n, k] → [n, d]."""
        n, k = experts.shape
        if n <= FEW and not torch.is_grad_enabled():
            gate, up = torch.einsum("nkfd,nd->nkf", self.gate_up_proj[experts], x).chunk(2, -1)
            y = (F.silu(gate) * up * weights.unsqueeze(-1)).to(x.dtype)
            return torch.einsum("nkdf,nkf->nd", self.down_proj[experts], y)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.down_proj.shape[0]).tolist()
        rows = order // k
        y = torch.zeros_like(x)
        for expert, (own, scale) in enumerate(zip(rows.split(counts), weights.flatten()[order].split(counts))):
            if len(own):
                gate, up = F.linear(x[own], self.gate_up_proj[expert]).chunk(2, -1)
                z = (F.silu(gate) * up * scale.unsqueeze(-1)).to(x.dtype)
                y = y.index_add(0, own, F.linear(z, self.down_proj[expert]))
        return y


class OryxMoE(nn.Module):
    """Router, experts, and a SwiGLU that every token goes through; nothing is dropped, whatever training did."""

    def __init__(self, config: OryxConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.router, self.experts = OryxExpertRouter(config), OryxExperts(config)
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] → same."""
        tokens = x.flatten(0, -2)
        y = self.experts(tokens, *self.router(tokens)).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


__all__ = ["OryxExpertRouter", "OryxExperts", "OryxMoE"]
