"""Generate text from a training checkpoint, token by token with both states, under any mode plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import Manifest, check_whole, find_checkpoint, load_model_weights, read_manifest
from oryx_megatron.config.schema import ParallelConfig, RunConfig
from oryx_megatron.errors import ConfigError
from oryx_megatron.eval.routed import Plans
from oryx_megatron.model import LayerState, SequenceInfo, build_model
from oryx_megatron.modes import ModePlan
from oryx_megatron.ops import backends


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with the manifest it came with."""

    chunk: Any
    manifest: Manifest
    run: RunConfig
    folder: Path


def load_for_inference(path: str | Path, *, tensor: int = 1) -> LoadedModel:
    """Load the weights of a checkpoint, or of a run's newest one, over `tensor` tensor-parallel ranks.

    Joins the process group when there is none yet. The layout the checkpoint was written under does not matter.

    Raises:
        CheckpointError: no checkpoint there, or a damaged one.
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
    parallel.initialize(layout, seed=run.seed)
    check_whole(folder, manifest)
    backends.select(run.kernels, backends.Workload(run.model, run.precision.dtype))
    chunk = build_model(run.model, layout, run.precision, seed=run.seed)[0]
    load_model_weights(folder, [chunk])
    return LoadedModel(chunk.eval(), manifest, run, folder)


@torch.inference_mode()
def logits_of(chunk: Any, tokens: Tensor, plan: ModePlan, states: dict[int, LayerState], offset: int) -> Tensor:
    """Logits [b, s, vocabulary] of tokens [b, s] that follow `offset` earlier ones; `states` are advanced."""
    info = SequenceInfo.build(plan, device=platform.device(), offset=offset, states=states)
    return chunk(tokens, None, None, packed_seq_params=info, runtime_gather_output=True)


@torch.inference_mode()
def generate(
    model: LoadedModel,
    prompt: list[int],
    new_tokens: int,
    *,
    plan: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Continue `prompt` by up to `new_tokens` tokens and return those.

    Args:
        model: From `load_for_inference`.
        prompt: At least one token.
        new_tokens: Most tokens to add.
        plan: Mode plan over prompt and new tokens, e.g. `prompt:attention,new:recurrent`.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample among the most likely tokens of this total probability.
        seed: Of the sampling.
        stop: Token that ends the text and is not returned.
        on_token: Called with every new token.

    Raises:
        ConfigError: the plan does not parse at this length or the model lacks one of its modes.
    """
    total = len(prompt) + new_tokens
    plans = Plans.of_checkpoint(model.folder, model.run.modes.chunk, (plan,))
    routed = plans.follow(plan) if plans.router is not None else None
    modes = ModePlan(()) if routed else plans.of(plan, torch.zeros(total, dtype=torch.int64), len(prompt))
    single = model.run.model.single_mode
    if single is not None and modes.attention_tokens != total * model.run.model.has_attention:
        raise ConfigError(f"plan {plan}: model {model.run.model.name} has only the mode {single}")
    device = platform.device()
    generator = torch.Generator(device).manual_seed(seed)
    states: dict[int, LayerState] = {}
    tokens = torch.tensor([prompt], device=device)
    result: list[int] = []
    done = 0
    while len(result) < new_tokens:
        own = routed(tokens[0]) if routed else modes.slice(done, done + tokens.shape[1])
        logits = logits_of(model.chunk, tokens, own, states, done)
        done += tokens.shape[1]
        token = _sample(logits[0, -1].float(), temperature, top_p, generator)
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
