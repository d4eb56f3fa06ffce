"""Generate tokens, one by one with both states, under any mode plan: from a checkpoint, or any Decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import Manifest, check_whole, find_checkpoint, load_model_weights, read_manifest
from oryx_megatron.config.schema import ParallelConfig, RunConfig, WeightsKind
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.routed import Plans, routes
from oryx_megatron.model import LayerState, SequenceInfo, build_model
from oryx_megatron.modes import Plan, plan_for
from oryx_megatron.ops import backends

Step = Callable[[Tensor, Plan, int], Tensor]
"""Tokens [1, s], their plan and the number of tokens before them → logits [vocabulary] after the last, fp32."""


class Decoder(Protocol):
    """A model that continues a text."""

    @property
    def name(self) -> str:
        """The model's name in messages."""

    @property
    def modes(self) -> str:
        """both, attention or recurrent."""

    def plans(self, spec: str) -> Plans:
        """What makes a plan of a spec; ConfigError where it needs a router and there is none."""

    def begin(self) -> Step:
        """Steps over a new text: each reads on from the one before."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with the manifest it came with; a Decoder."""

    chunk: Any
    manifest: Manifest
    run: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """See Decoder."""
        return self.run.model.name

    @property
    def modes(self) -> str:
        """See Decoder."""
        return self.run.model.single_mode or "both"

    def plans(self, *specs: str) -> Plans:
        """See Decoder; of several specs."""
        return Plans.of_checkpoint(self.folder, self.run.modes.chunk, specs, self.run.model.reads_plans)

    def begin(self) -> Step:
        """See Decoder."""
        states: dict[int, LayerState] = {}
        return lambda tokens, plan, done: logits_of(self.chunk, tokens, plan, states, done)[0, -1].float()


def load_for_inference(path: str | Path, *, tensor: int = 1, weights: WeightsKind = "trained") -> LoadedModel:
    """Load the weights of a checkpoint, or of a run's newest one, over `tensor` tensor-parallel ranks.

    Joins the process group when there is none yet. The layout the checkpoint was written under does not matter. What
    was trained in FP8 or FP4 computes in bf16.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or without an average of the weights where that is asked.
        ConfigError: the model does not divide over `tensor` ranks.
    """
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    run = manifest.run()
    if run.model.num_heads % tensor or run.model.kv_heads % tensor or run.model.vocab_size % tensor:
        raise ConfigError(
            f"{run.model.name} with {run.model.num_heads} heads, {run.model.kv_heads} key/value heads and a vocabulary "
            f"of {run.model.vocab_size} does not divide over {tensor} ranks"
        )
    # One token is not divisible over ranks, so decoding goes without sequence parallelism.
    layout = ParallelConfig(tensor=tensor, sequence=False)
    platform.use_kernel_cache(run.kernels.cache_dir)
    parallel.initialize(layout, seed=run.seed)
    check_whole(folder, manifest)
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    chunk = build_model(run.model, layout, run.precision.of_decoding, seed=run.seed)[0]
    load_model_weights(folder, [chunk], weights)
    return LoadedModel(chunk.eval(), manifest, run, folder)


@torch.inference_mode()
def logits_of(chunk: Any, tokens: Tensor, plan: Plan, states: dict[int, LayerState], offset: int) -> Tensor:
    """Logits [b, s, vocabulary] of tokens [b, s] that follow `offset` earlier ones; `states` are advanced."""
    info = SequenceInfo.build(plan, device=platform.device(), offset=offset, states=states)
    return chunk(tokens, None, None, packed_seq_params=info, runtime_gather_output=True)


Follow = Callable[[Tensor], Plan]
"""The plan of a text that comes in parts, each int64 [s]: called with one part after the other."""


def plan_of(
    model: Decoder, spec: str, prompt: int, new_tokens: int, characters: Callable[[int], int] | None = None
) -> Plan | None:
    """The plan of `prompt` given and `new_tokens` further tokens; None where a router makes it as it reads them.

    Raises:
        ConfigError: the spec does not parse at this length, or the model lacks one of its modes, or a router.
    """
    plans, total = model.plans(spec), prompt + new_tokens
    if routes(spec):
        if plans.router is None:
            raise ConfigError(f"plan {spec}: {model.name} has no router here; train one: oryx router RUN")
        return None
    plan = plan_for(plans.layers, spec, total, chunk=plans.chunk, prompt=prompt, characters=characters)
    if model.modes != "both" and plan.attention_share != float(model.modes == "attention"):
        raise ConfigError(f"plan {spec}: model {model.name} has only the mode {model.modes}")
    return plan


def follow(plan: Plan) -> Follow:
    """The parts of a plan that is known, one after the other."""
    done = 0

    def part(tokens: Tensor) -> Plan:
        nonlocal done
        done += len(tokens)
        return plan.slice(done - len(tokens), done)

    return part


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: list[int],
    new_tokens: int,
    *,
    plan: str | Follow,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue `prompt` by up to `new_tokens` tokens and return those.

    Args:
        model: From `load_for_inference`, or an export.
        prompt: At least one token.
        new_tokens: Most tokens to add.
        plan: Mode plan over prompt and new tokens, e.g. `prompt:attention,new:recurrent`, or its parts as they come.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample among the most likely tokens of this total probability.
        seed: Of the sampling.
        stop: Token that ends the text and is not returned.
        on_token: Called with every new token.

    Raises:
        ConfigError: the plan does not parse at this length or the model lacks one of its modes.
    """
    if isinstance(plan, str):
        known = plan_of(model, plan, len(prompt), new_tokens)
        plan = model.plans(plan).follow(plan) if known is None else follow(known)
    device = platform.device()
    generator = torch.Generator(device).manual_seed(seed)
    step = model.begin()
    tokens = torch.tensor([prompt], device=device)
    result: list[int] = []
    done = 0
    while len(result) < new_tokens:
        logits = step(tokens, plan(tokens[0]), done)
        done += tokens.shape[1]
        token = _sample(logits, temperature, top_p, generator)
        if token == stop:
            break
        result.append(token)
        if on_token is not None:
            on_token(token)
        tokens = torch.tensor([[token]], device=device)
    return result


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocabulary]; all tensor-parallel ranks draw alike from equal seeds."""
    if temperature == 0:
        return int(logits.argmax())
    values, order = (logits / temperature).softmax(-1).sort(descending=True)
    # Keep each token whose predecessors have not reached top_p yet; the first always stays.
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
    return int(order[torch.multinomial(values, 1, generator=generator)])
