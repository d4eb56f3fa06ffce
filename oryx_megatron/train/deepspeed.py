"""DeepSpeed as a second engine: ZeRO 1 to 3 and CPU offload over the data-parallel ranks, under tensor parallelism.

The model, its tensor-parallel groups, the data, plans, schedule and evaluation are those of the other engine; DeepSpeed
(0.19) shards optimizer state (ZeRO 1), gradients (2) and parameters (3), reduces, clips and updates. Losses equal the
other engine's (tests/distributed/test_deepspeed.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from oryx_megatron import compat, platform
from oryx_megatron.checkpoint import Manifest, read_manifest, safe, store
from oryx_megatron.checkpoint.manager import Checkpoints
from oryx_megatron.checkpoint.manifest import Digests, MakeManifest, file_digest
from oryx_megatron.checkpoint.state import own_settings
from oryx_megatron.compat import deepspeed as patch
from oryx_megatron.config import to_dict
from oryx_megatron.config.schema import CheckpointConfig, DeepSpeedConfig, RunConfig
from oryx_megatron.config.validate import Layout, layout_for
from oryx_megatron.errors import CheckpointError, ConfigError
from oryx_megatron.model import OryxMixer, build_model
from oryx_megatron.train.engine import MegatronEngine, warm
from oryx_megatron.train.intervals import retention
from oryx_megatron.train.schedule import Schedule
from oryx_megatron.train.step import Microbatch, OryxProgram, Totals, launch, reduce_totals

BUCKET = 50_000_000
"""Elements that one collective reduces or gathers."""


class ModelParallelUnit:
    """megatron-core's groups by the names that DeepSpeed calls them (`mpu`); model parallel is tensor parallel here."""

    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Global ranks of the data-parallel group."""
        return torch.distributed.get_process_group_ranks(parallel_state.get_data_parallel_group())


def build(run: RunConfig, layout: Layout) -> DeepSpeedEngine:
    """See train.engine.build_engine."""
    return DeepSpeedEngine(run, layout)


class DeepSpeedEngine:
    """train.engine.Engine by DeepSpeed."""

    def __init__(self, run: RunConfig, layout: Layout) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError("engine: deepspeed is not installed; `pip install deepspeed==0.19.8`, or use megatron")
        deepspeed = patch.import_deepspeed()
        self.run, self.layout = run, layout
        (model,) = build_model(run.model, run.parallel, run.precision, seed=run.seed, z_loss=run.train.z_loss)
        warm(run, [model])
        _prepare(model, run)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model),
            lr=run.optimizer.lr,
            weight_decay=run.optimizer.weight_decay,
            betas=(run.optimizer.beta1, run.optimizer.beta2),
            eps=run.optimizer.epsilon,
        )
        size = sum(parameter.numel() for parameter in model.parameters())
        with patch.always_zero():
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                mpu=ModelParallelUnit(),
                dist_init_required=False,
                config=deepspeed_config(run, layout, bucket=min(BUCKET, size)),
            )
        self._forward = _Forward(self.engine)
        self.chunks = [self.engine.module]
        self.schedule = Schedule(run, self.engine.basic_optimizer)
        patch.reduce_in_order(self.engine)
        self._discard = False
        patch.discard_when(self.engine, lambda: self._discard)

    def gradients(self, batches: list[Microbatch]) -> Totals:
        """See Engine."""
        # DeepSpeed averages over data-parallel ranks; wanted is the mean over the tokens of the whole batch.
        tokens = torch.stack([batch.loss_mask.sum() for batch in batches]).sum().to(platform.device())
        torch.distributed.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
        scale = self.layout.dp / max(float(tokens), 1.0)
        reports: list[Tensor] = []
        for i, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            output, loss_of = launch(OryxProgram(self.run.model), iter((batch,)), self._forward)  # type: ignore[arg-type]
            total, _, report = loss_of(output)
            reports.append(report["totals"])
            self.engine.backward(total * scale, scale_wrt_gas=False)
        return reduce_totals(reports)

    def gradient_norm(self) -> Tensor:
        """See Engine."""
        from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm

        optimizer = self.engine.optimizer
        if self.run.deepspeed.zero_stage == 3:
            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        else:
            norm = optimizer.scaled_global_norm()
        return torch.tensor(math.nan if is_invalid_grad_norm(norm) else float(norm), device=platform.device())

    def update(self, norm: float) -> None:
        """See Engine; DeepSpeed finds the norm again itself."""
        self._discard = False
        self.engine.step()

    def discard(self) -> None:
        """See Engine."""
        self._discard = True
        self.engine.step()

    def learning_rate(self) -> float:
        """See Engine."""
        return float(self.engine.basic_optimizer.param_groups[0]["lr"])

    def advance(self) -> None:
        """See Engine."""
        self.schedule.step(increment=1)

    def rewind(self, iteration: int) -> None:
        """See Engine."""
        self.schedule.rewind(iteration)

    def averaged(self) -> AbstractContextManager[bool]:
        """See Engine; train.ema is refused."""
        return nullcontext(False)

    def checkpoints(self, root: Path) -> DeepSpeedCheckpoints:
        """See Engine."""
        return DeepSpeedCheckpoints(root, self.run, self.engine)

    def close(self) -> None:
        """Let go of the model and of all process groups, so that others can follow in this process."""
        self.engine.destroy()
        patch.forget_groups()
        self.chunks = []
        del self.engine, self._forward, self.schedule


class DeepSpeedCheckpoints(Checkpoints):
    """Checkpoints in DeepSpeed's format beside the usual manifest: they load under the layout that wrote them.

    tools/convert_from_deepspeed.py makes checkpoints of them that every layout and every tool reads.
    """

    def __init__(self, root: Path, run: RunConfig, engine: Any) -> None:
        super().__init__(root, retention(run))
        self.run, self.engine = run, engine
        self._failure: Exception | None = None
        patch.keep_failures(engine, self._kept)

    def _kept(self, write: Callable[..., None]) -> Callable[..., None]:
        """`write`, which leaves what went wrong in `_failure` instead of raising it."""

        def write_or_keep(*arguments: Any, **keywords: Any) -> None:
            try:
                write(*arguments, **keywords)
            except (OSError, RuntimeError) as error:  # torch.save makes some RuntimeErrors of OSErrors
                self._failure = self._failure or error

        return write_or_keep

    def save(self, iteration: int, manifest: MakeManifest) -> Path:
        """See Checkpoints; always in the foreground."""
        folder = self._on_main_rank(lambda: store.begin(self.root, iteration))
        self._failure = None
        with self._clearing(folder):
            self.engine.save_checkpoint(str(self.root), tag=folder.name, save_latest=False)
            if failures := self._failures(self._failure):
                raise CheckpointError(f"{folder}: could not be written ({failures})")
        return self._finish(folder, manifest, self._digests(folder))

    def _digests(self, folder: Path) -> Digests | OSError:
        """Of this rank's share of the files, which are all there: DeepSpeed ends a save with a barrier."""
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        try:
            return {path.name: file_digest(path) for path in sorted(folder.iterdir())[rank::world]}
        except OSError as error:
            return error

    def _fill(self, folder: Path, manifest: Manifest) -> None:
        written, run = manifest.run(), self.run
        if written.engine != "deepspeed":
            raise CheckpointError(
                f"{folder} was written by engine {written.engine}, whose checkpoints DeepSpeed cannot read; choose "
                "another output_dir"
            )
        world = torch.distributed.get_world_size()
        for name, then, now in (
            ("parallel.tensor", manifest.layout["tp"], run.parallel.tensor),
            ("the number of ranks", manifest.layout["tp"] * manifest.layout["dp"], world),
            ("deepspeed.zero_stage", written.deepspeed.zero_stage, run.deepspeed.zero_stage),
            ("precision.dtype", written.precision.dtype, run.precision.dtype),
        ):
            if then != now:
                raise CheckpointError(
                    f"{folder}: {name} was {then} and is {now}, but DeepSpeed's checkpoints load as they were written; "
                    "set it back, or convert it (oryx convert from-deepspeed)"
                )
        restore(self.engine, folder)


def restore(engine: Any, folder: Path) -> None:
    """Fill DeepSpeed's engine, new and of the same layout, from a checkpoint; CheckpointError when there is none."""
    patch.only_read_by(engine, load_file)
    with own_settings(engine.basic_optimizer), patch.keep_clip_grad(engine):
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load; use another checkpoint")


def load_file(path: str | Path, map_location: Any = None) -> Any:
    """A file of a DeepSpeed checkpoint: tensors, numbers, containers, and the three classes that DeepSpeed 0.19 adds.

    Raises:
        CheckpointError: damaged, or holding anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return safe.load_file(path, map_location, [LossScaler, ZeroStageEnum, fragment_address])


def convert(folder: Path, output: Path) -> Path:
    """Write a DeepSpeed checkpoint as one of engine megatron, with optimizer state, into the run folder `output`.

    Collective over as many ranks as wrote it; each holds its share of the model and of the optimizer twice.

    Returns:
        The new checkpoint, under output/checkpoints.

    Raises:
        CheckpointError: not written by DeepSpeed, or damaged.
    """
    manifest = read_manifest(folder)
    if not store.by_another_engine(folder):
        raise CheckpointError(f"{folder} was not written by DeepSpeed: there is nothing to convert")
    if damaged := store.damaged_files(folder, manifest):
        raise CheckpointError(f"{folder} is damaged ({', '.join(damaged[:3])}); use another checkpoint")
    written = manifest.run()
    layout = layout_for(written, torch.distributed.get_world_size())
    source = DeepSpeedEngine(written, layout)
    restore(source.engine, folder)
    run = dataclasses.replace(
        written,
        engine="megatron",
        deepspeed=DeepSpeedConfig(),
        output_dir=str(output),
        checkpoint=CheckpointConfig(keep=0),
    )
    target = MegatronEngine(run)
    _copy(source.engine, target)
    config = to_dict(dataclasses.replace(run, checkpoint=written.checkpoint))

    def make(files: Digests) -> Manifest:
        return dataclasses.replace(manifest, config=config, files=files)

    saved = target.checkpoints(output / "checkpoints").save(manifest.iteration, make)
    if saved is None:
        raise CheckpointError(f"{output}: nothing was written")
    return saved


@torch.no_grad()
def _copy(engine: Any, target: MegatronEngine) -> None:
    """Weights, fp32 masters, moments and the number of updates, each rank its own shards."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    steps = [float(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state]
    updates = torch.tensor(max(steps, default=0.0))
    compat.megatron.allocate_torch_state(target.optimizer)
    optimizers = {
        parameter: single
        for single in compat.megatron.singles(target.optimizer)
        for parameter in single.model_param_group_index_map
    }
    (model,) = (unwrap_model(chunk) for chunk in target.chunks)
    whole = dict(model.named_parameters())
    for name, parameter in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(parameter)
        state = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
        own = whole[name]
        own.copy_(weight.view_as(own))
        if own in optimizers:  # else another data-parallel rank keeps its state
            place = optimizers[own]._get_model_param_range_map(own)["param"]
            state = {k: v.flatten()[place.start : place.end] for k, v in (state | {"param": weight}).items()}
            optimizers[own]._set_main_param_and_optimizer_states(own, state | {"step": updates})


class _Forward:
    """DeepSpeed's engine where a model chunk is expected: `engine.config` is DeepSpeed's, not the model's."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.config = engine, engine.module.config

    def __call__(self, *args: Any, **keywords: Any) -> Tensor:
        return self.engine(*args, **keywords)


def deepspeed_config(run: RunConfig, layout: Layout, *, bucket: int = BUCKET) -> dict[str, Any]:
    """DeepSpeed's own config for this run."""
    settings = run.deepspeed
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": run.parallel.overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": 0}
    host = {"device": "cpu", "pin_memory": platform.has_gpu()}
    if settings.offload != "none":
        zero["offload_optimizer"] = host
    if settings.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": layout.microbatches,
        "gradient_clipping": run.optimizer.clip_grad,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW in host memory too: nothing to compile
        "bf16": {"enabled": run.precision.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }


def _prepare(model: Any, run: RunConfig) -> None:
    """What megatron-core's data-parallel wrapper would do, and what ZeRO 3 must know of the model."""
    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in model.parameters():
        # Under sequence parallelism each tensor-parallel rank saw a part of the tokens.
        if getattr(parameter, "sequence_parallel", False) and group.size() > 1:
            parameter.register_hook(lambda gradient: _summed(gradient, group))
    compat.transformer_engine.plain_weight_gradients(model)
    if run.deepspeed.zero_stage == 3:
        from deepspeed.runtime.zero import register_external_parameter
        from deepspeed.utils import set_z3_leaf_modules

        # Gather and release whole mixers: they read parameters of modules that are never called.
        set_z3_leaf_modules(model, [OryxMixer])
        if run.model.tie_embeddings:
            register_external_parameter(model.output_layer, model.embedding.word_embeddings.weight)


def _summed(gradient: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    total = gradient.contiguous().clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Vectors (norms, a_log, dt_bias, d) get no weight decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "wd_mult": 1.0},
        {"params": [p for p in parameters if p.dim() == 1], "wd_mult": 0.0},
    ]
