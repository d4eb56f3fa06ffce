"""The recurrences written out from the papers' equations in fp64: what the kernels are held against.

Nothing of the library is used. Shapes as there: q [b, s, H, N], k [b, s, G, N], v [b, s, G, P], gates [b, s, H].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VARIANTS = ("mamba2", "gdn")
TOKENS = {"mamba2": ("q", "k", "v", "dt"), "gdn": ("q", "k", "v", "a", "b")}
"""Inputs along the sequence, in the order of the functions' arguments; the others are per head."""
HEADS = {"mamba2": ("dt_bias", "a_log", "d"), "gdn": ("dt_bias", "a_log")}


def random_inputs(
    variant: str, s: int, *, seed: int, b: int = 2, heads: int = 4, groups: int = 2, n: int = 6, p: int = 5
):
    """Inputs by name, fp64 with fp32 values, `initial` among them."""
    shapes = {"q": (b, s, heads, n), "k": (b, s, groups, n), "v": (b, s, groups, p), "initial": (b, heads, n, p)}
    shapes |= dict.fromkeys(("dt", "a", "b"), (b, s, heads)) | dict.fromkeys(("dt_bias", "a_log", "d"), (heads,))
    generator = torch.Generator().manual_seed(seed)
    names = (*TOKENS[variant], *HEADS[variant], "initial")
    return {name: torch.randn(shapes[name], generator=generator).double() for name in names}


CASES = (
    "decay 0",
    "decay 1",
    "decay 0 and 1 in turn",
    "one key again and again",
    "zero keys and queries",
    "all zero",
)


def extremes(variant: str, case: str) -> dict[str, Tensor]:
    """Inputs of 100 tokens whose gates are at their ends."""
    x = random_inputs(variant, 100, seed=5)
    gate = x["dt" if variant == "mamba2" else "a"]
    if case == "decay 0":
        gate.fill_(60.0)
        x["a_log"].fill_(20.0)
    elif case == "decay 1":
        gate.fill_(-60.0)
    elif case == "decay 0 and 1 in turn":  # weak decays after strong ones must not drown in their sum
        gate.copy_(torch.where(gate > 1.0, 60.0, -12.0))
        x["a_log"].fill_(7.0)
    elif case == "beta 0":
        x["b"].fill_(-120.0)
    elif case == "beta 1":
        x["b"].fill_(60.0)
    elif case == "one key again and again":
        x["k"].copy_(x["k"][:, :1].clone())
        gate.fill_(-60.0)
        if variant == "gdn":
            x["b"].fill_(60.0)
    elif case == "zero keys and queries":
        x["k"][:, 10:40] = 0.0
        x["q"][:, 20:50] = 0.0
    elif case == "all zero":
        for name in ("q", "k", "v"):
            x[name].zero_()
    return x


def call(function: Callable, variant: str, inputs: dict[str, Tensor], **options):
    """Call an implementation of `ssd` or `gated_delta_rule` with inputs by name."""
    options = {name: inputs[name] for name in (*HEADS[variant], "initial") if name in inputs} | options
    return function(*(inputs[name] for name in TOKENS[variant]), **options)


def part(variant: str, inputs: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The inputs of tokens start … stop − 1; those per head and the initial state stay."""
    return {name: x[:, start:stop] if name in TOKENS[variant] else x for name, x in inputs.items()}


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Group h // (H/G) serves head h."""
    return x[:, :, [h // (heads // x.shape[2]) for h in range(heads)]]


def _factors(variant: str, x: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query rows [b, s, H, N], transition matrices and inputs of S_t = T_t S_{t−1} + E_t, and the skip term."""
    heads, n = x["q"].shape[2:]
    q, k, v = x["q"], _per_head(x["k"], heads), _per_head(x["v"], heads)
    identity = torch.eye(n, dtype=torch.float64)
    if variant == "mamba2":
        step = _softplus(x["dt"] + x["dt_bias"])
        decay = torch.exp(-torch.exp(x["a_log"]) * step)
        transition = decay[..., None, None] * identity
        entering = torch.einsum("bsh,bshn,bshp->bshnp", step, k, v)
        return q, transition, entering, x["d"][:, None] * v
    q = q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6) / n**0.5
    k = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    alpha = torch.exp(-torch.exp(x["a_log"]) * _softplus(x["a"] + x["dt_bias"]))
    beta = 1 / (1 + torch.exp(-x["b"]))
    erase = identity - torch.einsum("bsh,bshn,bshm->bshnm", beta, k, k)
    entering = torch.einsum("bsh,bshn,bshp->bshnp", beta, k, v)
    return q, alpha[..., None, None] * erase, entering, torch.zeros_like(v)


def recurrence(variant: str, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token by token: o [b, s, H, P] and the last state [b, H, N, P]."""
    q, transition, entering, skip = _factors(variant, x)
    state, outputs = x["initial"], []
    for t in range(q.shape[1]):
        state = torch.einsum("bhnm,bhmp->bhnp", transition[:, t], state) + entering[:, t]
        outputs.append(torch.einsum("bhnp,bhn->bhp", state, q[:, t]))
    return torch.stack(outputs, 1) + skip, state


def ssd_quadratic(x: dict[str, Tensor]) -> Tensor:
    """Mamba-2 as one masked matrix of decays times q_iᵀk_j, without any state."""
    heads, s = x["q"].shape[2], x["q"].shape[1]
    k, v = _per_head(x["k"], heads), _per_head(x["v"], heads)
    step = _softplus(x["dt"] + x["dt_bias"])
    log_decay = (-torch.exp(x["a_log"]) * step).movedim(1, -1)  # [b, H, s]
    # row i, column j: Σ_{j < l ≤ i} log a_l, summed term by term
    terms = log_decay.unsqueeze(-1).expand(*log_decay.shape, s).tril(-1)
    decay = terms.cumsum(-2).exp().tril()
    scores = torch.einsum("bihn,bjhn->bhij", x["q"], k) * decay * step.movedim(1, -1).unsqueeze(-2)
    first = torch.einsum("bhi,bihn,bhnp->bihp", log_decay.cumsum(-1).exp(), x["q"], x["initial"])
    return torch.einsum("bhij,bjhp->bihp", scores, v) + first + x["d"][:, None] * v


def gdn_quadratic(x: dict[str, Tensor]) -> Tensor:
    """Gated delta rule as o_i = Σ_j q_iᵀ (T_i ⋯ T_{j+1}) E_j, every product of matrices by itself (few tokens)."""
    q, transition, entering, _ = _factors("gdn", x)
    outputs = []
    for i in range(q.shape[1]):
        total, product = torch.zeros_like(x["initial"]), torch.eye(q.shape[-1], dtype=torch.float64)
        for j in range(i, -1, -1):
            total = total + product @ entering[:, j]
            product = product @ transition[:, j]
        outputs.append(torch.einsum("bhn,bhnp->bhp", q[:, i], total + product @ x["initial"]))
    return torch.stack(outputs, 1)
