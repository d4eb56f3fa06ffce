"""Real training runs under many layouts, all in one set of four processes; their folders are what the tests read."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oryx_megatron import parallel, platform
from oryx_megatron.config import load_run, validate
from oryx_megatron.testing.layouts import Worlds, forget_hooks

if TYPE_CHECKING:
    from oryx_megatron.train.trainer import Trainer

VARIANTS = ("gdn", "mamba2")
LAYOUTS = {
    "1x1x1": (),
    "2x1x1": ("parallel.tensor=2",),
    "2x1x1 whole sequence": ("parallel.tensor=2", "parallel.sequence=false"),
    "1x2x1": ("parallel.pipeline=2",),
    "1x1x2": (),
    "1x1x2 whole optimizer": ("parallel.distributed_optimizer=false",),
    "2x2x1": ("parallel.tensor=2", "parallel.pipeline=2"),
}
"""tp × pp × dp: overrides (what is left of the world is dp)."""
STEPS, HALF, BF16_STEPS, BF16_HALF = 6, 3, 24, 12
BF16 = ("precision.dtype=bf16", f"train.iterations={BF16_STEPS}", f"checkpoint.interval={BF16_HALF}")
RAMP = "train.batch_schedule=[{start: 2, global_batch_size: 8}, {start: 4, global_batch_size: 12}]"
SIZES = (4, 4, 8, 8, 12, 12)
"""Batch sizes of the steps of that ramp; a run is stopped in the middle of its second stage."""
BY_DOCUMENT = ("data.documents=isolated", "modes.align=documents", "modes.p_prompt=0.3")
MIXED = {"gdn": "layers:0=ratio:0.25,1=attention", "mamba2": "ratio:0.25"}
"""The third plan of an evaluation."""
BY_LAYER = f"evaluation.plans=[attention,recurrent,'{MIXED['gdn']}']"
YARN = "model.rope_scaling={rope_type: yarn, factor: 4, original_max_position_embeddings: 12}"
HEADS = "model.mtp={layers: 2, loss_weight: 0.3}"
FIELDS = {
    "gdn": (
        "train.z_loss=1e-2",
        "model.logit_softcap=4.0",
        "modes.p_layers=0.5",
        "modes.p_attention=0.1",
        "modes.p_recurrent=0.1",
        BY_LAYER,
    ),
    "mamba2": ("model.mixer=mamba2", *BY_DOCUMENT, RAMP, YARN, HEADS),
}
"""The variants differ in more than their mixer: the same runs cover kinds of documents and plans, losses, a ramp,
YaRN, MTP."""
CONSUMED = {"gdn": 4 * HALF, "mamba2": sum(SIZES[:HALF])}
"""Samples read half-way."""
SPECIAL = {"gdn": "2x1x1 whole sequence", "mamba2": "1x1x2 whole optimizer"}
RESUMED = {"gdn": "2x1x1", "mamba2": "1x1x2 whole optimizer"}
"""Layouts stopped half-way and resumed as they were, saved in the background."""
CHANGED = {
    "gdn": (("2x1x1", "1x2x1"), ("1x1x2", "2x1x1"), ("2x1x1", "1x1x1")),
    "mamba2": (("2x1x1", "1x2x1"), ("1x2x1", "1x1x2"), ("2x1x1", "1x1x1")),
}
"""Layouts stopped half-way and resumed under another."""


def train(config: Path, name: str, *overrides: str) -> None:
    """Run the real Trainer to its end in `config`'s folder / `name`; what it loads is evaluated into loaded.json."""
    warnings.simplefilter("ignore")
    platform.install()
    from oryx_megatron.train.trainer import Trainer

    run = load_run(config, ["model.num_layers=2", *overrides, f"output_dir={config.parent / name}"])
    parallel.initialize(run.parallel, seed=run.seed)
    try:
        trainer = Trainer(run, validate(run, torch.distributed.get_world_size()))
        if trainer.iteration:
            loaded = {result.plan: result.loss for result in trainer.evaluate()}
            (config.parent / name / "loaded.json").write_text(json.dumps(loaded))
        trainer.fit()
        close(trainer)
    finally:
        trainer = None
        parallel.release()
        gc.collect()


def take_steps(config: Path, name: str, *overrides: str) -> None:
    """The steps of `train` by a Session on the run's own data: loss and gradient norm of each into session.json."""
    from oryx_megatron.data.loader import build_datasets
    from oryx_megatron.data.tokenizer import load_tokenizer
    from oryx_megatron.testing.layouts import session
    from oryx_megatron.train.batches import open_stream

    run = load_run(config, ["model.num_layers=2", *overrides, f"output_dir={config.parent / name}"])
    with session(run) as opened:
        tokenizer = load_tokenizer(run.data.tokenizer)
        dataset = build_datasets(run, tokenizer)["train"]
        opened.stream.close()
        opened.stream = open_stream(
            run,
            opened.layout,
            dataset,
            data_rank=opened.data_rank,
            eod=tokenizer.eod_id,
            vocab_size=tokenizer.vocab_size,
            microbatches=opened.layout.microbatches_from(0, opened.count, run.train),
        )
        steps = opened.steps(run.train.iterations)
    if torch.distributed.get_rank() == 0:
        (config.parent / name / "session.json").write_text(json.dumps(steps))


def close(trainer: Any) -> None:
    """Let go of a trainer's model, under either engine, so that another can follow in this process."""
    if trainer.run.engine == "deepspeed":
        trainer.chunks = []
        trainer.engine.close()
    else:
        forget_hooks(trainer.chunks)


def copy_checkpoint(root: Path, source: str, target: str, iteration: int = HALF) -> None:
    """Give a new run the checkpoint of another (its rank 0 does)."""
    if torch.distributed.get_rank() == 0:
        name = f"checkpoints/iteration_{iteration:07d}"
        shutil.copytree(root / source / name, root / target / name)
    torch.distributed.barrier()


def train_with_broken_writer(config: Path) -> None:
    """Five steps with a save each; the second fails on the last rank only, in the fourth its writer is killed."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    written = FileSystemWriterAsync.write_preloaded_data

    def broken(*arguments: Any, **keywords: Any) -> Any:
        path = Path(keywords["write_bucket"][0])
        if path.parent.name == ".writing_0000002" and torch.distributed.get_rank() == 1:
            path.mkdir()  # so that it cannot be opened
        if path.parent.name == ".writing_0000004" and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return written(*arguments, **keywords)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(broken)
    try:
        train(config, "gdn broken writer", *LAYOUTS["2x1x1"], "train.iterations=5", "checkpoint.interval=1")
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(written)


def train_all(config: Path) -> None:
    """Everything that the tests look at; worlds of one size work side by side."""
    worlds, root = Worlds(), config.parent
    with worlds.of(4, "four"):
        for variant in VARIANTS:
            train(config, f"{variant} 2x2x1", *FIELDS[variant], *LAYOUTS["2x2x1"])
    (variant,) = worlds.share(2, VARIANTS)
    with worlds.of(2, "two"):
        fields = FIELDS[variant]
        for name in ("2x1x1", "1x2x1", "1x1x2", SPECIAL[variant]):
            half = (f"checkpoint.interval={HALF}", f"evaluation.interval={HALF}")
            train(config, f"{variant} {name}", *fields, *LAYOUTS[name], *half)
            if name in ("2x1x1", "1x1x2"):
                take_steps(config, f"{variant} {name}", *fields, *LAYOUTS[name])
        half = (*fields, *LAYOUTS[RESUMED[variant]], "checkpoint.asynchronous=true")
        train(config, f"{variant} resumed", *half, f"train.exit_after={HALF}")
        train(config, f"{variant} resumed", *half)
        for source, target in CHANGED[variant]:
            copy_checkpoint(root, f"{variant} {source}", f"{variant} {source} to {target}")
            if target != "1x1x1":
                train(config, f"{variant} {source} to {target}", *fields, *LAYOUTS[target])
        train(config, f"{variant} bf16", *fields, *BF16, *LAYOUTS["2x1x1"])
        copy_checkpoint(root, f"{variant} bf16", f"{variant} bf16 resumed", BF16_HALF)
        train(config, f"{variant} bf16 resumed", *fields, *BF16, *LAYOUTS["2x1x1" if variant == "gdn" else "1x1x2"])
        if variant == "gdn":
            train_with_broken_writer(config)
    for variant, name in worlds.share(1, itertools.product(VARIANTS, ("1x1x1", "2x1x1 to 1x1x1"))):
        with worlds.of(1, "one"):
            train(config, f"{variant} {name}", *FIELDS[variant])


class Runs:
    """What the runs in `root` wrote down."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _lines(self, name: str, kind: str) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.root / name / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    def steps(self, name: str, field: str) -> list[float]:
        """One value per step."""
        lines = self._lines(name, "step")
        assert not any(line["skipped"] for line in lines)
        return [line[field] for line in lines]

    def losses(self, name: str) -> list[float]:
        """Training loss of every step."""
        return self.steps(name, "loss")

    def evaluations(self, name: str, iteration: int = STEPS) -> dict[str, float]:
        """Validation loss by plan."""
        lines = [line for line in self._lines(name, "evaluation") if line["iteration"] == iteration]
        assert len(lines) == 3
        return {line["plan"]: line["loss"] for line in lines}

    def apart(self, name: str) -> dict[tuple[str, str], float]:
        """Validation loss under the plan of both modes at the end, by mode and by position."""
        (line,) = (
            line
            for line in self._lines(name, "evaluation")
            if line["iteration"] == STEPS and line["plan"] in MIXED.values()
        )
        return {(kind, group): loss for kind in ("modes", "positions") for group, loss in line[kind].items()}

    def loaded(self, name: str) -> dict[str, float]:
        """Validation loss by plan right after loading a checkpoint."""
        return json.loads((self.root / name / "loaded.json").read_text())


def trainer_of(project: Path, folder: Path, *fixed: str) -> Callable[..., Trainer]:
    """Makes trainers of a one-layer model on this process in a folder; called again it resumes."""
    from oryx_megatron.train.trainer import Trainer

    def make(*overrides: str, **arguments: Any) -> Trainer:
        small = ("model.num_layers=1", "train.global_batch_size=2", *fixed)
        run = load_run(project, [*small, f"output_dir={folder}", *overrides])
        return Trainer(run, validate(run, 1), **arguments)

    return make


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Of a run's metrics.jsonl."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]
