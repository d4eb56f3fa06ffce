"""Rules across the fields of a run, and the layout of its ranks. Every error is one ConfigError line.

Single numbers are checked by the bounds in their types (bounds.py). Called before any process group or model exists, so
that a wrong config costs seconds.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.bounds import check_ranges
from oryx_megatron.config.mixer_parts import in_proj_parts
from oryx_megatron.config.schema import (
    BlendEntry,
    DataConfig,
    DeepSpeedConfig,
    FaultsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from oryx_megatron.config.validate_effects import check_effects
from oryx_megatron.config.validate_ema import check_ema
from oryx_megatron.config.validate_experts import (
    check_expert_layout,
    check_expert_run,
    check_expert_stages,
    expert_widths,
)
from oryx_megatron.config.validate_model import check_model, divisible
from oryx_megatron.config.validate_modes import check_modes, check_router, check_stages
from oryx_megatron.errors import ConfigError
from oryx_megatron.hf.plans_oryx import routed_share
from oryx_megatron.paths import is_url

FP8_MULTIPLE = 16
"""TransformerEngine's FP8 products need every matrix dimension to be a multiple of this."""
RUN_SETS = ("train", "valid")
"""Names of the parts of a run's own data."""
BLOCK_MULTIPLE = 32
"""Those of mxfp8, whose blocks share a scale, and of nvfp4, whose operands are aligned to 16 bytes."""


@dataclass(frozen=True)
class Layout:
    """How a run's ranks are used. world = tp × pp × cp × dp."""

    tp: int
    """Tensor-parallel size."""
    pp: int
    """Pipeline-parallel size."""
    vpp: int
    """Model chunks per pipeline rank; 1: no interleaving."""
    cp: int
    """Context-parallel size."""
    dp: int
    """Data-parallel size."""
    microbatches: int
    """Microbatches per step of train.global_batch_size on every data-parallel rank."""
    stage_layers: tuple[int, ...]
    """Layers on every pipeline rank, over all its model chunks."""
    ep: int = 1
    """Expert-parallel size, within tp × cp × dp."""

    def __str__(self) -> str:
        expert = f", expert {self.ep} of them" if self.ep > 1 else ""
        return f"tensor {self.tp} × pipeline {self.pp} × context {self.cp} × data {self.dp}{expert}"

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.cp * self.dp

    def microbatches_from(self, iteration: int, count: SampleCount, train: TrainConfig) -> Callable[[int], int]:
        """Microbatches on every data-parallel rank by number of steps after `iteration`.

        Raises:
            ConfigError: a batch size to come, of a run that once had another config, is not divisible.
        """
        rows = train.micro_batch_size * self.dp
        ends = [*(start for start, _ in count.sizes[1:]), train.iterations]
        for (start, size), end in zip(count.sizes, ends, strict=True):
            if end > iteration and start < train.iterations:
                name = f"the batch size of steps {max(start, iteration) + 1} to {end}"
                microbatches_of(name, size, train.micro_batch_size, self.dp, self.pp, self.vpp)
        return lambda step: count.batch_at(iteration + step) // rows

    def layers(self, rank: int) -> list[int]:
        """Numbers from 0 of the layers of a pipeline rank: megatron-core deals chunk by chunk to all ranks."""
        chunks = [layers // self.vpp for layers in self.stage_layers]
        total, before, own = sum(chunks), sum(chunks[:rank]), chunks[rank]
        return [chunk * total + before + i for chunk in range(self.vpp) for i in range(own)]


def _check_moments(run: RunConfig) -> None:
    """When a run saves, evaluates and is profiled, and which checkpoint is its best."""
    iterations, best = run.train.iterations, run.checkpoint.keep_best
    for name, steps in (("checkpoint.steps", run.checkpoint.steps), ("evaluation.steps", run.evaluation.steps)):
        if late := [step for step in steps if step > iterations]:
            raise ConfigError(f"{name}: {late[0]} is after train.iterations {iterations}")
    if best is not None:
        sets = [*(["valid"] if run.data.split[1] > 0 else []), *run.data.validation]
        known = [f"{name}/{plan}" for name in sets for plan in run.evaluation.plans if routed_share(plan) is None]
        known += [f"ema/{name}" for name in known] if run.train.ema is not None else []
        if best not in known:
            near = difflib.get_close_matches(best, known, 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known) or 'none, as there is no set'}"
            raise ConfigError(f"checkpoint.keep_best: no validation loss is called {best!r}; {hint}")
    if len(set(run.logging.profile_ranks)) != len(run.logging.profile_ranks):
        raise ConfigError(f"logging.profile_ranks: {list(run.logging.profile_ranks)} names a rank twice")
    if run.logging.profile is not None:
        first, last = run.logging.profile
        if first > last:
            raise ConfigError(f"logging.profile: the first step {first} is after the last, {last}")
        if first > iterations:
            raise ConfigError(f"logging.profile: step {first} is after train.iterations {iterations}")
        if not run.logging.profile_ranks:
            raise ConfigError("logging.profile_ranks: names no rank; name one, or set logging.profile to null")


def _check_blend(name: str, blend: tuple[BlendEntry, ...]) -> None:
    if not blend:
        raise ConfigError(f"{name}: no dataset; give at least one path")
    for i, entry in enumerate(blend):
        if not entry.path:
            raise ConfigError(f"{name}[{i}].path: is empty")
        if any(Path(other.path) == Path(entry.path) for other in blend[:i]):
            raise ConfigError(
                f"{name}[{i}].path: {entry.path} is there already; name it once, with the sum of the weights"
            )


def _check_data(data: DataConfig, iterations: int) -> None:
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: is empty")
    starts = [stage.start for stage in data.stages]
    if data.blend or not starts or starts[0] > 0:
        _check_blend("data.blend", data.blend)
    for i, stage in enumerate(data.stages):
        _check_blend(f"data.stages[{i}].blend", stage.blend)
    check_stages("data.stages", starts, iterations)
    if min(data.split) < 0 or data.split[0] <= 0 or not math.isfinite(sum(data.split)):
        raise ConfigError(
            f"data.split: {list(data.split)} should be sizes ≥ 0 of train, validation, test; train above 0"
        )
    for name, blend in data.validation.items():
        if name in RUN_SETS:
            raise ConfigError(f"data.validation.{name}: `{name}` is the split's own part; choose another name")
        _check_blend(f"data.validation.{name}", blend)


def _check_training(run: RunConfig) -> None:
    train, schedule, optimizer = run.train, run.schedule, run.optimizer
    check_stages("train.batch_schedule", [stage.start for stage in train.batch_schedule], train.iterations)
    if train.exit_after is not None and train.exit_after > train.iterations:
        raise ConfigError(f"train.exit_after: {train.exit_after} is not within the run's {train.iterations} iterations")
    _check_optimizer(optimizer, run.parallel)
    if schedule.warmup >= train.iterations:
        raise ConfigError(
            f"schedule.warmup: {schedule.warmup} should be from 0 to {train.iterations - 1}, below train.iterations"
        )
    if schedule.min_lr > optimizer.lr:
        raise ConfigError(f"schedule.min_lr: {schedule.min_lr} should be from 0 to optimizer.lr {optimizer.lr}")
    if schedule.min_lr and schedule.name == "constant":
        raise ConfigError("schedule.min_lr: has no effect with schedule.name constant; remove it, or use cosine or wsd")
    if schedule.decay is not None and schedule.name != "wsd":
        raise ConfigError(f"schedule.decay: only the wsd schedule has a final decay, not {schedule.name}")
    _check_restarts(schedule, train.iterations)
    decay = schedule.decay_in(train.iterations)
    if schedule.name == "wsd" and decay > train.iterations - schedule.warmup:
        raise ConfigError(
            f"schedule.decay: {decay} iterations after {schedule.warmup} of warm-up are not within the run's "
            f"{train.iterations}"
        )
    if schedule.name == "wsd" and decay == 1:
        raise ConfigError(
            "schedule.decay: 1 lowers the learning rate of no step, it ends with the run; use at least 2, or 0 for none"
        )
    if schedule.name == "wsd" and schedule.decay_shape == "exponential" and schedule.min_lr == 0:
        raise ConfigError("schedule.min_lr: an exponential decay needs a minimum above 0")
    if not run.output_dir:
        raise ConfigError("output_dir: is empty")
    project = run.logging.wandb_project
    if project and (len(project) > 128 or set(project) & set("/\\#?%:")):
        raise ConfigError(
            f"logging.wandb_project: {project!r} is no project of Weights & Biases: up to 128 characters, none of "
            "/ \\ # ? % : (a team is named by WANDB_ENTITY)"
        )


def _check_restarts(schedule: ScheduleConfig, iterations: int) -> None:
    """Every phase of the learning rate holds its warm-up and its decay."""
    if not schedule.restarts:
        if schedule.rewarm:
            raise ConfigError("schedule.rewarm: has no effect without schedule.restarts; remove it or name them")
        return
    if schedule.name == "constant":
        raise ConfigError("schedule.restarts: a constant learning rate has none; remove them, or use cosine or wsd")
    for i, (begin, end) in enumerate(schedule.phases(iterations)):
        name = f"schedule.restarts[{i}]" if i < len(schedule.restarts) else "train.iterations"
        if end <= begin:
            raise ConfigError(
                f"{name}: {end} should be {f'after the restart before it at {begin}' if i else 'above 0'}"
            )
        warmup = schedule.rewarm if i else schedule.warmup
        decay = schedule.decay_in(end) if schedule.name == "wsd" else 1
        if warmup + decay > end - begin:
            decays = f" and {decay} of decay" if schedule.name == "wsd" else ""
            raise ConfigError(
                f"{name}: {warmup} iterations of warm-up{decays} do not fit between {begin} and {end}; move it, or "
                f"lower schedule.{'rewarm' if i else 'warmup'}{' or schedule.decay' if decays else ''}"
            )


def _check_faults(faults: FaultsConfig) -> None:
    if faults.time_limit is not None and faults.time_limit <= faults.time_margin:
        raise ConfigError(
            f"faults.time_limit: {faults.time_limit:g} s are no more than faults.time_margin {faults.time_margin:g} s, "
            "so the run would stop at once; raise one or lower the other"
        )
    if 0 < faults.slow_rank < 1:
        raise ConfigError(f"faults.slow_rank: {faults.slow_rank} names ranks that are not slow; use at least 1, or 0")


def _check_optimizer(optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    if optimizer.name == "muon" and optimizer.cpu_offload:
        raise ConfigError("optimizer.cpu_offload: offloads AdamW's state only; set it to false, or use adamw")
    if optimizer.cpu_offload and not parallel.distributed_optimizer:
        raise ConfigError("optimizer.cpu_offload: needs parallel.distributed_optimizer; set that to true")


def _check_widths(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What tensor and context parallelism must divide."""
    tp, cp = parallel.tensor, parallel.context
    by, divisor = (f"tensor {tp}", tp) if cp == 1 else (f"tensor {tp} × context {cp}", tp * cp)
    divisible("model.num_heads", model.num_heads, by, divisor)
    divisible("model.num_kv_heads", model.kv_heads, by, divisor)
    divisible("model.ffn_hidden_size", model.ffn_hidden_size, f"tensor {tp}", tp)
    divisible("model.vocab_size", model.vocab_size, f"tensor {tp}", tp)


def _check_sequence(length: int, parallel: ParallelConfig) -> None:
    tp, cp = parallel.tensor, parallel.context
    if parallel.sequence and tp > 1:
        by = f"context {cp} × tensor {tp}" if cp > 1 else f"tensor {tp}"
        divisible("data.sequence_length", length, by, cp * tp)
    else:
        divisible("data.sequence_length", length, f"context {cp}", cp)


def stage_layers(num_layers: int, parallel: ParallelConfig) -> tuple[int, ...]:
    """Layers on every pipeline rank under megatron-core's rules; ConfigError when they do not come out even."""
    pp, vpp = parallel.pipeline, parallel.virtual_pipeline
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if vpp > 1 and pp == 1:
        raise ConfigError(f"parallel.virtual_pipeline: {vpp} model chunks need parallel.pipeline above 1")
    if pp == 1:
        if first is not None or last is not None:
            raise ConfigError("parallel.first_stage_layers and last_stage_layers need parallel.pipeline above 1")
        return (num_layers,)
    for name, layers in (("first_stage_layers", first), ("last_stage_layers", last)):
        if layers is not None and not 0 < layers < num_layers:
            raise ConfigError(f"parallel.{name}: {layers} should be from 1 to {num_layers - 1} of the model's layers")
    rest = num_layers - (first or 0) - (last or 0)
    ranks = pp - (first is not None) - (last is not None)
    given = "".join(
        f", {which} stage {layers}" for which, layers in (("first", first), ("last", last)) if layers is not None
    )
    if rest < ranks or (rest % ranks if ranks else rest):
        hint = "" if given or num_layers < pp else "; or set parallel.first_stage_layers / last_stage_layers"
        raise ConfigError(
            f"model.num_layers {num_layers} do not divide evenly over pipeline {pp}{given}: {rest} layers are left for "
            f"{ranks} stages{hint}"
        )
    middle = [rest // ranks] * ranks if ranks else []
    stages = ([first] if first is not None else []) + middle + ([last] if last is not None else [])
    for layers in stages:
        if layers % vpp:
            raise ConfigError(
                f"parallel.virtual_pipeline: a pipeline stage of {layers} layers is not divisible into {vpp} chunks "
                f"(model.num_layers {num_layers}, pipeline {pp}{given})"
            )
    return tuple(stages)


def _stage_variants(parallel: ParallelConfig, num_layers: int) -> list[ParallelConfig]:
    """The same numbers of ranks with other pipeline stages, the least changed first."""
    even = dataclasses.replace(parallel, first_stage_layers=None, last_stage_layers=None)
    if parallel.pipeline == 1:
        return [dataclasses.replace(even, virtual_pipeline=1)]
    chunks = range(parallel.virtual_pipeline, 0, -1)
    variants = [dataclasses.replace(stages, virtual_pipeline=n) for stages in (parallel, even) for n in chunks]
    if (first := uneven_first_stage(num_layers, parallel.pipeline)) is not None:
        variants.append(dataclasses.replace(even, virtual_pipeline=1, first_stage_layers=first))
    return variants


def divisors(number: int) -> list[int]:
    """Divisors of a number of ranks, from 1 on."""
    return [n for n in range(1, number + 1) if number % n == 0]


def uneven_first_stage(num_layers: int, pipeline: int) -> int | None:
    """Layers of a first stage that leave the others with equal numbers, fewer than theirs if possible.

    None where all stages can be equal, or there are not enough layers.
    """
    if num_layers % pipeline == 0 or num_layers < pipeline:
        return None
    others, more = pipeline - 1, -(-num_layers // pipeline)
    return first if (first := num_layers - others * more) > 0 else num_layers - others * (more - 1)


def _alternatives(run: RunConfig, world_size: int) -> str:
    """The nearest layouts that do use `world_size` ranks, in words."""
    parallel = run.parallel
    wanted = (parallel.tensor, parallel.pipeline, parallel.context)
    found: list[tuple[float, str]] = []
    for tp, pp, cp in itertools.product(divisors(world_size), repeat=3):
        if world_size % (tp * pp * cp):
            continue
        distance = sum(abs(math.log2(a / b)) for a, b in zip((tp, pp, cp), wanted))
        other = dataclasses.replace(parallel, tensor=tp, pipeline=pp, context=cp)
        for changes, stages in enumerate(_stage_variants(other, run.model.num_layers)):
            try:
                layout = layout_for(dataclasses.replace(run, parallel=stages), world_size)
            except ConfigError:
                continue
            how = [f"virtual {layout.vpp}"] if layout.vpp > 1 else []
            for name in ("first", "last"):
                layers = getattr(stages, f"{name}_stage_layers")
                how += [] if layers is None else [f"{name} stage {layers} layers"]
            split = f" ({', '.join(how)})" if how else ""
            text = f"tensor {tp} × pipeline {pp}{split} × context {cp} × data {layout.dp}"
            found.append((distance + 0.1 * changes, text))
            break
    found.sort()
    return (
        f"layouts that work: {'; '.join(text for _, text in found[:3])}"
        if found
        else f"no layout of {world_size} ranks fits the heads, layers, sequence and batch"
    )


def multiple_of(precision: PrecisionConfig) -> int:
    """What every dimension of a product in this FP8 or FP4 recipe must be a multiple of; 1 in bf16 and fp32."""
    if precision.fp4 != "none" or precision.fp8 == "mxfp8":
        return BLOCK_MULTIPLE
    return 1 if precision.fp8 == "none" else FP8_MULTIPLE


def _check_precision(run: RunConfig) -> None:
    precision, model, tp = run.precision, run.model, run.parallel.tensor
    if precision.fp8 != "none" and precision.fp4 != "none":
        raise ConfigError(
            f"precision.fp4: {precision.fp4} and precision.fp8 {precision.fp8} exclude each other; set one to none"
        )
    field, recipe = ("fp4", precision.fp4) if precision.fp4 != "none" else ("fp8", precision.fp8)
    for name in ("fp8_params", "fp8_attention", "bf16_first_layers", "bf16_last_layers"):
        if getattr(precision, name) and (recipe == "none" or (field == "fp4" and name.startswith("fp8"))):
            raise ConfigError(f"precision.{name}: has no effect without precision.fp8; choose a recipe or remove it")
    if recipe == "none":
        return
    for name in ("fp8_params", "fp8_attention"):
        if getattr(precision, name) and recipe == "mxfp8":
            raise ConfigError(f"precision.{name}: not with precision.fp8 mxfp8; set it to false")
    if precision.fp8_params and run.optimizer.name != "adamw":
        raise ConfigError(f"precision.fp8_params: not with optimizer.name {run.optimizer.name}; set it to false")
    if precision.fp8_params and not run.parallel.distributed_optimizer:
        raise ConfigError("precision.fp8_params: needs parallel.distributed_optimizer; set that to true")
    if precision.dtype == "fp32":
        raise ConfigError(f"precision.{field}: {recipe} needs precision.dtype bf16, not fp32")
    if precision.bf16_first_layers + precision.bf16_last_layers >= model.num_layers:
        raise ConfigError(
            f"precision.bf16_first_layers {precision.bf16_first_layers} + bf16_last_layers "
            f"{precision.bf16_last_layers} leave none of the {model.num_layers} layers in {field.upper()}"
        )
    inputs = [sum(in_proj_parts(model.with_modes(kind)).values()) for kind in sorted(model.kinds)]
    widths = {
        "model.hidden_size": model.hidden_size,
        f"model.ffn_hidden_size {model.ffn_hidden_size} / tensor {tp}": model.ffn_hidden_size // tp,
        **{f"the mixer's input projection {inner} / tensor {tp}": inner // tp for inner in inputs},
        f"the mixer's output width {model.num_heads * model.v_head_dim} / tensor {tp}": (
            model.num_heads * model.v_head_dim // tp
        ),
        **expert_widths(model.moe, tp),
    }
    multiple, what = multiple_of(precision), recipe if recipe in ("mxfp8", "nvfp4") else "FP8"
    for name, width in widths.items():
        if width % multiple:
            raise ConfigError(
                f"precision.{field}: {name} = {width} is not a multiple of {multiple}, which {what} needs"
            )
    tokens = run.data.sequence_length // run.parallel.context * run.train.micro_batch_size
    if tokens % multiple:
        raise ConfigError(
            f"precision.{field}: {tokens} tokens per rank and microbatch (data.sequence_length / context × "
            f"train.micro_batch_size) are not a multiple of {multiple}, which {what} needs"
        )


def _lies_in(path: str, folder: str) -> bool:
    """Whether a path is a folder, or below it; of URLs, by their text."""
    if is_url(path) or is_url(folder):
        return f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
    source = Path(path).resolve()
    return Path(folder).resolve() in (source, *source.parents)


def _check_storage(run: RunConfig) -> None:
    """Raise ConfigError where files cannot be written to output_dir."""
    if is_url(run.output_dir) and ("::" in run.output_dir or run.output_dir.startswith(("http:", "https:"))):
        raise ConfigError(f"output_dir: {run.output_dir}: files cannot be written there; use s3://, gs:// or the like")


def _check_engine(run: RunConfig) -> None:
    """Where a run starts, and what DeepSpeed can do of it; its layouts are checked in `layout_for`."""
    settings = run.deepspeed
    if run.init_from is not None and _lies_in(run.init_from.path, run.output_dir):
        raise ConfigError(
            f"init_from: {run.init_from.path} is of this run itself (output_dir {run.output_dir}); choose another "
            "output_dir"
        )
    if run.engine != "deepspeed":
        for name in ("zero_stage", "offload"):
            if getattr(settings, name) != getattr(DeepSpeedConfig(), name):
                raise ConfigError(f"deepspeed.{name}: has no effect with engine megatron; set engine: deepspeed")
        return
    if settings.offload == "parameters" and settings.zero_stage != 3:
        raise ConfigError("deepspeed.offload: parameters need deepspeed.zero_stage 3; use optimizer")
    for name, wrong, instead in (
        ("init_from", run.init_from is not None, "remove it"),
        ("optimizer.name", run.optimizer.name != "adamw", "use adamw"),
        ("optimizer.cpu_offload", run.optimizer.cpu_offload, "use deepspeed.offload"),
        ("parallel.distributed_optimizer", not run.parallel.distributed_optimizer, "ZeRO always shards; leave it true"),
        ("precision.fp8", run.precision.fp8 != "none", "use none"),
        ("train.freeze", bool(run.train.freeze), "remove it"),
        ("train.ema", run.train.ema is not None, "remove it"),
        ("model.mup_base_hidden_size", run.model.width_multiplier != 1, "remove it"),
        ("model.mtp", run.model.mtp is not None, "set it to null"),
        ("checkpoint.asynchronous", run.checkpoint.asynchronous, "DeepSpeed saves in the foreground; set it to false"),
        ("output_dir", is_url(run.output_dir), "DeepSpeed writes local files; give a folder"),
    ):
        if wrong:
            raise ConfigError(f"{name}: not with engine deepspeed; {instead}, or set engine: megatron")


def layout_for(run: RunConfig, world_size: int) -> Layout:
    """How `world_size` ranks are used by this run; ConfigError with the factors when they do not come out even."""
    parallel = run.parallel
    tp, pp, cp, vpp = parallel.tensor, parallel.pipeline, parallel.context, parallel.virtual_pipeline
    if world_size < 1 or world_size % (tp * pp * cp):
        raise ConfigError(
            f"world size {world_size} ≠ tensor {tp} × pipeline {pp} × context {cp} × data ? "
            f"(a multiple of {tp * pp * cp})"
        )
    if run.engine == "deepspeed":
        for name, size in (("pipeline", pp), ("virtual_pipeline", vpp), ("context", cp)):
            if size > 1:
                raise ConfigError(f"parallel.{name}: {size}, but engine deepspeed splits tensor and data only; use 1")
    _check_widths(run.model, parallel)
    _check_sequence(run.data.sequence_length, parallel)
    stages = stage_layers(run.model.num_layers, parallel)
    dp = world_size // (tp * pp * cp)
    check_expert_layout(run.model.moe, parallel, dp)
    train = run.train
    for i, stage in enumerate(train.batch_schedule):
        name = f"train.batch_schedule[{i}].global_batch_size"
        microbatches_of(name, stage.global_batch_size, train.micro_batch_size, dp, pp, vpp)
    microbatches = microbatches_of(
        "train.global_batch_size", train.global_batch_size, train.micro_batch_size, dp, pp, vpp
    )
    layout = Layout(
        tp=tp, pp=pp, vpp=vpp, cp=cp, dp=dp, microbatches=microbatches, stage_layers=stages, ep=parallel.expert
    )
    check_expert_stages(run.model.moe, [layout.layers(rank) for rank in range(pp)])
    return layout


def microbatches_of(name: str, batch: int, micro: int, dp: int, pp: int, vpp: int) -> int:
    """Microbatches per step and data-parallel rank; ConfigError, which calls the batch `name`, when not even."""
    divisible(name, batch, f"train.micro_batch_size {micro} × data {dp}", micro * dp)
    microbatches = batch // (micro * dp)
    if vpp > 1:
        # megatron-core's interleaved schedule deals microbatches out in groups of the pipeline's size.
        of = "" if name == "train.global_batch_size" else f"{name} {batch}: "
        divisible(f"{of}microbatches per step", microbatches, f"pipeline {pp} (parallel.virtual_pipeline {vpp})", pp)
    return microbatches


def check_license(license: str | None) -> None:
    """Raise ConfigError unless it is an identifier, as model cards want it."""
    if license is not None and re.fullmatch(r"[a-z0-9]([a-z0-9.+-]*[a-z0-9])?", license) is None:
        raise ConfigError(
            f"license: {license!r} is no identifier of a license as the Hub writes it, e.g. apache-2.0, mit or other"
        )


def validate(run: RunConfig, world_size: int) -> Layout:
    """Check a run as a whole for `world_size` ranks and give its layout; ConfigError at the first fault.

    A layout that does not work is told with its factors and the nearest ones that do.
    """
    check_ranges(run)
    check_model(run.model)
    _check_engine(run)
    _check_storage(run)
    _check_data(run.data, run.train.iterations)
    _check_training(run)
    _check_faults(run.faults)
    _check_moments(run)
    check_modes(run)
    check_expert_run(run)
    check_ema(run)
    check_router(run)
    check_license(run.license)
    check_effects(run)
    try:
        layout = layout_for(run, world_size)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_alternatives(run, world_size)}") from None
    _check_precision(run)
    if run.logging.profile is not None and (absent := [r for r in run.logging.profile_ranks if r >= world_size]):
        raise ConfigError(f"logging.profile_ranks: there is no rank {absent[0]} among {world_size}, counted from 0")
    return layout
