#!/usr/bin/env python3
"""Tokens per second and memory of decoding, Oryx against transformers' Llama and Mamba-2 of its size, in one run.

    python benchmarks/decode.py --contexts 1024 8192 32768 131072 --batches 1 32 --output results/decode.json

Every side decodes greedily over a static cache that already holds `context` tokens (random keys, values and states: the
time of a step does not depend on them), with steps replayed as CUDA graphs. Where the cache does not fit, the largest
batch that does is taken. `host syncs` is checked, not assumed: a step that waits for the device ends the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, StaticCache

from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import ModelConfig, RouterConfig
from oryx_megatron.data.files import replacing
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.fields import to_hf_config
from oryx_megatron.hf.modeling_oryx import OryxCache, OryxDecoder, OryxForCausalLM, plan_mask
from oryx_megatron.hf.router_oryx import RouterShape, RouterSteps

WARM = 4
"""Steps of each kind before the clock: two as they are, one to record the graph, one to replay it."""
RESERVE = 4 << 30
"""Bytes kept free beside weights and cache."""


@dataclass(frozen=True)
class Result:
    """One side at one context and batch."""

    side: str
    context: int
    batch: int
    milliseconds: float
    """Median of a step."""
    tokens_per_second: float
    gib: float
    """Peak memory: weights, cache and step."""


Step = Callable[[Tensor], Tensor]
"""Tokens [b] → logits [b, vocabulary]."""


def measure(step: Step, batch: int, steps: int, device: torch.device, waits: bool = False) -> float:
    """Milliseconds per token of `steps` greedy steps. Unless it `waits`, the host must not wait for the device."""
    tokens = torch.zeros(batch, dtype=torch.long, device=device)
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(steps):
            tokens = step(tokens).argmax(-1)
        return (time.perf_counter() - begun) * 1e3 / steps
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if waits else "error")
    try:
        marks[0].record()
        for mark in marks[1:]:
            tokens = step(tokens).argmax(-1)
            mark.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[-1]) / steps


def oryx_step(
    model: OryxForCausalLM, context: int, batch: int, steps: int, plan: str, *, keep_kv: bool, graph: bool
) -> Step:
    """A decoder whose cache holds `context` tokens, warmed up on every kind of step that `plan` has."""
    config, device = model.config, model.device
    cache = OryxCache(config, context + steps + 4 * WARM, keep_kv)
    first = torch.zeros(batch, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        model(first, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        kept = (layer.keys, layer.values) if layer.keep_kv else ()
        for tensor in (*kept, layer.conv_states[0], layer.recurrent_states[0]):
            if tensor is not None:
                tensor.normal_(std=0.1)
        layer.cumulative_length.fill_(context)
    decoder = OryxDecoder(model, cache, torch.full((batch, 1), context, device=device))
    if not graph:
        decoder.seen = dict.fromkeys(("attention", "recurrent"), -(1 << 30))
    attends = plan_mask(plan, steps, chunk=1).tolist()
    for kind in sorted({"attention" if a else "recurrent" for a in attends}):
        for _ in range(WARM):
            decoder.step(first[:, 0], kind)
    modes = iter(["attention" if a else "recurrent" for a in attends])
    return lambda tokens: decoder.step(tokens, next(modes))


def routed_step(model: OryxForCausalLM, context: int, batch: int, steps: int, plan: str) -> Step:
    """As `oryx_step`, with a decision of the router before every token, which the host waits for as `generate` does.

    What the model writes here is noise, so the modes are those of `plan`, not the router's: the share is exact.
    """
    router = model.model.mode_router
    decode = oryx_step(model, context, batch, steps, plan, keep_kv=True, graph=True)
    first = torch.randint(model.config.vocab_size, (batch, 16), device=model.device)
    with torch.no_grad():
        _, state = router(first)
    state.history = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    decisions, least = RouterSteps(router, state, context + steps + 4 * WARM), router.threshold(0.5)
    for _ in range(WARM):
        decisions.step(first[:, :1])

    def step(tokens: Tensor) -> Tensor:
        (decisions.step(tokens[:, None]) > least).cpu()
        return decode(tokens)

    return step


def captured(forward: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> Step:
    """A step of any model as a CUDA graph over fixed inputs (as it is on a CPU)."""
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    if device.type != "cuda":
        return lambda new: forward(tokens.copy_(new[:, None]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM - 1):
            forward(tokens)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(tokens)

    def step(new: Tensor) -> Tensor:
        tokens.copy_(new[:, None])
        graph.replay()
        return logits

    step.reads = forward  # type: ignore[attr-defined] # keeps the cache alive: the graph holds addresses only
    step(tokens[:, 0])
    return step


def llama_step(model: LlamaForCausalLM, context: int, batch: int, steps: int) -> Step:
    """A step of transformers' Llama over a static cache that holds `context` tokens."""
    config, device = model.config, model.device
    cache = StaticCache(config=config, max_cache_len=context + steps + 4 * WARM)
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, device)
    for layer in cache.layers:
        layer.keys.normal_(std=0.1)
        layer.values.normal_(std=0.1)
        layer.cumulative_length.fill_(context)
    position = torch.full((batch, 1), context, device=device)

    def forward(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True).logits
        position.add_(1)
        return logits[:, -1]

    return captured(forward, batch, device)


def mamba_step(model: Mamba2ForCausalLM, batch: int) -> Step:
    """A step of transformers' Mamba-2, whose states are as large after any context."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, 8, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)

    def forward(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    return captured(forward, batch, model.device)


def kv_bytes(model: ModelConfig, context: int) -> int:
    """Bytes of keys and values of one sequence, bf16."""
    layers = sum(modes != "recurrent" for modes in model.layer_modes)
    return 2 * model.kv_heads * (model.qk_head_dim + model.v_head_dim) * layers * context


def fitting(batch: int, each: int, device: torch.device) -> int:
    """The largest batch up to `batch` whose caches of `each` bytes fit into the free memory; 0: none."""
    if device.type != "cuda":
        return batch
    gc.collect()
    torch.cuda.empty_cache()
    return min(batch, max(0, torch.cuda.mem_get_info()[0] - RESERVE) // max(each, 1))


def build(kind: str, model: ModelConfig, llama_ffn: int, device: torch.device, dtype: torch.dtype):
    """A randomly initialised model of one side."""
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            if kind in ("oryx", "hybrid"):
                config = to_hf_config(model)
                config.router = (
                    RouterShape(model.vocab_size, table=RouterConfig.table).to_dict() if kind == "oryx" else None
                )
                made = OryxForCausalLM(config).eval()
                if config.router is not None:
                    made.model.mode_router.float()  # as from_pretrained keeps it
                return made
            if kind == "llama":
                config = LlamaConfig(
                    vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=llama_ffn,
                    num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
                    num_key_value_heads=model.kv_heads, head_dim=model.qk_head_dim, tie_word_embeddings=True,
                    max_position_embeddings=1 << 18,
                )  # fmt: skip
                return LlamaForCausalLM(config).eval()
            config = Mamba2Config(
                vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=2 * model.num_layers,
                num_heads=2 * model.hidden_size // 64, head_dim=64, state_size=128, n_groups=1, expand=2,
                tie_word_embeddings=True,
            )  # fmt: skip
            return Mamba2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


SIDES = {
    "oryx attention": ("attention", True, True),
    "oryx ratio 0.1": ("ratio:0.1", True, True),
    "oryx router 0.1": ("ratio:0.1", True, True),
    "oryx recurrent": ("recurrent", True, True),
    "oryx recurrent, keep_kv off": ("recurrent", False, True),
    "oryx recurrent, keep_kv off, no graph": ("recurrent", False, False),
}
"""Name → plan, keep_kv, CUDA graph."""
ROUTED = "oryx router 0.1"
"""A router decides besides: `routed_step`."""
KINDS = ("oryx", "hybrid", "llama", "mamba2")


def cases(
    kind: str, model: Any, context: int, batch: int, fits: int, steps: int, *, first: bool
) -> Iterator[tuple[str, int, Callable[[], Step]]]:
    """What to measure of one kind at one context: the row's name, its batch, and what makes its step.

    Args:
        kind: Of KINDS.
        model: Of that kind.
        context: Tokens in the cache before the first step.
        batch: Sequences asked for.
        fits: Sequences whose caches fit; 0: none.
        steps: Timed steps.
        first: This is the first context; rows that do not depend on it are measured there only.
    """
    if kind == "mamba2":
        if first:
            yield kind, batch, functools.partial(mamba_step, model, batch)
    elif kind == "llama":
        if fits:
            yield kind, fits, functools.partial(llama_step, model, context, fits, steps)
    elif kind == "hybrid":
        if fits:
            yield (
                "hybrid 3:1",
                fits,
                functools.partial(oryx_step, model, context, fits, steps, "attention", keep_kv=True, graph=True),
            )
    else:
        for side, (plan, keep_kv, graph) in SIDES.items():
            size = fits if keep_kv else batch
            if side == ROUTED and size:
                yield side, size, functools.partial(routed_step, model, context, size, steps, plan)
            elif size and (graph or first):
                make = functools.partial(oryx_step, model, context, size, steps, plan, keep_kv=keep_kv, graph=graph)
                yield side, size, make


class Table:
    """Measures cases, prints a row for each, and keeps the results in a file as they come.

    Args:
        name: Of the device.
        device: To measure on.
        steps: Timed steps per case.
        output: JSON file; None: none.
    """

    def __init__(self, name: str, device: torch.device, steps: int, output: Path | None) -> None:
        self.name, self.device, self.steps, self.output = name, device, steps, output
        self.results: list[Result] = []

    def record(self, side: str, context: int, batch: int, make: Callable[[], Step]) -> None:
        """Measure one case."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        milliseconds = measure(make(), batch, self.steps, self.device, waits=side == ROUTED)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        result = Result(side, context, batch, milliseconds, batch * 1e3 / milliseconds, peak)
        self.results.append(result)
        self._save()  # now: the run may be cut off
        print(
            f"| {side} | {context} | {batch} | {milliseconds:.3f} | {result.tokens_per_second:,.0f} | {peak:.1f} |",
            flush=True,
        )

    def _save(self) -> None:
        if self.output is None:
            return
        about = {"device": self.name, "torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({**about, "results": [dataclasses.asdict(result) for result in self.results]}, indent=1)
        with replacing(self.output) as temporary:
            temporary.write_text(text + "\n")


def measure_kind(kind: str, config: ModelConfig, model: Any, table: Table, arguments: argparse.Namespace) -> None:
    """All cases of one kind. Its locals hold the model, which is free when this returns."""
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"| **{kind}: {count / 1e9:.2f} B parameters** | | | | | |", flush=True)
    for batch, context in itertools.product(arguments.batches, arguments.contexts):
        first = context == arguments.contexts[0]
        room = arguments.steps + 4 * WARM
        fits = fitting(batch, kv_bytes(config, context + room), table.device)
        for side, size, make in cases(kind, model, context, batch, fits, arguments.steps, first=first):
            if kind != "oryx" or arguments.only is None or side in arguments.only:
                table.record(side, context, size, make)


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure all sides and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="1.4b-gdn", help="Oryx preset or YAML (default: %(default)s)")
    parser.add_argument("--hybrid-model", default="1.4b-gdn-hybrid", help="preset by layer (default: %(default)s)")
    parser.add_argument("--llama-model", default="1.4b-transformer", help="preset that gives Llama its SwiGLU width")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=50, help="timed steps per case (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--only", nargs="*", choices=SIDES, help="only these rows of oryx")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args(argv)
    if arguments.steps < 10:
        raise ConfigError(f"--steps: {arguments.steps} should be at least 10, or ratio 0.1 has no attention step")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model_config, llama_ffn = load_model(arguments.model), load_model(arguments.llama_model).ffn_hidden_size
    hybrid_config = load_model(arguments.hybrid_model)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(name, device, arguments.steps, arguments.output)
    print(f"| {name} | context | batch | ms per step | tokens/s | peak GiB |\n|---|---|---|---|---|---|")
    for kind in arguments.sides:
        config = hybrid_config if kind == "hybrid" else model_config
        measure_kind(kind, config, build(kind, config, llama_ffn, device, dtype), table, arguments)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    summarise(table.results, arguments.contexts)
    return 0


def summarise(results: list[Result], contexts: list[int]) -> None:
    """The two claims: recurrent decode is flat in the context, and much faster than Llama at the longest."""
    for side in ("oryx recurrent", "oryx recurrent, keep_kv off"):
        for batch in sorted({r.batch for r in results if r.side == side}):
            rates = [r.tokens_per_second for r in results if r.side == side and r.batch == batch]
            if len(rates) > 1:
                print(f"{side}, batch {batch}: {min(rates) / max(rates) - 1:+.1%} from fastest to slowest context")
    longest = max(contexts)
    best = {side: max((r.tokens_per_second for r in results if r.side == side and r.context == longest), default=0.0)
            for side in ("llama", "oryx recurrent, keep_kv off", "oryx recurrent", "oryx ratio 0.1")}  # fmt: skip
    if best["llama"]:
        for side in ("oryx recurrent, keep_kv off", "oryx recurrent", "oryx ratio 0.1"):
            print(f"at {longest} tokens, largest batches: {side} is {best[side] / best['llama']:.1f} × llama")


if __name__ == "__main__":
    sys.exit(main())
