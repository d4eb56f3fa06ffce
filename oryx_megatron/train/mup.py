"""Learning rates by width, so that those found on a narrow model serve a wide one (muP, arXiv 2203.03466, table 8).

m is the width over `model.mup_base_hidden_size`, E the number of experts, which does not grow with it:

| parameters | starts from (model/initialize.py) | learning rate | AdamW's epsilon |
|---|---|---|---|
| matrices inside blocks, those of experts too | init_std / √m | / m; under Muon / √m | / m |
| routers | init_std / m | / m; under Muon / √m · √(max(E, d/m) / max(E, d)), / m where E is below the base | / m |
| embedding and output table, vectors, convolutions | as without | as without | as without |
| logits | times 1/m: held by the final norm's weight, which starts from 1/m | / m | · m |

The last row is the factor 1/m in other words: AdamW moves g/m by 1/m of what it moves g. So neither the model nor its
exports know of it. Muon moves m × n matrices by 0.2 √max(m, n) in the spectral norm at learning rate 1, which muP wants
constant. Heads keep their size: a wider model has more of them, and attention needs no other scale.

The rules are megatron-core 0.19's but for routers. Those have a few outputs however wide the model is: output matrices
in muP (table 3 of the paper: their initial variance falls with the square of the fan-in), which megatron-core starts
as if both dimensions grew. muP for experts is derived in arXiv 2508.09752.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from oryx_megatron.config.schema import RunConfig

FINAL_NORM = "final_layernorm.weight"


def is_hidden(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix inside a block: both of its dimensions grow with the width."""
    return parameter.dim() > 1 and ".layers." in name and ".conv." not in name


def is_router(name: str) -> bool:
    """Whether a parameter is a router of experts."""
    return name.endswith(".mlp.router.weight")


def _router_under_muon(width: int, m: float, experts: int) -> float:
    """Muon moves [E, d] by 0.2 √max(E, d) in the spectral norm; its logits want that times √d constant."""
    return math.sqrt(max(experts, width / m) / max(experts, width) / m)


def overrides(
    run: RunConfig, by_muon: Callable[[torch.nn.Parameter], bool] = lambda parameter: False
) -> dict[ParamKey, dict[str, Any]]:
    """megatron-core's overrides of parameter groups; none without muP.

    Args:
        run: The config.
        by_muon: Whether Muon moves a parameter.
    """
    m = run.model.width_multiplier
    if m == 1:
        return {}
    router = m**-0.5 if run.model.moe is None else _router_under_muon(run.model.hidden_size, m, run.model.moe.experts)

    def scaled(factor: float, epsilon: float) -> dict[str, Any]:
        """`lr_mult` only tells the groups of a checkpoint apart."""
        settings = {"max_lr": run.optimizer.lr * factor, "min_lr": run.schedule.min_lr * factor, "lr_mult": factor}
        return settings | {"eps": run.optimizer.epsilon * epsilon}

    rules: tuple[tuple[str, Callable[[torch.nn.Parameter, str], bool], dict[str, Any]], ...] = (
        ("final norm", lambda parameter, name: name.endswith(FINAL_NORM), scaled(1 / m, m)),
        ("by Muon", lambda p, name: by_muon(p) and not is_router(name), scaled(m**-0.5, 1.0)),
        # Muon has no epsilon: with that of hidden matrices they are one group where the factors are equal.
        ("router by Muon", lambda p, name: by_muon(p) and is_router(name), scaled(router, 1 / m)),
        ("hidden", lambda p, name: is_hidden(name, p) and not by_muon(p), scaled(1 / m, 1 / m)),
    )
    return {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"mup {name}", fn=holds)): settings
        for name, holds, settings in rules
    }
