"""What the routers of a step did, in figures for the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oryx_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Figures of one step over all layers with experts."""

    load_balancing_loss: float
    """Mean over layers and microbatches, without its coefficient; 1 when even, 0 where it is not asked for."""
    router_z_loss: float
    """Mean over layers and tokens of the squared logsumexp of the router's logits, without its coefficient."""
    router_entropy: float
    """Mean over layers and tokens of the entropy of the scores over all experts, nats; at most log of their number."""
    expert_load_max: float
    """Tokens of the busiest expert of any layer, over an even share."""
    expert_load_min: float
    """Tokens of the idlest expert of any layer, over an even share."""
    dropped_share: float
    """Of the choices of all tokens in all layers, those that were dropped for lack of capacity."""
    load: tuple[tuple[float, ...], ...]
    """By layer with experts and by expert: tokens over an even share."""

    def scalars(self) -> dict[str, float]:
        """All but `load`."""
        return {name: value for name, value in vars(self).items() if name != "load"}

    def line(self, iteration: int) -> dict[str, Any]:
        """`load` for metrics.jsonl."""
        load = [[round(share, 4) for share in layer] for layer in self.load]
        return {"kind": "routing", "iteration": iteration, "expert_load": load}


def routing_of(rows: list[list[float]], model: ModelConfig, microbatches: int) -> Routing | None:
    """Figures from the sums of the routers (model/experts.py: ExpertRouter.sums), by layer with experts.

    Args:
        rows: [E + 5] of each layer, over all ranks; none without experts.
        model: Whose routers these are.
        microbatches: Of the step, over all data-parallel ranks.
    """
    if not rows or model.moe is None:
        return None
    experts, top_k, layers = model.moe.experts, model.moe.top_k, len(rows)
    load = []
    losses = squares = entropies = dropped = chosen = 0.0
    for row in rows:
        tokens, lost, entropy, square, loss = row[experts:]
        even = max(tokens * top_k / experts, 1.0)
        load.append(tuple(taken / even for taken in row[:experts]))
        losses += loss / microbatches / layers
        squares += square / max(tokens, 1.0) / layers
        entropies += entropy / max(tokens, 1.0) / layers
        dropped, chosen = dropped + lost, chosen + tokens * top_k
    return Routing(
        load_balancing_loss=losses,
        router_z_loss=squares,
        router_entropy=entropies,
        expert_load_max=max(map(max, load)),
        expert_load_min=min(map(min, load)),
        dropped_share=dropped / max(chosen, 1.0),
        load=tuple(load),
    )
