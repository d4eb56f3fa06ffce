"""Plans by spec for the texts of one model, those of its router among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.plans_oryx import routed_share
from oryx_megatron.hf.router import load_router_of, router_of
from oryx_megatron.hf.router_oryx import OryxRouter
from oryx_megatron.modes import ModePlan, Plan, plan_for


@dataclass(frozen=True)
class Plans:
    """Plans by spec, `router:R` among them, for the texts of one model."""

    chunk: int
    """Tokens per chunk of `ratio:R` and `every:K`."""
    router: OryxRouter | None = None
    layers: tuple[bool, ...] = ()
    """The model's, true for those that read plans: for plans by layer."""

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, chunk: int, specs: Iterable[str], layers: Sequence[bool] = ()) -> Plans:
        """With the router of a checkpoint where one of the specs asks for it. ConfigError where there is none."""
        routed = [spec for spec in specs if routes(spec)]
        if not routed:
            return cls(chunk, layers=tuple(layers))
        path = router_of(checkpoint)
        if not path.is_file():
            raise ConfigError(f"plan {routed[0]}: {path} is missing; train a router: oryx router {path.parent}")
        router, _ = load_router_of(checkpoint)
        return cls(chunk, router.to(platform.device()), tuple(layers))

    @classmethod
    def of_export(cls, model: Any) -> Plans:
        """Of a Hugging Face model: an Oryx export, with its router if it has one, or another that only attends."""
        config = model.config
        router, layers = getattr(model.base_model, "mode_router", None), getattr(config, "reads_plans", ())
        return cls(getattr(config, "mode_chunk", 256), router, layers)

    def of_texts(self, specs: Iterable[str]) -> dict[str, Callable[[Tensor], ModePlan]]:
        """The plan of a text by spec, for the specs that need the router."""
        return {spec: partial(self._routed, spec) for spec in specs if routes(spec)}

    def follow(self, spec: str) -> Callable[[Tensor], ModePlan]:
        """The plan of a text that comes in parts, each int64 [s]: called with one part after the other."""
        router, share, state = self.router, _share(spec), None
        assert router is not None and share is not None  # noqa: PT018 - the caller looked
        threshold = router.threshold(share)

        @torch.no_grad()
        def plan(part: Tensor) -> ModePlan:
            nonlocal state
            scores, state = router(part[None].to(router.quantiles.device), state)
            return ModePlan.from_mask((scores[0] > threshold).cpu().numpy())

        return plan

    def of(self, spec: str, tokens: Tensor, prompt: int | None = None) -> Plan:
        """The plan of a text, int64 [s]. ConfigError for a spec that does not parse or fit."""
        if not routes(spec):
            return plan_for(self.layers, spec, len(tokens), chunk=self.chunk, prompt=prompt)
        return self._routed(spec, tokens)

    def _routed(self, spec: str, tokens: Tensor) -> ModePlan:
        if self.router is None:
            raise ConfigError(f"plan {spec}: there is no router here; train one: oryx router RUN")
        return self.follow(spec)(tokens)


def routes(spec: str) -> bool:
    """Whether a spec needs a router."""
    return _share(spec) is not None


def _share(spec: str) -> float | None:
    try:
        return routed_share(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
