"""README.md of an export: the model card, filled from the checkpoint's manifest."""

from __future__ import annotations

import json
from typing import Any

from oryx_megatron import arch
from oryx_megatron.checkpoint import Manifest
from oryx_megatron.config.schema import BlendEntry, ModelConfig, RunConfig, WeightsKind
from oryx_megatron.display import code, markdown

USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({folder}, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50, mode_plan="{plan}")
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def model_card(manifest: Manifest, folder: str, weights: WeightsKind = "trained") -> str:
    """Markdown with the metadata block that the Hub reads."""
    run = manifest.run()
    model, train = run.model, run.train
    tokens = manifest.consumed_samples * run.data.sequence_length
    plan = "prompt:attention,new:recurrent" if model.takes_plans else model.single_mode or "attention"
    rows = [
        ("recurrence", {"gdn": "Gated DeltaNet", "mamba2": "Mamba-2"}[model.mixer] if model.has_recurrence else "none"),
        ("modes", _modes(model)),
        ("parameters", _parameters(model)),
        ("layers, width", f"{model.num_layers}, {model.hidden_size}"),
        ("heads", f"{model.num_heads} (key/value {model.kv_heads}), {model.qk_head_dim} + {model.v_head_dim} wide"),
        *([("heads of multi-token prediction", str(model.mtp_layers))] if model.mtp_layers else []),
        ("vocabulary", f"{model.vocab_size:,} ({markdown(manifest.tokenizer['name'])})"),
        ("trained on", f"{tokens:,} tokens: {manifest.iteration:,} steps of {train.global_batch_size} × "
                       f"{run.data.sequence_length}"),
        *([("weights", _average(run))] if weights == "ema" else []),
        ("mode mix", _mix(run)),
        ("precision", _precision(run)),
    ]  # fmt: skip
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- oryx\n"
        + (f"license: {run.license}\n" if run.license is not None else "")
        + "---",
        f"# {markdown(model.name)}",
        _summary(model),
        _table(("", ""), rows),
        "## Use",
        USAGE.format(folder=_python(folder), plan=plan),
        "`mode_plan` also takes `attention`, `recurrent`, `prefix:N`, `last:N`, `ratio:R`, `every:K`, runs, or "
        "a function from position to mode."
        if model.takes_plans
        else "",
        "## Data",
        _table(("dataset", "weight"), _blend(run)),
        "## Evaluation",
        _evaluations(manifest.evaluations),
        "## Versions",
        _table(
            ("package", "version"),
            [
                *((markdown(name), markdown(version)) for name, version in sorted(manifest.versions.items())),
                ("source commit", markdown(manifest.commit or "unknown")),
            ],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _average(run: RunConfig) -> str:
    decay = "" if run.train.ema is None else f", decay {run.train.ema.decay:g}"
    return f"exponential moving average{decay}"


def _precision(run: RunConfig) -> str:
    recipes = (f", {name} {recipe}" for name in ("fp8", "fp4") if (recipe := getattr(run.precision, name)) != "none")
    return run.precision.dtype + "".join(recipes)


def _parameters(model: ModelConfig) -> str:
    counts = arch.parameter_counts(model)
    return f"{counts.total:,}" + (f", {counts.active:,} active for a token" if model.moe is not None else "")


def _modes(model: ModelConfig) -> str:
    if model.pattern:
        return f"by layer, in turn: {', '.join(model.pattern)}"
    return "attention and recurrence, chosen per token" if model.takes_plans else f"{model.modes} only"


def _summary(model: ModelConfig) -> str:
    if model.takes_plans:
        return (
            "An Oryx language model (arXiv 2605.28769): one set of weights whose tokens may each be read by softmax "
            "attention or by a linear recurrence, switching at any token."
        )
    if model.single_mode is None:
        return "A hybrid of the Oryx family (arXiv 2605.28769): each layer attends or recurs, and ignores mode plans."
    return f"A baseline of the Oryx family (arXiv 2605.28769) with {model.single_mode} mode only."


def _python(text: str) -> str:
    """A text as Python writes it, in double quotes, which ends no block of code."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\x60") if text.isprintable() else ascii(text)


def _blend(run: Any) -> list[tuple[str, str]]:
    def name(entry: BlendEntry) -> str:
        return markdown(entry.path.rsplit("/", 1)[-1])

    entries = [(name(entry), f"{entry.weight:g}") for entry in run.data.blend]
    for stage in run.data.stages:
        entries += [(f"{name(entry)} (from step {stage.start:,})", f"{entry.weight:g}") for entry in stage.blend]
    return entries or [("not recorded", "")]


def _mix(run: Any) -> str:
    modes = run.modes
    if modes.fixed is not None:
        return f"every microbatch {code(modes.fixed)}"
    rest = round(1 - modes.p_attention - modes.p_recurrent - modes.p_prompt, 6)
    split = f"{modes.p_prompt:g} {code(modes.prompt)}, " if modes.p_prompt else ""
    text = "" if modes.align == "sequence" else " that count from the start of every document"
    return (
        f"{modes.p_attention:g} all attention, {modes.p_recurrent:g} all recurrent, {split}{rest:g} mixed in chunks of "
        f"{modes.chunk}{text}"
    )


def _evaluations(results: list[dict[str, Any]]) -> str:
    if not results:
        return "None recorded in the checkpoint."
    rows = [
        (markdown(r["dataset"]), code(r["plan"]), f"{r['loss']:.4f}", f"{r['perplexity']:.3f}",
         f"{r['bits_per_byte']:.4f}", f"{r['iteration']:,}")
        for r in results
    ]  # fmt: skip
    return _table(("dataset", "mode plan", "loss", "perplexity", "bits per byte", "at step"), rows)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
