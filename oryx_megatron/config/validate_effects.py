"""Fields that are set although another field makes them have no effect: one ConfigError line for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from oryx_megatron.config.schema import MixStage, ModesConfig, RunConfig
from oryx_megatron.errors import ConfigError


class _Effect(NamedTuple):
    name: str
    """Field that has no effect, of the run or of a section that is there."""
    has: Callable[[RunConfig], Any]
    """Whether it has one in this run."""
    why: str
    """What is missing, and what to do."""


def _mixes(run: RunConfig) -> list[ModesConfig | MixStage]:
    """Probabilities of plans, of all stages."""
    return [run.modes, *run.modes.schedule]


EFFECTS = (
    _Effect("schedule.decay_shape", lambda run: run.schedule.name == "wsd", "without schedule.name wsd; use that"),
    _Effect(
        "optimizer.muon_momentum",
        lambda run: run.optimizer.name == "muon",
        "without optimizer.name muon; use that",
    ),
    _Effect(
        "modes.layer_groups",
        lambda run: any(mix.p_layers for mix in _mixes(run)),
        "without modes.p_layers; set that",
    ),
    _Effect(
        "modes.prompt",
        lambda run: any(mix.p_prompt for mix in _mixes(run)),
        "without modes.p_prompt; set that",
    ),
    _Effect("faults.spike_window", lambda run: run.faults.spike is not None, "without faults.spike; set that"),
    _Effect("faults.max_rollbacks", lambda run: run.faults.bad_steps, "with faults.bad_steps 0; raise that"),
    _Effect("logging.profile_ranks", lambda run: run.logging.profile is not None, "without logging.profile; set that"),
    _Effect(
        "model.moe.aux_loss_over",
        lambda run: run.model.moe is not None and run.model.moe.aux_loss,
        "with model.moe.aux_loss 0; raise that",
    ),
)
"""Fields whose default says nothing. What a run may as well leave at zero or null is checked beside its own rules."""


def _without_swiglu(run: RunConfig) -> str | None:
    """Why no SwiGLU of this run can be computed again; None: one can, where its mixers are fused."""
    if run.precision.fp8 != "none" or run.precision.fp4 != "none":
        return f"with precision.{'fp8' if run.precision.fp8 != 'none' else 'fp4'}, which keeps a narrower copy of it"
    if run.kernels.mixer == "reference":
        return "with kernels.mixer reference"
    moe = run.model.moe
    if moe is not None and run.model.mtp is None and all(map(moe.in_layer, range(run.model.num_layers))):
        return "with experts in every layer"
    return None


def check_effects(run: RunConfig) -> None:
    """Raise ConfigError where a field was changed from its default and has no effect."""
    if run.parallel.recompute == "swiglu" and (why := _without_swiglu(run)) is not None:
        raise ConfigError(f"parallel.recompute: swiglu has no effect {why}; set none, mixer or full")
    for name, has, why in EFFECTS:
        *sections, field = name.split(".")
        section: Any = run
        for part in sections:
            section = getattr(section, part) if section is not None else None
        if section is None:
            continue
        default = {f.name: f.default for f in dataclasses.fields(section)}[field]
        if getattr(section, field) != default and not has(run):
            raise ConfigError(f"{name}: has no effect {why}, or remove it")
    if run.data.blend and run.data.stages and run.data.stages[0].start == 0:
        raise ConfigError("data.blend: has no effect in training, data.stages[0] takes over at step 0; remove one")
