"""Do both sides compute the same? Logits of a checkpoint and of its export, on the same text under the same plans, and
what the export generates, token by token, against the checkpoint's logits of that text in one pass."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oryx_megatron import parallel, platform
from oryx_megatron.checkpoint import find_checkpoint, load_model_weights, read_manifest
from oryx_megatron.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, WeightsKind
from oryx_megatron.errors import ConversionError
from oryx_megatron.hf.folders import recognised
from oryx_megatron.hf.modeling_oryx import OryxForCausalLM
from oryx_megatron.hf.tables import CHECKPOINT_FP32
from oryx_megatron.hf.tensors import SafetensorsReader
from oryx_megatron.model import SequenceInfo, build_model
from oryx_megatron.modes import LayerPlans, Mode, ModePlan, Plan, parse_plan

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""fp32: greatest difference of a logit (÷ the greatest logit where all are below 1). bf16: root mean square of the
differences ÷ that of the logits."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Deviation:
    """How far the two sides are apart under one plan."""

    dtype: str
    plan: str
    difference: float
    """As `TOLERANCE` counts it."""

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE[self.dtype]

    def __str__(self) -> str:
        return f"verified {self.dtype} under {self.plan}: difference {self.difference:.1e}"


def random_plans(model: ModelConfig, length: int, count: int, seed: int) -> list[Plan]:
    """The pure plans and `count` random ones, with changes of mode at any token; the last differs over layers."""
    present = {Mode.ATTENTION: model.has_attention, Mode.RECURRENT: model.has_recurrence}
    plans: list[Plan] = [ModePlan.uniform(mode, length) for mode in present if present[mode]]
    if model.single_mode is not None:
        return plans
    draw = np.random.default_rng(seed)

    def drawn() -> ModePlan:
        return ModePlan.from_mask(draw.random(length) < draw.random())

    plans += [drawn() for _ in range(count)]
    if count > 1:
        plans[-1] = LayerPlans.of([drawn() for _ in range(model.num_layers)], model.reads_plans)
    return plans


def verify(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    length: int = 160,
    plans: int = 3,
    seed: int = 0,
    weights: WeightsKind = "trained",
    names: tuple[str | Path, str | Path] | None = None,
) -> list[Deviation]:
    """Compare logits of two random texts of `length` tokens under several plans in each format.

    Weights that the export has in bf16 are rounded likewise on the other side: what is compared is the computation.
    Holds one of the two models in memory at a time. Joins process groups of one rank while it runs. Messages call
    checkpoint and folder by `names`.

    Raises:
        ConversionError: they disagree; the message names format, plan and difference.
    """
    source = find_checkpoint(checkpoint)
    ours, theirs = names or (source, folder)
    run = read_manifest(source).run()
    tokens = torch.randint(0, run.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    chosen = random_plans(run.model, length, plans, seed)
    results = []
    for dtype in dtypes:
        with _trained(source, folder, run.model, dtype, weights) as logits_of:
            trained = [logits_of(tokens, plan) for plan in chosen]
        gc.collect()
        exported = _export_logits(folder, dtype, tokens, chosen)
        gc.collect()
        for plan, wanted, found in zip(chosen, trained, exported):
            if dtype == "fp32":
                difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(max=1.0))
            else:
                difference = float((wanted - found).square().mean().sqrt() / wanted.square().mean().sqrt())
            results.append(Deviation(dtype, str(plan) if len(str(plan)) < 40 else f"{str(plan)[:37]}…", difference))
            if not results[-1].agrees:
                raise ConversionError(
                    f"{theirs} does not compute what {ours} does: {dtype} logits under plan {results[-1].plan} "
                    f"differ by {difference:.2e}, more than {TOLERANCE[dtype]:g}"
                )
    return results


@dataclass(frozen=True)
class Generation:
    """How far what the export generates is from the checkpoint's logits of the same text."""

    way: str
    plan: str
    difference: float
    """Of greedy decoding: how much the checkpoint prefers another token, at most. Of beams: between the scores."""

    def __str__(self) -> str:
        return f"generated {self.way} under {self.plan}: difference {self.difference:.1e}"


def verify_generation(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    prompt: int = 24,
    new: int = 12,
    seed: int = 0,
    weights: WeightsKind = "trained",
    names: tuple[str | Path, str | Path] | None = None,
) -> list[Generation]:
    """Generate with the export in fp32 and hold every new token against the checkpoint's logits in one pass.

    Greedy, with a static cache, two prompts of different length in a batch, beams, and drafts where it has heads;
    the mode changes at the end of the prompt where a model has both. Memory and process groups as of `verify`.

    Raises:
        ConversionError: a text is not the checkpoint's; the message names the way of decoding, plan and difference.
    """
    source = find_checkpoint(checkpoint)
    ours, theirs = names or (source, folder)
    model = read_manifest(source).run().model
    plans = ["prompt:attention,new:recurrent", "prompt:recurrent,new:attention"]
    texts = _generated(folder, [model.single_mode] if model.single_mode else plans, model.vocab_size, prompt, new, seed)
    gc.collect()
    results = []
    with _trained(source, folder, model, "fp32", weights) as logits_of:
        for way, plan, start, text, score in texts:
            # The plan of a whole text covers its last token too, which generation never reads.
            logits = logits_of(text[None], parse_plan(plan, len(text), chunk=1, prompt=start))[0, start - 1 : -1]
            chosen = logits.gather(1, text[start:, None])
            if score is None:
                difference = float((logits.amax(1, keepdim=True) - chosen).max() / logits.abs().max().clamp(max=1.0))
            else:
                likely = (chosen - logits.logsumexp(1, keepdim=True)).sum() / (len(text) - start)
                difference = float((likely - score).abs())
            results.append(Generation(way, plan, difference))
            if not difference <= 2 * TOLERANCE["fp32"]:
                raise ConversionError(
                    f"{theirs} does not generate what {ours} does: {way} under plan {plan} is off by "
                    f"{difference:.2e}, more than {2 * TOLERANCE['fp32']:g}"
                )
    return results


@torch.inference_mode()
def _generated(
    folder: str | Path, plans: list[str], vocabulary: int, prompt: int, new: int, seed: int
) -> list[tuple[str, str, int, Tensor, float | None]]:
    """Way of decoding, plan, length of the prompt, text without padding, score of a beam."""
    model = _exported(folder, "fp32")
    model.generation_config.eos_token_id = None  # every text is of full length
    ids = torch.randint(0, vocabulary, (2, prompt), generator=torch.Generator().manual_seed(seed)).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, : prompt // 2] = 0
    one = mask[:1]
    texts: list[tuple[str, str, int, Tensor, float | None]] = []
    for plan in plans:
        common: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "mode_plan": plan}
        greedy = model.generate(ids[:1], attention_mask=one, **common)
        static = model.generate(ids[:1], attention_mask=one, cache_implementation="static", **common)
        batch = model.generate(ids, attention_mask=mask, **common)
        beams = model.generate(
            ids[:1], attention_mask=one, num_beams=3, return_dict_in_generate=True, output_scores=True,
            length_penalty=1.0, **common,
        )  # fmt: skip
        texts += [
            ("greedy", plan, prompt, greedy[0].cpu(), None),
            ("greedy with a static cache", plan, prompt, static[0].cpu(), None),
            *(("greedy in a batch", plan, prompt - hidden, row[hidden:].cpu(), None)
              for row, hidden in zip(batch, (0, prompt // 2))),
            ("3 beams", plan, prompt, beams.sequences[0].cpu(), float(beams.sequences_scores[0])),
        ]  # fmt: skip
        if model.config.num_nextn_predict_layers:
            drafted = model.generate(ids[:1], attention_mask=one, speculative=True, **common)
            texts.append(("greedy with drafts", plan, prompt, drafted[0].cpu(), None))
    return texts


@contextlib.contextmanager
def _trained(
    source: Path, folder: str | Path, model: ModelConfig, dtype: str, weights: WeightsKind
) -> Iterator[Callable[[Tensor, Plan], Tensor]]:
    """Logits of tokens [b, s] under a plan by the checkpoint, its weights rounded as the folder's are.

    Experts take all tokens that come to them, as those of an export do.
    """
    if model.moe is not None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, capacity_factor=None))
    layout = ParallelConfig(sequence=False)
    parallel.initialize(layout, seed=0)
    try:
        precision = PrecisionConfig(dtype=dtype)  # type: ignore[arg-type]
        chunk = build_model(model, layout, precision, seed=0)[0]
        load_model_weights(source, [chunk], weights)
        stored = SafetensorsReader(Path(folder)).dtype("model.embed_tokens.weight")
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if name.rpartition(".")[2] not in CHECKPOINT_FP32:
                    parameter.copy_(parameter.to(stored))
        chunk.eval()
        device = platform.device()

        @torch.inference_mode()
        def logits_of(tokens: Tensor, plan: Plan) -> Tensor:
            info = SequenceInfo.build(plan, device=device)
            return chunk(tokens.to(device), None, None, packed_seq_params=info).float().cpu()

        yield logits_of
    finally:
        parallel.destroy()


def _exported(folder: str | Path, dtype: str) -> Any:
    recognised(folder)
    model = OryxForCausalLM.from_pretrained(folder, dtype=_DTYPES[dtype], kernels="torch")
    return model.to(platform.device()).eval()  # type: ignore[arg-type]


@torch.inference_mode()
def _export_logits(folder: str | Path, dtype: str, tokens: Tensor, plans: list[Plan]) -> list[Tensor]:
    model = _exported(folder, dtype)
    return [
        model(tokens.to(model.device), mode_plan=torch.from_numpy(plan.is_attention())).logits.float().cpu()
        for plan in plans
    ]
