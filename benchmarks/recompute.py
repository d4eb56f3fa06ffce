#!/usr/bin/env python
"""Memory and time that activation recompute saves and costs: bytes kept for the backward pass, by recompute mode.

    python benchmarks/recompute.py tiny-gdn --sequence 512 --batch 4
    python benchmarks/recompute.py 1.4b-gdn --sequence 4096 --batch 2 --dtype bf16

Counts the distinct storages that autograd keeps between forward and backward pass, without parameters: exact, on CPU
and GPU alike. On a GPU also prints the peak that torch's allocator saw, weights and fp32 gradients included. One rank,
one microbatch, one step after one that compiles. `swiglu` is `none` where the mixer is not fused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any, get_args

import torch

from oryx_megatron import parallel, platform
from oryx_megatron.cli import HelpFormatter, main_guard
from oryx_megatron.config import load_model
from oryx_megatron.config.schema import KernelsConfig, ModelConfig, ParallelConfig, PrecisionConfig, Recompute


class KeptBytes:
    """Bytes of the distinct storages that autograd saves inside the `with`, parameters left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage  # held, so that no other storage takes its address
        return tensor

    def __enter__(self) -> KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)

    def total(self) -> int:
        """Bytes; frees the storages."""
        count = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()
        return count


def measure(
    model: ModelConfig, recompute: Recompute, plan: str, sequence: int, batch: int, dtype: str, chunk: int
) -> dict[str, float]:
    """One forward and backward pass: kept bytes, seconds, loss, and on a GPU the peak bytes."""
    from megatron.core.utils import get_model_config

    from oryx_megatron.model import SequenceInfo, build_model
    from oryx_megatron.modes import parse_plan
    from oryx_megatron.ops import backends

    layout = ParallelConfig(recompute=recompute)
    precision = PrecisionConfig(dtype=dtype)  # type: ignore[arg-type]
    backends.select(KernelsConfig(), backends.Workload(model, dtype))
    (network,) = build_model(model, layout, precision, seed=1)
    device = platform.device()
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(model.vocab_size, (batch, sequence + 1), generator=generator).to(device)
    sort = get_model_config(network).fused_mixer
    info = SequenceInfo.build(parse_plan(plan, sequence, chunk=chunk), device=device, sort=sort)
    tokens, labels = info.arrange(text[:, :-1]), info.arrange_labels(text[:, 1:])
    network.train()

    def forward() -> torch.Tensor:
        return network(tokens, None, None, labels=labels, packed_seq_params=info).float().mean()

    if platform.has_gpu():
        for parameter in network.parameters():
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # where TransformerEngine adds
        forward().backward()
        torch.cuda.reset_peak_memory_stats()
    platform.synchronize()
    started = time.perf_counter()
    with KeptBytes(network) as kept:
        loss = forward()
    total = kept.total()
    loss.backward()
    platform.synchronize()
    seconds = time.perf_counter() - started
    return {"kept": total, "seconds": seconds, "loss": float(loss.detach()), "peak": platform.peak_memory_bytes()}


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Measure every recompute mode under every plan; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="preset or YAML file")
    parser.add_argument("--layers", type=int, help="use only so many layers")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64, help="tokens per run of one mode")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--plans", nargs="+", default=["attention", "recurrent", "ratio:0.5"])
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model)
    if arguments.layers:
        model = dataclasses.replace(model, num_layers=arguments.layers)
    parallel.initialize(ParallelConfig(), seed=1)
    tokens = arguments.sequence * arguments.batch
    print(f"{model.name}, {model.num_layers} layers × {model.hidden_size}, {arguments.batch} × {arguments.sequence} "
          f"tokens, {arguments.dtype}, {'GPU' if platform.has_gpu() else 'CPU'}")  # fmt: skip
    print(f"{'plan':<12}{'recompute':<11}{'kept MiB':>10}{'of none':>9}{'bytes/token/layer':>19}{'seconds':>9}"
          f"{'peak GiB':>10}")  # fmt: skip
    try:
        for plan in arguments.plans:
            whole = None
            for recompute in get_args(Recompute):
                found = measure(model, recompute, plan, arguments.sequence, arguments.batch, arguments.dtype,
                                arguments.chunk)  # fmt: skip
                whole = whole or found["kept"]
                peak = f"{found['peak'] / 2**30:.2f}" if found["peak"] else "–"
                print(
                    f"{plan:<12}{recompute:<11}{found['kept'] / 2**20:>10.1f}{found['kept'] / whole:>9.0%}"
                    f"{found['kept'] / tokens / model.num_layers:>19,.0f}{found['seconds']:>9.2f}{peak:>10}"
                )
    finally:
        parallel.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
