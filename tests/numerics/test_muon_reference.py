"""Steps of Muon on a model with experts, held against the update written out in fp64, matrix by matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.config.schema import MoEConfig, ParallelConfig, RunConfig
from oryx_megatron.testing.layouts import Session, session, tiny_run

LR, WEIGHT_DECAY, MOMENTUM, BETAS, EPSILON, CLIP = 0.02, 0.1, 0.9, (0.8, 0.9), 1e-8, 0.5
HIDDEN, EXPERTS = 27, 5


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    platform.install()
    yield
    parallel.destroy()


def run_of(**parallel_fields: Any) -> RunConfig:
    """Experts that are narrower than the model, a shared one that is wider; all sizes odd."""
    return tiny_run(
        parallel=ParallelConfig(**parallel_fields),
        model__moe=MoEConfig(
            experts=EXPERTS, top_k=3, ffn_hidden_size=13, shared_ffn_hidden_size=31, first_dense=1, aux_loss=0.1
        ),
        model__hidden_size=HIDDEN,
        model__ffn_hidden_size=45,
        model__vocab_size=97,
        model__num_layers=2,
        optimizer__name="muon",
        optimizer__lr=LR,
        optimizer__weight_decay=WEIGHT_DECAY,
        optimizer__muon_momentum=MOMENTUM,
        optimizer__beta1=BETAS[0],
        optimizer__beta2=BETAS[1],
        optimizer__epsilon=EPSILON,
        optimizer__clip_grad=CLIP,
        schedule__name="constant",
    )


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration on the singular values themselves."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def matrices_of(name: str, rows: int, in_proj: tuple[int, ...]) -> tuple[int, ...] | None:
    """Rows of the matrices that Muon updates in a parameter; None: AdamW's."""
    if re.search(r"router\.weight$|out_proj\.weight$|linear_fc2\.weight$", name):
        return (rows,)
    if name.endswith("linear_fc1.weight"):
        return rows // 2, rows // 2
    return in_proj if name.endswith("in_proj.weight") else None


class Reference:
    """All parameters in fp64, updated one after the other."""

    def __init__(self, opened: Session) -> None:
        (chunk,) = opened.chunks
        self.names = {name.removeprefix("module."): p for name, p in chunk.named_parameters()}
        self.values = {name: parameter.detach().double() for name, parameter in self.names.items()}
        self.state: dict[str, list[Tensor]] = {}
        self.in_proj = tuple(chunk.module.decoder.layers[0].self_attention.in_proj_rows.values())
        self.steps = 0

    def step(self) -> float:
        """Update by the gradients as they are in the model, and their norm."""
        self.steps += 1
        gradients = {name: parameter.main_grad.double() for name, parameter in self.names.items()}
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        for name, gradient in gradients.items():
            self._update(name, gradient * min(1.0, CLIP / (norm + 1e-6)))
        return norm

    def _update(self, name: str, gradient: Tensor) -> None:
        value = self.values[name]
        rows = matrices_of(name, value.shape[0], self.in_proj)
        vector = value.dim() == 1 or name.endswith(".d")
        decayed = value * (1 - LR * (0.0 if vector else WEIGHT_DECAY))
        means = self.state.setdefault(name, [torch.zeros_like(value) for _ in range(1 if rows else 2)])
        if rows:
            means[0] = MOMENTUM * means[0] + (1 - MOMENTUM) * gradient
            update = MOMENTUM * means[0] + (1 - MOMENTUM) * gradient
            parts = [0.2 * max(part.shape) ** 0.5 * orthogonal(part) for part in update.split(rows)]
            self.values[name] = decayed - LR * torch.cat(parts)
            return
        for i, power in enumerate((1, 2)):
            means[i] = BETAS[i] * means[i] + (1 - BETAS[i]) * gradient**power
        first, second = (mean / (1 - beta**self.steps) for mean, beta in zip(means, BETAS))
        self.values[name] = decayed - LR * first / (second.sqrt() + EPSILON)


@pytest.mark.parametrize("sharded", [True, False])
def test_steps_are_those_of_the_update_written_out(sharded: bool) -> None:
    """Every expert's gate, up and down projection by itself, the shared expert's, the router; AdamW for the rest."""
    with session(run_of(distributed_optimizer=sharded)) as opened:
        reference = Reference(opened)
        update, norms = opened.engine.update, []

        def watched(norm: float) -> None:
            norms.append((norm, reference.step()))
            update(norm)

        opened.engine.update = watched  # type: ignore[method-assign]
        before = {name: parameter.detach().clone() for name, parameter in reference.names.items()}
        opened.steps(3)
        assert [norm for norm, _ in norms] == pytest.approx([norm for _, norm in norms], rel=1e-5)
        assert min(norm for norm, _ in norms) > CLIP
        by_muon = [name for name in before if matrices_of(name, 2, reference.in_proj)]
        assert len(by_muon) == 2 * 2 + 2 + 1 + 2 + 2 * EXPERTS  # mixers; dense; router; shared; experts
        for name, parameter in reference.names.items():
            moved, expected = parameter.detach() - before[name], reference.values[name] - before[name]
            torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=1e-3 * LR, msg=lambda m, n=name: n + m)
            assert moved.norm() > 0, name
