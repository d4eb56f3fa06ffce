"""Learning rates by width, so that those found on a narrow model serve a wide one (muP, arXiv 2203.03466, table 8).

The rules are megatron-core 0.19's, m being the width over `model.mup_base_hidden_size`:

| parameters | starts from (model/initialize.py) | learning rate | AdamW's epsilon |
|---|---|---|---|
| matrices inside blocks | init_std / √m | / m; under Muon / √m | / m |
| embedding and output table, vectors, convolutions | as without | as without | as without |
| logits | times 1/m: held by the final norm's weight, which starts from 1/m | / m | · m |

The last row is the factor 1/m in other words: AdamW moves g/m by 1/m of what it moves g. So neither the model nor its
exports know of it. Muon moves m × n matrices by 0.2 √max(m, n) in the spectral norm at learning rate 1, which muP wants
constant. Heads keep their size: a wider model has more of them, and attention needs no other scale.
"""

from __future__ import annotations

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

    def scaled(factor: float, epsilon: float) -> dict[str, Any]:
        """`lr_mult` only tells the groups of a checkpoint apart."""
        settings = {"max_lr": run.optimizer.lr * factor, "min_lr": run.schedule.min_lr * factor, "lr_mult": factor}
        return settings | {"eps": run.optimizer.epsilon * epsilon}

    rules: tuple[tuple[str, Callable[[torch.nn.Parameter, str], bool], dict[str, Any]], ...] = (
        ("final norm", lambda parameter, name: name.endswith(FINAL_NORM), scaled(1 / m, m)),
        ("by Muon", lambda parameter, name: by_muon(parameter), scaled(m**-0.5, 1.0)),
        ("hidden", lambda p, name: is_hidden(name, p) and not by_muon(p), scaled(1 / m, 1 / m)),
    )
    return {
        ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"mup {name}", fn=holds)): settings
        for name, holds, settings in rules
    }
