"""Tiny runs under any layout, several layouts in one set of processes: equal losses are the proof of right sharding."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from oryx_megatron import compat, parallel
from oryx_megatron.config import to_dict
from oryx_megatron.config.batch_sizes import SampleCount
from oryx_megatron.config.schema import (
    BlendEntry,
    DataConfig,
    ModelConfig,
    ModesConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from oryx_megatron.config.validate import validate

if TYPE_CHECKING:
    from oryx_megatron.checkpoint import CheckpointManager, Manifest

T = TypeVar("T")

EOD = 0
"""End-of-document token of `SyntheticText`."""


def tiny_run(mixer: str = "gdn", *, parallel: ParallelConfig | None = None, **changes: Any) -> RunConfig:
    """A run of a few thousand parameters whose heads, layers, sequence and batch divide by all small layouts.

    Keyword arguments replace fields of the run (`optimizer=…`) or, as `model__num_layers=2`, of its parts.
    """
    run = RunConfig(
        model=ModelConfig(
            name=f"tiny-{mixer}",
            mixer=mixer,  # type: ignore[arg-type]
            num_layers=4,
            hidden_size=32,
            ffn_hidden_size=64,
            num_heads=8,
            num_kv_heads=4,
            qk_head_dim=8,
            v_head_dim=16,
            vocab_size=96,
            recurrence_chunk=16,
        ),
        data=DataConfig(sequence_length=32, tokenizer="synthetic", blend=(BlendEntry(path="synthetic"),)),
        train=TrainConfig(iterations=100, global_batch_size=4),
        output_dir="unused",
        modes=ModesConfig(chunk=8, p_attention=0.2, p_recurrent=0.2),
        optimizer=OptimizerConfig(lr=1e-2),
        parallel=parallel or ParallelConfig(),
        precision=PrecisionConfig(dtype="fp32"),
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        run = dataclasses.replace(
            run, **{part: dataclasses.replace(getattr(run, part), **{field: value}) if field else value}
        )
    return run


class SyntheticText(torch.utils.data.Dataset):
    """Random samples with a document end in every tenth place; sample i is a function of (seed, i)."""

    name = "synthetic"
    identity: dict[str, Any] = {"name": "synthetic"}  # noqa: RUF012 - what a Blend has

    def __init__(self, run: RunConfig) -> None:
        self.run = run

    def __len__(self) -> int:
        return SampleCount.of(self.run.train).samples_at(self.run.train.iterations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length, vocab = self.run.data.sequence_length, self.run.model.vocab_size
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + index)
        text = torch.randint(1, vocab, (length + 1,), generator=generator)
        text[torch.rand(length + 1, generator=generator) < 0.1] = EOD
        # Half of the text repeats its past, so that both mixers have something to learn.
        text[length // 2 :] = text[: length + 1 - length // 2].clone()
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": torch.ones(length)}


class Session:
    """Model, optimizer and data of one run on this rank, without files: what Trainer holds, for tests and benchmarks.

    Process groups are made (over all ranks of torch.distributed's world); `close` leaves the model-parallel ones.
    """

    def __init__(self, run: RunConfig, *, iteration: int = 0, build: Callable[[RunConfig], Any] | None = None) -> None:
        parallel.initialize(run.parallel, seed=run.seed)
        from megatron.core import parallel_state

        from oryx_megatron.train.batches import open_stream
        from oryx_megatron.train.engine import MegatronEngine

        self.run, self.layout = run, validate(run, torch.distributed.get_world_size())
        self.count = SampleCount.of(run.train)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.engine = (build or MegatronEngine)(run)
        self.chunks, self.optimizer = self.engine.chunks, self.engine.optimizer
        self.iteration = iteration
        self.engine.rewind(iteration)
        self.stream = open_stream(
            run,
            self.layout,
            SyntheticText(run),  # type: ignore[arg-type]
            data_rank=self.data_rank,
            eod=EOD,
            vocab_size=run.model.vocab_size,
            consumed=self.count.samples_at(iteration),
            microbatches=self.layout.microbatches_from(iteration, self.count, run.train),
        )

    def step(self) -> tuple[float, float]:
        """One optimizer step; mean loss and gradient norm, equal on all ranks."""
        from oryx_megatron.train.batches import training_batches
        from oryx_megatron.train.engine import take_step

        batches = training_batches(
            self.stream.next_batches(),
            self.run.modes,
            seed=self.run.seed,
            iteration=self.iteration,
            data_rank=self.data_rank,
            data_size=self.layout.dp,
            layers=self.run.model.reads_plans,
        )
        found = take_step(self.engine, batches)
        self.iteration += 1
        return found

    def steps(self, count: int) -> list[tuple[float, float]]:
        """`step`, `count` times."""
        return [self.step() for _ in range(count)]

    def weights(self) -> dict[str, Tensor]:
        """Copies of this rank's weights by name, fused ones in their parts (train/freeze.py)."""
        from megatron.core.utils import unwrap_model

        from oryx_megatron.train.freeze import named_parts

        return {
            name: parameter.detach()[rows].clone()
            for chunk in self.chunks
            for parameter, parts in named_parts(unwrap_model(chunk), tied=True)
            for name, rows in parts.items()
        }

    def checkpoints(self, root: Path) -> CheckpointManager:
        """A manager of this session's checkpoints under `root`."""
        return self.engine.checkpoints(root)

    def manifest(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """A manifest with what loading needs, for `CheckpointManager.save`."""
        from oryx_megatron.checkpoint import Manifest

        return Manifest(
            iteration=self.iteration,
            consumed_samples=self.count.samples_at(self.iteration),
            config=to_dict(self.run),
            layout={name: getattr(self.layout, name) for name in ("tp", "pp", "vpp", "cp", "dp")},
            rng={"seed": self.run.seed},
            data={"train": self.stream.state()},
            evaluations=[],
            versions={},
            commit=None,
            files=files,
        )

    def close(self) -> None:
        """End the reader and leave megatron-core's groups, so that another layout can follow in these processes."""
        self.stream.close()
        forget_hooks(self.chunks)
        del self.chunks, self.optimizer, self.engine
        parallel.release()
        gc.collect()


def train_and_resume(run: RunConfig, root: Path, *, before: int, after: int) -> tuple[list[float], list[float]]:
    """Losses of `before + after` steps with a checkpoint under `root` between, and of `after` steps from there."""
    with session(run) as opened:
        going = opened.steps(before)
        manager = opened.checkpoints(root)
        assert manager.save(before, opened.manifest) or manager.wait()
        going += opened.steps(after)
    with session(run, iteration=before) as opened:
        assert opened.checkpoints(root).load() is not None
        resumed = opened.steps(after)
    return [loss for loss, _ in going], [loss for loss, _ in resumed]


def forget_hooks(chunks: list[Any]) -> None:
    """Let go of chunks for good.

    The hooks of these nodes hold the chunk through torch's C++ objects, where no collector looks; and the chunk holds
    its process groups, three threads each. TransformerEngine's modules hold the config, and that the optimizer.
    """
    from megatron.core.utils import get_model_config

    for chunk in chunks:
        config = get_model_config(chunk)
        config.grad_scale_func = config.finalize_model_grads_func = config.no_sync_func = None
        config.grad_sync_func = config.param_sync_func = None
        for node in chunk.grad_accs:
            node.register_hook(lambda *_: None).hooks_dict_ref().clear()


@contextlib.contextmanager
def session(
    run: RunConfig, *, iteration: int = 0, build: Callable[[RunConfig], Any] | None = None
) -> Iterator[Session]:
    """A `Session`, closed at the end; `build`: another engine than the one of a run."""
    compat.megatron.forget_models()  # of a lone layer before, which no groups were destroyed after
    opened = Session(run, iteration=iteration, build=build)
    try:
        yield opened
    finally:
        opened.close()


class Worlds:
    """The processes of one `run_distributed` call as several smaller worlds in turn, so that they start only once.

    Four processes make two worlds of two ranks, 0 and 1, that run different cases side by side:

        for name, run in worlds.share(2, cases):
            with worlds.of(2, name), session(run) as opened: …
    """

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
        )

    def share(self, size: int, cases: Iterable[T]) -> list[T]:
        """The cases that fall to this process's world, dealt out in turn to all worlds of `size` ranks."""
        return list(cases)[self.rank // size :: self.size // size]

    @contextlib.contextmanager
    def of(self, size: int, name: str) -> Iterator[None]:
        """torch.distributed's world has `size` ranks inside; `name` is used once only per world."""
        number, rank = divmod(self.rank, size)
        store = torch.distributed.PrefixStore(f"{size}.{number}.{name}", self._store)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()  # all groups: left alone, their threads add up over the cases
