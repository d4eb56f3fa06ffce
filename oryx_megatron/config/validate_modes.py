"""Rules of mode plans: how training draws them, and those that a run names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from oryx_megatron.config.bounds import check_ranges
from oryx_megatron.config.plans import layer_plans, parse_runs
from oryx_megatron.config.schema import MixStage, ModelConfig, ModesConfig, RouterConfig, RunConfig
from oryx_megatron.config.validate_model import divisible
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.plans_oryx import routed_share
from oryx_megatron.paths import is_url

DIVIDED = re.compile(r"runs:.*,\s*[ar]\d+.?-|prompt:.*,\s*new:|layers:.*,\s*[\w-]+=")
"""Two entries of a list that are one plan."""


def _check_plan(name: str, spec: str, model: ModelConfig, modes: ModesConfig, length: int) -> None:
    """One plan of a run: it parses at this length, is not empty by rounding, and the model has its modes."""
    try:
        parts = layer_plans(spec, model.num_layers)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if parts is not None:
        for part in dict.fromkeys(parts):
            _check_plan(name, part, model, modes, length)
        return
    try:
        runs = parse_runs(spec, length, chunk=modes.chunk)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    kind, _, value = spec.strip().partition(":")
    attends = {run[2] for run in runs}
    if True not in attends and (kind == "every" or (kind == "ratio" and float(value) > 0)):
        chunks = -(-length // modes.chunk)
        raise ConfigError(
            f"{name}: `{spec}` gives no attention at all: the {length} tokens are only {chunks} chunks of modes.chunk "
            f"{modes.chunk}; use a smaller chunk or at least ratio:{1 / chunks:g}"
        )
    if model.single_mode is not None and attends != {model.has_attention}:
        raise ConfigError(f"{name}: `{spec}` is not all {model.single_mode}, the one mode of model {model.name}")


def check_modes(run: RunConfig) -> None:
    """Checks of how plans are drawn, and of all plans that a run names; ConfigError names the field."""
    model, modes, length = run.model, run.modes, run.data.sequence_length
    divisible("data.sequence_length", length, f"modes.chunk {modes.chunk}", modes.chunk)
    if modes.align == "documents" and run.data.documents != "isolated":
        raise ConfigError("modes.align: documents needs data.documents: isolated")
    stages: list[tuple[str, ModesConfig | MixStage]] = [("modes", modes)]
    stages += [(f"modes.schedule[{i}]", stage) for i, stage in enumerate(modes.schedule)]
    for name, stage in stages:
        drawn = {"p_attention": stage.p_attention, "p_recurrent": stage.p_recurrent}
        drawn |= {key: p for key, p in (("p_prompt", stage.p_prompt), ("p_layers", stage.p_layers)) if p}
        if sum(drawn.values()) > 1 + 1e-9:
            raise ConfigError(f"{name}: {' + '.join(f'{key} {p}' for key, p in drawn.items())} is more than 1")
        only = {None: None, "attention": (1.0, 0.0), "recurrent": (0.0, 1.0)}[model.single_mode]
        if modes.fixed is None and only is not None and (stage.p_attention, stage.p_recurrent) != only:
            raise ConfigError(
                f"{name}: model {model.name} has only the mode {model.single_mode}: set p_attention: {only[0]:g} and "
                f"p_recurrent: {only[1]:g}, or modes.fixed: {model.single_mode}"
            )
    check_stages("modes.schedule", [stage.start for stage in modes.schedule], run.train.iterations)
    if modes.fixed is not None:
        if modes.schedule:
            raise ConfigError("modes.fixed: a fixed plan and modes.schedule exclude each other; remove one")
        _check_plan("modes.fixed", modes.fixed, model, modes, length)
        fixed = layer_plans(modes.fixed, model.num_layers) or (modes.fixed,)
        if modes.align == "documents" and any(plan.strip().startswith("runs:") for plan in fixed):
            raise ConfigError("modes.fixed: runs end at one place, documents do not; set modes.align: sequence")
    elif any(stage.p_prompt for _, stage in stages):
        if not modes.prompt.strip().startswith("prompt:"):
            raise ConfigError(f"modes.prompt: `{modes.prompt}` is no prompt:PLAN,new:PLAN")
        try:
            parse_runs(modes.prompt, length, chunk=modes.chunk, prompt=0, shorter=True)
        except ConfigError as error:
            raise ConfigError(f"modes.prompt: {error}") from None
    if modes.layer_groups > model.num_layers and any(stage.p_layers for _, stage in stages):
        raise ConfigError(f"modes.layer_groups: {modes.layer_groups} is more than model.num_layers {model.num_layers}")
    for i, spec in enumerate(run.evaluation.plans):
        name = f"evaluation.plans[{i}]"
        try:
            routed = routed_share(spec) is not None
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        if not routed:
            try:
                _check_plan(name, spec, model, modes, length)
            except ConfigError as error:
                raise ConfigError(f"{error}{_divided(run.evaluation.plans[i:])}") from None
        elif run.router is None:
            raise ConfigError(
                f"{name}: `{spec}` needs a router: set `router: {{}}`, which trains one when the run has ended; where "
                "there is one, use `oryx eval perplexity RUN --plans router:R`"
            )
    if len(set(run.evaluation.plans)) != len(run.evaluation.plans):
        raise ConfigError(f"evaluation.plans: a plan is given twice in {', '.join(run.evaluation.plans)}")


def _divided(specs: Sequence[str]) -> str:
    """What to do where a list without quotes divided a plan at its commas."""
    if not DIVIDED.match(",".join(specs[:2])):
        return ""
    return """; a plan with commas needs quotes of its own, in a shell '["runs:a0-32,r32-end"]'"""


def check_router_sizes(router: RouterConfig) -> None:
    """Sizes of a router within their bounds, its width divisible over the heads; ConfigError names the field."""
    check_ranges(router, "router")
    divisible("router.width", router.width, f"router.heads {router.heads}", router.heads)


def check_router(run: RunConfig) -> None:
    """A run that trains a router has both modes, texts for it, and a folder for it; ConfigError names the field."""
    if run.router is None:
        return
    check_router_sizes(run.router)
    if not run.model.takes_plans:
        raise ConfigError(f"router: no layer of model {run.model.name} reads a mode plan: remove it")
    if not run.data.split[1]:
        raise ConfigError(f"router: needs validation texts; data.split {list(run.data.split)} leaves none")
    if is_url(run.output_dir):
        raise ConfigError(f"router: output_dir {run.output_dir} is not on this machine; remove `router`")


def check_stages(name: str, starts: list[int], iterations: int) -> None:
    """Stages begin within the run, one after the other; ConfigError names the one at fault."""
    for i, start in enumerate(starts):
        if start >= iterations:
            raise ConfigError(f"{name}[{i}].start: {start} is not within the run's {iterations} iterations")
        if i and start <= starts[i - 1]:
            raise ConfigError(f"{name}[{i}].start: {start} should be after the stage before it at {starts[i - 1]}")
