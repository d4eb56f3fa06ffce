"""Muon for the weight matrices of the blocks, AdamW for all other parameters, under tensor parallelism too.

torch.optim.Muon orthogonalises the tensor it is given; here that would be a tensor-parallel shard, or a fused
projection, and the update would depend on the layout. So each named part of a fused weight is an own matrix, gathered
over the tensor-parallel ranks before it is orthogonalised. megatron-core's Muon needs a package that is not on the
usual index for Python 3.11.

Of a layer with experts Muon has every expert's matrices, each for itself, those of the shared expert, and the router's.
So do Moonlight (arXiv 2502.16982: AdamW for norms, embedding and output alone) and megatron-core (0.16.1 and 0.19.2:
every weight of two dimensions but embedding and output).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from oryx_megatron.model.experts import expert_weights
from oryx_megatron.model.mtp import blocks, heads

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, steepest at zero (Keller Jordan's Muon; torch.optim.Muon has the same)."""
ITERATIONS = 5


@dataclass(frozen=True)
class Matrix:
    """How a weight is made of matrices on this tensor-parallel rank."""

    rows: tuple[int, ...]
    """Rows of each part; one part unless the weight is fused."""
    axis: int | None
    """Dimension that tensor parallelism splits; None: every rank that has the weight has all of it."""


def matrices(chunk: Any) -> dict[Tensor, Matrix]:
    """The weights of a model chunk that Muon updates: projections into and out of mixers and MLPs."""
    found = {}
    for head in heads(chunk):
        found[head.eh_proj.weight] = Matrix((head.eh_proj.weight.shape[0],), 0)
    for _, _, layer in blocks(chunk):
        mixer = layer.self_attention
        for weight, parts in mixer.in_proj_weights():
            found[weight] = Matrix(tuple(parts.values()), 0)
        found[mixer.out_proj.weight] = Matrix((mixer.out_proj.weight.shape[0],), 1)
        if isinstance(layer.mlp, MoELayer):
            found |= _of_experts(layer.mlp)
        else:
            found |= _of_mlp(layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight, (0, 1))
    return found


def _of_experts(layer: MoELayer) -> dict[Tensor, Matrix]:
    router = layer.router.weight
    found = {router: Matrix((router.shape[0],), None)}
    if (shared := layer.shared_experts) is not None:
        found |= _of_mlp(shared.linear_fc1.weight, shared.linear_fc2.weight, (0, 1))
    for _, fc1, fc2 in expert_weights(layer):
        found |= _of_mlp(fc1, fc2, (None, None))
    return found


def _of_mlp(fc1: Tensor, fc2: Tensor, axes: tuple[int | None, int | None]) -> dict[Tensor, Matrix]:
    half = fc1.shape[0] // 2  # gate and up
    return {fc1: Matrix((half, half), axes[0]), fc2: Matrix((fc2.shape[0],), axes[1])}


def orthogonalized(update: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrix to `update` [m, n], roughly: singular values from 0.7 to 1.2; in `dtype`."""
    a, b, c = COEFFICIENTS
    x = update.to(dtype)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon where `matrix_of` knows a parameter as a matrix, decoupled AdamW elsewhere.

    A matrix of m × n is moved by lr · 0.2 √max(m, n) · orthogonalised(momentum), which gives its update the root mean
    square of AdamW's, so that one learning rate and weight decay serve both (arXiv 2502.16982).

    Args:
        groups: Parameter groups with `lr` and `weight_decay`.
        matrix_of: Matrices of a parameter, or None. Read at every step, so it may be filled later.
        group: Tensor-parallel ranks.
        momentum: Of the matrices (Nesterov).
        betas, eps: AdamW's.
        dtype: Format of the Newton-Schulz products.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        matrix_of: Callable[[Tensor], Matrix | None],
        group: torch.distributed.ProcessGroup,
        lr: float,
        weight_decay: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.matrix_of, self.group, self.dtype = matrix_of, group, dtype
        self.momentum, self.betas, self.eps = momentum, betas, eps

    def allocate(self) -> None:
        """Give every parameter its state, all zero, as before the first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if state:
                    continue
                names = ("exp_avg", "exp_avg_sq") if self.matrix_of(parameter) is None else ("momentum_buffer",)
                state.update({name: torch.zeros_like(parameter) for name in names}, step=0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.allocate()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                matrix = self.matrix_of(parameter)
                if matrix is None:
                    self._adam(parameter, parameter.grad, state, group["lr"])
                else:
                    buffer = state["momentum_buffer"]
                    buffer.lerp_(parameter.grad, 1 - self.momentum)
                    update = parameter.grad.lerp(buffer, self.momentum)
                    parameter.add_(self._matrix_update(update, matrix), alpha=-group["lr"])

    def _adam(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], lr: float) -> None:
        (beta1, beta2), step = self.betas, state["step"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(self.eps)
        parameter.addcdiv_(state["exp_avg"], root, value=-lr / (1 - beta1**step))

    def _matrix_update(self, update: Tensor, matrix: Matrix) -> Tensor:
        pieces = []
        for part in update.split(matrix.rows):
            whole = part if matrix.axis is None else self._gathered(part, matrix.axis)
            own = orthogonalized(whole, self.dtype)
            if matrix.axis is not None:
                own = own.chunk(self.group.size(), matrix.axis)[self.group.rank()]
            pieces.append(own * (0.2 * math.sqrt(max(whole.shape))))
        return torch.cat(pieces)

    def _gathered(self, part: Tensor, axis: int) -> Tensor:
        if self.group.size() == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, axis)
