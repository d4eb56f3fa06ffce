"""A trained router as a file beside a run's checkpoints, and the plans that it makes of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oryx_megatron import platform
from oryx_megatron.config.plans import FORMS
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import CheckpointError, ConfigError
from oryx_megatron.hf.router_oryx import OryxRouter, shape_of, share_of
from oryx_megatron.modes import ModePlan, parse_plan

NAME = "router.safetensors"
"""In a run folder, or in a checkpoint that lies alone."""
FORMAT = "oryx-router"


def save_router(router: OryxRouter, path: Path, about: Mapping[str, Any]) -> None:
    """Write a router atomically; `about` says what it was trained for, and must be JSON."""
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in router.state_dict().items()}
    metadata = {"format": FORMAT, "shape": json.dumps(router.shape.to_dict()), "about": json.dumps(dict(about))}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def is_router(path: Path) -> bool:
    """Whether a file is one that `save_router` wrote."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def load_router(path: Path) -> tuple[OryxRouter, dict[str, Any]]:
    """A router in eval mode and what `save_router` was told about it. CheckpointError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no router; train one: oryx router RUN")
            router = OryxRouter(shape_of(json.loads(metadata["shape"])), len(file.get_slice("quantiles")[:]))
            router.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
            return router.eval(), json.loads(metadata["about"])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged router ({str(error).splitlines()[0]}); train it again") from error


def router_of(checkpoint: Path) -> Path:
    """Where the router of a checkpoint lies: in the run folder, or in a checkpoint that lies outside of one."""
    return (checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint) / NAME


@dataclass(frozen=True)
class Plans:
    """Plans by spec, `router:R` among them, for the texts of one model."""

    chunk: int
    """Tokens per chunk of `ratio:R` and `every:K`."""
    router: OryxRouter | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: Path, chunk: int, specs: Iterable[str]) -> Plans:
        """With the router of a checkpoint where one of the specs asks for it. ConfigError where there is none."""
        routed = [spec for spec in specs if routes(spec)]
        if not routed:
            return cls(chunk)
        path = router_of(checkpoint)
        if not path.is_file():
            raise ConfigError(f"plan {routed[0]}: {path} is missing; train a router: oryx router {path.parent}")
        router, _ = load_router(path)
        return cls(chunk, router.to(platform.device()))

    def of_texts(self, specs: Iterable[str]) -> dict[str, Callable[[Tensor], ModePlan]]:
        """The plan of a text by spec, for the specs that need the router."""
        return {spec: partial(self.of, spec) for spec in specs if routes(spec)}

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

    def of(self, spec: str, tokens: Tensor, prompt: int | None = None) -> ModePlan:
        """The plan of a text, int64 [s]. ConfigError for a spec that does not parse or fit."""
        share = _share(spec)
        if share is None:
            return parse_plan(spec, len(tokens), chunk=self.chunk, prompt=prompt)
        if self.router is None:
            raise ConfigError(f"plan {spec}: there is no router here; train one: oryx router RUN")
        return self.follow(spec)(tokens)


def routes(spec: str) -> bool:
    """Whether a spec needs a router."""
    return _share(spec) is not None


def _share(spec: str) -> float | None:
    try:
        return share_of(spec)
    except ValueError as error:
        raise ConfigError(f"mode plan `{spec}`: {error}; a plan is one of {FORMS}") from None
