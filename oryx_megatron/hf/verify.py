"""Do both sides compute the same? Logits of a checkpoint and of its export, on the same text under the same plans."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import find_checkpoint, load_model_weights, read_manifest
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from oryx_megatron.errors import ConversionError
from oryx_megatron.hf.convert import recognised
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.model import SequenceInfo, build_model
from oryx_megatron.modes import Mode, ModePlan

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""fp32: greatest difference of a logit (÷ the greatest logit where all are below 1). bf16: root mean square of the
differences ÷ that of the logits."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Agreement:
    """How far the two sides are apart under one plan."""

    dtype: str
    plan: str
    difference: float
    """As `TOLERANCE` counts it."""

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE[self.dtype]


def random_plans(model: ModelConfig, length: int, count: int, seed: int) -> list[ModePlan]:
    """The pure plans and `count` random ones, with changes of mode at any token."""
    plans = [ModePlan.uniform(mode, length) for mode, present in
             ((Mode.ATTENTION, model.has_attention), (Mode.RECURRENT, model.has_recurrence)) if present]  # fmt: skip
    if model.modes != "both":
        return plans
    draw = np.random.default_rng(seed)
    return plans + [ModePlan.from_mask(draw.random(length) < draw.random()) for _ in range(count)]


def verify(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    length: int = 160,
    plans: int = 3,
    seed: int = 0,
) -> list[Agreement]:
    """Compare logits of two random texts of `length` tokens under several plans in each format.

    Holds one of the two models in memory at a time. Joins process groups of one rank while it runs.

    Raises:
        ConversionError: they disagree; the message names format, plan and difference.
    """
    source = find_checkpoint(checkpoint)
    run = read_manifest(source).run()
    tokens = torch.randint(0, run.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    chosen = random_plans(run.model, length, plans, seed)
    results = []
    for dtype in dtypes:
        trained = _checkpoint_logits(source, run.model, dtype, tokens, chosen)
        gc.collect()
        exported = _export_logits(folder, dtype, tokens, chosen)
        gc.collect()
        for plan, ours, theirs in zip(chosen, trained, exported):
            if dtype == "fp32":
                difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(max=1.0))
            else:
                difference = float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())
            results.append(Agreement(dtype, str(plan) if len(str(plan)) < 40 else f"{str(plan)[:37]}…", difference))
            if not results[-1].agrees:
                raise ConversionError(
                    f"{folder} does not compute what {source} does: {dtype} logits under plan {results[-1].plan} "
                    f"differ by {difference:.2e}, more than {TOLERANCE[dtype]:g}"
                )
    return results


@torch.inference_mode()
def _checkpoint_logits(
    source: Path, model: ModelConfig, dtype: str, tokens: Tensor, plans: list[ModePlan]
) -> list[Tensor]:
    layout = ParallelConfig(sequence=False)
    parallel.initialize(layout, seed=0)
    try:
        precision = PrecisionConfig(dtype=dtype)  # type: ignore[arg-type]
        chunk = build_model(model, layout, precision, seed=0)[0]
        load_model_weights(source, [chunk])
        chunk.eval()
        device = platform.device()
        return [
            chunk(tokens.to(device), None, None, packed_seq_params=SequenceInfo.build(plan, device=device))
            .float()
            .cpu()
            for plan in plans
        ]
    finally:
        parallel.destroy()


@torch.inference_mode()
def _export_logits(folder: str | Path, dtype: str, tokens: Tensor, plans: list[ModePlan]) -> list[Tensor]:
    recognised(folder)
    model = OryxForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype], kernels="torch")
    model.to(platform.device()).eval()  # type: ignore[arg-type]
    return [
        model(tokens.to(model.device), mode_plan=torch.from_numpy(plan.is_attention())).logits.float().cpu()
        for plan in plans
    ]
